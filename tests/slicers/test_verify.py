"""What verify sees beside the bytes of the tensors: headers, config, files and the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import v4surgery
from tests.slicers.conftest import Cut, Parent
from tests.support import parents

NORM = "layers.0.attn_norm.weight"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def copy(random_cut: Cut, tmp_path: Path) -> Path:
    return parents.copy_checkpoint(random_cut.path, tmp_path / "copy")


def problems(path: Path, parent: Parent, **options: Any) -> tuple[str, ...]:
    return v4surgery.verify(path, parent.opened, **options).problems


def edit_json(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("sample", [None, 1])
def test_tensor_stored_in_another_dtype_is_named_whatever_the_sample(
    odd_parent: Parent, copy: Path, sample: int | None
) -> None:
    shards = parents.read_shards(copy)
    shard = parents.shard_of(shards, NORM)
    values = np.frombuffer(shard[NORM].data, ml_dtypes.bfloat16).astype(np.float32)
    shard[NORM] = parents.RawTensor("F32", shard[NORM].shape, values.tobytes())
    parents.write_checkpoint(copy, (copy / "config.json").read_text(), shards)
    assert problems(copy, odd_parent, sample=sample) == (
        f"{NORM}: F32 [24], and must be BF16 [24]",
    )


def test_safetensors_file_beside_the_index_is_named(odd_parent: Parent, copy: Path) -> None:
    (copy / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    assert problems(copy, odd_parent) == (
        "model-00009-of-00009.safetensors: no tensor of the index is in this file",
    )


def test_replica_repacked_into_other_shards_still_verifies(odd_parent: Parent, copy: Path) -> None:
    shards = parents.read_shards(copy)
    for path in copy.glob("*.safetensors"):
        path.unlink()
    tensors = {name: t for shard in shards.values() for name, t in shard.items()}
    names = sorted(tensors)
    halves = {
        f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]}
        for i in range(2)
    }
    parents.write_checkpoint(copy, (copy / "config.json").read_text(), halves)
    assert problems(copy, odd_parent) == ()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda r: r["tensors"][NORM].update(how="copy"), f"{NORM} does not come about"),
        (lambda r: r["tensors"][NORM].update({"from": "norm"}), f"{NORM} does not come about"),
        (lambda r: r["tensors"][NORM]["range"].reverse(), f"{NORM} does not come about"),
        (lambda r: r["parameters"].update(total=7), "parameters is not what the plan makes it"),
        (lambda r: r.update(recipe="other"), "recipe is not what the plan makes it"),
        (lambda r: r.update(plan_hash="0" * 64), "the plan's hash is not the recorded one"),
    ],
)
def test_record_that_was_edited_is_seen(
    edit: Edit, problem: str, odd_parent: Parent, copy: Path
) -> None:
    edit_json(copy / "v4surgery.json", edit)
    (found,) = problems(copy, odd_parent, sample=1)
    assert found.startswith(f"v4surgery.json: {problem}")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda c: c.update(index_topk=1), "config.json: index_topk is 1, and must be 32"),
        (lambda c: c.update(added=1), "config.json: added is 1, and must be None"),
        (lambda c: c.pop("layer_types"), "config.json: layer_types is None, and must be ["),
    ],
)
def test_config_is_held_against_the_plan_both_ways(
    edit: Edit, problem: str, odd_parent: Parent, copy: Path
) -> None:
    edit_json(copy / "config.json", edit)
    (found,) = problems(copy, odd_parent, sample=1)
    assert found.startswith(problem)


def test_sample_reads_no_more_than_its_chunks_and_finds_what_is_in_them(
    odd_parent: Parent, copy: Path
) -> None:
    """Every tensor of this replica is one chunk: a sample of all but one misses at most one."""
    shards = parents.read_shards(copy)
    for shard in shards.values():
        for name, tensor in shard.items():
            flipped = bytes([tensor.data[0] ^ 1]) + tensor.data[1:]
            shard[name] = tensor._replace(data=flipped)
    for file, tensors in shards.items():
        parents.write_shard(copy / file, tensors)
    seen: list[int] = []
    checked = v4surgery.verify(copy, odd_parent.opened, sample=5, progress=seen.append)
    assert checked.sampled and checked.bytes_compared == sum(seen)
    assert checked.tensors == len(checked.problems) == 5
