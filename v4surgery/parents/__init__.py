"""Parents in the box: small trained checkpoints in the published layout, and what measures them.

A name stands wherever a folder does: ``v4surgery generate python-14m --prompt "def "``; as a file
of prompts it stands for the held-out text, as a scores file for the parent's scores. Each folder's
README.md says what the parent is.
"""

from __future__ import annotations

import os
from pathlib import Path

HELD_OUT_FILE = "heldout.jsonl"
"""Text that the parent did not learn, one document a line."""
SCORES_FILE = "scores.safetensors"
"""Its scores on the documents of even number, with second moments."""

_ROOM = Path(__file__).parent


def parent_names() -> list[str]:
    """Names of the parents in the box."""
    return sorted(path.parent.name for path in _ROOM.glob("*/config.json"))


def parent_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a parent in the box; None if there is none of that name."""
    return _ROOM / name if os.fspath(name) in parent_names() else None


def boxed_file(path: Path, file: str) -> Path:
    """A file of the parent in the box that ``path`` names, unless something stands there."""
    folder = None if path.exists() else parent_folder(path)
    return path if folder is None else folder / file
