"""One group of tests for each trap of spec/slicing.md, in its order.

What the replica's tensors must be is computed in the test, or by tests.slicers.reference: decoded
with ml_dtypes, reshaped to named axes, indexed. Values are compared exactly unless a bound says.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import v4surgery
from tests.slicers.conftest import ODD, RANDOM_CUT, Cut, Cutter, Parent
from tests.support import parents
from v4surgery.config import RopeScaling, V4Config
from v4surgery.errors import CatalogueError, PlanError
from v4surgery.model.rope import rope_frequencies
from v4surgery.presets import DEMO, FLASH, PRO
from v4surgery.recipes import load_recipe
from v4surgery.recipes.schema import Layers
from v4surgery.slicers import transform
from v4surgery.slicers.drafters import remap_targets
from v4surgery.slicers.hash_table import plan_remap
from v4surgery.slicers.layers import assign_layers
from v4surgery.slicers.rope import cut_rope

NOPE, ROPE = ODD["head_dim"] - ODD["qk_rope_head_dim"], ODD["qk_rope_head_dim"]
GROUPS, PER_GROUP = ODD["o_groups"], ODD["num_attention_heads"] // ODD["o_groups"]


def test_every_tensor_of_a_replica_cut_on_every_axis_is_what_the_spec_says(random_cut: Cut) -> None:
    got = {name: v for name, v in random_cut.decoded.items() if "tid2eid" not in name}
    expected = random_cut.expected
    assert got.keys() == expected.keys()
    wrong = [name for name, values in expected.items() if not np.array_equal(values, got[name])]
    assert wrong == []


def test_a_native_identity_cut_has_every_tensor_of_the_parent(
    odd_parent: Parent, cut: Cutter
) -> None:
    replica = cut(odd_parent, store={"dtype": "native"})
    assert replica.raw == odd_parent.raw
    assert replica.config == odd_parent.config


# Trap 1: groups


def test_trap_01_heads_stay_with_the_group_they_belong_to(
    odd_parent: Parent, random_cut: Cut
) -> None:
    chosen = []
    for target, kept in random_cut.blocks.items():
        if not target:
            continue
        parent, got = odd_parent.decoded, random_cut.decoded
        wo_a = parent[kept.source + "attn.wo_a"].reshape(GROUPS, ODD["o_lora_rank"], PER_GROUP, -1)
        sink = parent[kept.source + "attn.attn_sink"].reshape(GROUPS, PER_GROUP)
        dims = np.concatenate([kept.nope, NOPE + kept.rope])
        rows, sinks = [], []
        for group, heads, ranks in zip(kept.groups, kept.heads, kept.o_lora, strict=True):
            rows.append(wo_a[group][ranks][:, heads][:, :, dims].reshape(len(ranks), -1))
            sinks.append(sink[group][heads])
            chosen.append((target, int(group), tuple(heads)))
        assert np.array_equal(got[target + "attn.wo_a"], np.concatenate(rows))
        assert np.array_equal(got[target + "attn.attn_sink"], np.concatenate(sinks))
    # At random, groups and layers differ: a selection shared between them would not pass.
    pairs = zip(chosen[::2], chosen[1::2], strict=True)
    assert any(heads != others for (_, _, heads), (_, _, others) in pairs)
    assert len({heads for _, _, heads in chosen[::2]}) > 1
    assert len({group for _, group, _ in chosen}) == GROUPS


def test_trap_01_heads_given_by_id_are_positions_inside_each_kept_group(
    odd_parent: Parent, cut: Cutter
) -> None:
    replica = cut(odd_parent, {"heads": {"groups": [2, 0], "per_group": [3, 1]}})
    assert replica.config["num_attention_heads"] == 4
    assert replica.config["o_groups"] == 2
    flat_heads = [2 * PER_GROUP + 3, 2 * PER_GROUP + 1, 3, 1]
    head_dim = ODD["head_dim"]
    wq_b = odd_parent.decoded["layers.3.attn.wq_b"].reshape(-1, head_dim, ODD["q_lora_rank"])
    got = replica.decoded["layers.3.attn.wq_b"]
    assert np.array_equal(got, wq_b[flat_heads].reshape(-1, ODD["q_lora_rank"]))
    wo_b = odd_parent.decoded["layers.3.attn.wo_b"].reshape(-1, GROUPS, ODD["o_lora_rank"])
    got = replica.decoded["layers.3.attn.wo_b"]
    assert np.array_equal(got, wo_b[:, [2, 0]].reshape(ODD["hidden_size"], -1))


# Trap 2: rope frequencies


def plain(theta: float, dims: int) -> np.ndarray:
    return np.array([theta ** (-2 * i / dims) for i in range(dims // 2)])


def yarn(theta: float, dims: int, scaling: Any, original: float | None = None) -> np.ndarray:
    """Spec/forward.md, "RoPE", once more: below the ramp freq, above it freq / factor."""

    def bound(beta: float) -> float:
        turns = scaling["original_max_position_embeddings"] / (beta * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(bound(scaling["beta_fast"])), 0)
    high = min(math.ceil(bound(scaling["beta_slow"])), dims - 1)
    result = []
    for i, freq in enumerate(plain(theta, dims)):
        share = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        result.append(freq * (1 - share) + freq / scaling["factor"] * share)
    return np.array(result)


def largest_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.max(np.abs(got / wanted - 1)))


def as_dict(scaling: Any) -> dict[str, float]:
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    return {name: getattr(scaling, name) for name in names}


@pytest.mark.parametrize("rope", [2, 4, 8])
def test_trap_02_every_sth_pair_is_kept_whole(odd_parent: Parent, cut: Cutter, rope: int) -> None:
    replica = cut(odd_parent, {"head_dim": {"rope": rope}})
    step = ROPE // rope
    pairs = odd_parent.decoded["layers.2.attn.kv_norm"][NOPE:].reshape(ROPE // 2, 2)
    got = replica.decoded["layers.2.attn.kv_norm"]
    assert np.array_equal(got[NOPE:], pairs[::step].reshape(-1))
    assert np.array_equal(got[:NOPE], odd_parent.decoded["layers.2.attn.kv_norm"][:NOPE])
    assert replica.config["qk_rope_head_dim"] == rope
    assert replica.config["head_dim"] == NOPE + rope


@pytest.mark.parametrize("rope", [2, 4, 8, 16, 32])
def test_trap_02_unscaled_frequencies_are_those_of_the_pairs_kept(rope: int) -> None:
    kept = plain(FLASH.rope_theta, 64)[:: 64 // rope]
    assert largest_difference(plain(FLASH.rope_theta, rope), kept) < 1e-12
    assert cut_rope(FLASH, rope, allow_mismatch=False).plain_error < 1e-12


@pytest.mark.parametrize("rope", [4, 8, 16, 32])
def test_trap_02_fitted_betas_differ_by_no_more_than_reported(rope: int) -> None:
    fitted = cut_rope(FLASH, rope, allow_mismatch=False)
    assert FLASH.rope_scaling is not None and fitted.scaling is not None
    theta, before = FLASH.compress_rope_theta, as_dict(FLASH.rope_scaling)
    wanted = yarn(theta, 64, before)[:: 64 // rope]
    got = largest_difference(yarn(theta, rope, as_dict(fitted.scaling)), wanted)
    assert got == pytest.approx(fitted.scaled_error, rel=1e-9)
    assert got <= largest_difference(yarn(theta, rope, before), wanted)


def test_trap_02_parents_betas_would_be_off_by_40_percent_and_no_ramp_fits_better() -> None:
    fitted = cut_rope(FLASH, 32, allow_mismatch=False)
    assert FLASH.rope_scaling is not None
    theta, before = FLASH.compress_rope_theta, as_dict(FLASH.rope_scaling)
    wanted = yarn(theta, 64, before)[::2]
    unfitted = largest_difference(yarn(theta, 32, before), wanted)
    assert 0.3 < unfitted < 0.5  # spec/slicing.md: up to 40 %

    def error_of(low: int, high: int) -> float:
        share = np.clip((np.arange(16) - low) / (high - low), 0, 1)
        freq = plain(theta, 32)
        return largest_difference(freq * (1 - share) + freq / before["factor"] * share, wanted)

    best = min(error_of(low, high) for low in range(32) for high in range(low + 1, 32))
    assert fitted.scaled_error == pytest.approx(best, rel=1e-9)
    assert fitted.scaled_error < unfitted


def test_trap_02_replica_says_its_largest_difference(odd_parent: Parent, cut: Cutter) -> None:
    replica = cut(odd_parent, {"head_dim": {"rope": 8}})
    theta = odd_parent.config["compress_rope_theta"]
    wanted = yarn(theta, ROPE, odd_parent.config["rope_scaling"])[::2]
    got = largest_difference(yarn(theta, 8, replica.config["rope_scaling"]), wanted)
    (note,) = [note for note in replica.record["notes"] if "rope frequencies" in note]
    assert f"{got:.2g} in compressed layers" in note


def test_trap_02_transformers_computes_the_frequencies_that_we_report(
    odd_parent: Parent, cut: Cutter
) -> None:
    pytest.importorskip("transformers")
    from transformers import DeepseekV4Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keep = {"head_dim": {"nope": 24, "rope": 8}}
    replica = cut(odd_parent, keep)
    config = DeepseekV4Config(**replica.config)
    got = ROPE_INIT_FUNCTIONS["yarn"](config, layer_type="compress")[0].double().numpy()
    theta = replica.config["compress_rope_theta"]
    ours = yarn(theta, 8, replica.config["rope_scaling"])
    assert largest_difference(got, ours) < 1e-6  # theirs is float32


def test_trap_02_rope_that_divides_nothing_is_refused(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="rope frequencies cannot match") as error:
        odd_parent.plan({"head_dim": {"rope": 12}})
    assert "2, 4, 8, 16" in str(error.value)
    assert "keep.head_dim.frequencies: any" in str(error.value)


def test_trap_02_mismatch_is_accepted_when_asked_and_then_reported(odd_parent: Parent) -> None:
    plan = odd_parent.plan({"head_dim": {"rope": 12, "frequencies": "any"}})
    pairs = np.asarray(plan.selections.model["rope"]).reshape(-1, 2)
    assert (pairs[:, 1] == pairs[:, 0] + 1).all() and (pairs[:, 0] % 2 == 0).all()
    kept = plain(odd_parent.config["rope_theta"], ROPE)[pairs[:, 0] // 2]
    off = largest_difference(plain(odd_parent.config["rope_theta"], 12), kept)
    (note,) = [note for note in plan.notes if "rope frequencies" in note]
    assert f"{off:.2g} in sliding" in note


def test_trap_02_rope_larger_than_the_parents_is_refused(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="rope size is impossible"):
        odd_parent.plan({"head_dim": {"rope": 32}})


# Trap 3: nope before rope


@pytest.fixture(scope="module")
def dims_cut(odd_parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """Heads of 5 + 8 dims, index heads of 3 + 8; nothing else is cut."""
    keep = {
        "head_dim": {"nope": [20, 1, 7, 8, 23], "rope": 8},
        "indexer": {"head_dim": {"keep": 11, "ids": [9, 0, 4]}},
    }
    path = tmp_path_factory.mktemp("dims") / "replica"
    return Cut(odd_parent, odd_parent.plan(keep), path)


HEAD = np.array([20, 1, 7, 8, 23, *(NOPE + d for d in (0, 1, 4, 5, 8, 9, 12, 13))])
INDEX = np.array([9, 0, 4, *(12 + d for d in (0, 1, 4, 5, 8, 9, 12, 13))])


@pytest.mark.parametrize("layer", ["layers.0.", "layers.4.", "layers.5.", "mtp.0."])
def test_trap_03_rope_dims_stay_last_in_query_key_and_output(dims_cut: Cut, layer: str) -> None:
    parent, got = dims_cut.parent.decoded, dims_cut.decoded
    name = layer + "attn."
    heads, q_lora = ODD["num_attention_heads"], ODD["q_lora_rank"]
    wq_b = parent[name + "wq_b"].reshape(heads, ODD["head_dim"], q_lora)[:, HEAD]
    assert np.array_equal(got[name + "wq_b"], wq_b.reshape(-1, q_lora))
    assert np.array_equal(got[name + "wkv"], parent[name + "wkv"][HEAD])
    assert np.array_equal(got[name + "kv_norm"], parent[name + "kv_norm"][HEAD])
    rows = GROUPS * ODD["o_lora_rank"]
    wo_a = parent[name + "wo_a"].reshape(rows, PER_GROUP, ODD["head_dim"])[:, :, HEAD]
    assert np.array_equal(got[name + "wo_a"], wo_a.reshape(rows, -1))


@pytest.mark.parametrize(("layer", "halves"), [(2, 1), (1, 2)])
def test_trap_03_compressors_keep_the_same_dims_in_every_half(
    dims_cut: Cut, layer: int, halves: int
) -> None:
    parent, got = dims_cut.parent.decoded, dims_cut.decoded
    name, hidden = f"layers.{layer}.attn.compressor.", ODD["hidden_size"]
    for part in ("wkv", "wgate"):
        weight = parent[name + part].reshape(halves, ODD["head_dim"], hidden)[:, HEAD]
        assert np.array_equal(got[name + part], weight.reshape(-1, hidden))
    ape = parent[name + "ape"].reshape(-1, halves, ODD["head_dim"])[:, :, HEAD]
    assert np.array_equal(got[name + "ape"], ape.reshape(len(ape), -1))
    assert np.array_equal(got[name + "norm"], parent[name + "norm"][HEAD])


def test_trap_03_indexer_keeps_its_own_dims_and_the_rope_pairs_of_the_heads(dims_cut: Cut) -> None:
    parent, got = dims_cut.parent.decoded, dims_cut.decoded
    name, hidden, q_lora = "layers.4.attn.indexer.", ODD["hidden_size"], ODD["q_lora_rank"]
    wq_b = parent[name + "wq_b"].reshape(-1, ODD["index_head_dim"], q_lora)[:, INDEX]
    assert np.array_equal(got[name + "wq_b"], wq_b.reshape(-1, q_lora))
    name += "compressor."
    for part in ("wkv", "wgate"):
        weight = parent[name + part].reshape(2, ODD["index_head_dim"], hidden)[:, INDEX]
        assert np.array_equal(got[name + part], weight.reshape(-1, hidden))
    ape = parent[name + "ape"].reshape(4, 2, ODD["index_head_dim"])[:, :, INDEX]
    assert np.array_equal(got[name + "ape"], ape.reshape(4, -1))
    assert np.array_equal(got[name + "norm"], parent[name + "norm"][INDEX])


# Trap 4: streams


@pytest.mark.parametrize("name", ["layers.1.hc_attn_fn", "mtp.0.hc_ffn_fn", "hc_head_fn"])
def test_trap_04_hidden_channels_are_kept_inside_each_stream(
    odd_parent: Parent, cut: Cutter, name: str
) -> None:
    hidden = [63, 0, 17, 30]
    replica = cut(odd_parent, {"hidden_size": hidden})
    fn = odd_parent.decoded[name].reshape(-1, 3, 64)
    assert np.array_equal(replica.decoded[name], fn[:, :, hidden].reshape(len(fn), -1))


def test_trap_04_a_stream_takes_its_rows_columns_and_both_sides_of_comb(
    odd_parent: Parent, cut: Cutter
) -> None:
    replica = cut(odd_parent, {"hc_mult": [2, 0]})
    fn = odd_parent.decoded["layers.3.hc_ffn_fn"].reshape(15, 3, 64)[:, [2, 0]].reshape(15, -1)
    # Rows: pre 0..2, post 3..5, comb[m, n] at 6 + 3m + n.
    rows = [2, 0, 3 + 2, 3 + 0, *(6 + 3 * m + n for m in (2, 0) for n in (2, 0))]
    assert np.array_equal(replica.decoded["layers.3.hc_ffn_fn"], fn[rows])
    base = odd_parent.decoded["layers.3.hc_ffn_base"]
    assert np.array_equal(replica.decoded["layers.3.hc_ffn_base"], base[rows])
    scale = odd_parent.decoded["layers.3.hc_ffn_scale"]
    assert np.array_equal(replica.decoded["layers.3.hc_ffn_scale"], scale)
    head = odd_parent.decoded["hc_head_fn"].reshape(3, 3, 64)[[2, 0]][:, [2, 0]]
    assert np.array_equal(replica.decoded["hc_head_fn"], head.reshape(2, -1))
    assert np.array_equal(
        replica.decoded["hc_head_base"], odd_parent.decoded["hc_head_base"][[2, 0]]
    )


# Trap 5: hash tables


@pytest.fixture(scope="module")
def hash_parent(tmp_path_factory: pytest.TempPathFactory) -> Parent:
    """Two hash layers and a score one, 512 tokens, 16 experts, 4 a token."""
    changes = {
        **ODD,
        "vocab_size": 512,
        "num_hidden_layers": 3,
        "compress_ratios": [0, 0, 0, 0],
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
    }
    out = tmp_path_factory.mktemp("hash") / "parent"
    return Parent(parents.write_parent(out, changes=changes))


EXPERTS = [3, 15, 4, 8, 0, 9, 12]
TABLES = ["layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"]


def nearest_rows(
    table: np.ndarray, gate: np.ndarray, experts: list[int], width: int
) -> list[list[int]]:
    """Survivors in their order, then for each lost expert the most similar one still free."""
    unit = gate.astype(np.float64) / np.linalg.norm(gate.astype(np.float64), axis=1)[:, None]
    similar = unit @ unit[experts].T
    rows = []
    for old in table.tolist():
        row = [experts.index(e) for e in old if e in experts][:width]
        lost = [e for e in old if e not in experts]
        for expert in lost[: width - len(row)]:
            free = [e for e in range(len(experts)) if e not in row]
            row.append(max(free, key=lambda e: similar[expert, e]))
        rows.append(row)
    return rows


@pytest.mark.parametrize("per_token", [4, 2])
def test_trap_05_nearest_is_the_kept_expert_with_the_most_similar_gate_row(
    hash_parent: Parent, cut: Cutter, per_token: int
) -> None:
    experts = {"ids": EXPERTS, "per_token": per_token, "hash_table": "nearest"}
    replica = cut(hash_parent, {"experts": experts})
    for name in TABLES:
        gate = hash_parent.decoded[name.removesuffix(".tid2eid")]
        wanted = nearest_rows(hash_parent.decoded[name], gate, EXPERTS, per_token)
        assert replica.decoded[name].tolist() == wanted


@pytest.mark.parametrize("policy", ["nearest", "balanced"])
@pytest.mark.parametrize("per_token", [4, 3, 1])
def test_trap_05_rows_hold_distinct_kept_experts_survivors_first(
    hash_parent: Parent, cut: Cutter, policy: str, per_token: int
) -> None:
    experts = {"ids": EXPERTS, "per_token": per_token, "hash_table": policy}
    replica = cut(hash_parent, {"experts": experts})
    for name in TABLES:
        before, after = hash_parent.decoded[name], replica.decoded[name]
        assert after.shape == (512, per_token)
        assert replica.raw[name].dtype == "I64"
        for old, new in zip(before.tolist(), after.tolist(), strict=True):
            assert len(set(new)) == per_token
            assert set(new) <= set(range(len(EXPERTS)))
            survivors = [EXPERTS.index(e) for e in old if e in EXPERTS][:per_token]
            assert new[: len(survivors)] == survivors


def test_trap_05_balanced_takes_turns() -> None:
    kept = np.arange(8, 15)
    remap = plan_remap(kept, 15, 3, "balanced")
    assert remap is not None
    table = np.random.default_rng(0).integers(0, 2, (100, 4)) * 4 + np.arange(4)
    rows, lost = remap.apply(table, 0)
    # Every token lost all: 300 slots over 7 experts in turn, so loads differ by at most one.
    loads = np.bincount(rows.reshape(-1), minlength=7)
    assert loads.max() - loads.min() <= 1
    assert lost.tolist() == [0, 0, 0, 0, 100]


def test_trap_05_balanced_does_not_depend_on_how_the_table_is_read() -> None:
    remap = plan_remap(np.array([1, 4, 5]), 6, 2, "balanced")
    assert remap is not None
    table = np.random.default_rng(1).permuted(np.tile(np.arange(6), (90, 1)), axis=1)[:, :3]
    whole, _ = remap.apply(table, 0)
    parts = [remap.apply(table[a:b], a)[0] for a, b in ((0, 7), (7, 8), (8, 90))]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("policy", ["nearest", "balanced"])
def test_trap_05_tables_read_in_many_chunks_come_out_the_same(
    hash_parent: Parent, cut: Cutter, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    keep = {"experts": {"ids": EXPERTS, "hash_table": policy}, "vocab_size": 500}
    whole = cut(hash_parent, keep)
    monkeypatch.setattr(transform, "CHUNK_ELEMENTS", 1000)  # 31 tokens at a time
    pieces = cut(hash_parent, keep)
    assert [pieces.raw[name] for name in TABLES] == [whole.raw[name] for name in TABLES]
    assert pieces.record["report"]["hash_tables"] == whole.record["report"]["hash_tables"]


def test_trap_05_report_counts_the_experts_that_tokens_lost(
    hash_parent: Parent, cut: Cutter
) -> None:
    replica = cut(hash_parent, {"experts": EXPERTS, "vocab_size": 300})
    counts = replica.record["report"]["hash_tables"]["tokens_by_lost_experts"]
    kept = replica.blocks[""].vocab
    assert counts == {
        name: np.bincount(
            (~np.isin(hash_parent.decoded[name][kept], EXPERTS)).sum(axis=1), minlength=5
        ).tolist()
        for name in TABLES
    }
    assert all(sum(row) == 300 for row in counts.values())


def test_trap_05_keep_all_refuses_to_lose_an_expert(hash_parent: Parent, cut: Cutter) -> None:
    experts = {"ids": EXPERTS, "hash_table": "keep-all"}
    with pytest.raises(PlanError, match="keep-all, but tokens lose experts") as error:
        cut(hash_parent, {"experts": experts})
    assert "hash_table: nearest or balanced" in str(error.value)


def test_trap_05_keep_all_passes_when_tables_name_kept_experts_only(
    hash_parent: Parent, tmp_path: Path, cut: Cutter
) -> None:
    def name_eight_experts(shards: parents.Shards) -> None:
        for name in TABLES:
            shard = parents.shard_of(shards, name)
            table = hash_parent.decoded[name] % 2 * 4 + np.arange(4)  # 0..7, distinct in a row
            shard[name] = shard[name]._replace(data=table.tobytes())

    out = tmp_path / "parent"
    parent = Parent(parents.edit_checkpoint(hash_parent.path, out, name_eight_experts))
    experts = {"ids": [*range(7, -1, -1)], "hash_table": "keep-all"}
    replica = cut(parent, {"experts": experts})
    for name in TABLES:
        assert np.array_equal(replica.decoded[name], 7 - parent.decoded[name])


def test_trap_05_fewer_experts_a_token_keep_the_first_columns(
    hash_parent: Parent, cut: Cutter
) -> None:
    replica = cut(hash_parent, {"experts": {"per_token": 3}})
    for name in TABLES:
        assert np.array_equal(replica.decoded[name], hash_parent.decoded[name][:, :3])


def test_trap_05_a_table_of_experts_that_do_not_exist_is_refused(
    hash_parent: Parent, tmp_path: Path, cut: Cutter
) -> None:
    table = hash_parent.decoded[TABLES[1]].copy()
    table[400, 2] = 16
    tensor = hash_parent.raw[TABLES[1]]._replace(data=table.tobytes())
    parent = Parent(parents.replace_tensor(hash_parent.path, tmp_path / "bad", TABLES[1], tensor))
    with pytest.raises(PlanError, match="names experts that do not exist"):
        cut(parent, {"experts": EXPERTS})


# Trap 6: kinds of layers

SLIDING, CSA, HCA = "sliding", "CSA", "HCA"


def kind(ratio: int) -> str:
    return {0: SLIDING, 4: CSA}.get(ratio, HCA)


def assign(config: V4Config, **recipe: Any) -> Any:
    return assign_layers(Layers.model_validate(recipe), config)


def mini3b_layers() -> Layers:
    """The recipe's layers as they are chosen without a scores file."""
    recipe = load_recipe("mini3b").keep.layers
    assert recipe is not None and recipe.by == ("scores", "even")
    return recipe.model_copy(update={"by": "even"})


def step_cost(config: V4Config, source: int, ratio: int, is_hash: bool, zero_bias: bool) -> Any:
    """(conversions, changes of ratio) of one layer; None where it is not allowed."""
    was, was_hash = config.compress_ratios[source], source < config.num_hash_layers
    if is_hash and not was_hash:
        return None
    if was_hash and not is_hash and not zero_bias:
        return None
    if kind(was) != kind(ratio) and ratio != 0:
        return None
    conversions = (was_hash != is_hash) + (kind(was) != kind(ratio))
    return conversions, int(was != ratio and kind(was) == kind(ratio))


def path_cost(
    config: V4Config, sources: tuple[int, ...], ratios: list[int], num_hash: int, zero_bias: bool
) -> tuple[int, int, float] | None:
    """What an assignment costs: conversions, changes of ratio, distance from an even spread."""
    steps = [
        step_cost(config, source, ratio, j < num_hash, zero_bias)
        for j, (source, ratio) in enumerate(zip(sources, ratios, strict=True))
    ]
    if any(step is None for step in steps):
        return None
    ideal = np.linspace(0, config.num_hidden_layers - 1, len(ratios))
    spread = float(((np.array(sources) - ideal) ** 2).sum())
    return sum(s[0] for s in steps), sum(s[1] for s in steps), spread


def test_trap_06_mini3b_takes_every_layer_of_flash_from_its_own_kind() -> None:
    recipe = mini3b_layers()
    assert recipe.compress_ratios == (0, 0, *(4, 112) * 12, 4, 0)
    assignment = assign_layers(recipe, FLASH)
    sources = assignment.sources
    assert list(sources) == sorted(set(sources)) and len(sources) == 28
    assert sources[:2] == (0, 1)
    for source, ratio in zip(sources[:-1], recipe.compress_ratios[:-1], strict=True):
        assert kind(FLASH.compress_ratios[source]) == kind(ratio)
    # Flash has two sliding layers, both taken: the last one is converted, and only that one.
    cost = path_cost(FLASH, sources, list(recipe.compress_ratios), 2, False)
    assert cost is not None and cost[:2] == (1, 12)
    assert [k.is_hash for k in assignment.kinds] == [True] * 2 + [False] * 26


def test_trap_06_mini3b_on_pro_converts_what_pro_does_not_have() -> None:
    recipe = mini3b_layers()
    assert recipe.compress_ratios is not None
    sources = assign_layers(recipe, PRO).sources
    cost = path_cost(PRO, sources, list(recipe.compress_ratios), 2, False)
    # Pro has no sliding layer: the two first and the last lose their compressors.
    assert cost is not None and cost[:2] == (3, 12)


class LayerCase(NamedTuple):
    """A small parent and what a recipe wants of it."""

    config: V4Config
    ratios: list[int]
    num_hash: int
    zero_bias: bool

    @property
    def recipe(self) -> dict[str, Any]:
        return {
            "compress_ratios": self.ratios,
            "hash_layers": self.num_hash,
            "hash_to_score": "zero-bias" if self.zero_bias else "refuse",
        }

    def best(self, length: int) -> Any:
        """The least cost of the first layers, over all increasing assignments; None if none."""
        costs = (
            path_cost(self.config, sources, self.ratios[:length], self.num_hash, self.zero_bias)
            for sources in itertools.combinations(range(self.config.num_hidden_layers), length)
        )
        return min((cost for cost in costs if cost is not None), default=None)


def layer_case(seed: int) -> LayerCase:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 9))
    count = int(rng.integers(1, min(size, 4) + 1))
    config = FLASH.replace(
        num_hidden_layers=size,
        compress_ratios=(*rng.choice([0, 4, 16, 128], size).tolist(), 0),
        num_hash_layers=int(rng.integers(0, 3)),
    )
    num_hash = int(rng.integers(0, min(count, 2) + 1))
    ratios = rng.choice([0, 0, 4, 16, 16, 112], count).tolist()
    return LayerCase(config, ratios, num_hash, bool(rng.integers(0, 2)))


def test_trap_06_assignment_is_the_best_of_all() -> None:
    solved = 0
    for seed in range(600):
        case = layer_case(seed)
        wanted = case.best(len(case.ratios))
        if wanted is None:
            continue
        sources = assign(case.config, **case.recipe).sources
        assert list(sources) == sorted(set(sources)), seed
        got = path_cost(case.config, sources, case.ratios, case.num_hash, case.zero_bias)
        assert got is not None and got[:2] == wanted[:2], seed
        # Costs are sums of float64 around 1e12 at most 4 times: spreads are told apart to 1e-2.
        assert got[2] <= wanted[2] + 1e-2, seed
        solved += 1
    assert solved > 150


def test_trap_06_without_an_assignment_the_first_layer_that_has_no_source_is_named() -> None:
    refused = 0
    for seed in range(300):
        case = layer_case(seed)
        if case.best(len(case.ratios)) is not None:
            continue
        # The spread of a part differs from the whole's; whether there is any does not.
        failing = next(j for j in range(len(case.ratios)) if case.best(j + 1) is None)
        with pytest.raises(PlanError, match=rf"replica layer {failing} \("):
            assign(case.config, **case.recipe)
        refused += 1
    assert refused > 50


@pytest.mark.parametrize("config", [DEMO, FLASH, PRO], ids=["demo", "flash", "pro"])
@pytest.mark.parametrize("by", ["even", "first", "kinds", "random"])
def test_trap_06_a_stride_carries_each_layers_own_kind_along(config: V4Config, by: str) -> None:
    kinds = {
        (config.compress_ratios[i], i < config.num_hash_layers)
        for i in range(config.num_hidden_layers)
    }
    for count in range(1, config.num_hidden_layers + 1):
        assignment = assign(config, count=count, by=by)
        assert list(assignment.sources) == sorted(set(assignment.sources))
        assert len(assignment.sources) == count
        own = [(config.compress_ratios[i], i < config.num_hash_layers) for i in assignment.sources]
        assert [(k.ratio, k.is_hash) for k in assignment.kinds] == own
        if by in ("even", "kinds") and count >= len(kinds):
            assert set(own) == kinds


def test_trap_06_replica_layers_have_the_tensors_of_their_parent_layers(
    odd_parent: Parent, cut: Cutter
) -> None:
    replica = cut(odd_parent, {"layers": {"count": 5, "by": "even"}})
    for target, kept in replica.blocks.items():
        if target:
            own = {n.removeprefix(target) for n in replica.decoded if n.startswith(target)}
            parent = {
                n.removeprefix(kept.source) for n in odd_parent.decoded if n.startswith(kept.source)
            }
            assert own == parent


def test_trap_06_hca_may_take_another_ratio_and_any_layer_may_lose_its_compressor(
    odd_parent: Parent, cut: Cutter
) -> None:
    ratios = [0, 4, 8, 0, 0]
    replica = cut(odd_parent, {"layers": {"ids": [0, 1, 2, 4, 5], "compress_ratios": ratios}})
    assert replica.config["compress_ratios"] == [*ratios, 0]
    assert replica.decoded["layers.2.attn.compressor.ape"].shape[0] == 8
    for layer in (3, 4):
        assert not [n for n in replica.decoded if re.match(rf"layers.{layer}.attn.(comp|ind)", n)]
        source = (4, 5)[layer - 3]
        got = replica.decoded[f"layers.{layer}.attn.wq_b"]
        assert np.array_equal(got, odd_parent.decoded[f"layers.{source}.attn.wq_b"])
    assert "ratio 16 becomes 8 in layer 2" in replica.record["notes"]
    assert "compressor dropped in layer 3, 4" in replica.record["notes"]


def test_trap_06_hash_becomes_score_only_with_a_bias_of_zeros(
    odd_parent: Parent, cut: Cutter
) -> None:
    layers = {"ids": [0, 1, 2], "hash_layers": 1}
    with pytest.raises(PlanError, match=r"replica layer 1 \(score\) has no source"):
        odd_parent.plan({"layers": layers})
    replica = cut(odd_parent, {"layers": {**layers, "hash_to_score": "zero-bias"}})
    bias = replica.raw["layers.1.ffn.gate.bias"]
    assert (bias.dtype, bias.data) == ("F32", bytes(4 * 6))
    assert "layers.1.ffn.gate.tid2eid" not in replica.raw
    assert "layers.0.ffn.gate.tid2eid" in replica.raw
    assert replica.config["num_hash_layers"] == 1
    assert v4surgery.verify(replica.path, odd_parent.path).passed


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"compress_ratios": [0, 4, 16, 4, 4, 4]}, r"replica layer 5 \(CSA, score\)"),
        ({"compress_ratios": [16, 0, 16]}, r"replica layer 0 \(HCA 16, hash\)"),
        ({"compress_ratios": [0, 4, 16, 16, 16]}, r"replica layer 4 \(HCA 16, score\)"),
        ({"count": 4, "hash_layers": 3}, r"replica layer 2 \(hash\)"),
        ({"ids": [0, 1, 3], "compress_ratios": [0, 4, 4]}, r"replica layer 2 \(CSA, score\)"),
    ],
)
def test_trap_06_an_impossible_layer_is_named(
    odd_parent: Parent, layers: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message + " has no source in the parent"):
        odd_parent.plan({"layers": layers})


# Trap 7: ape


def test_trap_07_picked_rows_are_even(odd_parent: Parent, cut: Cutter) -> None:
    layers = {"ids": [0, 1, 2], "compress_ratios": [0, 4, 14]}
    replica = cut(odd_parent, {"layers": layers})
    ape = odd_parent.decoded["layers.2.attn.compressor.ape"]
    got = replica.decoded["layers.2.attn.compressor.ape"]
    assert np.array_equal(got, ape[[i * 16 // 14 for i in range(14)]])


@pytest.mark.parametrize("ratio", [1, 14, 20])
def test_trap_07_interpolated_rows_lie_between_the_parents(
    odd_parent: Parent, cut: Cutter, ratio: int
) -> None:
    layers = {"ids": [0, 1, 2], "compress_ratios": [0, 4, ratio], "ape": "interpolate"}
    keep = {"layers": layers, "head_dim": {"nope": [5, 2]}}
    replica = cut(odd_parent, keep)
    dims = [5, 2, *range(NOPE, NOPE + ROPE)]
    ape = odd_parent.decoded["layers.2.attn.compressor.ape"][:, dims].astype(np.float64)
    at = (np.arange(ratio) + 0.5) * 16 / ratio - 0.5
    wanted = np.stack([np.interp(at, np.arange(16), column) for column in ape.T], axis=1)
    got = replica.decoded["layers.2.attn.compressor.ape"]
    # One rounding to float32, of values up to the largest in the table.
    assert np.abs(got - wanted).max() <= 2.0**-24 * np.abs(ape).max()


def test_trap_07_more_rows_than_there_are_cannot_be_picked(odd_parent: Parent) -> None:
    layers = {"ids": [0, 1, 2], "compress_ratios": [0, 4, 20]}
    with pytest.raises(PlanError, match="cannot be picked for a larger ratio") as error:
        odd_parent.plan({"layers": layers})
    assert "keep.layers.ape: interpolate" in str(error.value)
    assert "layers.2" in str(error.value)


# Trap 8: compress_ratios


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_trap_08_compress_ratios_has_an_entry_for_every_drafter_that_is_kept(
    odd_parent: Parent, dspark_parent: Parent, mtp: str
) -> None:
    for parent, drafters in ((odd_parent, 1), (dspark_parent, 3)):
        config = parent.plan({"layers": [0, 1, 2, 4], "mtp": mtp}).config.to_dict()
        ratios = [0, 4, 16, 4]
        assert config["compress_ratios"] == ratios + [0] * (drafters if mtp == "keep" else 0)
        assert len(config["layer_types"]) == config["num_hidden_layers"] == 4
        assert config["mlp_layer_types"] == ["hash_moe"] * 2 + ["moe"] * 2


# Trap 9: blocks


def block_bytes(parent: Parent, name: str, rows: Any, cols: Any) -> tuple[bytes, bytes]:
    """Codes and scales of an FP8 weight at whole blocks: ``rows`` and ``cols`` are block ids."""
    weight, scale = parent.raw[name + ".weight"], parent.raw[name + ".scale"]
    codes = np.frombuffer(weight.data, np.uint8).reshape(weight.shape)
    blocks = np.frombuffer(scale.data, np.uint8).reshape(*scale.shape, -1)
    units = [(np.asarray(ids)[:, None] * 128 + np.arange(128)).reshape(-1) for ids in (rows, cols)]
    return codes[np.ix_(*units)].tobytes(), blocks[np.ix_(rows, cols)].tobytes()


def stored(cut: Cut, name: str) -> tuple[bytes, bytes]:
    return cut.raw[name + ".weight"].data, cut.raw[name + ".scale"].data


@pytest.mark.parametrize("kind_of_parent", ["block_parent", "base_parent"])
def test_trap_09_whole_fp8_blocks_keep_their_bytes_in_any_order(
    request: pytest.FixtureRequest, cut: Cutter, kind_of_parent: str
) -> None:
    parent: Parent = request.getfixturevalue(kind_of_parent)
    hidden = [*range(256, 384), *range(128)]
    replica = cut(parent, {"hidden_size": hidden}, store={"dtype": "native"})
    for layer in ("layers.0.", "layers.1.", "mtp.0."):
        assert stored(replica, layer + "attn.wq_a") == block_bytes(
            parent, layer + "attn.wq_a", [0, 1], [2, 0]
        )
        assert stored(replica, layer + "attn.wo_b") == block_bytes(
            parent, layer + "attn.wo_b", [2, 0], [0, 1]
        )
    assert stored(replica, "mtp.0.e_proj") == block_bytes(parent, "mtp.0.e_proj", [2, 0], [2, 0])
    assert replica.record["report"]["requantized"]["tensors"] == 0


def test_trap_09_fp4_keeps_whole_groups_of_32_columns_and_any_rows(
    block_parent: Parent, cut: Cutter
) -> None:
    runs = [7, 2, 3]
    neurons = [32 * run + i for run in runs for i in range(32)]
    replica = cut(block_parent, {"moe_intermediate_size": neurons}, store={"dtype": "native"})
    name = "layers.1.ffn.experts.3."
    raw = block_parent.raw
    packed = np.frombuffer(raw[name + "w1.weight"].data, np.uint8).reshape(256, -1)
    scales = np.frombuffer(raw[name + "w1.scale"].data, np.uint8).reshape(256, -1)
    assert stored(replica, name + "w1") == (packed[neurons].tobytes(), scales[neurons].tobytes())
    packed = np.frombuffer(raw[name + "w2.weight"].data, np.uint8).reshape(384, 8, 16)
    scales = np.frombuffer(raw[name + "w2.scale"].data, np.uint8).reshape(384, 8)
    wanted = packed[:, runs].tobytes(), scales[:, runs].tobytes()
    assert stored(replica, name + "w2") == wanted
    changed = replica.record["report"]["requantized"]["tensors"]
    assert changed == 3 * 3  # the shared experts' FP8 matrices of three blocks, and no other


def test_trap_09_single_rows_of_fp4_keep_their_bytes(block_parent: Parent, cut: Cutter) -> None:
    neurons = [*range(1, 256, 2), *range(0, 64, 2)]
    replica = cut(block_parent, {"moe_intermediate_size": neurons}, store={"dtype": "native"})
    name = "layers.0.ffn.experts.0.w3"
    packed = np.frombuffer(block_parent.raw[name + ".weight"].data, np.uint8).reshape(256, -1)
    scales = np.frombuffer(block_parent.raw[name + ".scale"].data, np.uint8).reshape(256, -1)
    assert stored(replica, name) == (packed[neurons].tobytes(), scales[neurons].tobytes())


@pytest.mark.parametrize("kind_of_parent", ["block_parent", "base_parent"])
def test_trap_09_error_of_requantized_tensors_is_reported_as_it_is(
    request: pytest.FixtureRequest, cut: Cutter, kind_of_parent: str
) -> None:
    parent: Parent = request.getfixturevalue(kind_of_parent)
    keep = {"hidden_size": {"keep": 160, "by": "random"}, "q_lora_rank": 100}
    replica = cut(parent, keep, store={"dtype": "native"})
    report = replica.record["report"]["requantized"]
    expected = replica.expected
    how = {name: item["how"] for name, item in replica.record["tensors"].items()}
    requantized = {
        name.removesuffix(".weight")
        for name, transform in how.items()
        if transform == "requantize" and name.endswith(".weight")
    }
    assert report["tensors"] == len(requantized) > 0
    worst, lossless = 0.0, 0
    for stem in requantized:
        wanted, got = expected[stem].astype(np.float64), replica.decoded[stem].astype(np.float64)
        error = got - wanted
        changed = int(np.count_nonzero(error))
        if not changed:
            lossless += 1
            assert stem not in report["by_tensor"]
            continue
        said = report["by_tensor"][stem]
        relative = float(np.sqrt((error**2).sum() / (wanted**2).sum()))
        assert said["lossless"] is False
        assert said["changed"] == changed
        # Written with six digits.
        assert said["relative_rms"] == pytest.approx(relative, rel=1e-5)
        assert said["max_abs"] == pytest.approx(np.abs(error).max(), rel=1e-5)
        worst = max(worst, relative)
    assert report["lossless"] == lossless
    assert report["largest_relative_rms"] == pytest.approx(worst, rel=1e-5)
    # E4M3 rounds to 4 significant bits, E2M1 to 2: at most 2^-4 and 2^-2 of each value in range.
    assert 0 < worst < 0.25


def test_trap_09_tensors_that_are_not_requantized_hold_exactly_the_parents_values(
    block_parent: Parent, cut: Cutter
) -> None:
    keep = {"hidden_size": {"keep": 160, "by": "random"}}
    replica = cut(block_parent, keep, store={"dtype": "native"})
    expected = replica.expected
    for name, item in replica.record["tensors"].items():
        stem = name.removesuffix(".weight").removesuffix(".scale")
        if item["how"] in ("copy", "gather") and "tid2eid" not in name:
            assert np.array_equal(replica.decoded[stem], expected[stem]), name


# Trap 10: compensate


@pytest.fixture(scope="module")
def compensated(odd_parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """A quarter of everything that a norm sees: every factor is 2, and exact in bf16."""
    keep = {
        "hidden_size": 16,
        "q_lora_rank": 12,
        "head_dim": {"nope": 6, "rope": 4},
    }
    path = tmp_path_factory.mktemp("compensate") / "replica"
    return Cut(odd_parent, odd_parent.plan(keep, compensate=True), path)


def rms_norm(x: np.ndarray, eps: float = 0.0) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def dims_of(kept: Any, name: str) -> np.ndarray:
    if name.endswith("q_norm"):
        return np.asarray(kept.q_lora)
    if name.endswith(("kv_norm", "compressor.norm")):
        return np.concatenate([kept.nope, NOPE + kept.rope])
    return np.asarray(kept.hidden)


NORMS = [
    *("norm", "layers.0.attn_norm", "layers.3.ffn_norm", "layers.1.attn.q_norm"),
    *("layers.2.attn.kv_norm", "layers.2.attn.compressor.norm", "layers.4.attn.compressor.norm"),
    *("mtp.0.attn_norm", "mtp.0.enorm", "mtp.0.hnorm", "mtp.0.norm", "mtp.0.attn.kv_norm"),
]


@pytest.mark.parametrize("name", NORMS)
def test_trap_10_norm_of_channels_without_lost_energy_is_the_parents(
    odd_parent: Parent, compensated: Cut, name: str
) -> None:
    block = next((b for b in compensated.blocks if b and name.startswith(b)), "")
    dims = dims_of(compensated.blocks[block], name)
    weight = odd_parent.decoded[name].astype(np.float64)
    x = np.zeros((8, len(weight)))
    x[:, dims] = np.random.default_rng(0).standard_normal((8, len(dims)))
    wanted = (rms_norm(x) * weight)[:, dims]
    got = rms_norm(x[:, dims]) * compensated.decoded[name]
    assert np.allclose(got, wanted, rtol=1e-12, atol=0)
    uncompensated = rms_norm(x[:, dims]) * weight[dims]
    assert not np.allclose(uncompensated, wanted, rtol=0.1)


@pytest.mark.parametrize("name", ["layers.1.hc_attn_fn", "mtp.0.hc_ffn_fn", "hc_head_fn"])
def test_trap_10_mixes_of_streams_without_lost_energy_are_the_parents(
    odd_parent: Parent, compensated: Cut, name: str
) -> None:
    hidden = compensated.blocks[""].hidden
    flat = np.zeros((8, 3, 64))
    flat[:, :, hidden] = np.random.default_rng(0).standard_normal((8, 3, 16))
    small = flat[:, :, hidden].reshape(8, -1)
    wanted = rms_norm(flat.reshape(8, -1)) @ odd_parent.decoded[name].T.astype(np.float64)
    got = rms_norm(small) @ compensated.decoded[name].T.astype(np.float64)
    assert np.allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_trap_10_softmax_scale_and_the_norm_of_each_head_cancel(
    odd_parent: Parent, compensated: Cut
) -> None:
    kept = compensated.blocks["layers.0."]
    dims = np.concatenate([kept.nope, NOPE + kept.rope])
    rng = np.random.default_rng(0)
    q, kv = np.zeros((5, 40)), np.zeros((7, 40))
    q[:, dims], kv[:, dims] = rng.standard_normal((5, 10)), rng.standard_normal((7, 10))
    name = "layers.0.attn.kv_norm"
    wanted = rms_norm(q) @ (rms_norm(kv) * odd_parent.decoded[name]).T * 40**-0.5
    small = rms_norm(kv[:, dims]) * compensated.decoded[name]
    got = rms_norm(q[:, dims]) @ small.T * 10**-0.5
    assert np.allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_trap_10_nothing_but_norms_and_mixing_projections_is_scaled(compensated: Cut) -> None:
    expected = compensated.expected
    scaled = set()
    for name, wanted in expected.items():
        got = compensated.decoded[name]
        if name.endswith(("norm", "_fn")) and "indexer" not in name:
            assert np.array_equal(got, 2 * wanted), name
            scaled.add(name)
        else:
            assert np.array_equal(got, wanted), name
    assert compensated.record["report"]["transforms"]["scale"] == len(scaled)


def test_trap_10_a_factor_that_is_not_exact_is_rounded_once(
    odd_parent: Parent, cut: Cutter
) -> None:
    replica = cut(odd_parent, {"hidden_size": 24, "hc_mult": 2}, compensate=True)
    expected = replica.expected
    norm = expected["norm"] * np.sqrt(64 / 24)
    # bf16 has 8 significant bits: half a unit is at most 2^-8 of a value; float32 has 24.
    assert np.abs(replica.decoded["norm"] / norm - 1).max() <= 2.0**-8
    fn = expected["layers.0.hc_attn_fn"] * np.sqrt(3 * 64 / (2 * 24))
    assert np.abs(replica.decoded["layers.0.hc_attn_fn"] / fn - 1).max() <= 2.0**-24
    assert np.array_equal(replica.decoded["layers.0.attn.q_norm"], expected["layers.0.attn.q_norm"])


def test_trap_10_says_what_cannot_be_folded(odd_parent: Parent, compensated: Cut) -> None:
    (note,) = [note for note in compensated.record["notes"] if note.startswith("compensate")]
    for part in ("rms_norm_eps", "softmax", "top-K", "cannot be folded"):
        assert part in note
    assert not [n for n in odd_parent.plan({"hidden_size": 16}).notes if "compensate" in n]


# Trap 11: Hadamard


def test_trap_11_an_index_head_dim_of_96_gets_a_note(block_parent: Parent) -> None:
    plan = block_parent.plan({"indexer": {"head_dim": 96}})
    assert plan.config.index_head_dim == 96
    (note,) = [note for note in plan.notes if "index_head_dim" in note]
    assert "96 is no power of two" in note and "block-diagonal" in note
    assert not [note for note in block_parent.plan({}).notes if "index_head_dim" in note]


# Trap 12: gate.bias and the routed factor


def test_trap_12_gate_bias_follows_the_experts(odd_parent: Parent, cut: Cutter) -> None:
    replica = cut(odd_parent, {"experts": [5, 1, 2]})
    for layer in ("layers.2.", "layers.6.", "mtp.0."):
        for name in ("ffn.gate.bias", "ffn.gate"):
            wanted = odd_parent.decoded[layer + name][[5, 1, 2]]
            assert np.array_equal(replica.decoded[layer + name], wanted)
    assert replica.raw["layers.2.ffn.gate.bias"].dtype == "F32"
    assert any("top-K" in note for note in replica.record["notes"])


def test_trap_12_routed_scaling_factor_is_the_parents_unless_the_recipe_sets_it(
    odd_parent: Parent,
) -> None:
    keep = {"experts": {"keep": 3, "per_token": 2}}
    assert odd_parent.plan(keep).config.routed_scaling_factor == 1.5
    plan = odd_parent.plan(keep, config={"routed_scaling_factor": 2.25})
    assert plan.config.to_dict()["routed_scaling_factor"] == 2.25


def test_trap_12_fewer_experts_than_a_token_takes_is_refused(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="fewer experts than a token takes") as error:
        odd_parent.plan({"experts": 2})
    assert "keep.experts.per_token" in str(error.value)


# Trap 13: drafters


def test_trap_13_dropping_mtp_leaves_nothing_of_it(odd_parent: Parent, cut: Cutter) -> None:
    replica = cut(odd_parent, {"mtp": "drop"})
    assert replica.decoded.keys() == {n for n in odd_parent.decoded if not n.startswith("mtp.")}
    assert replica.config["num_nextn_predict_layers"] == 0
    assert replica.config["compress_ratios"] == ODD["compress_ratios"][:-1]
    assert "1 drafter block(s) dropped" in replica.record["notes"]


def test_trap_13_mtp_is_cut_with_the_models_channels(odd_parent: Parent, cut: Cutter) -> None:
    hidden = [9, 8, 40]
    replica = cut(odd_parent, {"hidden_size": hidden, "layers": [0, 3]})
    for name in ("e_proj", "h_proj"):
        wanted = odd_parent.decoded[f"mtp.0.{name}"][np.ix_(hidden, hidden)]
        assert np.array_equal(replica.decoded[f"mtp.0.{name}"], wanted)
    wanted = odd_parent.decoded["mtp.0.enorm"][hidden]
    assert np.array_equal(replica.decoded["mtp.0.enorm"], wanted)


def test_trap_13_dspark_is_cut_on_every_axis_like_the_trunk(
    dspark_parent: Parent, cut: Cutter
) -> None:
    replica = cut(dspark_parent, {**RANDOM_CUT, "layers": [0, 1, 2, 3, 5, 6]}, seed=3)
    got = {name: v for name, v in replica.decoded.items() if "tid2eid" not in name}
    expected = replica.expected
    assert got.keys() == expected.keys()
    assert [n for n, v in expected.items() if not np.array_equal(v, got[n])] == []
    assert got["mtp.0.main_proj"].shape == (24, 3 * 24)
    assert got["mtp.2.confidence_head.proj"].shape == (1, 24 + 7)
    vocab = replica.blocks[""].vocab.tolist()
    assert replica.config["dspark_noise_token_id"] == vocab.index(77)
    assert replica.config["dspark_markov_rank"] == 7
    assert replica.config["dspark_block_size"] == 5


@pytest.mark.parametrize(
    ("layers", "targets"),
    [
        ([0, 1, 2, 3, 4, 5, 6], [3, 5, 6]),
        ([0, 1, 2, 3, 5, 6], [3, 4, 5]),
        ([0, 1, 2, 4, 6], [2, 3, 4]),  # 3: 2 and 4 are as near, the lower one; 5: 4; 6: 6
        ([0, 1, 2], [0, 1, 2]),
        ([3, 4, 5, 6], [0, 2, 3]),
    ],
)
def test_trap_13_dspark_targets_are_the_nearest_kept_layers(
    dspark_parent: Parent, layers: list[int], targets: list[int]
) -> None:
    config = dspark_parent.plan({"layers": layers}).config
    assert list(config.dspark_target_layer_ids or ()) == targets


def test_trap_13_dspark_targets_stay_distinct_where_one_layer_is_nearest_to_all() -> None:
    config = FLASH.replace(dspark_target_layer_ids=(1, 2, 3), compress_ratios=(0,) * 46)
    assert remap_targets(config, (0, 4, 5, 6)) == (0, 1, 2)
    assert remap_targets(config, (0, 1, 2, 20, 30)) == (1, 2, 3)


def test_trap_13_dspark_needs_as_many_layers_as_it_reads(dspark_parent: Parent) -> None:
    with pytest.raises(PlanError, match="too few layers for the DSpark drafter") as error:
        dspark_parent.plan({"layers": [0, 3]})
    assert "keep.mtp: drop" in str(error.value)
    assert dspark_parent.plan({"layers": [0, 3], "mtp": "drop"}).config.num_drafters == 0


def test_trap_13_dropping_dspark_leaves_nothing_of_it(dspark_parent: Parent, cut: Cutter) -> None:
    replica = cut(dspark_parent, {"mtp": "drop"})
    assert not [name for name in replica.decoded if name.startswith("mtp.")]
    assert not [key for key in replica.config if key.startswith("dspark")]
    assert len(replica.config["compress_ratios"]) == replica.config["num_hidden_layers"]


# Trap 14: tensors that nobody counts


UNKNOWN = parents.RawTensor("F32", (2,), bytes(8))


@pytest.mark.parametrize(
    "name", ["layers.2.attn.wq_c.weight", "layers.7.attn_norm.weight", "layers.0.ffn.gate.bias"]
)
def test_trap_14_a_tensor_that_no_rule_covers_is_named(
    odd_parent: Parent, tmp_path: Path, name: str
) -> None:
    path = parents.add_tensor(odd_parent.path, tmp_path / "more", name, UNKNOWN)
    with pytest.raises(CatalogueError, match=f"unknown: {re.escape(name)}"):
        v4surgery.open(path)


@pytest.mark.parametrize(
    "name",
    [
        *("layers.3.attn.wo_a.weight", "layers.0.ffn.gate.tid2eid", "layers.2.ffn.gate.bias"),
        *("layers.6.ffn.experts.5.w2.weight", "mtp.0.hnorm.weight", "hc_head_scale"),
    ],
)
def test_trap_14_a_tensor_that_the_parent_lacks_is_named(
    odd_parent: Parent, tmp_path: Path, name: str
) -> None:
    path = parents.delete_tensor(odd_parent.path, tmp_path / "less", name)
    with pytest.raises(CatalogueError, match=f"missing: {re.escape(name)}"):
        v4surgery.open(path)


def test_trap_14_a_weight_without_its_scale_is_named(odd_parent: Parent, tmp_path: Path) -> None:
    name = "layers.3.attn.wo_a"
    path = parents.delete_tensor(odd_parent.path, tmp_path / "less", name + ".scale")
    with pytest.raises(CatalogueError, match=f"{re.escape(name)}.weight is F8_E4M3"):
        v4surgery.open(path)


def test_trap_14_half_a_dspark_drafter_is_refused(dspark_parent: Parent, tmp_path: Path) -> None:
    def edit(shards: parents.Shards) -> None:
        for tensors in shards.values():
            for name in [name for name in tensors if name.startswith("mtp.1.")]:
                del tensors[name]

    path = parents.edit_checkpoint(dspark_parent.path, tmp_path / "half", edit)
    with pytest.raises(CatalogueError, match=r"missing: mtp\.1\."):
        v4surgery.open(path)


def test_trap_14_a_layer_more_than_the_config_says_is_refused(
    odd_parent: Parent, tmp_path: Path
) -> None:
    path = parents.copy_checkpoint(odd_parent.path, tmp_path / "parent")
    config = {**odd_parent.config, "num_hidden_layers": 6}
    config["compress_ratios"] = [*ODD["compress_ratios"][:6], 0]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CatalogueError, match=r"unknown: layers\.6\."):
        v4surgery.open(path)


@pytest.mark.parametrize("theta", [2, 1e12])
@pytest.mark.parametrize("beta", [1e-30, 1e12])
@pytest.mark.parametrize("positions", [1, 10**12])
def test_rope_is_computed_up_to_its_limits(theta: float, beta: float, positions: int) -> None:
    """What the config's rules let pass has frequencies, and so have the replicas cut from it."""
    scaling = RopeScaling(beta, positions, beta, beta)
    values = {"rope_theta": theta, "compress_rope_theta": theta, "rope_scaling": asdict(scaling)}
    config = V4Config.from_dict({**FLASH.to_dict(), **values})
    for dims in (64, 16):
        cut = cut_rope(config, dims, allow_mismatch=False).scaling
        made = V4Config.from_dict(config.replace(qk_rope_head_dim=dims, rope_scaling=cut).to_dict())
        for ratio in (0, 4):
            assert rope_frequencies(made, ratio).isfinite().all()
