"""The three grades together: what fails a replica, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import v4surgery
from tests.support import parents
from tests.validation.masked_support import TINY, Case, cut, prompts
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError
from v4surgery.recipes.schema import Validate
from v4surgery.validation.default_prompts import default_prompts
from v4surgery.validation.thresholds import AT_LEAST, AT_MOST, MEANINGS
from v4surgery.validation.verdict import Validation

IDS = prompts(12, (27,))


def validated(path: Path, parent: Checkpoint, **options: Any) -> Validation:
    return v4surgery.validate(path, parent, IDS, workers=1, **options)


def corrupt(path: Path, name: str, byte: int = -1) -> None:
    """Change one byte of a stored tensor."""
    shards = parents.read_shards(path)
    shard = parents.shard_of(shards, name)
    data = bytearray(shard[name].data)
    data[byte] ^= 0x10
    shard[name] = shard[name]._replace(data=bytes(data))
    parents.write_checkpoint(path, (path / "config.json").read_text(), shards)


@pytest.fixture
def copy(tiny_case: Case, tmp_path: Path) -> Path:
    return parents.copy_checkpoint(tiny_case.replica, tmp_path / "copy")


def test_a_faithful_replica_passes_all_grades(tiny_case: Case) -> None:
    steps: list[str] = []
    found = validated(tiny_case.replica, tiny_case.parent, masked=True, progress=steps.append)
    assert found.passed and found.verdict == "pass" and found.failures == ()
    assert found.grade == "bytes, function and behaviour (reported: no thresholds)"
    assert found.masked is not None and found.masked.passed
    assert found.numbers["masked_error"] < 1e-5
    assert set(found.numbers) == set(MEANINGS)
    assert steps[0] == "bytes" and steps[-1] == "layers.4."


def test_the_report_of_an_identity_is_exact(tiny: Checkpoint, tmp_path: Path) -> None:
    found = validated(cut(tiny, tmp_path / "r", {}), tiny)
    assert found.numbers["logit_kl"] == found.numbers["taught_error"] == 0
    assert found.numbers["relative_error"] == 0
    assert found.numbers["perplexity_ratio"] == found.numbers["router_agreement"] == 1
    assert found.grade == "bytes and behaviour (reported: no thresholds)"


@pytest.mark.parametrize(
    ("name", "layer", "submodule"),
    [
        ("layers.2.attn.wq_b.weight", "layers.2", "attn.wq_b"),
        ("layers.1.attn.indexer.weights_proj.weight", "layers.1", "attn.indexer.weights_proj"),
        ("layers.3.ffn.experts.1.w2.weight", "layers.3", "ffn.experts.1.w2"),
        ("layers.0.hc_attn_fn", "layers.0", "hc_attn_fn"),
        ("norm.weight", "model", "norm"),
    ],
)
def test_one_corrupted_tensor_fails_and_is_named_by_layer_and_submodule(
    copy: Path, tiny_case: Case, name: str, layer: str, submodule: str
) -> None:
    corrupt(copy, name)
    found = validated(copy, tiny_case.parent)
    assert found.verdict == "fail"
    (broken,) = found.broken
    assert (broken.name, broken.layer, broken.submodule) == (name, layer, submodule)
    assert found.failures[0].startswith(f"{layer}, {submodule}: {name}: ")
    assert found.behaviour is not None


def test_a_corrupted_hash_table_is_named_and_not_run(copy: Path, tiny_case: Case) -> None:
    corrupt(copy, "layers.0.ffn.gate.tid2eid")
    found = validated(copy, tiny_case.parent, masked=True)
    assert found.verdict == "fail" and found.behaviour is None and found.masked is None
    assert "layers.0.ffn.gate.tid2eid may name experts" in str(found.not_run)
    assert found.broken[0].submodule == "ffn.gate.tid2eid"
    assert found.grade == "bytes" and found.worst_layers == ()
    json.dumps(found.to_json(), allow_nan=False)


def test_a_weight_that_is_no_number_fails_the_behaviour_too(copy: Path, tiny_case: Case) -> None:
    shards = parents.read_shards(copy)
    shard = parents.shard_of(shards, "layers.1.attn_norm.weight")
    shape = shard["layers.1.attn_norm.weight"].shape
    nan = np.full(shape, 0x7FC0, np.uint16).tobytes()
    shard["layers.1.attn_norm.weight"] = parents.RawTensor("BF16", shape, nan)
    parents.write_checkpoint(copy, (copy / "config.json").read_text(), shards)
    found = validated(copy, tiny_case.parent)
    assert any("layers.1.attn.in: the error is no number" in line for line in found.failures)
    assert found.worst_layers[0].layer == "layers.1"
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert "logit_kl" not in data["summary"] and data["worst_layers"][0]["taught_error"] is None


@pytest.mark.parametrize(
    ("thresholds", "failed"),
    [
        ({"logit_kl": 1e9, "top1_agreement": 0.0, "relative_error": 1e9}, []),
        ({"logit_kl": 0.0, "taught_error": 1e9}, ["logit_kl"]),
        ({"top5_agreement": 1.0, "perplexity_ratio": 0.0}, ["perplexity_ratio", "top5_agreement"]),
        ({"taught_error": 1e-9, "relative_error": 1e-9}, ["relative_error", "taught_error"]),
        ({"router_agreement": 1.0}, ["router_agreement"]),
    ],
)
def test_thresholds_of_the_recipe_decide(
    tiny: Checkpoint, tmp_path: Path, thresholds: dict[str, float], failed: list[str]
) -> None:
    keep = {"hidden_size": 20, "layers": {"ids": [0, 3]}}
    found = validated(cut(tiny, tmp_path / "r", keep, validate=thresholds), tiny)
    assert [check.name for check in found.checks if not check.passed] == failed
    assert found.passed is not bool(failed)
    assert len(found.failures) == len(failed)
    assert found.grade == "bytes and behaviour"


def test_every_threshold_of_the_schema_is_checked() -> None:
    assert {*AT_MOST, *AT_LEAST} == set(Validate.model_fields)


def test_worst_layers_are_sorted_by_teacher_forced_error(tiny_case: Case) -> None:
    found = validated(tiny_case.replica, tiny_case.parent)
    errors = [layer.taught_error for layer in found.worst_layers]
    assert len(errors) == 3 and errors == sorted(errors, reverse=True)
    assert errors[0] == found.numbers["taught_error"]


def test_json_has_what_the_card_reads(tiny_case: Case) -> None:
    data = json.loads(json.dumps(validated(tiny_case.replica, tiny_case.parent).to_json()))
    assert data["verdict"] == "pass" and isinstance(data["grade"], str)
    assert all(isinstance(value, float) for value in data["summary"].values())
    assert data["assignment"]["replica"][2] == {"ratio": 6, "hash": False, "source": 2}
    assert sum(data["transforms"].values()) == data["verification"]["tensors"]


def test_another_parent_is_refused(tiny_case: Case, tmp_path: Path) -> None:
    other = parents.write_parent(tmp_path / "p", changes={**TINY, "vocab_size": 22})
    with v4surgery.open(other) as parent, pytest.raises(UsageError, match="not the parent"):
        validated(tiny_case.replica, parent)


@pytest.mark.parametrize("ids", [[], [[]], [[99]]])
def test_prompts_that_cannot_be_run_are_refused(tiny_case: Case, ids: list[list[int]]) -> None:
    with pytest.raises(UsageError):
        v4surgery.validate(tiny_case.replica, tiny_case.parent, ids)


def test_default_prompts_are_ids_of_the_vocabulary_where_there_is_no_tokenizer(
    tiny_case: Case,
) -> None:
    with v4surgery.open(tiny_case.replica) as replica:
        ids = default_prompts(replica)
        assert ids == default_prompts(replica)
        assert [len(row) for row in ids] == [144, 80, 24]
        assert all(0 <= token < replica.config.vocab_size for row in ids for token in row)
