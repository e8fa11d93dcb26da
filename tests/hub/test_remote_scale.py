"""Bytes, requests, seconds and memory of reading from the Hub, at the size of the real thing.

The parent of most tests is V4-Flash in its published layout, 69,187 tensors in 160 GB, generated
while it is served. Where a whole slice of it takes too long, the default run counts in the plan
(which bytes are fetched is decided there) and slices a smaller parent; the slow run does it all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import v4surgery as v4
from tests.hub.remote_support import PARENT, open_parent
from tests.support import parents
from tests.support.hub import LoggedRequest, LoopbackHub, hub_environment
from tests.support.hub.generated import generated_checkpoint
from v4surgery.checkpoint.layout import INDEX_FILE
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.recipes import Recipe, load_recipe
from v4surgery.slicers.estimate import estimate_plan
from v4surgery.slicers.plan import Plan

NUM_TENSORS, NUM_SHARDS = 69_187, 46
GIB = 1 << 30
LATENCY = 0.05
# What wait4 says of a child's peak includes the image of this process that it was forked from.
_PROGRAM = """
import atexit, pathlib, re, sys, time
from v4surgery.cli import main

def report():
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) * 1024
    print(time.process_time(), peak, file=sys.stderr)

atexit.register(report)
main()
"""


class Measured(NamedTuple):
    """What a command of its own process took."""

    out: str
    cpu_seconds: float
    peak_bytes: int


def measure(*args: object) -> Measured:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cpu_seconds, peak_bytes = done.stderr.splitlines()[-1].split()
    return Measured(done.stdout, float(cpu_seconds), int(peak_bytes))


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """The whole of V4-Flash, public, behind 50 ms."""
    home = tmp_path_factory.mktemp("flash") / "home"
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(latency=LATENCY) as hub:
        hub_environment(patch, hub, home)
        hub.add_repo(PARENT, generated_checkpoint("flash"))
        yield hub


@pytest.fixture(scope="module")
def planned(flash: LoopbackHub) -> Measured:
    """The first ``plan --recipe mini3b``: nothing is cached yet."""
    assert not flash.log
    return measure("plan", "--recipe", "mini3b", "--parent", PARENT, "--json")


@pytest.fixture(scope="module")
def first_log(flash: LoopbackHub, planned: Measured) -> list[LoggedRequest]:
    """What the first plan asked for."""
    return list(flash.log)


@pytest.fixture(scope="module")
def parent(flash: LoopbackHub, first_log: list[LoggedRequest]) -> Iterator[Checkpoint]:
    """Opened after the first plan; the log begins there."""
    flash.reset_log()
    with open_parent() as opened:
        yield opened


def metadata_bytes(hub: LoopbackHub) -> int:
    """Config, index, and the header of every shard: what a plan has to know."""
    tree = hub.repos[PARENT].commits[hub.repos[PARENT].refs["main"]].tree
    shards = [blob for path, blob in tree.items() if path.endswith(".safetensors")]
    headers = sum(8 + int.from_bytes(blob.read(0, 8), "little") for blob in shards)
    return headers + tree["config.json"].size + tree[INDEX_FILE].size


def needed_bytes(plan: Plan) -> int:
    """Of the rows that the replica's tensors come from, whole, and of the rows of their scales."""
    total = 0
    for edit in plan.edits:
        assert edit.source is not None
        for ref in (edit.source.weight, edit.source.scale):
            if ref is None:
                continue
            if edit.rows is None:
                total += ref.end - ref.begin
                continue
            rows = edit.rows // (128 if ref.shape[0] < edit.source.weight.shape[0] else 1)
            total += len(np.unique(rows)) * ref.row_bytes
    return total


def test_plan_of_whole_flash_fetches_little_more_than_its_headers(
    flash: LoopbackHub, planned: Measured, first_log: list[LoggedRequest]
) -> None:
    shards = [r.file for r in first_log if r.is_resolve and r.file.startswith("model-")]
    assert len(shards) == len(set(shards)) == NUM_SHARDS
    fetched = sum(r.body_bytes for r in first_log)
    assert metadata_bytes(flash) < fetched <= 1.2 * metadata_bytes(flash)
    summary = json.loads(planned.out)
    assert summary["parent"] == PARENT and len(summary["layers"]) == 29


def test_plan_of_whole_flash_takes_less_than_15_seconds_and_a_gib(
    planned: Measured, first_log: list[LoggedRequest]
) -> None:
    """Computing, and a round trip for each request one after the other: an upper bound."""
    assert planned.cpu_seconds + LATENCY * len(first_log) < 15
    assert planned.peak_bytes < GIB


def test_second_plan_makes_one_request(
    flash: LoopbackHub, planned: Measured, parent: Checkpoint
) -> None:
    plan, _ = estimate_plan(parent, load_recipe("mini3b"))
    assert [request.path for request in flash.log] == [f"/api/models/{PARENT}/revision/main"]
    assert plan.cost.bytes_read == json.loads(planned.out)["bytes_read"]
    assert parent.num_tensors == NUM_TENSORS


@pytest.mark.parametrize("name", ["tiny-ci", "layers4"])
def test_plans_read_at_most_a_twentieth_more_than_they_need(name: str, parent: Checkpoint) -> None:
    plan, _ = estimate_plan(parent, load_recipe(name))
    assert needed_bytes(plan) <= plan.cost.bytes_read <= 1.05 * needed_bytes(plan)


def width_reduced(**changes: Any) -> dict[str, Any]:
    """V4-Flash's layers and ratios at an eighth of its widths or less."""
    return {
        "vocab_size": 512,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 16,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_lora_rank": 64,
        "n_routed_experts": 8,
        "index_n_heads": 8,
    } | changes


def slice_accounted(
    hub: LoopbackHub, recipe: Recipe, out: Path, *, workers: int = 8
) -> tuple[int, int]:
    """Bytes that a slice fetched after its plan was made, and that it needed."""
    with open_parent() as parent:
        plan = v4.plan(parent, recipe)
        small = sum(parent.source.size(name) for name in parent.companions())
        hub.reset_log()
        v4.slice(plan, out, workers=workers)
    shards = [request.file for request in hub.resolves() if request.file.startswith("model-")]
    assert len(shards) == len(set(shards))
    return sum(r.body_bytes for r in hub.log), needed_bytes(plan) + small


def test_layers4_of_many_layers_fetches_each_byte_once(
    monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, tmp_path: Path
) -> None:
    files = generated_checkpoint("flash", layers=12, changes=width_reduced())
    hub.add_repo(PARENT, files)
    fetched, needed = slice_accounted(hub, load_recipe("layers4"), tmp_path / "out")
    assert needed <= fetched <= 1.05 * needed
    with open_parent() as remote:
        assert v4.verify(tmp_path / "out", remote).passed


def test_slice_fetches_what_its_plan_says(
    monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add_repo(PARENT, generated_checkpoint("flash", layers=12, changes=width_reduced()))
    with open_parent() as remote:
        plan = v4.plan(remote, "tiny-ci")
        hub.reset_log()
        v4.slice(plan, tmp_path / "out", workers=8)
        gate_bytes = sum(
            edit.source.weight.end - edit.source.weight.begin
            for edit in plan.edits
            if edit.source is not None and edit.target.template.axes[0] == "n_routed_experts"
        )
    fetched = sum(r.body_bytes for r in hub.requests("storage"))
    # Remapping the hash tables reads their gates again, and the plan counts scales in proportion.
    assert abs(fetched - plan.cost.bytes_read) <= gate_bytes + plan.cost.bytes_read // 100


def test_more_workers_are_faster_where_requests_take_50_ms(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    changes = {"num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}
    folder = parents.write_small_parent(tmp_path / "parent", **changes)
    hub.add_repo(PARENT, folder)
    seconds = {}
    with open_parent() as remote:
        plan = v4.plan(remote, Recipe.model_validate({"name": "copy", "keep": {"mtp": "drop"}}))
        hub.latency = LATENCY
        for workers in (8, 4, 2, 1):
            began = time.monotonic()
            v4.slice(plan, tmp_path / f"out-{workers}", workers=workers)
            seconds[workers] = time.monotonic() - began
    for fewer, more in ((1, 2), (2, 4), (4, 8)):
        assert seconds[more] < 0.8 * seconds[fewer], seconds
    assert seconds[8] < 0.3 * seconds[1], seconds


def disk_bytes(*folders: Path) -> int:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files if path.exists())


def test_disk_holds_the_replica_and_its_journal_and_metadata_only(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add_repo(PARENT, generated_checkpoint("flash", layers=12, changes=width_reduced()))
    home, out, most = tmp_path / "home", tmp_path / "out", 0

    def watch(_: int) -> None:
        nonlocal most
        most = max(most, disk_bytes(home, out))

    with open_parent() as remote:
        plan = v4.plan(remote, "layers4")
        v4.slice(plan, out, progress=watch)
    journal = 2_000 * len(plan.edits)
    assert most <= plan.cost.bytes_written + journal + metadata_bytes(hub) + 1_000_000
    assert disk_bytes(home) <= metadata_bytes(hub) + 1_000_000 < plan.cost.bytes_written


@pytest.mark.slow
def test_tiny_ci_of_whole_flash_within_its_budgets(
    flash: LoopbackHub, parent: Checkpoint, tmp_path: Path
) -> None:
    """2.2 GB out of 160 GB, in a process of its own."""
    plan = v4.plan(parent, "tiny-ci")
    flash.latency = 0.0
    flash.reset_log()
    done = measure(
        *("slice", "--recipe", "tiny-ci", "--parent", PARENT, "--out", tmp_path / "out"),
        *("--max-workers", "8", "--quiet"),
    )
    flash.latency = LATENCY
    assert done.peak_bytes < GIB
    fetched = sum(r.body_bytes for r in flash.requests("storage"))
    assert fetched <= 1.05 * (needed_bytes(plan) + plan.selection_bytes)
    shards = [r.file for r in flash.resolves() if r.file.startswith("model-")]
    assert len(shards) == len(set(shards)) <= NUM_SHARDS
    assert disk_bytes(tmp_path / "out") <= plan.cost.bytes_written + 10_000_000


@pytest.mark.slow
def test_layers4_of_all_layers_and_experts_fetches_each_byte_once(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    """43 layers of 256 experts, 69,187 tensors, at a sixteenth of the widths."""
    files = generated_checkpoint("flash", changes=width_reduced(n_routed_experts=256))
    hub.add_repo(PARENT, files)
    fetched, needed = slice_accounted(hub, load_recipe("layers4"), tmp_path / "out")
    assert needed <= fetched <= 1.05 * needed
