"""The pooling kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.streams import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.compressor_pool import compressor_pool
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.reference.compressor_pool import compressor_pool as reference

NAN = float("nan")
SMALL = [case for case in CASES if case.op in ("compressor_pool",) and not case.real]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_case_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ratio", [1, 3, 4, 12])
def test_pool_is_the_references(ratio: int, overlap: bool) -> None:
    kv, gate = torch.randn(2, 3, ratio, 10), torch.randn(2, 3, ratio, 10) * 5
    gate[0, 0, :, :5] = -torch.inf if overlap else 0
    pooled = compressor_pool(kv, gate, overlap=overlap)
    torch.testing.assert_close(pooled, reference(kv, gate, overlap=overlap))


def test_pool_ignores_tokens_without_weight_and_reads_any_strides() -> None:
    kv, gate = torch.randn(5, 2, 1, 8).transpose(0, 2), torch.randn(5, 2, 1, 8).transpose(0, 2)
    gate[:, :, 3:] = -torch.inf
    expected = reference(kv[:, :, :3], gate[:, :, :3], overlap=False)
    torch.testing.assert_close(compressor_pool(kv, gate, overlap=False), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_pool_of_nothing_but_minus_infinity_is_nan_in_that_channel_only() -> None:
    kv, gate = torch.randn(1, 2, 3, 5), torch.zeros(1, 2, 3, 5)
    gate[0, 1, :, 2] = -torch.inf
    is_nan = compressor_pool(kv, gate, overlap=False).isnan()
    assert torch.equal(is_nan, reference(kv, gate, overlap=False).isnan())
    assert is_nan.sum() == 1


@pytest.mark.parametrize(("windows", "entries"), [(0, 0), (1, 0), (2, 1)])
def test_pool_of_few_windows_has_the_references_shape(windows: int, entries: int) -> None:
    x = torch.zeros(2, windows, 4, 6)
    pooled = compressor_pool(x, x, overlap=True)
    assert pooled.shape == reference(x, x, overlap=True).shape == (2, entries, 3)


def test_pool_refuses_what_is_not_windows() -> None:
    with pytest.raises(UsageError, match="gate has the wrong shape"):
        compressor_pool(torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 3), overlap=True)
    with pytest.raises(UsageError, match="kv has the wrong dtype"):
        half = torch.zeros(1, 2, 4, 6).bfloat16()
        compressor_pool(half, half, overlap=True)
    with pytest.raises(UsageError, match="not windows of tokens"):
        compressor_pool(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5), overlap=True)
