"""Encode weights: FP8 (E4M3, blocks of 128x128) and FP4 (E2M1, groups of 32), to nearest even.

A scale is 2^ceil(log2(amax / largest code)), amax the largest finite magnitude that shares it, or
amax / 448 as float32; 1 where amax is zero. Infinities saturate. Source: spec/checkpoint.md,
"Number formats".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4surgery.kernels.reference.dequant import (
    E2M1,
    FP4_GROUP,
    FP8_BLOCK,
    dequant_fp4,
    dequant_fp8,
    e8m0_to_float,
)
from v4surgery.kernels.reference.fp4_quant import round_e2m1

E4M3_MAX = 448.0


def _e8m0_bytes(amax: Tensor, limit: float) -> Tensor:
    """Bytes of 2^ceil(log2(amax / limit)), of 1 where amax is 0; too small a scale becomes 0."""
    mantissa, exponent = torch.frexp(amax.double() / limit)
    power = exponent - (mantissa == 0.5).int()
    return torch.where(amax == 0, 127, (power + 127).clamp(0, 254)).to(torch.uint8)


def _finite_magnitudes(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x.abs(), torch.zeros_like(x))


def quant_fp8(x: Tensor, scale_dtype: str = "F8_E8M0") -> tuple[Tensor, Tensor]:
    """Encode FP8.

    Args:
        x: bf16 or float32 ``(R, C)``, or a stack ``(E, R, C)``. NaN becomes a NaN code.
        scale_dtype: ``F8_E8M0``, or ``F32`` as in Base.

    Returns:
        Codes, uint8 of the shape of ``x``; scales, E8M0 bytes as uint8 or float32
        ``(ceil(R/128), ceil(C/128))``, under the stack's axis.
    """
    rows, cols = x.shape[-2:]
    padded = nn.functional.pad(x.float(), (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    amax = _finite_magnitudes(blocks).amax((-3, -1))
    if scale_dtype == "F8_E8M0":
        scale = _e8m0_bytes(amax, E4M3_MAX)
        divisor = e8m0_to_float(scale)
    else:
        divisor = amax / torch.tensor(E4M3_MAX, device=x.device)
        scale = divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    scaled = (blocks / divisor[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2).flatten(-3, -2)
    return codes[..., :rows, :cols].contiguous(), scale


def quant_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode FP4.

    Args:
        x: bf16 or float32 ``(R, C)``, or a stack ``(E, R, C)``; C a multiple of 32.

    Returns:
        Two codes a byte, uint8 ``(R, C/2)``, and E8M0 bytes, uint8 ``(R, C/32)``, under the
        stack's axis. E2M1 has no NaN: a group that holds one gets scale byte 255 and codes 0, so
        that it decodes to NaN.
    """
    groups = x.float().unflatten(-1, (-1, FP4_GROUP))
    has_nan = groups.isnan().any(-1)
    scale = _e8m0_bytes(_finite_magnitudes(groups).amax(-1), E2M1[-1])
    scaled = (groups / e8m0_to_float(scale)[..., None]).clamp(-E2M1[-1], E2M1[-1])
    table = torch.tensor(E2M1, device=x.device)
    rounded = round_e2m1(scaled.masked_fill(has_nan[..., None], 0.0))
    codes = torch.bucketize(rounded.abs(), table).to(torch.uint8) | rounded.signbit() * 8
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).flatten(-2), scale.masked_fill(has_nan, 255)


def fp4_to_fp8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store FP4 as FP8, without loss where the scales of a block lie within 2^14 of each other.

    Args:
        weight: Two E2M1 codes a byte, uint8 ``(R, C/2)``, or a stack ``(E, R, C/2)``.
        scale: E8M0 bytes, uint8 ``(R, C/32)``, under the stack's axis.

    Returns:
        E4M3 codes, uint8 ``(R, C)``; E8M0 bytes, uint8 ``(ceil(R/128), ceil(C/128))``; how many
        values of each block changed, int64 of the same shape. All under the stack's axis.
    """
    values = dequant_fp4(weight, scale)
    codes, block_scale = quant_fp8(values)
    decoded = dequant_fp8(codes, block_scale)
    changed = (decoded != values) & ~(decoded.isnan() & values.isnan())
    rows, cols = values.shape[-2:]
    padded = nn.functional.pad(changed, (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    return codes, block_scale, blocks.sum((-3, -1))
