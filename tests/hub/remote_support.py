"""Reading from a loopback Hub as the tests do it: without real waits, and with an account kept."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import LoggedRequest, LoopbackHub
from v4surgery.checkpoint.patience import Patience
from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.recipes import Recipe

PARENT = "org/flash"


def quick_patience(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[float]:
    """From now on nobody waits between tries; gives the waits asked for."""
    waits: list[float] = []

    def wait(wake: threading.Event, seconds: float) -> bool:
        waits.append(seconds)
        return wake.wait(0.001)

    def make(silence: float) -> Patience:
        return Patience(**{"wait": wait, "silence": silence, **options})

    monkeypatch.setattr("v4surgery.checkpoint.remote.Patience", make)
    return waits


def open_parent(revision: str | None = None, **options: object) -> Checkpoint:
    return open_checkpoint(PARENT, revision=revision, **options)  # type: ignore[arg-type]


def half(layers: object = None) -> Recipe:
    """A cut that copies, gathers rows and columns, and remaps a hash table."""
    keep = {
        "layers": layers or {"count": 3, "compress_ratios": [0, 4, 4]},
        "experts": {"keep": 2, "by": "gate", "per_token": 1},
        "moe_intermediate_size": 32,
    }
    data = {"name": "half", "keep": keep, "store": {"dtype": "bf16", "max_shard_size": "1MB"}}
    return Recipe.model_validate(data)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def data_spans(log: Iterable[LoggedRequest], headers: dict[str, int]) -> list[tuple[str, int, int]]:
    """(file, begin, end) of what was asked of the tensors' data; headers are read from byte 0."""
    asked = [(r.file, *r.range) for r in log if r.origin == "storage" and r.range is not None]
    return [span for span in asked if span[1] > 0 and span[2] > headers[span[0]]]


def header_bytes(folder: Path) -> dict[str, int]:
    """Bytes before the data, prefix included, of each shard."""
    return {
        path.name: 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for path in folder.glob("*.safetensors")
    }


def outside(hub: LoopbackHub, repo_id: str = PARENT) -> list[str]:
    """Paths of requests that left a repository."""
    own = (f"/{repo_id}/resolve/", f"/api/models/{repo_id}/revision/")
    return [r.path for r in hub.requests("hub") if not r.path.startswith(own)]
