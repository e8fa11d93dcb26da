"""The RoPE kernels in the interpreter: alone, in place, and after the norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.streams import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.norm_rope import norm_rope
from v4surgery.kernels.reference.norm_rope import norm_rope as reference_norm_rope
from v4surgery.kernels.reference.rope import rope as reference
from v4surgery.kernels.rms_norm import rms_norm
from v4surgery.kernels.rope import rope, rotation_tile

NAN = float("nan")
SMALL = [case for case in CASES if case.op in ("rope", "norm_rope") and not case.real]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_case_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


def frequencies(pairs: int) -> Tensor:
    return 10000.0 ** -(torch.arange(pairs) / max(pairs, 1))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "pairs"), [((1, 3, 6), 3), ((2, 2, 5, 14), 4), ((1, 2, 2, 2, 8), 1)]
)
def test_rope_is_the_references(shape: tuple[int, ...], pairs: int, inverse: bool) -> None:
    x, positions = torch.randn(shape), torch.randint(0, 1_000_000, shape[:2])
    options = {"inverse": inverse}
    turned = rope(x, positions, frequencies(pairs), **options)
    expected = reference(x, positions, frequencies(pairs), **options)
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rope_keeps_the_bits_of_dims_that_it_does_not_turn() -> None:
    x = torch.randn(1, 2, 3, 12)
    x[..., :4] = torch.tensor([-0.0, float("inf"), NAN, 1e-45])
    for turned in (
        rope(x, torch.ones(1, 2, dtype=torch.int64), frequencies(4)),
        rope(x.clone(), torch.ones(1, 2, dtype=torch.int64), frequencies(4), inplace=True),
    ):
        assert torch.equal(turned[..., :4].view(torch.int32), x[..., :4].view(torch.int32))


@pytest.mark.parametrize("op", [rope, reference])
def test_rope_in_place_writes_the_rotated_dims_and_returns_its_argument(op: object) -> None:
    assert callable(op)
    base = torch.randn(2, 3, 4, 20).bfloat16()
    x, positions = base[..., 3:15], torch.randint(0, 99, (2, 3))
    before, expected = base.clone(), reference(x, positions, frequencies(3))
    assert op(x, positions, frequencies(3), inplace=True) is x
    assert torch.equal(x, expected)
    assert torch.equal(base[..., :9], before[..., :9])
    assert torch.equal(base[..., 15:], before[..., 15:])


def test_rope_in_place_refuses_rows_without_one_stride() -> None:
    x = torch.randn(3, 2, 4, 8).transpose(0, 1)
    with pytest.raises(UsageError, match="cannot be rotated in place") as caught:
        rope(x, torch.zeros(2, 3, dtype=torch.int64), frequencies(2), inplace=True)
    assert "contiguous" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 16), (2, 2, 6, 24), (1, 2, 32, 64)])
def test_norm_rope_is_the_norm_and_then_rope_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    positions = torch.randint(0, 5000, shape[:2])
    normed = rms_norm(x, weight, 1e-6)
    fused = norm_rope(x, weight, positions, frequencies(4), 1e-6)
    assert torch.equal(fused, rope(normed, positions, frequencies(4)))


def test_reference_norm_rope_rounds_in_between() -> None:
    x, positions = torch.randn(1, 9, 16).bfloat16(), torch.randint(0, 99, (1, 9))
    fused = reference_norm_rope(x, None, positions, frequencies(8), 1e-6)
    wide = reference_norm_rope(x.float(), None, positions, frequencies(8), 1e-6).bfloat16()
    assert not torch.equal(fused, wide)
    torch.testing.assert_close(fused, wide, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("heads", [1, 3, 16, 24, 64])
@pytest.mark.parametrize("size", [64, 128, 512, 8192])
def test_rotation_tile_loads_one_position_only_where_its_rows_are_of_one_token(
    size: int, heads: int
) -> None:
    block_m, _, _, positions = rotation_tile(size, heads)
    spans = {first // heads == (first + block_m - 1) // heads for first in range(0, 960, block_m)}
    assert positions == (1 if spans == {True} else block_m)


def test_rope_refuses_what_does_not_fit() -> None:
    x, positions = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UsageError, match="does not fit the frequencies"):
        rope(x, positions, frequencies(5))
    with pytest.raises(UsageError, match="does not fit the frequencies"):
        norm_rope(torch.randn(2, 3, 7), None, positions, frequencies(2), 1e-6)
    with pytest.raises(UsageError, match="positions has the wrong shape"):
        rope(x, positions[:1], frequencies(2))
    with pytest.raises(UsageError, match="positions has the wrong dtype"):
        rope(x, positions.int(), frequencies(2))
    with pytest.raises(UsageError, match="frequencies has the wrong dtype"):
        rope(x, positions, frequencies(2).double())
