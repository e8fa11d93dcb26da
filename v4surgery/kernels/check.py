"""Running the shared cases: against their formulas, and against the clock.

What ``v4surgery kernels check`` and ``bench``, the tests and the benchmarks call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import median
from typing import Any

import torch

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.dispatch import OPERATIONS, Ops

FAMILIES = ("formats", "linear", "experts", "attention", "streams")


@dataclass(frozen=True)
class CheckResult:
    """One case, judged.

    Attributes:
        op: The operation.
        label: Its arguments, in words.
        error: Elements that differ where the operation is exact, else a relative error.
        bound: What the error may be.
        message: The exception, if there was one.
    """

    op: str
    label: str
    error: float
    bound: float
    message: str = ""

    @property
    def passed(self) -> bool:
        return not self.message and self.error <= self.bound  # NaN never passes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class BenchResult:
    """One case, timed.

    Attributes:
        op: The operation.
        label: Its arguments, in words.
        milliseconds: Median.
        bytes_per_second: Least bytes over the time.
        flops_per_second: Operations over the time.
        floor_share: The least time that the measured ceilings allow, over the time.
    """

    op: str
    label: str
    milliseconds: float
    bytes_per_second: float
    flops_per_second: float
    floor_share: float


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes read and written by a copy, and bf16 products."""

    bytes_per_second: float
    flops_per_second: float


def find_cases(only: str | None = None, *, real: bool | None = None) -> list[Case]:
    """Cases of the operations whose name contains ``only``.

    Args:
        only: Part of an operation's name, or None for all.
        real: Only those of real size, only the small ones, or (None) both.

    Raises:
        UsageError: No operation has such a name.
    """
    cases: list[Case] = []
    for family in FAMILIES:
        cases += import_module(f"v4surgery.kernels.cases.{family}").CASES
    found = [case for case in cases if only is None or only in case.op]
    if not found:
        raise UsageError(
            "no such operation", value=only, rule="part of one of: " + ", ".join(OPERATIONS)
        )
    return [case for case in found if real is None or case.real == real]


def check_case(case: Case, ops: Ops, device: torch.device, seed: int = 0) -> CheckResult:
    """Run one case and judge it; an exception of the kernel is a result, too."""
    try:
        args, kwargs = case.make(device, torch.Generator(device).manual_seed(seed))
        with torch.no_grad():
            result = getattr(ops, case.op)(*args, **kwargs)
        verdict = case.check(result, args, kwargs)
        return CheckResult(case.op, case.label, verdict.error, verdict.bound)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return CheckResult(case.op, case.label, float("nan"), 0.0, message)


def check_cases(
    cases: Iterable[Case], ops: Ops, device: torch.device, seed: int = 0
) -> Iterator[CheckResult]:
    """Run and judge cases one after the other."""
    for case in cases:
        yield check_case(case, ops, device, seed)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A device copy of 4 GB (or what fits) and a bf16 product of 8192^3."""
    free = torch.cuda.mem_get_info(device)[0]
    source = torch.rand(min(1 << 30, free // 16), device=device)
    copies = torch.empty_like(source)
    copying = time_call(lambda: copies.copy_(source))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplying = time_call(lambda: a @ b)
    return Ceilings(8 * source.numel() / copying, 2 * 8192**3 / multiplying)


def bench_case(
    case: Case, ops: Ops, device: torch.device, ceilings: Ceilings, seed: int = 0
) -> BenchResult:
    """Time one case; its arguments are made once, and are larger than the cache where real."""
    args, kwargs = case.make(device, torch.Generator(device).manual_seed(seed))
    function = getattr(ops, case.op)
    with torch.no_grad():
        seconds = time_call(lambda: function(*args, **kwargs))
    floor = max(case.num_bytes / ceilings.bytes_per_second, case.flops / ceilings.flops_per_second)
    return BenchResult(
        case.op,
        case.label,
        seconds * 1e3,
        case.num_bytes / seconds,
        case.flops / seconds,
        floor / seconds,
    )


def time_call(call: Callable[[], object], *, budget: float = 0.2) -> float:
    """Median seconds that the current CUDA device needs for a call, after warming up.

    The call is captured in a graph, so that the time to launch from Python does not count; one
    that cannot be captured (it waits for the device) is timed as it is, by events.

    Args:
        call: What is timed; it may launch many kernels.
        budget: Seconds to spend on timing.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    once = max(_elapsed(call), 1e-6)
    repeats = max(int(1e-3 / once), 1)
    timed = _captured(call, repeats)
    if timed is None:
        timed, repeats = call, 1
    rounds = min(max(int(budget / (once * repeats)), 5), 200)
    return float(median(_elapsed(timed) for _ in range(rounds))) / repeats


def _elapsed(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _captured(call: Callable[[], object], repeats: int) -> Callable[[], object] | None:
    """A graph of some calls in a row, or None where it cannot be made."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
