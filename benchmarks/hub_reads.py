"""Reading a parent from a Hub on loopback: the price of a gap, of a plan, and of a slice.

    python -m benchmarks.hub_reads [--latency 0.05] [--cases gap plan slice] [--workers 1 2 4 8]

* gap: two pieces of 2 KB with a gap between them, by two requests and by one through the gap, at
  the bandwidth of one connection; break-even is where both take as long.
* plan: ``plan --recipe mini3b`` of V4-Flash (69,187 tensors, 160 GB, generated while it is
  served), for the first and for the second time.
* slice: ``slice --recipe tiny-ci`` of it, 2.2 GB, by the number of workers.

Each request waits for the latency before it is answered. Prints one JSON line for each case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.hub import LoopbackHub, hub_environment
from tests.support.hub.generated import generated_checkpoint
from v4surgery.checkpoint.remote import HubRepository

REPO = "org/flash"
SHARD = "model-00002-of-00046.safetensors"
PIECE = 2048
V4 = [sys.executable, "-m", "v4surgery"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds a request")
    parser.add_argument("--cases", nargs="+", default=["gap", "plan", "slice"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8])
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(latency=options.latency) as hub:
        hub_environment(patch, hub, home / "hf")
        hub.add_repo(REPO, generated_checkpoint("flash"))
        if "gap" in options.cases:
            for megabytes in (None, 12.5, 2.0, 0.66):
                gap_prices(hub, megabytes)
        if "plan" in options.cases:
            for name in ("plan, first", "plan, second"):
                command(hub, name, "plan", "--recipe", "mini3b", "--json")
        for workers in options.workers if "slice" in options.cases else ():
            out = home / "out"
            args = ("slice", "--recipe", "tiny-ci", "--out", str(out), "--quiet")
            command(hub, f"slice, {workers} workers", *args, "--max-workers", str(workers))
            shutil.rmtree(out)
    shutil.rmtree(home)


def gap_prices(hub: LoopbackHub, megabytes: float | None) -> None:
    """Median milliseconds by gap; ``megabytes`` a second is the bandwidth of a connection."""
    hub.bandwidth = megabytes * 1e6 if megabytes else None
    two, one = {}, {}
    with HubRepository(REPO) as source:
        source.read(SHARD, 0, 1)
        for gap in (0, 8, 32, 128, 512, 2048):
            far = PIECE + gap * 1024
            two[gap] = milliseconds(source, [(0, PIECE), (far, far + PIECE)])
            one[gap] = milliseconds(source, [(0, far + PIECE)])
    hub.bandwidth = None
    cheaper = [gap for gap in two if one[gap] < two[gap]]
    report = {"case": "gap", "mb_per_s": megabytes, "two_ms": two, "one_ms": one}
    print(json.dumps(report | {"one_is_cheaper_up_to_kib": max(cheaper)}), flush=True)


def milliseconds(source: HubRepository, spans: list[tuple[int, int]]) -> float:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for begin, end in spans:
            source.read(SHARD, begin, end)
        seconds.append(time.perf_counter() - began)
    return round(1000 * statistics.median(seconds), 1)


def command(hub: LoopbackHub, case: str, *args: str) -> None:
    """Run a verb in a process of its own; print what it took and what it fetched."""
    hub.reset_log()
    began = time.perf_counter()
    process = subprocess.Popen([*V4, *args, "--parent", REPO], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    report = {
        "case": case,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": usage.ru_maxrss // 1024,
        "requests": len(hub.log),
        "resolves": len(hub.resolves()),
        "bytes": hub.body_bytes(),
        "latency": hub.latency,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
