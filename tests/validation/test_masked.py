"""Grade two: replicas equal their parents with the removed units masked out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import v4surgery
from tests.replicas.test_transformers import BUILTIN, FLASH_SCALED, PARENTS
from tests.support.parents import write_parent
from tests.validation.masked_support import TINY, Draw, cut, graded, prompts
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer
from v4surgery.recipes import builtin_names, dump_recipe, load_recipe
from v4surgery.validation.masked import check_masked
from v4surgery.validation.taps import TAPS

# An order of sums is no mistake; see TOLERANCE in the package for what it may come to.
ROUNDING = 3e-6


# Recipes


@pytest.mark.parametrize("first", range(0, 200, 10))
def test_two_hundred_random_recipes_hold(first: int, tiny: Checkpoint, tmp_path: Path) -> None:
    for seed in range(first, first + 10):
        recipe = Draw(seed).recipe()
        report = graded(cut(tiny, tmp_path / str(seed), **recipe), tiny)
        assert report.passed, (seed, recipe, report.failures)
        assert report.worst is not None and report.worst.error < ROUNDING, (seed, report.worst)


def test_random_recipes_cover_every_axis_and_option() -> None:
    """What the two hundred say, so that none of it is missing by chance."""
    recipes = [Draw(seed).recipe() for seed in range(200)]
    axes = [axis for recipe in recipes for axis in recipe["keep"]]
    assert set(axes) == {
        *("layers", "hidden_size", "hc_mult", "vocab_size", "experts", "moe_intermediate_size"),
        *("heads", "head_dim", "q_lora_rank", "o_lora_rank", "indexer", "sliding_window", "mtp"),
    }
    assert min(axes.count(axis) for axis in axes) > 40
    layers = [recipe["keep"].get("layers", {}) for recipe in recipes]
    for key in ("compress_ratios", "hash_to_score"):
        assert sum(key in layer for layer in layers) > 20
    for name, value in (("compensate", True), ("store", {"dtype": "native"})):
        assert sum(recipe[name] == value for recipe in recipes) > 10


# The parents that the built-in recipes are scaled down to, made smaller where no recipe minds.
SMALLER = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 64,
    "o_lora_rank": 64,
    "vocab_size": 256,
    "hc_sinkhorn_iters": 3,
}


@pytest.fixture(scope="module")
def flash_parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flash")
    return {
        name: write_parent(
            folder / name,
            "flash",
            layers=layers,
            changes={**FLASH_SCALED, **SMALLER, "n_routed_experts": experts},
        )
        for name, (layers, experts) in PARENTS.items()
    }


MIXING = {"python-8m"}
"""Recipes that mix units by pca and svd: there is no mask for that (tests/methods)."""


def test_every_built_in_recipe_that_picks_units_is_graded() -> None:
    assert builtin_names() == sorted(BUILTIN)
    assert {name for name in BUILTIN if "method: pca" in dump_recipe(load_recipe(name))} == MIXING


@pytest.mark.parametrize("name", sorted(BUILTIN.keys() - MIXING))
def test_built_in_recipe_scaled_down_holds(
    name: str, flash_parents: dict[str, Path], tmp_path: Path
) -> None:
    case = BUILTIN[name]
    # A top-k below the entries of the prompt: otherwise the indexer has nothing to choose.
    changes = ("keep.indexer.topk=12",) if load_recipe(name).keep.indexer else ()
    recipe = load_recipe(name, (*case.overrides, *changes))
    with v4surgery.open(flash_parents[case.parent]) as parent:
        path = v4surgery.slice(v4surgery.plan(parent, recipe), tmp_path / name, workers=1).path
        with v4surgery.open(path) as replica:
            report = check_masked(replica, parent, prompts(256, (140,)))
    assert report.passed, report.failures
    assert report.worst is not None and report.worst.error < ROUNDING
    blocks = {tap.place for tap in report.taps}
    assert blocks == {"", *(block.prefix for block in replica.catalogue.blocks)}


@pytest.mark.gpu
def test_a_random_recipe_holds_on_the_gpu(tiny: Checkpoint, tmp_path: Path) -> None:
    path = cut(tiny, tmp_path / "replica", **Draw(0).recipe())
    with v4surgery.open(path) as replica:
        ids = prompts(replica.config.vocab_size, (27, 9))
        report = check_masked(replica, tiny, ids, device="cuda")
    assert report.passed, report.failures


# Identity and supersets


def logits_of(path: Path, ids: list[list[int]]) -> list[torch.Tensor]:
    with v4surgery.open(path) as model, Streamer(model, Numerics()) as streamer:
        return streamer.run(ids, logits="all")


def test_identity_is_exact(tiny: Checkpoint, tiny_path: Path, tmp_path: Path) -> None:
    replica = cut(tiny, tmp_path / "replica", {})
    report = graded(replica, tiny)
    assert report.passed and not report.not_graded
    ids = prompts(TINY["vocab_size"], (27, 9))
    before, after = logits_of(tiny_path, ids), logits_of(replica, ids)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_experts_that_no_token_goes_to_can_go_and_the_parent_itself_is_computed(
    tmp_path: Path,
) -> None:
    """The masked parent is the parent where the mask hides what was never chosen."""
    changes = {**TINY, "num_hash_layers": 0, "n_routed_experts": 12}
    path = write_parent(tmp_path / "parent", changes=changes)
    ids, chosen = prompts(TINY["vocab_size"]), set[int]()
    with v4surgery.open(path) as parent:
        with Streamer(parent, Numerics()) as streamer:
            (before,) = streamer.run(ids, observe=_watch_gates(chosen), logits="all")
        assert len(chosen) < 12
        # The drafter has a gate of its own, which may choose what the trunk does not.
        replica = cut(parent, tmp_path / "replica", {"experts": sorted(chosen), "mtp": "drop"})
        report = graded(replica, parent)
    assert report.passed, report.failures
    (after,) = logits_of(replica, ids)
    # The gate's product has fewer columns, whose sums may be added in another order.
    assert ((after - before).norm(dim=1) / before.norm(dim=1)).max() < 1e-6


def _watch_gates(chosen: set[int]) -> Any:
    def observe(module: torch.nn.Module, prefix: str, prompt: int) -> Any:
        if not prefix.startswith("layers."):
            return lambda: None
        gate = module.get_submodule("ffn.gate")

        def hook(_: object, __: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            chosen.update(output[0].flatten().tolist())

        return gate.register_forward_hook(hook).remove

    return observe


# What is said


ATTENTION = ["attn.hc", "attn.in", "attn.heads", "attn.out"]
INDEXER = ["wq_b", "compressor", "weights_proj"]
GATE = ["gate.indices", "gate.scores", "gate.weights"]
EXPERTS = ["ffn.hc", "ffn.in", *GATE, "ffn.out", "out"]


def test_report_has_every_tap_of_every_block_in_the_order_of_the_forward(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    report = graded(cut(tiny, tmp_path / "replica", {"hidden_size": 20}), tiny)
    places: dict[str, list[str]] = {}
    for tap in report.taps:
        if tap.tap != "ffn.experts":  # there only where some were idle
            places.setdefault(tap.place, []).append(tap.tap)
    indexer = [*(f"attn.indexer.{part}" for part in INDEXER), "attn.indexer"]
    plain, csa = ATTENTION + EXPERTS, [*ATTENTION[:2], *indexer, *ATTENTION[2:], *EXPERTS]
    assert places == {
        "": ["embed", "logits"],
        "layers.0.": ["in", *plain],
        "layers.1.": csa,
        "layers.2.": plain,
        "layers.3.": csa,
        "layers.4.": plain,
        "mtp.0.": ["in", *plain, "draft"],
    }
    assert set(csa) | {"in"} > set(TAPS)
    assert json.loads(json.dumps(report.to_json()))["verdict"] == "passed"


def test_requantized_tensors_are_not_graded_and_hide_nothing_else(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    """Rows of FP4 stay as they are; FP8 blocks of 14 of 32 rows are quantized again."""
    keep = {"heads": {"groups": [2, 0]}, "q_lora_rank": 8}
    report = graded(cut(tiny, tmp_path / "replica", keep, store={"dtype": "native"}), tiny)
    ungraded = {tap.name for tap in report.taps if not tap.graded}
    named = {item.place + item.what for item in report.not_graded}
    assert ungraded <= named
    rounded = json.loads((tmp_path / "replica" / "v4surgery.json").read_text())["report"]
    assert rounded["requantized"]["by_tensor"] or not ungraded
    assert report.passed and "layers.1.out" not in ungraded


def test_scaffold_is_not_graded(tiny: Checkpoint, tmp_path: Path) -> None:
    report = graded(cut(tiny, tmp_path / "replica", {"hidden_size": 20}, init="random"), tiny)
    assert (report.verdict, report.taps, report.passed) == ("not graded", (), False)
    assert "init: random" in str(report.not_graded[0])
