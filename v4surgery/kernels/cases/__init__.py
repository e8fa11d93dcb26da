"""Cases that the tests, ``v4surgery kernels check`` and the benchmarks share, one file a family.

A case makes the arguments of one operation from a seed and judges the result by a formula of its
own, in float64 where the operation rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[[torch.device, torch.Generator], Arguments]


@dataclass(frozen=True)
class Verdict:
    """How far a result is from what it should be, and how far it may be."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN never passes


@dataclass(frozen=True)
class Case:
    """One operation on arguments of one size.

    Attributes:
        op: Name in :data:`v4surgery.kernels.dispatch.OPERATIONS`.
        label: What the arguments are, in words.
        make: Arguments on a device; the generator lies on that device.
        check: Judges a result, given the arguments.
        num_bytes: The least that must be moved: every input once, every output once.
        flops: Operations that must be done.
        real: Of V4-Flash's size, for a GPU; otherwise small enough to interpret.
    """

    op: str
    label: str
    make: Make
    check: Callable[[Any, tuple[Any, ...], dict[str, Any]], Verdict]
    num_bytes: int = 0
    flops: int = 0
    real: bool = False


def num_different(actual: Tensor, expected: Tensor) -> Verdict:
    """Exact: elements that differ, of which none may; NaN equals NaN, -0 differs from 0."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Verdict(float("inf"), 0.0)
    same = actual == expected
    if actual.is_floating_point():
        same &= actual.signbit() == expected.signbit()
        same |= actual.isnan() & expected.isnan()
    return Verdict(float((~same).sum()), 0.0)


def relative_error(actual: Tensor, expected: Tensor, bound: float) -> Verdict:
    """||actual - expected|| / ||expected||, in float64; absolute where expected is all zero."""
    if actual.shape != expected.shape:
        return Verdict(float("inf"), bound)
    if not actual.numel():
        return Verdict(0.0, bound)
    wide = expected.double()
    norm = wide.norm().item() or 1.0
    return Verdict((actual.double() - wide).norm().item() / norm, bound)
