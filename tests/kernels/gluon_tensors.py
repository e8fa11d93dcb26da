"""Running a Gluon kernel on the CPU on whole tensors: its indices and bits, not its layouts.

Triton's interpreter knows no Gluon. Here a tensor is a torch tensor whatever its layout is, a
pointer is a flat tensor and offsets, a copy arrives when its group is waited for, a product reads
its operands then, too, and shared memory that nobody wrote is NaN. Inline PTX is interpreted one
instruction at a time. What that cannot show is left to the compiler, which asserts that layouts
fit, and to the GPU.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton imports this when it launches a kernel, also from within the emulation.
import_module("triton.experimental.gluon.nvidia.hopper")
MEMORY: dict[int, Tensor] = {}
PROGRAM: list[int] = [0]
WORD = 0xFFFFFFFF


class Value(Tensor):
    """A tensor with Triton's casts; unsigned integers are held by wider signed ones."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        if dtype == "pointer":
            return Pointer(MEMORY[int(self)])
        plain = self.as_subclass(Tensor)
        if not bitcast:
            return plain.to(dtype).as_subclass(Value)
        if plain.dtype == torch.float32:
            return (plain.view(torch.int32).long() & WORD).as_subclass(Value)
        if dtype == torch.bfloat16:
            return plain.to(torch.int16).view(dtype).as_subclass(Value)
        return plain.to(torch.int32).view(dtype).as_subclass(Value)


def value(tensor: Any) -> Any:
    return torch.as_tensor(tensor).as_subclass(Value)


@dataclass
class Pointer:
    data: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + getattr(offset, "value", offset))

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask of one shape; what is not masked lies inside."""
        offset, mask = torch.broadcast_tensors(
            *(torch.as_tensor(each).as_subclass(Tensor) for each in (self.offset, mask))
        )
        assert not (mask & ((offset < 0) | (offset >= len(self.data)))).any(), "out of bounds"
        return torch.where(mask, offset, 0), mask


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    offset, mask = pointer.places(mask)
    return value(torch.where(mask, pointer.data[offset], other).to(pointer.data.dtype))


def store(pointer: Pointer, values: Tensor, mask: Any = True) -> None:
    offset, mask = pointer.places(mask)
    pointer.data[offset[mask]] = values.as_subclass(Tensor).expand(offset.shape)[mask]


class Slots:
    """Shared memory: an array of buffers."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, at: Any) -> Slots:
        return Slots(self.data[int(at)])

    def permute(self, order: tuple[int, ...]) -> Slots:
        return Slots(self.data.permute(order))

    def load(self, _: object) -> Any:
        return value(self.data.clone())


class Copies:
    """cp.async: groups arrive in order, at the latest when they are waited for."""

    def __init__(self) -> None:
        self.groups: list[list[Callable[[], None]]] = [[]]

    def async_load(self, slots: Slots, pointer: Pointer, mask: Any = True) -> None:
        offset, mask = pointer.places(mask)
        assert offset.shape == slots.data.shape
        values = pointer.data[offset]
        # It may arrive at any time from now on, so what stood there is lost.
        slots.data[mask] = 0xFF if slots.data.dtype == torch.uint8 else float("nan")

        def arrive() -> None:
            slots.data[mask] = values[mask]

        self.groups[-1].append(arrive)

    def commit_group(self) -> None:
        self.groups.append([])

    def wait_group(self, pending: int) -> None:
        while len(self.groups) - 1 > pending:
            for arrive in self.groups.pop(0):
                arrive()


class Products:
    """wgmma: each reads its operands when it is waited for, in order."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Slots, Tensor]] = []

    def start(self, a: Tensor, b: Slots, total: Tensor, *, is_async: bool) -> Any:
        assert is_async
        self.queue.append((a, b, total))
        return total

    def wait(self, pending: int, *, deps: list[Any]) -> Any:
        while len(self.queue) > pending:
            a, b, total = self.queue.pop(0)
            total += a.float() @ b.data.float()
        return deps[0] if len(deps) == 1 else tuple(deps)


COPIES, PRODUCTS = Copies(), Products()


def float_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.float().view(torch.int32).long() & WORD


def narrow_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """16 bits of x in a dtype of 16 bits."""
    return x.to(dtype).view(torch.int16).long() & 0xFFFF


def low(x: Tensor) -> Tensor:
    """float32 of the bf16 in the low half."""
    return float_of((x & 0xFFFF) << 16)


def e4m3_bits(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).long()


def e4m3_to_half(codes: Tensor) -> Tensor:
    values = (codes & 255).to(torch.uint8).view(torch.float8_e4m3fn)
    return narrow_bits(values.float(), torch.float16)


def multiply_bf16(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    assert (c == 0x80008000).all()  # -0 keeps the sign of a zero product
    parts = [narrow_bits(low(a >> n) * low(b >> n), torch.bfloat16) for n in (0, 16)]
    return parts[0] | parts[1] << 16


# What an instruction makes of its operands' bits; rounded where the GPU may be a few steps off.
PTX: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & WORD,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: a & b | c if int(table) == 0xEA else NotImplemented,
    "fma.rn.bf16x2": multiply_bf16,
    "mul.f32": lambda a, b: bits_of(float_of(a) * float_of(b)),
    "add.f32": lambda a, b: bits_of(float_of(a) + float_of(b)),
    "ex2.approx.ftz.f32": lambda a: bits_of(float_of(a).exp2()),
    "rcp.approx.ftz.f32": lambda a: bits_of(1 / float_of(a)),
    "cvt.rn.bf16x2.f32": lambda a, b: (
        narrow_bits(float_of(a), torch.bfloat16) << 16 | narrow_bits(float_of(b), torch.bfloat16)
    ),
    "cvt.rn.satfinite.e4m3x2.f32": lambda a, b: (
        e4m3_bits(float_of(a)) << 8 | e4m3_bits(float_of(b))
    ),
    "cvt.rn.f16x2.e4m3x2": lambda a: e4m3_to_half(a >> 8) << 16 | e4m3_to_half(a),
    "cvt.f32.f16": lambda a: bits_of(a.to(torch.int16).view(torch.float16)),
}


def run_ptx(text: str, registers: dict[str, Tensor]) -> None:
    """Fill the registers that a block of instructions writes."""

    def read(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.tensor(int(operand.removeprefix("0f"), 16 if operand[:1] == "0" else 10))

    for line in text.strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name.startswith(".reg") or not name:
            continue
        target, *sources = (part.strip() for part in re.findall(r"\{[^}]*\}|[^,{]+", operands))
        result = PTX[name](*map(read, sources))
        if target.startswith("{"):
            halves = (part.strip() for part in target.strip("{}").split(","))
            registers.update(zip(halves, (result & 0xFFFF, result >> 16), strict=True))
        else:
            registers[target] = result


def inline_asm(
    text: str, constraints: str, args: list[Tensor], dtype: Any, *, is_pure: bool, pack: int
) -> Any:
    """A block of PTX for every ``pack`` elements, neighbours packed into registers of 32 bits."""
    assert is_pure
    outputs = dtype if isinstance(dtype, tuple) else (dtype,)
    args = [arg.contiguous() for arg in torch.broadcast_tensors(*args)]
    registers: dict[str, Tensor] = {}
    counts = [max(pack * each.itemsize // 4, 1) for each in outputs]
    number = sum(counts)
    for arg in args:
        raw = arg.as_subclass(Tensor).view(torch.uint8).view(-1, pack * arg.element_size() // 4, 4)
        words = (raw.long() << torch.tensor([0, 8, 16, 24])).sum(-1)
        for word in words.unbind(-1):
            registers[f"${number}"] = word
            number += 1
    assert number == len(constraints.split(","))
    run_ptx(text, registers)
    results, number = [], 0
    for each, count in zip(outputs, counts, strict=True):
        words = torch.stack([registers[f"${number + i}"] for i in range(count)], -1)
        raw = (words[..., None] >> torch.tensor([0, 8, 16, 24]) & 255).to(torch.uint8)
        results.append(value(raw.flatten().view(each).view(args[0].shape)))
        number += count
    return tuple(results) if isinstance(dtype, tuple) else results[0]


def compare(choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def chosen(a: Any, b: Any, propagate_nan: Any = None) -> Any:
        a = torch.as_tensor(a)
        return value(choose(a, torch.as_tensor(getattr(b, "value", b)).to(a.dtype)))

    return chosen


def where(condition: Any, a: Any, b: Any) -> Any:
    return value(torch.where(torch.as_tensor(condition), a, b))


class Constant(int):
    """A compile-time integer; everything else is its own compile-time value."""

    @property
    def value(self) -> int:
        return int(self)


@dataclass
class Function:
    """What @gluon.jit makes: called by other functions, or launched over a grid."""

    body: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int | None, **constants: Any) -> None:
            assert num_warps == 8 and (maxnreg or 255) * 32 * num_warps <= 65536
            pointers = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in args]
            for PROGRAM[0] in range(grid[0]):
                COPIES.groups = [[]]
                self.body(*pointers, **constants)
                assert not PRODUCTS.queue, "the program ends before its products"

        return launch


class Layout(SimpleNamespace):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(value=self)


def language() -> ModuleType:
    gl = ModuleType("gl")
    layouts = "Blocked", "Slice", "DistributedLinear", "DotOperand", "NVMMADistributed"
    shared = "SwizzledShared", "NVMMAShared"
    vars(gl).update({f"{name}Layout": Layout for name in (*layouts, *shared)})
    vars(gl).update(
        constexpr=lambda each: Constant(each) if isinstance(each, int) else each,
        pointer_type=lambda _: "pointer",
        uint8=torch.uint8,
        uint16=torch.int32,
        uint32=torch.int64,
        int32=torch.int32,
        int64=torch.int64,
        bfloat16=torch.bfloat16,
        float32=torch.float32,
        allocate_shared_memory=lambda dtype, shape, _: Slots(
            torch.full(shape, 0xFF if dtype == torch.uint8 else float("nan"), dtype=dtype)
        ),
        program_id=lambda _: value(PROGRAM[0]),
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        arange=lambda start, end, _: value(torch.arange(start, end)),
        zeros=lambda shape, dtype, _: value(torch.zeros(shape, dtype=dtype)),
        convert_layout=lambda tensor, *_, **__: tensor,
        join=lambda a, b: value(torch.stack((a, b), -1)),
        multiple_of=lambda tensor, _: tensor,
        inline_asm_elementwise=inline_asm,
        where=where,
        minimum=compare(torch.minimum),
        maximum=compare(torch.maximum),
        max=lambda tensor, axis: tensor.amax(axis),
        load=load,
        store=store,
    )
    return gl


def scale_exponent(amax: Tensor, limit: Any) -> Tensor:
    mantissa, exponent = torch.frexp(amax / limit.value)
    return exponent - (mantissa == 0.5).int()


@contextmanager
def emulated(*names: str) -> Iterator[list[ModuleType]]:
    """The modules of those names, each after what it imports, imported anew with Gluon emulated."""
    gl = language()
    hopper, gluon, ampere = ModuleType("hopper"), ModuleType("gluon"), ModuleType("ampere")
    vars(hopper).update(
        fence_async_shared=lambda: None,
        warpgroup_mma_init=lambda total: total,
        warpgroup_mma=PRODUCTS.start,
        warpgroup_mma_wait=PRODUCTS.wait,
    )
    vars(gluon).update(jit=Function, language=gl)
    vars(ampere).update(async_copy=COPIES)
    path = "triton.experimental.gluon"
    modules = {
        path: gluon,
        f"{path}.language": gl,
        f"{path}.language.nvidia.ampere": ampere,
        f"{path}.language.nvidia.hopper": hopper,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("triton.experimental"), "gluon", gluon, raising=False)
        for key, module in modules.items():
            patch.setitem(sys.modules, key, module)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        made = [import_module(name) for name in names]
        for module in made:
            patch.setattr(module, "scale_exponent", scale_exponent, raising=False)
            patch.setattr(
                module, "power_of_two", lambda e: value(torch.exp2(e.float())), raising=False
            )
        yield made
        for name in names:
            sys.modules.pop(name)
    MEMORY.clear()
