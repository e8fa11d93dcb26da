"""The base of every probe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from v4surgery.importance.names import key_of
from v4surgery.importance.totals import Totals
from v4surgery.model.block import Block
from v4surgery.model.linear import Linear

TOKENS_PER_STEP = 512


class Probe(ABC):
    """Measures one part of a block.

    Args:
        prefix: Of the block.
        totals: Takes the sums of this block.
        model: Takes the sums that all blocks share.
    """

    def __init__(self, prefix: str, totals: Totals, model: Totals) -> None:
        self.prefix, self.totals, self.model = prefix, totals, model

    @abstractmethod
    def attach(self, block: Block) -> list[RemovableHandle]:
        """Hang hooks on the block for one prompt."""

    def key(self, score: str, dim: str) -> str:
        """Key of a score of this block."""
        return key_of(score, dim, self.prefix)


def on_input(module: Any, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Show a module's first input to a function."""

    def hook(_: object, inputs: tuple[Any, ...]) -> None:
        see(inputs[0].detach())

    handle: RemovableHandle = module.register_forward_pre_hook(hook)
    return handle


def on_output(module: Any, see: Callable[[Any], None]) -> RemovableHandle:
    """Show a module's output to a function."""

    def hook(_: object, __: object, output: Any) -> None:
        see(output)

    handle: RemovableHandle = module.register_forward_hook(hook)
    return handle


def tokens_of(x: Tensor) -> Tensor:
    """``(1, S, ...)`` as float32 ``(S, ...)``."""
    return x.detach().flatten(0, 1).float()


def steps_of(x: Tensor) -> Iterator[Tensor]:
    """``(1, S, ...)`` as float32 ``(some tokens, ...)``: for what takes a multiple of it."""
    for part in x.detach().flatten(0, 1).split(TOKENS_PER_STEP):
        yield part.float()


def column_norms(linear: Linear) -> Tensor:
    """Euclidean norm of each column of a weight, float32 ``(in,)``."""
    weight = linear.dense(linear.numerics.dtype).detach().float()
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0)
    return norms


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """An RMS norm without its weight: x * rsqrt(mean(x^2) + eps)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
