"""What old versions of dependencies got wrong: the lower bounds are those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors

from tests.cli.conftest import Run

VERBS = ("inspect", "plan", "slice", "verify", "convert", "trace", "validate", "diff", "push")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_is_printed(verb: str, v4: Run) -> None:
    """typer 0.15 fails at it beside click 8.2; up to 0.17 it takes a missing option for None."""
    done = v4(verb, "--help")
    assert (done.code, done.err) == (0, "") and "Usage: v4surgery" in done.out


def test_safetensors_reads_the_formats_of_the_published_weights(small_parent: Path) -> None:
    """safetensors 0.5 knows no F8_E8M0."""
    found = set()
    for path in sorted(small_parent.glob("*.safetensors")):
        found |= {info["dtype"] for _, info in safetensors.deserialize(path.read_bytes())}
    assert {"F8_E8M0", "F8_E4M3", "I8", "BF16", "F32", "I64"} <= found
