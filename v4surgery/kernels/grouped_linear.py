"""Rows of activations times the matrix of the expert that each goes to, on any GPU.

    y[row, n] = sum over k of x[row, k] * w_e[n, k]        e: the expert of the row's tile

A program owns BLOCK_N outputs of one tile of rows of one expert, whose matrix it finds by its
address. The matrix is the first operand, so that few rows make a narrow tile, not an empty one.
Weights are decoded to the dtype of x: FP4 with the scale of its 32 inputs; FP8 without, and its
scale multiplies the partial sum of 128 inputs. On Hopper grouped_linear_hopper does FP4 and bf16.

Exact: FP4 and FP8 decoded to bf16. Rounded: sums in float32, float32 scales, y once; float32
weights to bf16 where x is bf16. Source: spec/checkpoint.md, "Number formats".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.codes import (
    FP4_GROUP,
    FP8_BLOCK,
    INTERPRETED,
    e2m1_to_float,
    e4m3_to_float,
    e8m0_to_float,
    narrow,
    widen,
)
from v4surgery.kernels.expert_rows import TILE_COLUMNS, SortedSlots
from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.kernels.launch import has_fp8

# Dtype of x and tile of rows ("few": up to FEW_ROWS) -> BLOCK_N, warps, stages. In bf16 they stay
# within the 99 KB of shared memory that the smallest GPUs give a program.
TILES = {
    ("bf16", "few"): (64, 4, 4),
    ("bf16", "many"): (128, 8, 3),
    ("float32", "few"): (32, 4, 2),
    ("float32", "many"): (32, 4, 2),
}
# Inputs of a step: those of one FP8 scale, or fewer where weights are wide.
CODES_BLOCK_K, DENSE_BLOCK_K = 128, 64
FEW_ROWS = 32


@triton.jit
def decode_fp4(codes, scale, DTYPE: tl.constexpr):
    """(N, K/2) bytes and (N, K/32) scale bytes to (N, K) values."""
    BLOCK_N: tl.constexpr = codes.shape[0]
    GROUPS: tl.constexpr = scale.shape[1]
    values = tl.join(e2m1_to_float(codes), e2m1_to_float(codes >> 4))
    values = tl.reshape(values, (BLOCK_N, GROUPS, FP4_GROUP))
    values = values * e8m0_to_float(scale)[:, :, None]
    return narrow(tl.reshape(values, (BLOCK_N, GROUPS * FP4_GROUP)), DTYPE)


@triton.jit
def accumulate(a, b, total):
    """Sum of a total and a b, in float32; the interpreter cannot multiply bf16."""
    if INTERPRETED:
        a, b = widen(a), widen(b)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def grouped_linear_kernel(
    y_ptr,
    x_ptr,
    slots_ptr,
    tiles_ptr,
    addresses_ptr,
    num_experts,
    num_out,
    num_in,
    stride_xm,
    stride_ym,
    per_token,
    FORMAT: tl.constexpr,
    HAS_BYTES: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STORED: tl.constexpr = (
        tl.float32 if FORMAT == "float32" else tl.bfloat16 if FORMAT == "bf16" else tl.uint8
    )
    SCALE: tl.constexpr = tl.uint8 if HAS_BYTES else tl.float32
    CODES: tl.constexpr = BLOCK_K // 2 if FORMAT == "fp4" else BLOCK_K
    num_blocks = tl.cdiv(num_out, BLOCK_N)
    tile_ptr = tiles_ptr + tl.program_id(0) // num_blocks * TILE_COLUMNS
    expert = tl.load(tile_ptr)
    if expert < 0:
        return
    rows = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_T)
    has_row = rows < tl.load(tile_ptr + 2)
    slots = tl.load(slots_ptr + rows, mask=has_row, other=0)
    weight_ptr = tl.load(addresses_ptr + expert).to(tl.pointer_type(STORED))
    weight_ptr = tl.multiple_of(weight_ptr, 16)
    scale_ptr = tl.load(addresses_ptr + num_experts + expert).to(tl.pointer_type(SCALE))

    outs = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    has_out = (outs < num_out)[:, None]
    wide_outs = outs.to(tl.int64)[:, None]
    # A row of FP4 begins at a multiple of 16 bytes, which only this form tells the compiler.
    num_codes = num_in // 32 * 16 if FORMAT == "fp4" else num_in
    x_rows = slots // per_token if GATHER else rows
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * stride_xm
    weight_ptrs = weight_ptr + wide_outs * num_codes
    cols, codes = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, CODES)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(0, num_in, BLOCK_K):
        col, code = begin + cols, begin // (BLOCK_K // CODES) + codes
        x = tl.load(x_ptrs + col, mask=has_row[:, None] & (col < num_in), other=0.0)
        weight = tl.load(weight_ptrs + code, mask=has_out & (code < num_codes), other=0)
        if FORMAT == "fp4":
            group = begin // FP4_GROUP + tl.arange(0, BLOCK_K // FP4_GROUP)[None, :]
            num_groups = num_in // FP4_GROUP
            scale_ptrs = scale_ptr + wide_outs * num_groups + group
            scale = tl.load(scale_ptrs, mask=has_out & (group < num_groups), other=0)
            weight = decode_fp4(weight, scale, DTYPE)
        elif FORMAT == "fp8":
            weight = narrow(e4m3_to_float(weight, NATIVE_FP8), DTYPE)
        elif STORED != DTYPE:
            weight = narrow(widen(weight), DTYPE)
        if FORMAT == "fp8":
            block = wide_outs // FP8_BLOCK * tl.cdiv(num_in, FP8_BLOCK) + begin // FP8_BLOCK
            scale = tl.load(scale_ptr + block, mask=has_out, other=0)
            if HAS_BYTES:
                scale = e8m0_to_float(scale)
            partial = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            total += accumulate(weight, tl.trans(x), partial) * scale
        else:
            total = accumulate(weight, tl.trans(x), total)

    y_rows = slots if SCATTER else rows
    y_ptrs = y_ptr + y_rows.to(tl.int64)[None, :] * stride_ym + outs[:, None]
    tl.store(y_ptrs, narrow(total, DTYPE), mask=has_out & has_row[None, :])


def grouped_linear(
    y: Tensor,
    x: Tensor,
    rows: SortedSlots,
    weights: ExpertWeights,
    *,
    gather: bool = False,
    scatter: bool = False,
) -> None:
    """Multiply every row by the matrix of its expert.

    Args:
        y: ``(N, out)``, dtype of ``x``: by row, or by slot with ``scatter``. Rows of experts that
            are not in memory are left alone.
        x: bf16 or float32: by row ``(N, in)``, or by token ``(T, in)`` with ``gather``.
        rows: Of which expert each row is.
        weights: The matrices; at least one is in memory.
        gather: Read ``x`` by the token of each row.
        scatter: Write ``y`` by the slot of each row.
    """
    name = "bf16" if x.dtype == torch.bfloat16 else "float32"
    amount = "few" if rows.tile_rows <= FEW_ROWS else "many"
    block_n, num_warps, num_stages = TILES[name, amount]
    out, scale = weights.out_features, weights.present[0][1]
    block_k = DENSE_BLOCK_K if scale is None else CODES_BLOCK_K
    grouped_linear_kernel[(triton.cdiv(out, block_n) * len(rows.tiles),)](
        y, x, rows.slots, rows.tiles, weights.addresses, len(weights.matrices),
        out, weights.in_features, x.stride(0), y.stride(0), rows.per_token,
        FORMAT=weights.format, HAS_BYTES=scale is not None and scale.dtype == torch.uint8,
        GATHER=gather, SCATTER=scatter, NATIVE_FP8=has_fp8(x.device),
        BLOCK_N=block_n, BLOCK_T=rows.tile_rows, BLOCK_K=block_k,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
