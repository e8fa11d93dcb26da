"""A very small parent of every layer kind, and recipes over all axes for it.

Seven widths of the parent differ, so that no axis can stand in for another. Prompts fill three
windows of ratio 8 and six of ratio 4, of which the indexer takes three.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import v4surgery
from tests.slicers import reference
from tests.support import parents
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.recipes import Recipe
from v4surgery.validation.masked import MaskedReport, check_masked

TINY: dict[str, Any] = {
    "vocab_size": 21,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_hash_layers": 2,
    "num_attention_heads": 9,
    "head_dim": 23,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 11,
    "o_lora_rank": 5,
    "o_groups": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "compress_ratios": [0, 4, 8, 4, 0, 0],
    "index_n_heads": 3,
    "index_head_dim": 22,
    "index_topk": 3,
    "sliding_window": 6,
    "hc_mult": 4,
    # Three rounds of Sinkhorn say as much as twenty of whether the right streams are in the sums.
    "hc_sinkhorn_iters": 3,
    "max_position_embeddings": 1024,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 64},
}
PROMPT_TOKENS = (27,)
# A cut on every axis at once.
KEEP: dict[str, Any] = {
    "layers": {"ids": [0, 1, 2, 3], "compress_ratios": [0, 4, 6, 4], "hash_layers": 2},
    "hidden_size": {"keep": 20, "by": "random"},
    "hc_mult": [3, 0, 2],
    "vocab_size": [0, 1, 3, 4, 7, 8, 9, 12, 14, 16, 19, 20],
    "experts": [3, 0, 2],
    "moe_intermediate_size": {"keep": 14, "by": "random"},
    "heads": {"groups": [2, 0], "per_group": {"keep": 2, "by": "random"}},
    "head_dim": {"nope": [4, 1, 6], "rope": 8},
    "q_lora_rank": {"keep": 8, "by": "random"},
    "o_lora_rank": {"keep": 3, "by": "random"},
    "indexer": {"heads": [2, 0], "head_dim": {"keep": 12, "ids": [5, 0, 3, 2]}},
}


def cut(parent: Checkpoint, out: Path, keep: dict[str, Any], **fields: Any) -> Path:
    """A replica by a recipe."""
    recipe = Recipe.model_validate({"name": "replica", "keep": keep, **fields})
    return v4surgery.slice(v4surgery.plan(parent, recipe), out, workers=1).path


def prompts(vocab_size: int, lengths: Sequence[int] = PROMPT_TOKENS) -> list[list[int]]:
    """Random tokens."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def graded(replica: Path, parent: Checkpoint) -> MaskedReport:
    """Grade two of a replica, on prompts of its own vocabulary."""
    with v4surgery.open(replica) as opened:
        return check_masked(opened, parent, prompts(opened.config.vocab_size))


class Case(NamedTuple):
    """A parent, its values, and a faithful replica of it."""

    parent: Checkpoint
    values: reference.Tensors
    replica: Path


def make_case(folder: Path, changes: dict[str, Any], keep: dict[str, Any], **fields: Any) -> Case:
    path = parents.write_parent(folder / "parent", changes=changes)
    parent = v4surgery.open(path)
    values = reference.decode(parents.read_tensors(path))
    return Case(parent, values, cut(parent, folder / "replica", keep, **fields))


class Draw:
    """A random recipe, field by field."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def recipe(self) -> dict[str, Any]:
        """Some of all axes; storage, compensation and the drafter too."""
        chance, some = self.rng.random, self.some
        store = "native" if chance() < 0.15 else "bf16"
        keep: dict[str, Any] = {"mtp": self.rng.choice(["keep", "drop"])}
        if chance() < 0.9:
            keep["layers"] = self.layers()
        if store == "bf16":  # FP4 is stored in groups of 32, which is all that there is
            keep |= some({"hidden_size": (9, 32), "moe_intermediate_size": (1, 32)})
        keep |= some({"hc_mult": (1, 4), "q_lora_rank": (4, 11), "o_lora_rank": (1, 5)})
        if chance() < 0.4:
            keep["vocab_size"] = sorted({0, 1, *self.rng.sample(range(21), 8)})
        if chance() < 0.7:
            keep["experts"] = self.experts()
        if chance() < 0.6:
            keep["heads"] = some({"groups": (1, 3), "per_group": (1, 3)})
        rope = self.rng.choice([16, 8, 4, 2])
        if chance() < 0.6:
            keep["head_dim"] = {"rope": rope, **some({"nope": (1, 7)})}
        else:
            rope = 16
        keep["indexer"] = self.indexer(rope)
        if chance() < 0.4:
            keep["sliding_window"] = self.rng.randint(1, 9)
        return {
            "keep": keep,
            "seed": self.rng.randrange(100),
            "compensate": chance() < 0.3,
            "store": {"dtype": store},
        }

    def pick(self, least: int, most: int) -> dict[str, Any] | list[int]:
        """A choice on an axis of ``most`` units: by rule, or ids in any order."""
        count = self.rng.randint(least, most)
        if self.rng.random() < 0.3:
            return self.rng.sample(range(most), count)
        return {"keep": count, "by": self.rng.choice(["first", "even", "random", "norm"])}

    def some(self, axes: dict[str, tuple[int, int]]) -> dict[str, Any]:
        return {axis: self.pick(*sizes) for axis, sizes in axes.items() if self.rng.random() < 0.6}

    def layers(self) -> dict[str, Any]:
        """Some of the layers, perhaps with other ratios or without hash routing."""
        ids = sorted(self.rng.sample(range(5), self.rng.randint(1, 3)))
        changed = {0: [0], 4: [4, 4, 0], 8: [8, 8, 5, 11, 0]}
        layers: dict[str, Any] = {"ids": ids, "ape": self.rng.choice(["pick", "interpolate"])}
        if self.rng.random() < 0.5:
            ratios = [self.rng.choice(changed[TINY["compress_ratios"][i]]) for i in ids]
            if layers["ape"] == "pick":
                ratios = [5 if ratio == 11 else ratio for ratio in ratios]
            layers["compress_ratios"] = ratios
            layers["hash_layers"] = sum(i < 2 for i in ids)
        if self.rng.random() < 0.3:
            layers["hash_to_score"] = "zero-bias"
            layers["hash_layers"] = self.rng.randint(0, sum(i < 2 for i in ids))
        return layers

    def experts(self) -> dict[str, Any]:
        count = self.rng.randint(1, 4)
        return {
            "keep": count,
            "by": self.rng.choice(["gate", "random", "norm", "even"]),
            "per_token": self.rng.randint(1, min(count, 2)),
            "hash_table": self.rng.choice(["nearest", "balanced"]),
        }

    def indexer(self, rope: int) -> dict[str, Any]:
        indexer = self.some({"heads": (1, 3)})
        if self.rng.random() < 0.5:
            indexer["head_dim"] = {"keep": rope + self.rng.randint(1, 6), "by": "random"}
        if self.rng.random() < 0.5:
            indexer["topk"] = self.rng.randint(1, 5)
        return indexer
