"""Attention over keys chosen by index, one shared key/value head, with a sink.

out_n = sum_z softmax(q_n k_z * scale, with exp(sink_n) in the denominator only) * k_z.

One program owns BLOCK_N heads of one query, all head dims, and one part of its keys: it gathers
BLOCK_Z of them at a time by index, and the one tile is key and value. With few queries the keys
are split over programs; each leaves its sum, its maximum and its denominator, and a second kernel
adds them up. Keys behind the last that is named are skipped; -1 before it is read as zeros and
masked.

Exact: which keys take part. Rounded: float32 sums; probabilities, relative to the largest score so
far, to the dtype of q before they meet the values (the official kernel does so, too); the result,
once. Source: spec/forward.md, "Attention"; Milakov and Gimelshein, "Online normalizer calculation
for softmax", arXiv 1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import launch
from v4surgery.kernels import sparse_attention_hopper as hopper
from v4surgery.kernels.codes import INTERPRETED, narrow, widen

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a finite stand-in for minus infinity: a difference of two is zero
MAX_HEAD_DIM = 512
SCAN = 1024
# Programs that fill a GPU; with fewer than these, heads and keys of a query are split.
FULL_GRID = 264
# Most numbers of a program's result, heads x head_dim: 64 registers of each of 256 threads.
MAX_BLOCK = 64 * 256
# Head_dim up to which a row serves: BLOCK_Z, stages.
TILES = ((256, 64, 3), (MAX_HEAD_DIM, 32, 2))
# float32 products are unrolled, and run on no tensor core: BLOCK_N, BLOCK_Z, warps, stages.
EXACT_TILES = (16, 16, 8, 1)


@triton.jit
def multiply(a, b):
    """Product in float32, its factors not rounded; the interpreter takes bf16 for integers."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), input_precision="ieee")
    else:  # noqa: RET505  (a traced return does not end the function)
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def end_of_named(index_ptr, begin, end, stride_iz, SCAN: tl.constexpr):
    """One past the last key in [begin, end) that is not -1, begin if there is none."""
    last = begin
    for z in range(begin, end, SCAN):
        keys = z + tl.arange(0, SCAN)
        is_named = tl.load(index_ptr + keys * stride_iz, mask=keys < end, other=-1) >= 0
        last = tl.maximum(last, tl.max(tl.where(is_named, keys + 1, begin)))
    return last


@triton.jit
def sparse_attention_kernel(
    q_ptr,
    kv_ptr,
    sink_ptr,
    index_ptr,
    out_ptr,
    part_ptr,
    num_queries,
    num_heads,
    head_dim,
    num_keys,
    keys_per_split,
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kc,
    stride_kh,
    stride_ib,
    stride_is,
    stride_iz,
    HAS_SPLITS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Late queries see the most keys: they begin first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    batch, position = row // num_queries, row % num_queries
    heads = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_H)
    has_head, has_col = heads < num_heads, cols < head_dim
    is_inside = has_head[:, None] & has_col[None, :]
    q_ptr += batch * stride_qb + position * stride_qs
    q_ptrs = q_ptr + heads.to(tl.int64)[:, None] * stride_qn + cols[None, :] * stride_qh
    q = tl.load(q_ptrs, mask=is_inside, other=0.0)
    sink = tl.load(sink_ptr + heads, mask=has_head, other=0.0).to(tl.float32) * LOG2_E
    index_ptr += batch * stride_ib + position * stride_is
    kv_ptr += batch * stride_kb

    begin = tl.program_id(2) * keys_per_split
    end = tl.minimum(begin + keys_per_split, num_keys)
    end = end_of_named(index_ptr, begin, end, stride_iz, SCAN)
    peak = tl.maximum(sink, LOWEST)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for z in range(begin, end, BLOCK_Z):
        keys = z + tl.arange(0, BLOCK_Z)
        entries = tl.load(index_ptr + keys * stride_iz, mask=keys < end, other=-1).to(tl.int64)
        is_named = entries >= 0
        kv_ptrs = kv_ptr + entries[:, None] * stride_kc + cols[None, :] * stride_kh
        kv = tl.load(kv_ptrs, mask=is_named[:, None] & has_col[None, :], other=0.0)
        scores = multiply(q, tl.trans(kv)) * scale_log2
        scores = tl.where(is_named[None, :], scores, float("-inf"))
        # softmax, in powers of two, relative to the largest score so far and the sink
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + multiply(narrow(weights, kv.dtype), kv)
        peak = new_peak

    if HAS_SPLITS:
        part = (row * tl.num_programs(2) + tl.program_id(2)) * num_heads + heads
        part_ptrs = part_ptr + part * (head_dim + 2)
        tl.store(part_ptrs[:, None] + cols[None, :], acc, mask=is_inside)
        tl.store(part_ptrs + head_dim, peak, mask=has_head)
        tl.store(part_ptrs + head_dim + 1, total, mask=has_head)
    else:
        total += tl.exp2(sink - peak)
        out = acc * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
        out_ptrs = out_ptr + (row * num_heads + heads)[:, None] * head_dim + cols[None, :]
        tl.store(out_ptrs, narrow(out, q.dtype), mask=is_inside)


@triton.jit
def add_splits_kernel(
    part_ptr,
    sink_ptr,
    out_ptr,
    num_heads,
    head_dim,
    num_splits,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # One program adds the parts of one head of one query.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols, splits = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    has_col, has_split = cols < head_dim, splits < num_splits
    part_ptrs = part_ptr + ((row * num_splits + splits) * num_heads + head) * (head_dim + 2)
    sink = tl.load(sink_ptr + head).to(tl.float32) * LOG2_E
    peaks = tl.load(part_ptrs + head_dim, mask=has_split, other=LOWEST)
    totals = tl.load(part_ptrs + head_dim + 1, mask=has_split, other=0.0)
    peak = tl.maximum(tl.max(peaks, 0), tl.maximum(sink, LOWEST))
    total = tl.sum(totals * tl.exp2(peaks - peak), 0) + tl.exp2(sink - peak)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for split in range(num_splits):
        part = part_ptr + ((row * num_splits + split) * num_heads + head) * (head_dim + 2)
        shrink = tl.exp2(tl.load(part + head_dim) - peak)
        acc += tl.load(part + cols, mask=has_col, other=0.0) * shrink
    out = acc * (1.0 / tl.where(total > 0, total, 1.0))
    out_ptrs = out_ptr + (row * num_heads + head) * head_dim + cols
    tl.store(out_ptrs, narrow(out, out_ptr.dtype.element_ty), mask=has_col)


def sparse_attention(q: Tensor, kv: Tensor, sink: Tensor, index: Tensor, scale: float) -> Tensor:
    """Attend to the chosen keys.

    Args:
        q: bf16 or float32 ``(B, S, N, H)``, H at most 512.
        kv: Keys, which are the values too, dtype of ``q``, ``(B, C, H)``. Rows that ``index``
            does not name are not read.
        sink: float32 ``(N,)``.
        index: Keys of each query, int64 or int32 ``(B, S, Z)``; -1 is no key. A key that is named
            twice counts twice.
        scale: Of the scores.

    Returns:
        ``(B, S, N, H)``, dtype of ``q``; zeros where a query has no key.

    Raises:
        UsageError: Devices, dtypes or shapes that do not fit.
    """
    _require(q, kv, sink, index)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if hopper.serves(q, kv, index):
        hopper.attend(out, q, kv, sink, index, scale, _scan(index.shape[-1]))
    else:
        _attend(out, q, kv, sink, index, scale)
    return out


def _attend(out: Tensor, q: Tensor, kv: Tensor, sink: Tensor, index: Tensor, scale: float) -> None:
    batch, num_queries, num_heads, head_dim = q.shape
    num_rows, num_keys = batch * num_queries, index.shape[-1]
    block_h = triton.next_power_of_2(max(head_dim, 16))
    block_n, block_z, num_warps, num_stages = _tiles(q, block_h)
    head_blocks, tiles = triton.cdiv(num_heads, block_n), triton.cdiv(num_keys, block_z)
    num_splits = max(min(tiles, FULL_GRID // (num_rows * head_blocks)), 1)
    keys_per_split = triton.cdiv(tiles, num_splits) * block_z
    num_splits = max(triton.cdiv(num_keys, max(keys_per_split, 1)), 1)
    has_splits = num_splits > 1
    parts_shape = (num_rows, num_splits, num_heads, head_dim + 2) if has_splits else (0,)
    parts = torch.empty(parts_shape, dtype=torch.float32, device=q.device)
    sparse_attention_kernel[num_rows, head_blocks, num_splits](
        q,
        kv,
        sink,
        index,
        out,
        parts,
        num_queries,
        num_heads,
        head_dim,
        num_keys,
        keys_per_split,
        scale * LOG2_E.value,
        *q.stride(),
        *kv.stride(),
        *index.stride(),
        HAS_SPLITS=has_splits,
        SCAN=_scan(keys_per_split),
        BLOCK_N=block_n,
        BLOCK_Z=block_z,
        BLOCK_H=block_h,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if has_splits:
        add_splits_kernel[num_rows, num_heads](
            parts,
            sink,
            out,
            num_heads,
            head_dim,
            num_splits,
            BLOCK_P=triton.next_power_of_2(num_splits),
            BLOCK_H=block_h,
        )


def _require(q: Tensor, kv: Tensor, sink: Tensor, index: Tensor) -> None:
    operation = "sparse_attention"
    launch.require_same_device(operation, q, kv, sink, index)
    launch.require_dtype(operation, "q", q, torch.bfloat16, torch.float32)
    launch.require_dtype(operation, "kv", kv, q.dtype)
    launch.require_dtype(operation, "sink", sink, torch.float32)
    launch.require_dtype(operation, "index", index, torch.int64, torch.int32)
    batch, num_queries, num_heads, head_dim = q.shape
    launch.require_shape(operation, "kv", kv, (batch, kv.shape[1], head_dim))
    launch.require_shape(operation, "sink", sink, (num_heads,))
    launch.require_shape(operation, "index", index, (batch, num_queries, index.shape[-1]))
    if head_dim > MAX_HEAD_DIM:
        raise UsageError(
            "head_dim is too large",
            where=operation,
            value=head_dim,
            rule=f"at most {MAX_HEAD_DIM}",
            hint="--implementation reference takes any",
        )


def _tiles(q: Tensor, block_h: int) -> tuple[int, int, int, int]:
    """BLOCK_N, BLOCK_Z, warps and stages."""
    if q.dtype == torch.float32:
        return EXACT_TILES
    batch, num_queries, num_heads, _ = q.shape
    block_n = max(min(triton.next_power_of_2(num_heads), MAX_BLOCK // block_h, 64), 16)
    if batch * num_queries * triton.cdiv(num_heads, block_n) < FULL_GRID:
        block_n = 16
    num_warps = 8 if block_n * block_h > MAX_BLOCK // 2 else 4
    block_z, num_stages = next(row[1:] for row in TILES if block_h <= row[0])
    return block_n, block_z, num_warps, num_stages


def _scan(num_keys: int) -> int:
    """Entries of index that are looked through at a time, a power of two."""
    return min(max(int(triton.next_power_of_2(num_keys)), 16), SCAN)
