"""RMS norm with a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4surgery.model.numerics import Numerics


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, in float32, rounded once."""

    def __init__(self, size: int, eps: float, numerics: Numerics) -> None:
        super().__init__()
        self.eps, self.numerics = eps, numerics
        self.weight = nn.Parameter(torch.empty(size, dtype=numerics.dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.numerics.ops.rms_norm(x, self.weight, self.eps)
        return y

    def rotated(self, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        """The norm and then RoPE, in one pass where the implementation can."""
        ops = self.numerics.ops
        y: Tensor = ops.norm_rope(x, self.weight, positions, frequencies, self.eps)
        return y
