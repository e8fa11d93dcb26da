"""y = x W^T with FP8 activations (groups of 128) and FP8 weights (blocks of 128x128).

Products accumulate in float32, one power-of-two scale a group, and round once to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.kernels.reference.act_quant import act_dequant, act_quant
from v4surgery.kernels.reference.dequant import dequant_fp8


def fp8_linear(x: Tensor | tuple[Tensor, Tensor], weight: Tensor, scale: Tensor) -> Tensor:
    """Linear of the official code.

    Args:
        x: bf16 or float32 ``(..., in)``; or what act_quant makes of it, codes ``(..., in)`` and
            scale bytes ``(..., ceil(in/128))``, which several linears can share.
        weight: E4M3 codes, uint8 ``(out, in)``.
        scale: E8M0 bytes or float32 ``(ceil(out/128), ceil(in/128))``.

    Returns:
        bf16 ``(..., out)``.
    """
    codes, x_scale = x if isinstance(x, tuple) else act_quant(x)
    return (act_dequant(codes, x_scale) @ dequant_fp8(weight, scale).T).to(torch.bfloat16)
