"""Runs of several processes, started by torchrun as a user starts them; gloo, on CPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.parents import write_small_parent
from v4surgery.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
# Seven experts are no multiple of two or three ranks, and two of them leave a rank idle.
EXPERTS, PER_TOKEN = 7, 2
VICTIM = Path(__file__).with_name("victim.py")
MODULE = ("-m", "v4surgery")


class Done(NamedTuple):
    """How a run ended: torchrun's exit code, all output, seconds."""

    code: int
    out: str
    err: str
    seconds: float


Torchrun = Callable[..., Done]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """Runs ``v4surgery`` (or a program) with so many ranks."""

    def run(
        ranks: int, *args: object, program: tuple[str, ...] = MODULE, **environment: str
    ) -> Done:
        command = [*launcher("--standalone", "--nproc-per-node", ranks), *program, *args]
        began = time.monotonic()
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=rank_environment() | environment,
        )
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    return run


def launcher(*options: object) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


def two_machines(
    ranks: int, *args: object, program: tuple[str, ...] = MODULE, **environment: str
) -> list[subprocess.Popen[str]]:
    """Two torchruns that meet, with so many ranks each."""
    place = f"--rdzv-endpoint=localhost:{free_port()}"
    options = ["--nnodes=2", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-id=pair"]
    command = list(map(str, [*launcher(*options, place), *program, *args]))
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=rank_environment() | environment,
        )
        for _ in range(2)
    ]


def outputs(machines: list[subprocess.Popen[str]]) -> list[str]:
    """What was printed where something was, by machines that end well."""
    ends = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    return [out for out, _ in ends if out]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def rank_environment() -> dict[str, str]:
    """One thread a rank, the package of this checkout, no torchrun around."""
    kept = {name: value for name, value in os.environ.items() if "RANK" not in name}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")]))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def alone(*args: object) -> None:
    """``v4surgery`` in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, args)])
    assert not stopped.value.code, args


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "parent"
    return write_small_parent(folder, n_routed_experts=EXPERTS, num_experts_per_tok=PER_TOKEN)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small files, two experts, and weights that are decoded and requantized."""
    path = tmp_path_factory.mktemp("ranks") / "cut.yaml"
    path.write_text(
        "name: cut\n"
        "keep: {experts: {keep: 2, by: gate}, moe_intermediate_size: 32}\n"
        "store: {dtype: native, max_shard_size: 60kB}\n"
    )
    return path


@pytest.fixture(scope="session")
def replica(parent: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process cuts."""
    out = tmp_path_factory.mktemp("ranks") / "replica"
    alone("slice", "--recipe", recipe, "--parent", parent, "--out", out, "-q")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; nothing else may be in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
