"""A parent of every layer kind in FP4 and FP8, its norms unlike 1, and replicas of it.

16 index heads, so that no two scores of the indexer are equal (see tests/model/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.slicers.conftest import Cut, Cutter, Parent, cutter
from tests.support import parents
from v4surgery.checkpoint.reader import open_checkpoint
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics

CHANGES: dict[str, Any] = {
    **parents.SMALL,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "index_n_heads": 16,
    "index_topk": 24,
    "sliding_window": 32,
    # Norms over fewer units differ by their factor alone.
    "rms_norm_eps": 1e-12,
    "hc_eps": 1e-12,
}
D, Q, L = (CHANGES[name] for name in ("hidden_size", "q_lora_rank", "o_lora_rank"))
TOKENS = 150
F32 = {"dtype": "f32"}


def methods(hidden: int = D, q: int = Q, o: int = L) -> dict[str, Any]:
    """Every method at once."""
    return {
        "hidden_size": {"keep": hidden, "method": "pca"},
        "q_lora_rank": {"keep": q, "method": "pca"},
        "o_lora_rank": {"keep": o, "method": "svd"},
        "mtp": "drop",
    }


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Parent:
    out = tmp_path_factory.mktemp("methods") / "parent"
    return Parent(parents.write_parent(out, changes=CHANGES))


@pytest.fixture(scope="session")
def half(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """Half of each of the three axes, by every method, in bf16."""
    return cutter(tmp_path_factory.mktemp("half"))(parent, methods(D // 2, Q // 2, L // 2))


@pytest.fixture
def cut(tmp_path: Path) -> Cutter:
    (tmp_path / "replicas").mkdir()
    return cutter(tmp_path / "replicas")


Logits = Callable[[Path], Tensor]


@torch.no_grad()
def logits_of(path: Path, vocab_size: int = CHANGES["vocab_size"]) -> Tensor:
    """Logits of our own forward on random tokens, float32 ``(S, V)``."""
    ids = random_tokens(vocab_size)
    logits: Tensor = load_model(open_checkpoint(path), Numerics())(ids)[0]
    return logits


def random_tokens(vocab_size: int = CHANGES["vocab_size"]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, TOKENS), generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()
