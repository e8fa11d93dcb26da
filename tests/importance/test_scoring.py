"""How scores are gathered: sums that merge, whatever the budgets; only what was asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import v4surgery as v4
from tests.importance.conftest import Scored
from tests.support import parents
from v4surgery.errors import OutputError, UsageError
from v4surgery.importance.names import AXES, MOMENTS
from v4surgery.importance.probes import indexer, probe
from v4surgery.importance.score import score_parent
from v4surgery.importance.scorer import Scorer
from v4surgery.importance.totals import Totals
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer, StreamOptions

TIGHT = StreamOptions(weight_bytes=1, activations="disk", workers=2)


def totals_of(scored: Scored, prompts: Sequence[Sequence[int]]) -> Totals:
    """All sums of one run: those of the blocks and those of the model."""
    everything = Totals()
    with Streamer(scored.parent, Numerics()) as streamer:
        scorer = Scorer(
            scored.parent.config,
            AXES,
            tuple(MOMENTS),
            len(prompts),
            streamer.load_collapse(),
            everything.merge,
        )
        scorer.count_tokens(prompts)
        streamer.run(prompts, observe=scorer, logits="none", drafters=True)
        scorer.flush()
    everything.merge(scorer.model)
    return everything


def test_two_runs_merge_to_one_over_all_prompts(scored: Scored) -> None:
    merged = totals_of(scored, scored.prompts[:2])
    merged.merge(totals_of(scored, scored.prompts[2:]))
    found, whole = dict(merged.scores()), scored.scores
    assert found.keys() == whole.keys()
    for key, values in whole.items():
        # Sums of a prompt are the same; adding four of them in float64 in another order moves
        # the last bits of float64, which may change the one rounding to float32.
        np.testing.assert_allclose(found[key], values, rtol=2**-23, atol=1e-30, err_msg=key)


def test_scores_do_not_depend_on_the_budgets(scored: Scored, tmp_path: Path) -> None:
    options: dict[str, Any] = {"second_moments": tuple(MOMENTS), "options": TIGHT}
    score_parent(scored.parent, scored.prompts, tmp_path / "tight", **options)
    tight = load_file(tmp_path / "tight")
    assert tight.keys() == scored.scores.keys()
    for key, values in scored.scores.items():
        assert np.array_equal(tight[key], values), key
    assert (tmp_path / "tight").read_bytes() == scored.path.read_bytes()


def test_scores_do_not_depend_on_the_steps_of_a_long_prompt(
    scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TOKENS_PER_STEP", 7)
    monkeypatch.setattr(indexer, "SCORES_PER_STEP", 1)
    score_parent(scored.parent, scored.prompts, tmp_path / "s", second_moments=tuple(MOMENTS))
    for key, values in load_file(tmp_path / "s").items():
        # Products of other shapes may add up in another order: a few last bits of float32.
        np.testing.assert_allclose(values, scored.scores[key], rtol=1e-5, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("axis", AXES)
def test_only_the_axes_asked_for_are_scored(scored: Scored, tmp_path: Path, axis: str) -> None:
    score_parent(scored.parent, scored.prompts[:2], tmp_path / "one", axes=[axis])
    dims = {key.split("/")[1].partition(".")[0] for key in load_file(tmp_path / "one")}
    expected = {
        "layers": {"layers"},
        "hc_mult": {"streams"},
        "experts": {"n_routed_experts"},
        "heads": {"o_groups", "num_attention_heads"},
        "head_dim": {"nope"},
        "o_lora_rank": {"o_groups*o_lora_rank"},
        "indexer": {"index_n_heads", "index_nope"},
    }
    assert dims == expected.get(axis, {axis})


def test_axes_that_look_into_no_expert_run_the_experts_together(
    scored: Scored, tmp_path: Path
) -> None:
    ran = {
        axis: score_parent(scored.parent, [[1, 2]], tmp_path / axis, axes=[axis]).ran
        for axis in ("heads", "layers", "vocab_size", "experts")
    }
    # A block computes its routed experts in one operation, and runs no drafter for nothing.
    assert ran["heads"]["experts"] == 8 and ran["layers"]["experts"] == 7
    assert ran["vocab_size"]["hc_pre"] == 14
    assert "experts" not in ran["experts"]


@pytest.mark.parametrize(
    ("mode", "dtype"), [("official", torch.bfloat16), ("exact", torch.bfloat16)]
)
def test_other_numerics_give_nearly_the_same_scores(
    scored: Scored, tmp_path: Path, mode: str, dtype: torch.dtype
) -> None:
    v4.score(scored.parent, scored.prompts, tmp_path / "s", mode=mode, dtype=dtype, workers=1)
    found = load_file(tmp_path / "s")
    wanted = {key: v for key, v in scored.scores.items() if not key.startswith("second_moment")}
    assert set(found) <= set(wanted) | {k for k in found if ".experts." in k}
    for key, values in wanted.items():
        if "/num_attention_heads/" in key or "/q_lora_rank/" in key or "/hidden_size/" in key:
            # Activations in bf16 have 8 bits; FP8 of them 4: scores follow to a few per cent.
            assert np.corrcoef(found[key], values)[0, 1] > 0.9, key


def test_the_file_says_what_was_measured(scored: Scored) -> None:
    import json

    with safe_open(scored.path, framework="numpy") as file:
        about = json.loads(file.metadata()["v4surgery.scores"])
    assert about["parent"]["fingerprint"] == scored.parent.fingerprint
    assert about["parent"]["kind"] == "folder"
    assert (about["num_tokens"], about["num_prompts"]) == (66, 4)
    assert (about["mode"], about["dtype"]) == ("exact", "float32")
    assert about["implementation"] == "reference"
    assert about["tool"] == {"name": "v4surgery", "version": v4.__version__}
    assert len(about["prompts_blake3"]) == 64
    assert about["axes"] == list(AXES) and about["second_moments"] == list(MOMENTS)


def test_scores_are_replaced_and_other_files_are_not(scored: Scored, tmp_path: Path) -> None:
    out = tmp_path / "s"
    score_parent(scored.parent, [[1]], out, axes=["layers"])
    first = out.read_bytes()
    score_parent(scored.parent, [[2]], out, axes=["layers"])
    assert out.read_bytes() != first
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists, and is no scores file") as error:
        score_parent(scored.parent, [[1]], out, axes=["layers"])
    assert f"where: {out}" in str(error.value) and "next: choose another --out" in str(error.value)
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_failure_leaves_the_earlier_scores(
    scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s"
    score_parent(scored.parent, [[1]], out, axes=["layers"])
    before = out.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "count_tokens", fail)
    with pytest.raises(KeyboardInterrupt):
        score_parent(scored.parent, [[2]], out, axes=["layers"])
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    parent = parents.write_small_parent(tmp_path / "parent")
    tensor = parents.read_tensors(parent)["layers.1.attn.kv_norm.weight"]
    broken = parents.RawTensor("BF16", tensor.shape, b"\xc0\x7f" * tensor.shape[0])  # NaN
    spoilt = parents.replace_tensor(
        parent, tmp_path / "spoilt", "layers.1.attn.kv_norm.weight", broken
    )
    with pytest.raises(OutputError, match="a score is not a finite number") as error:
        score_parent(v4.open(spoilt), [[1, 2, 3]], tmp_path / "s", axes=["head_dim"])
    assert "where: energy/nope/layers.1." in str(error.value)
    assert "next: look for NaN" in str(error.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("prompts", "axes", "text"),
    [
        ([], AXES, "no prompts"),
        ([[1]], (), "no axes"),
        ([[1]], ["expert"], "unknown axis"),
        ([[]], AXES, "the prompt is empty"),
        ([[96]], AXES, "out of the vocabulary"),
    ],
)
def test_nothing_to_score_is_a_usage_error(
    scored: Scored, tmp_path: Path, prompts: list[list[int]], axes: Sequence[str], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        score_parent(scored.parent, prompts, tmp_path / "s", axes=axes)
    assert not (tmp_path / "s").exists()


MEASURE = """
import pathlib, re, sys
import torch
import v4surgery as v4
from v4surgery.importance.score import score_parent
from v4surgery.model.streaming import StreamOptions

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) * 1024

torch.set_num_threads(1)
parent, out = v4.open(sys.argv[1]), pathlib.Path(sys.argv[2])
options = StreamOptions(weight_bytes=16_000_000, workers=1)
score_parent(parent, [[1, 2]], out, axes=["experts"], options=options)
before = peak()
prompts = [list(range(begin, begin + 64)) for begin in range(0, 192, 64)]
scoring = score_parent(parent, prompts, out, axes=["experts"], options=options)
print(before, peak(), scoring.bytes_read)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_scoring_experts_takes_bounded_memory(tmp_path: Path) -> None:
    """A sparse parent of 0.4 GB, 100 MB of experts a block, read within a budget of 16 MB."""
    changes = {
        "vocab_size": 512,
        "n_routed_experts": 64,
        "hidden_size": 1024,
        "moe_intermediate_size": 1024,
        "num_attention_heads": 4,
        "o_groups": 2,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 64,
        "o_lora_rank": 64,
        "index_n_heads": 4,
        "index_head_dim": 64,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128, 4, 0],
    }
    parent = parents.write_parent(
        tmp_path / "parent", "flash", layers=4, changes=changes, sparse=True
    )
    payload = v4.open(parent).payload_bytes
    assert payload > 400_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, parent, tmp_path / "s"],
        check=True,
        capture_output=True,
        text=True,
    )
    before, peak, bytes_read = map(int, done.stdout.split())
    assert bytes_read > payload  # prompt after prompt reads most experts again
    # 16 MB of weights, as much in read buffers, a decoded expert (13 MB), streams of 192 tokens
    # (3 MB), and two thirds more for what allocators keep. Without a budget it takes 225 MB.
    assert peak - before < 80_000_000, (before, peak)


def test_a_prompt_of_one_token_scores_the_trunk_only(scored: Scored, tmp_path: Path) -> None:
    score_parent(scored.parent, [[3]], tmp_path / "s", axes=["heads"])
    places = {key.rpartition("/")[2] for key in load_file(tmp_path / "s")}
    assert places == {f"layers.{i}." for i in range(7)}
