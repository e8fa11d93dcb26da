"""transformers as the independent reader of what v4surgery writes.

Nothing here shares code with the package: transformers reads config.json and the safetensors files
by itself, and the map of its parameters to the published names is written out by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

import v4surgery as v4
from v4surgery.recipes import Recipe


class Loaded(NamedTuple):
    """A model, and what transformers says about its keys."""

    model: PreTrainedModel
    missing: set[str]
    unexpected: set[str]
    mismatched: set[str]


def cut(parent: Path, recipe: Recipe | str, out: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Open, plan, slice; gives the replica's folder."""
    with v4.open(parent) as checkpoint:
        return v4.slice(v4.plan(checkpoint, recipe, overrides), out).path


def recipe(keep: dict[str, object], **fields: object) -> Recipe:
    return Recipe.model_validate({"name": "replica", "keep": keep, **fields})


def load(path: Path, dtype: torch.dtype | str) -> Loaded:
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        output_loading_info=True,
        dtype=dtype,
        # The default, grouped_mm, takes up to five times as long in bf16 on a CPU.
        experts_implementation="eager",
    )
    return Loaded(
        model.eval(),
        set(info["missing_keys"]),
        set(info["unexpected_keys"]),
        {str(key) for key in info["mismatched_keys"]},
    )


def load_with_drafters_reported(path: Path, dtype: torch.dtype) -> Loaded:
    """As :func:`load`, without transformers' own rule that says nothing about ``mtp.*``."""
    with pytest.MonkeyPatch.context() as patch:
        assert DeepseekV4PreTrainedModel._keys_to_ignore_on_load_unexpected == [r"(^|\.)mtp\..*"]
        patch.setattr(DeepseekV4PreTrainedModel, "_keys_to_ignore_on_load_unexpected", None)
        return load(path, dtype)


def load_whole(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """A model in which every parameter comes from the files, and no key of theirs is left over."""
    loaded = load(path, dtype)
    assert (loaded.missing, loaded.unexpected, loaded.mismatched) == (set(), set(), set())
    return loaded.model


def token_ids(vocab_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, int64 ``(1, S)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (1, length), generator=generator)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one prefill, float32 ``(S, V)``."""
    return model(input_ids=ids, use_cache=False).logits[0].float()


def assert_alive(logits: torch.Tensor) -> None:
    """Finite, and neither constant over the vocabulary nor over the positions."""
    assert torch.isfinite(logits).all()
    spread = logits.std()
    assert spread > 0.01
    assert logits.std(dim=1).min() > 0.1 * spread
    assert logits.std(dim=0).median() > 0.1 * spread


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, as safetensors reads it."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors
