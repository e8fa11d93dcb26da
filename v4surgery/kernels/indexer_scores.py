"""Scores of compressed entries for the queries of an indexer.

score[t, c] = sum_x w[t, x] * relu(q[t, x] . k[c]), only where it can decide: for entries that are
not in the future, of queries that see more of them than they may choose.

One program owns BLOCK_C entries and BLOCK_S queries. The entries stay in shared memory; one query
after the other brings its X heads, and the product (BLOCK_C, X) is summed over the heads, which
lie in the registers of one quad of threads.

Rounded: float32 sums. Source: spec/forward.md, "Indexer".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.sparse_attention import multiply

# dtype: BLOCK_C, BLOCK_S, warps, stages.
TILES = {torch.bfloat16: (128, 32, 4, 3), torch.float32: (32, 32, 8, 1)}


@triton.jit
def indexer_scores_kernel(
    q_ptr,
    k_ptr,
    weight_ptr,
    num_visible_ptr,
    score_ptr,
    num_queries,
    num_entries,
    num_heads,
    head_dim,
    topk,
    stride_qb,
    stride_qs,
    stride_qx,
    stride_qy,
    stride_kb,
    stride_kc,
    stride_ky,
    stride_wb,
    stride_ws,
    stride_wx,
    stride_vb,
    stride_vs,
    stride_sb,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    # Late queries see the most entries: they begin first.
    batch = tl.program_id(2).to(tl.int64)
    positions = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_S + tl.arange(0, BLOCK_S)
    first_entry = tl.program_id(1) * BLOCK_C
    visible_ptrs = num_visible_ptr + batch * stride_vb + positions * stride_vs
    visible = tl.load(visible_ptrs, mask=positions < num_queries, other=0)
    is_needed = (visible > topk) & (visible > first_entry)
    begin = tl.min(tl.where(is_needed, positions, num_queries))
    end = tl.max(tl.where(is_needed, positions + 1, 0))

    if begin < end:
        entries = first_entry + tl.arange(0, BLOCK_C)
        heads, cols = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_Y)
        has_entry, has_head, has_col = entries < num_entries, heads < num_heads, cols < head_dim
        k_ptrs = k_ptr + batch * stride_kb + entries.to(tl.int64)[:, None] * stride_kc
        k_mask = has_entry[:, None] & has_col[None, :]
        k = tl.load(k_ptrs + cols[None, :] * stride_ky, mask=k_mask, other=0.0)
        q_ptrs = q_ptr + batch * stride_qb + begin.to(tl.int64) * stride_qs
        q_ptrs = q_ptrs + heads[:, None] * stride_qx + cols[None, :] * stride_qy
        q_mask = has_head[:, None] & has_col[None, :]
        weight_ptrs = weight_ptr + batch * stride_wb + begin.to(tl.int64) * stride_ws
        weight_ptrs = weight_ptrs + heads * stride_wx
        score_ptrs = score_ptr + batch * stride_sb + begin.to(tl.int64) * num_entries + entries
        for _ in range(begin, end):
            q = tl.load(q_ptrs, mask=q_mask, other=0.0)
            weight = tl.load(weight_ptrs, mask=has_head, other=0.0)
            products = tl.maximum(multiply(k, tl.trans(q)), 0.0)
            tl.store(score_ptrs, tl.sum(products * weight[None, :], 1), mask=has_entry)
            q_ptrs += stride_qs
            weight_ptrs += stride_ws
            score_ptrs += num_entries


def indexer_scores(
    scores: Tensor, q: Tensor, k: Tensor, weights: Tensor, num_visible: Tensor, topk: int
) -> None:
    """Write the scores that can decide a choice; the others stay what they are.

    Args:
        scores: float32 ``(B, S, C)``, dense in its last two dims.
        q: bf16 or float32 ``(B, S, X, Y)``.
        k: Dtype of ``q``, ``(B, C, Y)``.
        weights: float32 ``(B, S, X)``.
        num_visible: Entries that a query may see, int64 ``(B, S)``.
        topk: How many will be chosen: queries that see no more need no scores.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_entries = k.shape[1]
    block_c, block_s, num_warps, num_stages = TILES[q.dtype]
    grid = (triton.cdiv(num_queries, block_s), triton.cdiv(num_entries, block_c), batch)
    indexer_scores_kernel[grid](
        q,
        k,
        weights,
        num_visible,
        scores,
        num_queries,
        num_entries,
        num_heads,
        head_dim,
        topk,
        *q.stride(),
        *k.stride(),
        *weights.stride(),
        *num_visible.stride(),
        scores.stride(0),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        BLOCK_X=triton.next_power_of_2(max(num_heads, 16)),
        BLOCK_Y=triton.next_power_of_2(max(head_dim, 16)),
        num_warps=num_warps,
        num_stages=num_stages,
    )
