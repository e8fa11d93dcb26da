"""Running a warp-specialized Gluon kernel on the CPU: its logic, not its instructions.

Triton's interpreter knows no Gluon. Here the roles of a program are threads, barriers count
arrivals and bytes, a product reads its operands only when it is waited for, and a copy out reads
its source only then, too: what a wrong phase, slot or count would break on the GPU breaks here,
as a wrong result or as a wait that never ends.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

SECONDS_TO_WAIT = 5.0
_local = threading.local()


def pause() -> None:
    """Let the other roles run ahead, now and then."""
    if random.random() < 0.1:
        time.sleep(1e-4)


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.count = self.missing = self.num_bytes = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int = 0, num_bytes: int = 0) -> None:
        with self.changed:
            self.missing -= count
            self.num_bytes += num_bytes
            assert self.missing >= 0, "more arrivals than the phase has"
            if self.missing == 0 and self.num_bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase & 1 != parity, SECONDS_TO_WAIT)
        assert over, "a barrier is waited for that nobody completes"


class Slots:
    """Shared memory: an array of buffers, or of barriers where the elements are int64."""

    def __init__(self, dtype: torch.dtype, shape: list[int]) -> None:
        # Codes that nobody wrote are NaN.
        self.items: list[Any] = [
            Barrier() if dtype == torch.int64 else Slot(torch.full(shape[1:], 0.0).to(dtype))
            for _ in range(shape[0])
        ]
        for item in self.items:
            if isinstance(item, Slot):
                item.data.view(torch.uint8).fill_(0xFF)

    def index(self, at: int) -> Any:
        return self.items[at]


@dataclass
class Slot:
    data: Tensor

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def permute(self, order: tuple[int, int]) -> Slot:
        return Slot(self.data.permute(order))


@dataclass
class Pointer:
    data: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


@dataclass
class Descriptor:
    data: Tensor
    box: list[int]
    layout = None

    @classmethod
    def from_tensor(cls, data: Tensor, box: list[int], _: object) -> Descriptor:
        assert data.stride(1) == 1 and data.stride(0) * data.element_size() % 16 == 0
        assert data.data_ptr() % 16 == 0
        return cls(data, box)

    def window(self, at: list[int]) -> Tensor:
        rows, cols = (slice(start, start + size) for start, size in zip(at, self.box, strict=True))
        return self.data[rows, cols]


def copy_in(desc: Descriptor, at: list[int], barrier: Barrier, slot: Slot) -> None:
    pause()
    window = desc.window(at)
    slot.data.view(torch.uint8).zero_()
    slot.data[: window.shape[0], : window.shape[1]] = window
    barrier.arrive(num_bytes=-slot.data.numel() * slot.data.element_size())


def copy_out(desc: Descriptor, at: list[int], slot: Slot) -> None:
    _local.copies.append((desc.window(at), slot))


def store_wait(pending: int) -> None:
    assert pending == 0
    pause()
    for window, slot in _local.copies:
        window.copy_(slot.data[: window.shape[0], : window.shape[1]])
    _local.copies.clear()


def warpgroup_mma(x: Slot, weight: Slot, total: Tensor, *, use_acc: bool, is_async: bool) -> Any:
    assert is_async
    return lambda: x.data.float() @ weight.data.float() + (total if use_acc else 0)


def warpgroup_mma_wait(_: int, *, deps: list[Any]) -> Tensor:
    pause()
    (value,) = deps
    return value() if callable(value) else value


def warp_specialize(roles: list[Any], num_warps: list[int], registers: list[int]) -> None:
    assert len(num_warps) == len(registers) == len(roles) - 1
    program, failures = (_local.program, _local.num_programs), []

    def run(role: Callable[..., None], args: tuple[Any, ...]) -> None:
        (_local.program, _local.num_programs), _local.copies = program, []
        try:
            role(*args)
            assert not _local.copies, "the program ends before its copies"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=role) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@dataclass
class Function:
    """What @gluon.jit makes: called by other functions, or launched over a grid."""

    body: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            assert num_warps == 4 and maxnreg * 12 * 32 <= 65536
            pointers = [Pointer(a.flatten()) if isinstance(a, Tensor) else a for a in args]
            for program in range(grid[0]):
                _local.program, _local.num_programs = program, grid[0]
                self.body(*pointers, **constants)

        return launch


def minimum(a: Any, b: Any) -> Any:
    return a.clamp_max(b) if isinstance(a, Tensor) else min(a, b)


def language() -> ModuleType:
    gl = ModuleType("gl")
    vars(gl).update(
        constexpr=lambda value: value,
        NVMMASharedLayout=lambda **_: SimpleNamespace(),
        NVMMADistributedLayout=lambda **_: SimpleNamespace(),
        SliceLayout=lambda *_: SimpleNamespace(),
        float8e4nv=torch.float8_e4m3fn,
        bfloat16=torch.bfloat16,
        float32=torch.float32,
        int64=torch.int64,
        allocate_shared_memory=lambda dtype, shape, _: Slots(dtype, shape),
        warp_specialize=warp_specialize,
        program_id=lambda _: _local.program,
        num_programs=lambda _: _local.num_programs,
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        minimum=minimum,
        arange=lambda start, end, _: torch.arange(start, end),
        zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
        broadcast=torch.broadcast_tensors,
        fma=lambda a, b, c: a * b + c,
        load=lambda pointer: pointer.data[pointer.offset],
    )
    return gl


@contextmanager
def emulated(name: str) -> Iterator[ModuleType]:
    """The module of that name, imported anew with Gluon emulated."""
    gl = language()
    hopper = ModuleType("hopper")
    vars(hopper).update(
        fence_async_shared=lambda: None,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
        tma=SimpleNamespace(async_load=copy_in, async_store=copy_out, store_wait=store_wait),
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, parity: barrier.wait(parity),
            arrive=lambda barrier, count: barrier.arrive(count),
            expect=lambda barrier, num_bytes: barrier.arrive(1, num_bytes),
        ),
    )
    gluon = ModuleType("gluon")
    vars(gluon).update(jit=Function, language=gl)
    host = ModuleType("host")
    vars(host).update(TensorDescriptor=Descriptor)
    path = "triton.experimental.gluon"
    modules = {
        path: gluon,
        f"{path}.language": gl,
        f"{path}.language.nvidia.hopper": hopper,
        f"{path}.nvidia.hopper": host,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("triton.experimental"), "gluon", gluon, raising=False)
        for key, module in modules.items():
            patch.setitem(sys.modules, key, module)
        patch.delitem(sys.modules, name, raising=False)
        module = import_module(name)
        patch.setattr(module, "e8m0_to_float", lambda code: torch.exp2(code.float() - 127))
        yield module
        sys.modules.pop(name)
