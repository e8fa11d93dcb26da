"""Parents in the box: small trained checkpoints in the published layout, and text held out of them.

A name stands wherever a folder does: ``v4surgery generate python-14m --prompt "def "``; as a file
of prompts it stands for the held-out text. Each folder's README.md says what the parent is.
"""

from __future__ import annotations

import os
from pathlib import Path

HELD_OUT_FILE = "heldout.jsonl"
_ROOM = Path(__file__).parent


def parent_names() -> list[str]:
    """Names of the parents in the box."""
    return sorted(path.parent.name for path in _ROOM.glob("*/config.json"))


def parent_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a parent in the box; None if there is none of that name."""
    return _ROOM / name if os.fspath(name) in parent_names() else None


def held_out_prompts(name: str | os.PathLike[str]) -> Path | None:
    """The held-out text of a parent in the box, one document a line of JSON."""
    folder = parent_folder(name)
    return None if folder is None else folder / HELD_OUT_FILE
