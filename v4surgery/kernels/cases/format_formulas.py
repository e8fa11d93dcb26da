"""Formulas of the number formats, for the cases of formats.py.

They decide in float64 by comparing with listed values: the nearest code by midpoints, a scale by
the exponent of a quotient. float64 holds every product and every quotient by a power of two here;
a quotient of two float32 that is rounded to float64 and then to float32 is the quotient rounded
once (53 >= 2 * 24 + 2 bits).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from v4surgery.kernels.reference.hadamard import hadamard as rotate

FLOAT32, UINT8 = torch.float32, torch.uint8
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAGNITUDES = tuple(
    math.ldexp(code & 7 | (8 if code > 7 else 0), max(code >> 3, 1) - 10) for code in range(127)
)


@lru_cache(maxsize=16)
def values_of(fmt: str, device: torch.device) -> Tensor:
    """Values by code, float64."""
    if fmt == "e8m0":
        return torch.tensor([*(2.0 ** (b - 127) for b in range(255)), math.nan], device=device).to(
            torch.float64
        )
    magnitudes = E2M1_MAGNITUDES if fmt == "e2m1" else (*E4M3_MAGNITUDES, math.nan)
    signed = [*magnitudes, *(-v for v in magnitudes)]
    return torch.tensor(signed, dtype=torch.float64, device=device)


def look_up(fmt: str, codes: Tensor) -> Tensor:
    values: Tensor = values_of(fmt, codes.device)[codes.long()]
    return values


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def spread(scale: Tensor, rows: int, cols: int, shape: torch.Size) -> Tensor:
    """Scales of blocks of ``rows`` x ``cols``, float64, for each element of ``shape``."""
    wide = look_up("e8m0", scale) if scale.dtype == UINT8 else scale.double()
    wide = wide.repeat_interleave(rows, -2).repeat_interleave(cols, -1)
    return wide[..., : shape[-2], : shape[-1]]


def decode_fp4(weight: Tensor, scale: Tensor) -> Tensor:
    codes = unpack(weight)
    return (look_up("e2m1", codes) * spread(scale, 1, 32, codes.shape)).float()


def decode_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (look_up("e4m3", weight) * spread(scale, 128, 128, weight.shape)).float()


def nearest(fmt: str, x: Tensor) -> Tensor:
    """Codes of float64 values, to the even one in a tie; beyond the largest the largest."""
    count = 8 if fmt == "e2m1" else 127
    table = values_of(fmt, x.device)[:count]
    middles = (table[:-1] + table[1:]) / 2
    below = torch.bucketize(x.abs(), middles)
    above = torch.bucketize(x.abs(), middles, right=True)
    code = torch.where(below % 2 == 0, below, above)
    code = torch.where(x.isnan(), 127, code)
    return (code + x.signbit() * (8 if fmt == "e2m1" else 128)).to(UINT8)


def exponent_of(quotient: Tensor) -> Tensor:
    """ceil(log2(quotient))."""
    mantissa, exponent = torch.frexp(quotient)
    return exponent - (mantissa == 0.5).int()


def scale_byte(amax: Tensor, limit: float) -> Tensor:
    """Of 2^ceil(log2(amax / limit)), 1 for 0."""
    byte = (exponent_of(amax.double() / limit) + 127).clamp(0, 254)
    return torch.where(amax == 0, 127, byte).to(UINT8)


def finite_magnitudes(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x.abs(), 0.0)


def blocks_of(x: Tensor) -> Tensor:
    """``(..., rows/128, 128, cols/128, 128)``, padded with zeros."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % 128, 0, -x.shape[-2] % 128))
    blocks: Tensor = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    return blocks


def encode_fp8(x: Tensor, scale_dtype: str = "F8_E8M0") -> tuple[Tensor, Tensor]:
    x = x.float()
    amax = finite_magnitudes(blocks_of(x)).amax((-3, -1))
    if scale_dtype == "F8_E8M0":
        scale = scale_byte(amax, 448.0)
    else:
        scale = (amax.double() / 448.0).float()
        scale = torch.where(scale == 0, 1.0, scale)
    return nearest("e4m3", (x.double() / spread(scale, 128, 128, x.shape)).float()), scale


def encode_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.double().unflatten(-1, (-1, 32))
    has_nan = groups.isnan().any(-1)
    scale = scale_byte(finite_magnitudes(groups).amax(-1), 6.0)
    codes = nearest("e2m1", groups / look_up("e8m0", scale)[..., None])
    codes = codes.masked_fill(has_nan[..., None], 0).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale.masked_fill(has_nan, 255)


def convert_fp4(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = decode_fp4(weight, scale)
    codes, block_scale = encode_fp8(values.abs().where(values.isnan(), values))
    decoded = decode_fp8(codes, block_scale)
    changed = (decoded != values) & ~(decoded.isnan() & values.isnan())
    return codes, block_scale, blocks_of(changed.to(UINT8)).sum((-3, -1))


def quantize_groups(x: Tensor, group: int, fmt: str) -> tuple[Tensor, Tensor]:
    """Codes ``(..., G, group)`` of activations, and exponents ``(..., G)``; 128 for NaN."""
    limit, floor = (448.0, 1e-4) if fmt == "e4m3" else (6.0, 6.0 * 2.0**-126)
    padded = nn.functional.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    amax = finite_magnitudes(padded).amax(-1).clamp_min(floor).double()
    reciprocal = torch.tensor(1.0 / limit, dtype=FLOAT32).item()
    exponent = exponent_of((amax * reciprocal).float())
    codes = nearest(fmt, padded.double() / look_up("e8m0", exponent + 127)[..., None])
    is_finite = padded.isfinite().all(-1)
    nan_code = 127 if fmt == "e4m3" else 0
    return codes.masked_fill(~is_finite[..., None], nan_code), exponent.masked_fill(~is_finite, 128)


def round_groups(x: Tensor, group: int, fmt: str) -> Tensor:
    codes, exponent = quantize_groups(x, group, fmt)
    values = (look_up(fmt, codes) * look_up("e8m0", exponent + 127)[..., None]).flatten(-2)
    return values[..., : x.shape[-1]].to(FLOAT32).to(x.dtype)


def quantize_act(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    codes, exponent = quantize_groups(x, group, "e4m3")
    return codes.flatten(-2)[..., : x.shape[-1]], (exponent + 127).to(UINT8)


def round_fp4(x: Tensor) -> Tensor:
    return round_groups(x, 32, "e2m1")


def rotate_fp4(x: Tensor) -> Tensor:
    """The reference rotation sums in the order that hadamard.py promises."""
    return round_fp4(rotate(x))


def dense_rotation(size: int, device: torch.device) -> Tensor:
    """The block-diagonal Hadamard matrix over the root of its block, float64."""
    block = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    blocks: Tensor = torch.block_diag(*[matrix * block**-0.5] * (size // block))
    return blocks.to(device)
