"""``v4surgery validate`` and ``v4surgery diff`` as commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from tests.support import parents
from tests.validation.masked_support import KEEP, TINY, cut
from v4surgery.checkpoint.reader import open_checkpoint

IDS = '{"ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}\n'


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations are tiny: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent and a replica of it."""
    root = tmp_path_factory.mktemp("validate")
    parent = parents.write_parent(root / "parent", changes=TINY)
    with open_checkpoint(parent) as opened:
        return parent, cut(opened, root / "replica", KEEP)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(IDS)
    return path


def test_a_faithful_replica_passes_and_the_worst_layers_are_printed(
    v4: Run, folders: tuple[Path, Path], prompts: Path
) -> None:
    parent, replica = folders
    done = v4("validate", replica, "--parent", parent, "--prompts", prompts, "--masked")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    assert "worst layers, teacher-forced" in text and "masked parent: passed" in text
    assert "pass: replica against parent, bytes, function and behaviour" in text
    assert "9 tokens in 1 prompt(s)" in text and "reference operations in float32 on cpu" in text
    assert sum(line.startswith("layers.") for line in done.out.splitlines()) == 3


def test_it_works_without_prompts_and_json_is_the_report(
    v4: Run, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    parent, replica = folders
    out = tmp_path / "report"
    done = v4(
        "validate", replica, "-p", parent, "--tokens", 8, "--sample", 3, "--report", out, "--json"
    )
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert data["verdict"] == "pass" and data["setting"]["num_tokens"] == 24
    assert data["verification"]["sampled"] is True
    assert json.loads((out / "validation.json").read_text()) == data
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert {path.name for path in out.iterdir()} == {"validation.json", "report.html"}


def test_a_corrupted_tensor_fails_with_exit_code_3_and_names_layer_and_submodule(
    v4: Run, folders: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    parent, replica = folders
    copy = parents.copy_checkpoint(replica, tmp_path / "copy")
    name = "layers.2.attn.wo_b.weight"
    shards = parents.read_shards(copy)
    shard = parents.shard_of(shards, name)
    data = bytearray(shard[name].data)
    data[7] ^= 0x40
    shard[name] = shard[name]._replace(data=bytes(data))
    parents.write_checkpoint(copy, (copy / "config.json").read_text(), shards)
    out = tmp_path / "report"
    done = v4("validate", copy, "-p", parent, "--prompts", prompts, "--report", out)
    assert done.code == 3
    assert "error: copy fails the validation against parent" in done.err
    assert "where: layers.2, attn.wo_b" in done.err and name in done.err
    assert "next: slice it again" in done.err
    assert json.loads((out / "validation.json").read_text())["verdict"] == "fail"


def test_a_missed_threshold_is_exit_code_3(
    v4: Run, folders: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    parent, _ = folders
    with open_checkpoint(parent) as opened:
        strict = cut(opened, tmp_path / "r", KEEP, validate={"taught_error": 1e-6})
    done = v4("validate", strict, "-p", parent, "--prompts", prompts)
    assert done.code == 3
    assert "taught_error is" in done.err and "at most 1e-06" in done.err
    assert "next: see where, with --report DIR" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--mode", "wrong"], 2, "unknown numerics mode"),
        (["--device", "moon"], 2, "no such device"),
        (["--implementation", "magic"], 2, "unknown implementation"),
        (["--prompts", "nowhere.txt"], 2, "cannot be read"),
        (["--weight-memory", "much"], 2, "not a size"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    v4: Run, folders: tuple[Path, Path], arguments: list[str], code: int, text: str
) -> None:
    parent, replica = folders
    done = v4("validate", replica, "-p", parent, *arguments)
    assert done.code == code and text in done.err


def test_a_folder_that_is_no_replica_is_refused(v4: Run, folders: tuple[Path, Path]) -> None:
    done = v4("validate", folders[0], "-p", folders[0])
    assert done.code == 1 and "not a replica" in done.err


def test_diff_of_replica_and_parent_names_the_first_divergence(
    v4: Run, folders: tuple[Path, Path], prompts: Path
) -> None:
    parent, replica = folders
    done = v4("diff", replica, parent, "--prompts", prompts, "--taps", "embed,out")
    assert (done.code, done.err) == (0, "")
    assert "first divergence above 1e-05: layers.0.out" in done.out
    assert "places that only one has: 0 of A, 1 of B" in done.out
    done = v4("diff", replica, parent, "--prompts", prompts, "--taps", "embed,out", "--json")
    data = json.loads(done.out)
    assert data["first_divergence"]["layer"] == "layers.0."
    assert [row["tap"] for row in data["rows"]] == ["embed", *["out"] * 4]


def test_diff_of_a_model_and_its_trace_finds_nothing(
    v4: Run, folders: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    parent, _ = folders
    trace = tmp_path / "t.safetensors"
    taken = v4("trace", parent, "--prompts", prompts, "--out", trace, "--taps", "all")
    assert taken.code == 0, taken.err
    done = v4("diff", trace, parent)
    assert (done.code, done.err) == (0, "")
    assert "no divergence above 1e-05" in done.out and "only one has" not in done.out
    refused = v4("diff", trace, parent, "--prompts", prompts)
    assert refused.code == 2 and "a trace brings its own prompts" in refused.err
