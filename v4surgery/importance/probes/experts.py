"""Experts and their neurons: what each adds to the hidden state.

A routed expert is run with its gate weight inside (spec/forward.md, "Experts"): what goes into w2
and what comes out of it are weighted already.

Source: REAP, arXiv:2510.13999, for experts. Wanda, arXiv:2306.11695, for |activation| x norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from v4surgery.importance.probes.probe import Probe, column_norms, on_input, on_output
from v4surgery.importance.scorebook import neuron_dim
from v4surgery.model.block import Block
from v4surgery.model.linear import Linear
from v4surgery.model.moe import Experts


class ExpertsProbe(Probe):
    """``reap``: mean over an expert's tokens of |w E(x)|; ``frequency``: choices a token."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        gate = block.ffn.gate
        count, reap = gate.config.n_routed_experts, self.key("reap", "n_routed_experts")

        def chosen(routed: tuple[Tensor, Tensor]) -> None:
            indices = routed[0]
            tokens = torch.bincount(indices.flatten(), minlength=count).double()
            self.totals.add(self.key("frequency", "n_routed_experts"), tokens, len(indices))
            self.totals.add(reap, torch.zeros_like(tokens), tokens)
            self.totals.by_rank.add(reap)

        def output(_: object, inputs: tuple[Any, ...], y: Tensor) -> None:
            norms = y.detach().float().norm(dim=-1)
            self.totals.sums[reap][0][inputs[1]] += norms.sum(dtype=torch.float64)

        return [
            on_output(gate, chosen),
            block.ffn.output_probe.register_forward_hook(output),
        ]


class NeuronsProbe(Probe):
    """``activation``: mean over an expert's tokens of |what goes into w2| x norm of w2's column."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._norms: dict[int | None, Tensor] = {}

    def attach(self, block: Block) -> list[RemovableHandle]:
        shared = block.ffn.shared_experts.w2

        def neurons(_: object, inputs: tuple[Any, ...], hidden: Tensor) -> None:
            expert = inputs[1]
            ((_, module),) = Experts.each(block.ffn.experts, (expert,))  # it is here: no reading
            self._add(expert, hidden, module.w2)

        return [
            block.ffn.neuron_probe.register_forward_hook(neurons),
            on_input(shared, lambda hidden: self._add(None, hidden, shared)),
        ]

    def _add(self, expert: int | None, hidden: Tensor, w2: Linear) -> None:
        if expert not in self._norms:
            self._norms[expert] = column_norms(w2)
        total = hidden.detach().float().abs().sum(0, dtype=torch.float64) * self._norms[expert]
        key = self.key("activation", neuron_dim(expert))
        self.totals.add(key, total, len(hidden))
        if expert is not None:
            self.totals.by_rank.add(key)
