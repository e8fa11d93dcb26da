"""Rounding activations to FP4, interpreted: the shared cases, recorded results, edges, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.formats import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.fp4_quant import fp4_quant_simulate
from v4surgery.kernels.reference.fp4_quant import fp4_quant_simulate as reference

# Infinities and NaN are computed with; numpy, which interprets, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "data" / "ops.safetensors"
SMALL = [case for case in CASES if case.op == "fp4_quant_simulate" and not case.real]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of a value that is no small case's."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(0xAB))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_rounding_is_exact(case: Case, implementation: str) -> None:
    result = check_case(case, Ops(implementation), CPU)
    assert result.passed, result


def test_recorded_rounding_is_identical() -> None:
    recorded = load_file(GOLDEN)
    assert torch.equal(fp4_quant_simulate(recorded["act128.x"]), recorded["fp4_inplace.y"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_the_references_from_subnormals_to_the_largest(dtype: torch.dtype) -> None:
    sizes = torch.exp2(torch.linspace(-149, 126, 300))[:, None]
    x = (torch.randn(300, 32) * sizes).to(dtype)
    expected = reference(x)
    assert torch.equal(fp4_quant_simulate(x), expected)
    assert torch.equal(fp4_quant_simulate(x).signbit(), expected.signbit())


def test_a_group_with_nan_or_infinity_is_all_nan() -> None:
    x = torch.ones(2, 64)
    x[0, 33], x[1, 5] = torch.nan, torch.inf
    for rounded in (fp4_quant_simulate(x), reference(x)):
        assert rounded[0, 32:].isnan().all() and rounded[1, :32].isnan().all()
        assert (rounded[0, :32] == 1).all() and (rounded[1, 32:] == 1).all()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (5,), (2, 1, 33)])
def test_few_values_have_the_references_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(fp4_quant_simulate(x), reference(x))


def test_rows_of_a_wider_tensor_need_no_copy() -> None:
    x = torch.randn(4, 3, 100)[..., 4:52]
    assert torch.equal(fp4_quant_simulate(x), reference(x))
    assert torch.equal(fp4_quant_simulate(x.transpose(0, 2)), reference(x.transpose(0, 2)))


def test_wrong_arguments_are_refused_with_what_would_be_right() -> None:
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        fp4_quant_simulate(torch.zeros(4, 32, dtype=torch.float16))
    with pytest.raises(UsageError, match="rule: a power of two up to 2048"):
        fp4_quant_simulate(torch.zeros(4, 32), 48)
