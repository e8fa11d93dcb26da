"""The indexer of CSA layers: its heads, and their dims without position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from v4surgery.importance.probes.probe import Probe, on_output, tokens_of
from v4surgery.model.block import Block
from v4surgery.model.indexer import Indexer

SCORES_PER_STEP = 1 << 24


class IndexerProbe(Probe):
    """``contribution`` of index heads, ``energy`` of index dims.

    A head's contribution is the mean of |w| relu(q . k), its share of an entry's score, over all
    pairs of a query and an entry that it may see. A dim's energy is the mean of q_j^2 over
    queries and heads, times the mean of k_j^2 over entries, before the Hadamard rotation.
    """

    def attach(self, block: Block) -> list[RemovableHandle]:
        indexer = block.attn.indexer
        if indexer is None:
            return []
        seen: dict[str, Tensor] = {}

        def finish(_: object, inputs: tuple[Any, ...], __: Tensor) -> None:
            self._add(indexer, seen, inputs[2].positions)
            seen.clear()

        return [
            on_output(indexer.wq_b, lambda q: seen.update(q=q)),
            on_output(indexer.weights_proj, lambda w: seen.update(w=w)),
            on_output(indexer.compressor, lambda k: seen.update(k=k)),
            indexer.register_forward_hook(finish),
        ]

    def _add(self, indexer: Indexer, seen: dict[str, Tensor], positions: Tensor) -> None:
        q = seen["q"].detach().unflatten(-1, (indexer.num_heads, indexer.head_dim))
        k = seen["k"].detach()
        nope = indexer.head_dim - indexer.compressor.rope_dims
        key = self.key("energy", "index_nope")
        for factor, x in enumerate((tokens_of(q).flatten(0, 1), tokens_of(k))):
            total = x[:, :nope].square().sum(0, dtype=torch.float64)
            self.totals.add(key, total, len(x), factor)
        q = indexer.numerics.ops.rope(q, positions, indexer.frequencies)
        queries, entries = tokens_of(indexer.rounded(q)), tokens_of(indexer.rounded(k))
        weights = tokens_of(seen["w"]).abs() * (indexer.head_dim * indexer.num_heads) ** -0.5
        visible = (positions[0] + 1) // indexer.ratio
        mass, pairs = _score_mass(queries, entries, weights, visible)
        self.totals.add(self.key("contribution", "index_n_heads"), mass, pairs)


def _score_mass(q: Tensor, k: Tensor, weights: Tensor, visible: Tensor) -> tuple[Tensor, int]:
    """Sum over visible pairs of weight x relu(q . k), float64 ``(X,)``, and how many pairs."""
    num_heads, num_entries = q.shape[1], len(k)
    mass = torch.zeros(num_heads, dtype=torch.float64, device=q.device)
    entries = torch.arange(num_entries, device=q.device)
    step = max(SCORES_PER_STEP // max(num_heads * num_entries, 1), 1)
    for begin in range(0, len(q), step):
        part = slice(begin, begin + step)
        scores = torch.einsum("txy,cy->txc", q[part], k).relu()
        is_past = entries < visible[part, None]
        shares = (scores * is_past[:, None]).sum(2, dtype=torch.float64)
        mass += (shares * weights[part]).sum(0)
    return mass, int(visible.clamp_max(num_entries).sum())
