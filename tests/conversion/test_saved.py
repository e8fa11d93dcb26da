"""What transformers saves, brought back: its two layouts, what it lost, what training changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import v4surgery as v4
from tests.cli.conftest import Run
from tests.conversion import reference
from tests.support import parents

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def replica(demo_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "replica"
    with v4.open(demo_parent) as parent:
        return v4.slice(v4.plan(parent, "demo"), out).path


@pytest.fixture(scope="module")
def saved(replica: Path) -> dict[bool, Path]:
    """Saved by transformers with published names again, or with its own."""
    model = AutoModelForCausalLM.from_pretrained(replica, dtype="auto")
    folders = {original: replica.parent / f"saved-{original}" for original in (True, False)}
    for original, folder in folders.items():
        model.save_pretrained(folder, save_original_format=original)
    return folders


@pytest.mark.parametrize("original", [True, False])
def test_what_was_saved_untrained_comes_back_to_the_bit(
    original: bool, replica: Path, saved: dict[bool, Path], tmp_path: Path
) -> None:
    names = parents.read_tensors(saved[original]).keys()
    assert any("gate_up_proj" in name for name in names) == (not original)
    done = v4.convert(saved[original], tmp_path / "out", "published")
    before, after = reference.load(replica), reference.load(tmp_path / "out")
    assert {name for name in before if not name.startswith("mtp.")} == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    assert done.report["rounded"] == {}
    with v4.open(saved[original]) as source:
        assert v4.verify(tmp_path / "out", source).passed


def test_config_is_published_again_and_names_no_drafter(
    replica: Path, saved: dict[bool, Path], tmp_path: Path
) -> None:
    v4.convert(saved[True], tmp_path / "out", "published")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (replica, tmp_path / "out")
    )
    layers = before["num_hidden_layers"]
    assert after["compress_ratios"] == before["compress_ratios"][:layers]
    assert after["num_nextn_predict_layers"] == 0
    same = ("num_hash_layers", "layer_types", "rope_scaling", "qk_rope_head_dim", "sliding_window")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.compress_rates == before["compress_rates"]


def test_what_is_lost_is_named(saved: dict[bool, Path], tmp_path: Path, v4: Run) -> None:
    done = v4("convert", saved[True], tmp_path / "out", "--to", "published", "--json")
    assert (done.code, done.err) == (0, "")
    lost = " ".join(json.loads(done.out)["lost"])
    for word in ("compress_ratios", "num_hash_layers", "mtp.*", "FP4 and FP8", "tokenizer"):
        assert word in lost
    record = json.loads((tmp_path / "out" / "v4surgery.json").read_text())
    assert set(json.loads(done.out)["lost"]) <= set(record["notes"])


def test_norms_that_bf16_cannot_hold_are_rounded_and_counted(
    saved: dict[bool, Path], tmp_path: Path
) -> None:
    name = "model.layers.0.attn_norm.weight"
    old = parents.read_tensors(saved[True])[name]
    values = torch.frombuffer(bytearray(old.data), dtype=torch.float32).clone()
    values[:5] += 1e-5
    path = parents.copy_checkpoint(saved[True], tmp_path / "trained")
    shard = parents.read_shard(path / "model.safetensors")
    shard[name] = old._replace(data=values.numpy().tobytes())
    parents.write_shard(path / "model.safetensors", shard)
    done = v4.convert(path, tmp_path / "out", "published")
    assert done.report["rounded"] == {"layers.0.attn_norm": 5}
    after = reference.load(tmp_path / "out")["layers.0.attn_norm.weight"]
    assert torch.equal(after, values.bfloat16())


def test_stack_of_another_shape_is_reported_under_its_own_name(
    saved: dict[bool, Path], tmp_path: Path
) -> None:
    path = parents.copy_checkpoint(saved[False], tmp_path / "spoilt")
    shard = parents.read_shard(path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts, rows, cols = shard[name].shape
    shard[name] = shard[name]._replace(shape=(experts * 2, rows // 2, cols))
    parents.write_shard(path / "model.safetensors", shard)
    with pytest.raises(v4.V4SurgeryError) as caught:
        v4.open(path)
    assert f"unknown: {name}" in str(caught.value)
    assert "missing: layers.0.ffn.experts.0.w1.weight" in str(caught.value)


def test_training_page_runs_as_it_is_printed(
    demo_parent: Path,
    tmp_path: Path,
    v4: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its console and Python blocks, in order, in a folder of their own."""
    text = (DOCS / "training.md").read_text()
    (tmp_path / "parent").symlink_to(demo_parent)
    monkeypatch.chdir(tmp_path)
    printed = []
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", text, re.DOTALL):
        if kind == "python":
            exec(compile(block, "training.md", "exec"), {})
            printed.append(capsys.readouterr().out)
            continue
        for line in block.splitlines():
            words = line.removeprefix("$ v4surgery ").split()
            if words[0] != "synth":
                done = v4(*words)
                assert done.code == 0, done.err
                printed.append(done.out)
    found = re.search(r"(\d+) of (\d+) tensors are as they were, (\d+) are gone", printed[-1])
    assert found is not None, printed
    equal, total, gone = map(int, found.groups())
    before, after = (reference.load(tmp_path / name) for name in ("replica", "published"))
    kept = [n for n in before if n in after]
    assert equal == sum(torch.equal(before[name], after[name]) for name in kept)
    assert (total, gone) == (len(kept), len(before) - len(kept))
    assert 0 < equal < total and gone > 0
    assert any(name.endswith("tid2eid") for name in kept)
    still = {name for name in kept if torch.equal(before[name], after[name])}
    assert {name for name in kept if name.endswith(("tid2eid", "gate.bias"))} <= still
    assert "layers.0.attn.wq_a.weight" not in still and "verified against" in " ".join(printed)
