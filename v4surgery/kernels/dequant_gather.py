"""Decode chosen columns of stored weights, FP4 or FP8: an element at a time, with dequant.py.

A program owns BLOCK_M x BLOCK_N results, of any rows and columns; each reads its own code and
scale. Formats, and what is exact: dequant.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.codes import (
    FP4_GROUP,
    FP8_BLOCK,
    e2m1_to_float,
    e4m3_to_float,
    e8m0_to_float,
    narrow,
)

# Rows, columns and warps of a program.
TILE = (8, 256, 4)


@triton.jit
def find_source(rows_ptr, row, num_rows, num_kept, num_source, HAS_ROWS: tl.constexpr):
    """Of each result row: the matrix in the stack, the row in it, and whether there is one.

    Where there is none, matrix and row are 0.
    """
    matrix = row // num_kept
    within = row % num_kept
    known = row < num_rows
    if HAS_ROWS:
        chosen = tl.load(rows_ptr + within, mask=known, other=-1)
        known &= (chosen >= 0) & (chosen < num_source)
        within = chosen.to(tl.int32)
    return tl.where(known, matrix, 0), tl.where(known, within, 0), known


@triton.jit
def scale_to_float(stored):
    """float32 of E8M0 bytes, or float32 as it is."""
    return e8m0_to_float(stored) if stored.dtype == tl.uint8 else stored


@triton.jit
def _dequant_gather_kernel(
    out_ptr,
    weight_ptr,
    scale_ptr,
    rows_ptr,
    cols_ptr,
    num_rows,
    num_cols,
    num_kept,
    num_source,
    num_source_cols,
    HAS_ROWS: tl.constexpr,
    IS_FP4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(num_cols, BLOCK_N)
    block = tl.program_id(0)
    row = (block // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix, within, known = find_source(rows_ptr, row, num_rows, num_kept, num_source, HAS_ROWS)
    chosen = tl.load(cols_ptr + col, mask=col < num_cols, other=-1)
    is_col = (chosen >= 0) & (chosen < num_source_cols)
    chosen = tl.where(is_col, chosen.to(tl.int32), 0)[None, :]
    known = known[:, None] & is_col[None, :]

    # Whatever is not there reads the first row or column, so that no load needs a mask.
    source = (matrix * num_source + within).to(tl.int64)[:, None]
    if IS_FP4:
        byte = tl.load(weight_ptr + source * (num_source_cols // 2) + (chosen >> 1))
        code = e2m1_to_float(byte.to(tl.int32) >> ((chosen & 1) * 4))
        scale_ptr += source * (num_source_cols // FP4_GROUP) + chosen // FP4_GROUP
    else:
        code = e4m3_to_float(tl.load(weight_ptr + source * num_source_cols + chosen))
        scale_row = (matrix * tl.cdiv(num_source, FP8_BLOCK) + within // FP8_BLOCK).to(tl.int64)
        scale_ptr += scale_row[:, None] * tl.cdiv(num_source_cols, FP8_BLOCK) + chosen // FP8_BLOCK
    value = tl.where(known, code * scale_to_float(tl.load(scale_ptr)), float("nan"))
    mask = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    index = row.to(tl.int64)[:, None] * num_cols + col[None, :]
    tl.store(out_ptr + index, narrow(value, out_ptr.dtype.element_ty), mask=mask)


def gather(
    out: Tensor, weight: Tensor, scale: Tensor, rows: Tensor | None, cols: Tensor, width: int
) -> None:
    """Fill ``out (..., out', in')`` with values of ``weight``, whose rows have ``width`` values."""
    num_kept, num_cols = out.shape[-2:]
    num_rows = out.numel() // num_cols
    block_m, block_n, num_warps = TILE
    grid = (triton.cdiv(num_rows, block_m) * triton.cdiv(num_cols, block_n),)
    _dequant_gather_kernel[grid](
        out, weight, scale, rows, cols.contiguous(), num_rows, num_cols, num_kept,
        weight.shape[-2], width, rows is not None, weight.shape[-1] != width, block_m, block_n,
        num_warps=num_warps,
    )  # fmt: skip
