"""The parent in the box is trained, is what its card says, and stands wherever a folder does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import v4surgery
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import CheckpointError, UsageError
from v4surgery.importance.scores_file import ScoresFile
from v4surgery.model.generate import generate
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.model.transformer import Transformer
from v4surgery.parents import boxed_file, parent_folder, parent_names
from v4surgery.recipes import load_recipe
from v4surgery.text.prompts import read_prompts
from v4surgery.text.tokenizer import Tokenizer, read_tokenizer

NAME = "python-14m"


@pytest.fixture(scope="module")
def parent() -> Iterator[Checkpoint]:
    with v4surgery.open(NAME) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(parent: Checkpoint) -> Transformer:
    return load_model(parent, Numerics())


@pytest.fixture(scope="module")
def tokenizer(parent: Checkpoint) -> Tokenizer:
    found = read_tokenizer(parent)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def held_out(tokenizer: Tokenizer) -> Tensor:
    """Windows of 512 held-out tokens."""
    ids: list[int] = []
    for prompt in read_prompts(Path(NAME)):
        assert prompt.text is not None
        ids += [*tokenizer.encode(prompt.text), 1]
    return torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)


def test_it_has_every_kind_of_layer_and_a_drafter(parent: Checkpoint) -> None:
    assert parent_names() == [NAME] and parent.name == NAME
    kinds = {(block.ratio, block.is_hash) for block in parent.catalogue.blocks}
    assert kinds == {(ratio, is_hash) for ratio in (0, 4, 128) for is_hash in (True, False)}
    formats = {stored.fmt for stored in parent.tensors.values()}
    assert parent.config.num_drafters == 1 and formats == {"FP4", "FP8", "BF16", "F32", "I64"}


def test_it_knows_held_out_text_as_well_as_its_card_says(
    model: Transformer, held_out: Tensor
) -> None:
    rows = held_out[::16]
    with torch.no_grad():
        logits = model(rows)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    card = (parent_folder(NAME) or Path()).joinpath("README.md").read_text()
    stated = re.search(r"\*\*([\d.]+) nats a token\*\*", card)
    assert stated is not None
    # A sixteenth of the windows, half as long as the card's: a sample, of documents that differ by
    # half a nat and more. An untrained model has ln(4096) = 8.3.
    assert loss == pytest.approx(float(stated[1]), abs=0.3)


def test_it_writes_python(model: Transformer, tokenizer: Tokenizer) -> None:
    prompt = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self."
    (found,) = generate(model, [tokenizer.encode(prompt)], max_new_tokens=5)
    assert tokenizer.decode(found.ids).startswith("y = y\n")


def test_transformers_computes_the_same(
    model: Transformer, held_out: Tensor, parent: Checkpoint, tmp_path: Path
) -> None:
    from transformers import DeepseekV4ForCausalLM

    folder = tmp_path / "bf16"  # exact; without a GPU transformers computes FP8 models in bf16
    v4surgery.convert(parent, folder, "bf16")
    theirs, report = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    ids = held_out[3:4, :200]
    with torch.no_grad():
        expected, actual = theirs.eval()(ids).logits, model(ids)
    # Two float32 forwards of ten layers; see tests/model/test_transformers.py.
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_its_scores_are_its_own_and_a_name_stands_for_them(parent: Checkpoint) -> None:
    scores = ScoresFile(Path(NAME))
    scores.require_parent(parent)
    with safe_open(boxed_file(Path(NAME), "scores.safetensors"), "numpy") as file:
        assert set(file.keys()) == scores.keys
    assert "second_moment/hidden_size/model" in scores.keys
    plan = v4surgery.plan(parent, load_recipe("python-8m"))
    assert plan.recipe.scores_blake3 == scores.blake3


def test_a_folder_of_its_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    with pytest.raises(CheckpointError, match="config"):
        v4surgery.open(NAME)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(Path(NAME))


def test_names_that_lead_out_of_the_box_are_none() -> None:
    for name in ("../parents/python-14m", "python-14m/..", "", ".", "python-14m/"):
        assert parent_folder(name) is None, name
