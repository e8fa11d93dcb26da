"""convert as a command: it resumes, keeps to its memory, reads the Hub, and says what it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import v4surgery as v4surgery_package
from tests.cli.conftest import Run, Start
from tests.conversion.conftest import write_wide
from tests.hub.remote_support import quick_patience, weights_of
from tests.robustness.test_crash import digests, journal, kill
from tests.support.hub import LoopbackHub
from tests.support.parents import write_parent

PEAK = """
import re, sys
from v4surgery.cli import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) * 1024, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB in 1,500 tensors."""
    changes = {"n_routed_experts": 32, "vocab_size": 16384}
    return write_parent(tmp_path_factory.mktemp("big") / "parent", changes=changes)


@pytest.mark.parametrize("to", [("official", "--tp", "4"), ("fp8",)], ids=["official", "fp8"])
def test_convert_that_was_killed_finishes_with_the_same_bytes(
    to: tuple[str, ...], big: Path, start: Start, v4: Run, tmp_path: Path
) -> None:
    def command(out: Path) -> tuple[object, ...]:
        return ("convert", big, out, "--to", *to, "--max-workers", 2, "--json")

    whole = json.loads(v4(*command(tmp_path / "whole")).out)
    chunks = whole["chunks_computed"]
    out = tmp_path / "killed"
    for share in (6, 2):
        kill(start(*command(out)), out, chunks // share)
    done = len(journal(out))
    assert not (out / "v4surgery.json").exists() and not (out / "config.json").exists()
    report = json.loads(v4(*command(out)).out)
    assert report["chunks_reused"] == done >= chunks // 2
    assert report["chunks_computed"] == chunks - done
    assert report["report"] == whole["report"]
    assert digests(out) == digests(tmp_path / "whole")
    assert json.loads(v4(*command(out)).out)["already_complete"] is True


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """200 MB each way; a worker may take 40 MiB, the interpreter and numpy take the rest."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 2048, "n_routed_experts": 8}
    parent = write_wide(tmp_path / "parent", "flash", **sizes)
    total = sum(path.stat().st_size for path in parent.glob("*.safetensors"))
    assert total > 190_000_000
    idle = peak("inspect", parent, "--json")
    for words in (
        (parent, tmp_path / "official", "--to", "official", "--tp", "2"),
        (tmp_path / "official", tmp_path / "back", "--to", "published"),
    ):
        used = peak("convert", *words, "--max-workers", "2", "--memory", "84MB", "--json")
        assert used - idle < 2 * (40 << 20) + (24 << 20), words
    assert weights_of(parent) == weights_of(tmp_path / "back")


def peak(*args: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


def test_a_repository_converts_as_its_folder_does(
    hub: LoopbackHub, wide: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_patience(monkeypatch)
    hub.add_repo("org/flash", wide["flash"])
    v4 = v4surgery_package
    with v4.open("org/flash") as remote, v4.open(wide["flash"]) as folder:
        for to, ranks in (("official", 4), ("fp8", None)):
            v4.convert(remote, tmp_path / f"far-{to}", to, ranks=ranks)
            v4.convert(folder, tmp_path / f"near-{to}", to, ranks=ranks)
            assert weights_of(tmp_path / f"far-{to}") == weights_of(tmp_path / f"near-{to}") != {}
    # Official shards in a repository are read as the published layout, too.
    hub.add_repo("org/shards", tmp_path / "near-official")
    with v4.open("org/shards") as shards:
        v4.convert(shards, tmp_path / "back", "published")
    assert weights_of(tmp_path / "back") == weights_of(wide["flash"])


def test_dry_run_writes_nothing_and_says_what_would_be_done(
    wide: dict[str, Path], v4: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = v4("convert", wide["flash-base"], out, "--to", "official", "--tp", 2, "--dry-run")
    assert (done.code, done.err) == (0, "")
    for text in (
        "flash-base to official",
        "lost: mtp.0.emb.tok_emb, mtp.0.head: the official code takes the trunk's",
        "note: F32 scales stay F32 here",
        "may round: ",
        "in 2 file(s)",
    ):
        assert text in done.out
    plan = json.loads(v4("convert", wide["flash"], out, "--to", "fp8", "--dry-run", "--json").out)
    assert not out.exists()
    assert plan["transforms"]["requantize"] == plan["inexact"]["requantize"] == 8 * 3 * 6
    assert plan["lost"] == [] and plan["files"][0] == "model-00001-of-00008.safetensors"


def test_convert_tells_people_what_was_lost_and_rounded(
    wide: dict[str, Path], v4: Run, tmp_path: Path
) -> None:
    done = v4("convert", wide["flash"], tmp_path / "fp8", "--to", "fp8")
    assert (done.code, done.err) == (0, "")
    assert "requantized 144 tensors: 144 without loss" in done.out
    assert f"next: v4surgery verify {tmp_path}/fp8 --parent {wide['flash']}" in done.out
    again = v4("convert", wide["flash"], tmp_path / "fp8", "--to", "fp8")
    assert "already complete, nothing to do" in " ".join(again.out.split())
    other = v4("convert", wide["flash"], tmp_path / "fp8", "--to", "bf16")
    assert other.code == 1 and "finished output of another plan" in other.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--to", "int4"), "unknown target"),
        (("--to", "bf16", "--tp", "2"), "only official shards have ranks"),
        (("--to", "bf16", "--nonfinite", "hide"), "unknown policy"),
        (("--to", "official", "--tp", "3"), "cannot load this checkpoint on 3 rank(s)"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: tuple[str, ...], text: str, wide: dict[str, Path], v4: Run, tmp_path: Path
) -> None:
    done = v4("convert", wide["flash"], tmp_path / "out", *words)
    assert done.code in (1, 2) and text in done.err
    assert not (tmp_path / "out").exists()
