"""Where the tensors of a checkpoint lie: stored tensors, and the logical ones made of them."""

from __future__ import annotations

from typing import NamedTuple

from v4surgery.catalogue import Entry


class TensorRef(NamedTuple):
    """Where one stored tensor lies: half-open byte range of one file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        return (self.end - self.begin) // max(self.shape[0], 1) if self.shape else 0


class StoredTensorRef(NamedTuple):
    """One logical tensor as this checkpoint stores it.

    ``fmt`` is FP4, FP8 (E8M0 scales), FP8_F32 (F32 scales), or a plain dtype.
    """

    entry: Entry
    fmt: str
    weight: TensorRef
    scale: TensorRef | None

    @property
    def nbytes(self) -> int:
        scale = self.scale.end - self.scale.begin if self.scale else 0
        return self.weight.end - self.weight.begin + scale
