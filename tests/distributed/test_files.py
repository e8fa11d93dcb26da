"""Files that several ranks write are those of one process, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conversion.conftest import write_wide
from tests.distributed.conftest import VICTIM, Torchrun, alone, contents

BETWEEN = (str(VICTIM),)
METHODS = """
name: methods
keep:
  hidden_size: {keep: 96, method: pca}
  q_lora_rank: {keep: 48, method: pca}
  o_lora_rank: {keep: 48, method: svd}
  experts: {keep: 3, by: scores}
  mtp: drop
store: {dtype: f32, max_shard_size: 200kB}
"""


def test_a_slice_has_the_same_bytes(
    torchrun: Torchrun, parent: Path, recipe: Path, replica: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = torchrun(3, "slice", "--recipe", recipe, "--parent", parent, "--out", out)
    assert done.code == 0, done.err
    assert contents(out) == contents(replica)
    assert len([name for name in contents(out) if name.endswith(".safetensors")]) > 6
    assert done.out.count("wrote") == 1


def test_a_killed_rank_ends_all_and_another_number_of_ranks_goes_on(
    torchrun: Torchrun, parent: Path, recipe: Path, replica: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("slice", "--recipe", recipe, "--parent", parent, "--out", out)
    lost = torchrun(3, *arguments, program=BETWEEN, VICTIM="1:kill:chunk:20")
    assert lost.code == 1
    assert lost.seconds < 30
    assert lost.err.count("error: a process of this run was lost") == 1
    assert "the same command goes on" in lost.err
    assert not (out / "model.safetensors.index.json").exists()
    assert (out / ".v4surgery" / "journal-1.jsonl").stat().st_size > 0
    done = torchrun(2, *arguments)
    assert done.code == 0, done.err
    assert "wrote the other" in " ".join(done.out.split())
    assert contents(out) == contents(replica)


def test_one_process_goes_on_where_ranks_had_to_stop(
    torchrun: Torchrun, parent: Path, recipe: Path, replica: Path, tmp_path: Path
) -> None:
    """A full disk on one rank: its own error, once."""
    out = tmp_path / "out"
    arguments = ("slice", "--recipe", recipe, "--parent", parent, "--out", out)
    full = torchrun(2, *arguments, program=BETWEEN, VICTIM="1:full:chunk:30")
    assert full.code == 1
    assert full.err.count("error:") == 1
    assert "writing failed: No space left on device" in full.err
    alone(*arguments, "-q")
    assert contents(out) == contents(replica)


def test_ranks_write_into_files_that_are_fewer(torchrun: Torchrun, tmp_path: Path) -> None:
    """Every tensor goes into both official shards; a killed run is finished by more ranks."""
    parent = write_wide(tmp_path / "parent", "flash")
    arguments = ("convert", parent, tmp_path / "many", "--to", "official", "--tp", "2", "-q")
    lost = torchrun(2, *arguments, program=BETWEEN, VICTIM="1:kill:chunk:40")
    assert lost.code == 1
    done = torchrun(3, *arguments)
    assert done.code == 0, done.err
    alone("convert", parent, tmp_path / "one", "--to", "official", "--tp", "2", "-q")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_bases_and_scores_give_the_same_bytes(
    torchrun: Torchrun, parent: Path, tmp_path: Path
) -> None:
    """Rotations of weights and of second moments, factors, experts by score, all in float32."""
    recipe, scores = tmp_path / "methods.yaml", tmp_path / "scores"
    recipe.write_text(METHODS)
    alone("score", parent, "--ids", "1,2,3,4,5,6,7,8", "--axes", "experts", "--second-moments",
          "q_lora_rank", "--out", scores, "-q")  # fmt: skip
    arguments = ("slice", "--recipe", recipe, "--parent", parent, "--scores", scores, "--out")
    alone(*arguments, tmp_path / "one", "-q")
    out = tmp_path / "many"
    lost = torchrun(2, *arguments, out, program=BETWEEN, VICTIM="1:kill:chunk:30")
    assert lost.code == 1
    assert lost.err.count("error: a process of this run was lost") == 1
    assert not (out / "v4surgery.json").exists()
    done = torchrun(3, *arguments, out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["chunks_reused"] > 0
    assert contents(out) == contents(tmp_path / "one")
    record = json.loads((out / "v4surgery.json").read_text())
    made_of = {
        key.partition("/")[0]: item["moments"] for key, item in record["bases"]["of"].items()
    }
    assert [key for key, moments in made_of.items() if moments] == ["q_lora_rank"]
    assert made_of.keys() == {"hidden_size", "q_lora_rank", "o_lora_rank"}


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_conversion_has_the_same_bytes(torchrun: Torchrun, tmp_path: Path, to: str) -> None:
    parent = write_wide(tmp_path / "parent", "flash")
    alone("convert", parent, tmp_path / "one", "--to", to, "-q")
    done = torchrun(2, "convert", parent, tmp_path / "two", "--to", to, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["to"] == to  # one document
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
