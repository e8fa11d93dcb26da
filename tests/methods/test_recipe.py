"""Methods in a recipe: three axes take one, each its own, and every misuse is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.methods.conftest import methods
from tests.slicers.conftest import Parent
from tests.support.parents import SMALL, write_parent
from v4surgery.errors import PlanError, RecipeError
from v4surgery.recipes import dump_recipe, recipe_from_text


def problems(keep: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_from_text(f"name: x\nkeep:\n  {keep}\n", "r.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            "hidden_size: {keep: 8, method: svd}",
            "`svd` is not for this axis, which takes select or pca",
        ),
        (
            "q_lora_rank: {keep: 8, method: svd}",
            "`svd` is not for this axis, which takes select or pca",
        ),
        (
            "o_lora_rank: {keep: 8, method: pca}",
            "`pca` is not for this axis, which takes select or svd",
        ),
        ("hidden_size: {keep: 8, method: ica}", "select"),
        ("hidden_size: {method: pca}", "keep"),
        (
            "hidden_size: {keep: 8, method: pca, by: norm}",
            "`by` chooses units, and `method: pca` mixes all",
        ),
        (
            "hidden_size: {keep: 8, method: pca, by: even}",
            "`by` chooses units, and `method: pca` mixes all",
        ),
        ("q_lora_rank: {keep: 8, method: pca, seed: 1}", "`seed` chooses units"),
        ("o_lora_rank: {keep: 8, method: svd, block: 4}", "`block` chooses units"),
        ("o_lora_rank: {ids: [1, 2], method: svd}", "`ids` chooses units"),
        ("moe_intermediate_size: {keep: 8, method: pca}", "unknown key"),
        ("experts: {keep: 8, method: pca}", "unknown key"),
    ],
)
def test_method_where_it_means_nothing_is_named_with_its_line(keep: str, message: str) -> None:
    (problem,) = problems(keep)
    assert message in problem, problem
    assert problem.startswith("r.yaml:3: keep.")


def test_select_is_the_default_and_stays_unwritten() -> None:
    plain = recipe_from_text("name: x\nkeep: {hidden_size: 8}", "r")
    named = recipe_from_text(
        "name: x\nkeep: {hidden_size: {keep: 8, method: select, by: norm}}", "r"
    )
    assert plain.keep.hidden_size is not None and plain.keep.hidden_size.method == "select"
    assert named.keep.hidden_size is not None and named.keep.hidden_size.by == "norm"
    assert "method" not in dump_recipe(plain)


def test_recipe_with_methods_loads_back_equal() -> None:
    keep = "hidden_size: {keep: 8, method: pca}, o_lora_rank: {keep: 4, method: svd}"
    text = f"name: x\nscores: s\nkeep: {{{keep}}}"
    recipe = recipe_from_text(text, "r")
    assert recipe_from_text(dump_recipe(recipe), "r") == recipe


def test_hidden_rotation_with_the_drafter_kept_says_what_to_do(parent: Parent) -> None:
    with pytest.raises(PlanError, match="cannot be rotated with the drafters kept") as caught:
        parent.plan({**methods(), "mtp": "keep"})
    assert "next: keep: {mtp: drop}" in str(caught.value)


def test_hidden_rotation_drops_dspark_drafters_too(tmp_path: Path) -> None:
    changes = {
        **SMALL,
        "compress_ratios": [*SMALL["compress_ratios"][:4], 0, 0, 0],
        "dspark_target_layer_ids": (1, 2, 3),
        "dspark_noise_token_id": 60,
        "dspark_markov_rank": 8,
    }
    parent = Parent(write_parent(tmp_path / "p", "flash-0731", layers=4, changes=changes))
    with pytest.raises(PlanError, match="3 drafter block"):
        parent.plan({**methods(), "mtp": "keep"})
    assert parent.plan(methods()).config.num_drafters == 0


def test_more_directions_than_units_are_refused(parent: Parent) -> None:
    with pytest.raises(PlanError, match="keeps more than the parent has"):
        parent.plan(methods(hidden=129))


def test_random_scaffold_has_no_bases(parent: Parent) -> None:
    plan = parent.plan(methods(64, 32, 32), init="random")
    assert not plan.bases and set(plan.transforms) == {"random"}


def test_plan_tells_of_truncation_without_compensation(parent: Parent) -> None:
    notes = " ".join(parent.plan(methods(64, 64, 32)).notes)
    assert "hidden_size: norms divide by fewer units; `compensate: true` corrects that" in notes
    assert "q_lora_rank: pca, 64 of 64 directions, from weights alone; nothing is dropped" in notes
    assert "q_lora_rank: norms" not in notes
    assert "norms divide" not in " ".join(parent.plan(methods(64, 64, 32), compensate=True).notes)
