"""FP4 linears: the grouped kernel of one expert, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.experts import CASES, make_linear
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.fp4_linear import fp4_linear
from v4surgery.kernels.reference.fp4_linear import fp4_linear as reference

GOLDEN = Path(__file__).parents[1] / "data" / "ops.safetensors"
SMALL = [case for case in CASES if case.op == "fp4_linear" and not case.real]


def random_linear(tokens: int, out: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    args, _ = make_linear(
        tokens, out, inputs, torch.device("cpu"), torch.Generator().manual_seed(2)
    )
    x, weight, scale = args
    return x, weight, scale


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_fp4_linears_are_within_their_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_fp4_linears_are_within_1e_3(name: str) -> None:
    """The first rows of what the official kernel computed; sums in another order may round."""
    recorded = load_file(GOLDEN)
    x = recorded[f"fp8_{name}.x"][:17]
    weight, scale = recorded[f"fp4_{name}.w"][:128], recorded[f"fp4_{name}.ws"][:128]
    expected = recorded[f"fp4_{name}.out"][:17, :128]
    assert relative_error(fp4_linear(x, weight, scale), expected) < 1e-3


def test_fp4_linear_equals_the_reference_but_for_a_rounding_now_and_then() -> None:
    x, weight, scale = random_linear(9, 40, 160)
    different = fp4_linear(x, weight, scale) != reference(x, weight, scale)
    assert different.float().mean() < 0.01


def test_fp4_linear_keeps_leading_axes() -> None:
    x, weight, scale = random_linear(6, 16, 64)
    folded = fp4_linear(x.view(2, 3, 64), weight, scale)
    assert torch.equal(folded, fp4_linear(x, weight, scale).view(2, 3, 16))


def test_a_scale_of_255_makes_its_output_nan_and_no_other() -> None:
    x, weight, scale = random_linear(3, 16, 64)
    scale[5, 1] = 255
    is_nan = fp4_linear(x, weight, scale).isnan()
    assert is_nan[:, 5].all() and is_nan.sum() == 3


def test_fp4_linear_refuses_what_does_not_fit() -> None:
    x, weight, scale = random_linear(2, 16, 64)
    with pytest.raises(UsageError, match="weight has the wrong shape"):
        fp4_linear(x, weight[:, :16], scale)
    with pytest.raises(UsageError, match="scale has the wrong dtype"):
        fp4_linear(x, weight, scale.float())
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        fp4_linear(x.float(), weight, scale)
