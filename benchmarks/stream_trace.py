"""How fast a streamed forward reads: bytes from storage to the device, beside the raw read rate.

    python benchmarks/stream_trace.py --work DIR --device cuda --tokens 4096 [--layers 6]

Makes a dense synthetic parent of V4-Flash's widths with a few layers, then measures in turn:
reading all of its shards into host memory; loading every block's tensors to the device with as
many threads; and a whole streamed forward, which overlaps loading with computing. From the page
cache, or with --cold from storage. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.numerics import Numerics
from v4surgery.model.ranges import PIECE_BYTES, RangeLoader, tensor_refs
from v4surgery.model.streaming import Streamer, StreamOptions
from v4surgery.synth import plan_synthesis, write_synthesis
from v4surgery.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--implementation", default="triton")
    parser.add_argument(
        "--full", action="store_true", help="all of V4-Flash's layers and experts, sparse"
    )
    parser.add_argument(
        "--cold", action="store_true", help="drop the page cache before each reading (root)"
    )
    options = parser.parse_args()
    changes = {"n_routed_experts": options.experts, "vocab_size": 8192}
    synthesis = (
        plan_synthesis("flash", sparse=True)
        if options.full
        else plan_synthesis("flash", layers=options.layers, changes=changes)
    )
    layers = synthesis.config.num_hidden_layers
    began = time.perf_counter()
    write_synthesis(synthesis, options.work, workers=options.workers)
    made = time.perf_counter() - began
    device = torch.device(options.device)
    with open_checkpoint(options.work) as checkpoint:
        prepare = drop_page_cache if options.cold else synchronize_files
        rounds = 1 if options.full else 2 if options.cold else 3
        if not (options.cold or options.full):
            read_all(checkpoint, options.workers)  # into the page cache
        raws, loads = [], []
        for _ in range(rounds):
            prepare()
            raws.append(read_all(checkpoint, options.workers))
            prepare()
            loads.append(load_blocks(checkpoint, device, options.workers))
        raw = min(raws)
        ids = torch.randint(
            0, 8192, (options.tokens,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        forwards = []
        for _ in range(1 if options.full else 2):
            prepare()
            forwards.append(
                forward(checkpoint, device, ids, options.workers, options.implementation)
            )
        block_bytes = sum(
            stored.nbytes
            for stored in checkpoint.tensors.values()
            if stored.entry.block is not None and not stored.entry.block.is_drafter
        )
        raw_rate = sum(checkpoint.source.size(f) for f in checkpoint.files) / raw / 1e9
        load_rate = block_bytes / min(loads) / 1e9
        best = min(forwards, key=lambda item: item["seconds"])
        print(
            json.dumps(
                {
                    "case": f"streamed forward, {options.tokens} tokens, {layers} layers",
                    "parent": "synthetic, V4-Flash widths, "
                    + ("sparse" if options.full else "dense"),
                    "parent_bytes": synthesis.total_bytes,
                    "synth_s": round(made, 1),
                    "workers": options.workers,
                    "page_cache": "dropped" if options.cold else "warm",
                    "raw_read_gb_per_s": round(raw_rate, 2),
                    "load_gb_per_s": round(load_rate, 2),
                    "load_relative_to_raw": round(load_rate / raw_rate, 3),
                    "forward": best,
                    "device": name_of(device),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "v4surgery": __version__,
                }
            )
        )


def drop_page_cache() -> None:
    """Make the next reading come from storage; needs root on Linux."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def synchronize_files() -> None:
    os.sync()


def read_all(checkpoint: Checkpoint, workers: int) -> float:
    """Seconds to read every shard into reused host buffers."""
    pieces = [
        (file, begin, min(begin + PIECE_BYTES, checkpoint.source.size(file)))
        for file in checkpoint.files
        for begin in range(0, checkpoint.source.size(file), PIECE_BYTES)
    ]
    buffers = [bytearray(PIECE_BYTES) for _ in range(workers)]

    def read(worker: int) -> None:
        view = memoryview(buffers[worker])
        for file, begin, end in pieces[worker::workers]:
            checkpoint.source.read_into(file, begin, view[: end - begin])

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(read, range(workers)))
    return time.perf_counter() - began


def load_blocks(checkpoint: Checkpoint, device: torch.device, workers: int) -> float:
    """Seconds to bring every block's tensors to the device, one block at a time."""
    loader = RangeLoader(checkpoint, device, workers)
    blocks: dict[str, list[object]] = {}
    for stored in checkpoint.tensors.values():
        block = stored.entry.block
        if block is not None and not block.is_drafter:
            blocks.setdefault(block.prefix, []).extend(tensor_refs(stored))
    synchronize(device)
    began = time.perf_counter()
    for refs in blocks.values():
        loader.load(refs)  # type: ignore[arg-type]
    synchronize(device)
    seconds = time.perf_counter() - began
    loader.close()
    return seconds


def forward(
    checkpoint: Checkpoint,
    device: torch.device,
    ids: list[int],
    workers: int,
    implementation: str,
) -> dict[str, object]:
    """A streamed forward in bf16: seconds, of them waiting, bytes, peak device memory."""
    numerics = Numerics("exact", torch.bfloat16, Ops(implementation))
    options = StreamOptions(weight_bytes=20_000_000_000, workers=workers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    with Streamer(checkpoint, numerics, device, options) as streamer:
        (logits,) = streamer.run([ids])
        synchronize(device)
        seconds = time.perf_counter() - began
        assert logits.isfinite().all()
        result: dict[str, object] = {
            "seconds": round(seconds, 3),
            "waited_s": round(streamer.waited, 3),
            "bytes_read": streamer.loader.bytes_read,
            "gb_per_s": round(streamer.loader.bytes_read / seconds / 1e9, 2),
            "layer_s": [round(timing.seconds, 3) for timing in streamer.timings],
        }
    if device.type == "cuda":
        result["peak_device_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()


if __name__ == "__main__":
    main()
