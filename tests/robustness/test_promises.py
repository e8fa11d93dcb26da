"""docs/reliability.md: every test that it names is there, and every module here is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "tests/" in line]
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    assert len(ROWS) > 20
    for file, name in NAMED:
        path = ROOT / file
        assert path.is_file(), file
        assert not name or name in functions(path), f"{file}::{name}"


def test_every_module_of_promises_is_named() -> None:
    modules = {f"tests/robustness/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert modules - {file for file, _ in NAMED} == {f"tests/robustness/{Path(__file__).name}"}


def test_every_row_has_a_test_and_a_figure() -> None:
    for row in ROWS:
        promise, test, measured = (cell.strip() for cell in row.strip("|").split("|"))
        assert promise and "`tests/" in test and measured, row
