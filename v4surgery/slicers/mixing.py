"""Rows of a tensor whose axes are mixed: ``into (X diag(w)) out``, in float64, panel by panel.

A row of the result needs every row of what is mixed, so a tensor with mixed rows is read once for
each chunk of its result; chunks are large enough that a V4 expert takes one or two.

Products are float64 and are rounded once: whatever order a BLAS adds in, two machines differ by
less than :attr:`Mixer.slack` before that rounding, hence by one unit of the stored format after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.slicers.basis_file import BasisFile
from v4surgery.slicers.edit import TensorEdit

Float = NDArray[np.float64]
ReadRows = Callable[[int, int], NDArray[np.float32]]

PANEL_ELEMENTS = 1 << 20
MIXING_BYTES = 160 << 20
"""What a worker needs at most: result and product of 32 MB each, a panel decoded, and bases."""
# A BLAS has threads of its own: products of several workers at once would only wait for each other.
_one_product = threading.Lock()


class Mixer:
    """Computes rows of one edit.

    Args:
        parent: Where norms are read.
        edit: With a ``mix``.
        bases: As recorded.
        read: Gives rows of the source, by their number among those picked, columns picked too.

    Attributes:
        slack: How far two machines may be apart in the rows computed last.
    """

    def __init__(
        self, parent: Checkpoint, edit: TensorEdit, bases: BasisFile, read: ReadRows
    ) -> None:
        self.parent, self.edit, self.bases, self.read = parent, edit, bases, read
        self.slack = 0.0

    def rows(self, begin: int, end: int) -> Float:
        """Rows ``[begin, end)`` of the result, ``(rows, columns)``."""
        mix = self.edit.mix
        assert mix is not None
        out = None if mix.cols is None else self.bases.out(mix.cols)
        if mix.rows is None:
            result, self.slack = self._times_out(self.read(begin, end), out)
            return result * (self.edit.factor * kept_factor(self.edit, self.bases))
        into = self.bases.into(mix.rows)
        _, keep, size = into.shape
        result, self.slack = np.zeros((end - begin, self.edit.shape[1])), 0.0
        panel = max(PANEL_ELEMENTS // self._source_width(out), 1)
        for group in range(begin // keep, -(-end // keep)):
            first, last = max(begin, group * keep), min(end, (group + 1) * keep)
            part = into[group % len(into), first - group * keep : last - group * keep]
            for row in range(0, size, panel):
                stop = min(row + panel, size)
                x, before = self._times_out(self.read(group * size + row, group * size + stop), out)
                with _one_product:
                    product = part[:, row:stop] @ x
                result[first - begin : last - begin] += product
                self.slack += _rounding(part[:, row:stop], x, before)
        return result

    def _times_out(self, rows: NDArray[np.float32], out: Float | None) -> tuple[Float, float]:
        """Rows with the norm folded in, times ``out`` in each block of columns; its rounding."""
        with np.errstate(invalid="ignore"):  # signalling NaNs; what is not finite is counted
            x = rows.astype(np.float64)
        mix = self.edit.mix
        assert mix is not None
        if mix.fold is not None:
            x *= self.bases.norm(self.parent, mix.fold.entry.stem)
        if out is None:
            return x, 0.0
        blocks = x.reshape(len(x), -1, out.shape[1]).swapaxes(0, 1)
        slack = max(_rounding(block, out[i % len(out)]) for i, block in enumerate(blocks))
        with _one_product:
            product = np.matmul(blocks, out)
        return product.swapaxes(0, 1).reshape(len(x), -1), slack

    def _source_width(self, out: Float | None) -> int:
        width = self.edit.shape[1]
        return width if out is None else width // out.shape[2] * out.shape[1]


def kept_factor(edit: TensorEdit, bases: BasisFile) -> float:
    """What ``compensate`` takes for the energy that a basis keeps; see :mod:`.bases`."""
    if edit.mix is None or edit.mix.kept is None:
        return 1.0
    return float(np.sqrt(bases.kept(edit.mix.kept)[0]))


def _rounding(a: Float, b: Float, before: float = 0.0) -> float:
    """Bound on the difference of two float64 products of the same matrices.

    Each of K additions rounds by 2^-53 of at most sum |a b| <= |row of a| |column of b|; entries
    of b that are ``before`` apart already add at most |row of a| sqrt(K) times that.
    """
    if not a.size or not b.size:
        return 0.0
    row, column = np.linalg.norm(a, axis=1).max(), np.linalg.norm(b, axis=0).max()
    terms = a.shape[1]
    return float(row * (terms * 2.0**-52 * column + terms**0.5 * before))
