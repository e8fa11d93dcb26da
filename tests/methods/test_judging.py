"""What validate and diff say of a replica in another basis: what is comparable, compared."""

from __future__ import annotations

import pytest
import torch

import v4surgery
from tests.methods.conftest import F32, D, Q, methods
from tests.slicers.conftest import Cut, Cutter, Parent
from tests.validation.masked_support import prompts
from v4surgery.cli.validate import _show
from v4surgery.validation.behaviour import FREE, TAUGHT
from v4surgery.validation.masked import check_masked
from v4surgery.validation.sides import diff_models

# Float32 roundings of four layers, in each tap of them; the streams of a tap have no outliers.
SAME = 1e-5
IDS = prompts(64, (40,))


@pytest.fixture(scope="module")
def whole(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """Every method, nothing dropped, float32."""
    plan = parent.plan(methods(), store=F32)
    return Cut(parent, plan, tmp_path_factory.mktemp("whole") / "replica")


def test_behaviour_of_a_rotated_replica_is_that_of_its_parent_at_every_tap(
    parent: Parent, whole: Cut
) -> None:
    found = v4surgery.validate(whole.path, parent.path, IDS)
    assert found.passed and found.behaviour is not None
    for layer in found.behaviour.layers:
        for way in (FREE, TAUGHT):
            assert {"in", "attn.in", "ffn.in", "out"} <= layer.taps[way].keys()
            for tap, close in layer.taps[way].items():
                assert close.relative_error < SAME, (layer.target, way, tap)
    assert found.behaviour.embed.relative_error < SAME


def test_behaviour_of_a_truncated_one_is_measured_in_its_own_directions(
    parent: Parent, half: Cut
) -> None:
    found = v4surgery.validate(half.path, parent.path, IDS)
    assert found.behaviour is not None
    # The embedding has no layer before it: its directions are the parent's, rounded to bf16.
    assert found.behaviour.embed.relative_error < 2.0**-8
    assert found.numbers["relative_error"] > 0.01


def test_the_masked_parent_grades_nothing_and_says_why(
    parent: Parent, whole: Cut, capsys: pytest.CaptureFixture[str]
) -> None:
    with v4surgery.open(whole.path) as replica:
        report = check_masked(replica, parent.opened, IDS)
    assert report.verdict == "not graded" and not report.passed
    assert report.failures == () and report.taps == ()
    (reason,) = report.not_graded
    assert "hidden_size: pca, q_lora_rank: pca, o_lora_rank: svd" in reason.why
    assert "a mask can only remove units" in str(reason)
    found = v4surgery.validate(whole.path, parent.path, IDS, masked=True)
    assert found.passed and "function" not in found.grade
    _show(found)
    assert "masked parent: not graded; model: every activation: hidden_size: pca" in (
        capsys.readouterr().out.replace("\n", " ")
    )


def test_one_mixed_axis_is_enough_not_to_be_graded(parent: Parent, cut: Cutter) -> None:
    replica = cut(parent, {"q_lora_rank": {"keep": Q // 2, "method": "pca"}})
    with v4surgery.open(replica.path) as opened:
        assert check_masked(opened, parent.opened, IDS).verdict == "not graded"


def test_diff_turns_the_parent_into_the_basis_of_the_replica(parent: Parent, whole: Cut) -> None:
    for sides in ((whole.path, parent.path), (parent.path, whole.path)):
        found = diff_models(*map(str, sides), tokens=40, tolerance=SAME)
        assert found.first_divergence is None, found.first_divergence
        assert {row.place.tap for row in found.rows if row.close} >= {
            "embed",
            "in",
            "attn.in",
            "out",
        }


def test_diff_of_replicas_in_different_bases_aligns_their_channels(
    parent: Parent, whole: Cut, half: Cut, cut: Cutter
) -> None:
    plain = cut(parent, {"mtp": "drop"}, store=F32)
    for other in (plain, half):
        found = diff_models(str(whole.path), str(other.path), parent=str(parent.path), tokens=40)
        rows = {row.place.block + row.place.tap: row for row in found.rows}
        for name in ("embed", "layers.0.in", "layers.1.out"):
            assert rows[name].close is None and rows[name].cka is not None
            assert rows[name].cka > 0.5
    rows = {
        row.place.block + row.place.tap: row
        for row in diff_models(
            str(whole.path), str(plain.path), parent=str(parent.path), tokens=40
        ).rows
    }
    assert rows["layers.1.out"].cka == pytest.approx(1, abs=1e-5)
    assert rows["layers.1.attn.heads"].close.relative_error < SAME


def test_a_replica_and_itself_are_equal(half: Cut) -> None:
    found = diff_models(str(half.path), str(half.path), tokens=20)
    assert found.first_divergence is None
    assert all(row.close.is_exact for row in found.rows if row.close)


def test_a_norm_weight_of_zero_leaves_nothing_to_compare(parent: Parent, whole: Cut) -> None:
    from v4surgery.slicers.provenance import read_provenance
    from v4surgery.validation.mapping import ReplicaMapping

    with v4surgery.open(whole.path) as replica:
        mapping = ReplicaMapping(replica, parent.opened, read_provenance(replica))
    mapping._norms["layers.0.attn_norm"] = torch.zeros(D)
    value = torch.ones(3, D)
    assert mapping.cut("attn.in", value, mapping.blocks[0]).eq(0).all()
    turned = mapping.cut("attn.hc", value, mapping.blocks[0])
    assert turned.norm().item() == pytest.approx(value.norm().item(), rel=1e-5)
