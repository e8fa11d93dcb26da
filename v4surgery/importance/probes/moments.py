"""Second moments, mean of x x^T, for whoever rotates an axis before cutting it.

Source: SliceGPT, arXiv:2401.15024, takes the principal components of what a norm gives out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from v4surgery.importance.names import MOMENTS, SECOND_MOMENT, key_of
from v4surgery.importance.probes.probe import (
    Probe,
    on_input,
    on_output,
    rms_normalised,
    tokens_of,
)
from v4surgery.importance.totals import Totals
from v4surgery.model.block import Block
from v4surgery.model.ends import Collapse

HIDDEN_SIZE = key_of(SECOND_MOMENT, MOMENTS["hidden_size"])


class HiddenMoment(Probe):
    """Of both sublayers' collapsed streams divided by their RMS: one matrix for the model."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        return [
            on_input(norm, lambda x: add_hidden(self.model, x, block.config.rms_norm_eps))
            for norm in (block.attn_norm, block.ffn_norm)
        ]


class QueryRankMoment(Probe):
    """Of what q_norm is given, divided by its RMS: ``(Q, Q)``."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        key, eps = self.key(SECOND_MOMENT, MOMENTS["q_lora_rank"]), block.config.rms_norm_eps

        def add(x: Tensor) -> None:
            x = rms_normalised(tokens_of(x), eps)
            self.totals.add(key, x.T @ x, len(x))

        return [on_input(block.attn.q_norm, add)]


class OutputRankMoment(Probe):
    """Of wo_a's output, group by group: ``(G, L, L)``."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        key, groups = self.key(SECOND_MOMENT, MOMENTS["o_lora_rank"]), block.config.o_groups
        return [on_input(block.attn.wo_b, lambda low: _add_grouped(self.totals, key, low, groups))]


class HeadsMoment(Probe):
    """Of the heads that wo_a is given, group by group: ``(G, N/G * H, N/G * H)``."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        key, groups = self.key(SECOND_MOMENT, MOMENTS["heads"]), block.config.o_groups

        def add(heads: Tensor) -> None:
            _add_grouped(self.totals, key, heads.flatten(2), groups)

        return [on_output(block.attn.heads, add)]


def add_hidden(model: Totals, x: Tensor, eps: float) -> None:
    """Add collapsed streams ``(1, S, D)`` to the model's matrix."""
    x = rms_normalised(tokens_of(x), eps)
    model.add(HIDDEN_SIZE, x.T @ x, len(x))


def add_end(model: Totals, head: Collapse, h: Tensor) -> None:
    """What the head's collapse adds to the model's matrix."""
    add_hidden(model, head.collapse_head(h), head.config.rms_norm_eps)


def _add_grouped(totals: Totals, key: str, x: Tensor, groups: int) -> None:
    grouped = tokens_of(x).unflatten(1, (groups, -1)).transpose(0, 1)
    totals.add(key, torch.bmm(grouped.mT, grouped), grouped.shape[1])
