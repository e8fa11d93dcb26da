"""Dependencies: pinned within what users get, at their oldest too, under known licences."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "audit_dependencies.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_dependencies", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pins_ranges_and_licences_fit_together() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pin_outside_its_range_is_told(audit: ModuleType) -> None:
    ranges = audit.read_ranges(ROOT / "pyproject.toml")
    pins = audit.read_pins(ROOT / "constraints.txt")
    assert not list(audit.pin_problems(ranges, pins))
    told = list(audit.pin_problems(ranges, {**pins, "typer": "0.15.4"}))
    assert told == ["typer: the pin 0.15.4 is outside >=0.18"]
    del pins["numpy"]
    assert list(audit.pin_problems(ranges, pins)) == ["numpy: no pin in constraints.txt"]


def test_bound_that_is_not_tested_is_told(audit: ModuleType) -> None:
    ranges = audit.read_ranges(ROOT / "pyproject.toml")[:13]
    minimal = audit.read_pins(ROOT / "constraints-minimal.txt")
    assert not list(audit.bound_problems(ranges, minimal))
    told = list(audit.bound_problems(ranges, {**minimal, "numpy": "2.0.0"}))
    assert told == ["numpy: the lower bound is 1.26, tested is 2.0.0"]


def test_package_that_is_installed_in_another_version_is_told(audit: ModuleType) -> None:
    assert len(list(audit.installed_problems({"numpy": "0.1"}))) == 1
    assert not audit.KNOWN_LICENCES.search("Proprietary")
