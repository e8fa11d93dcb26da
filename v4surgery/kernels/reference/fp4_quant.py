"""Round activations to FP4 and back, in groups of 32: what the indexer's q and k go through.

scale = 2^ceil(log2(amax / 6)); value = e2m1(x / scale) * scale, to nearest even. A group that holds
NaN or infinity becomes NaN. Source: spec/forward.md, "Quantization in the official code".
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.kernels.reference.act_quant import ceil_exponent

E2M1_MAX = 6.0
AMAX_FLOOR = E2M1_MAX * 2.0**-126


def fp4_quant_simulate(x: Tensor, group: int = 32) -> Tensor:
    """Round to FP4 and back.

    Args:
        x: bf16 or float32 ``(..., K)``; a last group may be partial.
        group: Values that share a scale, a power of two.

    Returns:
        The rounded values, shape and dtype of ``x``.
    """
    width = x.shape[-1]
    grouped = torch.nn.functional.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    is_finite = grouped.isfinite().all(-1, keepdim=True)
    grouped = grouped.masked_fill(~is_finite, 0.0)
    amax = grouped.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR)
    exponent = ceil_exponent(amax * (1.0 / E2M1_MAX))
    scaled = torch.ldexp(grouped, -exponent).clamp(-E2M1_MAX, E2M1_MAX)
    rounded = torch.ldexp(round_e2m1(scaled), exponent).masked_fill(~is_finite, float("nan"))
    return rounded.flatten(-2)[..., :width].to(x.dtype)


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to the even code: steps of 1/2 to 2, of 1 to 4, of 2 to 6."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)
