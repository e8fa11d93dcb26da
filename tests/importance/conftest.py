"""A small parent of every layer kind with a drafter, scored and traced on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import v4surgery as v4
from tests.importance.brute_force import Measured
from tests.slicers import reference
from tests.slicers.conftest import ODD
from tests.support import parents
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.model.cache import Cache, LayerCache, Progress
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.validation.record import record_trace
from v4surgery.validation.taps import MODEL_TAPS, TAPS, TapRecorder

LENGTHS = (40, 7, 1, 18)


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations are tiny; and so that sums come out the same, bit for bit, in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@dataclass
class Scored:
    """A parent, its prompts, its scores file, and its activations.

    Attributes:
        parent: The checkpoint.
        prompts: Token ids.
        path: The scores file, second moments included.
        weights: Decoded, by stem.
        trace: Every tap of every block, drafter included.
    """

    parent: Checkpoint
    prompts: list[list[int]]
    path: Path
    weights: dict[str, Any]
    trace: dict[str, Any]

    @property
    def scores(self) -> dict[str, np.ndarray]:
        loaded: dict[str, np.ndarray] = load_file(self.path)
        return loaded

    def of(self, prefix: str) -> Measured:
        """What brute force needs of one block."""
        config = json.loads(self.parent.read_file("config.json"))
        ratios = {block.prefix: block.ratio for block in self.parent.catalogue.blocks}
        ratio = ratios.get(prefix, 0)
        return Measured(self.weights, config, self.trace, len(self.prompts), prefix, ratio)


def draw_prompts(vocab: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(vocab, size=length).tolist() for length in lengths]


@pytest.fixture(scope="session")
@one_thread()
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("scored")
    path = parents.write_parent(folder / "parent", changes=ODD)
    parent = v4.open(path)
    prompts = draw_prompts(parent.config.vocab_size)
    v4.score(
        parent,
        prompts,
        folder / "scores.safetensors",
        second_moments=("hidden_size", "q_lora_rank", "o_lora_rank", "heads"),
        workers=1,
    )
    taps = (*MODEL_TAPS, *TAPS)
    record_trace(parent, prompts, folder / "trace", taps=taps, numerics=Numerics())
    trace = {**load_file(folder / "trace"), **drafter_taps(parent, prompts)}
    weights = reference.decode(parents.read_tensors(path))
    return Scored(parent, prompts, folder / "scores.safetensors", weights, trace)


@torch.no_grad()
def drafter_taps(parent: Checkpoint, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """Taps of the drafter in the resident model, run as spec/forward.md says."""
    model = load_model(parent, Numerics(), drafters=True)
    seen: dict[str, np.ndarray] = {}
    recorder = TapRecorder(tuple(TAPS), lambda name, value: seen.update({name: value.numpy()}))
    for number, prompt in enumerate(prompts):
        if len(prompt) < 2:
            continue
        ids = torch.tensor([prompt])
        h, _ = model.run_blocks(ids, Cache())
        drafter = model.mtp[0]
        detach = recorder(drafter, "mtp.0.", number)
        progress = Progress.start(1, ids.device).advance(len(prompt) - 1)
        drafter.draft(h[:, :-1], model.embed(ids[:, 1:]), ids[:, 1:], progress, LayerCache())
        detach()
    return seen
