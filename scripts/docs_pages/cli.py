"""docs/cli.md: every verb's help, as printed at 80 columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from docs_pages.markdown import fenced, table
from v4surgery.cli import app


def cli_page() -> Iterator[str]:
    """Every verb's help, as printed at 80 columns."""
    yield "# The command line"
    yield (
        "The result goes to stdout; progress (on a terminal only), warnings and errors to stderr. "
        "`--json` prints one JSON document on stdout and nothing else. Errors are a few lines: "
        "what, where, the value, the rule, and what to do next; `v4surgery --debug VERB ...` adds "
        "the traceback."
    )
    yield table(
        ("exit code", "meaning"),
        (
            (0, "done"),
            (1, "failed: a file, a folder, a parent, or a recipe that does not fit it"),
            (2, "usage: the command, an option, or a recipe with mistakes"),
            (3, "the check ran, and the replica failed it"),
            (
                130,
                "interrupted; `synth`, `slice`, `convert` and `push` go on where they stopped "
                "when run again",
            ),
        ),
    )
    for words in verbs(get_command(app)):
        yield f"## {' '.join(('v4surgery', *words))}"
        yield fenced(help_text(words), "text")


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every verb and group, the program itself first."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*path, name))


def help_text(words: Sequence[str]) -> str:
    os.environ["COLUMNS"] = "80"
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="v4surgery")
    assert result.exit_code == 0, result.output
    return result.stdout
