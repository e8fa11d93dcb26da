"""What goes wrong on several ranks: one message, soon, and nothing half done."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.distributed.conftest import (
    VICTIM,
    Torchrun,
    alone,
    outputs,
    two_machines,
)
from tests.distributed.test_forward import require_equal
from tests.distributed.test_shares import team_of
from v4surgery.checkpoint.reader import open_checkpoint
from v4surgery.cli import main
from v4surgery.distributed.launch import VERBS, find_launch, require_verb
from v4surgery.distributed.pulse import PATIENCE, PERIOD, Pulse
from v4surgery.distributed.team import rank_device
from v4surgery.errors import UsageError
from v4surgery.model.streaming import StreamOptions
from v4surgery.validation.validate import validate_replica

RIGHT = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("what", "message"),
    [("kill", "error: a process of this run was lost"), ("unread", "error: the disk has gone")],
)
def test_a_rank_that_fails_in_a_forward_ends_all(
    torchrun: Torchrun, parent: Path, tmp_path: Path, what: str, message: str
) -> None:
    """The others wait for it in an all-reduce."""
    out = tmp_path / "trace"
    victim = f"1:{what}:block:2"
    arguments = ("trace", parent, "--ids", "1,2,3", "--out", out)
    done = torchrun(2, *arguments, program=(str(VICTIM),), VICTIM=victim)
    assert done.code == 1
    assert done.seconds < 30
    (said,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert said.startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_verb_that_runs_in_one_process_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for verb in VERBS:
        require_verb(["--debug", verb, "inspect"], 2)
    require_verb(["--help"], 2)
    with pytest.raises(UsageError, match="inspect runs in one process") as refused:
        require_verb(["inspect", "trace"], 2)
    assert "trace, validate, score, slice, convert" in str(refused.value)
    assert "start it without torchrun: v4surgery inspect" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("RANK", None, "a whole number"),
        ("RANK", "one", "a whole number"),
        ("RANK", "4", "0 to WORLD_SIZE - 1, which is 3"),
        ("WORLD_SIZE", "-2", "a whole number"),
        ("LOCAL_RANK", "0", "RANK 3 modulo LOCAL_WORLD_SIZE 2"),
        ("LOCAL_WORLD_SIZE", "3", "WORLD_SIZE 4 is a multiple of it"),
        ("LOCAL_WORLD_SIZE", "0", "WORLD_SIZE 4 is a multiple of it"),
        ("MASTER_ADDR", "", "the host where ranks meet"),
        ("MASTER_PORT", "x", "a whole number"),
    ],
)
def test_wrong_variables_are_named(name: str, value: str | None, rule: str) -> None:
    found = RIGHT if value is None else RIGHT | {name: value}
    wrong = {key: text for key, text in found.items() if value is not None or key != name}
    with pytest.raises(UsageError, match="torchrun's variables") as error:
        find_launch(wrong)
    assert f"where: {name}\n" in str(error.value)
    assert rule in str(error.value)


def test_the_command_line_says_what_is_wrong_with_the_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (RIGHT | {"RANK": "7"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "--help"])
    assert stopped.value.code == 2
    assert "where: RANK" in capsys.readouterr().err


def test_a_machine_that_falls_silent_is_found() -> None:
    """Counters as in the store: one that moves lives, one that never moves does not."""

    class Store(dict[str, int]):
        def add(self, key: str, amount: int, /) -> int:
            self[key] = self.get(key, 0) + amount
            return self[key]

    store = Store()
    first, second = Pulse(0, 2), Pulse(1, 2)
    for now in range(0, 100, 2):
        assert first.find_lost(store, now) is None
        assert second.find_lost(store, now) is None
    assert first.find_lost(store, 100) is None
    assert first.find_lost(store, 100 + PATIENCE) is None
    assert first.find_lost(store, 101 + PATIENCE) == 1
    never = Pulse(0, 3)
    assert never.find_lost(Store(), 0) is None
    assert never.find_lost(Store(), PATIENCE) is None
    assert never.find_lost(Store(), PATIENCE + 1) == 1
    assert PATIENCE + PERIOD < 30


def test_one_process_is_no_team() -> None:
    assert find_launch({}) is None
    assert find_launch({"WORLD_SIZE": "8", "RANK": "1"}) is None  # not torchrun's
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_launch(RIGHT | alone) is None
    launch = find_launch(RIGHT)
    assert launch is not None
    assert (launch.nodes, launch.node, launch.local_rank) == (2, 1, 1)


def test_what_every_rank_finds_wrong_is_said_once(
    torchrun: Torchrun, parent: Path, tmp_path: Path
) -> None:
    arguments = ("trace", parent, "--ids", "1", "--out", tmp_path / "t", "--device", "cuda:0")
    done = torchrun(2, *arguments)
    assert done.code == 1
    assert done.err.count("error: several ranks cannot compute on one GPU") == 1
    assert "each rank takes the GPU of its LOCAL_RANK" in done.err


def test_a_usage_error_is_said_though_the_first_rank_comes_late(torchrun: Torchrun) -> None:
    """It is the one that prints; the others' end would be its own."""
    done = torchrun(2, "trace", "--nonsense", program=(str(VICTIM),), VICTIM="0:late::2")
    assert done.err.count("No such option: --nonsense") == 1, done.err
    assert "error: " not in done.err
    assert (done.code, done.out) == (1, "")  # torchrun's
    assert "(exitcode: 2)" in done.err


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = find_launch(RIGHT)
    assert launch is not None
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match="more ranks on this machine than GPUs") as refused:
        rank_device("cuda", launch)
    assert "2 ranks, 1 GPU(s)" in str(refused.value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert rank_device("cuda", launch) == "cuda:1"
    assert rank_device("cpu", launch) == "cpu"


def test_the_masked_parent_is_refused(parent: Path, replica: Path) -> None:
    options = StreamOptions(team=team_of(2))
    with (
        open_checkpoint(replica) as cut,
        open_checkpoint(parent) as source,
        pytest.raises(UsageError, match="the masked parent is compared in one process"),
    ):
        validate_replica(cut, source, [[1]], masked=True, options=options)


def test_two_machines_with_two_ranks_each(parent: Path, tmp_path: Path) -> None:
    """Dense weights go between machines, then within them."""
    one, four = tmp_path / "one", tmp_path / "four"
    arguments = ["trace", parent, "--ids", "1,2,3,4,5,6,7,8", "--taps", "all", "-q", "--out"]
    alone(*arguments, one)
    assert len(outputs(two_machines(2, *arguments, four))) == 1
    require_equal(one, four)


def test_a_machine_that_hangs_ends_the_other(parent: Path, tmp_path: Path) -> None:
    """Its connections stay open, so only the pulse tells; the hung one is ended by hand."""
    arguments = ("trace", parent, "--ids", "1,2,3", "--out", tmp_path / "trace")
    machines = two_machines(1, *arguments, program=(str(VICTIM),), VICTIM="1:stop:block:2")
    began = time.monotonic()
    try:
        while all(machine.poll() is None for machine in machines):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        seconds = time.monotonic() - began
    finally:
        for process in [child for m in machines for child in family(m.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    (err,) = [
        err
        for machine, (_, err) in zip(machines, [m.communicate() for m in machines], strict=True)
        if machine.returncode == 1
    ]
    assert err.count("error: a process of this run was lost") == 1, err
    assert "machine 1 is silent" in err
    assert PATIENCE < seconds < PATIENCE + 25  # to start, to compute two blocks, and to end
    assert not (tmp_path / "trace").exists()


def family(pid: int) -> list[psutil.Process]:
    """A process with all of its children; none if it has ended."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
