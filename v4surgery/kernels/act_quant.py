"""Quantize activations to FP8, for each token and group of inputs.

    scale = 2^ceil(log2(max(amax, 1e-4) / 448))     one E8M0 byte a group
    code  = e4m3(x / scale)                         to nearest even

A group that holds NaN or infinity becomes all NaN: codes 0x7f, scale byte 255. A program owns
BLOCK_G groups of GROUP neighbours of the last axis; the last group of a row may be partial.

Exact: scales, and division by them. Rounded: codes. The simulation's result fits into bf16.
Source: spec/forward.md, "Quantization in the official code".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.codes import (
    E4M3_MAX,
    e4m3_to_float,
    float_to_e4m3,
    narrow,
    power_of_two,
    scale_exponent,
    widen,
)
from v4surgery.kernels.launch import has_fp8, require_dtype, require_same_device

AMAX_FLOOR = tl.constexpr(1e-4)
NAN_CODE = tl.constexpr(0x7F)
NAN_SCALE = tl.constexpr(255)

# Elements and warps of a program.
TILES = {"act_quant": (4096, 8), "act_quant_simulate": (2048, 4)}


@triton.jit
def find_groups(num_groups, groups_per_row, row_stride, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """The groups of a program: which exist, their columns, and the start of their rows, int64."""
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    row = group // groups_per_row
    col = (group - row * groups_per_row) * GROUP + tl.arange(0, GROUP)[None, :]
    return group < num_groups, col, row.to(tl.int64) * row_stride


@triton.jit
def group_exponent(x, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """Exponent of the scale of each group, a last axis, int32; and whether all of it is finite.

    The exponent is 0 where it is not.
    """
    magnitude = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32, bitcast=True)
    largest = tl.max(magnitude, len(x.shape) - 1, keep_dims=True)
    is_finite = largest < 0x7F800000
    amax = tl.maximum(tl.where(is_finite, largest, 0).to(tl.float32, bitcast=True), FLOOR)
    return tl.where(is_finite, scale_exponent(amax, LIMIT), 0), is_finite


@triton.jit
def _act_quant_kernel(
    codes_ptr,
    scale_ptr,
    x_ptr,
    num_groups,
    groups_per_row,
    num_cols,
    stride_xm,
    NATIVE_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    exists, col, start = find_groups(num_groups, groups_per_row, stride_xm, GROUP, BLOCK_G)
    mask = exists & (col < num_cols)
    index = tl.max_contiguous(start + col, [1, VECTOR])
    x = widen(tl.load(x_ptr + index, mask=mask, other=0))
    exponent, is_finite = group_exponent(x, E4M3_MAX, AMAX_FLOOR)
    code = float_to_e4m3(x * power_of_two(-exponent), NATIVE_FP8)
    code = tl.where(is_finite, code, NAN_CODE).to(tl.uint8)
    _, col, start = find_groups(num_groups, groups_per_row, num_cols, GROUP, BLOCK_G)
    tl.store(codes_ptr + tl.max_contiguous(start + col, [1, VECTOR]), code, mask=mask)

    byte = tl.where(is_finite, exponent + 127, NAN_SCALE).to(tl.uint8)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    tl.store(scale_ptr + group, tl.reshape(byte, [BLOCK_G]), mask=group < num_groups)


@triton.jit
def _act_quant_simulate_kernel(
    y_ptr,
    x_ptr,
    num_groups,
    groups_per_row,
    num_cols,
    num_rounded,
    stride_xm,
    stride_ym,
    NATIVE_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    exists, col, start = find_groups(num_groups, groups_per_row, stride_xm, GROUP, BLOCK_G)
    mask = exists & (col < num_cols)
    stored = tl.load(x_ptr + start + col, mask=mask, other=0)
    x = tl.where(col < num_rounded, widen(stored), 0.0)
    exponent, is_finite = group_exponent(x, E4M3_MAX, AMAX_FLOOR)
    code = float_to_e4m3(x * power_of_two(-exponent), NATIVE_FP8)
    scale = tl.where(is_finite, power_of_two(exponent), float("nan"))
    rounded = e4m3_to_float(code, NATIVE_FP8) * scale
    y = narrow(tl.where(col < num_rounded, rounded, widen(stored)), DTYPE)
    _, col, start = find_groups(num_groups, groups_per_row, stride_ym, GROUP, BLOCK_G)
    tl.store(y_ptr + start + col, y, mask=mask)


def act_quant(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Quantize the last axis in groups.

    Args:
        x: bf16 or float32 ``(..., K)``; a last group may be partial.
        group: Inputs that share a scale, a power of two.

    Returns:
        E4M3 codes, uint8 ``(..., K)``; E8M0 scale bytes, uint8 ``(..., ceil(K/group))``.

    Raises:
        UsageError: A wrong dtype or device, or a group that is no power of two.
    """
    rows = rows_of("act_quant", x, group)
    per_row = triton.cdiv(x.shape[-1], group)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], per_row), dtype=torch.uint8, device=x.device)
    if x.numel():
        block, num_warps = TILES["act_quant"]
        _act_quant_kernel[(triton.cdiv(scale.numel(), block // group),)](
            codes, scale, rows, scale.numel(), per_row, x.shape[-1], rows.stride(0),
            has_fp8(x.device), group, block // group, num_warps=num_warps,
        )  # fmt: skip
    return codes, scale


def act_quant_simulate(
    x: Tensor, group: int = 64, *, num_cols: int | None = None, inplace: bool = False
) -> Tensor:
    """Round to FP8 and back.

    Args:
        x: bf16 or float32 ``(..., K)``.
        group: Inputs that share a scale, a power of two.
        num_cols: Round the first so many of the last axis and pass the rest on; all if None.
        inplace: Write into ``x`` and return it.

    Returns:
        The rounded values, shape and dtype of ``x``.

    Raises:
        UsageError: A wrong dtype or device, a group that is no power of two, more columns than
            there are, or in place on a tensor whose rows do not lie evenly spaced.
    """
    rows = rows_of("act_quant_simulate", x, group)
    if inplace and rows.data_ptr() != x.data_ptr():
        raise UsageError(
            "x cannot be written in place",
            where="act_quant_simulate",
            value=f"strides {x.stride()}",
            rule="rows evenly spaced, each contiguous",
        )
    num_rounded = x.shape[-1] if num_cols is None else num_cols
    if not 0 <= num_rounded <= x.shape[-1]:
        raise UsageError(
            "no such columns",
            where="act_quant_simulate",
            value=f"num_cols={num_cols}",
            rule=f"0 to {x.shape[-1]}",
        )
    y = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_row = triton.cdiv(num_rounded if inplace else x.shape[-1], group)
    num_groups = rows.shape[0] * per_row
    if x.numel() and num_groups:
        block, num_warps = TILES["act_quant_simulate"]
        _act_quant_simulate_kernel[(triton.cdiv(num_groups, block // group),)](
            y, rows, num_groups, per_row, num_rounded if inplace else x.shape[-1], num_rounded,
            rows.stride(0), rows.stride(0) if inplace else x.shape[-1],
            has_fp8(x.device), group, block // group, num_warps=num_warps,
        )  # fmt: skip
    return y


def rows_of(operation: str, x: Tensor, group: int = 1) -> Tensor:
    """``x`` as rows ``(T, K)`` without a copy where they lie evenly spaced.

    Raises:
        UsageError: A wrong dtype or device, or a group that is no power of two.
    """
    require_same_device(operation, x)
    require_dtype(operation, "x", x, torch.bfloat16, torch.float32)
    if group < 1 or group & (group - 1) or group > 2048:
        raise UsageError(
            "a group has the wrong size",
            where=operation,
            value=group,
            rule="a power of two up to 2048",
        )
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()
