"""y = x W^T in float32, the input not rounded: gates, compressor projections, head.

Products of bf16 numbers are exact in float32, so that tensor cores serve: cuBLAS multiplies bf16
into float32, and no kernel of ours would do it better. Anything else is multiplied as float32,
with what torch.backends.cuda.matmul allows (nothing less than float32, by default).

Exact: products of bf16. Rounded: sums. Source: spec/forward.md, "Quantization in the official
code".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4surgery.kernels.launch import require_dtype, require_same_device, require_shape


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Linear with a float32 result.

    Args:
        x: bf16 or float32 ``(..., in)``.
        weight: bf16 or float32 ``(out, in)``.

    Returns:
        float32 ``(..., out)``.

    Raises:
        UsageError: A wrong shape, dtype or device.
    """
    device = require_same_device("wide_linear", x, weight)
    require_dtype("wide_linear", "x", x, torch.bfloat16, torch.float32)
    require_dtype("wide_linear", "weight", weight, torch.bfloat16, torch.float32)
    require_shape("wide_linear", "x", x, (*x.shape[:-1], weight.shape[1]))
    is_bf16 = x.dtype == weight.dtype == torch.bfloat16
    if device.type == "cuda" and is_bf16 and x.numel():
        rows = x.reshape(-1, x.shape[-1])
        y = torch.mm(rows, weight.T, out_dtype=torch.float32)
        return y.view(*x.shape[:-1], weight.shape[0])
    return nn.functional.linear(x.float(), weight.float())
