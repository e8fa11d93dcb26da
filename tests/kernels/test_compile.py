"""Every kernel compiles for every GPU generation that is supported, without one being here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# CUDA targets end in machine code; for AMD the object needs no tool beyond Triton's own.
LAST_STAGE = {"sm_80": "cubin", "sm_89": "cubin", "sm_90": "cubin", "sm_100": "cubin"}
LAST_STAGE["gfx942"] = "hsaco"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", LAST_STAGE)
def test_every_kernel_compiles_for(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.offline", target],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert not report["failures"]
    names = {
        name
        for path in (REPOSITORY / "v4surgery" / "kernels").glob("*.py")
        if target == "sm_90" or not path.stem.endswith("_hopper")
        for name in kernel_names(path)
    }
    if target != "sm_90":
        names.remove("permute_rows_kernel")  # the order of inputs that only Hopper's kernel wants
    assert set(report["kernels"]) == names
    for kernel, builds in report["kernels"].items():
        assert builds and all(LAST_STAGE[target] in stages for stages in builds), kernel


def kernel_names(path: Path) -> set[str]:
    """Functions that are launched: their names end in ``_kernel``."""
    lines = path.read_text().splitlines()
    return {
        after.split("(")[0].removeprefix("def ")
        for line, after in itertools.pairwise(lines)
        if line.startswith(("@triton.jit", "@gluon.jit"))
        and after.split("(")[0].endswith("_kernel")
    }
