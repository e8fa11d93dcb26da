"""verified.json: when it is written, and what makes it void."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from blake3 import blake3

import v4surgery as v4
from tests.support import parents
from v4surgery.recipes import Recipe
from v4surgery.slicers.verified import VERIFIED_FILE, hash_files, replica_files, unverified


@pytest.fixture
def replica(small_parent: Path, tmp_path: Path) -> Path:
    recipe = Recipe.model_validate({"name": "cut", "keep": {"layers": 2}})
    with v4.open(small_parent) as parent:
        return v4.slice(v4.plan(parent, recipe), tmp_path / "replica").path


def reason(folder: Path) -> str | None:
    with v4.open(folder) as checkpoint:
        digests = hash_files(checkpoint.source, replica_files(checkpoint), workers=2)
        return unverified(checkpoint, digests)


def test_a_whole_comparison_that_passes_is_recorded(replica: Path, small_parent: Path) -> None:
    before = {path.name: path.read_bytes() for path in replica.iterdir()}
    assert reason(replica) == "verify has not passed on it"
    verdict = v4.verify(replica, small_parent)
    record = json.loads((replica / VERIFIED_FILE).read_text())
    assert record["files"] == {
        name: blake3(content).hexdigest() for name, content in before.items()
    }
    assert (record["tensors"], record["bytes_compared"]) == (
        verdict.tensors,
        verdict.bytes_compared,
    )
    with v4.open(small_parent) as parent:
        assert record["parent"]["fingerprint"] == parent.fingerprint
    assert reason(replica) is None


def test_sha256_is_that_of_the_whole_file(replica: Path) -> None:
    with v4.open(replica) as checkpoint:
        found = hash_files(checkpoint.source, replica_files(checkpoint), workers=2, sha256=True)
    assert {name: digests.sha256 for name, digests in found.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in replica.iterdir()
    }


def test_verifying_again_writes_the_same_record(replica: Path, small_parent: Path) -> None:
    v4.verify(replica, small_parent)
    first = (replica / VERIFIED_FILE).read_bytes()
    v4.verify(replica, small_parent, workers=1)
    assert (replica / VERIFIED_FILE).read_bytes() == first


def test_a_sample_is_not_recorded(replica: Path, small_parent: Path) -> None:
    verdict = v4.verify(replica, small_parent, sample=3)
    assert verdict.passed and verdict.sampled
    assert not (replica / VERIFIED_FILE).exists()


def test_a_sample_does_not_take_a_record_away(replica: Path, small_parent: Path) -> None:
    v4.verify(replica, small_parent)
    v4.verify(replica, small_parent, sample=3)
    assert reason(replica) is None


def test_a_failure_takes_the_record_away(replica: Path, small_parent: Path) -> None:
    v4.verify(replica, small_parent)
    path = replica / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert not v4.verify(replica, small_parent).passed
    assert not (replica / VERIFIED_FILE).exists()


def test_every_file_that_changes_is_named(replica: Path, small_parent: Path) -> None:
    v4.verify(replica, small_parent)
    for name in json.loads((replica / VERIFIED_FILE).read_text())["files"]:
        path = replica / name
        good = path.read_bytes()
        # The last byte of a shard is a weight's; a space more leaves JSON and YAML what they are.
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if "model" in name else good + b" ")
        assert reason(replica) == f"{name} changed since verify passed"
        path.write_bytes(good)
    assert reason(replica) is None


def test_a_file_that_comes_or_goes_is_named(replica: Path, small_parent: Path) -> None:
    path = replica / "generation_config.json"
    v4.verify(replica, small_parent)
    path.write_text("{}")
    assert reason(replica) == "generation_config.json was added since verify passed"
    v4.verify(replica, small_parent)
    assert reason(replica) is None
    path.unlink()
    assert reason(replica) == "generation_config.json is missing since verify passed"


def test_what_is_no_file_of_the_replica_does_not_matter(replica: Path, small_parent: Path) -> None:
    v4.verify(replica, small_parent)
    for name in ("README.md", "validation.json", "notes.txt", "weights.bin"):
        (replica / name).write_text("{}")
    assert reason(replica) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2, "files": {}}', '{"files": 1}'])
def test_a_record_that_cannot_be_read_counts_for_nothing(
    replica: Path, small_parent: Path, text: str
) -> None:
    v4.verify(replica, small_parent)
    (replica / VERIFIED_FILE).write_text(text)
    assert reason(replica) == "verify has not passed on it"


def test_a_link_in_the_records_place_is_replaced_not_followed(
    replica: Path, small_parent: Path, tmp_path: Path
) -> None:
    target = tmp_path / "precious"
    target.write_text("x")
    (replica / VERIFIED_FILE).symlink_to(target)
    v4.verify(replica, small_parent)
    assert target.read_text() == "x" and not (replica / VERIFIED_FILE).is_symlink()


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(
    replica: Path, small_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert v4.verify(replica, small_parent).passed
    assert not (replica / VERIFIED_FILE).exists()


def test_the_record_is_no_part_of_a_replica_of_the_replica(
    replica: Path, small_parent: Path, tmp_path: Path
) -> None:
    v4.verify(replica, small_parent)
    copy = parents.copy_checkpoint(replica, tmp_path / "copy")
    with v4.open(copy) as checkpoint:
        again = v4.slice(v4.plan(checkpoint, Recipe(name="again")), tmp_path / "again")
    assert not (again.path / VERIFIED_FILE).exists()
