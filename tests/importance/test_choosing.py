"""What a plan keeps by measured scores, where there are none, and what it says then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import v4surgery as v4
from tests.importance.conftest import Scored
from tests.slicers.conftest import ODD
from tests.support.parents import write_parent
from tests.support.scores import write_scores
from v4surgery.errors import PlanError, RecipeError, UsageError
from v4surgery.importance.names import SCORED
from v4surgery.recipes import Recipe, load_recipe, recipe_from_text, schema
from v4surgery.slicers.estimate import estimate_plan

REPOSITORY = Path(__file__).resolve().parents[2]
G, PER_GROUP = ODD["o_groups"], ODD["num_attention_heads"] // ODD["o_groups"]


def planned(parent: Any, keep: dict[str, Any], scores: Path | None = None, **recipe: Any) -> Any:
    content = {"name": "test", "keep": keep, **recipe}
    return v4.plan(parent, Recipe.model_validate(content), scores=scores)


def best(values: np.ndarray, keep: int) -> list[int]:
    """The best by score, the lower index of equal ones first, in order."""
    ranked = sorted(range(len(values)), key=lambda unit: (-values[unit], unit))
    return sorted(ranked[:keep])


EVERY_AXIS: dict[str, Any] = {
    "layers": {"count": 5, "by": "scores"},
    "hidden_size": {"keep": 40, "by": "energy"},
    "hc_mult": {"keep": 2, "by": "scores"},
    "vocab_size": {"keep": 50, "by": "frequency"},
    "experts": {"keep": 4, "by": "reap"},
    "moe_intermediate_size": {"keep": 20, "by": "activation"},
    "heads": {
        "groups": {"keep": 2, "by": "contribution"},
        "per_group": {"keep": 3, "by": "scores"},
    },
    "head_dim": {"nope": {"keep": 12, "by": "energy"}},
    "q_lora_rank": {"keep": 30, "by": "scores"},
    "o_lora_rank": {"keep": 7, "by": "activation"},
    "indexer": {
        "heads": {"keep": 2, "by": "contribution"},
        "head_dim": {"keep": 16 + 6, "by": "scores"},
    },
}


def test_every_axis_keeps_the_best_units_by_measured_scores(scored: Scored) -> None:
    plan, scores = planned(scored.parent, EVERY_AXIS, scored.path), scored.scores
    kept = plan.selections.model
    assert kept["hidden_size"].tolist() == best(scores["energy/hidden_size/model"], 40)
    assert kept["streams"].tolist() == best(scores["energy/streams/model"], 2)
    tokens = scores["frequency/vocab_size/model"].copy()
    tokens[:2] = np.inf  # bos and eos stay
    assert kept["vocab_size"].tolist() == best(tokens, 50)
    blocks = plan.selections.blocks
    layers = best(scores["influence/layers/model"], 5)
    wanted = [*(f"layers.{i}." for i in layers), "mtp.0."]
    assert [block.source.prefix for block in blocks] == wanted
    for block in blocks:
        place = block.source.prefix
        for dim, score, count in (
            ("n_routed_experts", "reap", 4),
            ("o_groups", "contribution", 2),
            ("nope", "energy", 12),
            ("q_lora_rank", "activation", 30),
            *([("index_n_heads", "contribution", 2)] if block.source.ratio == 4 else []),
            *([("index_nope", "energy", 6)] if block.source.ratio == 4 else []),
        ):
            assert block.kept[dim].tolist() == best(scores[f"{score}/{dim}/{place}"], count), dim
        heads = scores[f"contribution/num_attention_heads/{place}"].reshape(G, PER_GROUP)
        ranks = scores[f"activation/o_groups*o_lora_rank/{place}"].reshape(G, -1)
        for row, group in enumerate(block.kept["o_groups"]):
            assert block.kept["group_heads"][row].tolist() == best(heads[group], 3)
            assert block.kept["o_lora_rank"][row].tolist() == best(ranks[group], 7)
        names = [f"experts.{expert}" for expert in block.kept["n_routed_experts"]]
        for row, name in enumerate([*names, "shared_experts"]):
            values = scores.get(f"activation/moe_intermediate_size.{name}/{place}")
            if values is not None:
                wanted = best(values, 20)
                assert block.kept["moe_intermediate_size"][row].tolist() == wanted


def test_of_equal_scores_the_lower_index_stays(scored: Scored, tmp_path: Path) -> None:
    values = np.array([1, 2, 2, 0, 2, 1], np.float32)
    blocks = [block.prefix for block in scored.parent.catalogue.blocks]
    made_up = {f"frequency/n_routed_experts/{prefix}": values for prefix in blocks}
    path = write_scores(tmp_path / "s", scored.parent, made_up)
    keep = {"experts": {"keep": 4, "by": "frequency", "per_token": 2}}
    plan = planned(scored.parent, keep, path)
    assert all(
        block.kept["n_routed_experts"].tolist() == [0, 1, 2, 4] for block in plan.selections.blocks
    )


def kept_experts(plan: Any) -> list[list[int]]:
    return [block.kept["n_routed_experts"].tolist() for block in plan.selections.blocks]


def test_a_list_takes_the_first_way_that_is_available(scored: Scored, tmp_path: Path) -> None:
    def keep(by: Any) -> dict[str, Any]:
        return {"experts": {"keep": 3, "by": by}}

    gate = kept_experts(planned(scored.parent, keep("gate")))
    reap = kept_experts(planned(scored.parent, keep("reap"), scored.path))
    assert gate != reap
    wanted = keep(["scores", "gate"])
    assert kept_experts(planned(scored.parent, wanted)) == gate
    assert kept_experts(planned(scored.parent, wanted, scored.path)) == reap
    other = tmp_path / "layers"
    v4.score(scored.parent, [[1, 2]], other, axes=["layers"], workers=1)
    assert kept_experts(planned(scored.parent, wanted, other)) == gate
    counted = tmp_path / "frequency"
    blocks = [block.prefix for block in scored.parent.catalogue.blocks]
    values = {f"frequency/n_routed_experts/{b}": np.arange(6, dtype=np.float32) for b in blocks}
    write_scores(counted, scored.parent, values)
    either = keep(["reap", "frequency", "even"])
    assert kept_experts(planned(scored.parent, either, counted)) == [[3, 4, 5]] * 8


def test_dspark_drafters_fall_back_and_the_plan_says_so(tmp_path: Path) -> None:
    """The forward has no DSpark drafters, so no file has scores of them."""
    changes = {
        **ODD,
        "compress_ratios": [*ODD["compress_ratios"][:7], 0, 0, 0],
        "dspark_target_layer_ids": (3, 5, 6),
        "dspark_noise_token_id": 77,
        "dspark_markov_rank": 7,
    }
    folder = write_parent(tmp_path / "parent", "flash-0731", layers=7, changes=changes)
    parent, path = v4.open(folder), tmp_path / "s"
    v4.score(parent, [[5, 6, 7, 8]], path, workers=1)
    keep = {
        "experts": {"keep": 3, "by": "reap"},
        "q_lora_rank": {"keep": 30, "by": "activation"},
        "moe_intermediate_size": {"keep": 20, "by": ["activation", "first"]},
    }
    plan = planned(parent, keep, path)
    gate = planned(parent, {"experts": {"keep": 3, "by": "gate"}})
    norm = planned(parent, {"q_lora_rank": {"keep": 30, "by": "norm"}})
    for mine, by_gate, by_norm in zip(
        *(p.selections.blocks[-3:] for p in (plan, gate, norm)), strict=True
    ):
        assert mine.source.is_drafter
        assert np.array_equal(mine.kept["n_routed_experts"], by_gate.kept["n_routed_experts"])
        assert np.array_equal(mine.kept["q_lora_rank"], by_norm.kept["q_lora_rank"])
        assert mine.kept["moe_intermediate_size"].tolist() == list(range(20))
    notes = "\n".join(plan.notes)
    assert "scores of 4 tokens" in notes
    assert "reap chose experts" in notes
    assert (
        "no scores of experts in 3 place(s), where `by: gate` chose: mtp.0., mtp.1., mtp.2."
        in notes
    )
    assert "no scores of q_lora_rank in 3 place(s), where `by: norm` chose" in notes
    assert "where `by: first` chose" in notes


def test_neurons_of_an_expert_without_tokens_go_by_norm(scored: Scored, tmp_path: Path) -> None:
    path = tmp_path / "s"
    v4.score(scored.parent, [[5]], path, axes=["moe_intermediate_size"], workers=1)
    plan = planned(
        scored.parent,
        {"moe_intermediate_size": {"keep": 9, "by": "activation"}, "mtp": "drop"},
        path,
    )
    norm = planned(scored.parent, {"moe_intermediate_size": {"keep": 9, "by": "norm"}})
    reached = set(scored.weights["layers.0.ffn.gate.tid2eid"][5].tolist())
    first, by_norm = plan.selections.blocks[0], norm.selections.blocks[0]
    for expert in set(range(6)) - reached:
        rows = [block.kept["moe_intermediate_size"][expert] for block in (first, by_norm)]
        assert np.array_equal(*rows)
    (note,) = [note for note in plan.notes if note.startswith("no scores of moe")]
    assert "by: norm" in note and "layers.0.experts." in note


def test_layers_by_influence_respect_the_kinds(scored: Scored) -> None:
    """Kinds are given: each layer is the best of its kind that leaves the order rising."""
    keep = {"layers": {"compress_ratios": [0, 4, 4], "hash_layers": 1, "by": "influence"}}
    plan = planned(scored.parent, keep, scored.path)
    influence = scored.scores["influence/layers/model"]
    ratios, is_hash = ODD["compress_ratios"][:7], [True, True] + [False] * 5
    choices = [
        (a, b, c)
        for a in range(7)
        for b in range(a + 1, 7)
        for c in range(b + 1, 7)
        if (ratios[a], is_hash[a]) == (0, True)
        and (ratios[b], is_hash[b]) == (ratios[c], is_hash[c]) == (4, False)
    ]
    wanted = max(choices, key=lambda layers: influence[list(layers)].sum())
    assert tuple(block.source.index for block in plan.selections.blocks[:3]) == wanted


@pytest.mark.parametrize("better", [2, 5])
def test_scores_decide_between_layers_that_change_their_ratio(
    scored: Scored, tmp_path: Path, better: int
) -> None:
    """Layers 2 and 5 have ratio 16; beside the cost of a change the scores must not drown."""
    influence = np.full(7, 0.5)
    influence[better] += 1e-12
    path = write_scores(tmp_path / "s", scored.parent, {"influence/layers/model": influence})
    keep = {"layers": {"compress_ratios": [0, 8], "hash_layers": 1, "by": "influence"}}
    plan = planned(scored.parent, keep, path)
    assert [block.source.index for block in plan.selections.blocks[:2]] == [0, better]


def test_a_plan_follows_the_content_of_the_scores_and_not_their_place(
    scored: Scored, tmp_path: Path
) -> None:
    keep = {"hidden_size": {"keep": 40, "by": "scores"}}
    plan = planned(scored.parent, keep, scored.path)
    copy = tmp_path / "elsewhere" / scored.path.name
    copy.parent.mkdir()
    shutil.copy(scored.path, copy)
    assert planned(scored.parent, keep, copy).plan_hash == plan.plan_hash
    assert plan.recipe.scores == str(scored.path)
    assert plan.recorded_recipe.scores == scored.path.name
    assert len(plan.recipe.scores_blake3) == 64
    other = tmp_path / "other"
    v4.score(scored.parent, scored.prompts[:1], other, workers=1)
    assert planned(scored.parent, keep, other).plan_hash != plan.plan_hash


def test_a_replica_is_verified_and_planned_again_from_its_record(
    scored: Scored, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    shutil.copy(scored.path, path)
    plan = planned(scored.parent, EVERY_AXIS, path)
    replica = v4.slice(plan, tmp_path / "replica", workers=2)
    path.unlink()
    assert v4.verify(replica, scored.parent, workers=2).passed
    text = (tmp_path / "replica" / "recipe.yaml").read_text()
    assert str(tmp_path) not in text and "scores: s\n" in text
    recorded = recipe_from_text(text, "recipe.yaml")
    assert recorded.scores_blake3 == plan.recipe.scores_blake3
    again = v4.plan(scored.parent, recorded, scores=scored.path)
    assert again.plan_hash == plan.plan_hash
    other = tmp_path / "other"
    v4.score(scored.parent, scored.prompts[:1], other, workers=1)
    with pytest.raises(PlanError, match="not the scores file that the recipe") as error:
        v4.plan(scored.parent, recorded, scores=other)
    assert f"where: {other}" in str(error.value)
    assert f"rule: blake3 {recorded.scores_blake3}" in str(error.value)
    assert "next: name that file with --scores" in str(error.value)


HIDDEN = {"hidden_size": {"keep": 40, "by": "energy"}}


def test_scores_of_another_parent_are_refused(scored: Scored, small_parent: Path) -> None:
    other = v4.open(small_parent)
    with pytest.raises(PlanError, match="the scores are of another parent") as error:
        planned(other, {"hidden_size": 128}, scored.path)
    text = str(error.value)
    assert f"where: {scored.path}" in text
    assert f"value: {scored.parent.name}, fingerprint {scored.parent.fingerprint[:16]}" in text
    assert f"rule: {other.name}, fingerprint {other.fingerprint[:16]}" in text
    assert f"next: v4surgery score {other.name} --prompts FILE" in text


def test_an_estimate_for_a_remote_parent_takes_scores_as_a_plan_does(scored: Scored) -> None:
    recipe = Recipe.model_validate({"name": "test", "keep": EVERY_AXIS, "scores": str(scored.path)})
    plan, is_open = estimate_plan(scored.parent, recipe)
    assert not is_open
    assert plan.plan_hash == v4.plan(scored.parent, recipe).plan_hash
    cheap = {"experts": {"keep": 3, "by": ["scores", "gate"]}}
    plan, is_open = estimate_plan(
        scored.parent, Recipe.model_validate({"name": "test", "keep": cheap})
    )
    assert is_open


def test_a_score_that_the_file_lacks_is_named(scored: Scored, tmp_path: Path) -> None:
    path = tmp_path / "s"
    v4.score(scored.parent, [[1, 2]], path, axes=["layers"], workers=1)
    with pytest.raises(PlanError, match="does not have this score") as error:
        planned(scored.parent, HIDDEN, path)
    text = str(error.value)
    assert f"where: {path}: energy of hidden_size" in text
    assert "value: influence of layers" in text
    assert "--axes hidden_size --prompts FILE" in text


def test_no_scores_file_is_a_usage_error(scored: Scored) -> None:
    with pytest.raises(UsageError, match="no scores file is named") as error:
        planned(scored.parent, HIDDEN)
    assert "where: keep.hidden_size" in str(error.value)
    assert "--scores FILE" in str(error.value) and "next: make one" in str(error.value)


def test_a_file_of_another_format_is_refused(scored: Scored, tmp_path: Path) -> None:
    values = {"energy/hidden_size/model": np.ones(64)}
    path = write_scores(tmp_path / "s", scored.parent, values, format=2)
    with pytest.raises(PlanError, match="not a scores file") as error:
        planned(scored.parent, HIDDEN, path)
    assert "format 2" in str(error.value)


def test_scores_that_nothing_asks_for_are_noted(scored: Scored) -> None:
    plan = planned(scored.parent, {"hidden_size": 40}, scored.path)
    assert f"no `by` of the recipe took a score of {scored.path.name}" in plan.notes


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        ("{hidden_size: {keep: 8, by: reap}}", "`reap` is no score of this axis; it has energy"),
        ("{experts: {keep: 8, by: energy}}", "`energy` is no score of this axis; it has reap and"),
        ("{heads: {groups: {keep: 2, by: [activation, even]}}}", "it has contribution"),
        ("{q_lora_rank: {keep: 2, by: [scores, gate]}}", "`gate` chooses experts only"),
        ("{layers: {count: 2, by: reap}}", "must be one of: even, first, kinds"),
        ("{layers: {count: 2, by: [influence, gate]}}", "must be one of: even, first, kinds"),
        ("{q_lora_rank: {keep: 2, by: [even, scores]}}", "`even` is always there, so `scores`"),
        ("{q_lora_rank: {keep: 2, by: [scores, ids], ids: [0, 1]}}", "`ids` stands alone"),
        ("{q_lora_rank: {keep: 2, by: []}}", "must have at least 1 entry"),
        ("{q_lora_rank: {keep: 2, by: [scores, evn]}}", "did you mean even?"),
        ("{q_lora_rank: {keep: 2, by: {scores: 1}}}", "must be one of: first, even"),
    ],
)
def test_a_way_that_does_not_fit_the_axis_is_a_recipe_error(keep: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_text(f"name: x\nkeep:\n  {keep[1:-1]}", "r.yaml")
    line = next(line for line in error.value.problems if problem in line)
    assert line.startswith("r.yaml:3: keep.") and ".by" in line.split(": ")[1]


def test_a_digest_is_64_hexadecimal_digits() -> None:
    with pytest.raises(RecipeError, match="scores_blake3: must be 64 hexadecimal digits"):
        recipe_from_text("name: x\nscores: s\nscores_blake3: abc", "r.yaml")


def test_the_schema_knows_the_scores_that_the_table_has() -> None:
    """Both say which scores an axis has; recipes must not import what measures them."""
    keep = load_recipe("mini3b").keep.model_copy(
        update={"hc_mult": schema.EnergyPick(keep=2), "vocab_size": schema.FrequencyPick(keep=9)}
    )
    sections = {
        "o_groups": keep.heads.groups,  # type: ignore[union-attr]
        "num_attention_heads": keep.heads.per_group,  # type: ignore[union-attr]
        "nope": keep.head_dim.nope,  # type: ignore[union-attr]
        "index_n_heads": keep.indexer.heads,  # type: ignore[union-attr]
        "index_nope": keep.indexer.head_dim,  # type: ignore[union-attr]
    }
    for item in SCORED:
        section = sections.get(item.dim) or getattr(keep, item.axis)
        assert section.scored == item.scores, item


@pytest.mark.parametrize("name", ["demo", "mini3b", "mini1b", "mini300m", "nano", "tiny-ci"])
def test_builtin_recipes_choose_by_scores_on_every_axis_that_they_cut(name: str) -> None:
    keep = json.loads(load_recipe(name).keep.model_dump_json(exclude_none=True))

    def ways(section: Any) -> list[Any]:
        if not isinstance(section, dict):
            return []
        here = [section["by"]] if "by" in section else []
        return here + [way for value in section.values() for way in ways(value)]

    found = ways(keep)
    assert len(found) >= 9
    assert all(way in (["scores", "even"], ["scores", "gate"]) for way in found)


def test_the_demo_recipe_takes_scores_and_goes_without(demo_parent: Path, tmp_path: Path) -> None:
    parent = v4.open(demo_parent)
    v4.score(parent, [[3, 1, 4, 1, 5, 9, 2, 6]], tmp_path / "s", workers=1)
    by_scores, cheap = v4.plan(parent, "demo", scores=tmp_path / "s"), v4.plan(parent, "demo")
    assert by_scores.plan_hash != cheap.plan_hash
    assert by_scores.config.hidden_size == cheap.config.hidden_size == 128
    (note,) = [note for note in by_scores.notes if note.startswith("scores of 8 tokens")]
    for axis in ("layers", "hidden_size", "experts", "heads", "q_lora_rank", "indexer"):
        assert axis in note
    assert not [note for note in cheap.notes if "chose" in note]


def test_the_page_of_scores_has_every_axis_and_score() -> None:
    rows = (REPOSITORY / "docs" / "scores.md").read_text(encoding="utf-8").splitlines()
    cells = " ".join(cell for row in rows if row.startswith("|") for cell in row.split("|")[1:3])
    for item in SCORED:
        assert f"`{item.axis}" in cells, item
        assert all(f"`{score}`" in cells for score in item.scores), item
