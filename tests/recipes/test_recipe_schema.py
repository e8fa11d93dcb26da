from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from v4surgery.recipes import Experts, IndexDims, Layers, Pick, Recipe, Section, Store
from v4surgery.recipes._problems import section_at


def errors_of(model: type[Section], value: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return {
        # "(one)" and the like say which form of a field was tried.
        ".".join(str(part) for part in error["loc"] if not str(part).startswith("(")): error["msg"]
        for error in caught.value.errors()
    }


def test_an_int_is_short_for_keep_evenly_spaced() -> None:
    assert Pick.model_validate(1536) == Pick(keep=1536, by="even")


def test_a_list_is_short_for_ids_and_gives_keep() -> None:
    assert Pick.model_validate([3, 1]) == Pick(keep=2, by="ids", ids=(3, 1))
    assert Pick.model_validate({"ids": [3, 1]}) == Pick.model_validate([3, 1])


def test_null_means_not_written() -> None:
    written = {"keep": 8, "by": None, "ids": None, "block": None}
    assert Pick.model_validate(written) == Pick(keep=8)


@pytest.mark.parametrize("value", [True, "28", 28.0, 28.5, [True], ["1"], [-1], [], 0, -1, 2**31])
def test_a_count_is_a_positive_int_of_no_other_type(value: object) -> None:
    errors_of(Pick, value)
    errors_of(Layers, value)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"by": "ids"}, "ids"),
        ({"keep": 2, "by": "even", "ids": [0, 1]}, "ids"),
        ({"keep": 3, "by": "ids", "ids": [0, 1]}, "ids"),
        ({"ids": [1, 1]}, "ids"),
        ({"by": "norm"}, "keep"),
        ({"keep": 100, "block": 128}, "block"),
        ({"keep": 100, "by": "gate"}, "by"),
    ],
)
def test_pick_rules_are_reported_once_at_their_field(value: object, field: str) -> None:
    assert list(errors_of(Pick, value)) == [field]


def test_gate_chooses_experts() -> None:
    assert Experts(keep=24, by="gate").by == "gate"


def test_experts_may_name_only_the_top_k() -> None:
    experts = Experts.model_validate({"per_token": 4})
    assert (experts.keep, experts.per_token, experts.hash_table) == (None, 4, "nearest")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"by": "gate"}, "keep"),
        ({"seed": 3, "per_token": 2}, "keep"),
        ({"keep": 4, "per_token": 5}, "per_token"),
        ({"ids": [0, 1], "per_token": 3}, "per_token"),
        ({"by": "ids", "per_token": 3}, "ids"),
    ],
)
def test_experts_rules(value: object, field: str) -> None:
    assert list(errors_of(Experts, value)) == [field]


def test_the_index_head_dim_counts_the_rope_dims_but_its_ids_do_not() -> None:
    assert IndexDims.model_validate(96).keep == 96
    assert IndexDims.model_validate({"keep": 96, "ids": list(range(64))}).keep == 96
    assert list(errors_of(IndexDims, {"keep": 96, "ids": list(range(96))})) == ["ids"]
    assert list(errors_of(IndexDims, {"keep": 96, "ids": list(range(63))})) == ["ids"]
    assert list(errors_of(IndexDims, list(range(64)))) == ["keep"]


def test_compress_ratios_repeat_is_expanded_and_gives_the_count() -> None:
    layers = Layers.model_validate({"compress_ratios": [0, {"repeat": 2, "of": [4, 112]}, 0]})
    assert layers.count == 6
    assert layers.compress_ratios == (0, 4, 112, 4, 112, 0)


def test_layer_ids_rise_and_give_the_count() -> None:
    assert Layers.model_validate([0, 2, 5]) == Layers(count=3, by="ids", ids=(0, 2, 5))
    assert list(errors_of(Layers, [0, 5, 2])) == ["ids"]
    assert list(errors_of(Layers, [0, 2, 2])) == ["ids"]


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ({}, ["count"]),
        ({"by": "kinds"}, ["count"]),
        ({"count": 3, "compress_ratios": [0, 4]}, ["compress_ratios"]),
        ({"count": 2, "hash_layers": 3}, ["hash_layers"]),
        ({"count": 2, "by": "gate"}, ["by"]),
        ({"count": 1001}, ["count"]),
        ({"compress_ratios": [{"repeat": 1000, "of": [4, 4]}]}, ["compress_ratios"]),
        ({"compress_ratios": [{"repeat": 10**9, "of": [4]}]}, ["compress_ratios.0.repeat"]),
        ({"compress_ratios": []}, ["compress_ratios"]),
        (
            {"compress_ratios": [0, True, {"repeat": 2, "of": [4, "4"]}], "hash_layers": 2},
            ["compress_ratios.1", "compress_ratios.2.of.1"],
        ),
    ],
)
def test_layers_rules(value: object, fields: list[str]) -> None:
    assert list(errors_of(Layers, value)) == fields


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5kB", 1500), (4096, 4096)],
)
def test_shard_sizes_are_bytes(size: object, size_bytes: int) -> None:
    assert Store.model_validate({"max_shard_size": size}).max_shard_size == size_bytes


@pytest.mark.parametrize("size", ["5", "5G", "-5GB", "5 iB", "GB", 0, 1.5, True, "9" * 30 + "GB"])
def test_a_shard_size_that_is_none_is_refused(size: object) -> None:
    assert list(errors_of(Store, {"max_shard_size": size})) == ["max_shard_size"]


@pytest.mark.parametrize("name", ["", "Mini", "-x", "a/b", "a b", "../x", "é", "a" * 101])
def test_a_name_is_a_slug(name: str) -> None:
    assert list(errors_of(Recipe, {"name": name})) == ["name"]


def test_numbers_take_ints_but_no_bools_or_infinities() -> None:
    def recipe(value: object) -> dict[str, Any]:
        return {"name": "x", "config": {"beta_fast": value}}

    assert Recipe.model_validate(recipe(32)).config.beta_fast == 32.0
    for value in (True, "32", 0, 1e-31, 1e13, float("inf"), float("nan")):
        assert list(errors_of(Recipe, recipe(value))) == ["config.beta_fast"]


def test_thresholds_are_read_from_the_key_validate() -> None:
    recipe = Recipe.model_validate({"name": "x", "validate": {"top1_agreement": 1}})
    assert recipe.validate_.top1_agreement == 1.0
    assert list(errors_of(Recipe, {"name": "x", "validate_": {}})) == ["validate_"]


def test_a_recipe_is_frozen_and_hashable() -> None:
    recipe = Recipe.model_validate({"name": "x", "keep": {"hidden_size": [1, 2]}})
    assert hash(recipe) == hash(recipe.model_copy())
    with pytest.raises(ValidationError):
        recipe.name = "y"


def test_a_dump_of_plain_data_validates_to_an_equal_recipe() -> None:
    keep = {"layers": {"compress_ratios": [0, {"repeat": 2, "of": [4]}]}, "hidden_size": [3, 1]}
    recipe = Recipe.model_validate({"name": "x", "keep": keep})
    assert Recipe.model_validate(recipe.model_dump(by_alias=True)) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json(by_alias=True)) == recipe


def sections(model: type[Section], path: tuple[str, ...] = ()) -> list[type[Section]]:
    found = [model]
    for name, field in model.model_fields.items():
        below = (*path, field.alias or name)
        if (inner := section_at(below)) is not None:
            found += sections(inner, below)
    return found


def test_every_field_is_described_in_one_line() -> None:
    models = sections(Recipe)
    assert len(models) > 15
    for model in models:
        for name, field in model.model_fields.items():
            text = field.description or ""
            assert text.endswith(".") and "\n" not in text, f"{model.__name__}.{name}"
