"""Scores of compressed entries for each query, and the best of those that lie in the past.

score[t, c] = sum_x w[t, x] * relu(q[t, x] . k[c]); entries c >= (t + 1) // ratio are future.
Source: spec/forward.md, "Indexer".
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES_PER_STEP_BYTES = 64 << 20


def indexer_topk(q: Tensor, k: Tensor, weights: Tensor, num_visible: Tensor, topk: int) -> Tensor:
    """The best past entries of each query.

    Args:
        q: ``(B, S, X, Y)``.
        k: Compressed keys ``(B, C, Y)``.
        weights: float32 ``(B, S, X)``.
        num_visible: Entries that a query may see, int64 ``(B, S)``.
        topk: How many to choose.

    Returns:
        int64 ``(B, S, min(topk, C))``: a set in no order that callers may rely on. Equal scores
        go to the earlier entry; -1 where there are fewer.
    """
    batch, num_queries, heads, _ = q.shape
    num_entries = k.shape[1]
    count = min(topk, num_entries)
    step = max(SCORES_PER_STEP_BYTES // (4 * max(num_entries, 1) * heads * batch), 1)
    entries = torch.arange(num_entries, device=q.device)
    chosen = []
    for begin in range(0, num_queries, step):
        part = slice(begin, begin + step)
        scores = torch.einsum("bsxy,bcy->bsxc", q[:, part].float(), k.float()).relu()
        scores = (scores * weights[:, part].float()[..., None]).sum(2)
        future = entries >= num_visible[:, part, None]
        # Stable, so that equal scores go to the earlier entry whatever the shape of the call.
        masked = scores.masked_fill(future, float("-inf"))
        best = masked.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        chosen.append(best.masked_fill(best >= num_visible[:, part, None], -1))
    return torch.cat(chosen, dim=1)
