"""A linear whose weight stays as stored: FP4, FP8, bf16 or float32, decoded when it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4surgery.model.numerics import Numerics


class Linear(nn.Module):
    """y = x W^T without bias; the format follows from what was loaded.

    Attributes:
        weight: bf16 or float32 ``(out, in)``, E4M3 codes uint8 ``(out, in)``, or packed E2M1
            codes uint8 ``(out, in/2)``.
        scale: None, or the stored scales (E8M0 bytes as uint8, or float32).
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, out_features: int, in_features: int, numerics: Numerics) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.numerics = numerics
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=numerics.dtype, device="meta")
        )
        self.register_buffer("scale", None)

    @property
    def is_fp4(self) -> bool:
        return self.scale is not None and self.weight.shape[1] * 2 == self.in_features

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight decoded, ``(out, in)``; exact in float32."""
        if self.scale is None:
            return self.weight.to(dtype)
        ops = self.numerics.ops
        decoded: Tensor = (ops.dequant_fp4 if self.is_fp4 else ops.dequant_fp8)(
            self.weight, self.scale, dtype
        )
        return decoded

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)`` in the dtype of ``x``."""
        if self.scale is not None and self.numerics.is_official:
            ops = self.numerics.ops
            y: Tensor = (ops.fp4_linear if self.is_fp4 else ops.fp8_linear)(
                x, self.weight, self.scale
            )
            return y
        return nn.functional.linear(x, self.dense(x.dtype))

    def wide(self, x: Tensor) -> Tensor:
        """The same in float32, without any rounding of the input: gates, compressors, head."""
        weight = self.weight if self.scale is None else self.dense(torch.float32)
        y: Tensor = self.numerics.ops.wide_linear(x, weight)
        return y
