"""Reading what all ranks need: each rank a part of the bytes, which are then exchanged.

No byte is read twice, so that the rate of reading grows with the ranks. What a rank needs alone,
its experts, it reads alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import TensorRef
from v4surgery.distributed.team import Team
from v4surgery.model.ranges import (
    ALIGNMENT,
    Piece,
    RangeLoader,
    Tensors,
    lay_out,
    view_of,
)


class SharedLoader(RangeLoader):
    """Reads stored tensors to the device of each rank of a team."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, workers: int, team: Team
    ) -> None:
        super().__init__(checkpoint, device, workers)
        self.team = team

    def begin(
        self, common: Sequence[TensorRef], own: Sequence[TensorRef]
    ) -> tuple[Tensors, Callable[[], Tensors]]:
        """Read ``own`` and this rank's part of ``common``; what is called later exchanges parts."""
        mine = self.load(own) if own else {}
        ordered, offsets, size, pieces = lay_out(common)
        part = -(-size // (self.team.size * ALIGNMENT)) * ALIGNMENT
        parts = torch.empty(self.team.size, part, dtype=torch.uint8, device=self.device)
        begin = self.team.place * part
        wanted = list(_within(pieces, begin, begin + part))
        self.read(parts.view(-1), wanted)
        with self._lock:
            self.bytes_read += sum(piece.end - piece.begin for piece in wanted)

        def finish() -> Tensors:
            if size:
                self.team.join(parts)
            flat = parts.view(-1)
            return {ref: view_of(flat, offsets[ref], ref) for ref in ordered}

        return mine, finish


def _within(pieces: Sequence[Piece], begin: int, end: int) -> Iterator[Piece]:
    """The pieces cut to bytes ``begin`` to ``end`` of the buffer."""
    for piece in pieces:
        first = max(begin, piece.offset)
        last = min(end, piece.offset + piece.end - piece.begin)
        if first < last:
            shift = piece.begin - piece.offset
            yield Piece(piece.file, first + shift, last + shift, first)
