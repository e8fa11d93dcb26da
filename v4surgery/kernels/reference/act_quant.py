"""Quantize activations to FP8, for each token and group of inputs.

scale = 2^ceil(log2(max(amax, 1e-4) / 448)); code = e4m3(x / scale), to nearest even, saturated.
A group that holds NaN or infinity becomes all NaN: codes 0x7f, scale byte 255.
Source: spec/forward.md, "Quantization in the official code".
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.kernels.reference.dequant import e4m3_table, e8m0_to_float

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def ceil_exponent(x: Tensor) -> Tensor:
    """ceil(log2(x)) of positive float32, exactly, int32."""
    mantissa, exponent = torch.frexp(x)
    return exponent - (mantissa == 0.5).int()


def act_quant(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Quantize the last axis in groups.

    Args:
        x: bf16 or float32 ``(..., K)``; a last group may be partial.
        group: Inputs that share a scale, a power of two.

    Returns:
        E4M3 codes, uint8 ``(..., K)``; E8M0 scale bytes, uint8 ``(..., ceil(K/group))``.
    """
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    is_finite = padded.isfinite().all(-1)
    padded = padded.masked_fill(~is_finite[..., None], 0.0)
    amax = padded.abs().amax(-1).clamp_min(AMAX_FLOOR)
    exponent = ceil_exponent(amax * (1.0 / E4M3_MAX))
    scaled = torch.ldexp(padded, -exponent[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(~is_finite[..., None], 0x7F).flatten(-2)[..., :width]
    return codes, (exponent + 127).to(torch.uint8).masked_fill(~is_finite, 255)


def act_dequant(codes: Tensor, scale: Tensor, group: int = 128) -> Tensor:
    """float32 values of act_quant's output, ``(..., K)``."""
    spread = e8m0_to_float(scale).repeat_interleave(group, -1)[..., : codes.shape[-1]]
    return e4m3_table(codes.device)[codes.int()] * spread


def act_quant_simulate(
    x: Tensor, group: int = 64, *, num_cols: int | None = None, inplace: bool = False
) -> Tensor:
    """Round to FP8 and back.

    Args:
        x: bf16 or float32 ``(..., K)``.
        group: Inputs that share a scale, a power of two.
        num_cols: Round the first so many of the last axis and pass the rest on; all if None.
        inplace: Write into ``x`` and return it.

    Returns:
        The rounded values, shape and dtype of ``x``.
    """
    width = x.shape[-1] if num_cols is None else num_cols
    codes, scale = act_quant(x[..., :width], group)
    rounded = act_dequant(codes, scale, group).to(x.dtype)
    if inplace:
        x[..., :width] = rounded
        return x
    return torch.cat((rounded, x[..., width:]), -1)
