"""The topk best of each row of scores, without sorting.

One program owns a segment of one row and keeps it in registers. Scores become integers of the same
order; the topk-th largest is found bit by bit, each bit by one count; of the scores that equal it
the earlier ones are taken, until there are enough. Places in the result come from a prefix sum, so
that it ascends by entry. Rows of several segments are chosen from again: the best of a row are
among the best of its segments, and ascending candidates keep the rule for equal scores.

Exact. -0 equals 0; NaN is larger than everything, as torch.sort has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOPK = 8192
# Scores of a segment; at least four times topk, so that every round leaves a quarter or less.
SEGMENT = 8192
# Most scores of a program that so many warps serve.
WARPS = ((1024, 2), (4096, 4), (8192, 8), (4 * MAX_TOPK, 16))


@triton.jit
def to_keys(scores):
    """uint32 in the order of float32, all above 0."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.uint32, bitcast=True)
    keys = tl.where((bits & 0x80000000) != 0, ~bits, bits | 0x80000000)
    return tl.where(scores != scores, 0xFFFFFFFF, keys)


@triton.jit
def topk_kernel(
    score_ptr,
    id_ptr,
    num_visible_ptr,
    best_score_ptr,
    best_id_ptr,
    num_queries,
    length,
    topk,
    stride_sb,
    stride_vb,
    stride_vs,
    stride_ob,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    cols = segment * BLOCK + offsets
    row = batch * stride_sb + query.to(tl.int64) * length
    visible = tl.load(num_visible_ptr + batch * stride_vb + query.to(tl.int64) * stride_vs)
    if IS_FIRST:
        ids = cols
        is_valid = cols < tl.minimum(visible, length)
        # Where everything is chosen there are no scores; equal ones do.
        has_score = is_valid & (cols < tl.where(visible > topk, length, 0))
    else:
        ids = tl.load(id_ptr + row + cols, mask=cols < length, other=-1)
        is_valid = ids >= 0
        has_score = is_valid
    scores = tl.load(score_ptr + row + cols, mask=has_score, other=0.0)
    keys = tl.where(is_valid, to_keys(scores), 0)

    # the largest threshold that at least topk keys reach, or 0
    threshold = tl.cast(0, tl.uint32)
    for bit in range(32):
        candidate = threshold | (tl.cast(0x80000000, tl.uint32) >> bit)
        threshold = tl.where(tl.sum((keys >= candidate).to(tl.int32)) >= topk, candidate, threshold)

    is_above = keys > threshold
    is_equal = is_valid & (keys == threshold)
    num_above = tl.sum(is_above.to(tl.int32))
    # both counts in one prefix sum: above in the high bits
    ranks = tl.cumsum((is_above.to(tl.int32) << 16) + is_equal.to(tl.int32), 0)
    rank_above, rank_equal = ranks >> 16, tl.minimum(ranks & 0xFFFF, topk - num_above)
    is_chosen = is_above | (is_equal & ((ranks & 0xFFFF) <= topk - num_above))
    places = rank_above + rank_equal - 1
    num_chosen = tl.sum(is_chosen.to(tl.int32))
    is_rest = (offsets >= num_chosen) & (offsets < topk)
    if IS_LAST:
        best = best_id_ptr + batch * stride_ob + query.to(tl.int64) * topk
        tl.store(best + places, ids.to(tl.int64), mask=is_chosen)
        tl.store(best + offsets, -1, mask=is_rest)
    else:
        part = (batch * num_queries + query) * tl.num_programs(1) + segment
        tl.store(best_id_ptr + part * topk + places, ids, mask=is_chosen)
        tl.store(best_id_ptr + part * topk + offsets, -1, mask=is_rest)
        tl.store(best_score_ptr + part * topk + places, scores, mask=is_chosen)


def choose_topk(out: Tensor, scores: Tensor, num_visible: Tensor) -> None:
    """Fill ``out`` with the entries of the highest scores.

    Args:
        out: int64 ``(B, S, Z)``, dense in its last two dims; Z is at most C and :data:`MAX_TOPK`.
            Entries ascend, -1 fills up.
        scores: float32 ``(B, S, C)``, dense in its last two dims. Not read in the future, nor of
            queries that see at most Z entries.
        num_visible: Entries that a query may see, int64 ``(B, S)``.
    """
    batch, num_queries, topk = out.shape
    ids, is_first, is_last = out, True, False
    while not is_last:
        length = scores.shape[2]
        block = min(max(SEGMENT, triton.next_power_of_2(4 * topk)), triton.next_power_of_2(length))
        num_segments = triton.cdiv(length, block)
        is_last = num_segments == 1
        best_ids, best_scores = out, scores
        if not is_last:
            shape = (batch, num_queries, num_segments * topk)
            best_ids = torch.empty(shape, dtype=torch.int32, device=out.device)
            best_scores = torch.empty(shape, dtype=torch.float32, device=out.device)
        topk_kernel[num_queries, num_segments, batch](
            scores,
            ids,
            num_visible,
            best_scores,
            best_ids,
            num_queries,
            length,
            topk,
            scores.stride(0),
            *num_visible.stride(),
            out.stride(0),
            IS_FIRST=is_first,
            IS_LAST=is_last,
            BLOCK=block,
            num_warps=next(warps for most, warps in WARPS if block <= most),
        )
        scores, ids, is_first = best_scores, best_ids, False
