"""Files of strangers, damaged at random: every verb that reads them ends with an error of ours.

Whatever is in a file, the answer is a result or a clear error: no traceback, no exception that is
not ours, no control characters on the terminal, no message without end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import v4surgery as v4
from tests.slicers.test_vocabulary import train, with_tokenizer
from tests.support import mutants, parents
from tests.support.scores import write_scores
from v4surgery.checkpoint.saved_names import SAVED_NAMES
from v4surgery.cli import main
from v4surgery.recipes import Recipe

SHOWN = 600
NUM_SLOW_MUTANTS = 200
NUM_MUTANTS = int(os.environ.get("V4SURGERY_FUZZ_FILES", "8"))
EXPERTS = 2
TINY: dict[str, Any] = {
    **parents.SMALL,
    "num_hidden_layers": 2,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 0],
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "o_lora_rank": 128,
}
ABOUT = {"format": 1, "model": {"name": "m", "fingerprint": "0"}, "prompts": [[1, 2]]}
MIXED = {"hidden_size": {"keep": 64, "method": "pca"}, "mtp": "drop"}


@dataclass
class Room:
    """Good files of every kind that the package reads, two layers of each."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def cut(parent: Path, out: Path, **keep: Any) -> None:
    store = {"dtype": "bf16", "max_shard_size": "1MB"}
    recipe = Recipe.model_validate({"name": "cut", "keep": keep, "store": store})
    with v4.open(parent) as opened:
        v4.slice(v4.plan(opened, recipe), out, workers=1)
        assert v4.verify(out, opened).passed


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    made = Room(tmp_path_factory.mktemp("hostile"))
    parent = parents.write_parent(made / "parent", changes=TINY)
    cut(parent, made / "replica", experts={"keep": 1, "by": "first"})
    cut(parent, made / "mixed", **MIXED)
    with v4.open(parent) as opened:
        v4.convert(opened, made / "official", "official", ranks=2)
        rng = np.random.default_rng(0)
        scores = {f"reap/n_routed_experts/layers.{i}.": rng.random(2, np.float32) for i in (0, 1)}
        moment = rng.random((128, 128), np.float32)
        scores["second_moment/hidden_size/model"] = moment @ moment.T
        write_scores(made / "scores", opened, scores)
    (made / "by.yaml").write_text("name: by\nkeep: {experts: {keep: 1, by: reap}}\n")
    keep = "keep: {hidden_size: {keep: 64, method: pca}, mtp: drop}\n"
    (made / "mix.yaml").write_text("name: mix\n" + keep)
    (made / "by1.yaml").write_text("name: by1\nkeep: {layers: 1, mtp: drop}\n")
    (made / "words.yaml").write_text(
        "name: words\nkeep: {vocab_size: {keep: 320, by: first}}\nstore: {dtype: native}\n"
    )
    with_tokenizer(train(), made / "spoken")
    cut(parent, made / "plain", mtp="drop")
    save_as_modules(made / "plain", made / "saved")
    begin(made)
    save_file(
        {"0/layers.0.out": rng.random((2, 4, 8), np.float32), "0/embed": np.ones((2, 8), "f4")},
        made / "trace",
        {"v4surgery.trace": json.dumps(ABOUT)},
    )
    shutil.copy(made / "trace", made / "other")
    return made


def save_as_modules(parent: Path, out: Path) -> None:
    """The parent's trunk as transformers saves it with ``save_original_format=False``."""
    stacks: dict[str, list[parents.RawTensor]] = {}
    for name, tensor in parents.read_tensors(parent).items():
        block = re.match(r"layers\.\d+\.|", name)[0]  # type: ignore[index]
        key = re.sub(r"experts\.\d+", "experts.{expert}", name.removeprefix(block))
        stacks.setdefault(f"model.{block}{SAVED_NAMES[key]}", []).append(tensor)
    found = {}
    for name, parts in stacks.items():  # experts in order, and of each w1 before w3
        *_, cols = parts[0].shape
        data = b"".join(part.data for part in parts)
        rows = len(data) // 2 // cols // EXPERTS if "mlp.experts." in name else 0
        shape = (EXPERTS, rows, cols) if rows else parts[0].shape
        found[name] = parents.RawTensor(parts[0].dtype, shape, data)
    config = json.loads((parent / "config.json").read_text())
    parents.write_checkpoint(out, config, {"model.safetensors": found}, index=False)


def begin(room: Room) -> None:
    """A slice that was stopped after its first chunks."""

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with v4.open(room / "parent") as opened:
        plan = v4.plan(opened, v4.load_recipe(room / "by1.yaml"))
        with contextlib.suppress(KeyboardInterrupt):
            v4.slice(plan, room / "begun", workers=1, progress=stop)
    assert (room / "begun" / ".v4surgery" / "journal.jsonl").is_file()


@dataclass(frozen=True)
class Surface:
    """A file that a stranger may have written, how it is damaged, and what reads it."""

    file: str
    edit: Callable[[random.Random, bytes], bytes]
    verb: str


JSON, HEADER, PAYLOAD = mutants.json_mutant, mutants.header_mutant, mutants.payload_mutant
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00005.safetensors"
VERIFY = "verify {0}/replica --parent {0}/parent"
VERIFY_MIXED = "verify {0}/mixed --parent {0}/parent"
SURFACES = {
    "config": Surface("parent/config.json", JSON, "inspect {0}/parent --context 4096 --compat"),
    "config, planned": Surface(
        "parent/config.json", JSON, "plan -r {0}/by.yaml -p {0}/parent --set keep.experts=1"
    ),
    "config, computed": Surface(
        "parent/config.json", JSON, "generate {0}/parent --ids 1,2,3 --max-new-tokens 2"
    ),
    "index": Surface(f"parent/{INDEX}", JSON, "inspect {0}/parent"),
    "shard": Surface(f"parent/{SHARD}", HEADER, "inspect {0}/parent"),
    "weights": Surface(
        f"parent/{SHARD}", PAYLOAD, "slice -r {0}/mix.yaml -p {0}/parent -o {0}/out"
    ),
    "record": Surface("replica/v4surgery.json", JSON, VERIFY),
    "record, inspected": Surface("replica/v4surgery.json", JSON, "inspect {0}/replica"),
    "record, as a parent": Surface(
        "replica/v4surgery.json", JSON, "slice -r {0}/by1.yaml -p {0}/replica -o {0}/out"
    ),
    "record of bases": Surface("mixed/v4surgery.json", JSON, VERIFY_MIXED),
    "recipe of a user": Surface("mix.yaml", mutants.text_mutant, "recipes check {0}/mix.yaml"),
    "recipe": Surface("replica/recipe.yaml", mutants.text_mutant, VERIFY),
    "replica's config": Surface("replica/config.json", JSON, VERIFY),
    "bases": Surface("mixed/v4surgery.bases", HEADER, VERIFY_MIXED),
    "values of bases": Surface("mixed/v4surgery.bases", PAYLOAD, VERIFY_MIXED),
    "scores": Surface("scores", HEADER, "plan -r {0}/by.yaml -p {0}/parent --scores {0}/scores"),
    "moments": Surface(
        "scores", HEADER, "slice -r {0}/mix.yaml -p {0}/parent --scores {0}/scores -o {0}/out"
    ),
    "values of moments": Surface(
        "scores", PAYLOAD, "slice -r {0}/mix.yaml -p {0}/parent --scores {0}/scores -o {0}/out"
    ),
    "official shard": Surface("official/model1-mp2.safetensors", HEADER, "inspect {0}/official"),
    "official config": Surface("official/config.json", JSON, "inspect {0}/official"),
    "official record": Surface("official/v4surgery.json", JSON, "inspect {0}/official"),
    "official scales": Surface("official/wo_a-scales.safetensors", HEADER, "inspect {0}/official"),
    "official weights": Surface(
        "official/model1-mp2.safetensors", PAYLOAD, "convert {0}/official {0}/out --to published"
    ),
    "values of official scales": Surface(
        "official/wo_a-scales.safetensors", PAYLOAD, "convert {0}/official {0}/out --to published"
    ),
    "saved shard": Surface("saved/model.safetensors", HEADER, "inspect {0}/saved"),
    "saved config": Surface("saved/config.json", JSON, "inspect {0}/saved"),
    "trace": Surface("trace", HEADER, "diff {0}/trace {0}/other"),
    "values of a trace": Surface("trace", PAYLOAD, "diff {0}/trace {0}/other"),
    "trace on the right": Surface("trace", HEADER, "diff {0}/other {0}/trace"),
    "journal": Surface(
        "begun/.v4surgery/journal.jsonl",
        mutants.text_mutant,
        "slice -r {0}/by1.yaml -p {0}/parent -o {0}/begun",
    ),
    "tokenizer": Surface(
        "spoken/tokenizer.json", JSON, "slice -r {0}/words.yaml -p {0}/spoken -o {0}/out"
    ),
    "tokenizer config": Surface(
        "spoken/tokenizer_config.json", JSON, "slice -r {0}/words.yaml -p {0}/spoken -o {0}/out"
    ),
}


def answer(room: Room, surface: Surface) -> tuple[int, str]:
    """Exit code and what was printed, of the verb on the damaged file."""
    out = io.StringIO()
    args = surface.verb.format(room.folder).split()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(args)
        except SystemExit as stop:
            code = stop.code or 0
    shutil.rmtree(room / "out", ignore_errors=True)
    return int(code), out.getvalue()


def problem_of(code: int, text: str) -> str | None:
    """What is wrong with an answer; None if it is a result, or a clear error."""
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    if "error: unexpected" in text or "Traceback" in text:
        return "an error that is not ours"
    if code in (1, 2) and not any(line.startswith("error: ") for line in text.splitlines()):
        return "no error"
    if len(text) > 30_000:
        return f"{len(text)} characters"
    odd = {char for char in text if not char.isprintable() and char != "\n"}
    return f"control characters {odd}" if odd else None


def fuzz(room: Room, surface: Surface, seed: int, num_mutants: int) -> tuple[list[str], list[int]]:
    """Problems of the answers to the good file and to so many mutants, and the exit codes."""
    rng = random.Random(seed)
    problems, codes = [], []
    path, folder = room / surface.file, room / surface.file.split("/")[0]
    kept = room / "kept"
    (shutil.copytree if folder.is_dir() else shutil.copy)(folder, kept)
    good = path.read_bytes()
    for number in range(num_mutants + 1):
        path.write_bytes(surface.edit(rng, good) if number else good)
        code, text = answer(room, surface)
        codes.append(code)
        if problem := problem_of(code, text):
            problems.append(f"mutant {number}: {problem}: {text[-SHOWN:]}")
        if not path.exists():  # a run that finished took its journal away
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
    if folder.is_dir():
        shutil.rmtree(folder)
    kept.replace(folder)
    return problems, codes


def check(name: str, room: Room, num_mutants: int) -> None:
    problems, codes = fuzz(room, SURFACES[name], zlib.crc32(name.encode()), num_mutants)
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems[:3])
    assert codes[0] == 0 and len(codes) == num_mutants + 1


@pytest.mark.parametrize("name", SURFACES)
def test_a_damaged_file_is_answered(name: str, room: Room) -> None:
    check(name, room, NUM_MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SURFACES)
def test_each_of_200_damaged_files_is_answered(name: str, room: Room) -> None:
    check(name, room, NUM_SLOW_MUTANTS)
