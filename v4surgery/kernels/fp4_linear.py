"""y = x W^T with FP8 activations (groups of 128) and FP4 weights (groups of 32).

The grouped product of one expert that every row goes to. Exact: decoding, and products in bf16 of
an E4M3 code and an E2M1 code, each times a power of two. Rounded: the sum in float32, y once.
Source: spec/forward.md, "Quantization in the official code".
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from v4surgery.kernels.act_quant import act_quant_simulate
from v4surgery.kernels.expert_rows import sort_slots
from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.kernels.grouped_linear import grouped_linear
from v4surgery.kernels.launch import require_dtype, require_same_device, require_shape

FP8_GROUP = 128
LEAST_ROWS, MOST_ROWS = 16, 128


def fp4_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Linear of an expert in the official code.

    Args:
        x: bf16 ``(..., in)``.
        weight: Packed E2M1 codes, uint8 ``(out, in/2)``.
        scale: E8M0 bytes, uint8 ``(out, in/32)``.

    Returns:
        bf16 ``(..., out)``.

    Raises:
        UsageError: A wrong shape, dtype or device.
    """
    require_same_device("fp4_linear", x, weight, scale)
    require_dtype("fp4_linear", "x", x, torch.bfloat16)
    out, inputs = len(weight), x.shape[-1]
    for name, tensor, width in (("weight", weight, inputs // 2), ("scale", scale, inputs // 32)):
        require_dtype("fp4_linear", name, tensor, torch.uint8)
        require_shape("fp4_linear", name, tensor, (out, width))
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    flat = act_quant_simulate(x, FP8_GROUP).view(-1, inputs)
    weights = ExpertWeights([(weight.contiguous(), scale.contiguous())], inputs)
    tile_rows = min(max(triton.next_power_of_2(len(flat)), LEAST_ROWS), MOST_ROWS)
    nowhere_else = torch.zeros(len(flat), 1, dtype=torch.int64, device=x.device)
    rows = sort_slots(nowhere_else, weights.addresses[0], tile_rows)
    grouped_linear(y.view(-1, out), flat, rows, weights)
    return y
