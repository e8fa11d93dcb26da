"""Round activations to FP4 and back, in groups of 32: what the indexer's q and k go through.

    scale = 2^ceil(log2(amax / 6)), from 2^-126 on
    value = e2m1(x / scale) * scale                 to nearest even

A group that holds NaN or infinity becomes NaN. A program owns BLOCK_G groups of GROUP neighbours of
the last axis; the last group of a row may be partial.

Exact: scales, division and multiplication by them; the result fits into bf16. Rounded: values.
Source: spec/forward.md, "Quantization in the official code".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.act_quant import find_groups, group_exponent, rows_of
from v4surgery.kernels.codes import E2M1_MAX, narrow, power_of_two, round_to_e2m1, widen

AMAX_FLOOR = tl.constexpr(6.0 * 2.0**-126)  # keeps the inverse of the scale normal

# Elements and warps of a program.
TILE = (2048, 4)


@triton.jit
def round_groups(x):
    """float32 rounded to FP4, a scale for each last axis."""
    exponent, is_finite = group_exponent(x, E2M1_MAX, AMAX_FLOOR)
    rounded = round_to_e2m1(x * power_of_two(-exponent)) * power_of_two(exponent)
    return tl.where(is_finite, rounded, float("nan"))


@triton.jit
def _fp4_quant_kernel(
    y_ptr,
    x_ptr,
    num_groups,
    groups_per_row,
    num_cols,
    stride_xm,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    exists, col, start = find_groups(num_groups, groups_per_row, stride_xm, GROUP, BLOCK_G)
    mask = exists & (col < num_cols)
    x = widen(tl.load(x_ptr + start + col, mask=mask, other=0))
    _, col, start = find_groups(num_groups, groups_per_row, num_cols, GROUP, BLOCK_G)
    tl.store(y_ptr + start + col, narrow(round_groups(x), y_ptr.dtype.element_ty), mask=mask)


def fp4_quant_simulate(x: Tensor, group: int = 32) -> Tensor:
    """Round to FP4 and back.

    Args:
        x: bf16 or float32 ``(..., K)``; a last group may be partial.
        group: Values that share a scale, a power of two.

    Returns:
        The rounded values, shape and dtype of ``x``.

    Raises:
        UsageError: A wrong dtype or device, or a group that is no power of two.
    """
    rows = rows_of("fp4_quant_simulate", x, group)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_row = triton.cdiv(x.shape[-1], group)
    num_groups = rows.shape[0] * per_row
    if x.numel():
        block, num_warps = TILE
        _fp4_quant_kernel[(triton.cdiv(num_groups, block // group),)](
            y, rows, num_groups, per_row, x.shape[-1], rows.stride(0),
            group, block // group, num_warps=num_warps,
        )  # fmt: skip
    return y
