"""fp8_linear of few tokens, whose time is that of reading the weights.

A program owns BLOCK_N outputs, in one block of the weight's scales, of all tokens. It takes GROUPS
groups of 128 inputs at once, each multiplied by warps of its own; their sums meet at the end. The
weights are the wide side of the product. Activations that come without codes are quantized here,
as act_quant does, by every program again.

The formula, what is exact and what rounds are those of fp8_linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.act_quant import AMAX_FLOOR, group_exponent
from v4surgery.kernels.codes import (
    E4M3_MAX,
    FP8_BLOCK,
    INTERPRETED,
    e4m3_to_float,
    e8m0_to_float,
    float_to_e4m3,
    narrow,
    power_of_two,
    widen,
)

# From so many outputs on a program owns 32 of them, below 16: about 128 programs read the weights.
WIDE_OUTPUT = 4096
# GROUPS, warps, stages.
TILE = (4, 4, 3)


@triton.jit
def multiply(x, weight, NATIVE: tl.constexpr):
    """Products of codes, float32: (..., m, k) and (..., k, n) to (..., m, n)."""
    if not NATIVE:
        # The interpreter takes bf16 for integers.
        PRODUCT: tl.constexpr = tl.float32 if INTERPRETED else tl.bfloat16
        x, weight = e4m3_to_float(x).to(PRODUCT), e4m3_to_float(weight).to(PRODUCT)
    return tl.dot(x, weight)


@triton.jit
def quantize(x, NATIVE: tl.constexpr):
    """Codes and float32 scales of groups (g, m, 128); NaN spoils a group through its scale."""
    rows = widen(tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])))
    exponent, is_finite = group_exponent(rows, E4M3_MAX, AMAX_FLOOR)
    codes = tl.reshape(float_to_e4m3(rows * power_of_two(-exponent), NATIVE), x.shape)
    scale = tl.where(is_finite, power_of_two(exponent), float("nan"))
    if NATIVE:
        codes = codes.to(tl.float8e4nv, bitcast=True)
    return codes, tl.reshape(scale, (x.shape[0], x.shape[1]))


@triton.jit
def fp8_linear_few_kernel(
    y_ptr,
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    num_rows,
    num_out,
    num_in,
    stride_xm,
    stride_xsm,
    stride_wn,
    stride_sn,
    QUANTIZE: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    n0 = tl.program_id(0) * BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    outs = n0 + tl.arange(0, BLOCK_N)
    groups = tl.arange(0, GROUPS)
    cols = groups[:, None, None] * FP8_BLOCK + tl.arange(0, FP8_BLOCK)[None, None, :]
    has_row, has_out = rows < num_rows, outs < num_out
    num_groups = tl.cdiv(num_in, FP8_BLOCK)
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :, None] * stride_xm + cols
    weight_ptrs = weight_ptr + outs.to(tl.int64)[None, :, None] * stride_wn + cols
    scale_ptrs = scale_ptr + n0 // FP8_BLOCK * stride_sn + groups

    total = tl.zeros((GROUPS, BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, num_groups, GROUPS):
        col = first * FP8_BLOCK
        has_col = col + cols < num_in
        has_group = first + groups < num_groups
        x = tl.load(x_ptrs + col, mask=has_row[None, :, None] & has_col, other=0.0)
        weight = tl.load(weight_ptrs + col, mask=has_out[None, :, None] & has_col, other=0.0)
        if QUANTIZE:
            x, x_scale = quantize(x, NATIVE)
        else:
            x_scale_ptrs = x_scale_ptr + rows[None, :] * stride_xsm + first + groups[:, None]
            mask = has_group[:, None] & has_row[None, :]
            x_scale = e8m0_to_float(tl.load(x_scale_ptrs, mask=mask, other=0))
        scale = tl.load(scale_ptrs + first, mask=has_group, other=0)
        if HAS_BYTES:
            scale = e8m0_to_float(scale)
        product = multiply(weight, tl.permute(x, (0, 2, 1)), NATIVE)
        factor = (x_scale * scale[:, None])[:, None, :]
        total = tl.fma(product, tl.broadcast_to(factor, product.shape), total)

    y = narrow(tl.trans(tl.sum(total, 0)), tl.bfloat16)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * num_out + outs
    tl.store(y_ptrs, y, mask=has_row[:, None] & has_out[None, :])


def multiply_few(
    y: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    is_native: bool,
    block_n: int | None = None,
    tile: tuple[int, int, int] = TILE,
) -> None:
    """Fill ``y``, at most 64 rows; ``x`` holds codes if it has a scale, else bf16 or float32."""
    if block_n is None:
        block_n = 32 if y.shape[1] >= WIDE_OUTPUT else 16
    groups, num_warps, num_stages = tile
    fp8_linear_few_kernel[(triton.cdiv(y.shape[1], block_n),)](
        y, x if x_scale is None else as_codes(x, is_native), x_scale,
        as_codes(weight, is_native), scale,
        *y.shape, x.shape[1],
        x.stride(0), 0 if x_scale is None else x_scale.stride(0), weight.stride(0), scale.stride(0),
        QUANTIZE=x_scale is None, NATIVE=is_native, HAS_BYTES=scale.dtype == torch.uint8,
        BLOCK_M=max(16, triton.next_power_of_2(len(y))), BLOCK_N=block_n, GROUPS=groups,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def as_codes(codes: Tensor, is_native: bool) -> Tensor:
    """Codes in the type that the GPU multiplies, where it does."""
    return codes.view(torch.float8_e4m3fn) if is_native else codes
