"""Parents of every variant, wide enough to be cut for eight ranks in whole blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import _plain_terminal, start, v4  # noqa: F401 - the command line
from tests.hub.conftest import hub, waits  # noqa: F401 - a Hub on loopback
from tests.support.parents import write_parent

EXPERTS = 8
WIDE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "head_dim": 128,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "o_groups": 8,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "index_n_heads": 8,
    "index_topk": 16,
}
DSPARK: dict[str, Any] = {"dspark_noise_token_id": 7, "dspark_markov_rank": 16}
VARIANTS = ("flash", "flash-base", "flash-0731", "pro-0813")


def write_wide(out: Path, like: str, **changes: Any) -> Path:
    """A parent of five layers: sliding or HCA, CSA, HCA, CSA, with its drafters."""
    dspark = DSPARK if like in ("flash-0731", "pro-0813") else {}
    return write_parent(out, like, layers=5, changes={**WIDE, **dspark, **changes})


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each variant."""
    folder = tmp_path_factory.mktemp("wide")
    return {like: write_wide(folder / like, like) for like in VARIANTS}
