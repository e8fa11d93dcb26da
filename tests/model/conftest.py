"""Small models of every layer kind, ours and transformers' from the same folder.

All are synthetic parents in the published layout (FP4, FP8 and bf16 weights) and what the slicer
makes of them, so that nothing but the forward is compared: the bf16 replicas hold the parent's
values exactly, and both sides compute in float32.

Top-k of the indexer: where many scores are exactly zero (relu with few heads), which of the equal
entries wins differs between torch.topk and our stable order. The models have 16 index heads, with
which no two of a query's scores are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import v4surgery.api as v4
from v4surgery.checkpoint.reader import open_checkpoint
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.model.transformer import Transformer
from v4surgery.recipes.schema import Recipe
from v4surgery.synth import plan_synthesis, write_synthesis

VOCAB = 256
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_lora_rank": 64,
    "o_groups": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 24,
    "sliding_window": 32,
    "max_position_embeddings": 1024,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 64},
    "num_nextn_predict_layers": 0,
}
# Ratios 0, 4 and 128 behind hash and score layers; then another ratio, sigmoid scores.
KINDS = {"compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 2}
OTHER = {"compress_ratios": [16, 4, 0], "num_hash_layers": 1, "scoring_func": "sigmoid"}
WITH_DRAFTER = {
    "compress_ratios": [0, 4, 0],
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 1,
}
BF16_RECIPE = Recipe(name="identity", store={"dtype": "bf16"})
CUT_RECIPE = Recipe(
    name="cut",
    keep={
        "hidden_size": 96,
        "experts": {"keep": 4, "by": "first", "per_token": 2},
        "moe_intermediate_size": 32,
        "heads": {"groups": 2, "per_group": 2},
        "head_dim": {"nope": 16, "rope": 16},
        "q_lora_rank": 48,
        "o_lora_rank": 32,
        "indexer": {"head_dim": 48},
        "sliding_window": 24,
    },
    store={"dtype": "bf16"},
)


@dataclass
class Models:
    """Folders of checkpoints, each made once in a session.

    Attributes:
        root: Where they are made.
        made: Folders by what they are.
    """

    root: Path
    made: dict[str, Path] = field(default_factory=dict)
    theirs: dict[Path, torch.nn.Module] = field(default_factory=dict)

    def parent(self, **changes: Any) -> Path:
        """A synthetic parent: the small dimensions, changed."""
        key = repr(sorted(changes.items()))
        if key not in self.made:
            ratios = changes["compress_ratios"]
            layers = len(ratios) - changes.get("num_nextn_predict_layers", 0)
            synthesis = plan_synthesis("demo", layers=layers, changes={**SMALL, **changes})
            self.made[key] = self.root / str(len(self.made))
            write_synthesis(synthesis, self.made[key])
        return self.made[key]

    def replica(self, recipe: Recipe, **changes: Any) -> Path:
        """A parent through the slicer."""
        key = recipe.name + repr(sorted(changes.items()))
        if key not in self.made:
            plan = v4.plan(open_checkpoint(self.parent(**changes)), recipe)
            self.made[key] = self.root / str(len(self.made))
            v4.slice(plan, self.made[key])
        return self.made[key]

    def bf16(self, **changes: Any) -> Path:
        """A parent with every weight decoded to bf16, which is exact."""
        return self.replica(BF16_RECIPE, **changes)

    def kinds(self) -> Path:
        return self.bf16(**KINDS)

    def other(self) -> Path:
        return self.bf16(**OTHER)

    def cut(self) -> Path:
        return self.replica(CUT_RECIPE, **KINDS)

    def hugging(self, folder: Path) -> torch.nn.Module:
        """transformers' model of a folder, float32."""
        if folder not in self.theirs:
            from transformers import DeepseekV4ForCausalLM

            model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            self.theirs[folder] = model.float().eval()
        return self.theirs[folder]

    def ours(self, folder: Path, **options: Any) -> Transformer:
        """Our model of a folder, mode exact, float32."""
        return load_model(open_checkpoint(folder), Numerics(), **options)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random token ids of a shape, the same in every run of a test."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, VOCAB, shape, generator=generator)

    return draw
