"""What the masked parent says of a replica."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A rule that the replica breaks, and where: no forward is needed to see it."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


class NotGraded(NamedTuple):
    """Something that the check cannot say anything exact about, and why."""

    place: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}: {self.why}"


@dataclass(frozen=True)
class TapGrade:
    """How far the replica is from the masked parent at one tap, over all prompts.

    Attributes:
        place: The replica's block, ``layers.3.``; empty for embedding and logits.
        tap: A name of validation.taps; ``attn.indexer.*`` and ``gate.scores`` for what choices
            are made of; ``ffn.experts`` for experts that no token went to; ``draft`` for what a
            drafter gives to the head.
        error: Largest relative error of a token; for choices what the worst one gives away.
        prompt: Where that is.
        position: Of the token in the prompt; for the embedding the token id.
        graded: Whether the tap could be graded exactly.
    """

    place: str
    tap: str
    error: float
    prompt: int
    position: int
    graded: bool = True

    @property
    def name(self) -> str:
        return self.place + self.tap


@dataclass(frozen=True)
class MaskedReport:
    """Grade two of faithfulness: the replica against its parent with the removed units masked.

    Attributes:
        replica: Its name.
        parent: Its name.
        device: Where both computed.
        implementation: Operations that the replica ran with.
        tolerance: Largest relative error that counts as rounding.
        num_tokens: Of all prompts.
        taps: In the order of the forward.
        broken_rules: What contradicts recipe, record or parent without any forward.
        not_graded: What the check cannot tell, and why.
    """

    replica: str
    parent: str
    device: str
    implementation: str
    tolerance: float
    num_tokens: int
    taps: tuple[TapGrade, ...]
    broken_rules: tuple[Rule, ...]
    not_graded: tuple[NotGraded, ...]

    @property
    def failed_taps(self) -> tuple[TapGrade, ...]:
        """Graded taps beyond the tolerance, NaN among them, in the order of the forward."""
        return tuple(t for t in self.taps if t.graded and not t.error <= self.tolerance)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each failure: taps in the order of the forward, then rules."""
        taps = [
            f"{tap.name}: off by {tap.error:.2g} at position {tap.position} of prompt "
            f"{tap.prompt}; rounding is at most {self.tolerance:g}"
            for tap in self.failed_taps
        ]
        return (*taps, *map(str, self.broken_rules))

    @property
    def first_failure(self) -> str | None:
        """The place nearest to the input where replica and masked parent part."""
        return self.failures[0] if self.failures else None

    @property
    def verdict(self) -> str:
        """``passed``, ``failed``, or ``not graded`` where nothing could be."""
        if self.failures:
            return "failed"
        return "passed" if any(tap.graded for tap in self.taps) else "not graded"

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def worst(self) -> TapGrade | None:
        """The graded tap of largest error."""
        return max((t for t in self.taps if t.graded), key=lambda t: t.error, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with verdict and failures as sentences; an infinite error is null."""
        data = asdict(self)
        for tap in data["taps"]:
            tap["error"] = tap["error"] if isfinite(tap["error"]) else None
        data["broken_rules"] = [rule._asdict() for rule in self.broken_rules]
        data["not_graded"] = [item._asdict() for item in self.not_graded]
        return {**data, "verdict": self.verdict, "failures": list(self.failures)}
