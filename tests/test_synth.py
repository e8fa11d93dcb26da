"""Synthetic parents: the published layout to the byte, the same bytes whatever the workers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import v4surgery
from tests.support import parents
from v4surgery.catalogue import Catalogue
from v4surgery.errors import OutputError, UsageError
from v4surgery.presets import PRESETS
from v4surgery.synth import Synthesis, plan_synthesis, write_synthesis

# Every layer kind of Flash or its relatives, at a size that is written in a moment.
REDUCED: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "moe_intermediate_size": 96,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_lora_rank": 64,
    "o_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 6,
    "index_n_heads": 4,
    "index_head_dim": 64,
}
DTYPE_ORDER = ("I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8")


@pytest.fixture(scope="module")
def full_flash() -> Synthesis:
    return plan_synthesis("flash", sparse=True)


def sha256s(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def header_of(path: Path) -> tuple[bytes, dict[str, Any]]:
    blob = path.read_bytes()
    text = blob[8 : 8 + int.from_bytes(blob[:8], "little")]
    return text, json.loads(text)


def test_full_flash_has_the_46_files_of_the_published_total(full_flash: Synthesis) -> None:
    assert len(full_flash.shards) == 46
    assert full_flash.total_bytes == 159_617_149_040
    assert sum(shard.payload_bytes for shard in full_flash.shards) == 159_609_485_896
    assert full_flash.bytes_on_disk < 2_500_000_000


def test_full_flash_has_embed_layers_head_and_drafter_in_their_files(
    full_flash: Synthesis,
) -> None:
    names = [[tensor.name for tensor in shard.tensors] for shard in full_flash.shards]
    files = [shard.file for shard in full_flash.shards]
    assert files == [f"model-{i:05d}-of-00046.safetensors" for i in range(1, 47)]
    assert names[0] == ["embed.weight"]
    for layer in range(43):
        assert {name.split(".")[1] for name in names[layer + 1]} == {str(layer)}
    expected_head = ["hc_head_base", "hc_head_fn", "hc_head_scale", "head.weight", "norm.weight"]
    assert names[44] == expected_head
    assert all(name.startswith("mtp.0.") for name in names[45])
    assert len(names[45]) == 1575


def test_full_flash_lays_out_data_by_dtype_and_name(full_flash: Synthesis) -> None:
    for shard in full_flash.shards:
        keys = [(DTYPE_ORDER.index(tensor.dtype), tensor.name) for tensor in shard.tensors]
        assert keys == sorted(keys)
        assert len(shard.header) % 8 == 0


@pytest.fixture(scope="module")
def sparse_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full-width Flash with four layers and few experts: 1.1 GB of which little is on disk."""
    changes = {"n_routed_experts": 8, "vocab_size": 2048}
    return parents.write_parent(
        tmp_path_factory.mktemp("sparse") / "flash",
        "flash",
        layers=4,
        changes=changes,
        sparse=True,
    )


def test_sparse_files_have_their_full_size_and_take_little_disk(sparse_flash: Path) -> None:
    changes = {"n_routed_experts": 8, "vocab_size": 2048}
    planned = plan_synthesis("flash", layers=4, changes=changes, sparse=True)
    sizes = {path.name: path.stat().st_size for path in sparse_flash.glob("*.safetensors")}
    assert sizes == {shard.file: shard.total_bytes for shard in planned.shards}
    on_disk = sum(path.stat().st_blocks * 512 for path in sparse_flash.glob("*.safetensors"))
    assert sum(sizes.values()) > 1_000_000_000
    assert on_disk < 100_000_000
    # Blocks of 4 KiB at the ends of every hole; the plan's own figure counts payload.
    assert abs(on_disk - planned.bytes_on_disk) < 20_000_000


def test_sparse_large_matrices_are_zeros_and_the_rest_is_not(sparse_flash: Path) -> None:
    zeros, others = [], []
    with v4surgery.open(sparse_flash) as parent:
        for stem, stored in parent.tensors.items():
            rows = slice(0, min(stored.weight.shape[0], 16))
            is_zero = not parent.read_rows(stored.weight, rows).any()
            if stored.scale is not None:
                is_zero &= not parent.read_rows(stored.scale, slice(0, 1)).any()
            (zeros if is_zero else others).append(stem)
            assert is_zero == (stored.scale is not None or stem == "head"), stem
    assert {"layers.0.attn.wq_a", "layers.3.ffn.experts.7.w2", "mtp.0.e_proj"} <= set(zeros)
    assert {"embed", "layers.0.ffn.gate", "layers.0.ffn.gate.tid2eid", "norm"} <= set(others)


def test_sparse_parent_is_opened_by_safetensors(sparse_flash: Path) -> None:
    for path in sparse_flash.glob("*.safetensors"):
        with safe_open(path, framework="np") as opened:
            assert opened.metadata() is None
            assert len(list(opened.keys())) > 0


def test_hash_tables_give_each_token_distinct_experts_and_use_them_all(demo_parent: Path) -> None:
    config = PRESETS["demo"].config
    tables = {
        name: tensor
        for name, tensor in parents.read_tensors(demo_parent).items()
        if name.endswith("tid2eid")
    }
    assert list(tables) == [f"layers.{i}.ffn.gate.tid2eid" for i in range(config.num_hash_layers)]
    for tensor in tables.values():
        table = np.frombuffer(tensor.data, dtype=np.int64).reshape(tensor.shape)
        assert table.shape == (config.vocab_size, config.num_experts_per_tok)
        assert all(len(set(row)) == len(row) for row in table.tolist())
        assert set(table.flatten().tolist()) == set(range(config.n_routed_experts))


def test_values_have_the_scale_of_a_trained_model(demo_parent: Path) -> None:
    with v4surgery.open(demo_parent) as parent:

        def values(stem: str) -> Any:
            stored = parent.tensors[stem]
            return parent.read_float(stored, slice(0, stored.weight.shape[0]))

        for stem in ("embed", "layers.3.attn.wq_a", "layers.3.ffn.experts.5.w1", "head"):
            assert 0.01 < values(stem).std() < 0.04, stem
            assert abs(values(stem).mean()) < 0.002, stem
        for stem in ("norm", "layers.3.attn.q_norm", "layers.3.hc_attn_scale"):
            assert abs(values(stem).mean() - 1.0) < 0.2, stem
        for stem in ("layers.3.attn.attn_sink", "layers.3.ffn.gate.bias"):
            assert 0.0 < np.abs(values(stem)).max() < 1.0, stem
        for stem in parent.tensors:
            if parent.tensors[stem].fmt != "I64":
                assert np.isfinite(values(stem)).all(), stem


def test_tensors_differ_from_each_other(demo_parent: Path) -> None:
    tensors = parents.read_tensors(demo_parent)
    large = [tensor.data for tensor in tensors.values() if len(tensor.data) >= 128]
    assert len(set(large)) == len(large)


def test_shards_are_the_published_layout_to_the_byte(demo_parent: Path) -> None:
    layers = PRESETS["demo"].config.num_hidden_layers
    files = sorted(demo_parent.glob("*.safetensors"))
    assert len(files) == layers + 3
    weight_map: dict[str, str] = {}
    for path in files:
        text, header = header_of(path)
        assert "__metadata__" not in header
        compact = json.dumps(header, separators=(",", ":")).encode()
        assert text == compact + b" " * (-len(compact) % 8)
        keys = [(DTYPE_ORDER.index(info["dtype"]), name) for name, info in header.items()]
        assert keys == sorted(keys)
        offsets = [info["data_offsets"] for info in header.values()]
        ends = [0, *(end for _, end in offsets)]
        assert [begin for begin, _ in offsets] == ends[:-1]
        assert path.stat().st_size == 8 + len(text) + ends[-1]
        weight_map |= dict.fromkeys(header, path.name)
    index = json.loads((demo_parent / parents.INDEX_FILE).read_text())
    assert index["weight_map"] == weight_map
    payload = sum(len(tensor.data) for tensor in parents.read_tensors(demo_parent).values())
    assert index["metadata"] == {"total_size": payload}


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A vocabulary of more than one chunk, so that workers have something to reorder.
    out = tmp_path_factory.mktemp("workers") / "one"
    return parents.write_parent(out, layers=3, changes={"vocab_size": 12345}, workers=1)


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_workers(one_worker: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "parent"
    parents.write_parent(out, layers=3, changes={"vocab_size": 12345}, workers=workers)
    assert sha256s(out) == sha256s(one_worker)


def test_another_seed_gives_the_same_layout_and_other_values(
    small_parent: Path, tmp_path: Path
) -> None:
    other = parents.write_parent(tmp_path / "other", changes=parents.SMALL, seed=1)
    first, second = parents.read_tensors(small_parent), parents.read_tensors(other)
    assert [(n, t.dtype, t.shape) for n, t in first.items()] == [
        (n, t.dtype, t.shape) for n, t in second.items()
    ]
    same = [name for name in first if first[name].data == second[name].data]
    # Tensors of one or two scale bytes may agree by chance.
    assert all(len(first[name].data) <= 4 for name in same), same


def test_values_of_a_tensor_do_not_depend_on_the_rest_of_the_model(
    small_parent: Path, tmp_path: Path
) -> None:
    fewer = parents.write_parent(
        tmp_path / "fewer",
        changes={**parents.SMALL, "n_routed_experts": 3, "num_hash_layers": 0},
    )
    name = "layers.2.ffn.experts.1.w1.weight"
    assert parents.read_tensors(fewer)[name] == parents.read_tensors(small_parent)[name]


def test_the_same_call_again_finds_the_parent_done(tmp_path: Path) -> None:
    planned = plan_synthesis("demo", changes=parents.SMALL)
    write_synthesis(planned, tmp_path / "parent")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parent").iterdir()}
    assert write_synthesis(planned, tmp_path / "parent").already_complete
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "parent").iterdir()}


def test_another_parent_is_not_written_over_the_first(tmp_path: Path) -> None:
    parents.write_small_parent(tmp_path / "parent")
    before = sha256s(tmp_path / "parent")
    with pytest.raises(OutputError):
        parents.write_parent(tmp_path / "parent", changes=parents.SMALL, seed=1)
    assert sha256s(tmp_path / "parent") == before


def test_the_folder_says_that_it_is_synthetic(small_parent: Path) -> None:
    about = json.loads((small_parent / "v4surgery.json").read_text())
    assert about["synthetic"] is True
    assert (about["like"], about["seed"], about["sparse"]) == ("demo", 0, False)


@pytest.mark.parametrize(
    ("like", "num_files", "fmt", "has_optional"),
    [
        ("flash", 5 + 3, "FP4", False),
        ("flash-base", 5 + 3, "FP8_F32", True),
        ("pro-base", 5 + 3, "FP8_F32", True),
        ("flash-0731", 5 + 5, "FP4", False),
        ("pro-dspark", 5 + 5, "FP4", False),
    ],
)
def test_every_variant_is_written_at_reduced_depth_and_opened(
    tmp_path: Path, like: str, num_files: int, fmt: str, has_optional: bool
) -> None:
    out = parents.write_parent(tmp_path / like, like, layers=5, changes=REDUCED)
    assert len(list(out.glob("*.safetensors"))) == num_files
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="np") as opened:
            assert opened.metadata() is None
    with v4surgery.open(out) as parent:
        assert parent.tensors["layers.4.ffn.experts.7.w2"].fmt == fmt
        assert parent.tensors["layers.4.attn.wq_b"].fmt == ("FP8_F32" if has_optional else "FP8")
        assert ("mtp.0.head" in parent.tensors) is has_optional
        assert ("mtp.2.markov_head.markov_w1" in parent.tensors) is (num_files == 10)
        assert parent.config.num_hash_layers == 3
        assert list(parent.tensors) == [
            entry.stem for entry in Catalogue(parent.config, optional=has_optional).entries()
        ]


def test_fewer_layers_keep_ratios_hash_layers_and_drafters() -> None:
    config = plan_synthesis("flash-0731", layers=5, changes=dict(REDUCED)).config
    assert config.compress_ratios == (0, 0, 4, 128, 4, 0, 0, 0)
    assert config.dspark_target_layer_ids == (2, 3, 4)
    two = plan_synthesis("flash", layers=2, changes=dict(REDUCED)).config
    assert (two.num_hash_layers, two.compress_ratios) == (2, (0, 0, 0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"like": "flsh"}, ["unknown preset", "where: --like", "flsh", "flash-0731"]),
        ({"changes": {"hiden_size": 64}}, ["unknown config field", "where: --set", "hiden_size"]),
        ({"changes": {"num_drafters": 2}}, ["unknown config field", "num_drafters"]),
        ({"changes": {"to_dict": 2}}, ["unknown config field", "to_dict"]),
        ({"changes": {"extra": {}}}, ["unknown config field", "extra"]),
        ({"layers": 0}, ["fewer layers", "where: --layers", "value: 0", "1 to 12"]),
        ({"layers": 13}, ["fewer layers", "value: 13"]),
        ({"changes": {"hidden_size": 100}}, ["where: --set", "hidden_size 100", "multiple of 32"]),
        ({"changes": {"moe_intermediate_size": 16}}, ["moe_intermediate_size 16"]),
        ({"changes": {"hidden_size": "wide"}}, ["contradicts itself", "hidden_size is 'wide'"]),
        ({"changes": {"hidden_size": -32}}, ["contradicts itself", "hidden_size is -32"]),
        ({"changes": {"o_groups": 3}}, ["contradicts itself", "no multiple of o_groups 3"]),
        ({"changes": {"n_routed_experts": 2}}, ["num_experts_per_tok 4 exceeds"]),
        ({"changes": {"compress_ratios": 4}}, ["compress_ratios is 4", "list of integers"]),
        ({"changes": {"compress_ratios": [0, 4]}}, ["2 entries for 12 layers"]),
        ({"changes": {"rope_theta": float("nan")}}, ["rope_theta is nan"]),
        ({"changes": {"rope_scaling": {"factor": "x"}}}, ["rope_scaling.factor is"]),
        ({"changes": {"num_hidden_layers": 10**9}}, ["num_hidden_layers is 1000000000"]),
    ],
)
def test_synth_refuses(arguments: dict[str, Any], words: list[str]) -> None:
    begin = time.thread_time()
    with pytest.raises(UsageError) as caught:
        plan_synthesis(**{"like": "demo", **arguments})
    assert time.thread_time() - begin < 0.5
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nested_fields_are_set_as_the_published_config_writes_them() -> None:
    scaling = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 1024}
    config = plan_synthesis("demo", changes={"rope_scaling": scaling}).config
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.beta_fast) == (8, 32)
    assert config.to_dict()["rope_scaling"]["factor"] == 8


def test_demo_parent_is_built_in_under_five_seconds(tmp_path: Path) -> None:
    # Issue 2 asks for 5 s on 2 cores. It takes 0.5; a second try forgives a busy machine.
    seconds = []
    for attempt in range(2):
        begin = time.perf_counter()
        out = parents.write_parent(tmp_path / str(attempt))
        seconds.append(time.perf_counter() - begin)
        size = sum(path.stat().st_size for path in out.iterdir())
        assert 25_000_000 < size < 40_000_000
        if seconds[-1] < 5.0:
            break
    assert min(seconds) < 5.0, seconds
