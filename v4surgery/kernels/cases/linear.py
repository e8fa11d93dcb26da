"""Linears: FP8 in mode official, and those with a float32 result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from v4surgery.kernels.cases import Arguments, Case, Verdict, relative_error
from v4surgery.kernels.launch import has_fp8

# Rounding to bf16 moves a value by up to 2^-8 of it; what float32 sums add is below 1e-5.
BF16_BOUND = 2.0**-8
# Tensor cores that multiply E4M3 align 32 products and the running sum to the largest of them and
# cut what lies 13 bits below (DeepSeek-V3 report, 3.3.2). Four such steps, simulated on normal
# inputs: 1.3e-4 of the norm, and 6.4e-4 where all products have one sign and so every cut has.
FP8_BOUND = BF16_BOUND + 2.0**-10
# No element may be off by more than that and a 16th of the usual size of a result: a wrong tile
# hides in the norm of many, the sums' errors do not come near. On an H100 they were beyond a 64th
# for 325 of wq_b's 134 million elements, in the 58 tokens with the largest products.
ELEMENT_BOUND = 2.0**-4

Make = Callable[[torch.device, torch.Generator], Arguments]


def draw(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, device=g.device)


def draw_weight(g: torch.Generator, num_out: int, num_in: int, scale: torch.dtype) -> Any:
    """Codes of normal numbers, and scales of blocks as Flash (bytes) or Base (float32) has them."""
    codes = (draw(g, num_out, num_in) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = (-(-num_out // 128), -(-num_in // 128))
    exponents = torch.randint(113, 119, shape, generator=g, device=g.device, dtype=torch.uint8)
    if scale == torch.uint8:
        return codes.view(torch.uint8), exponents
    return codes.view(torch.uint8), torch.rand(shape, generator=g, device=g.device) * 1e-3


def make_fp8(
    _: torch.device,
    g: torch.Generator,
    shape: tuple[int, ...],
    num_out: int,
    num_in: int,
    scale: torch.dtype = torch.uint8,
    change: Callable[[Tensor], Any] = lambda x: x,
) -> Arguments:
    """Tokens whose sizes differ by group, and a weight."""
    x = draw(g, *shape, num_in) * torch.exp2(draw(g, *shape, 1) * 2)
    return (change(x.bfloat16()), *draw_weight(g, num_out, num_in, scale)), {}


def make_one_sign(
    _: torch.device, g: torch.Generator, num_rows: int, num_out: int, num_in: int
) -> Arguments:
    """Products that are all positive: a sum that keeps too few bits falls behind."""
    codes, scale = draw_weight(g, num_out, num_in, torch.uint8)
    return (draw(g, num_rows, num_in).abs().bfloat16(), codes & 0x7F, scale), {}


def make_nan(
    device: torch.device, g: torch.Generator, num_rows: int, num_out: int, num_in: int
) -> Arguments:
    """A NaN in the first token, an infinity in the last, a NaN code and a NaN scale."""
    (x, codes, scale), _ = make_fp8(device, g, (num_rows,), num_out, num_in)
    x[0, num_in // 2], x[-1, 0] = float("nan"), float("-inf")
    codes[3, num_in // 2] = 0xFF
    scale[-1, -1] = 255
    return (x, codes, scale), {}


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale bytes of groups of 128, by float64 and torch's own conversion.

    A group that is not finite gets the scale NaN.
    """
    num_in = x.shape[-1]
    wide = torch.nn.functional.pad(x.double(), (0, -num_in % 128)).unflatten(-1, (-1, 128))
    is_finite = wide.isfinite().all(-1)
    wide = wide.masked_fill(~is_finite[..., None], 0)
    mantissa, exponent = torch.frexp(wide.abs().amax(-1).clamp_min(1e-4) / 448)
    exponent = exponent - (mantissa == 0.5).int()
    codes = torch.ldexp(wide, -exponent[..., None]).float().to(torch.float8_e4m3fn)
    scale = torch.where(is_finite, exponent + 127, 255).to(torch.uint8)
    return codes.view(torch.uint8).flatten(-2)[..., :num_in], scale


def decoded(codes: Tensor) -> Tensor:
    """float64 values of E4M3 codes, from their fields."""
    code = torch.arange(256, device=codes.device)
    exponent, mantissa = code >> 3 & 15, (code & 7).double()
    value = torch.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * torch.exp2(exponent - 10.0)
    )
    value[code & 127 == 127] = float("nan")
    return torch.where(code < 128, value, -value)[codes.int()]


def scales(scale: Tensor) -> Tensor:
    """float64 of scale bytes or float32 scales."""
    if scale.dtype == torch.float32:
        return scale.double()
    return torch.where(scale == 255, float("nan"), torch.exp2(scale.double() - 127))


def fp8_formula(x: Any, codes: Tensor, scale: Tensor) -> Tensor:
    """The product of all decoded values, float64."""
    x_codes, x_scale = x if isinstance(x, tuple) else quantized(x)
    num_out, num_in = codes.shape
    x_scale = scales(x_scale).repeat_interleave(128, -1)[..., :num_in]
    scale = scales(scale).repeat_interleave(128, 0)[:num_out]
    weight = decoded(codes) * scale.repeat_interleave(128, 1)[:, :num_in]
    return (decoded(x_codes) * x_scale) @ weight.T


def check_fp8(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
    expected = fp8_formula(*args)
    bound = FP8_BOUND if has_fp8(result.device) else BF16_BOUND
    is_nan = expected.isnan()
    if result.dtype != torch.bfloat16 or not torch.equal(result.isnan(), is_nan):
        return Verdict(float("inf"), bound)
    result, expected = result[~is_nan].double(), expected[~is_nan]
    if result.numel():
        usual = expected.square().mean().sqrt()
        limit = bound * expected.abs() + ELEMENT_BOUND * usual
        if not ((result - expected).abs() <= limit).all():
            return Verdict(float("inf"), bound)
    return relative_error(result, expected, bound)


def fp8_case(
    label: str, num_rows: int, num_out: int, num_in: int, make: Make | None = None, *, real: bool
) -> Case:
    """A case of ``fp8_linear``; ``num_rows`` counts tokens."""
    return Case(
        "fp8_linear",
        label,
        make or partial(make_fp8, shape=(num_rows,), num_out=num_out, num_in=num_in),
        check_fp8,
        num_bytes=num_rows * (num_in + num_out) * 2 + num_out * num_in * (128 * 128 + 1) // 128**2,
        flops=2 * num_rows * num_out * num_in,
        real=real,
    )


def small_fp8_cases() -> list[Case]:
    def case(label: str, rows: tuple[int, ...], num_out: int, num_in: int, **more: Any) -> Case:
        make = partial(make_fp8, shape=rows, num_out=num_out, num_in=num_in, **more)
        return fp8_case(label, torch.Size(rows).numel(), num_out, num_in, make, real=False)

    def special(
        label: str, make: Callable[..., Arguments], num_rows: int, num_out: int, num_in: int
    ) -> Case:
        chosen = partial(make, num_rows=num_rows, num_out=num_out, num_in=num_in)
        return fp8_case(label, num_rows, num_out, num_in, chosen, real=False)

    return [
        case("no token", (0,), 40, 200),
        case("no token of two axes, no output", (2, 0), 0, 16),
        case("one token", (1,), 48, 136),
        case("one token, one input, one output", (1,), 1, 1),
        case("few tokens of three axes, odd sizes", (2, 1, 3), 37, 75),
        case("few tokens, 5 groups, float32 scales", (5,), 140, 600, scale=torch.float32),
        case("few tokens, already quantized", (2, 3), 50, 300, change=quantized),
        case("few tokens, float32", (4,), 20, 130, change=torch.Tensor.float),
        case("few tokens, every second", (9,), 24, 256, change=lambda x: x[::2]),
        case("few tokens, inputs apart", (9,), 24, 160, change=lambda x: x.T.contiguous().T),
        case("17 tokens", (17,), 33, 144),
        case("33 tokens, float32 scales", (33,), 20, 260, scale=torch.float32),
        case("65 tokens, odd sizes", (65,), 131, 75),
        case("130 tokens, two blocks of outputs", (130,), 140, 172),
        case("130 tokens, rows of 16 bytes", (130,), 264, 144),
        case("129 tokens, float32 scales", (129,), 136, 160, scale=torch.float32),
        case("70 tokens, already quantized", (70,), 72, 144, change=quantized),
        case("513 tokens, two blocks of outputs", (513,), 264, 144),
        case("520 tokens, float32 scales", (520,), 136, 272, scale=torch.float32),
        special("few tokens, one sign", make_one_sign, 3, 40, 640),
        special("many tokens, one sign", make_one_sign, 70, 64, 640),
        special("few tokens, NaN", make_nan, 4, 140, 200),
        special("many tokens, NaN", make_nan, 66, 136, 144),
        special("513 tokens, NaN", make_nan, 513, 136, 144),
    ]


def real_fp8_cases() -> list[Case]:
    sizes = {
        "wq_b": (32768, 1024),
        "wo_b": (4096, 8192),
        "wq_a": (1024, 4096),
        "wkv": (512, 4096),
        "shared w1": (2048, 4096),
    }
    cases = [
        fp8_case(f"{name}, {tokens} tokens", tokens, *shape, real=True)
        for name, shape in sizes.items()
        for tokens in (4096, 64, 1)
    ]
    for name in ("wq_b", "wo_b", "wq_a", "shared w1"):
        num_out, num_in = sizes[name]
        make = partial(make_fp8, shape=(4096,), num_out=num_out, num_in=num_in, change=quantized)
        label = f"{name}, 4096 tokens, already quantized"
        cases.append(fp8_case(label, 4096, num_out, num_in, make, real=True))
    one_sign = partial(make_one_sign, num_rows=4096, num_out=4096, num_in=8192)
    base = partial(make_fp8, shape=(4096,), num_out=4096, num_in=8192, scale=torch.float32)
    return [
        *cases,
        fp8_case("wo_b, 4096 tokens, one sign", 4096, 4096, 8192, one_sign, real=True),
        fp8_case("wo_b of Base, 4096 tokens", 4096, 4096, 8192, base, real=True),
        fp8_case("wq_b, 4001 tokens", 4001, 32768, 1024, real=True),
        fp8_case("wq_b, 300 tokens", 300, 32768, 1024, real=True),
        fp8_case("a replica's wo_b, 1000 tokens", 1000, 1544, 1040, real=True),
    ]


# Every one of in / 8 steps of a tensor core may cut 2^-23 of the running sum; errors of random
# sign add like the root of their number. An input rounded to bf16 would show as 2e-3.
def wide_bound(num_in: int) -> float:
    return sqrt(max(num_in, 16)) * 2.0**-22


def make_wide(
    _: torch.device,
    g: torch.Generator,
    shape: tuple[int, ...],
    num_out: int,
    num_in: int,
    x: torch.dtype,
    weight: torch.dtype,
) -> Arguments:
    return (draw(g, *shape, num_in).to(x), draw(g, num_out, num_in).to(weight)), {}


def check_wide(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
    x, weight = args
    bound = wide_bound(weight.shape[1])
    if result.dtype != torch.float32:
        return Verdict(float("inf"), bound)
    return relative_error(result, x.double() @ weight.double().T, bound)


def wide_case(
    label: str,
    shape: tuple[int, ...],
    num_out: int,
    num_in: int,
    x: torch.dtype = torch.bfloat16,
    weight: torch.dtype = torch.bfloat16,
    *,
    real: bool = False,
) -> Case:
    num_rows = torch.Size(shape).numel()
    make = partial(make_wide, shape=shape, num_out=num_out, num_in=num_in, x=x, weight=weight)
    num_bytes = (
        num_rows * num_in * x.itemsize + num_out * num_in * weight.itemsize + num_rows * num_out * 4
    )
    flops = 2 * num_rows * num_out * num_in
    return Case("wide_linear", label, make, check_wide, num_bytes, flops, real)


CASES: tuple[Case, ...] = (
    *small_fp8_cases(),
    *real_fp8_cases(),
    wide_case("no token", (2, 0), 5, 7),
    wide_case("one token", (1,), 24, 33),
    wide_case("bf16", (3, 5), 17, 64),
    wide_case("bf16 and float32", (6,), 17, 40, weight=torch.float32),
    wide_case("float32 and bf16", (6,), 17, 40, x=torch.float32),
    wide_case("float32", (6,), 17, 40, torch.float32, torch.float32),
    wide_case("gate, 4096 tokens", (4096,), 256, 4096, real=True),
    wide_case("compressor's wkv, 4096 tokens", (1, 4096), 1024, 4096, real=True),
    wide_case("head, one token", (1,), 129280, 4096, real=True),
)
