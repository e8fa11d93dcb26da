"""Cases of the experts: routing, grouped products, SwiGLU, the sum, and one FP4 linear.

Rounding to bf16 moves a value by up to 2^-8 of itself, 1.66e-3 in the root mean square over all
mantissas. What stands before it differs from float64 by float32 sums, about 1e-6, which crosses the
boundary of a bf16 step (2^-8) for 3e-4 of g, u and h; one in 2^-4 / 2^-8 of those crosses one of
E4M3 (2^-4): sqrt(3 * 3e-4 / 16) * 2^-4 < 5e-4 in the norm. Errors are independent:
sqrt(1.66^2 + 0.5^2) = 1.73e-3, and AFTER_BF16 leaves small samples three quarters more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from v4surgery.kernels.cases import Arguments, Case, Verdict, num_different, relative_error
from v4surgery.kernels.expert_weights import ExpertWeights, Stored

AFTER_BF16 = 3e-3
# Two float32 sums of at most 4,096 terms, 64 * 2^-24 each, and an exponential of a few steps.
AFTER_FLOAT32 = 2e-5
LIMIT = 10.0
UNTOUCHED = 77.0


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer's experts: T, E, K, D, F, the weight format, and how it computes."""

    tokens: int
    experts: int
    per_token: int
    hidden: int
    inner: int
    format: str = "fp4"
    official: bool = True
    dtype: torch.dtype = torch.bfloat16
    routing: str = "even"
    absent: tuple[int, ...] = ()

    @property
    def matrix_bytes(self) -> float:
        per_weight = {"fp4": 0.5 + 1 / 32, "fp8": 1, "fp8_f32": 1, "bf16": 2, "float32": 4}
        return self.hidden * self.inner * per_weight[self.format]


def random_matrix(
    format_: str, count: int, out: int, inputs: int, device: torch.device, g: torch.Generator
) -> list[Stored]:
    """Matrices of a format whose products keep the size of their inputs, about."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        shape = (count, *shape)
        return torch.randint(low, high, shape, generator=g, device=device, dtype=torch.uint8)

    size = int(torch.tensor(inputs).log2().item()) // 2
    if format_ == "fp4":
        scale = draw(124 - size, 127 - size, out, inputs // 32)
        return list(zip(draw(0, 256, out, inputs // 2), scale, strict=True))
    if format_.startswith("fp8"):
        codes = draw(0, 256, out, inputs)
        codes = torch.where(codes & 127 == 127, codes - 1, codes)
        scale = draw(119 - size, 122 - size, -(-out // 128), -(-inputs // 128))
        if format_ == "fp8_f32":
            scale = decode_e8m0(scale).float() * 1.2345
        return list(zip(codes, scale, strict=True))
    dense = torch.randn(count, out, inputs, generator=g, device=device) * inputs**-0.5
    dense = dense.bfloat16() if format_ == "bf16" else dense
    return [(weight, None) for weight in dense]


def random_routing(layer: Layer, device: torch.device, g: torch.Generator) -> Tensor:
    """Chosen experts, all different for a token; ``one`` sends every token to the same."""
    if layer.routing == "one":
        first = torch.arange(layer.per_token, device=device) % layer.experts
        return first.expand(layer.tokens, -1).contiguous()
    noise = torch.rand(layer.tokens, layer.experts, generator=g, device=device)
    return noise.argsort(dim=-1)[:, : layer.per_token].contiguous()


def make_experts(layer: Layer, device: torch.device, g: torch.Generator) -> Arguments:
    x = torch.randn(layer.tokens, layer.hidden, generator=g, device=device) * 2
    indices = random_routing(layer, device, g)
    weights = torch.rand(indices.shape, generator=g, device=device)
    matrices = []
    for out, inputs in (
        (layer.inner, layer.hidden),
        (layer.hidden, layer.inner),
        (layer.inner, layer.hidden),
    ):
        stored = random_matrix(layer.format, layer.experts, out, inputs, device, g)
        kept = [None if e in layer.absent else matrix for e, matrix in enumerate(stored)]
        matrices.append(ExpertWeights(kept, inputs))
    kwargs: dict[str, Any] = {"limit": LIMIT, "official": layer.official}
    if layer.absent:
        shape = (*indices.shape, layer.hidden)
        kwargs["out"] = torch.full(shape, UNTOUCHED, dtype=layer.dtype, device=device)
    return (x.to(layer.dtype), indices, weights, *matrices), kwargs


def decode_e2m1(codes: Tensor) -> Tensor:
    """float64 of packed codes, the low nibble first."""
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    exponent, mantissa = nibbles >> 1 & 3, (nibbles & 1).double() / 2
    value = torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1).double())
    return torch.where(nibbles >= 8, -value, value)


def decode_e4m3(codes: Tensor) -> Tensor:
    exponent, mantissa = codes.long() >> 3 & 15, (codes & 7).double() / 8
    value = torch.where(
        exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7).double()
    )
    return torch.where(codes >= 128, -value, value)


def decode_e8m0(scale: Tensor) -> Tensor:
    return torch.exp2(scale.double() - 127)


def dense64(matrix: Stored, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix as float64 ``(out, in)``; one without scale is rounded to the dtype of x first."""
    weight, scale = matrix
    if scale is None:
        return weight.to(dtype).double()
    factor = decode_e8m0(scale) if scale.dtype == torch.uint8 else scale.double()
    if 2 * weight.shape[1] == inputs:
        return decode_e2m1(weight) * factor.repeat_interleave(32, 1)
    spread = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)
    values: Tensor = decode_e4m3(weight) * spread[: weight.shape[0], :inputs]
    return values


def round_to_fp8(x: Tensor) -> Tensor:
    """Groups of 128 through E4M3 with the smallest power of two that fits, float64."""
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -width % 128)).unflatten(-1, (-1, 128))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)
    scale = 2.0 ** (exponent - (mantissa == 0.5).int()).double()
    rounded: Tensor = (groups / scale).float().to(torch.float8_e4m3fn).double() * scale
    return rounded.flatten(-2)[..., :width]


def swiglu64(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return gate / (1 + torch.exp(-gate)) * up.clamp(-limit, limit)


def check_experts(layer: Layer, result: Tensor, args: Any, kwargs: Any) -> Verdict:
    x, indices, weights, w1, w2, w3 = args
    is_rounded = layer.official and layer.format.startswith("fp")
    simulate = round_to_fp8 if is_rounded else torch.Tensor.double
    expected = torch.zeros(*indices.shape, layer.hidden, device=x.device, dtype=torch.float64)
    for expert in range(layer.experts):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        if expert in layer.absent:
            expected[token, slot] = torch.nan
        elif len(token):
            inputs = simulate(x[token].double())
            gate, up = (
                (inputs @ dense64(w.matrices[expert], layer.hidden, x.dtype).T).to(x.dtype).double()
                for w in (w1, w3)
            )
            hidden = swiglu64(gate, up, LIMIT) * weights[token, slot, None].double()
            hidden = simulate(hidden.to(x.dtype).double())
            down = dense64(w2.matrices[expert], layer.inner, x.dtype)
            expected[token, slot] = hidden @ down.T
    if result.dtype != layer.dtype or ("out" in kwargs and result is not kwargs["out"]):
        return Verdict(float("inf"), 0.0)
    is_absent = expected.isnan()
    if (result[is_absent] != UNTOUCHED).any():
        return Verdict(float("inf"), 0.0)
    bound = AFTER_BF16 if layer.dtype == torch.bfloat16 else AFTER_FLOAT32
    return relative_error(result[~is_absent], expected[~is_absent], bound)


def experts_case(label: str, layer: Layer, *, real: bool = False) -> Case:
    touched = layer.experts * (1 - (1 - layer.per_token / layer.experts) ** layer.tokens)
    rows = layer.tokens * layer.per_token
    return Case(
        "experts",
        label,
        partial(make_experts, layer),
        partial(check_experts, layer),
        num_bytes=int(3 * touched * layer.matrix_bytes) + 2 * layer.hidden * (layer.tokens + rows),
        flops=6 * rows * layer.hidden * layer.inner,
        real=real,
    )


def make_combine(
    tokens: int, per_token: int, hidden: int, dtype: torch.dtype, device: torch.device, g: Any
) -> Arguments:
    slots = torch.randn(tokens, per_token, hidden, generator=g, device=device).to(dtype)
    indices = torch.randint(0, 9, (tokens, per_token), generator=g, device=device)
    shared = torch.randn(tokens, hidden, generator=g, device=device).to(dtype)
    return (slots, indices, shared), {}


def check_combine(result: Tensor, args: Any, _: Any) -> Verdict:
    """Bit for bit: float32 sums in the order of the experts, of the slots where they are equal."""
    slots, indices, shared = args
    expected = shared.float()
    for expert in range(9):
        for slot in range(indices.shape[1]):
            is_next = (indices[:, slot] == expert)[:, None]
            expected = torch.where(is_next, expected + slots[:, slot].float(), expected)
    return num_different(result, expected.to(shared.dtype))


def combine_case(
    label: str,
    tokens: int,
    per_token: int,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    real: bool = False,
) -> Case:
    num_bytes = tokens * hidden * (per_token + 2) * dtype.itemsize
    make = partial(make_combine, tokens, per_token, hidden, dtype)
    return Case("combine_experts", label, make, check_combine, num_bytes=num_bytes, real=real)


def make_swiglu(
    rows: int, cols: int, dtype: torch.dtype, has_weight: bool, device: torch.device, g: Any
) -> Arguments:
    gate, up = (torch.randn(rows, cols, generator=g, device=device) * 8 for _ in range(2))
    weight = torch.rand(rows, 1, generator=g, device=device) if has_weight else None
    return (gate.to(dtype), up.to(dtype), LIMIT, weight), {}


def check_swiglu(result: Tensor, args: Any, _: Any) -> Verdict:
    gate, up, limit, weight = args
    expected = swiglu64(gate.double(), up.double(), limit)
    expected = expected if weight is None else expected * weight.double()
    bound = AFTER_BF16 if gate.dtype == torch.bfloat16 else 1e-6
    return (
        Verdict(float("inf"), bound)
        if result.dtype != gate.dtype
        else relative_error(result, expected, bound)
    )


def swiglu_case(
    label: str,
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_weight: bool = True,
    real: bool = False,
) -> Case:
    make = partial(make_swiglu, rows, cols, dtype, has_weight)
    num_bytes = 3 * rows * cols * dtype.itemsize
    return Case("swiglu", label, make, check_swiglu, num_bytes=num_bytes, real=real)


@dataclass(frozen=True)
class Routing:
    """A call of route; ``kind`` is score, bias or hash."""

    tokens: int
    experts: int
    topk: int
    kind: str = "bias"
    scoring_func: str = "sqrtsoftplus"
    normalise: bool = True


def make_route(routing: Routing, device: torch.device, g: torch.Generator) -> Arguments:
    shape = (routing.tokens, routing.experts)
    logits = torch.randn(shape, generator=g, device=device) * 4
    bias = torch.randn(routing.experts, generator=g, device=device) * 0.3
    noise = torch.rand(shape, generator=g, device=device)
    chosen = noise.argsort(dim=-1)[:, : routing.topk].contiguous()
    kwargs = {
        "topk": routing.topk,
        "scoring_func": routing.scoring_func,
        "normalise": routing.normalise,
        "scaling": 1.5,
    }
    has_bias, has_chosen = routing.kind == "bias", routing.kind == "hash"
    return (logits, bias if has_bias else None, chosen if has_chosen else None), kwargs


def check_route(routing: Routing, result: Any, args: Any, _: Any) -> Verdict:
    """Weights of what was chosen, and by how much a better expert was left out."""
    logits, bias, chosen = args
    indices, weights = result
    wide = logits.double()
    if routing.scoring_func == "sqrtsoftplus":
        scores = (wide.clamp_min(0) + torch.log1p(torch.exp(-wide.abs()))).sqrt()
    elif routing.scoring_func == "softmax":
        scores = wide.softmax(-1)
    else:
        scores = 1 / (1 + torch.exp(-wide))
    if indices.shape != (routing.tokens, routing.topk) or not routing.tokens:
        return Verdict(0.0 if not routing.tokens else float("inf"), 0.0)
    in_order = indices.sort(-1).values
    if (in_order.diff(dim=-1) == 0).any() or indices.min() < 0 or indices.max() >= routing.experts:
        return Verdict(float("inf"), 0.0)
    missed = 0.0
    if chosen is None:
        steered = scores if bias is None else scores + bias.double()
        worst = steered.gather(1, indices).amin(1)
        best = steered.scatter(1, indices, -torch.inf).amax(1)
        missed = max((best - worst).max().item(), 0.0)
    elif not torch.equal(indices, chosen):
        return Verdict(float("inf"), 0.0)
    expected = scores.gather(1, indices)
    if routing.normalise and routing.scoring_func != "softmax":
        expected = expected / expected.sum(-1, keepdim=True)
    relative = ((weights.double() - expected * 1.5) / (expected * 1.5)).abs().max().item()
    # e^x of |x| up to 24 is off by |x| 2^-24 and a few steps more; scores lie below 8.
    return Verdict(max(relative, missed), 4e-6)


def route_case(label: str, routing: Routing, *, real: bool = False) -> Case:
    num_bytes = routing.tokens * (4 * routing.experts + 12 * routing.topk)
    make, check = partial(make_route, routing), partial(check_route, routing)
    return Case("route", label, make, check, num_bytes=num_bytes, real=real)


def make_linear(
    tokens: int, out: int, inputs: int, device: torch.device, g: torch.Generator
) -> Arguments:
    x = torch.randn(tokens, inputs, generator=g, device=device).bfloat16()
    return (x, *random_matrix("fp4", 1, out, inputs, device, g)[0]), {}


def check_linear(result: Tensor, args: Any, _: Any) -> Verdict:
    x, weight, scale = args
    expected = round_to_fp8(x.double()) @ dense64((weight, scale), x.shape[-1]).T
    return relative_error(result, expected, AFTER_BF16)


def linear_case(label: str, tokens: int, out: int, inputs: int, *, real: bool = False) -> Case:
    num_bytes = out * inputs * 17 // 32 + 2 * tokens * (out + inputs)
    make = partial(make_linear, tokens, out, inputs)
    flops = 2 * tokens * out * inputs
    return Case("fp4_linear", label, make, check_linear, num_bytes, flops, real)


FLASH = Layer(4096, 256, 6, 4096, 2048)
FLOAT32 = torch.float32
CASES: tuple[Case, ...] = (
    experts_case("FP4, official, whole blocks of 128", Layer(5, 2, 1, 256, 128)),
    experts_case("FP4, exact, whole blocks of 128", Layer(3, 2, 1, 128, 128, official=False)),
    experts_case("FP4, official, blocks cut off", Layer(7, 3, 2, 96, 160)),
    experts_case("FP4, float32", Layer(3, 3, 2, 64, 32, official=False, dtype=FLOAT32)),
    experts_case("FP8, official, blocks cut off", Layer(5, 2, 1, 136, 40, "fp8")),
    experts_case("FP8, float32 scales", Layer(5, 3, 2, 40, 136, "fp8_f32", official=False)),
    experts_case("FP8, float32 scales, official", Layer(5, 2, 1, 128, 64, "fp8_f32")),
    experts_case("bf16, odd sizes", Layer(6, 3, 2, 100, 35, "bf16", official=False)),
    experts_case("bf16 weights, float32", Layer(2, 2, 1, 33, 17, "bf16", False, FLOAT32)),
    experts_case("float32 weights, bf16", Layer(4, 2, 2, 40, 24, "float32", official=False)),
    experts_case("all tokens to one expert", Layer(40, 2, 1, 64, 32, routing="one")),
    experts_case("some experts are elsewhere", Layer(9, 4, 2, 64, 32, absent=(0, 2))),
    experts_case("one token", Layer(1, 4, 3, 64, 32)),
    experts_case("no tokens", Layer(0, 4, 2, 64, 64)),
    experts_case("one expert", Layer(3, 1, 1, 64, 64)),
    experts_case("Flash, 4,096 tokens", FLASH, real=True),
    experts_case("Flash, 64 tokens", Layer(64, 256, 6, 4096, 2048), real=True),
    experts_case("Flash, 1 token", Layer(1, 256, 6, 4096, 2048), real=True),
    experts_case("Flash, exact", Layer(1500, 256, 6, 4096, 2048, official=False), real=True),
    experts_case("Flash, one expert", Layer(300, 256, 2, 4096, 2048, routing="one"), real=True),
    experts_case("Flash-Base, FP8", Layer(300, 64, 6, 4096, 2048, "fp8_f32"), real=True),
    experts_case("Pro, 384 experts, top 8", Layer(700, 384, 8, 7168, 384), real=True),
    experts_case("a replica, FP4", Layer(900, 24, 4, 1536, 768), real=True),
    experts_case("a replica, bf16", Layer(900, 24, 4, 1536, 768, "bf16", False), real=True),
    combine_case("8 slots, odd width", 7, 8, 33),
    combine_case("one slot", 3, 1, 64),
    combine_case("float32", 4, 3, 40, torch.float32),
    combine_case("no tokens", 0, 6, 64),
    combine_case("Flash, 4,096 tokens", 4096, 6, 4096, real=True),
    swiglu_case("odd width", 5, 77),
    swiglu_case("shared expert, float32", 3, 64, torch.float32, has_weight=False),
    swiglu_case("no rows", 0, 64),
    swiglu_case("Flash, shared expert, 4,096 tokens", 4096, 2048, has_weight=False, real=True),
    route_case("scores and bias", Routing(9, 24, 4)),
    route_case("hash table", Routing(6, 16, 3, "hash")),
    route_case("sigmoid, not normalised", Routing(4, 12, 2, "score", "sigmoid", False)),
    route_case("softmax", Routing(5, 10, 3, "bias", "softmax")),
    route_case("all experts chosen", Routing(3, 8, 8, "score")),
    route_case("one expert", Routing(2, 1, 1)),
    route_case("384 experts, top 8", Routing(5, 384, 8)),
    route_case("no tokens", Routing(0, 16, 3)),
    route_case("Flash, 4,096 tokens", Routing(4096, 256, 6), real=True),
    route_case("Flash, hash layer", Routing(4096, 256, 6, "hash"), real=True),
    linear_case("odd sizes", 5, 70, 96),
    linear_case("one token", 1, 64, 128),
    linear_case("no tokens", 0, 64, 128),
    linear_case("Flash w1, 96 tokens", 96, 2048, 4096, real=True),
    linear_case("Flash w2, 1,000 tokens", 1000, 4096, 2048, real=True),
)
