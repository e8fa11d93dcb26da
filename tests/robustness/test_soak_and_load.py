"""A process that works for long stays as it is; many at once on a faulty server all end well."""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import v4surgery as v4
from tests.hub.remote_support import half, open_parent, quick_patience, weights_of
from tests.support import parents
from tests.support.hub import LoggedRequest, LoopbackHub
from v4surgery.recipes import Recipe

NUM_SLICES = 200
NUM_SLICES_IN_CI = 60
NUM_CONCURRENT = 16
CUT = half(layers={"count": 2, "compress_ratios": [0, 4]})
FAULT_SHARE = 0.05
TINY: dict[str, Any] = {
    **parents.SMALL,
    "num_hidden_layers": 2,
    "compress_ratios": [0, 4, 0],
}


def random_recipe(rng: random.Random, number: int) -> Recipe:
    """Any of the cuts and formats that a parent of two layers takes."""
    mixes = rng.random() < 0.3
    method = {"method": "pca"} if mixes else {}
    keep: dict[str, Any] = {
        "hidden_size": {"keep": rng.choice([32, 64, 96, 128]), **method},
        "experts": rng.randint(2, 4),
        "moe_intermediate_size": rng.choice([32, 64]),
        "q_lora_rank": {"keep": rng.choice([32, 64]), **method},
        "heads": {"groups": rng.choice([1, 2]), "per_group": rng.choice([1, 2])},
        "mtp": "drop" if mixes or rng.random() < 0.5 else "keep",
    }
    chosen = dict(rng.sample(sorted(keep.items()), rng.randint(1, len(keep))))
    if mixes:
        chosen["mtp"] = "drop"
    store = {"dtype": rng.choice(["bf16", "native", "f32"]), "max_shard_size": "200kB"}
    return Recipe.model_validate(
        {"name": f"r{number}", "keep": chosen, "store": store, "compensate": rng.random() < 0.5}
    )


def memory_and_descriptors() -> tuple[int, int]:
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds()


def soak(num_slices: int, tmp_path: Path) -> None:
    """After a fifth of the slices nothing grows any more: 5 % of memory, not one descriptor."""
    folder = parents.write_parent(tmp_path / "parent", changes=TINY)
    rng = random.Random(200)
    seen = []
    for number in range(num_slices):
        out = tmp_path / "out"
        with v4.open(folder) as parent:
            v4.slice(v4.plan(parent, random_recipe(rng, number)), out, workers=2)
        shutil.rmtree(out)
        if number % (num_slices // 20) == 0:
            seen.append(memory_and_descriptors())
    memory, descriptors = zip(*seen[len(seen) // 5 :], strict=True)
    quarter = len(memory) // 4
    first, last = (statistics.median(part) for part in (memory[:quarter], memory[-quarter:]))
    assert last <= 1.05 * first, memory
    assert len(set(descriptors)) == 1, descriptors
    assert not list(tmp_path.glob("out*"))


def test_memory_and_descriptors_stay_flat(tmp_path: Path) -> None:
    soak(NUM_SLICES_IN_CI, tmp_path)


@pytest.mark.slow
def test_memory_and_descriptors_stay_flat_over_200_slices(tmp_path: Path) -> None:
    soak(NUM_SLICES, tmp_path)


def test_sixteen_slices_from_a_hub_with_faults_all_end_with_the_right_bytes(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in twenty fails: refused, cut short, reset, answered whole, or link expired."""
    quick_patience(monkeypatch)
    folder = parents.write_parent(tmp_path / "parent", changes=TINY)
    with v4.open(folder) as parent:
        wanted = weights_of(v4.slice(v4.plan(parent, CUT), tmp_path / "near").path)
    hub.add_repo("org/flash", folder)
    rng = random.Random(16)

    def unlucky(request: LoggedRequest) -> bool:
        return rng.random() < FAULT_SHARE / len(faults)

    uses: Counter[str] = Counter()

    def expired(request: LoggedRequest) -> bool:
        """A link is good for ten requests, and then no more."""
        uses[request.path] += request.origin == "storage"
        return uses[request.path] > 10

    faults: list[Any] = [None] * 5
    faults = [
        hub.inject("status", unlucky, times=None, status=503),
        hub.inject("status", unlucky, times=None, status=429, headers={"Retry-After": "1"}),
        hub.inject("reset", unlucky, times=None),
        hub.inject("cut", unlucky, times=None, after=100),
        hub.inject("ignore_range", lambda r: r.range is not None and unlucky(r), times=None),
    ]
    links = hub.inject("status", expired, times=None, status=403)

    def cut(number: int) -> dict[str, bytes]:
        with open_parent() as parent:
            out = tmp_path / f"far{number}"
            return weights_of(v4.slice(v4.plan(parent, CUT), out, workers=2).path)

    with ThreadPoolExecutor(NUM_CONCURRENT) as pool:
        found = list(pool.map(cut, range(NUM_CONCURRENT)))
    assert all(weights == wanted for weights in found)
    met = sum(fault.met for fault in faults)
    assert met > 0.02 * len(hub.requests()), (met, len(hub.requests()))
    assert links.met
    for number in range(NUM_CONCURRENT):
        assert not (tmp_path / f"far{number}" / ".v4surgery").exists()


def test_descriptors_are_those_of_this_machine() -> None:
    """The measure itself: one more open file is one more descriptor."""
    before = memory_and_descriptors()[1]
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert memory_and_descriptors()[1] == before + 1
    finally:
        os.close(fd)
