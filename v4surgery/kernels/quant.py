"""Encode weights: FP8 (E4M3, blocks of 128x128) and FP4 (E2M1, groups of 32).

    scale = 2^ceil(log2(amax / 448)), for FP4 / 6, as an E8M0 byte; 1 where amax is zero
    scale = amax / 448 as float32 (FP8 of Base)
    code  = nearest(x / scale), ties to even

amax is the largest finite magnitude; infinities saturate; NaN stays NaN (FP4: its group gets scale
byte 255). Bytes: two neighbours are one word (32 bits of bf16, 64 of float32) where FP4 holds them
as one byte; loads and stores have one layout.

Programs: one 128x128 block; FP4 BLOCK_G groups, of a whole stack as one long row.
Exact: E8M0 scales, and division by them. Rounded, to nearest even: codes, float32 scales and
division by those. Source: spec/checkpoint.md, "Number formats".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.blocks import (
    INFINITY_BITS,
    block_grid,
    encode_e4m3,
    find_block,
    finite_magnitude_bits,
    magnitude_bits,
    new_blocks,
    require_matrices,
    scale_byte,
)
from v4surgery.kernels.codes import (
    E2M1_MAX,
    E4M3_MAX,
    FP4_GROUP,
    FP8_BLOCK,
    float_to_e2m1,
    power_of_two,
    widen,
)
from v4surgery.kernels.fp4_to_fp8 import fp4_to_fp8
from v4surgery.kernels.launch import has_fp8

__all__ = ["fp4_to_fp8", "quant_fp4", "quant_fp8"]

GROUP_WORDS = tl.constexpr(16)
SLICE = tl.constexpr(8)

# Warps of a block; groups of 32 and warps of a program by bytes of a value.
FP8_WARPS = 16
FP4_TILES = {2: (128, 8), 4: (64, 8)}


@triton.jit
def _store_scale(scale_ptr, amax):
    """Store a block's scale and return a factor for E8M0, a divisor for float32."""
    if scale_ptr.dtype.element_ty == tl.uint8:
        byte = scale_byte(amax, E4M3_MAX)
        tl.store(scale_ptr, byte.to(tl.uint8))
        scale = power_of_two(127 - byte)
    else:
        # A subnormal amax underflows; its block is as good as zero.
        scale = tl.div_rn(amax.to(tl.float32, bitcast=True), E4M3_MAX)
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(scale_ptr, scale)
    return scale


@triton.jit
def _apply_scale(x, scale, IS_FACTOR: tl.constexpr):
    return x * scale if IS_FACTOR else tl.div_rn(x, tl.zeros_like(x) + scale)


@triton.jit
def _quant_special_block(
    codes_ptr, scale_ptr, x_ptr, num_rows, num_cols, stride_xm, NATIVE_FP8: tl.constexpr
):
    """A block that holds NaN or infinity: a few rows at a time, so that it needs few registers."""
    row, col = tl.arange(0, SLICE)[:, None], tl.arange(0, FP8_BLOCK)[None, :]
    amax = tl.full((), 0, tl.int32)
    for first in range(0, FP8_BLOCK, SLICE):
        mask = (first + row < num_rows) & (col < num_cols)
        x = widen(tl.load(x_ptr + (first + row) * stride_xm + col, mask=mask, other=0))
        amax = tl.maximum(amax, tl.max(finite_magnitude_bits(x)))
    scale = _store_scale(scale_ptr, amax)
    for first in range(0, FP8_BLOCK, SLICE):
        mask = (first + row < num_rows) & (col < num_cols)
        index = (first + row) * stride_xm + col
        x = widen(tl.load(x_ptr + index, mask=mask, other=0))
        scaled = _apply_scale(x, scale, scale_ptr.dtype.element_ty == tl.uint8)
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        code = tl.where(x != x, sign | 0x7F, encode_e4m3(scaled, NATIVE_FP8))
        tl.store(codes_ptr + index, code.to(tl.uint8), mask=mask)


@triton.jit
def _quant_fp8_kernel(
    codes_ptr,
    scale_ptr,
    x_ptr,
    num_rows,
    num_cols,
    NATIVE_FP8: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    block, first_row, start = find_block(num_rows, num_cols, FP8_BLOCK)
    rows_left, cols_left = num_rows - first_row, num_cols - tl.program_id(0) * FP8_BLOCK
    row, col = tl.arange(0, FP8_BLOCK)[:, None], tl.arange(0, FP8_BLOCK)[None, :]
    mask = (row < rows_left) & (col < cols_left)
    index = tl.max_contiguous(row * num_cols + col, [1, VECTOR])
    x_ptr += start
    codes_ptr += start
    scale_ptr += block
    x = widen(tl.load(x_ptr + index, mask=mask, other=0))
    amax = tl.max(magnitude_bits(x))
    if amax < INFINITY_BITS:
        scale = _store_scale(scale_ptr, amax)
        scaled = _apply_scale(x, scale, scale_ptr.dtype.element_ty == tl.uint8)
        tl.store(codes_ptr + index, encode_e4m3(scaled, NATIVE_FP8), mask=mask)
    else:
        _quant_special_block(
            codes_ptr, scale_ptr, x_ptr, rows_left, cols_left, num_cols, NATIVE_FP8
        )


@triton.jit
def _unpack_pair(word):
    """Both float32 of a word of two bf16 or two float32."""
    if word.dtype == tl.int64:
        low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    else:
        bits = word.to(tl.uint32, bitcast=True)
        low, high = bits << 16, bits & 0xFFFF0000
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _saturate(x, byte, has_nan):
    """Infinity as the largest value under a group's scale byte; zeros for a group with NaN."""
    limit = tl.where(byte == 0, E2M1_MAX * 2.0**-127, E2M1_MAX * power_of_two(byte - 127))
    x = tl.minimum(tl.maximum(x, -limit), limit)
    return tl.where(has_nan, 0.0, x)


@triton.jit
def _quant_fp4_kernel(
    packed_ptr,
    scale_ptr,
    words_ptr,
    num_groups,
    BLOCK_G: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // words_ptr.dtype.element_ty.primitive_bitwidth
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask = group < num_groups
    index = group[:, None] * GROUP_WORDS + tl.arange(0, GROUP_WORDS)[None, :]
    index = tl.max_contiguous(index, [1, VECTOR])
    low, high = _unpack_pair(tl.load(words_ptr + index, mask=mask[:, None], other=0))

    amax = tl.max(tl.maximum(magnitude_bits(low), magnitude_bits(high)), 1)
    byte = scale_byte(amax, E2M1_MAX)
    inverse = power_of_two(127 - byte)
    if tl.max(amax) >= INFINITY_BITS:
        has_nan = amax > INFINITY_BITS
        amax = tl.max(tl.maximum(finite_magnitude_bits(low), finite_magnitude_bits(high)), 1)
        byte = scale_byte(amax, E2M1_MAX)
        inverse = power_of_two(127 - byte)
        low = _saturate(low, byte[:, None], has_nan[:, None])
        high = _saturate(high, byte[:, None], has_nan[:, None])
        byte = tl.where(has_nan, 255, byte)
    tl.store(scale_ptr + group, byte.to(tl.uint8), mask=mask)
    low_code = float_to_e2m1(low * inverse[:, None])
    high_code = float_to_e2m1(high * inverse[:, None])
    tl.store(packed_ptr + index, low_code | (high_code << 4), mask=mask[:, None])


def quant_fp8(x: Tensor, scale_dtype: str = "F8_E8M0") -> tuple[Tensor, Tensor]:
    """Encode FP8.

    Args:
        x: bf16 or float32 ``(R, C)``, or a stack ``(E, R, C)``. NaN becomes a NaN code.
        scale_dtype: ``F8_E8M0``, or ``F32`` as in Base.

    Returns:
        Codes, uint8 of the shape of ``x``; scales, E8M0 bytes as uint8 or float32
        ``(ceil(R/128), ceil(C/128))``, under the stack's axis.

    Raises:
        UsageError: A wrong dtype, shape or device, or another ``scale_dtype``.
    """
    require_matrices("quant_fp8", "x", x, torch.bfloat16, torch.float32)
    stored = {"F8_E8M0": torch.uint8, "F32": torch.float32}
    if scale_dtype not in stored:
        raise UsageError(
            "no such scale", where="quant_fp8", value=scale_dtype, rule=" or ".join(stored)
        )
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = new_blocks(x.shape, stored[scale_dtype], x.device)
    if x.numel():
        _quant_fp8_kernel[block_grid(scale)](
            codes, scale, x.contiguous(), *x.shape[-2:], has_fp8(x.device), num_warps=FP8_WARPS
        )
    return codes, scale


def quant_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode FP4.

    Args:
        x: bf16 or float32 ``(R, C)``, or a stack ``(E, R, C)``; C a multiple of 32.

    Returns:
        Two codes a byte, uint8 ``(R, C/2)``, and E8M0 bytes, uint8 ``(R, C/32)``, under the
        stack's axis. E2M1 has no NaN: a group that holds one gets scale byte 255 and codes 0, so
        that it decodes to NaN.

    Raises:
        UsageError: A wrong dtype, shape or device.
    """
    require_matrices("quant_fp4", "x", x, torch.bfloat16, torch.float32)
    *rows, cols = x.shape
    if cols % FP4_GROUP.value:
        raise UsageError(
            "x does not fall into groups",
            where="quant_fp4",
            value=tuple(x.shape),
            rule="a multiple of 32 columns",
        )
    packed = torch.empty((*rows, cols // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*rows, cols // FP4_GROUP.value), dtype=torch.uint8, device=x.device)
    if x.numel():
        words = x.contiguous().view(torch.int32 if x.dtype == torch.bfloat16 else torch.int64)
        block, num_warps = FP4_TILES[x.itemsize]
        _quant_fp4_kernel[(triton.cdiv(scale.numel(), block),)](
            packed, scale, words, scale.numel(), block, num_warps=num_warps
        )
    return packed, scale
