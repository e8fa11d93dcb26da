"""Each trap of spec/slicing.md planted in a replica, and caught by grade two, by name.

The mistakes are made in the replica's files, edited after a faithful slice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.slicers import reference
from tests.support import parents
from tests.validation.masked_support import TINY, Case, graded
from v4surgery.errors import CheckpointError

GROUPS, PER_GROUP, HEAD, NOPE, RANKS = 3, 3, 23, 7, 5
INDEXER = "layers.1.attn.indexer."
Array = np.ndarray[Any, Any]


class Spoiled:
    """A copy of a case's replica to edit: tensors as arrays, config, record and recipe."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case, self.path = case, Path(shutil.copytree(case.replica, path))
        self.shards = parents.read_shards(self.path)
        self.config = json.loads((path / "config.json").read_text())
        self.record = json.loads((path / "v4surgery.json").read_text())
        self.recipe = (path / "recipe.yaml").read_text()
        self.kept = reference.kept_blocks(case.replica, json.loads(self._parent_config()))

    def _parent_config(self) -> str:
        return (self.case.replica.parent / "parent" / "config.json").read_text()

    def __getitem__(self, name: str) -> Array:
        """A tensor as stored; bf16 as its values."""
        raw = parents.shard_of(self.shards, name)[name]
        dtype = {**reference.PLAIN, "I8": np.uint8, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8}
        return np.frombuffer(raw.data, dtype[raw.dtype]).reshape(raw.shape).copy()

    def __setitem__(self, name: str, values: Array) -> None:
        shard = parents.shard_of(self.shards, name)
        raw = shard[name]
        assert raw.shape == values.shape, (name, raw.shape, values.shape)
        data = values.astype(reference.PLAIN.get(raw.dtype, np.uint8)).tobytes()
        assert data != raw.data, f"{name}: nothing was planted"
        shard[name] = raw._replace(data=data)

    def drop(self, name: str) -> None:
        del parents.shard_of(self.shards, name)[name]

    def add(self, name: str) -> None:
        next(iter(self.shards.values()))[name] = parents.RawTensor("F32", (2,), bytes(8))

    def source(self, block: str) -> str:
        return self.kept[block].source

    def parents_own(self, block: str, name: str) -> Array:
        """The parent's tensor that a block's comes from."""
        return self.case.values[self.source(block) + name]

    def write(self) -> Path:
        text = json.dumps(self.config)
        parents.write_checkpoint(self.path, text, self.shards)
        (self.path / "v4surgery.json").write_text(json.dumps(self.record))
        (self.path / "recipe.yaml").write_text(self.recipe)
        return self.path


Plant = Callable[[Spoiled], None]


def at(block: str, name: str, change: Callable[[Array], Array]) -> Plant:
    """A plant that changes one tensor."""

    def plant(replica: Spoiled) -> None:
        replica[block + name] = change(replica[block + name])

    return plant


# Trap 1


def flat_heads(replica: Spoiled) -> None:
    """Four heads evenly out of nine, as if there were no groups."""
    kept, wq_b = replica.kept["layers.1."], replica.parents_own("layers.1.", "attn.wq_b")
    dims = np.concatenate([kept.nope, NOPE + kept.rope])
    heads = wq_b.reshape(GROUPS * PER_GROUP, HEAD, -1)[[0, 2, 4, 6]]
    replica["layers.1.attn.wq_b.weight"] = heads[:, dims][:, :, kept.q_lora].reshape(
        -1, len(kept.q_lora)
    )


def other_groups_heads(replica: Spoiled) -> None:
    """Columns of wo_a from the heads of the other group kept."""
    kept, wo_a = replica.kept["layers.1."], replica.parents_own("layers.1.", "attn.wo_a")
    dims = np.concatenate([kept.nope, NOPE + kept.rope])
    wide = wo_a.reshape(GROUPS, RANKS, PER_GROUP, HEAD)
    others = [(np.asarray([0, 1, 2])[heads] + 1) % PER_GROUP for heads in kept.heads]
    rows = [
        wide[g][np.ix_(ranks, heads, dims)].reshape(len(ranks), -1)
        for g, heads, ranks in zip(kept.groups, others, kept.o_lora, strict=True)
    ]
    replica["layers.1.attn.wo_a.weight"] = np.concatenate(rows)


def rolled(axis: int, step: int = 1) -> Callable[[Array], Array]:
    return lambda values: np.roll(values, step, axis)


# Trap 2 and 3


def head_dims(replica: Spoiled, block: str, dims: Array) -> None:
    """Every tensor of a block's heads with these dims of the parent's."""
    kept = replica.kept[block]
    kept.nope, kept.rope = dims[: len(kept.nope)], dims[len(kept.nope) :] - NOPE
    own = {
        name.removeprefix(kept.source): values
        for name, values in replica.case.values.items()
        if name.startswith(kept.source)
    }
    config = {**TINY}
    for name, values in reference.cut_attention(own, config, kept).items():
        if name in ("attn.wq_b", "attn.wkv", "attn.kv_norm", "attn.wo_a"):
            replica[f"{block}{name}.weight"] = values


def first_pairs(replica: Spoiled) -> None:
    kept = replica.kept["layers.0."]
    head_dims(replica, "layers.0.", np.concatenate([kept.nope, NOPE + np.arange(8)]))


def half_of_each_pair(replica: Spoiled) -> None:
    """Pairs (0, 2), (4, 6), ...: the evenly spaced dims of a rope that is not interleaved."""
    kept = replica.kept["layers.0."]
    head_dims(replica, "layers.0.", np.concatenate([kept.nope, NOPE + np.arange(0, 16, 2)]))


def record_of_first_pairs(replica: Spoiled) -> None:
    replica.record["selections"]["model"]["rope"] = list(range(8))


def record_of_half_pairs(replica: Spoiled) -> None:
    replica.record["selections"]["model"]["rope"] = list(range(0, 16, 2))


def other_betas(replica: Spoiled) -> None:
    replica.config["rope_scaling"] |= {"beta_fast": 0.1, "beta_slow": 0.001}


def rope_before_nope(replica: Spoiled) -> None:
    for name in ("attn.wkv.weight", "attn.kv_norm.weight"):
        values = replica["layers.1." + name]
        replica["layers.1." + name] = np.concatenate([values[3:], values[:3]])


def second_half_as_the_first(replica: Spoiled) -> None:
    name = "layers.1.attn.compressor.wkv.weight"
    half = len(replica[name]) // 2
    replica[name] = np.concatenate([replica[name][:half]] * 2)


# Trap 4


def channels_outside_streams(replica: Spoiled) -> None:
    """Columns laid out channel by channel instead of stream by stream."""
    name = "layers.2.hc_attn_fn"
    rows = len(replica[name])
    replica[name] = replica[name].reshape(rows, 3, -1).swapaxes(1, 2).reshape(rows, -1)


def comb_transposed(values: Array) -> Array:
    comb = values[6:].reshape(3, 3, *values.shape[1:]).swapaxes(0, 1)
    return np.concatenate([values[:6], comb.reshape(values[6:].shape)])


# Trap 5

TABLE = "ffn.gate.tid2eid"


def parents_ids(replica: Spoiled) -> None:
    kept = replica.kept["layers.0."]
    replica["layers.0." + TABLE] = replica.parents_own("layers.0.", TABLE)[kept.vocab]


def ids_modulo(replica: Spoiled) -> None:
    kept = replica.kept["layers.0."]
    replica["layers.0." + TABLE] = replica.parents_own("layers.0.", TABLE)[kept.vocab] % 3


def next_stand_in(replica: Spoiled) -> None:
    """The expert that a token lost goes to the other free one."""
    kept, name = replica.kept["layers.1."], "layers.1." + TABLE
    table = replica[name]
    lost = ~np.isin(replica.parents_own("layers.1.", TABLE)[kept.vocab], kept.experts)
    rows = np.flatnonzero(lost.sum(axis=1) == 1)
    assert len(rows)
    table[rows, 1] = 3 - table[rows].sum(axis=1)
    replica[name] = table


def parents_rows_of_other_tokens(replica: Spoiled) -> None:
    name = "layers.0." + TABLE
    replica[name] = replica[name][::-1]


# Trap 6


def attention_of_another_layer(replica: Spoiled) -> None:
    """Layers 1 and 3 are both CSA: all of their attention changes places."""
    for shard in replica.shards.values():
        for name in [name for name in shard if name.startswith("layers.1.attn.")]:
            other = "layers.3." + name.removeprefix("layers.1.")
            shard[name], shard[other] = shard[other], shard[name]


def recorded_sources(*sources: int) -> Plant:
    def plant(replica: Spoiled) -> None:
        for item, source in zip(replica.record["selections"]["blocks"], sources, strict=False):
            item["source"] = f"layers.{source}."

    return plant


# Trap 7


def first_ape_rows(replica: Spoiled) -> None:
    kept = replica.kept["layers.2."]
    dims = np.concatenate([kept.nope, NOPE + kept.rope])
    ape = replica.parents_own("layers.2.", "attn.compressor.ape")
    replica["layers.2.attn.compressor.ape"] = ape[:6][:, dims]


# Trap 8


def ratios(*values: int) -> Plant:
    def plant(replica: Spoiled) -> None:
        replica.config["compress_ratios"] = list(values)

    return plant


# Trap 9


def scales_of_other_groups(replica: Spoiled) -> None:
    """FP4 groups of 32 inputs, each with its neighbour's scale."""
    for expert in range(4):
        name = f"layers.0.ffn.experts.{expert}.w1.scale"
        replica[name] = np.roll(replica[name], 1, axis=1)


def odd_inputs_first(replica: Spoiled) -> None:
    """Nibbles of the packed FP4 codes the other way round."""
    for expert in range(4):
        name = f"layers.1.ffn.experts.{expert}.w2.weight"
        replica[name] = replica[name] << 4 | replica[name] >> 4


# Trap 10


def times(block: str, name: str, factor: float) -> Plant:
    return at(block, name, lambda values: values.astype(np.float64) * factor)


def recipe_says(old: str, new: str) -> Plant:
    def plant(replica: Spoiled) -> None:
        assert old in replica.recipe, replica.recipe
        replica.recipe = replica.recipe.replace(old, new)

    return plant


# Trap 11


def truncated_hadamard(replica: Spoiled) -> None:
    """The first 12 rows and columns of the rotation of 16, which is not orthogonal."""
    sign = np.array([[1]])
    for _ in range(4):
        sign = np.block([[sign, sign], [sign, -sign]])
    name = "layers.1.attn.indexer.wq_b.weight"
    heads = replica[name].astype(np.float64).reshape(2, 12, -1)
    replica[name] = np.einsum("ab,xbq->xaq", sign[:12, :12] / 4, heads).reshape(24, -1)


# Trap 12


def bias_of_the_first_experts(replica: Spoiled) -> None:
    replica["layers.2.ffn.gate.bias"] = replica.parents_own("layers.2.", "ffn.gate.bias")[:3]


def config_says(**values: Any) -> Plant:
    def plant(replica: Spoiled) -> None:
        replica.config |= values

    return plant


# Trap 13


def drafter_of_the_first_channels(replica: Spoiled) -> None:
    h_proj = replica.parents_own("mtp.0.", "h_proj")
    replica["mtp.0.h_proj.weight"] = h_proj[:20, :20]


def without(name: str) -> Plant:
    return lambda replica: replica.drop(name)


def with_one_more(name: str) -> Plant:
    return lambda replica: replica.add(name)


PLANTS: list[tuple[int, Plant, str]] = [
    (1, flat_heads, "layers.1.attn.heads"),
    (1, at("layers.0.", "attn.attn_sink", rolled(0)), "layers.0.attn.heads"),
    (1, other_groups_heads, "layers.1.attn.out"),
    (1, at("layers.3.", "attn.wo_b.weight", rolled(1, 3)), "layers.3.attn.out"),
    (2, first_pairs, "layers.0.attn.heads"),
    (2, half_of_each_pair, "layers.0.attn.heads"),
    (2, record_of_first_pairs, "layers.0.attn.heads"),
    (2, other_betas, "config.json: rope_scaling"),
    (3, rope_before_nope, "layers.1.attn.heads"),
    (3, second_half_as_the_first, "layers.1.attn.heads"),
    (3, at("layers.1.", "attn.wo_a.weight", rolled(1, 8)), "layers.1.attn.out"),
    (4, channels_outside_streams, "layers.2.attn.hc"),
    (4, at("layers.2.", "hc_ffn_base", comb_transposed), "layers.2.out"),
    (4, at("layers.2.", "hc_attn_fn", comb_transposed), "layers.2.ffn.hc"),
    (4, at("", "hc_head_base", rolled(0)), "logits"),
    (5, parents_ids, "layers.0.ffn.gate.tid2eid"),
    (5, ids_modulo, "layers.0.gate.indices"),
    (5, next_stand_in, "layers.1.gate.indices"),
    (5, parents_rows_of_other_tokens, "layers.0.gate.indices"),
    (6, attention_of_another_layer, "layers.1.attn.indexer.wq_b"),
    (6, recorded_sources(0, 2, 3, 4), "layers.1."),
    (6, recorded_sources(0, 1, 2, 1), "v4surgery.json: layers.3."),
    (7, first_ape_rows, "layers.2.attn.heads"),
    (7, at("layers.1.", "attn.compressor.ape", rolled(0)), "layers.1.attn.heads"),
    (7, at(INDEXER, "compressor.ape", rolled(0)), INDEXER + "compressor"),
    (10, at("layers.3.", "ffn_norm.weight", rolled(0)), "layers.3.ffn.in"),
    (10, at("layers.0.", "attn.q_norm.weight", rolled(0)), "layers.0.attn.heads"),
    (10, recipe_says("name:", "compensate: true\nname:"), "layers.0.attn.hc"),
    (11, truncated_hadamard, INDEXER + "wq_b"),
    (12, bias_of_the_first_experts, "layers.2.gate.indices"),
    (12, config_says(routed_scaling_factor=2.5), "layers.0.gate.weights"),
    (12, config_says(sliding_window=5), "config.json: sliding_window"),
    (13, drafter_of_the_first_channels, "mtp.0.in"),
    (13, at("mtp.0.", "hnorm.weight", rolled(0)), "mtp.0.in"),
    (13, at("mtp.0.", "norm.weight", rolled(0)), "mtp.0.draft"),
]


CHANNELS = (32 / 20) ** 0.5
COMPENSATION_PLANTS: list[tuple[int, Plant, str]] = [
    (10, times("layers.3.", "ffn_norm.weight", 1 / CHANNELS), "layers.3.ffn.in"),
    (10, times("layers.2.", "attn.q_norm.weight", (11 / 8) ** 0.5), "layers.2.attn.heads"),
    (10, times("layers.1.", "hc_ffn_fn", 1 / CHANNELS), "layers.1.ffn.hc"),
    (10, times(INDEXER, "compressor.norm.weight", (22 / 12) ** 0.5), INDEXER + "compressor"),
    (10, recipe_says("compensate: true", "compensate: false"), "layers.0.attn.hc"),
]
BLOCK_PLANTS: list[tuple[int, Plant, str]] = [
    (9, at("layers.0.", "attn.wq_a.scale", rolled(1)), "layers.0.attn.heads"),
    (9, at("layers.1.", "attn.wo_b.scale", rolled(0)), "layers.1.attn.out"),
    (9, at("layers.0.", "ffn.shared_experts.w3.scale", rolled(1)), "layers.0.ffn.out"),
    (9, scales_of_other_groups, "layers.0.ffn.out"),
    (9, odd_inputs_first, "layers.1.ffn.out"),
]
REFUSED: list[tuple[int, Plant, str]] = [
    (2, record_of_half_pairs, "whole pairs of dims"),
    (8, ratios(0, 4, 6, 4), "unknown: mtp.0."),
    (8, ratios(0, 4, 6, 4, 4), "missing: mtp.0.attn.compressor."),
    (8, ratios(0, 4, 4, 6, 0), "missing: layers.2.attn.indexer."),
    (11, config_says(index_head_dim=16), "layers.1.attn.indexer.wq_b.weight is"),
    (13, without("mtp.0.hnorm.weight"), "missing: mtp.0.hnorm.weight"),
    (13, config_says(num_hidden_layers=3), "unknown: layers.3."),
    (14, without("layers.2.ffn.experts.1.w2.weight"), "missing: layers.2.ffn.experts.1.w2.weight"),
    (14, with_one_more("layers.1.attn.wq_c.weight"), "unknown: layers.1.attn.wq_c.weight"),
]
PLANTED = [
    *((*plant, "tiny_case") for plant in PLANTS),
    *((*plant, "compensated_case") for plant in COMPENSATION_PLANTS),
    *((*plant, "blocks_case") for plant in BLOCK_PLANTS),
]


def ids_of(plants: list[Any]) -> list[str]:
    return [f"trap {plant[0]} {plant[2]}" for plant in plants]


@pytest.mark.parametrize(("trap", "plant", "place", "kind"), PLANTED, ids=ids_of(PLANTED))
def test_planted_mistake_is_caught_where_it_is(
    trap: int, plant: Plant, place: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case: Case = request.getfixturevalue(kind)
    replica = Spoiled(case, tmp_path / "spoiled")
    plant(replica)
    report = graded(replica.write(), case.parent)
    assert report.verdict == json.loads(json.dumps(report.to_json(), allow_nan=False))["verdict"]
    assert report.verdict == "failed"
    assert report.first_failure is not None
    assert report.first_failure.startswith(place + ":"), report.failures


@pytest.mark.parametrize(("trap", "plant", "message"), REFUSED, ids=ids_of(REFUSED))
def test_planted_mistake_is_refused_by_name(
    trap: int, plant: Plant, message: str, tiny_case: Case, tmp_path: Path
) -> None:
    replica = Spoiled(tiny_case, tmp_path / "spoiled")
    plant(replica)
    with pytest.raises(CheckpointError) as error:
        graded(replica.write(), tiny_case.parent)
    assert message in str(error.value)


def test_every_trap_is_planted() -> None:
    assert {plant[0] for plant in (*PLANTED, *REFUSED)} == set(range(1, 15))


def test_replicas_that_nobody_spoils_pass(
    tiny_case: Case, compensated_case: Case, blocks_case: Case
) -> None:
    """Without it every test of this file could pass for the wrong reason."""
    for case in (tiny_case, compensated_case, blocks_case):
        report = graded(case.replica, case.parent)
        assert report.passed, report.failures
        assert all(tap.graded for tap in report.taps)
