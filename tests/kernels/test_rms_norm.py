"""The RMS norm kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.streams import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.reference.rms_norm import rms_norm as reference
from v4surgery.kernels.rms_norm import TILES, as_rows, rms_norm, row_tile

NAN = float("nan")
SMALL = [case for case in CASES if case.op in ("rms_norm",) and not case.real]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_case_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 513])
def test_rms_norm_of_any_row_size_is_the_references(size: int) -> None:
    x, weight = torch.randn(5, size), torch.randn(size)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference(x, weight, 1e-6))


def test_rms_norm_of_zeros_is_zero_and_of_nan_is_nan_in_its_row_only() -> None:
    x = torch.zeros(3, 24).bfloat16()
    x[1, 7] = NAN
    y = rms_norm(x, None, 1e-6)
    assert not y[0].any() and y[1].isnan().all() and not y[2].any()


def test_rms_norm_copies_no_rows_that_have_a_stride() -> None:
    wide = torch.randn(2, 3, 40)
    assert as_rows(wide[..., :16]).data_ptr() == wide.data_ptr()
    assert as_rows(wide.transpose(0, 1)).data_ptr() != wide.data_ptr()


@pytest.mark.parametrize("size", [1, 64, 256, 500, 4096, 16384, 40_000])
def test_row_tile_holds_a_row_and_a_warps_share_of_it(size: int) -> None:
    for is_small in (False, True):
        block_m, block_d, warps = row_tile(size, is_small=is_small)
        assert block_d >= size > block_d // 2
        assert block_m * block_d <= max(block_d, max(elements for _, elements, _ in TILES))
        assert warps in (1, 2, 4, 8, 16)


def test_rms_norm_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        rms_norm(torch.zeros(2, 8, dtype=torch.float16), None, 1e-6)
    with pytest.raises(UsageError, match="weight has the wrong shape"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(UsageError, match="weight has the wrong dtype"):
        rms_norm(torch.zeros(2, 8), torch.zeros(8, dtype=torch.int64), 1e-6)
