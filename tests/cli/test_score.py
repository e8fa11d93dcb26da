"""``v4surgery score``, and ``--scores`` of plan and slice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from tests.cli.conftest import Run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_score_then_plan_then_slice_then_verify(
    v4: Run, small_parent: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [1, 2, 3, 4, 5, 6]}\n{"ids": [7, 8, 9]}\n')
    scores = tmp_path / "scores.safetensors"
    done = v4("score", small_parent, "--prompts", prompts, "--out", scores, "--tokens", 5)
    assert (done.code, done.err) == (0, "")
    assert "scores of 8 tokens in 2 prompt(s)" in done.out
    assert "reference operations ran" in done.out
    assert f"next: v4surgery plan --recipe mini3b --parent {small_parent} --scores" in done.out
    recipe = tmp_path / "cut.yaml"
    recipe.write_text(
        "name: cut\nkeep:\n  experts: {keep: 2, by: [scores, gate]}\n"
        "  hidden_size: {keep: 64, by: [scores, even]}\nstore: {dtype: bf16}\n"
    )
    base = ("--recipe", recipe, "--parent", small_parent)
    cheap = json.loads(v4("plan", *base, "--json").out)
    planned = json.loads(v4("plan", *base, "--scores", scores, "--json").out)
    assert planned["plan_hash"] != cheap["plan_hash"]
    assert any("energy chose hidden_size; reap chose experts" in n for n in planned["notes"])
    replica = tmp_path / "replica"
    cut = v4("slice", *base, "--scores", scores, "--out", replica, "--json", "--quiet")
    assert cut.code == 0
    assert json.loads(cut.out)["plan_hash"] == planned["plan_hash"]
    scores.unlink()
    assert v4("verify", replica, "--parent", small_parent).code == 0


def test_score_reports_json_and_only_some_axes(v4: Run, small_parent: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    options = ("--ids", "1,2,3", "--axes", "layers, hidden_size", "--second-moments", "hidden_size")
    done = v4("score", small_parent, "--out", out, "--json", "--mode", "official", *options)
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["axes"] == ["layers", "hidden_size"]
    assert (report["num_tokens"], report["num_prompts"], report["num_scores"]) == (3, 1, 3)
    assert len(report["timings"]) == 4  # no drafter: nothing of it was asked for
    assert sorted(load_file(out)) == [
        "energy/hidden_size/model",
        "influence/layers/model",
        "second_moment/hidden_size/model",
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--ids", "1", "--axes", "expert"), "did you mean experts?"),
        (("--ids", "1", "--axes", "?"), "one of: layers, hidden_size, hc_mult"),
        (("--ids", "1", "--axes", ""), "nothing to score"),
        (("--ids", "1", "--second-moments", "layers"), "one of: hidden_size, q_lora_rank"),
        (("--ids", "1", "--weight-memory", "much"), "not a size"),
        (("--ids", "99"), "out of the vocabulary"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    v4: Run, small_parent: Path, tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    done = v4("score", small_parent, "--out", tmp_path / "s", *options)
    assert done.code == 2
    assert text in done.err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_scores_file_is_kept(v4: Run, small_parent: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    out.write_bytes((small_parent / "config.json").read_bytes())
    done = v4("score", small_parent, "--ids", "1", "--out", out)
    assert done.code == 1
    assert "the output exists, and is no scores file" in done.err
    assert out.read_bytes() == (small_parent / "config.json").read_bytes()


def test_a_plan_by_scores_of_another_parent_fails(
    v4: Run, small_parent: Path, demo_parent: Path, tmp_path: Path
) -> None:
    v4("score", small_parent, "--ids", "1", "--axes", "experts", "--out", tmp_path / "s")
    done = v4("plan", "-r", "demo", "--parent", demo_parent, "--scores", tmp_path / "s")
    assert done.code == 1
    assert "the scores are of another parent" in done.err
