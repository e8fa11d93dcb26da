"""FP8 linears: the kernels in the interpreter, the Hopper kernel's roles as threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.kernels import gluon_emulator
from v4surgery.errors import UsageError
from v4surgery.kernels import fp8_linear as module
from v4surgery.kernels import launch
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.linear import BF16_BOUND, CASES, draw_weight, fp8_formula, quantized
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.fp8_linear import fp8_linear
from v4surgery.kernels.fp8_linear_few import multiply_few
from v4surgery.kernels.reference.fp8_linear import fp8_linear as reference

GOLDEN = Path(__file__).parents[1] / "data" / "ops.safetensors"
SMALL = [case for case in CASES if case.op == "fp8_linear" and not case.real]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random_linear(rows: int, num_out: int, num_in: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(rows, num_in, generator=g).bfloat16()
    return (x, *draw_weight(g, num_out, num_in, torch.uint8))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of NaN."""
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 0x7F)

    monkeypatch.setattr(torch, "empty", full_of_nan)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of the kernel for many tokens where it owns one: faster to interpret."""
    monkeypatch.setattr(module, "DECODED_TILE", (32, 64, 4, 2))


@pytest.mark.usefixtures("poisoned", "small_tiles")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_case_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_reference_is_within_the_bound_of_each_case(case: Case) -> None:
    result = check_case(case, Ops("reference"), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["fp8_a", "fp8_b"])
def test_golden_linear_is_within_1e_3(name: str) -> None:
    """The codes are identical; float32 sums in another order can move a bf16 rounding."""
    recorded = load_file(GOLDEN)
    x, weight, scale, out = (recorded[f"{name}.{part}"] for part in ("x", "w", "ws", "out"))
    assert relative_error(fp8_linear(x, weight, scale), out) < 1e-3


@pytest.mark.parametrize("rows", [3, 66])
def test_one_quantization_serves_several_linears(rows: int) -> None:
    x, weight, scale = random_linear(rows, 24, 200)
    shared = quantized(x)
    assert torch.equal(fp8_linear(shared, weight, scale), fp8_linear(x, weight, scale))
    assert torch.equal(reference(shared, weight, scale), reference(x, weight, scale))


@pytest.mark.parametrize("rows", [5, 66])
def test_nan_in_a_token_stays_in_that_token(rows: int) -> None:
    x, weight, scale = random_linear(rows, 20, 160)
    clean = fp8_linear(x, weight, scale)
    x[1, 140] = float("nan")
    y = fp8_linear(x, weight, scale)
    others = torch.arange(rows) != 1
    assert y[1].isnan().all() and torch.equal(y[others], clean[others])


def test_arguments_are_not_changed() -> None:
    x, weight, scale = random_linear(66, 20, 160)
    before = x.clone(), weight.clone(), scale.clone()
    fp8_linear(x, weight, scale)
    assert all(map(torch.equal, before, (x, weight, scale)))


# What is refused


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, w, s: (x[:, 1:], w, s), "x has the wrong shape"),
        (lambda x, w, s: (x.half(), w, s), "x has the wrong dtype"),
        (lambda x, w, s: (x, w.view(torch.int8), s), "weight has the wrong dtype"),
        (lambda x, w, s: (x, w, s[:1]), "scale has the wrong shape"),
        (lambda x, w, s: (x, w, s.half()), "scale has the wrong dtype"),
        (lambda x, w, s: ((x, x), w, s), "x has the wrong dtype"),
        (lambda _, w, s: ((w[:2], s.float()), w, s), "the scale of x has the wrong dtype"),
        (lambda _, w, s: ((w[:2], s[:, :1]), w, s), "the scale of x has the wrong shape"),
    ],
)
def test_wrong_arguments_are_refused(spoil: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        fp8_linear(*spoil(*random_linear(2, 140, 200)))
    assert message in str(caught.value) and "where: fp8_linear" in str(caught.value)


def test_without_a_gpu_or_the_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="Triton kernels need a GPU"):
        fp8_linear(*random_linear(1, 16, 128))


# Hopper


@pytest.fixture
def hopper() -> Iterator[ModuleType]:
    with gluon_emulator.emulated("v4surgery.kernels.fp8_linear_hopper") as emulated:
        emulated.num_multiprocessors = lambda _: 3
        yield emulated


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "stages"),
    [(300, 640, 400, 4), (130, 264, 144, 3), (66, 128, 128, 4), (257, 136, 1040, 2)],
)
def test_hopper_roles_agree_on_every_slot(
    hopper: ModuleType, rows: int, num_out: int, num_in: int, stages: int, halves: int
) -> None:
    """Several tiles a program, partial tiles, a partial group, the ring filled more than once."""
    x, weight, scale = random_linear(rows, num_out, num_in)
    scale = scale.float() if halves == 1 else scale
    y = torch.full((rows, num_out), float("nan"), dtype=torch.bfloat16)
    hopper.multiply_tiles(y, *quantized(x), weight, scale, halves, stages, 8)
    assert relative_error(y, fp8_formula(x, weight, scale)) < BF16_BOUND


def test_emulator_notices_a_slot_that_is_never_released(
    hopper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon_emulator, "SECONDS_TO_WAIT", 0.2)
    monkeypatch.setattr(hopper.mbarrier, "arrive", lambda *_, **__: None)
    x, weight, scale = random_linear(128, 256, 1280)
    y = torch.empty(128, 256, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="nobody completes"):
        hopper.multiply_tiles(y, *quantized(x), weight, scale, 2, 2, 8)


def test_hopper_tiles_are_narrow_where_wide_ones_leave_processors_idle(hopper: ModuleType) -> None:
    assert hopper.choose_halves(4096, 32768, 132) == 2
    assert hopper.choose_halves(4096, 1024, 132) == 2
    assert hopper.choose_halves(4096, 512, 132) == 1
    assert hopper.choose_halves(100, 4096, 132) == 1


@pytest.mark.parametrize(
    ("num_out", "num_in", "offset", "fits"),
    [(136, 144, 0, True), (132, 144, 0, False), (136, 136, 0, False), (136, 144, 8, False)],
)
def test_hopper_takes_rows_that_start_at_16_bytes(
    monkeypatch: pytest.MonkeyPatch, num_out: int, num_in: int, offset: int, fits: bool
) -> None:
    from v4surgery.kernels import fp8_linear_hopper

    x, weight, scale = random_linear(module.EXACT_TOKENS + 1, num_out, num_in)
    buffer = torch.zeros(weight.numel() + 64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16 + offset
    aligned = buffer[start : start + weight.numel()].view_as(weight).copy_(weight)
    ran: list[str] = []
    monkeypatch.setattr(launch, "capability", lambda _: module.HOPPER)
    monkeypatch.setattr(fp8_linear_hopper, "multiply", lambda *_: ran.append("hopper"))
    monkeypatch.setattr(module, "multiply_many", lambda *_: ran.append("any"))
    fp8_linear(quantized(x), aligned, scale)
    assert ran == ["hopper" if fits else "any"]


@pytest.mark.parametrize("block_n", [16, 32])
def test_few_tokens_give_the_same_bits_for_any_block_of_outputs(block_n: int) -> None:
    x, weight, scale = random_linear(2, 70, 200)
    y = torch.empty(2, 70, dtype=torch.bfloat16)
    multiply_few(y, x, None, weight, scale, False, block_n)
    assert torch.equal(y, fp8_linear(x, weight, scale))
