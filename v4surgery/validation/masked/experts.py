"""The gate and the experts of the masked parent: removed experts cannot be selected.

Source: spec/forward.md, "Experts".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from v4surgery.config import V4Config
from v4surgery.validation.masked.attention import Own
from v4surgery.validation.masked.masks import Masks
from v4surgery.validation.masked.weights import Weights


class MaskedExperts:
    """Gate and experts of one parent block; x is ``(T, D)``, its removed channels zero."""

    def __init__(self, config: V4Config, own: Own, masks: Masks, weight: Weights) -> None:
        self.config, self.own, self.masks, self.weight = config, own, masks, weight

    def scores(self, x: Tensor) -> Tensor:
        """Affinity of each token to each parent expert, ``(T, E)``; removed experts too."""
        logits = x @ self.weight("ffn.gate").T
        if self.config.scoring_func == "softmax":
            logits = logits.masked_fill(self.masks.expert_E == 0, float("-inf"))
        return affinity(logits, self.config.scoring_func)

    def biased(self, scores: Tensor) -> Tensor:
        """Scores plus bias; hash layers have none, nor have score layers that come of them."""
        has_bias = self.weight.has("ffn.gate.bias")
        return scores + self.weight("ffn.gate.bias") if has_bias else scores

    def steered(self, scores: Tensor) -> Tensor:
        """What the choice goes by: scores plus bias, removed experts at -inf."""
        return self.biased(scores).masked_fill(self.masks.expert_E == 0, float("-inf"))

    def weights(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen parent experts ``(T, K)``."""
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob and self.config.scoring_func != "softmax":
            weights = weights / weights.sum(1, keepdim=True)
        return weights * self.own.scaling

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The shared expert and the chosen ones, ``(T, D)``."""
        shared = [self.weight(f"ffn.shared_experts.w{i}") for i in (1, 2, 3)]
        total = self._expert(x, *shared, neurons=self.masks.neuron_F(None))
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            matrices = [self.weight.expert(expert, f"w{i}") for i in (1, 2, 3)]
            neurons = self.masks.neuron_F(expert)
            share = weights[token, slot, None]
            y = self._expert(x[token], *matrices, neurons=neurons, weight=share)
            total = total.index_add(0, token, y)
        return total

    def alone(self, expert: int, x: Tensor) -> Tensor:
        """One routed expert on every token, ``(T, D)``, without a weight."""
        matrices = [self.weight.expert(expert, f"w{i}") for i in (1, 2, 3)]
        return self._expert(x, *matrices, neurons=self.masks.neuron_F(expert))

    def _expert(
        self,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        *,
        neurons: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        hidden = swiglu(x @ w1.T, x @ w3.T, self.config.swiglu_limit) * neurons
        y: Tensor = (hidden if weight is None else hidden * weight) @ w2.T
        return y * self.masks.channel_D


def affinity(logits: Tensor, scoring_func: str) -> Tensor:
    """Scores of experts from the gate's product, ``(T, E)``."""
    if scoring_func == "sqrtsoftplus":
        return functional.softplus(logits).sqrt()
    return logits.softmax(1) if scoring_func == "softmax" else logits.sigmoid()


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    hidden: Tensor = functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return hidden


def choice_error(values: Tensor, sizes: Tensor, chosen: Tensor) -> Tensor:
    """By how much each row's choice is not the best one, relative to the row's size.

    Rounding may turn the order of values that are as good as equal, so a choice is graded by what
    it gives away: the best value left out less the worst one taken.

    Args:
        values: ``(T, E)``; -inf for what cannot be chosen.
        sizes: How large the row's numbers are, ``(T,)``.
        chosen: bool ``(T, E)``.

    Returns:
        ``(T,)``, 0 for a best choice, inf where something was chosen that cannot be.
    """
    impossible = (chosen & values.isneginf()).any(1)
    taken = values.masked_fill(~chosen, float("inf")).amin(1)
    left = values.masked_fill(chosen, float("-inf")).amax(1)
    loss = (left - taken).clamp_min(0)
    relative = torch.where(loss > 0, loss / sizes.clamp_min(1e-30), torch.zeros_like(loss))
    return relative.masked_fill(impossible, float("inf"))
