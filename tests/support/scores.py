"""Scores files that were not measured: any numbers, in the format that docs/scores.md gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from v4surgery.checkpoint.reader import Checkpoint


def about(parent: Checkpoint, **changes: Any) -> dict[str, str]:
    """Metadata of a scores file of a parent."""
    content = {"format": 1, "parent": {"name": "made up", "fingerprint": parent.fingerprint}}
    return {"v4surgery.scores": json.dumps({**content, **changes})}


def write_scores(
    path: Path, parent: Checkpoint, scores: Mapping[str, np.ndarray], **changes: Any
) -> Path:
    """A scores file; ``changes`` are laid over its metadata."""
    save_file(dict(scores), path, about(parent, **changes))
    return path
