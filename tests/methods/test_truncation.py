"""What is kept is the best there is: numpy's own SVD and eigenvectors are the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from tests.methods.conftest import F32, D, L, Q, logits_of, methods, relative
from tests.slicers.conftest import Cut, Cutter, Parent
from tests.support import parents
from v4surgery.slicers.basis_math import factor_pair, principal_components

Array = NDArray[Any]
# Factors are stored as float32: entries off by 2^-24, products of them by a few times that.
STORED = 1e-6
SVD = {"o_lora_rank": {"keep": L // 4, "method": "svd"}, "mtp": "drop"}
CUTS: dict[str, Any] = {
    "heads": {"groups": [1, 0], "per_group": [1]},
    "head_dim": {"nope": [3, 1, 8, 20], "rope": 16},
    "hidden_size": {"keep": 50, "by": "random"},
}


def bases_of(replica: Cut) -> dict[str, Array]:
    """The recorded bases, as safetensors reads them."""
    with safe_open(replica.path / "v4surgery.bases", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def products(tensors: dict[str, Array], block: str, groups: int) -> list[Array]:
    """``wo_b wo_a`` of each group, in float64."""
    wo_a = tensors[f"{block}attn.wo_a"].astype(np.float64)
    wo_b = tensors[f"{block}attn.wo_b"].astype(np.float64)
    pairs = zip(np.split(wo_b, groups, axis=1), np.split(wo_a, groups, axis=0), strict=True)
    return [b @ a for b, a in pairs]


@pytest.mark.parametrize("cuts", [{}, CUTS], ids=["alone", "beside other cuts"])
def test_svd_loses_the_dropped_singular_values_and_no_more(
    cuts: dict[str, Any], parent: Parent, cut: Cutter
) -> None:
    """Of the product of what other cuts keep, in each group; the truncated SVD has no better."""
    replica = cut(parent, {**cuts, **SVD}, store=F32)
    keep = L // 4
    for block in ("layers.0.", "layers.1.", "layers.3."):
        whole = products(replica.expected, block, 2)
        ours = products(replica.decoded, block, 2)
        shares = replica.record["bases"]["of"][f"o_lora_rank/{block}"]["kept"]
        for before, after, share in zip(whole, ours, shares, strict=True):
            values = np.linalg.svd(before, compute_uv=False)
            lost = np.sqrt((values[keep:] ** 2).sum())
            assert np.linalg.norm(before - after) == pytest.approx(lost, rel=STORED)
            assert share == pytest.approx(1 - lost**2 / (values**2).sum(), rel=1e-8)
            assert lost > 0.1 * np.linalg.norm(before)


def test_both_factors_carry_half_of_each_singular_value(parent: Parent, cut: Cutter) -> None:
    replica = cut(parent, SVD, store=F32)
    wo_a = replica.decoded["layers.0.attn.wo_a"].astype(np.float64)[: L // 4]
    wo_b = replica.decoded["layers.0.attn.wo_b"].astype(np.float64)[:, : L // 4]
    values = np.linalg.svd(products(replica.expected, "layers.0.", 2)[0], compute_uv=False)
    for gram in (wo_a @ wo_a.T, wo_b.T @ wo_b):
        assert np.allclose(gram, np.diag(values[: L // 4]), rtol=0, atol=STORED * values[0])


def test_group_narrower_than_its_rank_gets_zeros_for_the_rest(parent: Parent, cut: Cutter) -> None:
    """One head of 20 dims in each group: the product has rank 20 at most."""
    cuts = {"heads": {"per_group": [0]}, "head_dim": {"nope": [3, 1, 8, 20], "rope": 16}}
    replica = cut(parent, {**cuts, **methods()}, store=F32)
    wo_a = replica.decoded["layers.0.attn.wo_a"].reshape(2, L, 20)
    assert (np.abs(wo_a).max(axis=2) > 0).sum(axis=1).tolist() == [20, 20]
    plain = cut(parent, {**cuts, "mtp": "drop"}, store=F32)
    assert relative(logits_of(replica.path), logits_of(plain.path)) < 1e-5


def test_the_weighted_pair_is_the_best_for_the_given_inputs() -> None:
    """E|b y - b out into y|^2 with E[y y^T] = C against the SVD of b C^1/2."""
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((30, 12)), rng.standard_normal((12, 40))
    y = rng.standard_normal((12, 500)) * np.logspace(0, -1, 12)[:, None]
    moment = y @ y.T / 500
    into, out, share = factor_pair(b, a, 5, moment)
    lost = np.linalg.norm(b @ y - b @ out @ into @ y) ** 2 / 500
    values, vectors = np.linalg.eigh(moment)
    best = np.linalg.svd(b @ vectors * np.sqrt(values), compute_uv=False)
    # SHRINKAGE moves the optimum by its share of the energy.
    assert lost == pytest.approx((best[5:] ** 2).sum(), rel=1e-3)
    assert share == pytest.approx(1 - lost / (best**2).sum(), rel=1e-3)
    unweighted, plain, _ = factor_pair(b, a, 5)
    assert np.linalg.norm(b @ y - b @ plain @ unweighted @ y) ** 2 / 500 > 1.05 * lost


def test_a_pair_of_full_rank_is_exact_on_every_input_whatever_the_moment() -> None:
    rng = np.random.default_rng(2)
    b, a = rng.standard_normal((30, 12)), rng.standard_normal((12, 40))
    few = rng.standard_normal((12, 3))
    into, out, share = factor_pair(b, a, 12, few @ few.T)
    assert np.allclose(out @ into, np.eye(12), rtol=0, atol=1e-10)
    assert share == 1


def test_principal_components_lose_the_other_eigenvalues() -> None:
    rng = np.random.default_rng(3)
    y = rng.standard_normal((20, 400)) * np.logspace(0, -2, 20)[:, None]
    moment = y @ y.T / 400
    directions, share = principal_components(moment, 6)
    assert np.allclose(directions.T @ directions, np.eye(6), rtol=0, atol=1e-13)
    lost = np.linalg.norm(y - directions @ directions.T @ y) ** 2 / 400
    values = np.linalg.eigvalsh(moment)
    assert lost == pytest.approx(values[:-6].sum(), rel=1e-9)
    assert share == pytest.approx(1 - lost / values.sum(), rel=1e-9)


@pytest.fixture(scope="module")
def twins(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Parent:
    """Channel 2i + 1 of every stream is channel 2i: half of the directions hold everything."""

    def edit(shards: parents.Shards) -> None:
        for tensors in shards.values():
            for name, tensor in tensors.items():
                tensors[name] = tensor._replace(data=twinned(name, tensor))

    out = tmp_path_factory.mktemp("twins") / "parent"
    return Parent(parents.edit_checkpoint(parent.path, out, edit))


def twinned(name: str, tensor: parents.RawTensor) -> bytes:
    """Rows of what writes into the streams in pairs; columns of the embedding."""
    raw = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1).copy()
    if name == "embed.weight":
        pairs = raw.view(np.uint16)
        pairs[:, 1::2] = pairs[:, ::2]
    elif (".wo_b." in name or ".w2." in name) and len(raw) == D:  # FP8: one scale for 128 rows
        raw[1::2] = raw[::2]
    return raw.tobytes()


def test_streams_in_a_subspace_lose_nothing_by_pca_and_much_by_picking(
    twins: Parent, cut: Cutter
) -> None:
    """Half of the channels, norms compensated: the energy is all kept, so the factor is sqrt 2."""
    expected = logits_of(twins.path)
    pca = {"hidden_size": {"keep": D // 2, "method": "pca"}, "mtp": "drop"}
    even = {"hidden_size": {"keep": D // 2, "by": "even"}, "mtp": "drop"}
    mixed, picked = (cut(twins, keep, compensate=True, store=F32) for keep in (pca, even))
    (share,) = mixed.record["bases"]["of"]["hidden_size/model"]["kept"]
    assert share == pytest.approx(1, abs=1e-6)
    assert mixed.decoded["layers.1.attn_norm"] == pytest.approx(np.full(D // 2, 2**0.5))
    assert relative(logits_of(mixed.path), expected) < 1e-4
    assert relative(logits_of(picked.path), expected) > 0.3


def test_compensation_takes_the_energy_that_the_directions_keep(
    parent: Parent, cut: Cutter
) -> None:
    keep = methods(D // 2, Q // 4, L)
    plain, compensated = (cut(parent, keep, compensate=c, store=F32) for c in (False, True))
    of = compensated.record["bases"]["of"]
    hidden = np.sqrt(of["hidden_size/model"]["kept"][0] * 2)
    query = np.sqrt(of["q_lora_rank/layers.1."]["kept"][0] * 4)
    assert 1 < hidden < 2**0.5 and 1 < query < 2
    for name, factor in (
        ("layers.1.ffn_norm", hidden),
        ("norm", hidden),
        ("layers.1.attn.q_norm", query),
    ):
        assert np.all(plain.decoded[name] == 1)
        assert compensated.decoded[name] == pytest.approx(factor, rel=1e-6)
    fn = "layers.2.hc_ffn_fn"
    assert compensated.decoded[fn] == pytest.approx(plain.decoded[fn] * hidden, rel=1e-6)
    assert np.array_equal(
        compensated.decoded["layers.1.attn.wq_b"], plain.decoded["layers.1.attn.wq_b"]
    )


def test_rotated_tensors_are_the_products_that_the_recorded_bases_say(
    parent: Parent, cut: Cutter
) -> None:
    """Written a second time, with einsum: absorb, rotate, factor."""
    replica = cut(parent, methods(D // 2, Q // 2, L // 2), store=F32)
    own = {
        name: value.astype(np.float64)
        for name, value in parent.decoded.items()
        if "tid" not in name
    }
    bases = {name: value.astype(np.float64) for name, value in bases_of(replica).items()}
    r, q = bases["hidden_size/model/out"][0], bases["q_lora_rank/layers.1./out"][0]
    into, out = (bases[f"o_lora_rank/layers.1./{side}"] for side in ("into", "out"))
    at = "layers.1."
    wo_b = own[at + "attn.wo_b"].reshape(D, 2, L)
    fn = own[at + "hc_attn_fn"].reshape(-1, 4, D)
    expected = {
        "embed": own["embed"] @ r,
        "head": own["head"] * own["norm"] @ r,
        "attn.wq_a": q.T @ (own[at + "attn.wq_a"] * own[at + "attn_norm"]) @ r,
        "attn.wq_b": own[at + "attn.wq_b"] * own[at + "attn.q_norm"] @ q,
        "attn.indexer.wq_b": own[at + "attn.indexer.wq_b"] * own[at + "attn.q_norm"] @ q,
        "attn.indexer.weights_proj": own[at + "attn.indexer.weights_proj"]
        * own[at + "attn_norm"]
        @ r,
        "attn.wo_a": np.einsum(
            "gkl,glw->gkw", into, own[at + "attn.wo_a"].reshape(2, L, -1)
        ).reshape(L, -1),
        "attn.wo_b": np.einsum("dm,dgl,glk->mgk", r, wo_b, out).reshape(D // 2, -1),
        "hc_attn_fn": np.einsum("amd,dk->amk", fn, r).reshape(len(fn), -1),
        "ffn.gate": own[at + "ffn.gate"] * own[at + "ffn_norm"] @ r,
        "ffn.experts.2.w1": own[at + "ffn.experts.2.w1"] * own[at + "ffn_norm"] @ r,
        "ffn.experts.2.w2": r.T @ own[at + "ffn.experts.2.w2"],
    }
    for name, values in expected.items():
        stem = name if name in ("embed", "head") else at + name
        tolerance = 2.0**-22 * np.abs(values).max()
        assert np.abs(replica.decoded[stem] - values).max() < tolerance, name


def test_plan_reads_nothing_but_headers(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = parent.opened

    def refuse(*_: object) -> None:
        raise AssertionError("the plan read from the parent")

    for name in ("read", "read_into", "read_many"):
        monkeypatch.setattr(type(opened.source), name, refuse)
    plan = parent.plan(methods(D // 2, Q // 2, L // 2))
    assert plan.cost.selection_bytes > 0
    assert plan.inexact().keys() == {"rotate", "factor"}
    assert plan.transforms["fold"] == 13


def test_plan_says_what_is_written_to_the_byte(half: Cut) -> None:
    files = [*half.path.glob("*.safetensors"), half.path / "v4surgery.bases"]
    assert half.planned.cost.bytes_written == sum(Path(file).stat().st_size for file in files)
