"""Two models or traces beside each other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import v4surgery
from tests.model.conftest import BF16_RECIPE, KINDS, SMALL
from tests.support import parents
from tests.support.parents import write_parent
from tests.validation.masked_support import TINY, Case, cut, prompts
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError
from v4surgery.model.numerics import Numerics
from v4surgery.slicers.provenance import read_provenance
from v4surgery.validation.behaviour import FREE, compare_behaviour
from v4surgery.validation.default_prompts import choose_prompts
from v4surgery.validation.diff import Diff, Place, diff_traces
from v4surgery.validation.record import record_trace
from v4surgery.validation.sides import DIFF_TAPS, diff_models
from v4surgery.validation.transformers_trace import PLACES, record_transformers_trace

# As in tests/model/test_transformers.py: roundings of five layers, in each tap of them.
ROUNDING = 5e-6


def trace(model: Checkpoint, out: Path, ids: list[list[int]]) -> Path:
    return record_trace(model, ids, out, taps=DIFF_TAPS, numerics=Numerics()).path


def _parent_of(case: Case) -> str:
    return str(case.replica.parent / "parent")


def by_place(found: Diff) -> dict[str, Any]:
    return {row.place.block + row.place.tap: row for row in found.rows}


def test_places_sort_as_the_forward_passes_them() -> None:
    names = ["0/logits", "0/layers.10.in", "0/layers.2.out", "0/layers.2.attn.in", "0/embed"]
    places = sorted((Place.parse(name)[1] for name in names), key=lambda place: place.order)
    assert [place.block + place.tap for place in places] == [
        "embed",
        "layers.2.attn.in",
        "layers.2.out",
        "layers.10.in",
        "logits",
    ]
    assert Place.parse("12/layers.3.gate.indices") == (12, Place("layers.3.", "gate.indices"))


def test_a_model_and_itself_are_equal_everywhere(tiny_path: Path) -> None:
    found = diff_models(str(tiny_path), str(tiny_path), tokens=12)
    assert found.first_divergence is None and found.only == (0, 0)
    assert all(row.close.is_exact for row in found.rows if row.close)
    assert {row.overlap for row in found.rows if row.overlap is not None} == {1.0}
    assert {row.place.tap for row in found.rows} == set(DIFF_TAPS)


def test_replica_and_parent_differ_as_validate_says(tiny_case: Case) -> None:
    replica, parent = str(tiny_case.replica), tiny_case.parent
    found = by_place(diff_models(replica, _parent_of(tiny_case), tokens=9))
    with v4surgery.open(replica) as opened:
        behaviour = compare_behaviour(
            opened,
            parent,
            read_provenance(opened),
            choose_prompts(opened, None, 9),
            make_numerics=Numerics,
        )
    for layer in behaviour.layers:
        for tap, close in layer.taps[FREE].items():
            row = found[layer.target + tap]
            assert row.other == layer.source
            assert row.close.relative_error == pytest.approx(close.relative_error, rel=1e-9)
        assert found[layer.target + "gate.indices"].overlap is not None
    assert found["embed"].close.is_exact


def test_two_replicas_are_compared_at_what_both_have(
    tiny: Checkpoint, tiny_path: Path, tmp_path: Path
) -> None:
    """Both keep layers 0 and 3; no tap before layer 0's mixes is changed by dropped experts."""
    a = cut(tiny, tmp_path / "a", {"layers": {"ids": [0, 1, 3]}, "experts": [0, 1, 3]})
    b = cut(tiny, tmp_path / "b", {"layers": {"ids": [0, 3]}})
    found = by_place(diff_models(str(a), str(b), parent=str(tiny_path), tokens=12))
    assert {row.other for row in found.values()} == {"", "layers.0.", "layers.1."}
    assert found["layers.2.out"].other == "layers.1."
    assert found["layers.0.attn.out"].close.is_exact and not found["layers.2.out"].close.is_exact
    assert not any(name.startswith("layers.1.") for name in found)


def test_replicas_of_other_channels_share_those_that_both_keep(
    tiny: Checkpoint, tiny_path: Path, tmp_path: Path
) -> None:
    a = cut(tiny, tmp_path / "a", {"hidden_size": [*range(20)], "layers": {"ids": [0]}})
    b = cut(tiny, tmp_path / "b", {"hidden_size": [*range(31, 9, -1)], "layers": {"ids": [0]}})
    found = by_place(diff_models(str(a), str(b), parent=str(tiny_path), tokens=5))
    assert found["embed"].close.is_exact and found["layers.0.in"].close.is_exact
    assert found["layers.0.out"].close.relative_error > 0


def test_replicas_of_the_same_sizes_and_other_channels_share_those_that_both_keep(
    tiny: Checkpoint, tiny_path: Path, tmp_path: Path
) -> None:
    """Their fingerprints are the same: config and headers do not say what was kept."""
    a = cut(tiny, tmp_path / "a", {"hidden_size": [*range(20)], "layers": {"ids": [0]}})
    b = cut(tiny, tmp_path / "b", {"hidden_size": [*range(12, 32)], "layers": {"ids": [0]}})
    found = by_place(diff_models(str(a), str(b), parent=str(tiny_path), tokens=5))
    assert found["embed"].close.is_exact and found["layers.0.in"].close.is_exact


def test_models_that_are_no_relatives_are_aligned_where_shapes_differ(
    tiny_path: Path, tmp_path: Path
) -> None:
    other = write_parent(tmp_path / "p", changes={**TINY, "hidden_size": 64})
    found = diff_models(str(tiny_path), str(other), tokens=12, taps=("embed", "out"))
    assert all(row.close is None and 0 <= (row.cka or -1) <= 1 for row in found.rows)
    assert found.first_divergence is None


def test_the_first_place_above_the_tolerance_is_named(
    tiny: Checkpoint, tiny_path: Path, tmp_path: Path
) -> None:
    name = "layers.2.ffn.gate.weight"
    tensors = parents.read_tensors(tiny_path)
    data = bytearray(tensors[name].data)
    data[1::2] = bytes(b ^ 0x80 for b in data[1::2])  # every sign
    changed = parents.replace_tensor(
        tiny_path, tmp_path / "c", name, tensors[name]._replace(data=bytes(data))
    )
    found = diff_models(str(changed), str(tiny_path), tokens=12)
    first = found.first_divergence
    assert first is not None and first.place == Place("layers.2.", "gate.indices")
    assert found.to_json()["first_divergence"]["layer"] == "layers.2."


def test_traces_of_other_prompts_are_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    a = trace(tiny, tmp_path / "a", prompts(21, (5,)))
    b = trace(tiny, tmp_path / "b", prompts(21, (6,)))
    with pytest.raises(UsageError, match="different prompts"):
        diff_traces(a, b)


def test_a_token_that_a_replica_does_not_have_is_named(
    tiny: Checkpoint, tiny_case: Case, tmp_path: Path
) -> None:
    path = trace(tiny_case.parent, tmp_path / "t", [[2, 3]])
    with pytest.raises(UsageError, match="not in the replica's vocabulary"):
        diff_models(str(tiny_case.replica), str(path), parent=_parent_of(tiny_case))


def test_replicas_without_a_named_parent_ask_for_it(tiny: Checkpoint, tmp_path: Path) -> None:
    a = cut(tiny, tmp_path / "a", {"layers": {"ids": [0]}})
    b = cut(tiny, tmp_path / "b", {"layers": {"ids": [1]}})
    with pytest.raises(UsageError, match="--parent"):
        diff_models(str(a), str(b))


@pytest.fixture(scope="module")
def hugging(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and transformers' model of it."""
    from transformers import DeepseekV4ForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("hugging")
    changes = {**SMALL, **KINDS, "num_hidden_layers": 5}
    with v4surgery.open(write_parent(root / "p", layers=5, changes=changes)) as parent:
        path = v4surgery.slice(v4surgery.plan(parent, BF16_RECIPE), root / "r").path
    model = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return path, model.float().eval()


def test_a_trace_of_transformers_is_that_of_our_forward(
    hugging: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = hugging
    ids = prompts(SMALL["vocab_size"], (45, 131))
    theirs = record_transformers_trace(model, ids, tmp_path / "theirs")
    with v4surgery.open(folder) as ours:
        found = diff_traces(theirs, trace(ours, tmp_path / "ours", ids), tolerance=ROUNDING)
    assert found.first_divergence is None, found.first_divergence
    assert {row.place.tap for row in found.rows} == {"embed", *PLACES, "logits"}
    assert len(found.rows) == 2 + 5 * len(PLACES)
    shapes = {name: tuple(value.shape) for name, value in load_file(theirs).items()}
    assert shapes["1/layers.4.attn.heads"] == (1, 131, 8, 64)


def test_a_model_that_is_no_v4_of_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a DeepSeek-V4 model"):
        record_transformers_trace(torch.nn.Linear(2, 2), [[1]], tmp_path / "t")


def test_a_tap_that_transformers_does_not_show_is_refused(
    hugging: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="does not show this tap"):
        record_transformers_trace(hugging[1], [[1]], tmp_path / "t", taps=("attn.indexer",))
    assert not (tmp_path / "t").exists()
