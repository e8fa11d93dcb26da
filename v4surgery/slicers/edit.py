"""How one tensor of a replica comes about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from v4surgery.catalogue import Entry, StoredTensor
from v4surgery.checkpoint.layout import OutputTensor
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.formats import FP8_BLOCK
from v4surgery.slicers.bases import Mix
from v4surgery.slicers.hash_table import HashRemap
from v4surgery.slicers.selection import IntArray

COPY, GATHER, DEQUANTIZE, REQUANTIZE, SCALE, REMAP, INTERPOLATE, ZERO, RANDOM = (
    "copy",
    "gather",
    "dequantize",
    "requantize",
    "scale",
    "remap",
    "interpolate",
    "zero",
    "random",
)
FOLD, ROTATE, FACTOR = "fold", "rotate", "factor"
TRANSFORMS: Mapping[str, str] = {
    COPY: "the parent's bytes, whole",
    GATHER: "the parent's bytes, some rows and columns (whole blocks where quantized)",
    DEQUANTIZE: "decoded to bf16 or f32 (exact, unless it was wider or has arbitrary F32 scales)",
    REQUANTIZE: "decoded, cut and quantized again (the error is measured and reported)",
    SCALE: "multiplied by the factor of `compensate`, rounded once",
    REMAP: "hash table rows with removed experts replaced",
    INTERPOLATE: "ape rows interpolated to another ratio",
    FOLD: "ones (times the factor of `compensate`): absorbed into the weights that follow",
    ROTATE: "in a rotated basis, norms absorbed, rounded once",
    FACTOR: "a factor of the truncated SVD of wo_b @ wo_a, rounded once",
    ZERO: "zeros (a gate bias that the parent does not have)",
    RANDOM: "random initialisation",
}
MIX_ELEMENTS = 1 << 22
"""Of a result with mixed rows, computed at a time."""


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """How one logical tensor of the replica comes about.

    Attributes:
        target: The replica's tensor.
        source: The parent's, as stored; None where nothing of the parent is used.
        transform: One of :data:`TRANSFORMS`.
        fmt: Format of the replica's tensor.
        shape: Logical shape of the replica's tensor.
        rows: Parent rows kept, int64, or None for all.
        cols: Parent columns kept; ``(groups, columns)`` for wo_a, whose columns depend on the
            row's group; None for all.
        factor: What ``compensate`` multiplies the values with.
        remap: For hash tables.
        outputs: The stored tensors: the weight, then its scale.
        mix: What happens to axes that are mixed; None where units are picked.
    """

    target: Entry
    source: StoredTensorRef | None
    transform: str
    fmt: str
    shape: tuple[int, ...]
    rows: IntArray | None
    cols: IntArray | None
    factor: float
    remap: HashRemap | None
    outputs: tuple[StoredTensor, ...]
    mix: Mix | None = None

    @property
    def row_slices(self) -> slice | IntArray:
        assert self.source is not None
        return slice(0, self.source.weight.shape[0]) if self.rows is None else self.rows

    @property
    def passes(self) -> int:
        """How often the source is read."""
        if self.mix is None or self.mix.rows is None or self.transform == FOLD:
            return 1
        return -(-self.shape[0] // self.rows_a_pass)

    @property
    def rows_a_pass(self) -> int:
        """Rows of a result with mixed rows that one pass over its source computes."""
        rows = max(MIX_ELEMENTS // self.shape[1], 1)
        return min(max(rows // FP8_BLOCK, 1) * FP8_BLOCK, self.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(OutputTensor(*output).nbytes for output in self.outputs)
