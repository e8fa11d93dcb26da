from __future__ import annotations

import re

import pytest

from v4surgery.recipes import Recipe, builtin_names, builtin_path, dump_recipe, load_recipe
from v4surgery.recipes import recipe_from_text as from_text

VOCAB, STREAMS = 129280, 4
BOXED = "python-8m"
CUT_FROM_FLASH = ["mini1b", "mini300m", "mini3b", "nano", "tiny-ci"]


def counts(recipe: Recipe) -> tuple[int, int, int]:
    """Parameters with the drafter, active ones of the trunk, bytes in BF16; by spec/checkpoint.md.

    Independent of the catalogue, so that each can be wrong alone.
    """
    keep = recipe.keep
    assert keep.layers and keep.hidden_size and keep.experts and keep.moe_intermediate_size
    assert keep.heads and keep.heads.groups and keep.heads.per_group and keep.q_lora_rank
    assert keep.head_dim and keep.head_dim.nope and keep.head_dim.rope and keep.o_lora_rank
    assert keep.indexer and keep.indexer.heads and keep.indexer.head_dim
    assert keep.layers.compress_ratios and keep.experts.keep and keep.experts.per_token
    d, q, o = keep.hidden_size.keep, keep.q_lora_rank.keep, keep.o_lora_rank.keep
    f, e, k = keep.moe_intermediate_size.keep, keep.experts.keep, keep.experts.per_token
    g, n = keep.heads.groups.keep, keep.heads.groups.keep * keep.heads.per_group.keep
    h = keep.head_dim.nope.keep + keep.head_dim.rope
    x, y = keep.indexer.heads.keep, keep.indexer.head_dim.keep
    hash_layers = keep.layers.hash_layers or 0
    hc = 2 * ((2 + STREAMS) * STREAMS * (STREAMS * d + 1) + 3)
    hc_head = STREAMS * STREAMS * d + STREAMS + 1

    def f32(ratio: int, scored: bool) -> int:
        ape = {0: 0, 4: 4 * (2 * h + 2 * y)}.get(ratio, ratio * h)
        return hc + n + ape + (e if scored else 0)

    def bf16(ratio: int, num_experts: int) -> int:
        attention = q * d + n * h * q + h * d + n * h * o + d * g * o + q + h + 2 * d
        compressor = {0: 0, 4: 4 * h * d + h}.get(ratio, 2 * h * d + h)
        indexer = x * y * q + x * d + 4 * y * d + y if ratio == 4 else 0
        return attention + compressor + indexer + e * d + (num_experts + 1) * 3 * f * d

    layers = list(enumerate(keep.layers.compress_ratios))
    wide = sum(f32(ratio, i >= hash_layers) for i, ratio in layers) + hc_head
    ends = 2 * VOCAB * d + d
    trunk = ends + sum(bf16(ratio, e) for _, ratio in layers)
    active = ends + wide + sum(bf16(ratio, k) for _, ratio in layers)
    drafter = bf16(0, e) + 2 * d * d + 3 * d
    drafter_wide = f32(0, True) + hc_head
    total = trunk + wide + drafter + drafter_wide
    stored = 2 * (trunk + drafter) + 4 * (wide + drafter_wide) + hash_layers * VOCAB * k * 8
    return total, active, stored


def test_the_builtin_recipes_are_these() -> None:
    assert builtin_names() == sorted([*CUT_FROM_FLASH, "demo", "experts32", "layers4", BOXED])


@pytest.mark.parametrize("name", builtin_names())
def test_a_builtin_recipe_loads_and_survives_a_dump(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert from_text(dump_recipe(recipe), "dumped") == recipe
    assert load_recipe(builtin_path(name)) == recipe


@pytest.mark.parametrize("name", builtin_names())
def test_a_builtin_recipe_says_its_command_and_its_parent(name: str) -> None:
    first = builtin_path(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and f"v4surgery slice --recipe {name}" in first
    others = {"demo": None, BOXED: "python-14m"}
    assert load_recipe(name).parent == others.get(name, "deepseek-ai/DeepSeek-V4-Flash")


@pytest.mark.parametrize("name", [name for name in builtin_names() if name != BOXED])
def test_a_builtin_recipe_reads_little_to_choose(name: str) -> None:
    dump = load_recipe(name).model_dump_json()
    assert not re.search(r'"by":"(norm|scores|random)"', dump)


def test_mini3b_is_the_recipe_of_the_spec() -> None:
    keep = load_recipe("mini3b").keep
    assert keep.layers and keep.layers.compress_ratios == (0, 0, *(4, 112) * 12, 4, 0)
    assert counts(load_recipe("mini3b"))[:2] == (3_165_670_600, 1_084_701_725)


@pytest.mark.parametrize("name", [name for name in CUT_FROM_FLASH if name != "tiny-ci"])
def test_the_description_states_the_parameter_counts(name: str) -> None:
    recipe = load_recipe(name)
    stated = [float(number) for number in re.findall(r"([\d.]+) B ", recipe.description)]
    total, active, _ = counts(recipe)
    assert stated == [round(total / 1e9, 2), round(active / 1e9, 2)]


def test_tiny_ci_fits_in_60_mb_with_the_tokenizer() -> None:
    total, _, stored = counts(load_recipe("tiny-ci"))
    tokenizer_bytes = 6_400_000
    assert stored + tokenizer_bytes < 60_000_000
    assert load_recipe("tiny-ci").description.startswith(
        f"{total / 1e6:.0f} M parameters, {stored / 1e6:.0f} MB of weights"
    )
