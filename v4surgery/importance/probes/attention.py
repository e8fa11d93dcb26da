"""Attention: heads and their groups, the two low ranks, the dims without position.

Source: Minitron, arXiv:2407.14679, scores heads by the size of their outputs; here of what they
add to the hidden state. Wanda, arXiv:2306.11695, for |activation| x norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from v4surgery.importance.probes.probe import (
    Probe,
    column_norms,
    on_input,
    on_output,
    rms_normalised,
    steps_of,
    tokens_of,
)
from v4surgery.model.attention import Attention
from v4surgery.model.block import Block


class HeadsProbe(Probe):
    """``contribution``: mean norm of what a head, or a whole group, adds after wo_a and wo_b.

    With a head's output o, u = wo_a's block times o, and B = wo_b's columns of the group,
    |B u|^2 = u . (B^T B) u. The Gram matrix B^T B is (L, L), once for each group and block.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._grams: list[Tensor] = []

    def attach(self, block: Block) -> list[RemovableHandle]:
        return [on_output(block.attn.heads, lambda out: self._add(block.attn, out))]

    def _add(self, attention: Attention, outputs: Tensor) -> None:
        config = attention.config
        groups, rank = config.o_groups, config.o_lora_rank
        if not self._grams:
            wo_b = attention.wo_b.dense(attention.numerics.dtype).detach().float()
            self._grams = [b.T @ b for b in wo_b.split(rank, dim=1)]
        wo_a = attention.wo_a.dense(attention.numerics.dtype).detach().float()
        by_group = wo_a.unflatten(0, (groups, rank)).unflatten(2, (-1, config.head_dim))
        of_heads = self.key("contribution", "num_attention_heads")
        of_groups = self.key("contribution", "o_groups")
        for part in steps_of(outputs):
            parts = zip(part.chunk(groups, dim=1), by_group, self._grams, strict=True)
            sums = [_contributions(heads, rows, gram) for heads, rows, gram in parts]
            self.totals.add(of_heads, torch.cat([heads for heads, _ in sums]), len(part))
            self.totals.add(of_groups, torch.stack([group for _, group in sums]), len(part))


def _contributions(heads: Tensor, rows: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the norms that each head of a group adds, and the group as a whole.

    Args:
        heads: Of one group, ``(T, n, H)``.
        rows: The group's rows of wo_a by head, ``(L, n, H)``.
        gram: Of the group's columns of wo_b, ``(L, L)``.

    Returns:
        float64 ``(n,)`` and ``()``.
    """
    u = torch.einsum("tnh,lnh->tnl", heads, rows)
    group = _norms(u.sum(1), gram).sum(dtype=torch.float64)
    return _norms(u, gram).sum(0, dtype=torch.float64), group


def _norms(u: Tensor, gram: Tensor) -> Tensor:
    """|B u| for each u, from B's Gram matrix; rounding can put a square below zero."""
    return ((u @ gram) * u).sum(-1).clamp_min(0).sqrt()


class QueryRankProbe(Probe):
    """``activation``: mean |q_norm's output| x norm of the columns of all that reads it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._norms: Tensor | None = None

    def attach(self, block: Block) -> list[RemovableHandle]:
        attention = block.attn
        if self._norms is None:
            norms = column_norms(attention.wq_b)
            if attention.indexer is not None:
                norms = torch.hypot(norms, column_norms(attention.indexer.wq_b))
            self._norms = norms
        key = self.key("activation", "q_lora_rank")
        return [on_output(attention.q_norm, lambda qr: self._add(key, tokens_of(qr)))]

    def _add(self, key: str, qr: Tensor) -> None:
        assert self._norms is not None
        self.totals.add(key, qr.abs().sum(0, dtype=torch.float64) * self._norms, len(qr))


class OutputRankProbe(Probe):
    """``activation``: mean |wo_a's output| x norm of wo_b's column, group-major."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._norms: Tensor | None = None

    def attach(self, block: Block) -> list[RemovableHandle]:
        if self._norms is None:
            self._norms = column_norms(block.attn.wo_b)
        key = self.key("activation", "o_groups*o_lora_rank")
        return [on_input(block.attn.wo_b, lambda low: self._add(key, tokens_of(low)))]

    def _add(self, key: str, low: Tensor) -> None:
        assert self._norms is not None
        self.totals.add(key, low.abs().sum(0, dtype=torch.float64) * self._norms, len(low))


class NopeProbe(Probe):
    """``energy``: mean of q_j^2 over queries and heads, times mean of k_j^2 over keys.

    That is the mean of (q_j k_j)^2 over all pairs of a query and a key. Keys are those of the
    window and the compressed entries.
    """

    def attach(self, block: Block) -> list[RemovableHandle]:
        attention, config = block.attn, block.config
        nope, eps = config.nope_head_dim, config.rms_norm_eps
        key = self.key("energy", "nope")

        def add(squares: Tensor, factor: int) -> None:
            total = squares[:, :nope].sum(0, dtype=torch.float64)
            self.totals.add(key, total, len(squares), factor)

        def queries(q: Tensor) -> None:
            for part in steps_of(q):
                heads = part.reshape(-1, config.head_dim)
                add(rms_normalised(heads, eps).square(), 0)

        def keys(kv: Tensor) -> None:
            weight = attention.kv_norm.weight.detach().float()
            add((rms_normalised(tokens_of(kv), eps) * weight).square(), 1)

        handles = [on_output(attention.wq_b, queries), on_output(attention.wkv, keys)]
        if attention.compressor is not None:
            handles.append(
                on_output(attention.compressor, lambda kv: add(tokens_of(kv).square(), 1))
            )
        return handles
