"""Bases are recorded once: resuming takes them, verify checks them and what was made with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

import v4surgery
from tests.methods.conftest import D, L, Q, methods
from tests.slicers.conftest import BLOCKS, Cut, Parent
from tests.support import parents
from v4surgery.checkpoint.layout import OutputTensor
from v4surgery.errors import CheckpointError, PlanError
from v4surgery.slicers import prepare
from v4surgery.slicers.apply import make_jobs
from v4surgery.slicers.neighbours import is_rounding
from v4surgery.slicers.transform import EditJob

HALF = methods(D // 2, Q // 2, L // 2)
BASES = "v4surgery.bases"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def copy(half: Cut, tmp_path: Path) -> Path:
    return parents.copy_checkpoint(half.path, tmp_path / "copy")


def problems(path: Path, parent: Parent) -> tuple[str, ...]:
    return v4surgery.verify(path, parent.opened).problems


@pytest.mark.parametrize("store", ["native", "fp8", "bf16", "f32"])
def test_every_storage_verifies(store: str, parent: Parent, tmp_path: Path) -> None:
    plan = parent.plan(HALF, store={"dtype": store}, compensate=True)
    replica = v4surgery.slice(plan, tmp_path / "r", workers=2)
    checked = v4surgery.verify(replica, parent.opened)
    assert checked.passed and checked.rounded == ()
    report = replica.report["requantized"]
    assert (report["tensors"] > 0) == (store in ("native", "fp8"))


@pytest.mark.parametrize(("like", "layers"), [("flash-base", 2), ("flash-0731", 3)])
def test_other_parents_and_their_drafters_verify(like: str, layers: int, tmp_path: Path) -> None:
    """FP8 experts with F32 scales and a drafter's own head; DSpark's three drafters."""
    changes: dict[str, Any] = {**BLOCKS}
    if like == "flash-0731":
        changes |= {
            "num_hidden_layers": 3,
            "compress_ratios": [0, 4, 0, 0, 0, 0],
            "dspark_target_layer_ids": (0, 1, 2),
            "dspark_noise_token_id": 60,
            "dspark_markov_rank": 8,
        }
    path = parents.write_parent(tmp_path / "p", like, layers=layers, changes=changes)
    other = Parent(path)
    keep = methods(q=128, o=64)
    ranks = {**keep, "mtp": "keep"}
    del ranks["hidden_size"]
    keep["hidden_size"] = {"keep": 256, "method": "pca"}
    for number, choice in enumerate((keep, ranks)):
        plan = other.plan(choice, store={"dtype": "native"})
        replica = v4surgery.slice(plan, tmp_path / str(number))
        assert v4surgery.verify(replica, other.opened).problems == ()
    assert plan.transforms["factor"] == 2 * len(plan.catalogue.blocks)


def test_record_without_its_bases_is_a_problem(parent: Parent, copy: Path) -> None:
    record = json.loads((copy / "v4surgery.json").read_text())
    del record["bases"]
    (copy / "v4surgery.json").write_text(json.dumps(record))
    assert any("its digest is another one" in line for line in problems(copy, parent))


def test_number_of_workers_changes_no_byte(parent: Parent, half: Cut, tmp_path: Path) -> None:
    for workers in (1, 3):
        v4surgery.slice(parent.plan(HALF), tmp_path / str(workers), workers=workers)
        assert files(tmp_path / str(workers)) == files(half.path)


def test_a_stopped_run_resumes_with_the_recorded_bases(
    parent: Parent, half: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0

    def stop(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if done > half.planned.bases.nbytes + 300_000:
            raise RuntimeError("stopped")

    out = tmp_path / "r"
    with pytest.raises(RuntimeError, match="stopped"):
        v4surgery.slice(parent.plan(HALF), out, workers=1, progress=stop)
    assert (out / BASES).exists() and not (out / "v4surgery.json").exists()

    def refuse(*_: object) -> None:
        raise AssertionError("a basis was computed again")

    monkeypatch.setattr(prepare, "principal_components", refuse)
    monkeypatch.setattr(prepare, "factor_pair", refuse)
    resumed = v4surgery.slice(parent.plan(HALF), out, workers=2)
    assert resumed.written.chunks_reused > 0
    assert files(out) == files(half.path)


def test_bases_that_were_only_begun_are_made_again(
    parent: Parent, half: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, good = tmp_path / "r", prepare.factor_pair

    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(prepare, "factor_pair", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        v4surgery.slice(parent.plan(HALF), out)
    assert not (out / BASES).exists()
    monkeypatch.setattr(prepare, "factor_pair", good)
    v4surgery.slice(parent.plan(HALF), out)
    assert files(out) == files(half.path)


Edit = Callable[[parents.Shards], None]


def edited(replica: Cut, out: Path, edit: Edit) -> Path:
    """A copy, record and all, with a value changed."""
    copy = parents.copy_checkpoint(replica.path, out)
    shards = parents.read_shards(copy)
    edit(shards)
    for file, tensors in shards.items():
        parents.write_shard(copy / file, tensors)
    return copy


def flip(name: str, position: int, bit: int) -> Edit:
    def edit(shards: parents.Shards) -> None:
        shard = parents.shard_of(shards, name)
        data = bytearray(shard[name].data)
        data[position] ^= bit
        shard[name] = shard[name]._replace(data=bytes(data))

    return edit


@pytest.mark.parametrize(
    "name",
    [
        "embed.weight",
        "layers.1.attn.wo_a.weight",
        "layers.2.ffn.experts.3.w2.weight",
        "layers.0.attn.wq_a.weight",
        "layers.3.ffn_norm.weight",
        "layers.0.hc_attn_fn",
    ],
)
def test_a_flipped_value_is_named(name: str, parent: Parent, half: Cut, tmp_path: Path) -> None:
    width = 4 if name.endswith("_fn") else 2
    copy = edited(half, tmp_path / "c", flip(name, 5 * width - 1, 0x80))
    (found,) = problems(copy, parent)
    assert found.startswith(f"{name}: ")


def test_a_neighbouring_value_needs_its_recorded_digest(
    parent: Parent, half: Cut, tmp_path: Path
) -> None:
    """One unit in the last place may be this machine's rounding; an edit after slicing is not."""
    name = "layers.1.attn.wkv.weight"
    copy = edited(half, tmp_path / "c", flip(name, 10, 1))
    assert problems(copy, parent) == (
        f"{name}: the values are within rounding, the recorded digest is not",
    )
    record = json.loads((copy / "v4surgery.json").read_text())
    data = parents.read_tensors(copy)[name].data
    record["tensors"][name]["blake3"] = blake3(data).hexdigest()
    (copy / "v4surgery.json").write_text(json.dumps(record))
    checked = v4surgery.verify(copy, parent.opened)
    assert checked.passed and checked.rounded == (name,)


def test_bases_that_are_not_the_recorded_ones_are_named(parent: Parent, copy: Path) -> None:
    data = bytearray((copy / BASES).read_bytes())
    data[-1] ^= 0x40  # an exponent bit of the last factor
    (copy / BASES).write_bytes(data)
    found = problems(copy, parent)
    assert any("its digest is another one" in line for line in found)
    assert any("is no pair of factors: off by" in line for line in found)


def test_a_rotation_that_is_none_is_named_even_where_all_digests_agree(
    parent: Parent, copy: Path
) -> None:
    path = copy / BASES
    tensors = parents.read_shard(path)
    rotation = np.frombuffer(tensors["hidden_size/model/out"].data, np.float32).copy()
    rotation[7] += 1e-4
    data = path.read_bytes()
    data = data.replace(tensors["hidden_size/model/out"].data, rotation.tobytes())
    path.write_bytes(data)
    record = json.loads((copy / "v4surgery.json").read_text())
    record["bases"]["blake3"] = blake3(data).hexdigest()
    (copy / "v4surgery.json").write_text(json.dumps(record))
    found = problems(copy, parent)
    assert f"{BASES}: hidden_size/model, group 0, is no rotation: off by" in " ".join(found)


def test_missing_bases_are_an_error_that_says_so(parent: Parent, copy: Path) -> None:
    (copy / BASES).unlink()
    with pytest.raises(CheckpointError, match="the bases of the replica are not beside it"):
        problems(copy, parent)


def test_bases_of_another_plan_are_an_error(parent: Parent, copy: Path, tmp_path: Path) -> None:
    other = v4surgery.slice(parent.plan(methods(D // 4, Q, L)), tmp_path / "other")
    (copy / BASES).write_bytes((other.path / BASES).read_bytes())
    with pytest.raises(CheckpointError, match="not those of the plan"):
        problems(copy, parent)


def test_record_names_method_bases_and_absorbed_norm_of_every_tensor(half: Cut) -> None:
    tensors = half.record["tensors"]
    assert tensors["layers.1.attn.wq_a.weight"]["how"] == "rotate"
    assert tensors["layers.1.attn.wq_a.weight"]["bases"] == {
        "rows": "q_lora_rank/layers.1.",
        "cols": "hidden_size/model",
    }
    assert tensors["layers.1.attn.wq_a.weight"]["absorbs"] == "layers.1.attn_norm"
    assert tensors["layers.1.attn.wo_b.weight"]["how"] == "factor"
    assert tensors["layers.1.attn_norm.weight"]["how"] == "fold"
    assert half.record["bases"]["file"] == BASES
    assert any("hidden_size: pca, 64 of 128 directions" in note for note in half.record["notes"])


def test_verified_record_covers_the_bases(parent: Parent, copy: Path) -> None:
    assert problems(copy, parent) == ()
    assert BASES in json.loads((copy / "verified.json").read_text())["files"]


@pytest.mark.parametrize(
    ("dtype", "store", "step", "passes"),
    [
        ("BF16", "bf16", 1, True),
        ("BF16", "bf16", 3, False),
        ("F32", "f32", 1, True),
        ("F32", "f32", 5, False),
        ("F8_E4M3", "fp8", 1, True),
        ("F8_E4M3", "fp8", 2, False),
    ],
)
def test_neighbours_pass_and_what_lies_beyond_does_not(
    dtype: str, store: str, step: int, passes: bool, parent: Parent
) -> None:
    width = {"BF16": np.uint16, "F32": np.uint32, "F8_E4M3": np.uint8}[dtype]
    job = job_of(parent, store)
    expected = np.array([130, 7, 100, 90], width) << (8 * (np.dtype(width).itemsize - 1))
    actual = expected.copy()
    actual[2] += step
    output = job.outputs[0]
    assert output.dtype == dtype
    assert is_rounding(job, output, actual.tobytes(), expected.tobytes()) == passes


def job_of(parent: Parent, store: str) -> EditJob:
    jobs = make_jobs(parent.plan(HALF, store={"dtype": store}))
    return next(
        job
        for job in jobs
        if isinstance(job, EditJob) and job.edit.target.stem == "layers.0.attn.wo_b"
    )


def test_scales_and_picked_tensors_have_no_neighbours(parent: Parent) -> None:
    job = job_of(parent, "fp8")
    assert not is_rounding(job, job.outputs[1], b"\x70", b"\x71")
    picked = next(
        job
        for job in make_jobs(parent.plan(HALF))
        if isinstance(job, EditJob) and job.edit.target.stem == "layers.0.attn.kv_norm"
    )
    assert not is_rounding(picked, OutputTensor("x", "BF16", (1,)), b"\x00\x40", b"\x01\x40")


def test_terms_that_cancel_are_apart_by_their_slack(parent: Parent) -> None:
    job = job_of(parent, "f32")
    near, far = (np.array([value], np.float32).tobytes() for value in (1e-12, 1e-9))
    zero = np.zeros(1, np.float32).tobytes()
    job.slack = 1e-11
    assert is_rounding(job, job.outputs[0], near, zero)
    assert not is_rounding(job, job.outputs[0], far, zero)


def test_weights_that_are_not_finite_have_no_basis(parent: Parent, tmp_path: Path) -> None:
    def spoil(shards: parents.Shards) -> None:
        name = "embed.weight"
        shard = parents.shard_of(shards, name)
        data = b"\xc0\x7f" + shard[name].data[2:]
        shard[name] = shard[name]._replace(data=data)

    bad = Parent(parents.edit_checkpoint(parent.path, tmp_path / "bad", spoil))
    with pytest.raises(PlanError, match="cannot be made of weights that are NaN") as caught:
        v4surgery.slice(bad.plan(HALF), tmp_path / "out")
    assert "hidden_size/model" in str(caught.value)


def test_all_zero_weights_have_a_basis_too(parent: Parent, tmp_path: Path) -> None:
    """As the holes of a sparse synthetic parent are."""

    def clear(shards: parents.Shards) -> None:
        for tensors in shards.values():
            for name, tensor in tensors.items():
                if tensor.dtype in ("F8_E4M3", "I8"):
                    tensors[name] = tensor._replace(data=bytes(len(tensor.data)))

    empty = Parent(parents.edit_checkpoint(parent.path, tmp_path / "zero", clear))
    plan: Any = empty.plan(HALF, compensate=True)
    v4surgery.slice(plan, tmp_path / "out")
    assert v4surgery.verify(tmp_path / "out", empty.opened).passed
