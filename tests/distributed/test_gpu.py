"""Ranks on GPUs, through NCCL; where there is one GPU they share it (see victim.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import MODULE, VICTIM, Torchrun, alone, outputs, two_machines
from tests.distributed.test_forward import PROMPTS, SCORES, require_equal, write_prompts

pytestmark = pytest.mark.gpu
IDS = ",".join(map(str, PROMPTS[0]))


@pytest.fixture(scope="module")
def gpus() -> dict[str, str]:
    """What ranks need in their environment."""
    return {} if torch.cuda.device_count() > 1 else {"SHARED_GPU": "1"}


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_trace_is_equal(
    torchrun: Torchrun, parent: Path, tmp_path: Path, gpus: dict[str, str], implementation: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    arguments = ("trace", parent, "--prompts", prompts, "--taps", "all", "--device", "cuda")
    arguments += ("--implementation", implementation, "-q", "--out")
    alone(*arguments, one)
    done = torchrun(2, *arguments, two, program=(str(VICTIM),), **gpus)
    assert done.code == 0, done.err
    require_equal(one, two)


def test_scores_are_equal(
    torchrun: Torchrun, parent: Path, tmp_path: Path, gpus: dict[str, str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    arguments = ("score", parent, "--prompts", prompts, "--device", "cuda", "--out")
    alone(*arguments, one)
    done = torchrun(2, *arguments, two, program=(str(VICTIM),), **gpus)
    assert done.code == 0, done.err
    require_equal(one, two, SCORES)


def test_two_machines_with_two_ranks_each(parent: Path, tmp_path: Path) -> None:
    """Dense weights go between machines, then within them; all ranks are on the first GPU."""
    one, four = tmp_path / "one", tmp_path / "four"
    arguments = ("trace", parent, "--ids", IDS, "--taps", "all", "--device", "cuda", "-q", "--out")
    alone(*arguments, one)
    outputs(two_machines(2, *arguments, four, program=(str(VICTIM),), SHARED_GPU="1"))
    require_equal(one, four)


@pytest.mark.parametrize(
    ("what", "message"),
    [("kill", "error: a process of this run was lost"), ("unread", "error: the disk has gone")],
)
def test_a_rank_that_fails_ends_all(
    torchrun: Torchrun,
    parent: Path,
    tmp_path: Path,
    gpus: dict[str, str],
    what: str,
    message: str,
) -> None:
    """The other waits for it inside a kernel of NCCL's."""
    arguments = ("trace", parent, "--ids", IDS, "--device", "cuda", "--out", tmp_path / "trace")
    victim = gpus | {"VICTIM": f"1:{what}:block:2"}
    done = torchrun(2, *arguments, program=(str(VICTIM),), **victim)
    assert done.code == 1
    assert done.seconds < 30
    (said,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert said.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="there are GPUs for two ranks")
def test_more_ranks_than_gpus_are_refused(torchrun: Torchrun, parent: Path, tmp_path: Path) -> None:
    arguments = ("trace", parent, "--ids", IDS, "--device", "cuda", "--out", tmp_path / "trace")
    done = torchrun(2, *arguments, program=MODULE)
    assert done.code == 1
    assert done.err.count("error: more ranks on this machine than GPUs") == 1, done.err
