"""Quantizing activations to FP8, interpreted: the shared cases, recorded results, edges, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.act_quant import act_quant, act_quant_simulate
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.formats import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.reference import act_quant as reference

# Infinities and NaN are computed with; numpy, which interprets, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "data" / "ops.safetensors"
SMALL = [case for case in CASES if case.op.startswith("act_quant") and not case.real]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of a value that is no small case's."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(0xAB))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_quantization_is_exact(case: Case) -> None:
    result = check_case(case, Ops("triton"), CPU)
    assert result.passed, result


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_reference_quantization_is_exact(case: Case) -> None:
    result = check_case(case, Ops(), CPU)
    assert result.passed, result


def test_recorded_codes_and_scales_are_identical(recorded: dict[str, Tensor]) -> None:
    codes, scales = act_quant(recorded["act128.x"])
    assert torch.equal(codes, recorded["act128.q"])
    assert torch.equal(scales, recorded["act128.s"])


@pytest.mark.parametrize("inplace", [False, True])
def test_recorded_rounding_is_identical(recorded: dict[str, Tensor], inplace: bool) -> None:
    x = recorded["act128.x"].clone()
    y = act_quant_simulate(x, 64, inplace=inplace)
    assert torch.equal(y, recorded["act64_inplace.y"])
    assert (y is x) == inplace and torch.equal(x, y if inplace else recorded["act128.x"])


def test_a_group_with_nan_or_infinity_is_all_nan() -> None:
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[0, 130], x[1, 5] = torch.nan, -torch.inf
    for implementation in (act_quant, reference.act_quant):
        codes, scales = implementation(x)
        assert scales.tolist() == [[119, 255], [255, 119]]
        assert (codes[0, 128:] == 0x7F).all() and (codes[1, :128] == 0x7F).all()
    for rounded in (act_quant_simulate(x, 128), reference.act_quant_simulate(x, 128)):
        assert rounded[0, 128:].isnan().all() and rounded[1, :128].isnan().all()
        assert (rounded[0, :128] == 1).all() and (rounded[1, 128:] == 1).all()


@pytest.mark.parametrize("num_cols", [0, 5, 64, 100])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_a_wider_tensor_are_rounded_where_they_lie(num_cols: int, inplace: bool) -> None:
    wide = torch.randn(3, 2, 150)
    before, x = wide.clone(), wide[..., 20:120]
    expected = reference.act_quant_simulate(x.clone(), 32, num_cols=num_cols)
    y = act_quant_simulate(x, 32, num_cols=num_cols, inplace=inplace)
    assert torch.equal(y, expected) and torch.equal(act_quant(x)[0], reference.act_quant(x)[0])
    if inplace:
        before[..., 20:120] = expected
    assert torch.equal(wide, before)


def test_columns_that_pass_do_not_change_the_scale_of_those_that_are_rounded() -> None:
    x = torch.ones(1, 64)
    x[0, 40:] = 1e30
    y = act_quant_simulate(x, 64, num_cols=40)
    assert torch.equal(y, x)


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (2, 0, 70), (1,), (129,)])
def test_no_tokens_and_a_single_row_have_the_references_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for ours, theirs in zip(act_quant(x), reference.act_quant(x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(act_quant_simulate(x), reference.act_quant_simulate(x))


def test_wrong_arguments_are_refused_with_what_would_be_right() -> None:
    x = torch.zeros(4, 6, 64)
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        act_quant(x.half())
    with pytest.raises(UsageError, match="rule: a power of two up to 2048"):
        act_quant(x, 96)
    with pytest.raises(UsageError, match="rule: 0 to 64"):
        act_quant_simulate(x, num_cols=65)
    with pytest.raises(UsageError, match="rule: rows evenly spaced, each contiguous"):
        act_quant_simulate(x.transpose(0, 1), inplace=True)
