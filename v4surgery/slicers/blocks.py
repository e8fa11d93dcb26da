"""Numbers of 128x128 blocks from those of their values, and back; the last may be partial."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4surgery.formats import FP8_BLOCK


def by_block(reduce: np.ufunc, values: NDArray[Any], width: int = FP8_BLOCK) -> NDArray[Any]:
    """What ``reduce`` makes of each block.

    Args:
        reduce: Such as ``np.maximum``.
        values: ``(R, C)``, a number for each value, or for so many that a row of a block has
            ``width``.
        width: Columns of a block.

    Returns:
        ``(ceil(R / 128), ceil(C / width))``.
    """
    rows = np.arange(0, values.shape[0], FP8_BLOCK)
    cols = np.arange(0, values.shape[1], width)
    result: NDArray[Any] = reduce.reduceat(reduce.reduceat(values, rows, axis=0), cols, axis=1)
    return result


def over_blocks(
    numbers: NDArray[Any], shape: tuple[int, ...], width: int = FP8_BLOCK
) -> NDArray[Any]:
    """At every place of ``shape`` the number of its block."""
    spread = np.repeat(np.repeat(numbers, FP8_BLOCK, 0), width, 1)
    return np.ascontiguousarray(spread[: shape[0], : shape[1]])
