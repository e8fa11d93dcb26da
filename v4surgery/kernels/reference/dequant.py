"""Decode stored weights: FP4 (E2M1 + E8M0) and FP8 (E4M3 + E8M0 or F32 scales of 128x128 blocks).

value = e2m1(code) * 2^(scale - 127), low nibble first; value = e4m3(code) * scale[r/128, c/128].
Exact in float32 and, for E8M0 scales, in bf16. Source: spec/checkpoint.md, "Number formats".
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

FP8_BLOCK = 128
FP4_GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@lru_cache(maxsize=16)
def e2m1_table(device: torch.device) -> Tensor:
    """The 16 values of E2M1 by code, float32 ``(16,)``."""
    return torch.tensor([*E2M1, *(-v for v in E2M1)], device=device)


@lru_cache(maxsize=16)
def e2m1_pairs(device: torch.device) -> Tensor:
    """The two values of a packed byte, low nibble first, float32 ``(256, 2)``."""
    byte = torch.arange(256, device=device)
    table = e2m1_table(device)
    return torch.stack((table[byte & 15], table[byte >> 4]), dim=-1)


@lru_cache(maxsize=16)
def e4m3_table(device: torch.device) -> Tensor:
    """The 256 values of E4M3 by code, float32 ``(256,)``; 0x7f and 0xff are NaN."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        value = float("nan") if code & 127 == 127 else value
        values.append(-value if code & 128 else value)
    return torch.tensor(values, device=device)


def e8m0_to_float(scale: Tensor) -> Tensor:
    """float32 values of E8M0 bytes: 2^(byte - 127); 255 is NaN, 0 is a float32 subnormal."""
    value = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return torch.where(scale == 255, torch.full_like(value, float("nan")), value)


def scale_to_float(scale: Tensor) -> Tensor:
    """float32 of a stored scale: E8M0 bytes as uint8, or float32 as it is."""
    return e8m0_to_float(scale) if scale.dtype == torch.uint8 else scale.float()


def dequant_fp8(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Tensor:
    """Decode FP8.

    Args:
        weight: E4M3 codes, uint8 ``(out, in)``, or a stack ``(E, out, in)``.
        scale: E8M0 bytes or float32, ``(ceil(out/128), ceil(in/128))``, under the stack's axis.
        dtype: float32 or bfloat16.
        rows: Indices of the outputs to keep, int64, in any order; all if None.
        cols: Indices of the inputs to keep, likewise.

    Returns:
        ``(out', in')``, under the stack's axis.
    """
    *stack, num_rows, num_cols = weight.shape
    values = e4m3_table(weight.device).index_select(0, weight.flatten().int())
    pad = (0, -num_cols % FP8_BLOCK, 0, -num_rows % FP8_BLOCK)
    blocks = nn.functional.pad(values.view(weight.shape), pad)
    blocks = blocks.view(*stack, scale.shape[-2], FP8_BLOCK, scale.shape[-1], FP8_BLOCK)
    scaled = blocks.mul_(scale_to_float(scale)[..., :, None, :, None])
    decoded = scaled.flatten(-2).flatten(-3, -2)[..., :num_rows, :num_cols].to(dtype)
    return _gather(decoded, rows, cols)


def dequant_fp4(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Tensor:
    """Decode FP4.

    Args:
        weight: Two E2M1 codes a byte, uint8 ``(out, in/2)``, or a stack ``(E, out, in/2)``; the
            low nibble is the even input.
        scale: E8M0 bytes, uint8 ``(out, in/32)``, under the stack's axis.
        dtype: float32 or bfloat16.
        rows: Indices of the outputs to keep, int64, in any order; all if None.
        cols: Indices of the inputs to keep, likewise.

    Returns:
        ``(out', in')``, under the stack's axis.
    """
    pairs = e2m1_pairs(weight.device).index_select(0, weight.flatten().int())
    groups = pairs.view(*scale.shape, FP4_GROUP)
    decoded = groups.mul_(scale_to_float(scale)[..., None]).flatten(-2).to(dtype)
    return _gather(decoded, rows, cols)


def _gather(decoded: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    if rows is not None:
        decoded = decoded.index_select(-2, rows)
    return decoded if cols is None else decoded.index_select(-1, cols)
