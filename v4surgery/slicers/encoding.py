"""Encoding computed values as a replica stores them: plain, FP8 in blocks, or FP4 in groups."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.catalogue import F16, F32, FP4, FP8_F32
from v4surgery.slicers.blocks import by_block, over_blocks


def narrowed(values: NDArray[np.float32], fmt: str) -> NDArray[Any]:
    """Values as F32, F16, or the bits of bf16."""
    if fmt == F32:
        return values
    return values.astype(np.float16) if fmt == F16 else formats.f32_to_bf16(values)


def quantized(
    values: NDArray[np.float32], fmt: str, block_scales: NDArray[np.float32] | None = None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
    """Values as FP4, FP8 or FP8_F32.

    Args:
        values: ``(rows, columns)``; of FP8, whole rows of blocks.
        fmt: The format.
        block_scales: Of FP8_F32 the scale of each 128x128 block; None chooses them.

    Returns:
        Codes, scales, and what the codes stand for, float32 ``(rows, columns)``.
    """
    if fmt == FP4:
        packed, scale = formats.quantize_fp4(values)
        group = np.repeat(scale, formats.FP4_GROUP, axis=1)
        return packed, scale, formats.decode_fp4(formats.unpack_fp4(packed), group, "f32")
    if block_scales is not None:
        code8, scale8 = formats.quantize_fp8(values, "F32", block_scales)
    else:
        dtype = "F32" if fmt == FP8_F32 else "F8_E8M0"
        code8, scale8 = formats.quantize_fp8(values, dtype)  # type: ignore[call-overload]
    return code8, scale8, formats.decode_fp8(code8, over_blocks(scale8, code8.shape), "f32")


def largest_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each 128x128 block the largest parent scale: values that had it come back unchanged.

    A block in which no scale is finite and unlike 0 holds no other number than 0: 1 serves.
    """
    result = by_block(np.maximum, np.where(np.isfinite(scales), np.abs(scales), np.float32(0)))
    result[result == 0] = 1
    return result
