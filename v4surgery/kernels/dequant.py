"""Decode stored weights to bf16 or float32, one matrix or a stack, rows and columns gathered.

    FP4   value = e2m1(code) * 2^(scale - 127)        one scale for a row and 32 inputs
    FP8   value = e4m3(code) * scale[r/128, c/128]    scales E8M0 bytes or float32

Bytes: an FP4 byte holds inputs 2i (low nibble) and 2i + 1, so it becomes one word of two results,
32 bits of bf16 or 64 of float32, which is put together in a register and stored. A thread loads
just the bytes whose words make 16 bytes: load and store then have one layout, and nothing passes
through shared memory.

Programs: FP4 BLOCK_M rows x BLOCK_G groups of 32, and without gathered rows a whole stack is one
long row; FP8 BLOCK_M rows x one block of 128 columns. Gathered columns: dequant_gather.py.

Exact: FP4; FP8 with E8M0 scales but for bf16 subnormals. Rounded, to nearest even, once to float32
and once to bf16: FP8 with float32 scales. An index outside the matrix gives NaN.
Source: spec/checkpoint.md, "Number formats".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.codes import (
    FP8_BLOCK,
    e2m1_to_float,
    e4m3_to_float,
    e8m0_to_float,
    narrow,
)
from v4surgery.kernels.dequant_gather import find_source, gather, scale_to_float
from v4surgery.kernels.launch import has_fp8, require_dtype, require_same_device, require_shape

GROUP_BYTES = tl.constexpr(16)

# By format and bytes of a result: groups of 32 (FP4) or rows (FP8), and warps, of a program.
TILES = {("fp4", 2): (128, 8), ("fp4", 4): (64, 8), ("fp8", 2): (32, 8), ("fp8", 4): (32, 8)}


@triton.jit
def _pack_pair(low, high, WORD: tl.constexpr):
    """Two float32 as one word: whole in 64 bits, in 32 bits their upper halves."""
    low = low.to(tl.uint32, bitcast=True)
    high = high.to(tl.uint32, bitcast=True)
    if WORD.primitive_bitwidth == 64:
        word = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    else:
        word = (high & 0xFFFF0000) | (low >> 16)
    return word.to(WORD, bitcast=True)


@triton.jit
def _dequant_fp4_kernel(
    words_ptr,
    weight_ptr,
    scale_ptr,
    rows_ptr,
    num_rows,
    num_groups,
    num_kept,
    num_source,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    WORD: tl.constexpr = words_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // WORD.primitive_bitwidth
    blocks = tl.cdiv(num_groups, BLOCK_G)
    block = tl.program_id(0)
    row = (block // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = (block % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask = (row < num_rows)[:, None] & (group < num_groups)[None, :]
    source = row
    if HAS_ROWS:
        matrix, within, known = find_source(rows_ptr, row, num_rows, num_kept, num_source, HAS_ROWS)
        source = matrix * num_source + within

    index = source.to(tl.int64)[:, None] * num_groups + group[None, :]
    scale = e8m0_to_float(tl.load(scale_ptr + index, mask=mask, other=0))
    if HAS_ROWS:
        scale = tl.where(known[:, None], scale, float("nan"))
    index = index[:, :, None] * GROUP_BYTES + tl.arange(0, GROUP_BYTES)[None, None, :]
    index = tl.max_contiguous(index, [1, 1, VECTOR])
    byte = tl.load(weight_ptr + index, mask=mask[:, :, None], other=0)

    low = e2m1_to_float(byte) * scale[:, :, None]
    high = e2m1_to_float(byte >> 4) * scale[:, :, None]
    index = row.to(tl.int64)[:, None] * num_groups + group[None, :]
    index = index[:, :, None] * GROUP_BYTES + tl.arange(0, GROUP_BYTES)[None, None, :]
    tl.store(words_ptr + index, _pack_pair(low, high, WORD), mask=mask[:, :, None])


@triton.jit
def _dequant_fp8_kernel(
    out_ptr,
    weight_ptr,
    scale_ptr,
    rows_ptr,
    num_rows,
    num_cols,
    num_kept,
    num_source,
    HAS_ROWS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    blocks = tl.cdiv(num_cols, FP8_BLOCK)
    block = tl.program_id(0)
    row = (block // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (block % blocks) * FP8_BLOCK + tl.arange(0, FP8_BLOCK)
    matrix, within, known = find_source(rows_ptr, row, num_rows, num_kept, num_source, HAS_ROWS)

    scale_row = matrix * tl.cdiv(num_source, FP8_BLOCK) + within // FP8_BLOCK
    scale_index = scale_row.to(tl.int64) * blocks + block % blocks
    scale = scale_to_float(tl.load(scale_ptr + scale_index, mask=known, other=0))
    scale = tl.where(known, scale, float("nan"))
    source = (matrix * num_source + within).to(tl.int64)
    index = tl.max_contiguous(source[:, None] * num_cols + col[None, :], [1, VECTOR])
    mask = known[:, None] & (col < num_cols)[None, :]
    code = tl.load(weight_ptr + index, mask=mask, other=0)
    value = e4m3_to_float(code, NATIVE_FP8) * scale[:, None]
    index = row.to(tl.int64)[:, None] * num_cols + col[None, :]
    mask = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    tl.store(out_ptr + index, narrow(value, DTYPE), mask=mask)


def dequant_fp8(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Tensor:
    """Decode FP8.

    Args:
        weight: E4M3 codes, uint8 ``(out, in)``, or a stack ``(E, out, in)``.
        scale: E8M0 bytes or float32, ``(ceil(out/128), ceil(in/128))``, under the stack's axis.
        dtype: float32 or bfloat16.
        rows: Indices of the outputs to keep, int64, in any order; all if None. One outside gives
            NaN, because refusing it would wait for the GPU.
        cols: Indices of the inputs to keep, likewise.

    Returns:
        ``(out', in')``, under the stack's axis.

    Raises:
        UsageError: A wrong dtype, shape or device.
    """
    _require("dequant_fp8", weight, scale, dtype, rows, cols)
    require_dtype("dequant_fp8", "scale", scale, torch.uint8, torch.float32)
    grid = (triton.cdiv(size, FP8_BLOCK.value) for size in weight.shape[-2:])
    require_shape("dequant_fp8", "scale", scale, (*weight.shape[:-2], *grid))
    weight, scale = weight.contiguous(), scale.contiguous()
    num_source, width = weight.shape[-2:]
    out = _new_result(weight, dtype, rows, cols, width)
    if not out.numel():
        return out
    if cols is not None:
        gather(out, weight, scale, rows, cols, width)
        return out
    block, num_warps = TILES["fp8", dtype.itemsize]
    num_rows = out.numel() // width
    _dequant_fp8_kernel[(triton.cdiv(num_rows, block) * triton.cdiv(width, FP8_BLOCK.value),)](
        out, weight, scale, rows, num_rows, width, out.shape[-2], num_source,
        rows is not None, has_fp8(weight.device), block, num_warps=num_warps,
    )  # fmt: skip
    return out


def dequant_fp4(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Tensor:
    """Decode FP4.

    Args:
        weight: Two E2M1 codes a byte, uint8 ``(out, in/2)``, or a stack ``(E, out, in/2)``; the
            low nibble is the even input.
        scale: E8M0 bytes, uint8 ``(out, in/32)``, under the stack's axis.
        dtype: float32 or bfloat16.
        rows: Indices of the outputs to keep, int64, in any order; all if None. One outside gives
            NaN, because refusing it would wait for the GPU.
        cols: Indices of the inputs to keep, likewise.

    Returns:
        ``(out', in')``, under the stack's axis.

    Raises:
        UsageError: A wrong dtype, shape or device.
    """
    _require("dequant_fp4", weight, scale, dtype, rows, cols)
    require_dtype("dequant_fp4", "scale", scale, torch.uint8)
    num_groups = scale.shape[-1]
    require_shape("dequant_fp4", "weight", weight, (*scale.shape[:-1], num_groups * 16))
    weight, scale = weight.contiguous(), scale.contiguous()
    num_source, width = weight.shape[-2], weight.shape[-1] * 2
    out = _new_result(weight, dtype, rows, cols, width)
    if not out.numel():
        return out
    if cols is not None:
        gather(out, weight, scale, rows, cols, width)
        return out
    num_rows = out.numel() // width
    if rows is None:
        num_rows, num_groups = 1, scale.numel()
    block, num_warps = TILES["fp4", dtype.itemsize]
    block_g = min(block, triton.next_power_of_2(num_groups))
    block_m = block // block_g if num_rows > 1 else 1
    words = out.view(torch.int32 if dtype == torch.bfloat16 else torch.int64)
    _dequant_fp4_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(num_groups, block_g),)](
        words, weight, scale, rows, num_rows, num_groups, out.shape[-2], num_source,
        rows is not None, block_m, block_g, num_warps=num_warps,
    )  # fmt: skip
    return out


def _new_result(
    weight: Tensor, dtype: torch.dtype, rows: Tensor | None, cols: Tensor | None, width: int
) -> Tensor:
    num_rows = weight.shape[-2] if rows is None else rows.numel()
    num_cols = width if cols is None else cols.numel()
    shape = (*weight.shape[:-2], num_rows, num_cols)
    return torch.empty(shape, dtype=dtype, device=weight.device)


def _require(
    operation: str,
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    rows: Tensor | None,
    cols: Tensor | None,
) -> None:
    require_same_device(operation, weight, scale, rows, cols)
    require_dtype(operation, "weight", weight, torch.uint8)
    if weight.ndim not in (2, 3):
        raise UsageError(
            "weight has the wrong shape",
            where=operation,
            value=tuple(weight.shape),
            rule="a matrix or a stack of them",
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise UsageError("no such result", where=operation, value=dtype, rule="float32 or bfloat16")
    for name, index in (("rows", rows), ("cols", cols)):
        if index is not None:
            require_dtype(operation, name, index, torch.int64)
            require_shape(operation, name, index, (index.numel(),))
