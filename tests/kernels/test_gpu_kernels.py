"""Every shared case on a CUDA device, small and of real size: where the native paths run."""

from __future__ import annotations

import pytest
import torch

from v4surgery.kernels.cases import Case
from v4surgery.kernels.check import check_case, find_cases
from v4surgery.kernels.dispatch import OPERATIONS, Ops

pytestmark = pytest.mark.gpu

CASES = find_cases()


@pytest.fixture(autouse=True)
def _free_memory() -> None:
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.label}")
def test_kernel_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cuda"))
    assert result.passed, result


def test_every_operation_has_a_case_of_real_size() -> None:
    assert {case.op for case in CASES if case.real} == set(OPERATIONS)
