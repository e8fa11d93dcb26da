"""How a forward speeds up over GPUs of one machine, beside what the model of it expects.

    python benchmarks/distributed.py --ranks 2 --work DIR --layers 4 [--one-gpu]

Makes a dense synthetic parent of V4-Flash's widths with a few layers, then runs 1 rank and --ranks
through torchrun, each on a GPU of its own. With --one-gpu they share the first GPU: what is read
by several ranks at a time is then as fast as elsewhere, computing is not, and NCCL, which takes
them for ranks of several machines, exchanges through sockets. On --device cpu they share the cores,
each with its part of the threads. For each way of reading (page cache dropped, warm, and warm
with one reading thread a rank): every layer to the devices and nothing else, and the streamed
forward. Then the forward with all layers resident. Logits and last streams are compared with those
of one rank. Prints JSON lines as they are measured; the last ones have speed-ups and the model's
predictions (v4surgery.distributed.forecast), whose rates are of one rank, of the storage and of the
link.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4surgery.catalogue import Block as BlockSpec
from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.distributed.forecast import Rates, Work, forecast
from v4surgery.distributed.launch import Launch, find_launch
from v4surgery.distributed.team import Team, form_team, leads, meet, rank_device
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.block import Block
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer, StreamOptions
from v4surgery.synth import plan_synthesis, write_synthesis
from v4surgery.version import __version__

VOCABULARY = 8192
WEIGHT_BYTES = 40_000_000_000
SEED = 0
# Way of reading: whether the page cache is dropped before, and threads of a rank (None: --workers).
SETTINGS: dict[str, tuple[bool, int | None]] = {
    "dropped": (True, None),
    "warm": (False, None),
    "one-thread": (False, 1),
}
# Sums are in float32 and rounded to bf16 once, by 2^-9 of a value. A layer's two sublayers round
# differently where a sum is near a tie, and routing near a tie may turn: far below this.
TOLERANCE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--workers", type=int, default=8, help="reading threads of each rank")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="ways of reading")
    parser.add_argument("--like", default="flash")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (gloo)")
    parser.add_argument("--implementation", default="triton")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        measure(options)
        return
    make_parent(options)
    results = [run_ranks(options, ranks) for ranks in sorted({1, options.ranks})]
    for line in compare(options, results[0], results[-1]):
        print(json.dumps(line))


def make_parent(options: argparse.Namespace) -> None:
    changes = {"n_routed_experts": options.experts, "vocab_size": VOCABULARY}
    synthesis = plan_synthesis(options.like, layers=options.layers, changes=changes)
    began = time.perf_counter()
    write_synthesis(synthesis, options.work / "parent", workers=os.cpu_count() or 8)
    seconds = round(time.perf_counter() - began, 1)
    made = {"case": "synthetic parent", "bytes": synthesis.total_bytes, "seconds": seconds}
    print(json.dumps(made), flush=True)


def run_ranks(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Start this file on so many ranks; what the first one measured."""
    result = options.work / f"ranks-{ranks}.json"
    result.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    begin = [sys.executable, *(launcher if ranks > 1 else [])]
    environment = dict(os.environ)
    if options.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // ranks, 1))
    command = [*begin, __file__, *sys.argv[1:], "--rank-of", str(result)]
    subprocess.run(command, check=True, env=environment)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def measure(options: argparse.Namespace) -> None:
    """All cases on one rank of a run."""
    launch = find_launch()
    torch.set_grad_enabled(False)
    name = device_of(options, launch)
    team = form_team(name)
    bench = Bench(options, torch.device(name), team)
    result: dict[str, Any] = {
        "case": "machine",
        "ranks": bench.ranks,
        "ranks_a_device": bench.ranks_a_device,
        "device": name_of(bench.device),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if options.device != "cpu" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "v4surgery": __version__,
        "implementation": options.implementation,
        "workers_a_rank": options.workers,
    }
    with open_checkpoint(options.work / "parent") as checkpoint:
        result["work"] = vars(work_of(checkpoint, options.tokens))
        bench.say(result)
        bench.streamed(checkpoint, "warm", rounds=1)  # compiles the kernels
        for setting in options.settings.split(","):
            if not SETTINGS[setting][0]:
                bench.read(checkpoint, setting)  # into the page cache
            result[f"read {setting}"] = bench.read(checkpoint, setting)
            result[f"streamed {setting}"] = bench.streamed(checkpoint, setting, options.rounds)
            for case in ("read", "streamed"):
                found = result[f"{case} {setting}"]
                bench.say({"case": f"{case} {setting}", "ranks": bench.ranks, **found})
        result["resident"] = bench.resident(checkpoint)
        result["link_bytes_per_s"] = bench.link(checkpoint.config.hidden_size)
        last = {"link_bytes_per_s": result["link_bytes_per_s"], **result["resident"]}
        bench.say({"case": "resident", "ranks": bench.ranks, **last})
    if bench.is_first:
        options.rank_of.write_text(json.dumps(result))
    if team is not None:
        team.close()


def device_of(options: argparse.Namespace, launch: Launch | None) -> str:
    """Where this rank computes."""
    if launch is None or options.device == "cpu":
        return str(options.device)
    if not options.one_gpu:
        return rank_device(options.device, launch)
    # NCCL refuses two ranks on one GPU of a host.
    os.environ["NCCL_HOSTID"] = f"host-{launch.rank}"
    return "cuda:0"


def work_of(checkpoint: Checkpoint, tokens: int) -> Work:
    """Bytes of the trunk: of its first layer, since all that are dense have about as many."""
    specs = trunk(checkpoint)
    sizes = {True: 0, False: 0}
    for stored in checkpoint.tensors.values():
        if stored.entry.block is not None and not stored.entry.block.is_drafter:
            sizes[stored.entry.template.per_expert] += stored.nbytes
    head = checkpoint.tensors["head"].nbytes
    experts, dense = (sizes[key] // len(specs) for key in (True, False))
    return Work(len(specs), experts, dense, head, tokens, checkpoint.config.hidden_size)


class Bench:
    """The cases on one rank; times are between two meetings of all ranks."""

    def __init__(
        self, options: argparse.Namespace, device: torch.device, team: Team | None
    ) -> None:
        self.options, self.device, self.team = options, device, team

    def streamer(self, checkpoint: Checkpoint, setting: str = "warm") -> Streamer:
        workers = SETTINGS[setting][1] or self.options.workers
        budgets = StreamOptions(WEIGHT_BYTES, WEIGHT_BYTES, "host", workers, self.team)
        numerics = Numerics("exact", torch.bfloat16, Ops(self.options.implementation))
        return Streamer(checkpoint, numerics, self.device, budgets)

    def read(self, checkpoint: Checkpoint, setting: str) -> dict[str, Any]:
        """Every layer to the devices, each rank its part."""
        seconds, page_cache = [], ""
        with self.streamer(checkpoint, setting) as streamer:

            def load() -> None:
                for spec in trunk(checkpoint):
                    streamer.load_block(spec, experts_ahead=True)

            for _ in range(self.options.rounds):
                page_cache = self.set_page_cache(checkpoint, setting)
                seconds.append(self.timed(load))
            num_bytes = streamer.bytes_read // self.options.rounds
        return {
            "seconds": rounded(seconds),
            "bytes": num_bytes,
            "bytes_per_s": num_bytes / min(seconds),
            "page_cache": page_cache,
        }

    def streamed(self, checkpoint: Checkpoint, setting: str, rounds: int) -> dict[str, Any]:
        """The whole forward."""
        ids = self.ids(checkpoint)
        seconds, waited, logits = [], [], list[Tensor]()
        for _ in range(rounds):
            self.set_page_cache(checkpoint, setting)
            with self.streamer(checkpoint, setting) as streamer:

                def run(streamer: Streamer = streamer) -> None:
                    logits[:] = streamer.run([ids])

                seconds.append(self.timed(run))
                waited.append(streamer.waited)
                num_bytes = streamer.bytes_read
        if self.is_first:
            save_file({"x": logits[0].contiguous()}, self.kept("logits"))
        best = min(range(rounds), key=seconds.__getitem__)
        return {
            "seconds": rounded(seconds),
            "waited_s": round(waited[best], 3),
            "bytes": num_bytes,
            "bytes_per_s": num_bytes / seconds[best],
        }

    def resident(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """All layers on the devices."""
        rows = torch.tensor([self.ids(checkpoint)])
        with self.streamer(checkpoint) as streamer:
            blocks = [streamer.load_block(s, experts_ahead=True) for s in trunk(checkpoint)]
            (start,) = streamer.embed([rows])
            ids, start = rows.to(self.device), start.to(self.device)
            last: list[Tensor] = []

            def forward() -> None:
                h = start
                for block in blocks:
                    h = streamer.run_block(block, h, ids)
                last[:] = [h]

            forward()
            seconds = [self.timed(forward) for _ in range(5)]
            experts = self.expert_seconds(blocks, forward)
        if self.is_first:
            save_file({"x": last[0].cpu().contiguous()}, self.kept("streams"))
        return {"seconds": rounded(seconds), "experts_s": round(experts, 4)}

    def expert_seconds(self, blocks: list[Block], forward: Callable[[], None]) -> float:
        """Seconds of all routed experts in one forward: of the part less its shared expert."""
        spent: dict[str, float] = {"all": 0.0, "shared": 0.0}
        handles, began = [], {}
        for block in blocks:
            for name, module in (("all", block.ffn), ("shared", block.ffn.shared_experts)):

                def before(*_: object, name: str = name) -> None:
                    self.synchronize()
                    began[name] = time.perf_counter()

                def after(*_: object, name: str = name) -> None:
                    self.synchronize()
                    spent[name] += time.perf_counter() - began[name]

                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        self.timed(forward)
        for handle in handles:
            handle.remove()
        return spent["all"] - spent["shared"]

    def link(self, hidden_size: int) -> float | None:
        """Bytes a second of an all-reduce of the experts' sums, each way."""
        if self.team is None:
            return None
        team, sums = self.team, torch.zeros(self.options.tokens, hidden_size, device=self.device)
        seconds = [self.timed(lambda: [team.add_up(sums) for _ in range(10)]) for _ in range(4)]
        others = (team.size - 1) / team.size
        return 2 * others * sums.nbytes * 10 / min(seconds[1:])

    @property
    def ranks(self) -> int:
        return 1 if self.team is None else self.team.size

    @property
    def ranks_a_device(self) -> int:
        return self.ranks if self.options.one_gpu or self.device.type == "cpu" else 1

    def say(self, line: dict[str, Any]) -> None:
        if self.is_first:
            print(json.dumps(line), flush=True)

    @property
    def is_first(self) -> bool:
        return leads(self.team)

    def kept(self, name: str) -> Path:
        return Path(self.options.work) / f"{name}-{self.ranks}.safetensors"

    def ids(self, checkpoint: Checkpoint) -> list[int]:
        generator = torch.Generator().manual_seed(SEED)
        size = (self.options.tokens,)
        return torch.randint(checkpoint.config.vocab_size, size, generator=generator).tolist()

    def timed(self, call: Callable[[], object]) -> float:
        self.meet()
        began = time.perf_counter()
        call()
        self.meet()
        return time.perf_counter() - began

    def meet(self) -> None:
        self.synchronize()
        meet(self.team)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def set_page_cache(self, checkpoint: Checkpoint, setting: str) -> str:
        """Make the next reading come from the storage, if it should; says how."""
        if not SETTINGS[setting][0]:
            return "warm"
        how = "dropped by file"
        if self.is_first:
            for file in checkpoint.files:
                fd = os.open(self.options.work / "parent" / file, os.O_RDONLY)
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            with suppress(OSError):
                Path("/proc/sys/vm/drop_caches").write_text("1")
                how = "dropped"
        return how


def compare(
    options: argparse.Namespace, one: dict[str, Any], many: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Speed-ups, predictions and how far results are apart."""
    ranks = many["ranks"]
    for case in [key for key in one if key.partition(" ")[0] in ("read", "streamed", "resident")]:
        times = [best_of(result[case]["seconds"]) for result in (one, many)]
        line = {
            "case": case,
            "ranks": ranks,
            "seconds_1": round(times[0], 4),
            f"seconds_{ranks}": round(times[1], 4),
            "speed_up": round(times[0] / times[1], 3),
        }
        if not case.startswith("read"):
            told = [predict(case, one, many, n) for n in (1, ranks)]
            line["predicted_1"], line[f"predicted_{ranks}"] = (round(t, 4) for t in told)
            line["predicted_speed_up"] = round(told[0] / told[1], 3)
        yield line
    for name in ("logits", "streams"):
        a, b = (
            load_file(options.work / f"{name}-{n}.safetensors")["x"].float() for n in (1, ranks)
        )
        error = ((a - b).norm() / a.norm()).item()
        yield {"case": f"{name} of {ranks} beside 1", "relative_error": error}
        if not error < TOLERANCE:
            raise SystemExit(f"{name} differ by {error:.3g}, more than rounding")


def predict(case: str, one: dict[str, Any], many: dict[str, Any], ranks: int) -> float:
    """Seconds by the model, with rates of one GPU, of the storage and of the link."""
    work, resident = Work(**one["work"]), one["resident"]
    kind, _, setting = case.partition(" ")
    is_streamed = kind == "streamed"
    whole = best_of(resident["seconds"]) / work.layers
    experts = resident["experts_s"] / work.layers
    reads = [result[f"read {setting}"]["bytes_per_s"] for result in (one, many) if is_streamed]
    rates = Rates(
        rank_read=reads[0] if reads else 1.0,
        storage_read=max(reads, default=1.0),
        link=many["link_bytes_per_s"] or float("inf"),
        replicated_seconds=max(whole - experts, 0.0),
        expert_seconds=experts,
    )
    shared = many["ranks_a_device"] if ranks > 1 else 1
    expected = forecast(work, rates, ranks, shared)
    return expected.streamed if is_streamed else expected.resident


def best_of(seconds: list[float]) -> float:
    """The median where it is resident and short, else the least: others may use the storage."""
    return statistics.median(seconds) if len(seconds) >= 5 else min(seconds)


def trunk(checkpoint: Checkpoint) -> list[BlockSpec]:
    return [spec for spec in checkpoint.catalogue.blocks if not spec.is_drafter]


def rounded(seconds: list[float]) -> list[float]:
    return [round(value, 4) for value in seconds]


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()


if __name__ == "__main__":
    main()
