"""Any text at all loads, or ends in a RecipeError or UsageError of printable lines."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4surgery.errors import RecipeError, UsageError
from v4surgery.recipes import (
    Recipe,
    builtin_names,
    builtin_path,
    dump_recipe,
    load_recipe,
    recipe_from_text,
)

BUILTIN_TEXTS = [builtin_path(name).read_text(encoding="utf-8") for name in builtin_names()]
HAZARDS = [
    *(
        "\0",
        "\t",
        "\ud800",
        "\ufeff",
        "\x85",
        "&a ",
        "*a",
        "!!set ",
        "!x ",
        "<<: ",
        "? ",
        "%YAML 9",
    ),
    *("---\n", "...", "{", "[", "]", "}", "- ", ": ", ", ", '"', "'", "|\n", ">-\n", "\\U00110000"),
    *("null", "true", "1e999", ".nan", "-1", "9" * 5000, "0x1f", "[" * 40, "{a: " * 40, "#", "~"),
    *("extends: nano\n", "extends: .\n", "keep: {layers: {ids: [3]}}\n", "ids: [0, 0]"),
]
few = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(text: str, *overrides: str) -> None:
    try:
        recipe = recipe_from_text(text, "fuzz.yaml", overrides)
    except RecipeError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.isprintable() and len(problem) < 1000, problem
    except UsageError:
        pass
    else:
        assert recipe_from_text(dump_recipe(recipe), "dump.yaml") == recipe


@few
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_text_is_answered(text: str) -> None:
    check(text)
    check(f"name: x\ndescription: {text}")
    check("name: x", text, f"keep.experts={text}", f"{text}=1")


@few
@given(
    st.lists(st.sampled_from([*HAZARDS, "name", "keep", "layers", "count", "\n  "]), max_size=12)
)
def test_any_string_of_yaml_hazards_is_answered(pieces: list[str]) -> None:
    check("".join(pieces))
    check("name: x\n" + "".join(pieces))


@settings(few, max_examples=60)
@given(st.data())
def test_a_mutated_builtin_recipe_is_answered(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(BUILTIN_TEXTS))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(st.sampled_from(HAZARDS)) + text[end:]
    check(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
KEYS = ["keep", "layers", "ids", "by", "count", "compress_ratios", "experts", "heads", "indexer"]


@few
@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), plain)
def test_any_value_at_any_key_is_answered(path: list[str], value: object) -> None:
    check("name: x", f"{'.'.join(path)}={value!r}")


def ids(limit: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, limit), min_size=1, max_size=6, unique=True)


picks = st.one_of(
    st.integers(1, 4096),
    ids(4096),
    st.builds(
        lambda units, block, by, seed: {
            "keep": units * block,
            "block": block,
            "by": by,
            "seed": seed,
        },
        st.integers(1, 9),
        st.sampled_from([1, 32, 128]),
        st.sampled_from(["first", "even", "random", "norm", "scores", ["scores", "even"]]),
        st.none() | st.integers(0, 99),
    ),
)
recipes = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True),
        "keep": st.fixed_dictionaries(
            {},
            optional={
                "layers": st.integers(1, 61) | ids(60).map(sorted),
                "hidden_size": picks,
                "heads": st.fixed_dictionaries({}, optional={"groups": picks, "per_group": picks}),
                "head_dim": st.fixed_dictionaries({}, optional={"nope": picks}),
                "experts": picks,
                "mtp": st.sampled_from(["keep", "drop"]),
            },
        ),
    },
    optional={
        "description": st.text(max_size=200),
        "compensate": st.booleans(),
        "validate": st.fixed_dictionaries({"logit_kl": st.floats(0, 1e9)}),
        "store": st.fixed_dictionaries({"max_shard_size": st.integers(1, 2**40)}),
    },
)


@few
@given(recipes)
def test_a_valid_recipe_survives_dump_and_load(plain_recipe: dict[str, object]) -> None:
    recipe = Recipe.model_validate(plain_recipe)
    assert recipe_from_text(dump_recipe(recipe), "dump.yaml") == recipe


@settings(few, max_examples=60)
@given(st.text(st.characters(exclude_categories=()), max_size=12))
def test_any_name_of_a_recipe_is_answered(name: str) -> None:
    for candidate in (name, f"{name}.yaml"):
        with pytest.raises(UsageError) as caught:
            load_recipe(candidate)
        assert all(line.isprintable() for line in str(caught.value).splitlines())
