"""FP4 as FP8 with a scale for 128x128 values, by table: nothing is decoded.

A group of 32 values whose scale is 2^d of its block's has 16 values, and so 256 bytes of two, for
each d. Where d is at least -8 in a whole chunk every value comes back; what lies further apart is
left to quantization by value.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.formats import ErrorStats
from v4surgery.slicers.blocks import by_block, over_blocks

U8Array = NDArray[np.uint8]
_GROUP_BYTES = formats.FP4_GROUP // 2
_GROUPS = formats.FP8_BLOCK // formats.FP4_GROUP
# 0.5 * 2^-8 is the smallest number of E4M3, and 1.5 * 2^-8 thrice that.
_LOWEST = -8
# The block's largest value is below 448 * 2^0 and a group's at least 0.5 * 2^d.
_HIGHEST = 9
_MAGNITUDES = formats.E2M1_VALUES[:8]


def fp4_to_fp8(packed: U8Array, scales: U8Array) -> tuple[U8Array, U8Array, ErrorStats] | None:
    """The codes and scales of ``quantize_fp8`` for decoded FP4, if they lose nothing.

    Args:
        packed: ``(R, C/2)`` uint8, two E2M1 codes a byte.
        scales: ``(R, C/32)`` uint8, E8M0.

    Returns:
        Codes ``(R, C)`` and scales ``(ceil(R/128), ceil(C/128))``, E8M0; and what was compared.
        None where a scale is NaN, a value is beyond float32, or one may change.
    """
    if (scales == formats.E8M0_NAN).any():
        return None
    groups = packed.reshape(*scales.shape, _GROUP_BYTES)
    largest = _MAGNITUDES[_largest_code(groups)]
    with np.errstate(over="ignore"):
        amax = largest * formats.E8M0_VALUES[scales]
    if not np.isfinite(amax).all():
        return None
    block_scales = formats.e8m0_scales(by_block(np.maximum, amax, _GROUPS), formats.E4M3_MAX)
    d = scales.astype(np.int16) - over_blocks(block_scales, scales.shape, _GROUPS)
    d[largest == 0] = 0  # zeros are zeros under any scale
    if d.min(initial=0) < _LOWEST:
        return None
    index = (d - _LOWEST).astype(np.uint16)[..., None] << 8 | groups
    codes = _pairs().take(index).view(np.uint8).reshape(packed.shape[0], -1)
    return codes, block_scales, _nothing_lost(groups, scales)


def _largest_code(groups: U8Array) -> U8Array:
    """The largest magnitude of each group, ``(R, C/32)``, as a code: they are in order."""
    halves = np.maximum(groups & 7, groups >> 4 & 7)
    while halves.shape[-1] > 1:
        middle = halves.shape[-1] // 2
        halves = np.maximum(halves[..., :middle], halves[..., middle:])
    largest: U8Array = halves[..., 0]
    return largest


def _nothing_lost(groups: U8Array, scales: U8Array) -> ErrorStats:
    squares = _squares().take(groups) @ np.ones(_GROUP_BYTES, np.float32)  # exact
    factors = np.square(formats.E8M0_VALUES[scales].astype(np.float64))
    return ErrorStats(count=2 * groups.size, sum_sq=float((squares * factors).sum()))


@cache
def _pairs() -> NDArray[np.uint16]:
    """Two FP8 codes for each d and byte of two FP4 codes."""
    d = np.arange(_LOWEST, _HIGHEST + 1)[:, None]
    with np.errstate(over="ignore"):  # of a d that no value of 6 can have
        codes = formats.encode_e4m3(formats.E2M1_VALUES * np.exp2(d.astype(np.float32)))
    byte = np.arange(256)
    pairs: NDArray[np.uint16] = np.stack([codes[:, byte & 15], codes[:, byte >> 4]], -1).view("<u2")
    return pairs[..., 0]


@cache
def _squares() -> NDArray[np.float32]:
    """The sum of the squares of a byte's two values: quarters up to 72."""
    byte, squares = np.arange(256), np.square(formats.E2M1_VALUES)
    found: NDArray[np.float32] = squares[byte & 15] + squares[byte >> 4]
    return found
