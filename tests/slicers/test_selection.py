"""Every way to choose, on every axis that it goes with; and what is said when it cannot be done."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

from tests.slicers.conftest import ODD, Cutter, Parent
from tests.support.scores import about, write_scores
from v4surgery.errors import PlanError, UsageError
from v4surgery.importance.scorebook import ScoreBook

GROUPS, PER_GROUP = ODD["o_groups"], ODD["num_attention_heads"] // ODD["o_groups"]
ROPE, NOPE = ODD["qk_rope_head_dim"], ODD["head_dim"] - ODD["qk_rope_head_dim"]
INDEX_NOPE = ODD["index_head_dim"] - ROPE


class Axis(NamedTuple):
    """One axis of the recipe: where its pick stands, and what the selection calls it."""

    path: str
    dim: str
    size: int
    score_dim: str
    per_block: bool = True
    extra: int = 0  # what `keep` counts beyond the units (rope dims)

    def keep(self, **pick: Any) -> dict[str, Any]:
        """The recipe's ``keep`` with this pick alone."""
        if "keep" in pick:
            pick["keep"] += self.extra
        elif self.extra:
            pick["keep"] = len(pick["ids"]) + self.extra
        content: dict[str, Any] = pick
        if self.path == "experts":
            content["per_token"] = 1
        for part in reversed(self.path.split(".")):
            content = {part: content}
        return content


AXES = {
    axis.path: axis
    for axis in (
        Axis("hidden_size", "hidden_size", 64, "hidden_size", per_block=False),
        Axis("hc_mult", "streams", 3, "streams", per_block=False),
        Axis("experts", "n_routed_experts", 6, "n_routed_experts"),
        Axis("moe_intermediate_size", "moe_intermediate_size", 32, "moe_intermediate_size"),
        Axis("heads.groups", "o_groups", 3, "o_groups"),
        Axis("heads.per_group", "group_heads", PER_GROUP, "num_attention_heads"),
        Axis("head_dim.nope", "nope", NOPE, "nope"),
        Axis("q_lora_rank", "q_lora_rank", 48, "q_lora_rank"),
        Axis("o_lora_rank", "o_lora_rank", 20, "o_groups*o_lora_rank"),
        Axis("indexer.heads", "index_n_heads", 5, "index_n_heads"),
        Axis("indexer.head_dim", "index_nope", INDEX_NOPE, "index_nope", extra=ROPE),
    )
}
EVERY_AXIS = pytest.mark.parametrize("axis", AXES.values(), ids=AXES)

Units = dict[str, np.ndarray]


def kept_units(parent: Parent, axis: Axis, keep: dict[str, Any], **recipe: Any) -> Units:
    """What a recipe keeps of an axis: by the parent block's prefix, or for ``model``."""
    selections = parent.plan(keep, **recipe).selections
    if not axis.per_block:
        return {"model": selections.model[axis.dim]}
    has_it = [b for b in selections.blocks if not axis.path.startswith("indexer") or is_csa(b)]
    return {block.source.prefix: block.kept[axis.dim] for block in has_it}


def is_csa(block: Any) -> bool:
    return bool(block.source.ratio == 4)


def every_row(units: Units) -> list[list[int]]:
    return [row.tolist() for value in units.values() for row in np.atleast_2d(value)]


@EVERY_AXIS
def test_first_keeps_the_first_units(odd_parent: Parent, axis: Axis) -> None:
    units = kept_units(odd_parent, axis, axis.keep(keep=2, by="first"))
    assert all(row == [0, 1] for row in every_row(units))


@EVERY_AXIS
def test_even_keeps_units_at_even_distance(odd_parent: Parent, axis: Axis) -> None:
    count = axis.size - 1
    units = kept_units(odd_parent, axis, axis.keep(keep=count))
    assert all(row == [i * axis.size // count for i in range(count)] for row in every_row(units))


@EVERY_AXIS
def test_ids_are_kept_as_they_are_given(odd_parent: Parent, axis: Axis) -> None:
    units = kept_units(odd_parent, axis, axis.keep(ids=[axis.size - 1, 0]))
    assert all(row == [axis.size - 1, 0] for row in every_row(units))


@EVERY_AXIS
def test_random_is_seeded_and_differs_by_seed_and_layer(odd_parent: Parent, axis: Axis) -> None:
    keep = axis.keep(keep=2, by="random")
    units = kept_units(odd_parent, axis, keep, seed=1)
    again = kept_units(odd_parent, axis, keep, seed=1)
    own = kept_units(odd_parent, axis, axis.keep(keep=2, by="random", seed=1), seed=4)
    assert every_row(units) == every_row(again) == every_row(own)
    for row in every_row(units):
        assert row == sorted(set(row)) and len(row) == 2 and set(row) <= set(range(axis.size))
    others = [kept_units(odd_parent, axis, keep, seed=seed) for seed in range(2, 8)]
    assert any(every_row(other) != every_row(units) for other in others)
    if axis.per_block:
        assert len({tuple(value.reshape(-1)) for value in units.values()}) > 1


@EVERY_AXIS
def test_keeping_more_than_there_is_names_the_field(odd_parent: Parent, axis: Axis) -> None:
    with pytest.raises(PlanError, match="keeps more than the parent has") as error:
        odd_parent.plan(axis.keep(keep=axis.size + 1))
    assert f"keep.{axis.path}" in str(error.value)
    assert f"at most {axis.size}" in str(error.value)


@EVERY_AXIS
def test_ids_beyond_the_parents_are_named(odd_parent: Parent, axis: Axis) -> None:
    with pytest.raises(PlanError, match="names units that the parent does not have") as error:
        odd_parent.plan(axis.keep(ids=[0, axis.size]))
    assert f"keep.{axis.path}.ids" in str(error.value)
    assert f"value: {axis.size}\n" in str(error.value)
    assert f"ids from 0 to {axis.size - 1}" in str(error.value)


# Norms: squares of every matrix that has the axis, summed over everything else, as numpy sums.


def squares(parent: Parent, *names: str) -> list[np.ndarray]:
    return [np.square(parent.decoded[n].astype(np.float64)) for n in names if n in parent.decoded]


def rows(values: list[np.ndarray], *shape: int) -> np.ndarray | float:
    """Sums over everything but the first axis, or but axis 1 of ``shape``."""
    total: np.ndarray | float = 0.0
    for value in values:
        grid = value.reshape(*shape, value.shape[1]) if shape else value[None]
        total = total + grid.sum(axis=(0, *range(2, grid.ndim)))
    return total


def columns(values: list[np.ndarray], *shape: int) -> np.ndarray | float:
    return rows([np.ascontiguousarray(value.T) for value in values], *shape)


def matrices(parent: Parent, block: str, pattern: str) -> list[np.ndarray]:
    found = [n for n in parent.decoded if re.fullmatch(re.escape(block) + pattern, n)]
    return squares(parent, *found)


def hidden_norm(parent: Parent, _: str) -> np.ndarray | float:
    """All of the model: e_proj and h_proj have the axis twice, and count for both."""
    total: np.ndarray | float = 0.0
    for name, value in parent.decoded.items():
        square = np.square(value.astype(np.float64))
        if name.endswith(("wo_b", "w2", "e_proj", "h_proj")):
            total = total + rows([square])
        column_names = ("embed", "head", "wq_a", "wkv", "wgate", "weights_proj", "gate", "w1", "w3")
        if name.endswith((*column_names, "e_proj", "h_proj")):
            total = total + columns([square])
        if name.endswith("_fn"):
            total = total + square.reshape(len(square), -1, 64).sum(axis=(0, 1))
    return total


def stream_norm(parent: Parent, _: str) -> np.ndarray | float:
    total: np.ndarray | float = 0.0
    for name, value in parent.decoded.items():
        if not name.endswith("_fn"):
            continue
        square = np.square(value.astype(np.float64))
        total = total + square.reshape(len(square), 3, 64).sum(axis=(0, 2))
        by_row = square.sum(axis=1)
        total = total + by_row[:3]
        if len(by_row) > 3:
            comb = by_row[6:].reshape(3, 3)
            total = total + by_row[3:6] + comb.sum(axis=0) + comb.sum(axis=1)
    return total


def expert_norm(parent: Parent, block: str) -> np.ndarray | float:
    gate = rows(matrices(parent, block, "ffn.gate"))
    own = [sum(v.sum() for v in matrices(parent, block, rf"ffn.experts.{e}.w\d")) for e in range(6)]
    return gate + np.array(own)


def head_norm(parent: Parent, block: str, axis: tuple[int, ...] = (2,)) -> np.ndarray:
    """Of every head, ``(G, N/G)``: its queries, and its columns of wo_a, which its group owns."""
    head_dim = ODD["head_dim"]
    (wq_b,) = matrices(parent, block, "attn.wq_b")
    (wo_a,) = matrices(parent, block, "attn.wo_a")
    queries = wq_b.reshape(GROUPS, PER_GROUP, -1).sum(axis=2)
    outputs = wo_a.reshape(GROUPS, -1, PER_GROUP, head_dim).sum(axis=(1, 3))
    return np.asarray(queries + outputs)


def group_norm(parent: Parent, block: str) -> np.ndarray:
    (wo_b,) = matrices(parent, block, "attn.wo_b")
    return head_norm(parent, block).sum(axis=1) + wo_b.reshape(64, GROUPS, -1).sum(axis=(0, 2))


def o_lora_norm(parent: Parent, block: str) -> np.ndarray:
    (wo_a,) = matrices(parent, block, "attn.wo_a")
    (wo_b,) = matrices(parent, block, "attn.wo_b")
    return np.asarray((wo_a.sum(axis=1) + wo_b.sum(axis=0)).reshape(GROUPS, -1))


def nope_norm(parent: Parent, block: str) -> np.ndarray:
    dim = ODD["head_dim"]
    total = rows(matrices(parent, block, "attn.wq_b"), 12, dim)
    total = total + rows(matrices(parent, block, "attn.wkv"))
    total = total + columns(matrices(parent, block, "attn.wo_a"), PER_GROUP, dim)
    for value in matrices(parent, block, "attn.compressor.w(kv|gate)"):
        total = total + rows([value], len(value) // dim, dim)
    for value in matrices(parent, block, "attn.compressor.ape"):
        total = total + columns([value], value.shape[1] // dim, dim)
    return np.asarray(total)[:NOPE]


def index_nope_norm(parent: Parent, block: str) -> np.ndarray:
    dim = ODD["index_head_dim"]
    total = rows(matrices(parent, block, "attn.indexer.wq_b"), 5, dim)
    total = total + rows(matrices(parent, block, "attn.indexer.compressor.w(kv|gate)"), 2, dim)
    total = total + columns(matrices(parent, block, "attn.indexer.compressor.ape"), 2, dim)
    return np.asarray(total)[:INDEX_NOPE]


def index_head_norm(parent: Parent, block: str) -> np.ndarray | float:
    wq_b = matrices(parent, block, "attn.indexer.wq_b")
    per_head = sum(value.reshape(5, -1).sum(axis=1) for value in wq_b)
    return per_head + rows(matrices(parent, block, "attn.indexer.weights_proj"))


def q_lora_norm(parent: Parent, block: str) -> np.ndarray | float:
    total = rows(matrices(parent, block, "attn.wq_a"))
    return total + columns(matrices(parent, block, r"attn.(indexer\.)?wq_b"))


SQUARED_NORMS: Mapping[str, Callable[[Parent, str], Any]] = {
    "hidden_size": hidden_norm,
    "hc_mult": stream_norm,
    "experts": expert_norm,
    "heads.groups": group_norm,
    "heads.per_group": head_norm,
    "head_dim.nope": nope_norm,
    "q_lora_rank": q_lora_norm,
    "o_lora_rank": o_lora_norm,
    "indexer.heads": index_head_norm,
    "indexer.head_dim": index_nope_norm,
}


def best(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:count].tolist())


@pytest.mark.parametrize("path", SQUARED_NORMS)
def test_norm_keeps_the_units_that_own_the_largest_weights(odd_parent: Parent, path: str) -> None:
    axis = AXES[path]
    count = max(axis.size // 2, 1)
    units = kept_units(odd_parent, axis, axis.keep(keep=count, by="norm"))
    for place, kept in units.items():
        scores = SQUARED_NORMS[path](odd_parent, "" if place == "model" else place)
        wanted = [best(row, count) for row in np.atleast_2d(scores)]
        assert np.atleast_2d(kept).tolist() == wanted, place


@pytest.mark.parametrize("path", SQUARED_NORMS)
def test_norms_count_every_weight_once_for_each_axis_that_has_it(
    odd_parent: Parent, path: str
) -> None:
    axis, opened = AXES[path], odd_parent.opened
    for block in (opened.catalogue.blocks[4], opened.catalogue.blocks[7]):
        if path.startswith("indexer") and "csa" not in block.traits:
            continue
        book = ScoreBook(opened)
        scores = book.of(axis.score_dim, block if axis.per_block else None)("norm", "")
        wanted = np.sqrt(SQUARED_NORMS[path](odd_parent, block.prefix)).reshape(-1)
        # Both add squares in float64, in another order.
        np.testing.assert_allclose(scores, wanted, rtol=1e-12)
        assert 0 < book.bytes_read <= opened.payload_bytes


def test_norm_keeps_each_experts_own_neurons(odd_parent: Parent) -> None:
    axis = AXES["moe_intermediate_size"]
    units = kept_units(odd_parent, axis, axis.keep(keep=9, by="norm"))
    for block, kept in units.items():
        names = [*(f"ffn.experts.{e}." for e in range(6)), "ffn.shared_experts."]
        assert len(kept) == len(names)
        for name, row in zip(names, kept, strict=True):
            up = rows(matrices(odd_parent, block, re.escape(name) + "w[13]"))
            down = columns(matrices(odd_parent, block, re.escape(name) + "w2"))
            assert row.tolist() == best(np.asarray(up + down), 9)


def test_norm_follows_kept_experts_to_their_own_neurons(odd_parent: Parent, cut: Cutter) -> None:
    keep = {
        "experts": {"ids": [4, 1], "per_token": 1},
        "moe_intermediate_size": {"keep": 9, "by": "norm"},
    }
    replica = cut(odd_parent, keep)
    w1 = odd_parent.decoded["layers.3.ffn.experts.4.w1"]
    up = rows(matrices(odd_parent, "layers.3.", "ffn.experts.4.w[13]"))
    down = columns(matrices(odd_parent, "layers.3.", "ffn.experts.4.w2"))
    wanted = w1[best(np.asarray(up + down), 9)]
    assert np.array_equal(replica.decoded["layers.3.ffn.experts.0.w1"], wanted)


def test_norm_keeps_the_tokens_of_the_largest_rows_and_bos_and_eos(odd_parent: Parent) -> None:
    kept = odd_parent.plan({"vocab_size": {"keep": 12, "by": "norm"}}).selections.model[
        "vocab_size"
    ]
    scores = np.asarray(rows(squares(odd_parent, "embed", "head")))
    scores[:2] = np.inf  # bos and eos stay
    assert kept is not None and kept.tolist() == best(scores, 12)


def test_norm_keeps_the_layers_of_the_largest_weights(odd_parent: Parent) -> None:
    totals = np.zeros(7)
    for name, value in odd_parent.decoded.items():
        if name.startswith("layers.") and not name.endswith("tid2eid"):
            totals[int(name.split(".")[1])] += np.square(value.astype(np.float64)).sum()
    plan = odd_parent.plan({"layers": {"count": 3, "by": "norm"}})
    assert [block.source.index for block in plan.selections.blocks[:3]] == best(totals, 3)


def test_gate_keeps_the_experts_of_the_largest_gate_rows_and_reads_nothing_else(
    odd_parent: Parent,
) -> None:
    axis = AXES["experts"]
    units = kept_units(odd_parent, axis, axis.keep(keep=3, by="gate"))
    for block, kept in units.items():
        gate = odd_parent.decoded[block + "ffn.gate"].astype(np.float64)
        assert kept.tolist() == best(np.linalg.norm(gate, axis=1), 3)
    assert len({tuple(kept) for kept in units.values()}) > 1
    cost = odd_parent.plan(axis.keep(keep=3, by="gate")).cost
    assert cost.selection_bytes == 8 * 6 * 64 * 2  # eight blocks, six rows of 64 in bf16
    assert odd_parent.plan(axis.keep(keep=3, by="even")).cost.selection_bytes == 0


# Scores from a file


DEFAULT_SCORE = {
    "layers": "influence",
    "hidden_size": "energy",
    "streams": "energy",
    "vocab_size": "frequency",
    "n_routed_experts": "reap",
    "moe_intermediate_size": "activation",
    "o_groups": "contribution",
    "num_attention_heads": "contribution",
    "nope": "energy",
    "q_lora_rank": "activation",
    "o_groups*o_lora_rank": "activation",
    "index_n_heads": "contribution",
    "index_nope": "energy",
}


def scores_of_everything(parent: Parent, seed: int = 0) -> dict[str, np.ndarray]:
    """One vector for each score, axis and place, as docs say: ``<score>/<dim>/<place>``."""
    rng = np.random.default_rng(seed)
    layers = parent.config["num_hidden_layers"]
    blocks = [*(f"layers.{i}." for i in range(layers)), "mtp.0."]
    sizes = {axis.score_dim: axis.size for axis in AXES.values() if axis.per_block}
    sizes["num_attention_heads"] = GROUPS * PER_GROUP
    sizes["o_groups*o_lora_rank"] = GROUPS * ODD["o_lora_rank"]
    del sizes["moe_intermediate_size"]
    for expert in (*(f"experts.{e}" for e in range(6)), "shared_experts"):
        sizes[f"moe_intermediate_size.{expert}"] = 32
    scores = {
        f"{DEFAULT_SCORE[dim.partition('.')[0]]}/{dim}/{block}": rng.random(size)
        for dim, size in sizes.items()
        for block in blocks
    }
    for dim, size in {"hidden_size": 64, "streams": 3, "vocab_size": 96, "layers": layers}.items():
        scores[f"{DEFAULT_SCORE[dim]}/{dim}/model"] = rng.random(size).astype(np.float32)
    return scores


@pytest.fixture(scope="module")
def scores_file(odd_parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    return write_scores(path, odd_parent.opened, scores_of_everything(odd_parent))


@pytest.mark.parametrize("path", [path for path in AXES if path != "moe_intermediate_size"])
def test_scores_keep_the_best_units(odd_parent: Parent, scores_file: Path, path: str) -> None:
    axis = AXES[path]
    scores = scores_of_everything(odd_parent)
    count = max(axis.size // 2, 1)
    keep = axis.keep(keep=count, by="scores")
    for place, kept in kept_units(odd_parent, axis, keep, scores=str(scores_file)).items():
        values = scores[f"{DEFAULT_SCORE[axis.score_dim]}/{axis.score_dim}/{place}"]
        if kept.ndim == 2:
            values = values.reshape(GROUPS, -1)
        wanted = [best(row, count) for row in np.atleast_2d(values)]
        assert np.atleast_2d(kept).tolist() == wanted


def test_scores_keep_the_best_neurons_of_each_expert(odd_parent: Parent, scores_file: Path) -> None:
    axis, scores = AXES["moe_intermediate_size"], scores_of_everything(odd_parent)
    keep = axis.keep(keep=5, by="scores")
    for block, kept in kept_units(odd_parent, axis, keep, scores=str(scores_file)).items():
        names = [*(f"experts.{e}" for e in range(6)), "shared_experts"]
        keys = [f"activation/moe_intermediate_size.{name}/{block}" for name in names]
        wanted = [best(scores[key], 5) for key in keys]
        assert kept.tolist() == wanted


def test_scores_keep_the_best_layers_and_tokens(odd_parent: Parent, scores_file: Path) -> None:
    scores = scores_of_everything(odd_parent)
    keep = {
        "layers": {"count": 3, "by": "scores"},
        "vocab_size": {"keep": 30, "by": "scores"},
    }
    plan = odd_parent.plan(keep, scores=str(scores_file))
    sources = [block.source.index for block in plan.selections.blocks[:3]]
    assert sources == best(scores["influence/layers/model"], 3)
    values = scores["frequency/vocab_size/model"].copy()
    values[:2] = np.inf
    kept = plan.selections.model["vocab_size"]
    assert kept is not None and kept.tolist() == best(values, 30)


HIDDEN_BY_SCORES = {"hidden_size": {"keep": 8, "by": "scores"}}


def test_scores_without_a_file_are_a_usage_error(odd_parent: Parent) -> None:
    with pytest.raises(UsageError, match="no scores file is named"):
        odd_parent.plan(HIDDEN_BY_SCORES)


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file", b"\xff" * 64])
def test_a_scores_file_that_is_not_there_or_none_is_named(
    odd_parent: Parent, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "scores.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match="not a scores file") as error:
        odd_parent.plan(HIDDEN_BY_SCORES, scores=str(path))
    assert f"where: {path}" in str(error.value)
    assert "next: make one: v4surgery score PARENT --prompts FILE" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        np.ones(63),
        np.ones((64, 1)),
        np.where(np.arange(64) == 5, np.nan, 1.0),
        np.where(np.arange(64) == 5, np.inf, 1.0),
        np.arange(64),
    ],
    ids=["size", "shape", "nan", "infinite", "dtype"],
)
def test_scores_that_do_not_fit_are_named(
    odd_parent: Parent, tmp_path: Path, values: np.ndarray
) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, odd_parent.opened, {"energy/hidden_size/model": values})
    with pytest.raises(PlanError, match="the scores do not fit the parent") as error:
        odd_parent.plan(HIDDEN_BY_SCORES, scores=str(path))
    assert "64 finite numbers" in str(error.value)


def test_a_missing_key_of_the_scores_file_is_named(odd_parent: Parent, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, odd_parent.opened, {"reap/n_routed_experts/layers.0.": np.arange(6.0)})
    with pytest.raises(PlanError, match=r"reap/n_routed_experts/layers\.1\."):
        odd_parent.plan({"experts": {"keep": 2, "by": "scores", "per_token": 1}}, scores=str(path))


PLAN_BY_SCORES = """
import sys
sys.modules["ml_dtypes"] = None  # the tests have it, users need not
import v4surgery
from v4surgery.errors import PlanError
from v4surgery.recipes import Recipe
keep = {"hidden_size": {"keep": 8, "by": "scores"}}
recipe = Recipe.model_validate({"name": "test", "scores": sys.argv[2], "keep": keep})
try:
    v4surgery.plan(v4surgery.open(sys.argv[1]), recipe)
except PlanError as error:
    print(error)
"""


def test_scores_in_a_dtype_that_numpy_lacks_are_refused_by_name(
    odd_parent: Parent, tmp_path: Path
) -> None:
    path = tmp_path / "scores.safetensors"
    stored = {"energy/hidden_size/model": torch.zeros(64, dtype=torch.bfloat16)}
    save_torch(stored, path, about(odd_parent.opened))
    command = [sys.executable, "-c", PLAN_BY_SCORES, odd_parent.path, path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "the scores cannot be read" in said
    assert f"{path}: energy/hidden_size/model" in said
    assert "float32 or float64" in said


# Whole blocks


@pytest.mark.parametrize("by", ["first", "even", "random", "norm"])
@pytest.mark.parametrize(
    ("path", "block", "keep"),
    [
        ("hidden_size", 128, 256),
        ("moe_intermediate_size", 32, 96),
        ("q_lora_rank", 128, 128),
        ("o_lora_rank", 32, 64),
    ],
)
def test_blocks_are_kept_whole_and_aligned(
    block_parent: Parent, by: str, path: str, block: int, keep: int
) -> None:
    axis = AXES[path]
    units = kept_units(block_parent, axis, axis.keep(keep=keep, by=by, block=block))
    for row in every_row(units):
        runs = np.array(row).reshape(-1, block)
        assert len(row) == keep
        assert (runs[:, 0] % block == 0).all()
        assert (runs == runs[:, :1] + np.arange(block)).all()
        assert len(set(runs[:, 0])) == len(runs)


def test_blocks_are_scored_by_the_sum_of_their_units_norms(block_parent: Parent) -> None:
    axis = AXES["q_lora_rank"]
    units = kept_units(block_parent, axis, axis.keep(keep=96, by="norm", block=32))
    for place, kept in units.items():
        norms = np.sqrt(q_lora_norm(block_parent, place)).reshape(-1, 32).sum(axis=1)
        wanted = np.array(best(norms, 3))[:, None] * 32 + np.arange(32)
        assert kept.tolist() == wanted.reshape(-1).tolist()


def test_a_block_must_divide_the_parents_size(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="no multiple of the block") as error:
        odd_parent.plan({"q_lora_rank": {"keep": 32, "block": 32}})
    assert "keep.q_lora_rank.block" in str(error.value)
    assert "a divisor of 48" in str(error.value)


def test_a_block_must_divide_the_index_dims_that_are_chosen(block_parent: Parent) -> None:
    # 64 rope dims stand in the 112: 48 are chosen, and no run of 32 makes them.
    with pytest.raises(PlanError, match="no multiple of the block") as error:
        block_parent.plan({"indexer": {"head_dim": {"keep": 112, "block": 32}}})
    assert "keep.indexer.head_dim" in str(error.value)


def test_a_block_must_divide_the_tokens_that_are_chosen(odd_parent: Parent) -> None:
    # bos and eos stay in any case, so 94 of the 96 tokens are there to choose 45 from.
    with pytest.raises(PlanError, match="no multiple of the block"):
        odd_parent.plan({"vocab_size": {"keep": 47, "block": 47}})


def test_index_ids_must_leave_the_rope_dims_that_the_heads_have(block_parent: Parent) -> None:
    head_dim = {"keep": 96, "ids": [*range(16)]}  # leaves 80 rope dims, and the heads have 64
    with pytest.raises(PlanError, match="index") as error:
        block_parent.plan({"indexer": {"head_dim": head_dim}})
    assert "keep.indexer.head_dim" in str(error.value)


def test_an_index_head_without_room_is_refused(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="no room for dims without position"):
        odd_parent.plan({"indexer": {"head_dim": ROPE}})


def test_an_fp4_width_that_is_no_multiple_of_32_is_refused_by_name(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="FP4 cannot store this width") as error:
        odd_parent.plan({"hidden_size": 48}, store={"dtype": "native"})
    assert "layers.0.ffn.experts.0.w1" in str(error.value)
    assert "48 inputs" in str(error.value) and "bf16" in str(error.value)


def test_more_experts_a_token_than_the_parents_is_refused(odd_parent: Parent) -> None:
    with pytest.raises(PlanError, match="keeps more than the parent has") as error:
        odd_parent.plan({"experts": {"per_token": 4}})
    assert "keep.experts.per_token" in str(error.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"count": 8}, "at most 7"),
        ({"ids": [0, 7]}, "names layers that the parent does not have"),
    ],
)
def test_layers_that_the_parent_does_not_have_are_refused(
    odd_parent: Parent, layers: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as error:
        odd_parent.plan({"layers": layers})
    assert "keep.layers" in str(error.value)
