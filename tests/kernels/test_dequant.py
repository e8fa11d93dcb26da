"""Decoding weights, interpreted: the shared cases, formats.py, edges and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from v4surgery import formats
from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case, num_different
from v4surgery.kernels.cases.formats import CASES, every_fp4, every_fp8_tall
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dequant import dequant_fp4, dequant_fp8
from v4surgery.kernels.dispatch import Ops

# The largest scales overflow to infinity, as they should; numpy, which interprets, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CPU = torch.device("cpu")
SMALL = [case for case in CASES if case.op.startswith("dequant") and not case.real]
OUTPUTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of infinity, which no small case gives."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.inf)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_decoding_is_exact(case: Case) -> None:
    result = check_case(case, Ops("triton"), CPU)
    assert result.passed, result


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_reference_decoding_is_exact(case: Case) -> None:
    result = check_case(case, Ops(), CPU)
    assert result.passed, result


def as_tensor(decoded: np.ndarray) -> Tensor:
    if decoded.dtype == np.uint16:
        return torch.from_numpy(decoded.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(decoded)


@pytest.mark.parametrize("dtype", OUTPUTS)
def test_every_fp4_code_and_scale_is_that_of_the_numpy_formats(dtype: torch.dtype) -> None:
    weight, scale = every_fp4(CPU, torch.Generator())
    codes = formats.unpack_fp4(weight.numpy()).reshape(256, 16, 32)
    expected = formats.decode_fp4(codes, scale.numpy()[..., None], out=OUTPUTS[dtype])
    actual = dequant_fp4(weight, scale, dtype)
    assert num_different(actual, as_tensor(expected.reshape(256, 512))).passed


@pytest.mark.parametrize("dtype", OUTPUTS)
def test_every_fp8_code_and_scale_is_that_of_the_numpy_formats(dtype: torch.dtype) -> None:
    weight, scale = every_fp8_tall(CPU, torch.Generator())
    rows = (torch.arange(256)[:, None] * 128 + torch.arange(2)).flatten()
    spread = scale.numpy().repeat(2, 0).repeat(128, 1)
    expected = formats.decode_fp8(weight[rows].numpy(), spread, out=OUTPUTS[dtype])
    actual = dequant_fp8(weight, scale, dtype, rows=rows)
    assert num_different(actual, as_tensor(expected)).passed


def test_an_index_outside_the_matrix_gives_nan_and_disturbs_nothing_else() -> None:
    weight = torch.full((2, 3, 16), 0x22, dtype=torch.uint8)
    scale = torch.full((2, 3, 1), 127, dtype=torch.uint8)
    rows, cols = torch.tensor([2, 3, -1, 2**40]), torch.tensor([31, -1, 32, 2**40 + 1, 0])
    gathered = dequant_fp4(weight, scale, rows=rows)
    assert (gathered[:, 0] == 1).all() and gathered[:, 1:].isnan().all()
    gathered = dequant_fp4(weight, scale, rows=rows, cols=cols)
    assert (gathered[:, 0, [0, 4]] == 1).all() and gathered.isnan().sum() == 2 * (4 * 5 - 2)
    fp8 = torch.full((5, 7), 0x38, dtype=torch.uint8)
    gathered = dequant_fp8(fp8, scale[0, :1], rows=torch.tensor([4, 5]))
    assert (gathered[0] == 1).all() and gathered[1].isnan().all()


def test_strided_weights_are_decoded_as_their_copies() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(16, 16).T
    scale = torch.arange(96, 128, dtype=torch.uint8).view(2, 16).T[:, :1]
    expected = dequant_fp4(weight.contiguous(), scale.contiguous())
    assert torch.equal(dequant_fp4(weight, scale), expected)
    cols = torch.arange(10)[::3]
    assert torch.equal(dequant_fp4(weight, scale, cols=cols), expected[:, cols])


def test_wrong_arguments_are_refused_with_what_would_be_right() -> None:
    weight = torch.zeros(4, 16, dtype=torch.uint8)
    scale = torch.zeros(4, 1, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"weight has the wrong shape\n.*\n.*\n  rule: \(4, 32\)"):
        dequant_fp4(weight, scale.repeat(1, 2))
    with pytest.raises(UsageError, match=r"scale has the wrong shape\n.*\n.*\n  rule: \(1, 1\)"):
        dequant_fp8(weight, scale)
    with pytest.raises(UsageError, match="scale has the wrong dtype"):
        dequant_fp4(weight, scale.float())
    with pytest.raises(UsageError, match="rule: float32 or bfloat16"):
        dequant_fp4(weight, scale, torch.float16)
    with pytest.raises(UsageError, match="rows has the wrong dtype"):
        dequant_fp4(weight, scale, rows=torch.tensor([True]))
    with pytest.raises(UsageError, match="cols has the wrong shape"):
        dequant_fp4(weight, scale, cols=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="a matrix or a stack of them"):
        dequant_fp4(weight[0], scale[0])
