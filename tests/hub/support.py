"""Pushing as the tests do it, and looking at what came of it."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Done, Run
from tests.support.hub import LoopbackHub

TOKEN = "hf_CanaryThatMustNotBeSeen"
REPO = "me/half"
MINE = "---\nlicense: mit\n---\n\n# A card of my own\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def on_the_hub(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    """What a revision holds, without what the Hub puts into every repository."""
    commit = hub.repos[REPO].at(revision)
    assert commit is not None
    files = {path: blob.read(0, blob.size) for path, blob in commit.tree.items()}
    files.pop(".gitattributes", None)
    return files


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def pushed(cli: Run, replica: Path, *args: str) -> Done:
    """A push that goes well."""
    done = cli("push", replica, REPO, *args)
    assert done.code == 0, done.err
    return done


def refused(cli: Run, replica: Path, *args: str, code: int = 1) -> str:
    """stderr of a push that must fail, print nothing else, and show no token."""
    done = cli("push", replica, *(args if args and "/" in args[0] else (REPO, *args)))
    assert (done.code, done.out) == (code, ""), done
    assert "error: " in done.err and "Traceback" not in done.err
    assert TOKEN not in done.err
    return done.err


def changed_anything(hub: LoopbackHub) -> bool:
    """Whether any request but those that only look has come."""
    return any(request.method not in ("GET", "HEAD") for request in hub.requests())
