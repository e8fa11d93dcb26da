"""Cases of hyper-connections, norms, RoPE and compressor pooling, against float64 formulas.

Bounds are for the float32 computation before the one rounding to the dtype of the result:
``excess`` takes half a spacing of that dtype off every error before it compares.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from v4surgery.kernels.cases import Arguments, Case, Make, Verdict, relative_error

EPS = 1e-6
UNIT = 2.0**-24  # float32 rounds by at most this share of a value
BF16, FLOAT32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FLOAT32: "float32"}


def excess(actual: Tensor, exact: Tensor, scale: Tensor, bound: float) -> Verdict:
    """The largest (|actual - exact| - half the spacing of actual's dtype at exact) / scale."""
    if actual.shape != exact.shape:
        return Verdict(float("inf"), bound)
    if not actual.numel():
        return Verdict(0.0, bound)
    half_spacing = torch.ldexp(
        torch.full_like(exact, torch.finfo(actual.dtype).eps / 4), exact.frexp().exponent
    )
    over = ((actual.double() - exact).abs() - half_spacing).clamp_min(0)
    return Verdict((over / scale.clamp_min(1e-30)).max().item(), bound)


def worst(*verdicts: Verdict) -> Verdict:
    """The verdict closest to failing, or one that failed."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return failed[0] if failed else max(verdicts, key=lambda v: v.error / v.bound)


# Norms


def norm_of(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight.double()


# A sum of squares has 2^5 terms in a row and 9 levels above them: 41 roundings, of which the root
# halves the effect; its division and the root are good to 2 units of 2^-23 each, and two products.
NORM_BOUND = (41 / 2 + 4 + 4 + 2) * UNIT


def norm_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight: torch.dtype | None,
    layout: str = "contiguous",
    *,
    real: bool = False,
) -> Case:
    """One rms_norm; ``layout`` says how the rows lie."""

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        draw = partial(torch.randn, generator=generator, device=device)
        if layout == "slice":
            x = draw(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
        elif layout == "transposed":
            x = draw(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
        else:
            x = draw(*shape).to(dtype) * 3
        return (x, None if weight is None else draw(shape[-1]).to(weight), EPS), {}

    def check(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        exact = norm_of(*args)
        return excess(result, exact, exact.abs(), NORM_BOUND)

    size = math.prod(shape) * dtype.itemsize
    label = f"{shape}, {NAMES[dtype]}, " + ("weight" if weight else "no weight")
    label += "" if layout == "contiguous" else f", {layout}"
    return Case("rms_norm", label, make, check, num_bytes=2 * size, real=real)


# RoPE


def rotation_of(x: Tensor, positions: Tensor, frequencies: Tensor, sign: int) -> Tensor:
    """The last dims as complex numbers times e^(i angle); angles are float32 products."""
    angles = (positions.float()[..., None] * frequencies).double() * sign
    turn = torch.polar(torch.ones_like(angles), angles)
    turn = turn.view(*positions.shape, *[1] * (x.dim() - 3), len(frequencies))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned: Tensor = torch.view_as_real(pairs * turn).flatten(-2)
    return turned


# cosf and sinf are good to 2 units of 2^-24; two products, one sum.
ROPE_BOUND = 2 * (2 + 1 + 1) * UNIT


def rope_arguments(
    shape: tuple[int, ...], pairs: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 x, positions up to 2^20, and frequencies from 1 down to 1e-4."""
    x = torch.randn(shape, generator=generator, device=device)
    positions = torch.randint(0, 1 << 20, shape[:2], generator=generator, device=device)
    positions[..., :1] = 0
    return x, positions, 10000.0 ** -(torch.arange(pairs, device=device) / max(pairs, 1))


def pair_lengths(x: Tensor) -> Tensor:
    lengths: Tensor = x.double().unflatten(-1, (-1, 2)).norm(dim=-1)
    return lengths.repeat_interleave(2, -1)


def rope_case(
    shape: tuple[int, ...],
    pairs: int,
    dtype: torch.dtype,
    *,
    inverse: bool = False,
    inplace: bool = False,
    real: bool = False,
) -> Case:
    """One rope."""
    nope = shape[-1] - 2 * pairs

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        x, positions, frequencies = rope_arguments(shape, pairs, device, generator)
        # A copy that a rotation in place leaves alone lies beside x, where check finds it.
        x = torch.stack((x.to(dtype), x.to(dtype)))[0]
        return (x, positions, frequencies), {"inverse": inverse, "inplace": inplace}

    def check(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        x, positions, frequencies = args
        if x._base is None or inplace != (result is x):
            return Verdict(float("inf"), 0.0)
        before = x._base[1]
        if not torch.equal(result[..., :nope], before[..., :nope]):
            return Verdict(float("inf"), 0.0)
        if not inplace and not torch.equal(x, before):
            return Verdict(float("inf"), 0.0)
        exact = rotation_of(before[..., nope:], positions, frequencies, -1 if inverse else 1)
        scale = pair_lengths(before[..., nope:])
        return excess(result[..., nope:], exact, scale, ROPE_BOUND)

    moved = math.prod(shape[:-1]) * (2 * pairs if inplace else shape[-1]) * dtype.itemsize
    label = f"{shape}, {2 * pairs} rotated, {NAMES[dtype]}"
    label += ", inverse" * inverse + ", in place" * inplace
    return Case("rope", label, make, check, num_bytes=2 * moved, real=real)


def norm_rope_case(
    shape: tuple[int, ...],
    pairs: int,
    dtype: torch.dtype,
    *,
    weight: bool = False,
    real: bool = False,
) -> Case:
    """One norm_rope."""
    nope = shape[-1] - 2 * pairs
    # Between the operations a value rounds to the other neighbour, by at most 2^-7 of itself, if
    # it lies within NORM_BOUND of the middle of two: in at most 2 NORM_BOUND / 2^-8 of the cases.
    # Twice that for the rounding of the result.
    flips = 2 * math.sqrt(2 * NORM_BOUND / 2**-8) * 2**-7
    bound = NORM_BOUND + ROPE_BOUND if dtype == FLOAT32 else flips

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        x, positions, frequencies = rope_arguments(shape, pairs, device, generator)
        scale = torch.randn(shape[-1], generator=generator, device=device).to(dtype)
        return ((x * 3).to(dtype), scale if weight else None, positions, frequencies, EPS), {}

    def check(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        x, scale, positions, frequencies, eps = args
        exact = norm_of(x, scale, eps)
        plain = excess(result[..., :nope], exact[..., :nope], exact[..., :nope].abs(), NORM_BOUND)
        turned = rotation_of(exact[..., nope:].to(dtype), positions, frequencies, 1).to(dtype)
        return worst(plain, relative_error(result[..., nope:], turned, bound))

    size = math.prod(shape) * dtype.itemsize
    label = f"{shape}, {2 * pairs} rotated, {NAMES[dtype]}" + ", weight" * weight
    return Case("norm_rope", label, make, check, num_bytes=2 * size, real=real)


# Hyper-connections


def sinkhorn_of(logits: Tensor, iterations: int, eps: float) -> Tensor:
    comb = logits.softmax(-1) + eps
    for axis in (-2, *(-1, -2) * (iterations - 1)):
        comb = comb / (comb.sum(axis, keepdim=True) + eps)
    return comb


def mixes_of(h: Tensor, fn: Tensor, eps: float) -> Tensor:
    return norm_of(h.flatten(-2), None, eps) @ fn.double().T


def mix_bound(width: int) -> float:
    """Relative error of a projection: a tile's 8 truncated steps, and a sum of ``width`` numbers.

    Roundings of a sum go either way: they add up to the root of their number, times 0.6 (spread
    evenly up to UNIT) times 0.7 (a partial sum is shorter than the whole).
    """
    return (8 + 0.42 * math.sqrt(width)) * UNIT


# Exponentials, 2 units of 2^-23 and their argument's rounding, and the sums and quotients after.
WEIGHT_BOUND = 16 * UNIT


def hc_arguments(
    tokens: tuple[int, ...], streams: int, hidden: int, dtype: torch.dtype, *, is_head: bool
) -> Make:
    """What makes the arguments of hc_pre, or of hc_head."""
    num_mixes = streams if is_head else (2 + streams) * streams

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        draw = partial(torch.randn, generator=generator, device=device)
        h = (draw(*tokens, streams, hidden) * 2 + 0.5).to(dtype)
        fn = draw(num_mixes, streams * hidden) / math.sqrt(streams * hidden)
        scale = 0.5 + torch.rand(1 if is_head else 3, generator=generator, device=device)
        options = {"hc_eps": EPS, "norm_eps": EPS} | ({} if is_head else {"iterations": 20})
        return (h, fn, scale, draw(num_mixes)), options

    return make


def collapsed(result: Tensor, h: Tensor, logits: Tensor, hc_eps: float) -> Verdict:
    """Judge x = sum_m pre_m h_m."""
    terms = (torch.sigmoid(logits) + hc_eps)[..., None] * h.double()
    # The largest of millions of normal errors is 6 deviations; scale is at most 1.5.
    bound = 9 * mix_bound(h.shape[-2] * h.shape[-1])
    return excess(result, terms.sum(-2), terms.abs().sum(-2), bound + WEIGHT_BOUND)


def hc_pre_case(
    tokens: tuple[int, ...], streams: int, hidden: int, dtype: torch.dtype, *, real: bool = False
) -> Case:
    """One hc_pre."""

    def check(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verdict:
        (x, post, comb), (h, fn, scale, base) = result, args
        mixes = mixes_of(h, fn, kwargs["norm_eps"])
        parts = (streams, streams, streams * streams)
        logits = [
            mix * factor + offset
            for mix, factor, offset in zip(
                mixes.split(parts, -1), scale.double(), base.double().split(parts), strict=True
            )
        ]
        exact = sinkhorn_of(
            logits[2].unflatten(-1, (streams, streams)), kwargs["iterations"], kwargs["hc_eps"]
        )
        bound = 1.5 * mix_bound(streams * hidden) + WEIGHT_BOUND
        return worst(
            relative_error(post, 2 * torch.sigmoid(logits[1]), bound),
            relative_error(comb, exact, bound),
            collapsed(x, h, logits[0], kwargs["hc_eps"]),
        )

    make = hc_arguments(tokens, streams, hidden, dtype, is_head=False)
    count = math.prod(tokens)
    moved = (streams + 1) * hidden * count * dtype.itemsize + 4 * streams * (1 + streams) * count
    weights = 4 * (2 + streams) * streams * streams * hidden
    label = f"{tokens} tokens, {streams} x {hidden}, {NAMES[dtype]}"
    return Case("hc_pre", label, make, check, num_bytes=moved + weights, real=real)


def hc_head_case(
    tokens: tuple[int, ...], streams: int, hidden: int, dtype: torch.dtype, *, real: bool = False
) -> Case:
    """One hc_head."""

    def check(result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verdict:
        h, fn, scale, base = args
        logits = mixes_of(h, fn, kwargs["norm_eps"]) * scale.double() + base.double()
        return collapsed(result, h, logits, kwargs["hc_eps"])

    make = hc_arguments(tokens, streams, hidden, dtype, is_head=True)
    moved = (streams + 1) * hidden * math.prod(tokens) * dtype.itemsize
    weights = 4 * streams * streams * hidden
    label = f"{tokens} tokens, {streams} x {hidden}, {NAMES[dtype]}"
    return Case("hc_head", label, make, check, num_bytes=moved + weights, real=real)


def hc_post_case(
    tokens: tuple[int, ...], streams: int, hidden: int, dtype: torch.dtype, *, real: bool = False
) -> Case:
    """One hc_post."""

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        draw = partial(torch.randn, generator=generator, device=device)
        y, h = draw(*tokens, hidden).to(dtype), draw(*tokens, streams, hidden).to(dtype)
        return (y, h, draw(*tokens, streams), draw(*tokens, streams, streams)), {}

    def check(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        y, h, post, comb = (tensor.double() for tensor in args)
        exact = post[..., None] * y[..., None, :] + comb.mT @ h
        size = (post[..., None] * y[..., None, :]).abs() + comb.abs().mT @ h.abs()
        # M + 1 products and M sums, each rounded.
        return excess(result, exact, size, (2 * streams + 1) * UNIT)

    count = math.prod(tokens)
    moved = (2 * streams + 1) * hidden * count * dtype.itemsize + 4 * streams * (
        1 + streams
    ) * count
    label = f"{tokens} tokens, {streams} x {hidden}, {NAMES[dtype]}"
    return Case("hc_post", label, make, check, num_bytes=moved, real=real)


# Compressor


def pool_case(
    batch: int, windows: int, ratio: int, head_dim: int, *, overlap: bool, real: bool = False
) -> Case:
    """One compressor_pool; the first window has no tokens where windows overlap."""
    shape = (batch, windows, ratio, head_dim * (1 + overlap))

    def make(device: torch.device, generator: torch.Generator) -> Arguments:
        kv = torch.randn(shape, generator=generator, device=device)
        gate = torch.randn(shape, generator=generator, device=device) * 3
        if overlap:
            gate[:, :1, :, :head_dim] = float("-inf")
        return (kv, gate), {"overlap": overlap}

    def check(result: Tensor, args: tuple[Any, ...], _: dict[str, Any]) -> Verdict:
        kv, gate = (tensor.double() for tensor in args)
        if overlap:
            kv, gate = (
                torch.cat((t[:, :-1, :, :head_dim], t[:, 1:, :, head_dim:]), 2) for t in (kv, gate)
            )
        weights = gate.exp()
        exact = (weights * kv).sum(2) / weights.sum(2)
        # An exponential to 2 units of 2^-23, its argument, products, a quotient; a random sum.
        return relative_error(result, exact, (8 + math.sqrt(gate.shape[2])) * UNIT)

    entries = max(windows - overlap, 0)
    read = 2 * batch * entries * ratio * head_dim * (1 + overlap)
    label = f"{shape}, " + ("overlapping" if overlap else "apart")
    moved = 4 * (read + batch * entries * head_dim)
    return Case("compressor_pool", label, make, check, num_bytes=moved, real=real)


CASES: tuple[Case, ...] = (
    *(
        case(tokens, streams, hidden, dtype)
        for case in (hc_pre_case, hc_post_case, hc_head_case)
        for tokens, streams, hidden, dtype in (
            ((2, 9), 4, 40, BF16),
            ((1, 1), 4, 272, BF16),
            ((5,), 3, 33, FLOAT32),
            ((3,), 8, 24, BF16),
            ((0,), 4, 16, BF16),
        )
    ),
    *(
        case(tokens, 4, 4096, dtype, real=True)
        for case in (hc_pre_case, hc_post_case, hc_head_case)
        for tokens, dtype in (
            ((1, 4096), BF16),
            ((1, 4096), FLOAT32),
            ((64, 1), BF16),
            ((1,), BF16),
        )
    ),
    hc_pre_case((1, 300), 8, 1536, BF16, real=True),
    hc_pre_case((1, 4096), 4, 7168, BF16, real=True),
    norm_case((3, 5, 64), BF16, BF16),
    norm_case((7, 100), FLOAT32, FLOAT32),
    norm_case((1, 1, 1536), BF16, None),
    norm_case((3, 5, 48), BF16, BF16, "slice"),
    norm_case((3, 5, 48), BF16, FLOAT32, "transposed"),
    norm_case((0, 64), BF16, BF16),
    norm_case((1, 4096, 4096), BF16, BF16, real=True),
    norm_case((1, 4096, 1024), BF16, BF16, real=True),
    norm_case((1, 4096, 64, 512), BF16, None, real=True),
    norm_case((2, 300, 16384), FLOAT32, FLOAT32, real=True),
    norm_case((1, 1, 4096), BF16, BF16, real=True),
    rope_case((2, 5, 3, 24), 8, BF16),
    rope_case((2, 5, 16), 8, FLOAT32, inverse=True),
    rope_case((1, 3, 32, 40), 6, BF16, inverse=True, inplace=True),
    rope_case((2, 3, 2, 10), 3, FLOAT32, inplace=True),
    rope_case((1, 0, 2, 10), 3, BF16, inplace=True),
    rope_case((1, 4096, 64, 128), 32, BF16, real=True),
    rope_case((1, 4096, 64, 512), 32, BF16, inverse=True, inplace=True, real=True),
    rope_case((4, 1, 64, 512), 32, BF16, inverse=True, inplace=True, real=True),
    rope_case((1, 4096, 24, 64), 16, FLOAT32, real=True),
    norm_rope_case((2, 5, 3, 24), 8, BF16),
    norm_rope_case((1, 2, 32, 64), 32, BF16),
    norm_rope_case((2, 5, 100), 8, BF16, weight=True),
    norm_rope_case((2, 3, 16), 8, FLOAT32, weight=True),
    norm_rope_case((1, 0, 16), 8, BF16),
    norm_rope_case((1, 4096, 64, 512), 32, BF16, real=True),
    norm_rope_case((1, 4096, 512), 32, BF16, weight=True, real=True),
    norm_rope_case((1, 1024, 128), 32, BF16, weight=True, real=True),
    norm_rope_case((1, 1000, 24, 64), 16, FLOAT32, real=True),
    norm_rope_case((4, 1, 64, 512), 32, BF16, real=True),
    pool_case(2, 3, 4, 20, overlap=True),
    pool_case(1, 2, 4, 300, overlap=True),
    pool_case(2, 2, 7, 33, overlap=False),
    pool_case(1, 1, 4, 8, overlap=True),
    pool_case(1, 0, 5, 8, overlap=False),
    pool_case(1, 1025, 4, 512, overlap=True, real=True),
    pool_case(1, 1025, 4, 128, overlap=True, real=True),
    pool_case(1, 32, 128, 512, overlap=False, real=True),
    pool_case(2, 3, 1000, 64, overlap=False, real=True),
    pool_case(1, 3, 4, 512, overlap=True, real=True),
)
