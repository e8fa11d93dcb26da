from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import v4surgery
from tests.support.parents import write_parent
from tests.validation.masked_support import KEEP, TINY, Case, make_case
from v4surgery.checkpoint.reader import Checkpoint


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a very small parent of every layer kind."""
    return write_parent(tmp_path_factory.mktemp("tiny") / "parent", changes=TINY)


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Checkpoint]:
    with v4surgery.open(tiny_path) as parent:
        yield parent


@pytest.fixture(scope="session")
def tiny_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("tiny"), TINY, KEEP)


@pytest.fixture(scope="session")
def compensated_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("compensated"), TINY, KEEP, compensate=True)


@pytest.fixture(scope="session")
def blocks_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two of three blocks of 128 channels, in the parent's bytes."""
    changes = {
        **TINY,
        "hidden_size": 384,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 0],
        "q_lora_rank": 128,
        "o_groups": 1,
        "num_attention_heads": 2,
    }
    keep = {"hidden_size": [*range(256, 384), *range(128)]}
    folder = tmp_path_factory.mktemp("blocks")
    return make_case(folder, changes, keep, store={"dtype": "native"})
