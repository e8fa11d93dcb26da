"""What hostile people put on purpose into records, cards, indexes and traces; each by name."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import v4surgery as v4
from tests.cli.conftest import Run
from tests.support import parents
from v4surgery.errors import CatalogueError, CheckpointError, RecipeError
from v4surgery.slicers.lineage import describe_parent, front_matter
from v4surgery.slicers.provenance import read_recipe


@pytest.fixture
def parent(small_parent: Path, tmp_path: Path) -> Path:
    return parents.copy_checkpoint(small_parent, tmp_path / "parent")


@pytest.fixture(scope="module")
def _replica(small_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hostile") / "replica"
    recipe = v4.Recipe.model_validate({"name": "half", "keep": {"experts": 2, "mtp": "drop"}})
    with v4.open(small_parent) as opened:
        v4.slice(v4.plan(opened, recipe), out)
    return out


@pytest.fixture
def replica(_replica: Path, tmp_path: Path) -> Path:
    return parents.copy_checkpoint(_replica, tmp_path / "replica")


def test_name_that_stands_twice_in_an_index_is_refused(parent: Path) -> None:
    path = parent / parents.INDEX_FILE
    twice = path.read_text().replace('"weight_map": {', '"weight_map": {"norm.weight": "x", ', 1)
    assert json.loads(twice) == json.loads(path.read_text())  # a reader that takes the last one
    path.write_text(twice)
    with pytest.raises(CheckpointError, match="the index is malformed") as caught:
        v4.open(parent)
    assert "'norm.weight' stands twice" in str(caught.value)


def test_names_of_strangers_do_not_move_the_cursor(parent: Path) -> None:
    index = json.loads((parent / parents.INDEX_FILE).read_text())
    index["weight_map"]["\x1b[2J\r\0"] = next(iter(index["weight_map"].values()))
    (parent / parents.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        v4.open(parent)
    assert "\\x1b[2J\\r\\x00" in str(caught.value)
    assert all(line.isprintable() for line in str(caught.value).split("\n"))


def merge_bomb(levels: int) -> str:
    """YAML that a merging loader turns into 9 ** levels pairs."""
    lines = ["a0: &a0 {license: mit}"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{aliases}]}}")
    return "---\n" + "\n".join(lines) + "\nlicense: mit\n---\n"


def test_card_of_a_parent_cannot_exhaust_memory(parent: Path) -> None:
    (parent / "README.md").write_text(merge_bomb(9))  # 9 ** 8 pairs: gigabytes
    began = time.monotonic()
    with v4.open(parent) as opened:
        assert "license" not in describe_parent(opened)
    assert time.monotonic() - began < 5
    assert front_matter("---\nlicense: mit\n---\n") == {"license": "mit"}
    assert front_matter("---\nlicense: mit\nx: " + "a" * 64_000 + "\n---\n") == {}


RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "another block": ({"source": "layers.99."}, "the record of the replica does not fit"),
    "a unit that is not there": ({"kept": {"n_routed_experts": [0, 99]}}, "units of the parent"),
    "a negative unit": ({"kept": {"n_routed_experts": [0, -1]}}, "a list of {target, source"),
    "a huge unit": ({"kept": {"n_routed_experts": [0, 2**64]}}, "a list of {target, source"),
    "a dim that is none": (
        {"kept": {"n_routed_experts": [0, 1], "dim": [0]}},
        "does not fit its parent",
    ),
    "rows of unequal length": ({"kept": {"group_heads": [[0], [0, 1]]}}, "a list of {target"),
    "deep nesting": ({"kept": {"group_heads": [[[[[0]]]]]}}, ""),
}


@pytest.mark.parametrize("name", RECORDS)
def test_record_that_cannot_be_is_refused(
    name: str, replica: Path, small_parent: Path, v4: Run
) -> None:
    change, text = RECORDS[name]
    path = replica / "v4surgery.json"
    record = json.loads(path.read_text())
    record["selections"]["blocks"][0] |= change
    path.write_text(json.dumps(record))
    for verb in ("verify", "validate"):
        done = v4(verb, replica, "--parent", small_parent)
        assert done.code in (1, 3) and "unexpected" not in done.err and text in done.err, done


def test_recipe_of_a_replica_opens_no_other_file(replica: Path, tmp_path: Path) -> None:
    # A pipe that nobody writes to: opening it would wait for ever.
    os.mkfifo(tmp_path / "pipe.yaml")
    (replica / "recipe.yaml").write_text(f"extends: {tmp_path / 'pipe.yaml'}\nname: x\n")
    with v4.open(replica) as opened:
        with pytest.raises(RecipeError, match="a recipe that was resolved extends nothing"):
            read_recipe(opened)
        (replica / "recipe.yaml").unlink()


def test_recipe_of_a_replica_that_is_no_text_is_refused(replica: Path) -> None:
    (replica / "recipe.yaml").write_bytes(b"name: \xff\n")
    with v4.open(replica) as opened, pytest.raises(CheckpointError, match="not UTF-8 text"):
        read_recipe(opened)


TRACES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no object": ([], {}, "of which model"),
    "prompts of text": ({"model": {}, "prompts": ["abc"]}, {}, "prompts are lists of token ids"),
    "path for a name": ({"model": {}, "prompts": []}, {"../../x": 1}, "'../../x' is not"),
    "no tap": ({"model": {}, "prompts": []}, {"0/layers.x.in": 1}, "is not <prompt>/<block><tap>"),
}


@pytest.mark.parametrize("name", TRACES)
def test_trace_that_is_none_is_refused(name: str, tmp_path: Path, v4: Run) -> None:
    about, tensors, text = TRACES[name]
    arrays = {key: np.ones(size, np.float32) for key, size in tensors.items()}
    path = tmp_path / "trace"
    save_file(arrays, path, {"v4surgery.trace": json.dumps(about)})
    done = v4("diff", path, path)
    assert done.code == 1 and "error: not a trace file" in done.err and text in done.err


def test_shapes_that_only_claim_to_be_large_allocate_nothing(parent: Path, tmp_path: Path) -> None:
    """2**40 rows of no columns take no byte of the file, and none of memory."""
    huge = parents.RawTensor("BF16", (2**40, 0), b"")
    copy = parents.replace_tensor(parent, tmp_path / "huge", "norm.weight", huge)
    with pytest.raises(CatalogueError, match="wrong shape or storage"):
        v4.open(copy)
