"""The experts: kernels in the interpreter, the Hopper kernels on whole tensors."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import gluon_tensors
from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.experts import (
    CASES,
    UNTOUCHED,
    Layer,
    check_experts,
    make_experts,
    random_matrix,
)
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.expert_rows import permute_rows, sort_slots
from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.kernels.experts import combine_experts, experts, swiglu
from v4surgery.kernels.reference import experts as reference
from v4surgery.kernels.reference.act_quant import act_quant_simulate

OPERATIONS = ("experts", "combine_experts", "swiglu")
SMALL = [case for case in CASES if case.op in OPERATIONS and not case.real]
CPU = torch.device("cpu")
FILES = ("grouped_linear_hopper", "experts_hopper")


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of NaN, or of large numbers."""
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 0x7B)

    monkeypatch.setattr(torch, "empty", full_of_nan)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}, {case.label}")
def test_experts_are_within_their_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), CPU)
    assert result.passed, result


@pytest.mark.parametrize("case", SMALL[::4], ids=lambda case: f"{case.op}, {case.label}")
def test_the_reference_of_experts_is_within_the_same_bound(case: Case) -> None:
    result = check_case(case, Ops(), CPU)
    assert result.passed, result


def differing(actual: Tensor, expected: Tensor) -> float:
    return (actual != expected).double().mean().item()


@pytest.mark.parametrize(("format_", "official"), [("fp4", True), ("fp8", True), ("bf16", False)])
def test_experts_equal_the_reference_but_for_a_rounding_now_and_then(
    format_: str, official: bool
) -> None:
    layer = Layer(5, 3, 2, 64, 32, format_, official)
    args, kwargs = make_experts(layer, CPU, generator())
    assert differing(experts(*args, **kwargs), reference.experts(*args, **kwargs)) < 0.01


def test_experts_that_come_in_batches_fill_one_buffer() -> None:
    (x, indices, weights, *matrices), kwargs = make_experts(
        Layer(5, 3, 2, 64, 32), CPU, generator()
    )
    whole = experts(x, indices, weights, *matrices, **kwargs)
    out = torch.full_like(whole, UNTOUCHED)
    for batch in ({0, 2}, {1}):
        parts = [
            ExpertWeights(
                [m if e in batch else None for e, m in enumerate(w.matrices)], w.in_features
            )
            for w in matrices
        ]
        assert experts(x, indices, weights, *parts, **kwargs, out=out) is out
    assert torch.equal(out, whole)


def test_experts_without_any_matrix_leave_the_buffer_alone() -> None:
    nowhere = [ExpertWeights([None, None], 64), ExpertWeights([None, None], 32)]
    x, indices = torch.randn(3, 64).bfloat16(), torch.zeros(3, 1, dtype=torch.int64)
    args = (x, indices, torch.ones(3, 1), nowhere[0], nowhere[1], nowhere[0])
    assert not experts(*args, limit=10.0, official=True).any()
    assert not reference.experts(*args, limit=10.0, official=True).any()


def test_experts_take_activations_that_lie_scattered() -> None:
    (x, *rest), kwargs = make_experts(Layer(4, 2, 1, 64, 32), CPU, generator())
    wide = torch.randn(4, 128).bfloat16()
    wide[:, ::2] = x
    assert torch.equal(experts(wide[:, ::2], *rest, **kwargs), experts(x, *rest, **kwargs))


def test_nan_of_one_token_reaches_no_other() -> None:
    (x, *rest), kwargs = make_experts(Layer(5, 2, 2, 64, 32), CPU, generator())
    clean = experts(x, *rest, **kwargs)
    x[2, 7] = float("nan")
    spoiled = experts(x, *rest, **kwargs)
    assert spoiled[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(spoiled[others], clean[others])


def test_combine_experts_adds_in_the_order_of_experts() -> None:
    # 2^24 + 1 loses the one, 1 + 1 + 2^24 does not: the order shows.
    slots = torch.tensor([[[2.0**24], [1.0], [1.0]]])
    shared = torch.zeros(1, 1)
    for indices, total in (([5, 1, 2], 2.0**24 + 2), ([0, 1, 2], 2.0**24)):
        for op in (combine_experts, reference.combine_experts):
            assert op(slots, torch.tensor([indices]), shared).item() == total


def test_swiglu_lets_nan_and_the_clamps_through() -> None:
    gate = torch.tensor([[float("nan"), 1.0, 50.0, -50.0, 1.0]])
    up = torch.tensor([[1.0, float("nan"), 1.0, 1.0, -50.0]])
    actual, expected = swiglu(gate, up, 10.0), reference.swiglu(gate, up, 10.0)
    assert actual.isnan().tolist() == [[True, True, False, False, False]]
    assert torch.allclose(actual[:, 2:], expected[:, 2:], rtol=1e-6)


# Sorting


def test_sort_slots_is_a_stable_sort_cut_into_tiles(poisoned: None) -> None:
    indices = torch.randint(0, 5, (11, 3), generator=generator())
    present = torch.tensor([7, 0, 7, 7, 7])
    rows = sort_slots(indices, present, 4)
    flat = indices.flatten()
    assert torch.equal(rows.slots.long(), flat.argsort(stable=True))
    counts = flat.bincount(minlength=5).tolist()
    expected, begin = [], 0
    for expert, count in enumerate(counts):
        end = begin + count
        if present[expert]:
            expected += [[expert, first, end] for first in range(begin, end, 4)]
        begin = end
    assert rows.tiles[: len(expected)].tolist() == expected
    assert (rows.tiles[len(expected) :, 0] == -1).all()


@pytest.mark.parametrize("num_experts", [1, 3, 10])
def test_the_table_of_tiles_has_room_for_the_worst_case(num_experts: int) -> None:
    for num_slots in (1, 4, 13):
        indices = torch.arange(num_slots)[:, None] % num_experts
        rows = sort_slots(indices, torch.ones(num_experts, dtype=torch.int64), 4)
        counts = indices.flatten().bincount(minlength=num_experts)
        assert (rows.tiles[:, 0] >= 0).sum() == ((counts + 3) // 4).sum()


@pytest.mark.parametrize("quantize", [True, False])
def test_permute_rows_moves_inputs_to_their_places(quantize: bool) -> None:
    x = torch.randn(3, 256, generator=generator()).bfloat16()
    expected = act_quant_simulate(x, 128) if quantize else x
    # Input 32 q + 8 w + 4 c + 2 t + h stands at 32 w + 16 t + 8 h + 2 q + c.
    in_order = expected.view(3, 2, 4, 4, 2, 2, 2).permute(0, 1, 3, 5, 6, 2, 4).reshape(3, 256)
    assert torch.equal(permute_rows(x, quantize=quantize), in_order)


# Hopper


@pytest.fixture
def hopper() -> Iterator[ModuleType]:
    with gluon_tensors.emulated(*(f"v4surgery.kernels.{name}" for name in FILES)) as modules:
        yield modules[-1]


def run_hopper(
    hopper: ModuleType, layer: Layer, tile_rows: int
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    args, kwargs = make_experts(layer, CPU, generator())
    x, indices, weights, *matrices = args
    for each in matrices:
        stored = (tensor for matrix in each.present for tensor in matrix)
        gluon_tensors.MEMORY.update({t.data_ptr(): t.view(-1) for t in stored})
    out = kwargs.get("out", torch.full((*indices.shape, layer.hidden), torch.nan).bfloat16())
    rows = sort_slots(indices, matrices[0].addresses[0], tile_rows)
    assert hopper.serves(x, matrices[0])
    y = out.view(-1, layer.hidden)
    hopper.run_experts(y, x, rows, weights.flatten(), tuple(matrices), 10.0, layer.official)
    return out, args, kwargs


@pytest.mark.parametrize(
    ("layer", "tile_rows"),
    [
        (Layer(9, 3, 2, 256, 128), 16),
        (Layer(3, 1, 1, 1024, 128), 16),
        (Layer(36, 2, 1, 128, 128), 32),
        (Layer(20, 2, 2, 384, 128, official=False), 16),
        (Layer(9, 4, 2, 128, 128, absent=(1, 3)), 64),
    ],
)
def test_hopper_experts_are_within_their_bound(
    hopper: ModuleType, layer: Layer, tile_rows: int
) -> None:
    out, args, kwargs = run_hopper(hopper, layer, tile_rows)
    verdict = check_experts(layer, out, args, kwargs)
    assert verdict.passed, verdict
    kwargs.pop("out", None)
    expected = reference.experts(*args, **kwargs)
    is_present = ~torch.isin(args[1], torch.tensor(layer.absent, dtype=torch.int64))
    assert differing(out[is_present], expected[is_present]) < 0.01


@pytest.mark.parametrize("byte", [0, 1, 100, 144])
def test_hopper_decodes_every_code_with_every_scale_that_bf16_can_hold(
    hopper: ModuleType, byte: int
) -> None:
    codes = torch.arange(128 * 64).to(torch.uint8).view(128, 64)
    scale = torch.full((128, 4), byte, dtype=torch.uint8)
    decode = sys_module(hopper, "decode")
    values = decode(gluon_tensors.value(codes), gluon_tensors.value(scale), None)
    dense = reference_decode(codes, scale).double() * 2.0**-16
    in_order = dense.view(128, 4, 4, 2, 2, 2).permute(0, 2, 4, 5, 1, 3).reshape(128, 128)
    assert torch.equal(values.double().as_subclass(Tensor), in_order.bfloat16().double())


@pytest.mark.parametrize("byte", [145, 254, 255])
def test_hopper_scales_beyond_bf16_give_nan(hopper: ModuleType, byte: int) -> None:
    codes = torch.zeros(128, 64, dtype=torch.uint8)
    scale = torch.full((128, 4), byte, dtype=torch.uint8)
    decode = sys_module(hopper, "decode")
    assert decode(gluon_tensors.value(codes), gluon_tensors.value(scale), None).isnan().all()


def sys_module(hopper: ModuleType, name: str) -> Any:
    """A function of grouped_linear_hopper as ``hopper`` imported it."""
    return hopper.multiply_pair.body.__globals__[name]


def reference_decode(codes: Tensor, scale: Tensor) -> Tensor:
    from v4surgery.kernels.reference.dequant import dequant_fp4

    return dequant_fp4(codes, scale)


@pytest.mark.parametrize(
    ("hidden", "inner", "format_", "dtype", "serves"),
    [
        (256, 128, "fp4", torch.bfloat16, True),
        (96, 128, "fp4", torch.bfloat16, False),
        (128, 96, "fp4", torch.bfloat16, False),
        (128, 128, "fp8", torch.bfloat16, False),
        (128, 128, "fp4", torch.float32, False),
    ],
)
def test_hopper_takes_fp4_of_whole_blocks_in_bf16(
    hidden: int, inner: int, format_: str, dtype: torch.dtype, serves: bool
) -> None:
    from v4surgery.kernels import experts_hopper

    w1 = ExpertWeights(random_matrix(format_, 1, inner, hidden, CPU, generator()), hidden)
    assert experts_hopper.serves(torch.zeros(1, hidden, dtype=dtype), w1) is serves


# Errors


def test_matrices_tell_their_format() -> None:
    for format_ in ("fp4", "fp8", "fp8_f32", "bf16", "float32"):
        weights = ExpertWeights(random_matrix(format_, 2, 64, 96, CPU, generator()), 96)
        assert weights.format == format_.split("_")[0] and weights.out_features == 64


def test_addresses_are_those_of_the_tensors_and_0_for_none() -> None:
    (weight, scale), (other, _) = random_matrix("fp4", 2, 16, 64, CPU, generator())
    weights = ExpertWeights([(weight, scale), None, (other, scale)], 64)
    expected = [[weight.data_ptr(), 0, other.data_ptr()], [scale.data_ptr(), 0, scale.data_ptr()]]
    assert weights.addresses.tolist() == expected


def test_a_matrix_that_does_not_begin_at_16_bytes_is_copied() -> None:
    buffer = torch.zeros(16 * 32 + 16, dtype=torch.uint8)
    odd = -buffer.data_ptr() % 16 + 1
    weight = buffer[odd : odd + 16 * 32].view(16, 32)
    weights = ExpertWeights([(weight, torch.zeros(16, 2, dtype=torch.uint8))], 64)
    assert weights.addresses[0].item() % 16 == 0
    assert torch.equal(weights.present[0][0], weight)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: [m[0], (m[1][0][:8], m[1][1][:8])], "experts differ"),
        (lambda m: [(m[0][0].T, m[0][1])], "experts lie scattered"),
        (lambda m: [(m[0][0], m[0][1][:, :1].contiguous())], "scales of the wrong shape"),
        (lambda m: [(m[0][0], None)], "no known format"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(spoil: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExpertWeights(spoil(random_matrix("fp4", 2, 16, 64, CPU, generator())), 64)


def test_experts_refuse_what_does_not_fit() -> None:
    args, kwargs = make_experts(Layer(3, 2, 1, 64, 32), CPU, generator())
    x, indices, weights, w1, w2, w3 = args
    with pytest.raises(UsageError, match="w2 has the wrong shape"):
        experts(x, indices, weights, w1, w1, w3, **kwargs)
    with pytest.raises(UsageError, match="w3 and w1 differ"):
        experts(x, indices, weights, w1, w2, ExpertWeights([None, None], 64), **kwargs)
    with pytest.raises(UsageError, match="x has the wrong dtype"):
        experts(x.float(), indices, weights, w1, w2, w3, **kwargs)
    with pytest.raises(UsageError, match="indices has the wrong dtype"):
        experts(x, indices.int(), weights, w1, w2, w3, **kwargs)
    with pytest.raises(UsageError, match="out has the wrong shape"):
        experts(x, indices, weights, w1, w2, w3, **kwargs, out=torch.zeros(3, 64).bfloat16())
