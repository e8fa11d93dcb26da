"""Replicas to push, cut into several shards and verified; and a Hub on loopback to push to."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import v4surgery as v4
from tests.cli.conftest import v4 as cli  # noqa: F401 - the command line, as a fixture
from tests.hub.support import TOKEN
from tests.support import parents
from tests.support.hub import LoopbackHub, hub_environment
from tests.support.hub.write import Writes, add_routes
from v4surgery.checkpoint.patience import Patience
from v4surgery.recipes import Recipe

COMMIT = "60d8d70770c6776ff598c94bb586a859a38244f1"


def recipe(**fields: Any) -> Recipe:
    """A cut of experts and layers (the last comes from elsewhere), in shards up to 1 MB."""
    layers = {"count": 3, "compress_ratios": [0, 4, 4]}
    keep = {"experts": {"keep": 2, "by": "gate"}, "layers": layers}
    store = {"dtype": "bf16", "max_shard_size": "1MB", "layout": "packed"}
    data = {"name": "half", "description": "Half of it.", "keep": keep, "store": store}
    return Recipe.model_validate(data | fields)


def cut_and_verify(parent: Path, out: Path, **fields: Any) -> Path:
    with v4.open(parent) as checkpoint:
        v4.slice(v4.plan(checkpoint, recipe(**fields)), out)
        assert v4.verify(out, checkpoint).passed
    return out


@pytest.fixture(scope="session")
def published(small_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small parent with the looks of a V4-Flash in the Hub's cache, not of a synthetic one."""
    cache = tmp_path_factory.mktemp("cache") / "models--deepseek-ai--DeepSeek-V4-Flash"
    folder = cache / "snapshots" / COMMIT
    shutil.copytree(small_parent, folder)
    (folder / "v4surgery.json").unlink()
    return folder


@pytest.fixture(scope="session")
def _pushable(small_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_verify(small_parent, tmp_path_factory.mktemp("pushable") / "replica")


@pytest.fixture
def replica(_pushable: Path, tmp_path: Path) -> Path:
    """A verified replica in three shards, the test's own to spoil."""
    return parents.copy_checkpoint(_pushable, tmp_path / "replica")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a push, or huggingface_hub for it, would have waited; nobody does."""
    seconds: list[float] = []

    def wait(_: threading.Event, pause: float) -> bool:
        seconds.append(pause)
        return False

    monkeypatch.setattr("v4surgery.hub.client.Patience", partial(Patience, wait=wait))
    slept = SimpleNamespace(sleep=seconds.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", slept)
    return seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """huggingface_hub 2.4 hands uploads to httpx in a way that httpx has deprecated."""
    mark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(mark)


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]
) -> Iterator[LoopbackHub]:
    """An empty Hub; the user ``me`` is logged in with :data:`TOKEN`."""
    with LoopbackHub() as started:
        hub_environment(monkeypatch, started, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", started.add_token(TOKEN, "me"))
        yield started


@pytest.fixture
def writes(hub: LoopbackHub) -> Writes:
    """What reaches the Hub."""
    return add_routes(hub)
