"""A forward on several ranks is the one of one process, but for the order of a sum.

In mode exact everything is float32. Experts are added by rank instead of in ascending order: K + 1
numbers and two partial sums, so K + 3 roundings of 2^-24 a layer, L layers; each error goes on
through blocks whose sums may enlarge it, by far less than 8 times. Relative to the norm:
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import PER_TOKEN, Torchrun, alone

LAYERS = 4
TOLERANCE = 8 * LAYERS * (PER_TOKEN + 3) * 2**-24
# The smallest scores are differences of nearly equal numbers (1 - cos): a digit more.
SCORES = 10 * TOLERANCE
PROMPTS = [list(range(40)), [5], [7, 7, 7]]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


def write_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in PROMPTS))
    return path


def require_equal(one: Path, many: Path, tolerance: float = TOLERANCE) -> None:
    """Same names; integers equal, numbers within rounding."""
    expected, actual = load_file(one), load_file(many)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(actual[name], value), name
        else:
            error = (actual[name] - value).norm() / value.norm().clamp_min(1e-30)
            assert error <= tolerance, (name, float(error))


def test_a_trace_is_equal_and_no_byte_is_read_twice(
    torchrun: Torchrun,
    parent: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three ranks, seven experts, and a prompt of one token, which leaves ranks without any."""
    one, three = tmp_path / "one", tmp_path / "three"
    arguments = ("trace", parent, "--prompts", prompts, "--taps", "all", "--json")
    alone(*arguments, "--out", one)
    by_one = json.loads(capsys.readouterr().out)
    done = torchrun(3, *arguments, "--out", three)
    assert done.code == 0, done.err
    assert done.err == ""
    require_equal(one, three)
    by_three = json.loads(done.out)  # one rank speaks, and says one thing
    assert by_three["bytes_read"] == by_one["bytes_read"] > 1_000_000
    assert by_three["num_tokens"] == sum(map(len, PROMPTS))
    own = sum(timing["bytes_read"] for timing in by_three["timings"])
    assert own < 0.5 * sum(timing["bytes_read"] for timing in by_one["timings"])


def test_a_rank_may_have_no_token_and_no_memory(
    torchrun: Torchrun, parent: Path, tmp_path: Path
) -> None:
    """One token, whose two experts are with two of three ranks; experts are read when chosen."""
    one, three = tmp_path / "one", tmp_path / "three"
    tight = ("--weight-memory", "1", "--activations", "disk", "-q")
    arguments = ("trace", parent, "--ids", "5", "--taps", "all", *tight)
    alone(*arguments, "--out", one)
    done = torchrun(3, *arguments, "--out", three)
    assert done.code == 0, done.err
    require_equal(one, three)


def test_scores_are_equal(torchrun: Torchrun, parent: Path, prompts: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ("score", parent, "--prompts", prompts, "--second-moments", "hidden_size,heads")
    alone(*arguments, "--out", one)
    done = torchrun(2, *arguments, "--out", two)
    assert done.code == 0, done.err
    require_equal(one, two, SCORES)


def test_a_validation_has_the_same_numbers(
    torchrun: Torchrun, parent: Path, replica: Path, prompts: Path, tmp_path: Path
) -> None:
    """The replica has two experts for three ranks: one of them has none."""
    arguments = ("validate", replica, "--parent", parent, "--prompts", prompts, "--report")
    alone(*arguments, tmp_path / "one")
    done = torchrun(3, *arguments, tmp_path / "three")
    assert done.code == 0, done.err
    reports = [json.loads((tmp_path / n / "validation.json").read_text()) for n in ("one", "three")]
    one, three = (report["summary"] for report in reports)
    assert one.keys() == three.keys()
    assert one["tensors_compared"] == three["tensors_compared"] > 100
    for name, value in one.items():
        # Numbers are sums over logits and activations that differ by the tolerance.
        assert three[name] == pytest.approx(value, rel=100 * TOLERANCE), name
    assert done.out.count("bytes and behaviour") == 1
