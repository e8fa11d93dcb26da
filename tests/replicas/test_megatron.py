"""Megatron-Bridge finds every tensor of a replica, because replicas keep published names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import v4surgery as v4
from tests.replicas.megatron_names import reads
from tests.support.parents import read_tensors, write_parent


def unread(folder: Path) -> list[str]:
    """Tensors that the mapping does not read, with the counts that it takes from config.json."""
    config = json.loads((folder / "config.json").read_text())
    layers, drafters = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    return sorted(name for name in read_tensors(folder) if not reads(name, layers, drafters))


@pytest.mark.parametrize("mtp", ["keep", "drop"])
@pytest.mark.parametrize("dtype", ["bf16", "native"])
def test_mapping_finds_every_tensor_of_a_replica(
    dtype: str, mtp: str, demo_parent: Path, tmp_path: Path
) -> None:
    overrides = {
        "bf16": ["keep.mtp=" + mtp],
        "native": ["keep.mtp=" + mtp, "keep.experts.keep=8"],
    }[dtype]
    with v4.open(demo_parent) as parent:
        recipe = {"bf16": "demo", "native": "experts32"}[dtype]
        v4.slice(v4.plan(parent, recipe, overrides), tmp_path / "replica")
    assert unread(tmp_path / "replica") == []
    assert len(read_tensors(tmp_path / "replica")) > 200


def test_mapping_has_no_place_for_dspark_nor_for_a_drafters_own_embedding(tmp_path: Path) -> None:
    """What `inspect --compat` says of DSpark; Base's copies of embedding and head are unread."""
    few = {"n_routed_experts": 8, "vocab_size": 64, "hidden_size": 128, "dspark_markov_rank": 8}
    few |= {"moe_intermediate_size": 64, "dspark_noise_token_id": 7, "num_attention_heads": 8}
    few |= {"head_dim": 64, "q_lora_rank": 64, "o_lora_rank": 64}
    dspark = write_parent(tmp_path / "dspark", "flash-0731", layers=3, changes=few)
    left = unread(dspark)
    assert "mtp.0.main_proj.weight" in left and "mtp.2.confidence_head.proj.weight" in left
    few = {k: v for k, v in few.items() if not k.startswith("dspark")}
    base = write_parent(tmp_path / "base", "flash-base", layers=3, changes=few)
    assert unread(base) == ["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"]
