"""Scores of compressed entries for each query, and the best of those that lie in the past.

score[t, c] = sum_x w[t, x] * relu(q[t, x] . k[c]); entries c >= (t + 1) // ratio are future.
Source: spec/forward.md, "Indexer".
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import launch
from v4surgery.kernels.indexer_scores import indexer_scores
from v4surgery.kernels.topk import MAX_TOPK, choose_topk

# Scores that exist at a time; queries are taken in parts of as many as fit, at least one.
SCORES_BYTES = 256 << 20


def indexer_topk(q: Tensor, k: Tensor, weights: Tensor, num_visible: Tensor, topk: int) -> Tensor:
    """The best past entries of each query.

    Args:
        q: bf16 or float32 ``(B, S, X, Y)``.
        k: Compressed keys, dtype of ``q``, ``(B, C, Y)``.
        weights: float32 ``(B, S, X)``.
        num_visible: Entries that a query may see, int64 ``(B, S)``.
        topk: How many to choose, at most 8,192.

    Returns:
        int64 ``(B, S, min(topk, C))``: a set in no order that callers may rely on. Equal scores
        go to the earlier entry; -1 where there are fewer.

    Raises:
        UsageError: Devices, dtypes, shapes or a topk that do not fit.
    """
    _require(q, k, weights, num_visible, topk)
    batch, num_queries = num_visible.shape
    num_entries = k.shape[1]
    count = min(topk, num_entries)
    out = torch.empty((batch, num_queries, count), dtype=torch.int64, device=q.device)
    if not out.numel():
        return out
    if num_entries <= topk:
        entries = torch.arange(num_entries, device=q.device)
        return torch.where(entries < num_visible[..., None], entries, -1)
    step = min(max(SCORES_BYTES // (4 * num_entries * batch), 1), num_queries)
    scores = torch.empty((batch, step, num_entries), dtype=torch.float32, device=q.device)
    for begin in range(0, num_queries, step):
        part = slice(begin, min(begin + step, num_queries))
        some = scores[:, : part.stop - begin]
        indexer_scores(some, q[:, part], k, weights[:, part], num_visible[:, part], topk)
        choose_topk(out[:, part], some, num_visible[:, part])
    return out


def _require(q: Tensor, k: Tensor, weights: Tensor, num_visible: Tensor, topk: int) -> None:
    operation = "indexer_topk"
    launch.require_same_device(operation, q, k, weights, num_visible)
    launch.require_dtype(operation, "q", q, torch.bfloat16, torch.float32)
    launch.require_dtype(operation, "k", k, q.dtype)
    launch.require_dtype(operation, "weights", weights, torch.float32)
    launch.require_dtype(operation, "num_visible", num_visible, torch.int64)
    batch, num_queries, heads, head_dim = q.shape
    launch.require_shape(operation, "k", k, (batch, k.shape[1], head_dim))
    launch.require_shape(operation, "weights", weights, (batch, num_queries, heads))
    launch.require_shape(operation, "num_visible", num_visible, (batch, num_queries))
    if not 0 <= topk <= MAX_TOPK:
        raise UsageError(
            "topk is out of range",
            where=operation,
            value=topk,
            rule=f"0 to {MAX_TOPK}",
            hint="--implementation reference takes any",
        )
