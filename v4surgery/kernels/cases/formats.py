"""Cases of the number formats: decoding, encoding, and the roundings of activations.

All but the rotation alone are exact: what format_formulas.py gives, element for element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from v4surgery.kernels.cases import Arguments, Case, Verdict, num_different, relative_error
from v4surgery.kernels.cases.format_formulas import (
    convert_fp4,
    decode_fp4,
    decode_fp8,
    dense_rotation,
    encode_fp4,
    encode_fp8,
    quantize_act,
    rotate_fp4,
    round_fp4,
    round_groups,
)

BF16, FLOAT32, UINT8 = torch.bfloat16, torch.float32, torch.uint8
NAMES = {BF16: "bf16", FLOAT32: "float32"}
FLOAT32_MAX = float(torch.finfo(FLOAT32).max)

Draw = Callable[[torch.device, torch.Generator], Tensor]


# Arguments


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Draw:
    def draw(device: torch.device, generator: torch.Generator) -> Tensor:
        return torch.randint(low, high, shape, dtype=UINT8, device=device, generator=generator)

    return draw


def random_values(*shape: int, dtype: torch.dtype, special: bool = False) -> Draw:
    """Normal values; or bit patterns of every exponent, with NaN and infinities."""

    def draw(device: torch.device, generator: torch.Generator) -> Tensor:
        if special:
            bits = torch.randint(-(2**31), 2**31, shape, device=device, generator=generator)
            return bits.to(torch.int32).view(FLOAT32).to(dtype)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    return draw


def every_fp4(device: torch.device, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every byte under every scale byte, 0 and 255 included."""
    byte = torch.arange(256, device=device, dtype=UINT8)
    return byte.repeat(256, 1), byte[:, None].repeat(1, 16)


def every_fp8(device: torch.device, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every code under every scale byte: a block of 2 x 128 for each scale."""
    byte = torch.arange(256, device=device, dtype=UINT8)
    return byte.view(2, 1, 128).repeat(1, 256, 1).flatten(1), byte[None]


def every_fp8_tall(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same as the first two rows of each block of 128, to gather."""
    wide, scale = every_fp8(device, generator)
    weight = torch.zeros(256, 128, 128, device=device, dtype=UINT8)
    weight[:, :2] = wide.view(2, 256, 128).transpose(0, 1)
    return weight.flatten(0, 1), scale.T.contiguous()


def fp4_weights(*shape: int, low: int = 118, high: int = 128) -> Callable[..., Any]:
    def draw(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        weight = random_bytes(*shape[:-1], shape[-1] // 2)
        scale = random_bytes(*shape[:-1], shape[-1] // 32, low=low, high=high)
        return weight(device, generator), scale(device, generator)

    return draw


def fp8_weights(*shape: int, scale_dtype: torch.dtype = UINT8) -> Callable[..., Any]:
    def draw(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        weight = random_bytes(*shape)(device, generator)
        grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        if scale_dtype == UINT8:
            return weight, random_bytes(*grid, low=100, high=128)(device, generator)
        scale = torch.randn(grid, device=device, generator=generator).exp() * 1e-3
        extremes = torch.tensor([0.0, 1e-42, FLOAT32_MAX, math.inf, math.nan], device=device)
        edge = scale.view(-1)[: extremes.numel()]
        edge.copy_(extremes[: edge.numel()])
        return weight, scale

    return draw


def some_index(size: int, count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """In no order, with repeats."""
    return torch.randint(0, size, (count,), device=device, generator=generator)


# Cases


def compared(actual: Any, expected: Any) -> Verdict:
    """Elements that differ, over all results."""
    pairs = (
        zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    )
    return Verdict(sum(num_different(*pair).error for pair in pairs), 0.0)


def sampled(tensor: Tensor) -> Tensor:
    """The first, a middle and the last matrix of a stack: it need not be checked whole."""
    if tensor.ndim < 3:
        return tensor
    last = tensor.shape[0] - 1
    return tensor[sorted({0, last // 2, last})]


def decode_case(
    op: str,
    label: str,
    draw: Callable[..., Any],
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    cols: int | None = None,
    num_bytes: int = 0,
    real: bool = False,
) -> Case:
    """One decoding, with so many gathered rows and columns."""

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        weight, scale = draw(device, generator)
        width = weight.shape[-1] * (2 if op == "dequant_fp4" else 1)
        index = {}
        if rows is not None:
            index["rows"] = some_index(weight.shape[-2], rows, device, generator)
        if draw is every_fp8_tall:
            block = torch.arange(256, device=device)[:, None] * 128
            index["rows"] = (block + torch.arange(2, device=device)).flatten()
        if cols is not None:
            index["cols"] = some_index(width, cols, device, generator)
        return (weight, scale, dtype), index

    def check(result: Any, args: tuple[Any, ...], index: dict[str, Any]) -> Verdict:
        decode = decode_fp4 if op == "dequant_fp4" else decode_fp8
        expected = decode(sampled(args[0]), sampled(args[1])).to(dtype)
        for axis, name in ((-2, "rows"), (-1, "cols")):
            expected = expected.index_select(axis, index[name]) if name in index else expected
        return num_different(sampled(result), expected)

    return Case(op, f"{label}, to {NAMES[dtype]}", make, check, num_bytes, real=real)


def exact_case(
    op: str,
    label: str,
    draw: Callable[..., Any],
    formula: Callable[..., Any],
    *extra: Any,
    num_bytes: int = 0,
    real: bool = False,
    **options: Any,
) -> Case:
    """An operation that must give just what the formula gives of the same arguments."""

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        drawn = draw(device, generator)
        return ((*drawn, *extra) if isinstance(drawn, tuple) else (drawn, *extra)), options

    def check(result: Any, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        is_weight = op.startswith(("quant", "fp4_to"))
        if is_weight:
            result = tuple(map(sampled, result))
            args = tuple(sampled(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return compared(result, formula(*args))

    return Case(op, label, make, check, num_bytes, real=real)


def simulate_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    label: str,
    *,
    group: int = 64,
    num_cols: int | None = None,
    inplace: bool = False,
    special: bool = False,
    real: bool = False,
) -> Case:
    """One act_quant_simulate; in place, what was there before is kept for the check."""
    before: list[Tensor] = []

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        x = random_values(*shape, dtype=dtype, special=special)(device, generator)
        before[:] = [x.clone() if inplace else x]
        return (x, group), {"num_cols": num_cols, "inplace": inplace}

    def check(result: Any, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        x = before[0]
        width = x.shape[-1] if num_cols is None else num_cols
        expected = torch.cat((round_groups(x[..., :width], group, "e4m3"), x[..., width:]), -1)
        untouched = args[0] if inplace else expected
        return compared((result, untouched), (expected, expected))

    size = math.prod(shape) * dtype.itemsize * 2
    return Case("act_quant_simulate", label, make, check, size if real else 0, real=real)


def rotation_case(*shape: int, dtype: torch.dtype, real: bool = False) -> Case:
    """One rotation. Each step rounds sums by 2^-24 at most and keeps the norm but for a factor.

    So do the factor itself and the product with it; then half a unit of the result's dtype.
    """
    steps = (shape[-1] & -shape[-1]).bit_length() - 1
    bound = (steps + 2) * 2.0**-24 + (2.0**-9 if dtype == BF16 else 0.0)
    draw = random_values(*shape, dtype=dtype)

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        return (draw(device, generator),), {}

    def check(result: Any, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        exact = args[0].double() @ dense_rotation(shape[-1], args[0].device)
        return relative_error(result, exact, bound)

    label = f"{' x '.join(map(str, shape))}, {NAMES[dtype]}"
    size = math.prod(shape) * dtype.itemsize * 2
    return Case("hadamard", label, make, check, size if real else 0, real=real)


SMALL_DECODINGS = tuple(
    case
    for dtype in (BF16, FLOAT32)
    for case in (
        decode_case("dequant_fp4", "every code and scale", every_fp4, dtype),
        decode_case("dequant_fp4", "3 x 37 x 96", fp4_weights(3, 37, 96), dtype),
        decode_case("dequant_fp4", "3 x 37 x 96, 5 rows", fp4_weights(3, 37, 96), dtype, rows=5),
        decode_case("dequant_fp4", "37 x 96, 41 columns", fp4_weights(37, 96), dtype, cols=41),
        decode_case(
            "dequant_fp4", "2 x 37 x 64, 9 rows, 11 columns", fp4_weights(2, 37, 64), dtype,
            rows=9, cols=11,
        ),
        decode_case("dequant_fp4", "no rows", fp4_weights(0, 64), dtype),
        decode_case("dequant_fp8", "every code and scale, gathered", every_fp8_tall, dtype),
        decode_case("dequant_fp8", "2 x 150 x 70", fp8_weights(2, 150, 70), dtype),
        decode_case(
            "dequant_fp8", "270 x 150, F32 scales",
            fp8_weights(270, 150, scale_dtype=FLOAT32), dtype,
        ),
        decode_case("dequant_fp8", "2 x 150 x 70, 9 rows", fp8_weights(2, 150, 70), dtype, rows=9),
        decode_case(
            "dequant_fp8", "2 x 20 x 150, 9 columns", fp8_weights(2, 20, 150), dtype, cols=9
        ),
        decode_case(
            "dequant_fp8", "150 x 150, F32 scales, 9 rows, 5 columns",
            fp8_weights(150, 150, scale_dtype=FLOAT32), dtype, rows=9, cols=5,
        ),
        decode_case("dequant_fp8", "1 x 1", fp8_weights(1, 1), dtype),
        decode_case("dequant_fp8", "no columns of 7", fp8_weights(7, 7), dtype, cols=0),
    )
)  # fmt: skip

SMALL_ENCODINGS = tuple(
    case
    for dtype in (BF16, FLOAT32)
    for special in (False, True)
    for name in (NAMES[dtype] + (", every bit pattern" if special else ""),)
    for case in (
        exact_case(
            "quant_fp8", f"130 x 70, {name}",
            random_values(130, 70, dtype=dtype, special=special), encode_fp8,
        ),
        exact_case(
            "quant_fp8", f"2 x 3 x 131, F32, {name}",
            random_values(2, 3, 131, dtype=dtype, special=special), encode_fp8, "F32",
        ),
        exact_case(
            "quant_fp4", f"2 x 67 x 96, {name}",
            random_values(2, 67, 96, dtype=dtype, special=special), encode_fp4,
        ),
        *(
            exact_case(
                "act_quant", f"5 x {width}, groups of {group}, {name}",
                random_values(5, width, dtype=dtype, special=special), quantize_act, group,
            )
            for width, group in ((256, 128), (200, 64), (1, 128))
        ),
        simulate_case((3, 2, 192), dtype, f"3 x 2 x 192, {name}", special=special),
        simulate_case(
            (5, 96), dtype, f"5 x 96, 72 of them, {name}", num_cols=72, special=special
        ),
        simulate_case(
            (5, 96), dtype, f"5 x 96, 64 of them, in place, {name}", num_cols=64, inplace=True,
            special=special,
        ),
        exact_case(
            "fp4_quant_simulate", f"3 x 5 x 96, {name}",
            random_values(3, 5, 96, dtype=dtype, special=special), round_fp4,
        ),
        exact_case(
            "fp4_quant_simulate", f"7 x 48, {name}",
            random_values(7, 48, dtype=dtype, special=special), round_fp4,
        ),
    )
)  # fmt: skip

SMALL_CONVERSIONS = tuple(
    exact_case("fp4_to_fp8", f"{label}", fp4_weights(*shape, low=low, high=high), convert_fp4)
    for label, shape, low, high in (
        ("2 x 130 x 96, scales within 2^6", (2, 130, 96), 120, 127),
        ("130 x 160, scales within 2^20", (130, 160), 110, 131),
        ("3 x 160, every scale", (3, 160), 0, 256),
        ("3 x 32, scales that overflow", (3, 32), 250, 255),
        ("2 x 32, subnormal scales", (2, 32), 0, 2),
    )
)

SMALL_ROTATIONS = tuple(
    case
    for dtype in (BF16, FLOAT32)
    for size in (1, 16, 48, 96, 128)
    for case in (
        rotation_case(3, 2, size, dtype=dtype),
        exact_case(
            "hadamard_fp4", f"3 x 2 x {size}, {NAMES[dtype]}",
            random_values(3, 2, size, dtype=dtype), rotate_fp4,
        ),
    )
)  # fmt: skip

EXPERTS = (256, 2048, 4096)
COUNT = math.prod(EXPERTS)
STACK = (64, 2048, 4096)
REAL = (
    decode_case("dequant_fp8", "every code and scale", every_fp8, BF16, real=True),
    decode_case("dequant_fp8", "every code and scale", every_fp8, FLOAT32, real=True),
    decode_case(
        "dequant_fp4", "experts' w1, 256 x 2048 x 4096", fp4_weights(*EXPERTS), BF16,
        num_bytes=COUNT // 32 * 17 + COUNT * 2, real=True,
    ),
    decode_case(
        "dequant_fp4", "experts' w1, 256 x 2048 x 4096", fp4_weights(*EXPERTS), FLOAT32,
        num_bytes=COUNT // 32 * 17 + COUNT * 4, real=True,
    ),
    decode_case(
        "dequant_fp4", "64 x 2048 x 4096, 768 rows", fp4_weights(*STACK), BF16, rows=768,
        num_bytes=64 * 768 * (4096 // 32 * 17 + 4096 * 2), real=True,
    ),
    decode_case(
        "dequant_fp4", "64 x 2048 x 4096, 1536 columns", fp4_weights(*STACK), BF16, cols=1536,
        num_bytes=64 * 2048 * (1536 // 32 * 17 + 1536 * 2), real=True,
    ),
    decode_case(
        "dequant_fp8", "16 x 8192 x 4096", fp8_weights(16, 8192, 4096), BF16,
        num_bytes=16 * 8192 * 4096 * 3, real=True,
    ),
    decode_case(
        "dequant_fp8", "16 x 8192 x 4096, F32 scales",
        fp8_weights(16, 8192, 4096, scale_dtype=FLOAT32), FLOAT32,
        num_bytes=16 * 8192 * 4096 * 5, real=True,
    ),
    *(
        exact_case(
            "quant_fp8", f"64 x 2048 x 4096, {scale_dtype}, {NAMES[dtype]}",
            random_values(*STACK, dtype=dtype), encode_fp8, scale_dtype,
            num_bytes=math.prod(STACK) * (dtype.itemsize + 1), real=True,
        )
        for scale_dtype, dtype in (("F8_E8M0", BF16), ("F8_E8M0", FLOAT32), ("F32", BF16))
    ),
    *(
        exact_case(
            "quant_fp4", f"64 x 2048 x 4096, {NAMES[dtype]}",
            random_values(*STACK, dtype=dtype), encode_fp4,
            num_bytes=math.prod(STACK) // 32 * (32 * dtype.itemsize + 17), real=True,
        )
        for dtype in (BF16, FLOAT32)
    ),
    exact_case(
        "fp4_to_fp8", "experts' w1, 256 x 2048 x 4096", fp4_weights(*EXPERTS), convert_fp4,
        num_bytes=COUNT // 32 * 49, real=True,
    ),
    *(
        exact_case(
            "act_quant", f"4096 x {width}", random_values(4096, width, dtype=BF16), quantize_act,
            num_bytes=4096 * width // 128 * (128 * 3 + 1), real=True,
        )
        for width in (4096, 8192)
    ),
    simulate_case((4096, 512), BF16, "4096 x 512, 448 of them", num_cols=448, real=True),
    simulate_case(
        (4096, 512), BF16, "4096 x 512, 448 of them, in place", num_cols=448, inplace=True,
        real=True,
    ),
    exact_case(
        "fp4_quant_simulate", "4096 x 64 x 128", random_values(4096, 64, 128, dtype=BF16),
        round_fp4, num_bytes=4096 * 64 * 128 * 4, real=True,
    ),
    rotation_case(4096, 64, 128, dtype=BF16, real=True),
    exact_case(
        "hadamard_fp4", "4096 x 64 x 128", random_values(4096, 64, 128, dtype=BF16), rotate_fp4,
        num_bytes=4096 * 64 * 128 * 4, real=True,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *SMALL_DECODINGS,
    *SMALL_ENCODINGS,
    *SMALL_CONVERSIONS,
    *SMALL_ROTATIONS,
    *REAL,
)
