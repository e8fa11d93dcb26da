"""Routing: the kernel in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.experts import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.reference.routing import route as reference
from v4surgery.kernels.routing import SCORING, route

SMALL = [case for case in CASES if case.op == "route" and not case.real]
SETTINGS: dict[str, Any] = {
    "topk": 3,
    "scoring_func": "sqrtsoftplus",
    "normalise": True,
    "scaling": 1.5,
}


def logits_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)) * 3


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_routes_are_within_their_bound(case: Case, implementation: str) -> None:
    result = check_case(case, Ops(implementation), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.parametrize("scoring_func", SCORING)
def test_route_chooses_what_the_reference_chooses_best_first(scoring_func: str) -> None:
    settings = SETTINGS | {"scoring_func": scoring_func}
    logits, bias = logits_of(7, 20), logits_of(20) * 0.1
    indices, weights = route(logits, bias, None, **settings)
    expected, expected_weights = reference(logits, bias, None, **settings)
    assert indices.dtype == torch.int64 and torch.equal(indices, expected)
    assert torch.allclose(weights, expected_weights, rtol=4e-6)


def test_equal_scores_go_to_the_lower_experts() -> None:
    indices, weights = route(torch.zeros(2, 9), None, None, **SETTINGS)
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 0.5))


def test_tiny_and_large_scores_keep_their_digits() -> None:
    logits = torch.tensor([[-60.0, -20.0, -1e-3, 0.0, 19.0, 21.0, 200.0]])
    settings = SETTINGS | {"topk": 7, "normalise": False, "scaling": 1.0}
    indices, weights = route(logits, None, None, **settings)
    exact = torch.log1p(torch.exp(logits.double())).sqrt().flip(-1)
    assert indices.tolist() == [[6, 5, 4, 3, 2, 1, 0]]
    # e^-60 is off by 60 * 2^-24 and its root by half of that.
    assert ((weights.double() - exact) / exact).abs().max() < 4e-6


def test_nan_spoils_its_token_only() -> None:
    logits = logits_of(3, 8)
    clean = route(logits, None, None, **SETTINGS)
    logits[1, 5] = float("nan")
    indices, weights = route(logits, None, None, **SETTINGS)
    assert weights[1].isnan().all() and indices[1, 0] == 5
    assert len(set(indices[1].tolist())) == 3 and indices[1].max() < 8
    for part, before in zip((indices, weights), clean, strict=True):
        assert torch.equal(part[[0, 2]], before[[0, 2]])


def test_infinite_biases_never_choose_an_expert_twice() -> None:
    bias = torch.full((6,), float("-inf"))
    bias[4] = float("inf")
    indices, _ = route(logits_of(2, 6), bias, None, **SETTINGS)
    assert indices.tolist() == [[4, 0, 1]] * 2


def test_a_hash_table_is_returned_as_it_is() -> None:
    chosen = torch.tensor([[5, 0, 3], [2, 2, 1]])
    logits = logits_of(2, 6)
    indices, weights = route(logits, None, chosen, **SETTINGS)
    assert torch.equal(indices, chosen)
    assert torch.allclose(weights, reference(logits, None, chosen, **SETTINGS)[1], rtol=4e-6)


def test_logits_may_be_part_of_a_wider_tensor() -> None:
    wide = logits_of(4, 12)
    for logits in (wide[:, :6], wide[:, ::2], wide.T[:4, :4]):
        expected = reference(logits, None, None, **SETTINGS)
        assert torch.equal(route(logits, None, None, **SETTINGS)[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk is out of range"),
        ({"topk": 9}, "from 1 to 8"),
        ({"scoring_func": "relu"}, "unknown scoring_func"),
    ],
)
def test_route_refuses_what_it_cannot_do(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        route(logits_of(2, 8), None, None, **SETTINGS | change)


def test_route_refuses_wrong_shapes_and_dtypes() -> None:
    with pytest.raises(UsageError, match="bias has the wrong shape"):
        route(logits_of(2, 8), torch.zeros(7), None, **SETTINGS)
    with pytest.raises(UsageError, match="logits has the wrong dtype"):
        route(logits_of(2, 8).double(), None, None, **SETTINGS)
    with pytest.raises(UsageError, match="chosen has the wrong dtype"):
        route(logits_of(2, 8), None, torch.zeros(2, 3).int(), **SETTINGS)
