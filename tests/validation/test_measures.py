"""What the measures are, beside formulas written out again for whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from v4surgery.validation.measures import Alignment, Closeness, LogitAgreement, RouterAgreement

# float64 sums in another order.
ROUNDING = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_closeness_over_prompts_is_that_of_all_tokens_together() -> None:
    a, b = random(9, 3, 4), random(9, 3, 4, seed=1)
    close = Closeness()
    close.add(a[:5], b[:5], 0)
    close.add(a[5:], b[5:], 1)
    x, y = (t.flatten(1).double().numpy() for t in (a, b))
    norms = np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert close.relative_error == pytest.approx(
        np.linalg.norm(x - y) / np.linalg.norm(y), rel=ROUNDING
    )
    assert close.cosine == pytest.approx(cosines.mean(), rel=ROUNDING)
    worst = int(norms.argmax())
    assert close.worst_error == pytest.approx(norms[worst], rel=ROUNDING)
    assert close.worst_token == ((0, worst) if worst < 5 else (1, worst - 5))
    assert close.num_tokens == 9 and not close.is_exact


def test_equal_values_are_exact_and_a_single_rounding_is_not() -> None:
    a = random(4, 8)
    close = Closeness()
    close.add(a, a.clone(), 0)
    assert close.is_exact and close.relative_error == 0 and close.worst_error == 0
    assert close.cosine == pytest.approx(1, rel=ROUNDING)
    nearly = a.clone()
    nearly[2, 3] = torch.nextafter(nearly[2, 3], torch.tensor(9.0))
    close.add(nearly, a, 1)
    assert not close.is_exact and 0 < close.relative_error < 1e-7
    assert close.worst_token == (1, 2)


def test_tokens_of_zeros_are_equal_to_zeros_and_infinitely_far_from_anything_else() -> None:
    zeros = torch.zeros(3, 4)
    close = Closeness()
    close.add(zeros, zeros, 0)
    assert (close.relative_error, close.cosine, close.worst_error) == (0, 1, 0)
    close.add(zeros + 1, zeros, 1)
    assert close.relative_error == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_the_worst_of_all(bad: float) -> None:
    a, b = random(5, 4), random(5, 4, seed=1)
    spoiled = a.clone()
    spoiled[3, 1] = bad
    close = Closeness()
    close.add(spoiled, b, 0)
    close.add(a, b, 1)
    assert close.worst_token == (0, 3)
    assert not math.isfinite(close.worst_error) and not math.isfinite(close.relative_error)


def test_cka_is_one_for_a_rotation_and_scaling_and_small_for_noise() -> None:
    x = random(500, 6)
    turn = torch.linalg.qr(random(6, 6, seed=1))[0]
    aligned, noise = Alignment(), Alignment()
    aligned.add(x, 3 * x @ turn + 5)
    noise.add(x, random(500, 9, seed=2))
    assert aligned.cka == pytest.approx(1, abs=1e-6)
    assert noise.cka < 0.1


def test_cka_over_prompts_is_that_of_all_tokens_together() -> None:
    x, y = random(40, 5), random(40, 7, seed=1)
    alignment = Alignment()
    for part in (slice(0, 13), slice(13, 40)):
        alignment.add(x[part], y[part])
    a, b = (t.double() - t.double().mean(0) for t in (x, y))
    grams = [t @ t.T for t in (a, b)]  # the other form of the same measure
    expected = (grams[0] * grams[1]).sum() / grams[0].norm() / grams[1].norm()
    assert alignment.cka == pytest.approx(expected.item(), rel=1e-9)


def test_cka_of_no_tokens_or_of_constants_is_no_number() -> None:
    constant = Alignment()
    constant.add(torch.ones(4, 2), random(4, 3))
    assert math.isnan(Alignment().cka) and math.isnan(constant.cka)


def test_router_agreement_counts_only_choices_that_the_replica_could_make() -> None:
    agreement = RouterAgreement()
    # The second token's parent chose one kept expert, the third's none.
    expected = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    agreement.add(torch.tensor([[1, 0], [0, 1], [0, 1]]), expected)
    assert agreement.share == pytest.approx(2 / 3)
    assert agreement.same_sets == pytest.approx(2 / 3)
    assert math.isnan(RouterAgreement().share)


def test_router_agreement_expects_no_more_choices_than_the_replica_makes() -> None:
    agreement = RouterAgreement()
    agreement.add(torch.tensor([[1]]), torch.tensor([[0, 1]]))
    assert agreement.share == 1 and agreement.same_sets == 1


def test_logit_agreement_is_torchs_kl_and_perplexity() -> None:
    actual, expected = random(300, 11), random(300, 11, seed=1)
    ids = torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(2))
    agreement = LogitAgreement()
    agreement.add(actual[:100], expected[:100], ids[:100])
    agreement.add(actual[100:], expected[100:], ids[100:])
    found = agreement.to_json()
    p, q = (t.double().log_softmax(-1) for t in (expected, actual))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found["kl"] == pytest.approx(kl.item(), rel=ROUNDING)
    top = [t.topk(5, -1).indices.tolist() for t in (expected, actual)]
    same = [a[0] == b[0] for a, b in zip(*top, strict=True)]
    common = [len(set(a) & set(b)) / 5 for a, b in zip(*top, strict=True)]
    assert found["top1_agreement"] == pytest.approx(np.mean(same))
    assert found["top5_agreement"] == pytest.approx(np.mean(common))
    for name, logits in (("perplexity", actual), ("parent_perplexity", expected)):
        parts = [(slice(0, 99), slice(1, 100)), (slice(100, 299), slice(101, 300))]
        losses = [
            torch.nn.functional.cross_entropy(logits[a].double(), ids[b], reduction="sum")
            for a, b in parts
        ]
        assert found[name] == pytest.approx(math.exp(sum(losses) / 298), rel=1e-9)


def test_equal_logits_agree_wholly() -> None:
    logits = random(7, 3)
    agreement = LogitAgreement()
    agreement.add(logits, logits, torch.zeros(7, dtype=torch.int64))
    found = agreement.to_json()
    assert (found["kl"], found["top1_agreement"], found["top5_agreement"]) == (0, 1, 1)
