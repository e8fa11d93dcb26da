"""Compiling kernels for a GPU that is not here: launchers run, but every launch only compiles.

Triton takes its target from the active driver. This one has no device behind it, so a launcher
that is called on CPU tensors chooses its kernel, constants and tiles as it would on that GPU, and
the compiled code is kept here instead of being launched.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from v4surgery.kernels import launch
from v4surgery.kernels.check import find_cases
from v4surgery.kernels.dispatch import Ops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CAPABILITY = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0)}
# Its E4M3 is another format (fnuz), so codes are decoded from bytes there as below sm_89.
CAPABILITY["gfx942"] = (8, 0)
# A number for each driver: Triton keeps what it compiled for by device, not by target.
_numbers = itertools.count(100)


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.number = target, next(_numbers)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(name: str, most: int = 1) -> Iterator[dict[str, list[Any]]]:
    """Within it, launches compile for a target of :data:`TARGETS`.

    Args:
        name: The target.
        most: Specialisations of one kernel to compile; more of them are passed over.

    Yields:
        Kernel name to what was compiled of it.
    """
    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kept = compiled.setdefault(kernel.fn.__name__, [])
        if len(kept) >= most:
            return None
        result = run(kernel, *args, grid=grid, warmup=True, **options)
        if all(result is not other for other in kept):
            kept.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(launch, "is_interpreted", lambda: True)
        patch.setattr(launch, "capability", lambda _: CAPABILITY[name])
        previous = driver._active
        driver.set_active(_Driver(TARGETS[name]))
        try:
            yield compiled
        finally:
            driver._active = previous


def main(name: str) -> None:
    """Compile what every small case launches, and print kernels and failures as JSON."""
    failures: dict[str, str] = {}
    ops = Ops("triton")
    with compiling_for(name) as compiled, torch.no_grad():
        for case in find_cases(real=False):
            args, kwargs = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
            try:
                getattr(ops, case.op)(*args, **kwargs)
            except Exception as error:
                failures[f"{case.op}: {case.label}"] = f"{type(error).__name__}: {error}"[:2000]
    kernels = {kernel: [sorted(each.asm) for each in kept] for kernel, kept in compiled.items()}
    print(json.dumps({"kernels": kernels, "failures": failures}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
