"""The indexer's kernels in the interpreter: cases, parts, rounds of choice, and the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import indexer as module
from v4surgery.kernels import topk
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.attention import CASES, check_choice
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.indexer import indexer_topk
from v4surgery.kernels.topk import choose_topk

SMALL = [case for case in CASES if case.op == "indexer_topk" and not case.real]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of NaN, or of entries that do not exist."""
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 10**6)

    monkeypatch.setattr(torch, "empty", full_of_nan)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_case_chooses_the_best(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


@pytest.mark.usefixtures("poisoned")
def test_queries_are_taken_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, weights = torch.randn(1, 5, 2, 16), torch.randn(1, 40, 16), torch.randn(1, 5, 2)
    num_visible = torch.tensor([[40, 3, 20, 39, 11]])
    parts = []
    choose = module.choose_topk
    monkeypatch.setattr(
        module, "choose_topk", lambda out, *rest: (parts.append(out.shape[1]), choose(out, *rest))
    )
    monkeypatch.setattr(module, "SCORES_BYTES", 2 * 40 * 4 + 3)
    chosen = indexer_topk(q, k, weights, num_visible, 6)
    assert parts == [2, 2, 1]
    assert check_choice(chosen, (q, k, weights, num_visible, 6), {}).passed


def expected_choice(scores: Tensor, num_visible: Tensor, count: int) -> Tensor:
    """Sorted, by torch's stable sort of what is visible."""
    expected = torch.full((*num_visible.shape, count), -1)
    for b in range(num_visible.shape[0]):
        for t in range(num_visible.shape[1]):
            visible = scores[b, t, : int(num_visible[b, t])]
            best = visible.sort(descending=True, stable=True).indices[:count]
            expected[b, t, : len(best)] = best.sort().values
    return expected


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("segment", [16, 64])
def test_rows_of_several_segments_keep_the_rule_for_equal_scores(
    monkeypatch: pytest.MonkeyPatch, segment: int
) -> None:
    monkeypatch.setattr(topk, "SEGMENT", segment)
    scores = torch.randint(-2, 3, (1, 2, 100)).float()
    num_visible = torch.tensor([[100, 61]])
    out = torch.empty(1, 2, 4, dtype=torch.int64)
    choose_topk(out, scores, num_visible)
    assert torch.equal(out, expected_choice(scores, num_visible, 4))


@pytest.mark.usefixtures("poisoned")
def test_zeros_of_both_signs_are_equal_infinities_and_nan_are_ordered() -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[[-0.0, 0.0, -1.0, -0.0, 1e-40, -inf, 2.0, inf, -nan, nan]]])
    num_visible = torch.tensor([[10]])
    for count in range(1, 10):
        out = torch.empty(1, 1, count, dtype=torch.int64)
        choose_topk(out, scores, num_visible)
        assert torch.equal(out, expected_choice(scores, num_visible, count)), count


@pytest.mark.usefixtures("poisoned")
def test_scores_of_the_future_and_where_all_is_chosen_are_not_read() -> None:
    scores = torch.full((1, 3, 20), float("nan"))
    scores[0, 0, :9] = torch.arange(9.0)
    out = torch.empty(1, 3, 4, dtype=torch.int64)
    choose_topk(out, scores, torch.tensor([[9, 4, 0]]))
    assert out.tolist() == [[[5, 6, 7, 8], [0, 1, 2, 3], [-1] * 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(1, 5, 9)}, r"k has the wrong shape"),
        ({"k": torch.randn(1, 5, 8).bfloat16()}, r"k has the wrong dtype"),
        ({"weights": torch.randn(1, 3, 3)}, r"weights has the wrong shape"),
        ({"num_visible": torch.ones(1, 2).long()}, r"num_visible has the wrong shape"),
        ({"num_visible": torch.ones(1, 3).int()}, r"num_visible has the wrong dtype"),
        ({"topk": 8193}, r"topk is out of range"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(1, 3, 2, 8),
        "k": torch.randn(1, 5, 8),
        "weights": torch.randn(1, 3, 2),
        "num_visible": torch.ones(1, 3).long(),
        "topk": 2,
    }
    with pytest.raises(UsageError, match=message):
        indexer_topk(**arguments | change)
