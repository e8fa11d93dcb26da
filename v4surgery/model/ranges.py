"""Stored tensors into device memory: adjacent ones in one read, several reads at a time.

Tensors of a block lie side by side in the published files, so they are read as long runs into one
buffer on the device, and each tensor is a view of it. For CUDA every reading thread has two pinned
staging buffers and a stream of its own, so that reading and copying overlap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef, TensorRef
from v4surgery.model.loader import TORCH_DTYPE

PIECE_BYTES = 8 << 20
ALIGNMENT = 16  # what kernels want of every matrix
Tensors = dict[TensorRef, Tensor]


class Piece(NamedTuple):
    """Bytes of a file and where they go in the buffer."""

    file: str
    begin: int
    end: int
    offset: int


class RangeLoader:
    """Reads stored tensors to a device.

    Args:
        checkpoint: Where the bytes come from.
        device: Where they go.
        workers: Reading threads.

    Attributes:
        bytes_read: Bytes of tensors read so far.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, workers: int) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.bytes_read = 0
        self._pool = ThreadPoolExecutor(workers, "v4surgery-load")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._streams: list[torch.cuda.Stream] = []

    def load(self, refs: Sequence[TensorRef]) -> Tensors:
        """The tensors as stored, on the device; FP4, FP8 and E8M0 as uint8 codes.

        Raises:
            ReadError: Bytes could not be read exactly.
        """
        ordered, offsets, size, pieces = lay_out(refs)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        views: Tensors = {}

        def make_views() -> None:
            views.update({ref: view_of(buffer, offsets[ref], ref) for ref in ordered})

        self.read(buffer, pieces, meanwhile=make_views)
        with self._lock:
            self.bytes_read += sum(ref.end - ref.begin for ref in ordered)
        return views

    def begin(
        self, common: Sequence[TensorRef], own: Sequence[TensorRef]
    ) -> tuple[Tensors, Callable[[], Tensors]]:
        """Read what every rank of a run needs, and what this one alone does.

        Returns:
            The own tensors; and what gives the common ones, called by the thread that computes.
        """
        loaded = self.load([*common, *own])
        return loaded, lambda: loaded

    def load_common(self, refs: Sequence[TensorRef]) -> Tensors:
        """Tensors that every rank needs."""
        return self.begin(refs, [])[1]()

    def read(
        self, buffer: Tensor, pieces: Sequence[Piece], meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Read pieces of files into a buffer on the device, and call ``meanwhile`` meanwhile."""
        ready = self._event()
        reads = self._pool.map(lambda piece: self._read(buffer, piece, ready), pieces)
        if meanwhile is not None:
            meanwhile()
        list(reads)
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _event(self) -> torch.cuda.Event | None:
        """When the device is done with whatever used the buffer's memory before."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read(self, buffer: Tensor, piece: Piece, ready: torch.cuda.Event | None) -> None:
        source, size = self.checkpoint.source, piece.end - piece.begin
        target = buffer[piece.offset : piece.offset + size]
        if ready is None:
            source.read_into(piece.file, piece.begin, _memory(target))
            return
        if not hasattr(self._local, "staging"):
            self._local.staging = _Staging(self.device)
            with self._lock:
                self._streams.append(self._local.staging.stream)
        staging: _Staging = self._local.staging
        slot, copied = staging.next_slot()
        copied.synchronize()  # before the slot is overwritten
        source.read_into(piece.file, piece.begin, _memory(slot)[:size])
        with torch.cuda.stream(staging.stream):
            staging.stream.wait_event(ready)
            target.copy_(slot[:size], non_blocking=True)
            copied.record(staging.stream)


class _Staging:
    """A reading thread's pinned buffers: one is read into while the other is copied from."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._slots = [
            (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(2)
        ]

    def next_slot(self) -> tuple[Tensor, torch.cuda.Event]:
        self._slots.reverse()
        return self._slots[0]


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type,unused-ignore]


def lay_out(
    refs: Sequence[TensorRef],
) -> tuple[list[TensorRef], dict[TensorRef, int], int, list[Piece]]:
    """Tensors in file order, their places in one buffer, its size, and what to read into it."""
    ordered = sorted(set(refs), key=lambda ref: (ref.file, ref.begin))
    offsets = _offsets(ordered)
    size = max((offsets[ref] + ref.end - ref.begin for ref in ordered), default=0)
    return ordered, offsets, size, _pieces(ordered, offsets)


def _offsets(ordered: Sequence[TensorRef]) -> dict[TensorRef, int]:
    """Place of each tensor in the buffer, aligned; neighbours in a file are mostly neighbours."""
    offsets: dict[TensorRef, int] = {}
    end = 0
    for ref in ordered:
        offsets[ref] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[ref] + ref.end - ref.begin
    return offsets


def _pieces(ordered: Sequence[TensorRef], offsets: dict[TensorRef, int]) -> list[Piece]:
    """Runs of tensors that are adjacent in file and buffer, cut to the size of a staging buffer."""
    breaks = [
        i + 1
        for i, (a, b) in enumerate(pairwise(ordered))
        if (a.file, a.end, offsets[a] - a.begin) != (b.file, b.begin, offsets[b] - b.begin)
    ]
    pieces = []
    for first, last in pairwise([0, *breaks, len(ordered)]):
        if first == last:
            continue
        head, tail = ordered[first], ordered[last - 1]
        for begin in range(head.begin, tail.end, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, tail.end)
            pieces.append(Piece(head.file, begin, end, offsets[head] + begin - head.begin))
    return pieces


def view_of(buffer: Tensor, offset: int, ref: TensorRef) -> Tensor:
    """A tensor in a buffer."""
    flat = buffer[offset : offset + ref.end - ref.begin]
    return flat.view(TORCH_DTYPE[ref.dtype]).reshape(ref.shape)


def tensor_refs(stored: StoredTensorRef) -> list[TensorRef]:
    """The weight, and the scale if there is one."""
    return [stored.weight] if stored.scale is None else [stored.weight, stored.scale]
