"""Streams of every prompt while they wait between blocks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class ActivationStore:
    """Streams of every prompt between blocks.

    Args:
        place: ``device`` (where they are), ``host`` memory, or ``disk``: files of a temporary
            folder.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._memory: dict[int, Tensor] = {}
        self._folder = tempfile.TemporaryDirectory() if place == "disk" else None

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __setitem__(self, number: int, h: Tensor) -> None:
        if self._folder is None:
            self._memory[number] = h if self._place == "device" else h.cpu()
        else:
            save_file({"h": h.contiguous().cpu()}, self._path(number))

    def __getitem__(self, number: int) -> Tensor:
        if self._folder is None:
            return self._memory[number]
        # A copy lies where torch aligns it; off its alignment a product may round otherwise.
        return load_file(self._path(number))["h"].clone()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{number}.safetensors"
