"""Linears with a float32 result, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.linear import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.wide_linear import wide_linear

SMALL = [case for case in CASES if case.op == "wide_linear" and not case.real]


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_case_is_within_its_bound(case: Case, implementation: str) -> None:
    result = check_case(case, Ops(implementation), torch.device("cpu"))
    assert result.passed, result


def test_an_input_rounded_to_bf16_would_be_out_of_bounds() -> None:
    x, weight = torch.randn(6, 40), torch.randn(17, 40)
    case = next(case for case in SMALL if case.label == "float32")
    assert case.check(wide_linear(x, weight), (x, weight), {}).passed
    assert not case.check(wide_linear(x.bfloat16(), weight), (x, weight), {}).passed


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), "x has the wrong shape"),
        (torch.ones(2, 5).half(), torch.ones(4, 5), "x has the wrong dtype"),
        (torch.ones(2, 5), torch.ones(4, 5).byte(), "weight has the wrong dtype"),
    ],
)
def test_wrong_arguments_are_refused(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wide_linear(x, weight)
