"""Seeded random tensors for the tests of the operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Normal = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def normal() -> Normal:
    """Normal float32 values of a shape, the same in every run of a test."""
    generator = torch.Generator().manual_seed(20)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    return draw


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of NaN.

    Operations that give integers, or NaN by right, poison with a value of their own.
    """
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan)
    )
