"""The Hadamard rotation, interpreted: the shared cases, the reference's sums, edges and errors."""

from __future__ import annotations

import pytest
import torch

from v4surgery.errors import UsageError
from v4surgery.kernels import hadamard as module
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.formats import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.fp4_quant import fp4_quant_simulate
from v4surgery.kernels.hadamard import hadamard, hadamard_fp4
from v4surgery.kernels.reference import hadamard as reference

CPU = torch.device("cpu")
SMALL = [case for case in CASES if case.op.startswith("hadamard") and not case.real]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_rotation_is_within_its_bound(case: Case, implementation: str) -> None:
    result = check_case(case, Ops(implementation), CPU)
    assert result.passed, result


@pytest.mark.parametrize("part_width", [8, 16, 32])
@pytest.mark.parametrize("size", [2, 6, 64, 96, 128, 160])
def test_sums_are_the_references_however_a_row_is_cut(
    monkeypatch: pytest.MonkeyPatch, size: int, part_width: int
) -> None:
    monkeypatch.setattr(module, "PART_WIDTH", part_width)
    x = torch.randn(5, size)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(hadamard(x.to(dtype)), reference.hadamard(x.to(dtype)))
        fused = hadamard_fp4(x.to(dtype))
        assert torch.equal(fused, fp4_quant_simulate(hadamard(x.to(dtype))))
        assert torch.equal(fused, reference.hadamard_fp4(x.to(dtype)))


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (16,), (2, 0, 48)])
def test_few_rows_have_the_references_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert hadamard_fp4(x).shape == shape
    assert not x.numel() or torch.equal(hadamard(x), reference.hadamard(x))


def test_rows_of_a_wider_tensor_are_rotated() -> None:
    x = torch.randn(4, 3, 100)[..., 4:52]
    assert torch.equal(hadamard(x), reference.hadamard(x))


def test_wrong_arguments_are_refused_with_what_would_be_right() -> None:
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        hadamard(torch.zeros(4, 32, dtype=torch.float16))
    with pytest.raises(UsageError, match="rule: at most 4096"):
        hadamard(torch.zeros(1, 8192))
