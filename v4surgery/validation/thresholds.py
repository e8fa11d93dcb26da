"""The numbers that a validation comes down to, held against the recipe's thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

from v4surgery.recipes.schema import Validate
from v4surgery.validation.behaviour import FREE, TAUGHT, Behaviour, LayerBehaviour

AT_MOST = ("logit_kl", "perplexity_ratio", "relative_error", "taught_error")
AT_LEAST = ("top1_agreement", "top5_agreement", "router_agreement")
OUT = "out"
MEANINGS: Mapping[str, str] = {
    "logit_kl": "KL(parent || replica) of a position's prediction, in nats, mean",
    "top1_agreement": "positions with the parent's most likely token, share",
    "top5_agreement": "the parent's five most likely tokens that are among the replica's, share",
    "perplexity": "the replica's perplexity on the prompts, tokens",
    "parent_perplexity": "the parent's, tokens",
    "perplexity_ratio": "perplexity in multiples of the parent's",
    "relative_error": "running freely: largest relative error of a layer's output",
    "taught_error": "teacher-forced: largest relative error of a layer's output",
    "router_agreement": "teacher-forced: smallest share of the parent's choices of kept experts",
    "masked_error": "against the masked parent: largest relative error of a token",
    "tensors_compared": "tensors compared with the parent's bytes",
}


@dataclass(frozen=True)
class Check:
    """One number against its threshold.

    Attributes:
        name: Key of the recipe's ``validate:`` section.
        value: As measured; NaN fails.
        limit: The threshold.
        is_most: Whether the threshold is the largest allowed value, or the smallest.
    """

    name: str
    value: float
    limit: float
    is_most: bool

    @property
    def passed(self) -> bool:
        return self.value <= self.limit if self.is_most else self.value >= self.limit

    @property
    def rule(self) -> str:
        return f"at {'most' if self.is_most else 'least'} {self.limit:g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "rule": self.rule,
            "passed": self.passed,
        }


def summarize_behaviour(behaviour: Behaviour) -> dict[str, float]:
    """Every number that a threshold can be set for, and both perplexities."""
    logits = behaviour.logits.to_json()
    perplexity, parents = logits["perplexity"], logits["parent_perplexity"]
    shares = [layer.router[TAUGHT].share for layer in behaviour.layers]
    return {
        "logit_kl": logits["kl"],
        "top1_agreement": logits["top1_agreement"],
        "top5_agreement": logits["top5_agreement"],
        "perplexity": perplexity,
        "parent_perplexity": parents,
        "perplexity_ratio": perplexity / parents if parents else nan,
        "relative_error": _largest(error_of(layer, FREE) for layer in behaviour.layers),
        "taught_error": _largest(error_of(layer, TAUGHT) for layer in behaviour.layers),
        # NaN: none of a layer's choices are kept experts, or there are none to choose.
        "router_agreement": min((s for s in shares if isfinite(s)), default=nan),
    }


def check_thresholds(thresholds: Validate, summary: Mapping[str, float]) -> tuple[Check, ...]:
    """The thresholds that are set, each with its number."""
    limits = thresholds.model_dump()
    return tuple(
        Check(name, summary.get(name, nan), limit, name in AT_MOST)
        for name in (*AT_MOST, *AT_LEAST)
        if (limit := limits[name]) is not None
    )


def error_of(layer: LayerBehaviour, way: str, tap: str = OUT) -> float:
    """Relative error of a layer at a tap; NaN where it was not compared."""
    close = layer.taps[way].get(tap)
    return close.relative_error if close else nan


def badness(error: float) -> float:
    """A key to sort errors by: NaN is worse than any number."""
    return error if error == error else inf


def _largest(errors: Any) -> float:
    return max(errors, key=badness, default=nan)
