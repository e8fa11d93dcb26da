"""Parents that several test modules read; written once, never edited."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before numpy and torch are loaded: models are tiny, and several test workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support import parents

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Interpret Triton kernels on the CPU, unless the tests that need a GPU were asked for."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def demo_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``v4surgery synth --like demo``, seed 0."""
    return parents.write_parent(tmp_path_factory.mktemp("parents") / "demo")


@pytest.fixture(scope="session")
def small_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a parent of every layer kind and a few hundred KB: quick to copy and to spoil."""
    return parents.write_small_parent(tmp_path_factory.mktemp("parents") / "small")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of shared/golden: files that this project did not write."""
    path = Path(os.environ.get("V4SURGERY_GOLDEN") or REPOSITORY.parent / "shared" / "golden")
    if not path.is_dir():
        pytest.skip(f"golden files are not at {path}; set V4SURGERY_GOLDEN to their folder")
    return path


@pytest.fixture(scope="session")
def tiny_v4(golden: Path) -> Path:
    """Folder of golden/tiny-v4: one file, no index, FP4 and FP8, MTP."""
    path = golden / "tiny-v4"
    if not path.is_dir():
        pytest.skip(f"no tiny-v4 in {golden}")
    return path
