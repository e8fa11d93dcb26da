"""Attention, compressor and indexer of the masked parent, in the parent's shapes.

Removed head dims are zero in queries, keys and values and in no mean; removed heads, groups and
ranks are silenced where they would be added up. Scores are dense: every query against every
position, with what it may not see at -inf.

Source: spec/forward.md, "Attention", "Compressor", "Indexer".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4surgery.config import CSA_RATIO, V4Config
from v4surgery.validation.masked.masks import Masks
from v4surgery.validation.masked.streams import masked_norm
from v4surgery.validation.masked.weights import Weights

SCORE_BYTES = 128 << 20


@dataclass(frozen=True)
class Own:
    """What a block has from the replica's config instead of the parent's.

    Attributes:
        ratio: Compress ratio; 0 for sliding attention alone.
        is_hash: Whether tokens are routed by the hash table.
        window: Newest positions that a query sees.
        topk: Compressed entries that the indexer chooses.
        per_token: Experts of a token.
        scaling: Factor on the routed experts' weights.
        frequencies: RoPE, radians a position, float32 ``(R'/2,)``.
    """

    ratio: int
    is_hash: bool
    window: int
    topk: int
    per_token: int
    scaling: float
    frequencies: Tensor


class MaskedAttention:
    """The attention of one parent block; x is ``(S, D)``, its removed channels zero."""

    def __init__(self, config: V4Config, own: Own, masks: Masks, weight: Weights) -> None:
        self.config, self.own, self.masks, self.weight = config, own, masks, weight
        self.eps = config.rms_norm_eps
        self.frequencies = masks.spread_pairs(own.frequencies)

    def heads(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """What each head reads, rotated back, ``(S, N, H)``; removed heads are silent.

        Args:
            x: Input.
            visible: Which compressed entries each query sees, bool ``(S, C)``; None for sliding
                layers.
        """
        config, mask = self.config, self.masks.dim_H
        here = torch.arange(len(x), device=x.device)
        q = (self._low_rank(x) @ self.weight("attn.wq_b").T).unflatten(1, (-1, config.head_dim))
        q = rotated(masked_norm(q, mask, self.eps), here, self.frequencies)
        kv = masked_norm(x @ self.weight("attn.wkv").T, mask, self.eps, self.weight("attn.kv_norm"))
        keys = rotated(kv, here, self.frequencies)
        sees = (here <= here[:, None]) & (here > here[:, None] - self.own.window)
        if visible is not None:
            keys = torch.cat((keys, self.entries(x, "attn.compressor.", mask)))
            sees = torch.cat((sees, visible), 1)
        out = self._read_keys(q, keys, sees) * self.masks.head_GN.flatten()[:, None]
        return rotated(out, -here, self.frequencies)

    def output(self, heads: Tensor) -> Tensor:
        """Each group's heads through its own ranks, then all to the channels, ``(S, D)``."""
        groups, ranks = self.masks.o_rank_GL.shape
        grouped = heads.reshape(len(heads), groups, -1)
        wo_a = self.weight("attn.wo_a").unflatten(0, (groups, ranks))
        low = torch.einsum("sgh,glh->sgl", grouped, wo_a) * self.masks.o_rank_GL
        return low.flatten(1) @ self.weight("attn.wo_b").T * self.masks.channel_D

    def index_queries(self, x: Tensor) -> Tensor:
        """Queries of the index heads before RoPE, ``(S, X, Y)``."""
        q = self._low_rank(x) @ self.weight("attn.indexer.wq_b").T
        q = q.unflatten(1, (self.config.index_n_heads, self.config.index_head_dim))
        masked: Tensor = q * self.masks.index_dim_Y
        return masked

    def index_weights(self, x: Tensor) -> Tensor:
        """How much each index head says, ``(S, X)``."""
        return x @ self.weight("attn.indexer.weights_proj").T * self.masks.index_head_X

    def index_scores(self, q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the indexer thinks of each entry, ``(S, C)``, and how large its terms are.

        Future entries are at -inf. The terms of a score may cancel: their absolute sum says how
        large its rounding is.
        """
        masks = self.masks
        q = rotated(q, torch.arange(len(q), device=q.device), self.frequencies)
        weights = weights * (masks.index_dim_Y.sum() * masks.index_head_X.sum()) ** -0.5
        scores, sizes = [], []
        for part in _parts(len(q), q.shape[1] * len(k)):
            terms = torch.einsum("sxy,cy->sxc", q[part], k).relu() * weights[part, :, None]
            scores.append(terms.sum(1))
            sizes.append(terms.abs().sum(1))
        past = self.past_entries(len(q))
        return torch.cat(scores).masked_fill(~past, float("-inf")), torch.cat(sizes) * past

    def past_entries(self, length: int) -> Tensor:
        """Which entries lie whole in the past of each query, bool ``(S, C)``."""
        ratio, device = self.own.ratio, self.masks.device
        entry = torch.arange(length // ratio, device=device)
        position = torch.arange(length, device=device)
        return entry < ((position + 1) // ratio)[:, None]

    def entries(self, x: Tensor, name: str, mask: Tensor) -> Tensor:
        """Compressed windows of ratio positions, ``(C, H)``, normalised and rotated."""
        ratio, size = self.own.ratio, len(mask)
        count = len(x) // ratio
        kv, gate = (x @ self.weight(name + part).T for part in ("wkv", "wgate"))
        ape = self.weight.ape(name + "ape", ratio)
        gate = gate + ape[torch.arange(len(x), device=x.device) % ratio]
        kv, gate = (t[: count * ratio].unflatten(0, (count, ratio)) for t in (kv, gate))
        if ratio == CSA_RATIO:
            kv = torch.cat((_earlier(kv[..., :size], 0.0), kv[..., size:]), 1)
            gate = torch.cat((_earlier(gate[..., :size], float("-inf")), gate[..., size:]), 1)
        pooled = (gate.softmax(1) * kv).sum(1)
        normed = masked_norm(pooled, mask, self.eps, self.weight(name + "norm"))
        starts = torch.arange(count, device=x.device) * ratio
        return rotated(normed, starts, self.frequencies)

    def _low_rank(self, x: Tensor) -> Tensor:
        qr = x @ self.weight("attn.wq_a").T
        return masked_norm(qr, self.masks.q_rank_Q, self.eps, self.weight("attn.q_norm"))

    def _read_keys(self, q: Tensor, keys: Tensor, sees: Tensor) -> Tensor:
        """Softmax over seen keys and the sink, which is no key."""
        sink = self.weight("attn.attn_sink")
        scale = self.masks.dim_H.sum() ** -0.5
        out = []
        for part in _parts(len(q), q.shape[1] * len(keys)):
            scores = torch.einsum("snh,kh->snk", q[part], keys) * scale
            scores = scores.masked_fill(~sees[part][:, None], float("-inf"))
            sinks = sink[None, :, None].expand(len(scores), -1, 1)
            shares = torch.cat((scores, sinks), 2).softmax(2)[..., :-1]
            out.append(torch.einsum("snk,kh->snh", shares, keys))
        return torch.cat(out)


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE: the last dims as complex numbers, pair i turned by position * frequency i.

    Args:
        x: ``(S, ..., H)``.
        positions: int64 ``(S,)``; negative to turn back.
        frequencies: ``(R/2,)``.
    """
    plain, turning = x.split((x.shape[-1] - 2 * len(frequencies), 2 * len(frequencies)), -1)
    angles = positions.float()[:, None] * frequencies
    turns = torch.complex(angles.cos(), angles.sin())
    turns = turns.reshape(len(x), *(1,) * (x.dim() - 2), len(frequencies))
    pairs = turning.unflatten(-1, (len(frequencies), 2))
    numbers = torch.complex(pairs[..., 0], pairs[..., 1])
    return torch.cat((plain, torch.view_as_real(numbers * turns).flatten(-2)), -1)


def _earlier(windows: Tensor, before: float) -> Tensor:
    """For each window the one before it; ``before`` stands for the one before the first."""
    first = torch.full_like(windows[:1], before)
    return torch.cat((first, windows[:-1]))


def _parts(length: int, scores: int) -> list[slice]:
    """Queries in parts whose ``scores`` for each fit the memory."""
    step = max(SCORE_BYTES // (4 * max(scores, 1)), 1)
    return [slice(begin, begin + step) for begin in range(0, length, step)]
