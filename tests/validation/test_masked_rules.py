"""What grade two knows without a forward: records, hash tables, frequencies; and what it cannot."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import v4surgery
from tests.support.parents import write_parent
from tests.validation.masked_support import TINY, cut, graded, prompts
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import CheckpointError, UsageError
from v4surgery.presets import FLASH
from v4surgery.slicers.rope import cut_rope
from v4surgery.validation import masked
from v4surgery.validation.masked import check_masked
from v4surgery.validation.masked.experts import choice_error
from v4surgery.validation.masked.frequencies import scaled_errors
from v4surgery.validation.masked.grading import token_errors
from v4surgery.validation.masked.hash_tables import check_table
from v4surgery.validation.masked.record import read_record

KEEP: dict[str, Any] = {"layers": [0, 2], "experts": {"ids": [3, 0, 2], "per_token": 2}}


@pytest.fixture(scope="module")
def replica(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(tiny, tmp_path_factory.mktemp("replica") / "replica", KEEP)


def test_masked_parent_shares_no_code_with_the_slicers() -> None:
    """Neither by import nor through the catalogue's axes."""
    folder = Path(masked.__file__).parent
    files = sorted(folder.glob("*.py"))
    assert len(files) > 10
    imported, attributes = set(), set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                attributes.add(node.attr)
    forbidden = ("v4surgery.slicers", "v4surgery.axes", "v4surgery.catalogue")
    assert not [name for name in imported if name and name.startswith(forbidden)]
    assert not attributes & {"axes", "sizes", "shape_of", "block_entries"}


# Records


def spoiled(replica: Path, out: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = Path(shutil.copytree(replica, out))
    record = json.loads((path / "v4surgery.json").read_text())
    edit(record)
    (path / "v4surgery.json").write_text(json.dumps(record))
    return path


def units(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(record: dict[str, Any]) -> None:
        record["selections"]["blocks"][0]["kept"][name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (units("n_routed_experts", [3, 0, 4]), "distinct units from 0 to 3"),
        (units("n_routed_experts", [3, 3, 2]), "distinct units"),
        (units("n_routed_experts", "all"), "a list of whole numbers"),
        (units("n_routed_experts", []), "distinct units"),
        (units("wings", [1, 2]), "wings"),
        (units("group_heads", [[0], [1]]), "3, one for each"),
        (lambda record: record["selections"]["blocks"].pop(), "2 blocks"),
        (lambda record: record["selections"]["blocks"][1].update(source="layers.9."), "layers.9."),
        (lambda record: record.pop("selections"), "does not say what it was cut from"),
    ],
)
def test_record_that_cannot_be_is_refused(
    edit: Callable[[dict[str, Any]], None],
    message: str,
    replica: Path,
    tiny: Checkpoint,
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError) as error:
        graded(spoiled(replica, tmp_path / "spoiled", edit), tiny)
    assert message in str(error.value)
    assert "v4surgery.json" in str(error.value)


def test_record_of_other_sizes_than_the_config_stops_before_any_forward(
    replica: Path, tiny: Checkpoint, tmp_path: Path
) -> None:
    report = graded(spoiled(replica, tmp_path / "spoiled", units("o_groups", [0, 1])), tiny)
    assert (report.verdict, report.taps) == ("failed", ())
    assert report.first_failure is not None
    assert report.first_failure.startswith("config.json: o_groups: is 3")


def test_a_parent_is_no_replica(tiny: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="does not say what it was cut from"):
        check_masked(tiny, tiny, prompts(21))


def test_another_parent_is_refused(replica: Path, tmp_path: Path) -> None:
    other = write_parent(tmp_path / "other", changes={**TINY, "hc_mult": 2})
    with v4surgery.open(other) as parent, pytest.raises(UsageError, match="not the parent"):
        graded(replica, parent)


@pytest.mark.parametrize(
    ("ids", "message"), [([], "no prompts"), ([[]], "prompt is empty"), ([[21]], "vocabulary")]
)
def test_prompts_that_cannot_be_run_are_refused(
    ids: list[list[int]], message: str, replica: Path, tiny: Checkpoint
) -> None:
    with v4surgery.open(replica) as opened, pytest.raises(UsageError, match=message):
        check_masked(opened, tiny, ids)


# Hash tables


@pytest.mark.parametrize("policy", ["nearest", "balanced"])
@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_tables_of_either_policy_hold_and_a_swapped_stand_in_does_not(
    policy: str, per_token: int, tmp_path: Path
) -> None:
    changes = {
        **TINY,
        "vocab_size": 200,
        "num_hidden_layers": 1,
        "num_hash_layers": 1,
        "compress_ratios": [0, 0],
        "n_routed_experts": 9,
        "num_experts_per_tok": 3,
    }
    path = write_parent(tmp_path / "parent", changes=changes)
    experts = {"ids": [8, 1, 5, 4, 2], "per_token": per_token, "hash_table": policy}
    with v4surgery.open(path) as parent:
        keep = {"experts": experts, "vocab_size": [0, 1, *range(2, 200, 3)]}
        with v4surgery.open(cut(parent, tmp_path / "replica", keep)) as replica:
            record = read_record(replica, parent)
            kept = record.blocks[0]
            table = check_table(record, kept, replica, parent)
            assert not table.wrong.any() and table.rules == ()
            name = "layers.0.ffn.gate.tid2eid"
            ref = replica.tensors[name].weight
            rows = replica.read_rows(ref, slice(0, ref.shape[0])).view(np.int64)
            wrong = rows.copy()
            for row in wrong:  # the last slot names another expert that the row does not
                row[-1] = next(e for e in (3, 0, 1, 2, 4) if e not in row)
            _overwrite(tmp_path / "replica" / ref.file, ref.begin, wrong)
            table = check_table(record, kept, replica, parent)
            assert table.wrong.tolist() == (rows != wrong).any(axis=1).tolist()
            assert table.wrong.all() and str(table.rules[0]).startswith(name + ": the row of token")


def _overwrite(path: Path, begin: int, values: np.ndarray[Any, Any]) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(values.tobytes())


# Frequencies


@pytest.mark.parametrize("rope", [8, 16, 32])
def test_fitted_betas_of_flash_are_as_good_as_any_and_its_own_are_not(rope: int) -> None:
    pairs = tuple(range(0, 32, 64 // rope))
    fitted = cut_rope(FLASH, rope, allow_mismatch=False)
    replica = FLASH.replace(qk_rope_head_dim=rope, rope_scaling=fitted.scaling)
    error, best = scaled_errors(pairs, replica, FLASH)
    assert error == pytest.approx(fitted.scaled_error) == pytest.approx(best)
    error, best = scaled_errors(pairs, replica.replace(rope_scaling=FLASH.rope_scaling), FLASH)
    assert error > 1.1 * best


# Errors


def test_error_of_a_token_is_relative_to_its_norm_or_the_median_tokens() -> None:
    mine = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])
    theirs = mine + torch.tensor([[0.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
    assert token_errors(mine, theirs).tolist() == pytest.approx([0.1, 0.1, 0.01])
    assert token_errors(mine, mine).tolist() == [0, 0, 0]


def test_choice_is_graded_by_what_it_gives_away() -> None:
    inf = float("inf")
    values = torch.tensor([[3.0, 2.0, 1.0], [2.0, 2.0, -inf], [2.0, 1.0, -inf]])
    chosen = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    errors = choice_error(values, torch.full((3,), 4.0), chosen)
    assert errors.tolist() == [0.25, 0, inf]


# What cannot be told


def test_prompts_too_short_for_a_window_are_said_to_be(tiny: Checkpoint, tmp_path: Path) -> None:
    path = cut(tiny, tmp_path / "replica", {"layers": [1, 2]})
    with v4surgery.open(path) as opened:
        report = check_masked(opened, tiny, [[1, 2, 3, 4, 5]])
    assert report.passed
    said = {(item.place, item.what): item.why for item in report.not_graded}
    assert "window of 8" in said["layers.1.", "attn.compressor"]
    assert "1 entries, and index_topk 3" in said["layers.0.", "attn.indexer"]


def test_interpolated_ape_is_followed_and_said_to_be(tiny: Checkpoint, tmp_path: Path) -> None:
    layers = {"ids": [0, 2], "compress_ratios": [0, 13], "hash_layers": 1, "ape": "interpolate"}
    report = graded(cut(tiny, tmp_path / "replica", {"layers": layers}), tiny)
    assert report.passed
    assert [item.what for item in report.not_graded] == ["attn.compressor.ape"]


def test_other_frequencies_are_followed_where_the_recipe_allows_them(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    keep = {"head_dim": {"rope": 12, "frequencies": "any"}, "layers": [0, 1]}
    report = graded(cut(tiny, tmp_path / "replica", keep), tiny)
    assert report.passed
    assert any(item.place == "rope frequencies" for item in report.not_graded)


def test_base_parent_with_f32_scales_is_rounded_as_the_replica_is(tmp_path: Path) -> None:
    path = write_parent(tmp_path / "parent", "flash-base", layers=3, changes=_first_layers(3))
    with v4surgery.open(path) as parent:
        keep = {"hidden_size": 20, "experts": {"keep": 3}, "q_lora_rank": 8}
        report = graded(cut(parent, tmp_path / "replica", keep), parent)
    assert report.passed, report.failures
    assert all(tap.graded for tap in report.taps)
    assert any("emb.tok_emb" in item.what for item in report.not_graded)


def test_dspark_drafters_are_left_to_verify_and_the_trunk_is_graded(tmp_path: Path) -> None:
    changes = {
        **_first_layers(3),
        "compress_ratios": [0, 4, 8, 0, 0, 0],
        "dspark_target_layer_ids": (0, 1, 2),
        "dspark_noise_token_id": 7,
        "dspark_markov_rank": 3,
    }
    path = write_parent(tmp_path / "parent", "flash-0731", layers=3, changes=changes)
    with v4surgery.open(path) as parent:
        report = graded(cut(parent, tmp_path / "replica", {"hidden_size": 20}), parent)
    assert report.passed
    assert [item.place for item in report.not_graded] == ["mtp.0. to mtp.2."]
    assert not [tap for tap in report.taps if tap.place.startswith("mtp.")]


def _first_layers(count: int) -> dict[str, Any]:
    ratios = [*TINY["compress_ratios"][:count], 0]
    return {**TINY, "num_hidden_layers": count, "compress_ratios": ratios}


def test_two_prompts_are_graded_as_each_alone_is(replica: Path, tiny: Checkpoint) -> None:
    ids = prompts(21, (27, 9))
    with v4surgery.open(replica) as opened:
        both = check_masked(opened, tiny, ids)
        alone = [check_masked(opened, tiny, [prompt]) for prompt in ids]
    assert both.passed and all(report.passed for report in alone)
    for tap in both.taps:
        if tap.tap not in ("embed", "ffn.experts"):
            errors = [t.error for report in alone for t in report.taps if t.name == tap.name]
            assert tap.error == pytest.approx(max(errors), rel=0.5, abs=3e-7), tap
    assert {tap.prompt for tap in both.taps} == {0, 1}
