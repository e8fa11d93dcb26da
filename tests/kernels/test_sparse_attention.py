"""The attention kernel in the interpreter: its cases, what it must not read, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import launch, sparse_attention_hopper
from v4surgery.kernels import sparse_attention as module
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.attention import CASES, FLOAT32_BOUND, attention_formula
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.sparse_attention import sparse_attention

GOLDEN = Path(__file__).parents[1] / "data" / "ops.safetensors"
SMALL = [case for case in CASES if case.op == "sparse_attention" and not case.real]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of NaN."""
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-77)

    monkeypatch.setattr(torch, "empty", full_of_nan)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_case_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


def test_golden_attention_is_within_3e_3() -> None:
    """The official kernel rounds probabilities to bf16, as this one does."""
    recorded = load_file(GOLDEN)
    q, kv, sink, index = (recorded[f"attn.{name}"] for name in ("q", "kv", "sink", "idx"))
    rows = torch.tensor([0, 1, 17, 39])
    out = sparse_attention(q[:, rows], kv, sink, index[:, rows], 128**-0.5)
    assert relative_error(out, recorded["attn.out"][:, rows]) < 3e-3


@pytest.fixture
def small() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, kv, sink and index of two queries, two heads of 16, five keys."""
    q, kv, sink = torch.randn(1, 2, 2, 16), torch.randn(1, 5, 16), torch.randn(2)
    return q, kv, sink, torch.tensor([[[3, 1], [-1, 4]]])


def test_a_key_named_twice_counts_twice(small: tuple[Tensor, ...]) -> None:
    q, kv, sink, _ = small
    twice = sparse_attention(q, kv, sink, torch.tensor([[[2, 2, 0]] * 2]), 0.3)
    once = sparse_attention(q, kv, sink, torch.tensor([[[2, 0]] * 2]), 0.3)
    copied = torch.cat((kv, kv[:, 2:3]), 1)
    expected = attention_formula(q, copied, sink, torch.tensor([[[2, 5, 0]] * 2]), 0.3)
    assert relative_error(twice, expected) < FLOAT32_BOUND
    assert relative_error(once, expected) > 0.01


def test_nan_in_a_named_row_is_not_hidden(small: tuple[Tensor, ...]) -> None:
    q, kv, sink, index = small
    kv[0, 4, 7] = float("nan")
    out = sparse_attention(q, kv, sink, index, 0.3)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_scores_and_sinks_neither_overflow_nor_vanish(
    small: tuple[Tensor, ...], sign: float
) -> None:
    q, kv, _, index = small
    sink = torch.tensor([sign * 300.0, float("-inf")])
    for scale in (sign * 100.0, 0.1):
        out = sparse_attention(q, kv, sink, index, scale)
        expected = attention_formula(q, kv, sink, index, scale)
        # Scores reach 1,000: float32 steps by 6e-5 there, and so do their exponentials.
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
def test_no_sink_and_no_key_give_zeros(small: tuple[Tensor, ...]) -> None:
    q, kv, _, index = small
    out = sparse_attention(q, kv, torch.full((2,), float("-inf")), torch.full_like(index, -1), 1.0)
    assert not out.any()


def test_keys_are_split_when_queries_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv, sink = torch.randn(1, 2, 3, 16), torch.randn(1, 90, 16), torch.randn(3)
    index = torch.stack((torch.arange(70), torch.full((70,), -1)))[None]
    index[0, 1, 40] = 60  # all other parts of the second query are empty
    split = sparse_attention(q, kv, sink, index, 0.25)
    monkeypatch.setattr(module, "FULL_GRID", 1)
    whole = sparse_attention(q, kv, sink, index, 0.25)
    expected = attention_formula(q, kv, sink, index, 0.25)
    assert relative_error(split, expected) < FLOAT32_BOUND
    assert relative_error(whole, expected) < FLOAT32_BOUND


def test_hopper_serves_many_queries_of_wide_heads_and_aligned_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serves(num_queries: int, heads: int, head_dim: int, size: int, *, pad: int = 0) -> bool:
        q = torch.empty(1, num_queries, heads, head_dim + pad, dtype=torch.bfloat16, device="meta")
        kv = torch.empty(1, 900, head_dim, dtype=torch.bfloat16, device="meta")
        index = torch.empty(1, num_queries, size, device="meta")
        return sparse_attention_hopper.serves(q[..., :head_dim], kv, index)

    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert serves(4096, 64, 512, 640)
    assert not serves(4, 64, 512, 640)
    assert not serves(4096, 24, 512, 640)
    assert not serves(4096, 64, 64, 640)
    assert not serves(4096, 64, 512, 640, pad=8)
    monkeypatch.setattr(launch, "capability", lambda _: (10, 0))
    assert not serves(4096, 64, 512, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": torch.randn(1, 5, 8)}, r"kv has the wrong shape"),
        ({"kv": torch.randn(1, 5, 16).half()}, r"kv has the wrong dtype"),
        ({"sink": torch.randn(3)}, r"sink has the wrong shape"),
        ({"index": torch.zeros(1, 3, 2).long()}, r"index has the wrong shape"),
        ({"index": torch.zeros(1, 2, 2)}, r"index has the wrong dtype"),
        ({"q": torch.randn(1, 2, 2, 600), "kv": torch.randn(1, 5, 600)}, r"head_dim is too large"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    small: tuple[Tensor, ...], change: dict[str, Tensor], message: str
) -> None:
    arguments = dict(zip(("q", "kv", "sink", "index"), small, strict=True)) | change
    with pytest.raises(UsageError, match=message):
        sparse_attention(**arguments, scale=1.0)
