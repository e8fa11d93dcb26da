"""y = x W^T in float32, the input not rounded: gates, compressor projections, head."""

from __future__ import annotations

from torch import Tensor


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Linear with a float32 result.

    Args:
        x: bf16 or float32 ``(..., in)``.
        weight: bf16 or float32 ``(out, in)``.

    Returns:
        float32 ``(..., out)``.
    """
    return x.float() @ weight.float().T
