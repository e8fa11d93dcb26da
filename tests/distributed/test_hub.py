"""Ranks that each read the parent from the Hub: equal to one process, and no tensor read twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed.conftest import VICTIM, Torchrun, alone, contents
from tests.distributed.test_forward import TOLERANCE, require_equal
from tests.hub.remote_support import PARENT, data_spans, header_bytes, open_parent
from tests.support.hub import LoggedRequest, LoopbackHub, hub_environment, on_hub
from v4surgery.cli import main
from v4surgery.distributed.parent import require_same
from v4surgery.errors import CheckpointError

BETWEEN = (str(VICTIM),)
IDS = "1,2,3,4,5,6,7,8,9,10"


@pytest.fixture
def hub(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as started:
        started.add_repo(PARENT, parent)
        use_home(monkeypatch, started, tmp_path / "home")
        yield started


def use_home(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path) -> None:
    """An empty cache, and an empty log."""
    hub_environment(monkeypatch, hub, home)
    hub.reset_log()


class Served:
    """What a Hub has sent so far: bytes of tensors, which pieces they were, and all the rest."""

    def __init__(self, hub: LoopbackHub, parent: Path) -> None:
        self.spans = sorted(data_spans(hub.log, header_bytes(parent)))
        self.data = sum(end - begin for _, begin, end in self.spans)
        self.others = hub.body_bytes() - self.data

    @property
    def has_repeated(self) -> bool:
        return any(a[0] == b[0] and a[2] > b[1] for a, b in pairwise(self.spans))


def from_rank(rank: int) -> str:
    return f"origin/rank-{rank}"


def test_a_trace_is_equal_and_the_hub_serves_no_tensor_twice(
    torchrun: Torchrun,
    parent: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each rank opens the repository itself: listing, config, index and headers come as often."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ("--ids", IDS, "--taps", "all", "--json", "--out")
    alone("trace", parent, *arguments, one)
    alone("trace", PARENT, *arguments, tmp_path / "far")
    by_one = Served(hub, parent)
    capsys.readouterr()
    use_home(monkeypatch, hub, tmp_path / "another")
    done = torchrun(2, "trace", PARENT, *arguments, two)
    assert done.code == 0, done.err
    assert json.loads(done.out)["bytes_read"] > 1_000_000  # one document
    require_equal(one, two)
    by_two = Served(hub, parent)
    assert by_two.data == by_one.data
    assert not by_two.has_repeated
    assert by_two.others <= 2 * by_one.others


def test_ranks_that_opened_different_commits_are_told(hub: LoopbackHub) -> None:
    """A branch moved between two openings; only what is no tensor changed."""
    told: list[tuple[str, str | None]] = []

    def gather(own: tuple[str, str | None]) -> list[tuple[str, str | None]]:
        told.append(own)
        return told

    team: Any = SimpleNamespace(gather=gather)
    before = hub.repos[PARENT].refs["main"]
    with open_parent() as first:
        hub.repos[PARENT].commit({"README.md": b"moved"})
        with open_parent() as second, open_parent(before) as third:
            assert first.fingerprint == second.fingerprint
            require_same(team, first)
            require_same(team, third)
            with pytest.raises(CheckpointError, match="not opened the same checkpoint") as error:
                require_same(team, second)
    assert f"where: {PARENT} on rank 2\n" in str(error.value)
    assert before in str(error.value)
    assert "next: name a commit, ORG/NAME@COMMIT" in str(error.value)


def test_a_slice_asks_the_hub_for_no_more_than_one_process(
    torchrun: Torchrun,
    parent: Path,
    recipe: Path,
    replica: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is kept is chosen by weights, which the first rank alone reads."""
    one, out = tmp_path / "one", tmp_path / "out"
    arguments = ("slice", "--recipe", recipe, "--parent", PARENT, "--json", "--out")
    alone(*arguments, one)
    assert json.loads(capsys.readouterr().out)["selection_bytes"] > 0
    by_one = Served(hub, parent)
    use_home(monkeypatch, hub, tmp_path / "another")
    done = torchrun(3, *arguments, out)
    assert done.code == 0, done.err
    assert json.loads(done.out)["parent"] == PARENT
    assert contents(out) == contents(one)
    assert without_record(out) == without_record(replica)
    by_three = Served(hub, parent)
    assert by_three.data == by_one.data
    assert by_three.others <= 3 * by_one.others


def without_record(folder: Path) -> dict[str, bytes]:
    """All files but the one that names the parent's repository and commit."""
    return {name: data for name, data in contents(folder).items() if name != "v4surgery.json"}


def test_a_killed_slice_from_the_hub_goes_on_with_other_ranks(
    torchrun: Torchrun, recipe: Path, replica: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("slice", "--recipe", recipe, "--parent", PARENT, "--out", out, "-q")
    lost = torchrun(2, *arguments, program=BETWEEN, VICTIM="1:kill:chunk:30")
    assert lost.code == 1
    assert lost.seconds < 30
    assert lost.err.count("error: a process of this run was lost") == 1
    done = torchrun(3, *arguments)
    assert done.code == 0, done.err
    assert "wrote the other" in " ".join(done.out.split())
    assert without_record(out) == without_record(replica)
    alone(*arguments[:-2], tmp_path / "one", "-q")
    assert contents(out) == contents(tmp_path / "one")


def test_what_the_hub_refuses_one_rank_is_said_once(
    torchrun: Torchrun, recipe: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    """Status 500 for ever; the other rank is served all the while."""

    def is_met(request: LoggedRequest) -> bool:
        is_data = request.range is not None and request.range[0] > 0
        return is_data and from_rank(1) in request.headers["user-agent"]

    fault = hub.inject("status", is_met, times=None, status=500, skip=3)
    out = tmp_path / "out"
    arguments = ("slice", "--recipe", recipe, "--parent", PARENT, "--out", out)
    done = torchrun(2, *arguments, program=BETWEEN, VICTIM="1:hasty::0")
    assert done.code == 1
    assert done.seconds < 30
    assert fault.met >= 5
    assert done.err.count("error: ") == 1
    assert "error: the server did not answer as it should, 5 time(s)" in done.err
    assert "value: status 500" in done.err
    assert "next: run the same command again: what is done is kept" in done.err
    assert not (out / "model.safetensors.index.json").exists()


def test_a_shard_that_is_gone_is_said_once(
    torchrun: Torchrun, hub: LoopbackHub, tmp_path: Path
) -> None:
    """Every rank finds it, in the headers."""
    shard = "model-00003-of-00007.safetensors"
    missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
    hub.inject("status", on_hub(shard), times=None, status=404, headers=missing)
    done = torchrun(2, "trace", PARENT, "--ids", IDS, "--out", tmp_path / "trace")
    assert done.code == 1
    assert done.seconds < 30
    assert done.err.count("error: ") == 1
    assert "error: no such file in this repository" in done.err
    assert f"/{shard}\n" in done.err
    assert not (tmp_path / "trace").exists()


def test_a_validation_that_fails_has_the_same_numbers_and_its_report(
    torchrun: Torchrun,
    parent: Path,
    recipe: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first rank takes long to write the report; the others, which have none, wait for it."""
    strict, out = tmp_path / "strict.yaml", tmp_path / "replica"
    strict.write_text(recipe.read_text() + "validate: {logit_kl: 1.0e-9}\n")
    alone("slice", "--recipe", strict, "--parent", parent, "--out", out, "--json")
    capsys.readouterr()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"ids": list(range(12))}) + "\n")
    arguments = ("validate", out, "--prompts", prompts, "--json", "--parent")
    pinned, report = f"{PARENT}@{hub.repos[PARENT].refs['main']}", tmp_path / "report"
    with pytest.raises(SystemExit) as failed:
        main([*map(str, arguments), pinned])
    assert failed.value.code == 3
    one, by_one = json.loads(capsys.readouterr().out), Served(hub, parent)
    use_home(monkeypatch, hub, tmp_path / "another")
    arguments = (*arguments, pinned, "--report", report)
    done = torchrun(2, *arguments, program=BETWEEN, VICTIM="0:late:report:4")
    assert (done.code, done.err.count("(exitcode: 3)")) == (1, 1)  # torchrun's, and ours
    assert done.err.count("error: ") == done.err.count("error: replica fails the validation") == 1
    assert (report / "validation.json").exists()
    two = json.loads(done.out)
    assert two["verdict"] == one["verdict"] == "fail"
    assert two["summary"] == pytest.approx(one["summary"], rel=100 * TOLERANCE)
    assert Served(hub, parent).data == by_one.data
