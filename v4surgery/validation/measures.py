"""How close two activations are, and two distributions over the vocabulary.

Every measure is computed in float64 over all tokens of one prompt, and merged over prompts by
sums, so that nothing but the sums is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# float64 logits of a vocabulary of 129,280: 0.25 GB a step, several times over.
POSITIONS_PER_STEP = 256


@dataclass
class Closeness:
    """How close ``actual`` is to ``expected``, over any number of prompts.

    Attributes:
        relative_error: ||actual - expected|| / ||expected||, over all values; 0 is equal.
        cosine: Mean over tokens of the cosine of a token's values, -1 to 1.
        worst_error: Largest relative error of a single token.
        worst_token: Prompt and position of it.
        num_tokens: Tokens compared.
        is_exact: Whether every value is equal, bit for bit.
    """

    num_tokens: int = 0
    worst_error: float = 0.0
    worst_token: tuple[int, int] = (0, 0)
    is_exact: bool = True
    _difference: float = field(default=0.0, repr=False)
    _expected: float = field(default=0.0, repr=False)
    _cosines: float = field(default=0.0, repr=False)

    def add(self, actual: Tensor, expected: Tensor, prompt: int) -> None:
        """Take one prompt's values, both ``(S, ...)`` of one shape and device."""
        num_tokens = actual.shape[0]
        a, b = (x.reshape(num_tokens, -1).double() for x in (actual, expected))
        difference = (a - b).square().sum(1)
        norm = b.square().sum(1)
        self._difference += difference.sum().item()
        self._expected += norm.sum().item()
        equal_zero = (a.square().sum(1) == 0) & (norm == 0)
        cosines = torch.cosine_similarity(a, b, dim=1)
        self._cosines += torch.where(equal_zero, 1.0, cosines).sum().item()
        errors = (difference / norm.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        errors = torch.where(equal_zero, 0.0, errors)
        errors = errors.nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN is the worst of all
        worst = int(errors.argmax())
        error = errors[worst].item()
        if error > self.worst_error:
            self.worst_error, self.worst_token = error, (prompt, worst)
        self.num_tokens += num_tokens
        self.is_exact = self.is_exact and torch.equal(actual, expected)

    @property
    def relative_error(self) -> float:
        if self._difference == 0:
            return 0.0
        ratio = self._difference / self._expected if self._expected else float("inf")
        return float(ratio**0.5)

    @property
    def cosine(self) -> float:
        return self._cosines / max(self.num_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "relative_error": self.relative_error,
            "cosine": self.cosine,
            "worst_error": self.worst_error,
            "worst_token": list(self.worst_token),
            "tokens": self.num_tokens,
            "exact": self.is_exact,
        }


@dataclass
class Alignment:
    """Linear CKA of two activations of different widths, over any number of prompts.

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of values centred over all tokens: 1 where one is a rotation and
    scaling of the other. Tokens are kept, widths are not: products of widths by widths are summed.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", eq. 4.
    """

    num_tokens: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take one prompt's values, ``(S, ...)`` each, of one S and any widths."""
        x, y = (t.reshape(t.shape[0], -1).double() for t in (x, y))
        parts = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "yx": y.T @ x}
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self.num_tokens += x.shape[0]

    @property
    def cka(self) -> float:
        """0 to 1; NaN where one of them does not vary."""
        if not self.num_tokens:
            return float("nan")
        sums, count = self._sums, self.num_tokens

        def centred(a: str, b: str) -> Tensor:
            return sums[a + b] - torch.outer(sums[a], sums[b]) / count

        cross = centred("y", "x").square().sum()
        own = centred("x", "x").norm() * centred("y", "y").norm()
        return float(cross / own)


@dataclass
class RouterAgreement:
    """Whether tokens go to the same experts.

    Attributes:
        num_tokens: Tokens compared.
    """

    num_tokens: int = 0
    _shared: float = field(default=0.0, repr=False)
    _reachable: float = field(default=0.0, repr=False)
    _same_sets: int = field(default=0, repr=False)

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Take chosen experts in the replica's numbers.

        Args:
            actual: int64 ``(S, K')``.
            expected: int64 ``(S, K)``; -1 for an expert that the replica does not have.
        """
        kept = expected >= 0
        found = (expected[:, :, None] == actual[:, None, :]).any(2) & kept
        self._shared += found.sum().item()
        self._reachable += kept.sum(1).clamp_max(actual.shape[1]).sum().item()
        self._same_sets += int((found.sum(1) == kept.sum(1).clamp_max(actual.shape[1])).sum())
        self.num_tokens += actual.shape[0]

    @property
    def share(self) -> float:
        """Of the parent's choices that the replica has experts for, those it makes too, 0 to 1."""
        return self._shared / self._reachable if self._reachable else float("nan")

    @property
    def same_sets(self) -> float:
        """Share of tokens for which all of them are."""
        return self._same_sets / self.num_tokens if self.num_tokens else float("nan")


@dataclass
class LogitAgreement:
    """How close two models' predictions are, in nats and shares, over any number of prompts.

    Attributes:
        num_tokens: Positions compared.
    """

    num_tokens: int = 0
    _kl: float = field(default=0.0, repr=False)
    _top1: int = field(default=0, repr=False)
    _top5: float = field(default=0.0, repr=False)
    _nll: dict[str, float] = field(default_factory=lambda: {"actual": 0.0, "expected": 0.0})
    _predicted: int = field(default=0, repr=False)

    def add(self, actual: Tensor, expected: Tensor, ids: Tensor) -> None:
        """Take one prompt's logits, ``(S, V)`` each, and its ids int64 ``(S,)`` (-1: unknown)."""
        following = torch.cat((ids[1:], ids.new_full((1,), -1))).to(expected.device)
        parts = (t.split(POSITIONS_PER_STEP) for t in (actual, expected, following))
        for some_actual, some_expected, some_following in zip(*parts, strict=True):
            self._add(some_actual.to(expected.device), some_expected, some_following)

    def _add(self, actual: Tensor, expected: Tensor, following: Tensor) -> None:
        p, q = (t.double().log_softmax(-1) for t in (expected, actual))
        self._kl += (p.exp() * (p - q)).sum().item()
        top = min(5, p.shape[-1])
        best, other = p.topk(top, -1).indices, q.topk(top, -1).indices
        self._top1 += int((best[:, 0] == other[:, 0]).sum())
        common = (best[:, :, None] == other[:, None, :]).any(2)
        self._top5 += common.double().mean(1).sum().item()
        self.num_tokens += p.shape[0]
        known = following >= 0
        for name, logs in (("actual", q), ("expected", p)):
            chosen = logs.gather(1, following.clamp_min(0)[:, None])[:, 0]
            self._nll[name] -= chosen[known].sum().item()
        self._predicted += int(known.sum())

    def to_json(self) -> dict[str, float]:
        """KL(parent || replica) a position, agreement, and the perplexity of both on the text."""
        count, predicted = max(self.num_tokens, 1), max(self._predicted, 1)
        return {
            "kl": self._kl / count,
            "top1_agreement": self._top1 / count,
            "top5_agreement": self._top5 / count,
            "perplexity": _exp(self._nll["actual"] / predicted),
            "parent_perplexity": _exp(self._nll["expected"] / predicted),
        }


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())
