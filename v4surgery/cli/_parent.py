"""Which parent a verb works on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from v4surgery.cli._groups import Reading
from v4surgery.errors import UsageError

if TYPE_CHECKING:
    from v4surgery.checkpoint.reader import Checkpoint
    from v4surgery.recipes import Recipe


def recorded_parent(replica: Checkpoint, revision: str | None) -> str | None:
    """Repository and commit that a replica was cut from; None if it was a folder.

    Raises:
        CheckpointError: It is no replica.
    """
    from v4surgery.slicers.provenance import read_provenance

    recorded = read_provenance(replica)["parent"]
    if recorded.get("kind") != "hub":
        return None
    return str(recorded["name"]) if revision else f"{recorded['name']}@{recorded['revision']}"


def overrides_of(written: Sequence[str] | None, scores: Path | None) -> list[str]:
    """``--set`` and ``--scores`` as overrides of a recipe."""
    named = [] if scores is None else [f"scores={json.dumps(str(scores))}"]
    return [*(written or ()), *named]


def open_parent(recipe: Recipe, parent: str | None, reading: Reading) -> Checkpoint:
    """Open the parent that the command names, or else the recipe's.

    Raises:
        UsageError: Neither names one.
    """
    path = parent or recipe.parent
    if path is None:
        raise UsageError(
            "no parent",
            where=f"recipe {recipe.name}",
            rule="--parent, or `parent:` in the recipe",
            hint="give its folder with --parent; `--parent python-14m` is a small one in the box, "
            "`v4surgery synth --like demo --out demo-parent` makes one",
        )
    return reading.open(path)
