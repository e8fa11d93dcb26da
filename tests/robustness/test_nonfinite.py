"""NaN among the weights: stopped, told and counted, or only counted, as the policy says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.support import parents

NAME = "layers.1.attn.wq_a"
WARNING = f"warning: {NAME}: "


@pytest.fixture(scope="module")
def poisoned(small_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with one FP8 code that is NaN (0x7F in E4M3)."""

    def edit(shards: parents.Shards) -> None:
        shard = parents.shard_of(shards, f"{NAME}.weight")
        tensor = shard[f"{NAME}.weight"]
        shard[f"{NAME}.weight"] = tensor._replace(data=b"\x7f" + tensor.data[1:])

    return parents.edit_checkpoint(small_parent, tmp_path_factory.mktemp("nan") / "parent", edit)


def commands(parent: Path, out: Path, policy: str) -> list[list[object]]:
    recipe = out.parent / f"{policy}.yaml"
    recipe.write_text(f"name: all\nstore: {{dtype: bf16, nonfinite: {policy}}}\n")
    return [
        ["slice", "-r", recipe, "-p", parent, "-o", out / "slice"],
        ["convert", parent, out / "convert", "--to", "bf16", "--nonfinite", policy],
    ]


def test_error_stops_and_names_the_tensor(poisoned: Path, tmp_path: Path, v4: Run) -> None:
    for args in commands(poisoned, tmp_path / "out", "error"):
        done = v4(*args)
        assert done.code == 1
        assert done.err.startswith("error: the parent has weights that are NaN or infinite\n")
        assert f"where: {NAME}\n" in done.err


@pytest.mark.parametrize("policy", ["warn", "keep"])
def test_warn_says_what_keep_only_counts(
    policy: str, poisoned: Path, tmp_path: Path, v4: Run
) -> None:
    for args in commands(poisoned, tmp_path / "out", policy):
        done = v4(*args)
        assert done.code == 0
        assert (WARNING in done.err) == (policy == "warn")
        again = v4(*args, "--json")
        assert json.loads(again.out)["report"]["nonfinite"] == {NAME: 1}
    record = json.loads((tmp_path / "out" / "slice" / "v4surgery.json").read_text())
    assert record["report"]["nonfinite"] == {NAME: 1}


def test_copied_bytes_are_not_looked_at(poisoned: Path, tmp_path: Path, v4: Run) -> None:
    recipe = tmp_path / "native.yaml"
    recipe.write_text("name: all\nstore: {dtype: native}\n")
    done = v4("slice", "-r", recipe, "-p", poisoned, "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    copied = parents.read_tensors(tmp_path / "out")[f"{NAME}.weight"]
    assert copied == parents.read_tensors(poisoned)[f"{NAME}.weight"]
