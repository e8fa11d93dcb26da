"""kill -9 at random moments of every verb that writes: it goes on, to the same bytes.

Nothing is left over either: the digests are of every file below the output, so that a stray one
would show. The full run, 50 kills of each verb, is behind the marker ``slow``.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import forked, parents
from tests.support.hub import LoopbackHub

KILLS_IN_CI = 3
KILLS = 50
RECIPES: dict[str, str] = {
    "copy": "keep: {layers: {count: 4}}\nstore: {dtype: native, max_shard_size: 4MB}",
    "decode": "keep: {experts: 8, hidden_size: 128}\nstore: {dtype: bf16, max_shard_size: 4MB}",
    "mix": "keep: {hidden_size: {keep: 128, method: pca}, q_lora_rank: {keep: 64, method: pca}, "
    "o_lora_rank: {keep: 64, method: svd}, mtp: drop}\nstore: {dtype: bf16, max_shard_size: 4MB}",
}


class Verb(NamedTuple):
    """A command that writes OUT, and the environment that it needs."""

    command: Callable[[Path], list[object]]
    env: Mapping[str, str]


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Verb]]:
    """Every verb that writes, on a parent of 16 MB in 700 tensors; slice from a Hub, too."""
    forked.preload()
    folder = tmp_path_factory.mktemp("kills")
    changes: dict[str, Any] = {"n_routed_experts": 16, "vocab_size": 4096}
    parent = parents.write_parent(folder / "parent", changes=changes)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ids = ",".join(str(token) for token in range(1, 65))

    def slicing(name: str, source: object) -> Callable[[Path], list[object]]:
        recipe = folder / f"{name}.yaml"
        recipe.write_text(f"name: {name}\n{RECIPES[name]}\n")
        return lambda out: ["slice", "-r", recipe, "-p", source, "-o", out, "--max-workers", 2]

    def converting(*to: object) -> Callable[[Path], list[object]]:
        return lambda out: ["convert", parent, out, "--to", *to, "--max-workers", 2]

    def scoring(out: Path) -> list[object]:
        return ["score", parent, "--ids", ids, "--out", out / "scores", "--axes", "experts,heads"]

    with LoopbackHub() as hub:
        hub.add_repo("org/parent", parent)
        online = {**threads, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
        online["HF_HUB_DISABLE_XET"] = "1"
        yield {
            **{f"slice, {name}": Verb(slicing(name, parent), threads) for name in RECIPES},
            "slice from the Hub": Verb(slicing("decode", "org/parent"), online),
            "convert to bf16": Verb(converting("bf16"), threads),
            "convert to official": Verb(converting("official", "--tp", 2), threads),
            "synth": Verb(lambda out: ["synth", "--like", "demo", "--out", out], threads),
            "score": Verb(scoring, threads),
        }


NAMES = (
    *("slice, copy", "slice, decode", "slice, mix", "slice from the Hub"),
    *("convert to bf16", "convert to official", "synth", "score"),
)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def disturb(verb: Verb, folder: Path, rng: random.Random, kills: int) -> int:
    """Kill a verb so many times in all, at most five times before it may end; gives the kills."""
    log = folder / "log"
    whole = forked.run(verb.command(folder / "whole"), log, env=verb.env)
    assert whole.code == 0, whole
    wanted, killed, number = digests(folder / "whole"), 0, 0
    while killed < kills:
        number += 1
        assert number < 4 * kills, "it always ends before it can be killed"
        command = verb.command(folder / f"out{number}")
        killed += forked.kill_at_random(
            command, log, rng, seconds=whole.seconds, kills=min(5, kills - killed), env=verb.env
        )
        ended = forked.run(command, log, env=verb.env)
        assert ended.code == 0, ended
        assert digests(folder / f"out{number}") == wanted
    return killed


IN_CI = ("slice, mix", "slice from the Hub", "convert to official", "score")


@pytest.mark.parametrize("name", IN_CI)
def test_killed_verb_goes_on_to_the_same_bytes(
    name: str, verbs: dict[str, Verb], tmp_path: Path
) -> None:
    rng = random.Random(zlib.crc32(name.encode()))
    assert disturb(verbs[name], tmp_path, rng, KILLS_IN_CI) == KILLS_IN_CI


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fifty_kills_then_the_same_bytes(name: str, verbs: dict[str, Verb], tmp_path: Path) -> None:
    kills = 10 if name == "score" else KILLS
    assert disturb(verbs[name], tmp_path, random.Random(50), kills) == kills


@pytest.mark.parametrize("name", ["slice, decode", "slice, mix", "convert to official"])
def test_full_disk_is_told_and_the_finished_work_is_kept(
    name: str, verbs: dict[str, Verb], tmp_path: Path
) -> None:
    """No file can grow past a limit below the largest shard's size: EFBIG, as ENOSPC would be."""
    verb, log, out = verbs[name], tmp_path / "log", tmp_path / "out"
    assert forked.run(verb.command(tmp_path / "whole"), log, env=verb.env).code == 0
    largest = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    full = forked.run(verb.command(out), log, env=verb.env, file_limit=largest - 1)
    assert full.code == 1
    assert full.text.startswith("error: writing failed: File too large\n")
    assert "run the same command again: it resumes from what is kept" in full.text
    assert not (out / "model.safetensors.index.json").exists()
    assert not (out / "v4surgery.json").exists()  # nothing that looks whole
    resumed = forked.run([*verb.command(out), "--json"], log, env=verb.env)
    assert resumed.code == 0 and json.loads(resumed.text)["chunks_reused"] >= 0
    assert digests(out) == digests(tmp_path / "whole")


def test_full_disk_keeps_the_earlier_scores(verbs: dict[str, Verb], tmp_path: Path) -> None:
    verb, log = verbs["score"], tmp_path / "log"
    assert forked.run(verb.command(tmp_path), log, env=verb.env).code == 0
    before = (tmp_path / "scores").read_bytes()
    full = forked.run(verb.command(tmp_path), log, env=verb.env, file_limit=len(before) // 2)
    assert full.code == 1 and full.text.startswith("error: writing failed: File too large\n")
    assert (tmp_path / "scores").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"scores", "log"}
