"""A validation at full width: a replica of V4-Flash's widths beside its streamed parent.

    python benchmarks/validate_full.py --work DIR --device cuda --tokens 2048 [--layers 12]

Makes a synthetic parent of V4-Flash's widths with a few layers, cuts a replica of it by ``mini3b``
with as many layers as the parent can give, and runs grade one on a sample and grade three on one
prompt. Prints one JSON line. With --sparse the parent's large matrices are holes: it takes no disk,
reads as fast, and its experts are zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import time
from pathlib import Path

import torch

import v4surgery
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import StreamOptions
from v4surgery.synth import plan_synthesis, write_synthesis
from v4surgery.validation.report import write_report
from v4surgery.validation.validate import validate_replica
from v4surgery.version import __version__

RECIPE = "mini3b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kept-layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--implementation", default="reference")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 4, 16))
    parser.add_argument("--sample", type=int, default=64, help="chunks of grade one")
    parser.add_argument("--sparse", action="store_true", help="a parent that takes no disk")
    parser.add_argument("--masked", action="store_true", help="grade two as well")
    options = parser.parse_args()
    device = torch.device(options.device)
    parent_path, replica_path = options.work / "parent", options.work / "replica"
    began = time.perf_counter()
    synthesis = plan_synthesis(
        "flash",
        layers=options.layers,
        # Drafters are not compared.
        changes={"num_nextn_predict_layers": 0, "compress_ratios": ratios(options.layers)},
        sparse=options.sparse,
    )
    write_synthesis(synthesis, parent_path, workers=options.workers)
    made = time.perf_counter() - began
    with v4surgery.open(parent_path) as parent:
        began = time.perf_counter()
        plan = v4surgery.plan(parent, RECIPE, replica_layers(options.kept_layers))
        v4surgery.slice(plan, replica_path, workers=options.workers)
        sliced = time.perf_counter() - began
        with v4surgery.open(replica_path) as replica:
            rng = random.Random(0)
            ids = [rng.randrange(replica.config.vocab_size) for _ in range(options.tokens)]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            found = validate_replica(
                replica,
                parent,
                [ids],
                make_numerics=lambda: Numerics(
                    "exact", getattr(torch, options.dtype), Ops(options.implementation)
                ),
                device=device,
                masked=options.masked,
                sample=options.sample,
                workers=options.workers,
                options=StreamOptions(weight_bytes=20_000_000_000, workers=options.workers),
            )
            seconds = time.perf_counter() - began
    write_report(found, options.work / "report")
    assert found.behaviour is not None, found.not_run
    bytes_read = found.behaviour.bytes_read
    layer_seconds = [timing.seconds for timing in found.behaviour.timings]
    result: dict[str, object] = {
        "case": f"validate, {options.tokens} tokens, {options.layers} layers",
        "parent": "synthetic, V4-Flash widths, " + ("sparse" if options.sparse else "dense"),
        "parent_bytes": synthesis.total_bytes,
        "replica": f"{RECIPE}, {options.kept_layers} layers",
        "dtype": options.dtype,
        "implementation": options.implementation,
        "verdict": found.verdict,
        "grade": found.grade,
        "synth_s": round(made, 1),
        "slice_s": round(sliced, 1),
        "validate_s": round(seconds, 2),
        "layers_s": round(sum(layer_seconds), 2),
        "bytes_read": bytes_read,
        "gb_per_s": round(sum(bytes_read.values()) / sum(layer_seconds) / 1e9, 2),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "numbers": found.summary,
        "device": found.setting.device_name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "v4surgery": __version__,
    }
    if device.type == "cuda":
        result["peak_device_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    print(json.dumps(result))


def ratios(count: int) -> list[int]:
    """V4-Flash's compress ratios, of so many layers."""
    return [0, 0, *([4, 128] * count)][:count]


def replica_layers(count: int) -> list[str]:
    """Changes that make the recipe keep so many layers, of the ratios that the parent has."""
    return [f"keep.layers={{count: {count}, by: even, compress_ratios: {ratios(count)}}}"]


if __name__ == "__main__":
    main()
