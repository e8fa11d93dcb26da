"""Comparing one activation, and going on with the right one.

An error is that of a whole token: the norm of the difference over the norm of the masked parent's
activation, or over the median token's where that is larger (sums that happen to cancel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4surgery.validation.masked.masks import Coordinates
from v4surgery.validation.masked.report import TapGrade


def token_errors(mine: Tensor, theirs: Tensor) -> Tensor:
    """Relative error of each token, float32 ``(S,)``; activations are ``(S, ...)``."""
    mine, theirs = mine.flatten(1), theirs.flatten(1)
    return relative((mine - theirs).norm(dim=1), mine.norm(dim=1))


def relative(difference: Tensor, size: Tensor) -> Tensor:
    """Norms of differences over norms, where both are 0 the error is 0."""
    scale = size.maximum(size.median())
    return torch.where(difference == 0, torch.zeros_like(difference), difference / scale)


@dataclass
class Grades:
    """Grades of all taps, the worst token of each; prompts come one after the other."""

    tolerance: float
    taps: dict[tuple[str, str], TapGrade] = field(default_factory=dict)

    def add(self, place: str, tap: str, errors: Tensor, prompt: int, *, graded: bool) -> bool:
        """Take a prompt's errors ``(S,)``; whether they count as rounding."""
        if not len(errors):
            return True
        # NaN compares with nothing: as infinity it is the worst error there is.
        errors = errors.nan_to_num(nan=float("inf"), posinf=float("inf"))
        position = int(errors.argmax())
        grade = TapGrade(place, tap, float(errors[position]), prompt, position, graded)
        before = self.taps.get((place, tap))
        if before is None or grade.error > before.error:
            self.taps[place, tap] = grade
        return grade.error <= self.tolerance


@dataclass(frozen=True)
class Settler:
    """Compares the taps of one block on one prompt.

    Attributes:
        grades: Where grades go.
        place: The replica's block.
        prompt: The prompt's number.
        theirs: The replica's activations by tap, ``(S, ...)``.
        ungraded: Taps that cannot be graded.
    """

    grades: Grades
    place: str
    prompt: int
    theirs: Mapping[str, Tensor]
    ungraded: frozenset[str]

    def __call__(self, tap: str, mine: Tensor, coordinates: Coordinates) -> Tensor:
        """The masked parent's activation if it is graded and right, else the replica's."""
        theirs = self.theirs[tap]
        errors = token_errors(coordinates.seen(mine), theirs)
        return mine if self.add(tap, errors) else coordinates.placed(theirs)

    def add(self, tap: str, errors: Tensor) -> bool:
        """Grade a tap by its errors ``(S,)``; whether it is graded and right."""
        graded = tap not in self.ungraded
        is_right = self.grades.add(self.place, tap, errors, self.prompt, graded=graded)
        return is_right and graded
