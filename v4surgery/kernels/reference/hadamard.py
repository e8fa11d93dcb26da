"""The Hadamard rotation of the indexer's q and k, divided by the root of its size.

For a size that is no power of two it is block-diagonal on the largest power of two that divides
it: any orthogonal matrix keeps the scores. Source: spec/forward.md, "Indexer"; spec/slicing.md,
trap 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.kernels.reference.fp4_quant import fp4_quant_simulate


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last axis, in float32, rounded once.

    Args:
        x: ``(..., Y)``.

    Returns:
        Shape and dtype of ``x``.
    """
    size = x.shape[-1]
    block = size & -size
    rotated = x.float().unflatten(-1, (-1, block))
    half = 1
    while half < block:
        pairs = rotated.unflatten(-1, (-1, 2, half))
        a, b = pairs.select(-2, 0), pairs.select(-2, 1)
        rotated = _interleave(a + b, a - b, block)
        half *= 2
    result: Tensor = (rotated * block**-0.5).flatten(-2).to(x.dtype)
    return result


def hadamard_fp4(x: Tensor) -> Tensor:
    """The rotation, rounded to the dtype of ``x``, then to FP4 and back in groups of 32.

    Args:
        x: ``(..., Y)``.

    Returns:
        Shape and dtype of ``x``.
    """
    return fp4_quant_simulate(hadamard(x))


def _interleave(first: Tensor, second: Tensor, block: int) -> Tensor:
    return torch.stack((first, second), dim=-2).reshape(*first.shape[:-2], block)
