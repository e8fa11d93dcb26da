"""Encoding weights, interpreted: the shared cases, formats.py, edges and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from v4surgery import formats
from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case, num_different
from v4surgery.kernels.cases.formats import CASES, random_values
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dequant import dequant_fp4, dequant_fp8
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.quant import fp4_to_fp8, quant_fp4, quant_fp8
from v4surgery.kernels.reference import quant as reference_quant

# Infinities and NaN are computed with; numpy, which interprets, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CPU = torch.device("cpu")
OPERATIONS = ("quant_fp4", "quant_fp8", "fp4_to_fp8")
SMALL = [case for case in CASES if case.op in OPERATIONS and not case.real]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of a byte that is no small case's."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(0xAB))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_encoding_is_exact(case: Case) -> None:
    result = check_case(case, Ops("triton"), CPU)
    assert result.passed, result


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_reference_encoding_is_exact(case: Case) -> None:
    result = check_case(case, Ops(), CPU)
    assert result.passed, result


def values_of_every_size(*shape: int, special: bool = False) -> Tensor:
    """Bit patterns of every exponent in rows of their own, or anywhere, NaN and all."""
    generator = torch.Generator().manual_seed(4)
    if special:
        return random_values(*shape, dtype=torch.float32, special=True)(CPU, generator)
    sizes = torch.exp2(torch.linspace(-149, 126, shape[0]))[:, None]
    return torch.randn(shape, generator=generator) * sizes


@pytest.mark.parametrize("scale_dtype", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("special", [False, True])
def test_quant_fp8_is_that_of_the_numpy_formats(scale_dtype: str, special: bool) -> None:
    x = values_of_every_size(131, 130, special=special)
    actual = quant_fp8(x, scale_dtype)
    expected = formats.quantize_fp8(x.numpy(), scale_dtype)
    for ours, theirs in zip(actual, expected, strict=True):
        assert num_different(ours, torch.from_numpy(theirs)).passed


def test_quant_fp4_is_that_of_the_numpy_formats() -> None:
    x = values_of_every_size(300, 64)
    x[7, 3], x[8, 40] = torch.inf, -torch.inf
    for ours, theirs in zip(quant_fp4(x), formats.quantize_fp4(x.numpy()), strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs))


def test_quant_fp4_ties_go_to_the_even_code_and_zeros_keep_their_sign() -> None:
    x = torch.zeros(1, 32)
    x[0, :9] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0])
    packed, scale = quant_fp4(torch.cat((x, -x)))
    assert scale.tolist() == [[127], [127]]
    assert dequant_fp4(packed, scale)[0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, 0]
    assert packed[:, :5].tolist() == [
        [0x07, 0x22, 0x44, 0x66, 0x08],
        [0x8F, 0xAA, 0xCC, 0xEE, 0x80],
    ]


def test_a_group_with_nan_decodes_to_nan_and_its_neighbours_do_not() -> None:
    x = torch.ones(3, 96)
    x[1, 40], x[2, 0] = torch.nan, torch.inf
    packed, scale = quant_fp4(x)
    decoded = dequant_fp4(packed, scale)
    assert decoded[1, 32:64].isnan().all() and decoded.isnan().sum() == 32
    assert scale[1, 1] == 255 and not packed[1, 16:32].any()
    # Infinity takes the largest value under the scale of the finite ones: 6 * 2^-2.
    assert decoded[2, 0] == 1.5 and decoded[2, 1] == 1.0


def test_values_of_one_format_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(0, 256, (130, 32), dtype=torch.uint8, generator=generator)
    scale = torch.randint(120, 130, (130, 2), dtype=torch.uint8, generator=generator)
    weight[:, ::16] = 0x67  # a 6 in every group settles its scale
    values = dequant_fp4(weight, scale, torch.bfloat16)
    for ours, theirs in zip(quant_fp4(values), (weight, scale), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(dequant_fp8(*quant_fp8(values), torch.bfloat16), values)


@pytest.mark.parametrize(("spread", "changed"), [(14, 0), (15, 32)])
def test_fp4_to_fp8_is_lossless_through_a_spread_of_2_to_the_14(spread: int, changed: int) -> None:
    weight = torch.full((2, 32), 0x11, dtype=torch.uint8)
    weight[0, 0] = 0x17
    scale = torch.full((2, 2), 127 - spread, dtype=torch.uint8)
    scale[0] = 127
    codes, block_scale, num_changed = fp4_to_fp8(weight, scale)
    assert block_scale.tolist() == [[127 - 6]]
    # Halves of 2^-15 are ties at half the smallest code, and there are 64 of them.
    assert num_changed.tolist() == [[2 * changed]]
    same = dequant_fp8(codes, block_scale) == dequant_fp4(weight, scale)
    assert (~same).sum() == num_changed.sum()


def test_fp4_to_fp8_of_a_group_without_values_does_not_look_at_its_scale() -> None:
    weight = torch.full((1, 32), 0x77, dtype=torch.uint8)
    weight[0, 16:] = 0
    codes, block_scale, changed = fp4_to_fp8(weight, torch.tensor([[127, 0]], dtype=torch.uint8))
    assert block_scale.tolist() == [[121]] and changed.tolist() == [[0]]
    assert not codes[0, 32:].any()


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 3, 32), (2, 0, 32)])
def test_nothing_to_encode_gives_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    for ours, theirs in (
        (quant_fp8(x), reference_quant.quant_fp8(x)),
        (quant_fp4(x), reference_quant.quant_fp4(x)),
    ):
        assert [t.shape for t in ours] == [t.shape for t in theirs]
    weight, scale = quant_fp4(x)
    assert [t.numel() for t in fp4_to_fp8(weight, scale)] == [0, 0, 0]


def test_strided_values_are_encoded_as_their_copies() -> None:
    x = torch.randn(64, 40)
    for ours, theirs in zip(quant_fp8(x.T), quant_fp8(x.T.contiguous()), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(quant_fp4(x.T), quant_fp4(x.T.contiguous()), strict=True):
        assert torch.equal(ours, theirs)


def test_wrong_arguments_are_refused_with_what_would_be_right() -> None:
    x = torch.zeros(4, 40)
    with pytest.raises(UsageError, match="rule: a multiple of 32 columns"):
        quant_fp4(x)
    with pytest.raises(UsageError, match="rule: F8_E8M0 or F32"):
        quant_fp8(x, "F16")
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        quant_fp8(x.half())
    with pytest.raises(UsageError, match="a matrix or a stack of them"):
        quant_fp8(x[0])
    with pytest.raises(UsageError, match=r"weight has the wrong shape\n.*\n.*\n  rule: \(4, 16\)"):
        fp4_to_fp8(x.byte(), torch.zeros(4, 1, dtype=torch.uint8))
