"""Second moments of a scores file decide the bases, if they are the parent's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import v4surgery
from tests.methods.conftest import F32, D, L, Q, logits_of, methods, relative
from tests.methods.test_truncation import bases_of
from tests.slicers.conftest import Cutter, Parent
from v4surgery.errors import PlanError

Array = NDArray[Any]
HIDDEN = "second_moment/hidden_size/model"
QUERY = "second_moment/q_lora_rank/layers.1."
OUTPUT = "second_moment/o_groups*o_lora_rank/layers.1."


def moment(size: int, seed: int) -> Array:
    """Of random vectors with a spectrum that falls."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((size, size))).Q
    return ((turn * np.logspace(0, -3, size)) @ turn.T).astype(np.float32)


def moments() -> dict[str, Array]:
    return {
        HIDDEN: moment(D, 0),
        QUERY: moment(Q, 1),
        OUTPUT: np.stack([moment(L, 2), moment(L, 3)]),
    }


def write(
    path: Path, parent: Parent, tensors: dict[str, Array], fingerprint: str | None = None
) -> str:
    about = {"format": 1, "parent": {"fingerprint": fingerprint or parent.opened.fingerprint}}
    save_file(tensors, path, {"v4surgery.scores": json.dumps(about)})
    return str(path)


def test_directions_are_the_leading_ones_of_the_given_moments(
    parent: Parent, cut: Cutter, tmp_path: Path
) -> None:
    file = write(tmp_path / "scores", parent, moments())
    replica = cut(parent, methods(D // 2, Q // 2, L // 2), scores=file)
    bases, of = bases_of(replica), replica.record["bases"]["of"]
    for key, given in (
        ("hidden_size/model", moment(D, 0)),
        ("q_lora_rank/layers.1.", moment(Q, 1)),
    ):
        values, vectors = np.linalg.eigh(given.astype(np.float64))
        best = vectors[:, len(values) // 2 :]
        got = bases[f"{key}/out"][0]
        assert np.abs(got @ got.T - best @ best.T).max() < 1e-4
        assert of[key]["kept"][0] == pytest.approx(values[len(values) // 2 :].sum() / values.sum())
        assert of[key]["moments"] is not None
    assert of["q_lora_rank/layers.0."]["moments"] is None
    assert (
        "q_lora_rank: pca, 32 of 64 directions, from second moments in 1 of 4 blocks"
        in " ".join(replica.record["notes"])
    )


def test_factors_lose_least_on_the_given_outputs(
    parent: Parent, cut: Cutter, tmp_path: Path
) -> None:
    keep = {"o_lora_rank": {"keep": L // 2, "method": "svd"}, "mtp": "drop"}
    weighted = cut(parent, keep, scores=write(tmp_path / "s", parent, moments()), store=F32)
    plain = cut(parent, keep, store=F32)
    wo_b = parent.decoded["layers.1.attn.wo_b"][:, :L].astype(np.float64)
    values, vectors = np.linalg.eigh(moment(L, 2).astype(np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0))

    def loss(replica: Any) -> float:
        bases = bases_of(replica)
        out, into = (bases[f"o_lora_rank/layers.1./{side}"][0] for side in ("out", "into"))
        return float(np.linalg.norm((wo_b - wo_b @ out @ into) @ root))

    best = np.sqrt((np.linalg.svd(wo_b @ root, compute_uv=False)[L // 2 :] ** 2).sum())
    # SHRINKAGE adds 1e-4 of the mean to every eigenvalue, of which the smallest are 1e-3 of the
    # largest and 7e-3 of the mean: 2 % of their energy, 1 % of the loss at most.
    assert best <= loss(weighted) * (1 + 1e-6) and loss(weighted) < 1.02 * best
    assert loss(plain) > 1.5 * best


def test_given_moments_too_change_nothing_without_truncation(
    parent: Parent, cut: Cutter, tmp_path: Path
) -> None:
    file = write(tmp_path / "scores", parent, moments())
    replica = cut(parent, methods(), scores=file, store=F32)
    assert relative(logits_of(replica.path), logits_of(parent.path)) < 1e-5


def test_verify_needs_no_scores_file(parent: Parent, cut: Cutter, tmp_path: Path) -> None:
    file = write(tmp_path / "scores", parent, moments())
    replica = cut(parent, methods(D // 2, Q // 2, L // 2), scores=file)
    Path(file).unlink()
    assert v4surgery.verify(replica.path, parent.opened).passed


def test_other_moments_are_another_plan(parent: Parent, tmp_path: Path) -> None:
    keep = methods(D // 2, Q // 2, L // 2)
    file = write(tmp_path / "scores", parent, moments())
    first = parent.plan(keep, scores=file).plan_hash
    write(tmp_path / "scores", parent, {**moments(), HIDDEN: moment(D, 9)})
    assert parent.plan(keep, scores=file).plan_hash != first


def test_scores_that_change_after_the_plan_are_refused(parent: Parent, tmp_path: Path) -> None:
    file = write(tmp_path / "scores", parent, moments())
    plan = parent.plan(methods(), scores=file)
    write(tmp_path / "scores", parent, {**moments(), HIDDEN: moment(D, 9)})
    with pytest.raises(PlanError, match="changed since the plan"):
        v4surgery.slice(plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "fingerprint", "message"),
    [
        ({}, "0" * 64, "of another parent"),
        ({HIDDEN: moment(D + 1, 0)}, None, r"shape \[129, 129\]"),
        ({OUTPUT: moment(L, 0)}, None, "rule: 2 x 64 x 64"),
    ],
)
def test_moments_of_something_else_are_refused_by_the_plan(
    tensors: dict[str, Array],
    fingerprint: str | None,
    message: str,
    parent: Parent,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "scores", parent, {**moments(), **tensors}, fingerprint)
    with pytest.raises(PlanError, match=message):
        parent.plan(methods(), scores=file)


@pytest.mark.parametrize(
    ("spoil", "message"), [(np.nan, "128 x 128 finite numbers"), (1.0, "no symmetric matrices")]
)
def test_matrices_that_are_no_moments_are_refused(
    spoil: float, message: str, parent: Parent, tmp_path: Path
) -> None:
    bad = moments()
    bad[HIDDEN][3, 5] += spoil
    plan = parent.plan(methods(), scores=write(tmp_path / "scores", parent, bad))
    with pytest.raises(PlanError, match=message):
        v4surgery.slice(plan, tmp_path / "out")


def test_file_that_is_no_safetensors_is_refused(parent: Parent, tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("x")
    with pytest.raises(PlanError, match="not a scores file"):
        parent.plan(methods(), scores=str(tmp_path / "scores"))
