"""Methods on the command line: what plan, slice and verify print."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import v4surgery
from tests.cli.conftest import Run, v4  # noqa: F401 - a fixture
from tests.methods.conftest import methods
from tests.slicers.conftest import Cut, Parent
from v4surgery.cli.verify import _rounding
from v4surgery.hub.card import _what_it_is, make_card, read_facts
from v4surgery.slicers.verified import record_verification
from v4surgery.slicers.verify import Verification

RECIPE = """
name: mixed
keep:
  hidden_size: {keep: 64, method: pca}
  q_lora_rank: {keep: 32, method: pca}
  o_lora_rank: {keep: 32, method: svd}
  mtp: drop
"""


def test_plan_slice_and_verify_of_a_recipe_with_methods(
    parent: Parent,
    tmp_path: Path,
    v4: Run,  # noqa: F811
) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    planned = v4("plan", "--recipe", recipe, "--parent", parent.path)
    assert planned.code == 0
    assert "in a rotated basis, norms absorbed, rounded once" in planned.out
    # Of 4 layers, each with 6 experts: 3 matrices of each expert and of the shared one, gate, wq_a,
    # wq_b, wkv and 2 mHC projections; 3 compressors of 2 matrices, 2 indexers of 4; embed, head and
    # its mHC projection.
    count = 4 * (3 * 7 + 1 + 3 + 2) + 3 * 2 + 2 * 4 + 3
    assert f"rounded: {count} by rotate, 8 by factor" in planned.out
    assert "hidden_size: pca, 64 of 128 directions, from weights alone" in planned.out
    assert v4("slice", "-r", recipe, "-p", parent.path, "-o", out, "-q").code == 0
    done = v4("verify", out, "--parent", parent.path, "--json")
    data = json.loads(done.out)
    assert data["passed"] and data["rounded"] == []


def test_rounding_is_told_apart_from_equality() -> None:
    assert _rounding(()) == ""
    assert _rounding(("a", "b")).startswith(", 2 of them up to one unit in the last place")


def test_card_says_that_axes_are_in_another_basis_and_what_was_only_near(half: Cut) -> None:
    with v4surgery.open(half.path) as replica:
        verdict = Verification(10, 100, sampled=False, problems=(), rounded=("x",))
        record_verification(replica, verdict, workers=1)
        card = make_card(replica)
        facts = read_facts(replica)
        (half.path / "verified.json").unlink()
    origin = {key: value for key, value in facts.parent.items() if key != "synthetic"}
    real = dataclasses.replace(facts, record={**facts.record, "parent": origin})
    assert "units removed, some axes in another basis, and nothing trained" in _what_it_is(real)
    assert "equal, 1 of them up to one unit in the last place" in card
    assert "a factor of the truncated SVD" in card


@pytest.mark.parametrize("keep", [methods(), methods(64, 32, 32)])
def test_summary_tells_the_memory_of_products(keep: dict[str, object], parent: Parent) -> None:
    from v4surgery.summary import summarize_plan

    assert summarize_plan(parent.plan(keep))["bytes_of_memory_per_worker"] == 160 << 20
    plain = summarize_plan(parent.plan({"mtp": "drop"}))["bytes_of_memory_per_worker"]
    assert plain == 40 << 20
