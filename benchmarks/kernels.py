"""How fast the kernels are on shapes of V4-Flash, beside their peers and what the GPU allows.

    python benchmarks/kernels.py --out results.jsonl [--only linear] [--layers]

Measures, in one run on one GPU: the ceilings (a device copy, a bf16 product), every case of real
size, the same work by the peers (cuBLAS in bf16 and FP8, torch's grouped products), and with
--layers one whole layer of each kind in mode official, prefill and decode, beside transformers'
layer in bf16. Weights are random. Prints a table; writes a JSON line for each measurement.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor, nn

from v4surgery.catalogue import QUANTIZED, Catalogue, published_format, stored_tensors
from v4surgery.kernels.check import Ceilings, bench_case, find_cases, measure_ceilings, time_call
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.cache import Cache, LayerCache, Progress
from v4surgery.model.linear import Linear
from v4surgery.model.numerics import Numerics
from v4surgery.model.transformer import Transformer
from v4surgery.presets import PRESETS
from v4surgery.version import __version__

DEVICE = torch.device("cuda")
TOKENS = 4096
KINDS = {"sliding": 0, "CSA": 4, "HCA": 128}
FLASH = PRESETS["flash"].config
LINEARS = {
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "wq_a": (1024, 4096),
    "shared w1": (2048, 4096),
}


@dataclass
class Line:
    """One measurement."""

    what: str
    who: str
    milliseconds: float
    num_bytes: int = 0
    flops: int = 0
    floor_share: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="part of an operation's name")
    parser.add_argument("--layers", action="store_true", help="whole layers, too")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "v4surgery": __version__,
    }
    ceilings = measure_ceilings(DEVICE)
    print(environment)
    print(f"copy {ceilings.bytes_per_second / 1e9:.0f} GB/s, read and write")
    print(f"bf16 {ceilings.flops_per_second / 1e12:.0f} TFLOP/s, 8192^3")
    lines = []
    for line in measurements(options, ceilings):
        line.environment = environment
        lines.append(line)
        print(
            f"{line.what:58} {line.who:22} {line.milliseconds:9.3f} ms  {line.floor_share:4.0%} "
            f"{line.num_bytes / line.milliseconds / 1e6:6.0f} GB/s "
            f"{line.flops / line.milliseconds / 1e9:5.0f} TFLOP/s",
            flush=True,
        )
    if options.out:
        with options.out.open("a") as file:
            for line in [Line("ceilings", "torch", 0.0, environment=environment), *lines]:
                extra = asdict(ceilings) if line.what == "ceilings" else {}
                file.write(json.dumps({**asdict(line), **extra}) + "\n")


def measurements(options: argparse.Namespace, ceilings: Ceilings) -> Iterator[Line]:
    ops = Ops("triton")
    for case in find_cases(options.only, real=True):
        result = bench_case(case, ops, DEVICE, ceilings)
        what = f"{case.op}: {case.label}"
        yield Line(
            what,
            "triton",
            result.milliseconds,
            case.num_bytes,
            case.flops,
            result.floor_share,
        )
        torch.cuda.empty_cache()
    if options.only is None:
        for name, (rows, cols) in LINEARS.items():
            yield from linear_peers(name, options.tokens, rows, cols)
        yield grouped_peer(options.tokens)
    if options.layers:
        for implementation in ("triton", "reference"):
            yield from our_layers(implementation, options.tokens)
        for experts in ("grouped_mm", "eager"):
            yield from transformers_layers(experts, options.tokens)


def linear_peers(name: str, tokens: int, rows: int, cols: int) -> Iterator[Line]:
    """The same product by cuBLAS, in bf16 and in FP8 with a scale for each row."""
    x = torch.randn(tokens, cols, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(rows, cols, device=DEVICE, dtype=torch.bfloat16)
    flops = 2 * tokens * rows * cols
    seconds = time_call(lambda: nn.functional.linear(x, w))
    yield Line(f"{name}, {tokens} tokens", "cuBLAS bf16", seconds * 1e3, flops=flops)
    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    scale_x = torch.ones(tokens, 1, device=DEVICE)
    scale_w = torch.ones(1, rows, device=DEVICE)
    seconds = time_call(
        lambda: torch._scaled_mm(x8, w8.T, scale_x, scale_w, out_dtype=torch.bfloat16)
    )
    yield Line(f"{name}, {tokens} tokens", "cuBLAS FP8 rowwise", seconds * 1e3, flops=flops)


def grouped_peer(tokens: int) -> Line:
    """Both products of all experts by torch's grouped product in bf16, without what is between."""
    experts, per_token = FLASH.n_routed_experts, FLASH.num_experts_per_tok
    hidden, inner, rows = FLASH.hidden_size, FLASH.moe_intermediate_size, tokens * per_token
    x = torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16)
    w13 = torch.randn(experts, hidden, 2 * inner, device=DEVICE, dtype=torch.bfloat16)
    w2 = torch.randn(experts, inner, hidden, device=DEVICE, dtype=torch.bfloat16)
    chosen = torch.randint(experts, (rows,), device=DEVICE)
    offsets = torch.bincount(chosen, minlength=experts).cumsum(0).int()

    def run() -> Tensor:
        both = torch._grouped_mm(x, w13, offs=offsets)
        return torch._grouped_mm(both[:, :inner].contiguous(), w2, offs=offsets)

    flops = 6 * rows * hidden * inner
    return Line(
        f"experts, {tokens} tokens, products only",
        "torch grouped bf16",
        time_call(run) * 1e3,
        flops=flops,
    )


def layer_config() -> Any:
    """Three layers of Flash's widths, one of each kind, routed by score; a small vocabulary."""
    return FLASH.replace(
        num_hidden_layers=len(KINDS),
        num_hash_layers=0,
        num_nextn_predict_layers=0,
        compress_ratios=tuple(KINDS.values()),
        vocab_size=1024,
    )


def random_model(numerics: Numerics) -> Transformer:
    """Our modules with random weights in the published formats, on the GPU."""
    config = layer_config()
    model, catalogue = Transformer(config, numerics), Catalogue(config)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for entry in catalogue.entries():
        fmt = published_format(entry.template, "FP4", "F8_E8M0")
        shape = catalogue.shape(entry)
        path, _, leaf = entry.stem.rpartition(".")
        if entry.template.suffix:
            path, leaf = entry.stem, "weight"
        module = model.get_submodule(path)
        if fmt in QUANTIZED:
            assert isinstance(module, Linear)
            weight, scale = stored_tensors(entry, shape, fmt)
            # Codes without NaN, and scales that keep products near 1.
            codes = torch.randint(0, 120, weight.shape, generator=generator, device=DEVICE)
            module.weight = nn.Parameter(codes.to(torch.uint8), requires_grad=False)
            scales = torch.randint(112, 117, scale.shape, generator=generator, device=DEVICE)
            module.scale = scales.to(torch.uint8)
        else:
            dtype = torch.float32 if fmt == "F32" else torch.bfloat16
            value = torch.randn(shape, generator=generator, device=DEVICE) * 0.02
            setattr(module, leaf, nn.Parameter(value.to(dtype), requires_grad=False))
    return model.to(DEVICE).eval()


def our_layers(implementation: str, tokens: int) -> Iterator[Line]:
    numerics = Numerics("official", torch.bfloat16, Ops(implementation))
    model = random_model(numerics)
    ids = torch.randint(1024, (1, tokens + 1), device=DEVICE)

    def prefill() -> Cache:
        cache = Cache()
        model.run_blocks(ids[:, :tokens], cache)
        return cache

    with torch.no_grad():
        rounds = 10 if implementation == "triton" else 3
        times = timed_layers(model.layers, prefill, rounds)
        for kind, milliseconds in zip(KINDS, times, strict=True):
            yield Line(
                f"layer {kind}, {tokens}-token prefill, official", implementation, milliseconds
            )
        cache = prefill()
        one = timed_layers(model.layers, lambda: model.run_blocks(ids[:, -1:], cache), rounds)
        for kind, milliseconds in zip(KINDS, one, strict=True):
            yield Line(f"layer {kind}, decode at {tokens}, official", implementation, milliseconds)
        if implementation == "triton":
            yield from on_device(model, ids, tokens)


def on_device(model: Transformer, ids: Tensor, tokens: int) -> Iterator[Line]:
    """The same layers replayed from a graph: without the time to launch kernels from Python."""
    streams = torch.randn(1, tokens, 4, FLASH.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    cache = Cache()
    model.run_blocks(ids[:, :tokens], cache)
    assert cache.progress is not None
    start = Progress.start(1, DEVICE).advance(tokens)
    step = cache.progress.advance(1)
    for kind, layer in zip(KINDS, model.layers, strict=True):
        full = cache.layer(layer.prefix)  # type: ignore[arg-type]
        calls = {
            f"{tokens}-token prefill": partial(layer, streams, ids[:, :tokens], start),
            f"decode at {tokens}": partial(layer, streams[:, :1], ids[:, -1:], step),
        }
        for what, call in calls.items():
            kept = LayerCache() if "prefill" in what else full
            run = partial(_with_copy, call, kept)
            read = weight_bytes(layer, 1) if "decode" in what else 0
            yield Line(
                f"layer {kind}, {what}, official", "triton, a graph", time_call(run) * 1e3, read
            )


def _with_copy(call: Callable[[LayerCache], object], cache: LayerCache) -> None:
    call(LayerCache(cache.window, dict(cache.compressors)))


def weight_bytes(layer: nn.Module, tokens: int) -> int:
    """Bytes of a layer's weights that so many tokens touch, each with experts of its own."""
    total = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    experts = list(layer.get_submodule("ffn.experts").children())
    routed = sum(
        t.numel() * t.element_size() for t in (*experts[0].parameters(), *experts[0].buffers())
    )
    return total - routed * (len(experts) - tokens * FLASH.num_experts_per_tok)


def transformers_layers(experts: str, tokens: int) -> Iterator[Line]:
    import transformers

    torch.cuda.empty_cache()
    config = transformers.AutoConfig.for_model(
        "deepseek_v4", **{k: v for k, v in layer_config().to_dict().items() if k != "model_type"}
    )
    del config.quantization_config
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation=experts
        ).eval()
    ids = torch.randint(1024, (1, tokens), device=DEVICE)
    with torch.no_grad():
        body = model.model
        times = timed_layers(body.layers, lambda: body(input_ids=ids, use_cache=True), 5)
    who = f"transformers {transformers.__version__} {experts}"
    for kind, milliseconds in zip(KINDS, times, strict=True):
        yield Line(f"layer {kind}, {tokens}-token prefill, bf16", who, milliseconds)


def timed_layers(layers: nn.ModuleList, run: Callable[[], object], rounds: int) -> list[float]:
    """Median milliseconds on the GPU of each layer, from its first kernel to its last."""
    events: list[tuple[int, Any, Any]] = []

    def before(number: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            events.append((number, begin, end))

        return hook

    def after(*_: object) -> None:
        events[-1][2].record()

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(number)))
        handles.append(layer.register_forward_hook(after))
    for _ in range(3):
        run()
    events.clear()
    for _ in range(rounds):
        run()
    torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    return [
        median(begin.elapsed_time(end) for n, begin, end in events if n == number)
        for number in range(len(layers))
    ]


if __name__ == "__main__":
    main()
