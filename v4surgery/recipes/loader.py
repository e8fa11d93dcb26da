"""Recipes from files, text and overrides: all problems at once, each at its file and line.

Built-in recipes go by bare names; anything with a path separator or a .yaml suffix is a file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from v4surgery.errors import RecipeError, UsageError
from v4surgery.recipes._nodes import (
    CORE_TAG,
    FLOAT,
    INT,
    MAX_DEPTH,
    Node,
    Place,
    Problem,
    Source,
    merged,
    read_nodes,
    shortened,
    show,
)
from v4surgery.recipes._problems import schema_problems, section_at
from v4surgery.recipes.schema import Recipe

__all__ = ["builtin_names", "builtin_path", "dump_recipe", "load_recipe", "recipe_from_text"]

MAX_BYTES = 1_000_000
MAX_EXTENDS = 8

_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_OVERRIDE_RANK = MAX_EXTENDS + 1
_HINT = "docs/recipes.md lists every key; `v4surgery recipes show mini3b` prints a whole recipe"


def builtin_names() -> list[str]:
    """The names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _BUILTIN_FOLDER.glob("*.yaml"))


def builtin_path(name: str) -> Path:
    """Where the built-in recipe ``name`` stands.

    Raises:
        UsageError: There is no such built-in recipe.
    """
    names = builtin_names()
    if name in names:
        return _BUILTIN_FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=3)
    rule = f"did you mean {', '.join(near)}?" if near else f"one of: {', '.join(names)}"
    raise UsageError(
        "no built-in recipe has this name",
        value=show(name),
        rule=rule,
        hint=f"`v4surgery recipes list` prints them; a file needs a path such as "
        f"{_printable('./' + name)}",
    )


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe of a built-in name or a file, with the overrides applied.

    Args:
        name_or_path: A built-in name, or a path with a separator or a .yaml suffix.
        overrides: ``dotted.key=value`` each, the value in YAML.

    Raises:
        UsageError: Neither a built-in recipe nor a file that can be read.
        RecipeError: The recipe or an override has problems; it holds all of them.
    """
    path, source = _target(os.fspath(name_or_path), None, 0, is_path=_is_path(name_or_path))
    problems: list[Problem] = []
    text = _read_text(path, source, problems)
    if text is None:
        raise _recipe_error(source, problems)
    return _resolve(text, source, path, overrides, problems)


def recipe_from_text(
    text: str, source: str, overrides: Sequence[str] = (), *, is_whole: bool = False
) -> Recipe:
    """Returns the recipe that ``text`` holds; ``source`` is named in errors.

    A relative ``extends`` starts at the folder of ``source``; with ``is_whole`` it is a problem,
    and no file is opened.

    Raises:
        RecipeError: The recipe or an override has problems; it holds all of them.
    """
    problems: list[Problem] = []
    named = Source(_printable(source, 200))
    if len(text) > MAX_BYTES:
        problems.append(Problem(Place(named, 1), (), _too_large()))
        raise _recipe_error(named, problems)
    return _resolve(text, named, None if is_whole else Path(source), overrides, problems)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML: keys in the schema's order, defaults left out; loads back equal."""
    plain = recipe.model_dump(by_alias=True, exclude_defaults=True)
    return yaml.dump(
        _shortest(plain), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def _resolve(
    text: str, source: Source, path: Path | None, overrides: Sequence[str], problems: list[Problem]
) -> Recipe:
    root = _tree(text, source, [] if path is None else [path], problems)
    if root is None:
        raise _recipe_error(source, problems)
    for index, override in enumerate(overrides):
        _override(root, override, _OVERRIDE_RANK + index, problems)
    recipe = None
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        problems += schema_problems(error, root)
    if problems or recipe is None:
        raise _recipe_error(source, problems)
    return recipe


def _recipe_error(source: Source, problems: list[Problem]) -> RecipeError:
    ordered = sorted(problems, key=lambda problem: (problem.place.source.rank, problem.place.line))
    lines = list(dict.fromkeys(str(problem) for problem in ordered))
    return RecipeError(source.label, lines, hint=_HINT)


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    if not isinstance(name_or_path, str):
        return True
    return "/" in name_or_path or os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def _target(name: str, folder: Path | None, rank: int, *, is_path: bool) -> tuple[Path, Source]:
    if not is_path:
        return builtin_path(name), Source(f"built-in {name}.yaml", rank)
    path = Path(name) if folder is None else folder / name
    return path, Source(_printable(os.path.normpath(path), 200), rank)


def _too_large() -> str:
    return f"is larger than {MAX_BYTES} bytes; a recipe is smaller"


def _read_text(path: Path, source: Source, problems: list[Problem]) -> str | None:
    """The text of a file, or None after a problem was noted; a UsageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "not a path to a file"
        raise UsageError(
            f"the recipe cannot be read: {reason}",
            where=source.label,
            hint="`v4surgery recipes list` prints the built-in recipes",
        ) from None
    if len(data) > MAX_BYTES:
        problems.append(Problem(Place(source, 1), (), _too_large()))
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02X}"
        problems.append(Problem(Place(source, line), (), "is not UTF-8 text", f"byte {byte}"))
        return None


def _tree(text: str, source: Source, chain: list[Path], problems: list[Problem]) -> Node | None:
    """The tree of a text laid over all that it extends.

    ``chain`` ends with its own path; empty where it may not extend anything.
    """
    root = read_nodes(text, source, problems)
    if root is None or not isinstance(root.value, dict):
        return root
    extends = root.value.pop("extends", None)
    if extends is None or extends.broken or extends.value is None:
        return root
    base = _extended(extends, source, chain, problems)
    return None if base is None else merged(base, root)


def _extended(
    extends: Node, source: Source, chain: list[Path], problems: list[Problem]
) -> Node | None:
    try:
        path, base = _extends_target(extends.value, source, chain)
        text = _read_text(path, base, problems)
    except UsageError as error:
        message = f"{error.what}; {error.rule}" if error.rule else error.what
        got = show(extends.plain())
        problems.append(Problem(extends.shown_place, ("extends",), message, got))
        return None
    return None if text is None else _tree(text, base, [*chain, path], problems)


def _extends_target(name: object, source: Source, chain: list[Path]) -> tuple[Path, Source]:
    if not chain:
        raise UsageError("a recipe that was resolved extends nothing")
    if not isinstance(name, str):
        raise UsageError("must be the name of a built-in recipe, or a path")
    if source.rank == MAX_EXTENDS:
        raise UsageError(f"goes through more than {MAX_EXTENDS} recipes")
    path, base = _target(name, chain[-1].parent, source.rank + 1, is_path=_is_path(name))
    if _same_file(path, chain):
        raise UsageError("goes round in a circle: this recipe is extended already")
    return path, base


def _same_file(path: Path, chain: list[Path]) -> bool:
    try:
        return path.resolve() in [other.resolve() for other in chain]
    except (OSError, ValueError, RuntimeError):
        return False


def _override(root: Node, text: str, rank: int, problems: list[Problem]) -> None:
    """Lays one `dotted.key=value` on the tree, or notes what is wrong with it."""
    place = Place(Source(f"--set {_printable(text)}", rank, numbered=False), 0)
    key, equals, value = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts) or not key.isprintable() or len(parts) >= MAX_DEPTH:
        problems.append(Problem(place, (), "must be dotted.key=value"))
        return
    if parts[0] == "extends":
        problems.append(Problem(place, parts, "stands in a file only; pass that file instead"))
        return
    node = Node(None, place)
    if value.strip():
        read = read_nodes(value, place.source, problems)
        if read is None:
            return
        node = read
    section = _mapping_at(root, parts[:-1], place, problems)
    if section is not None:
        node.key_place = place
        section[parts[-1]] = node


def _mapping_at(
    root: Node, path: tuple[str, ...], place: Place, problems: list[Problem]
) -> dict[str, Node] | None:
    """The mapping at ``path``, made on the way where there is none or only a short form."""
    node = root
    for depth in range(len(path) + 1):
        if node.value is None:
            node.value, node.place = {}, place
        section = section_at(path[:depth])
        if not isinstance(node.value, dict) and section is not None:
            long = section.long_form(node.value)
            if isinstance(long, dict):
                inner = {
                    key: Node(node.value if value is node.value else value, node.place)
                    for key, value in long.items()
                }
                node.value = inner
        if not isinstance(node.value, dict):
            message = "there is no mapping to set a key in"
            problems.append(Problem(place, path[:depth], message, show(node.plain())))
            return None
        if depth < len(path):
            node = node.value.setdefault(path[depth], Node(None, place, place))
    return node.value if isinstance(node.value, dict) else None


def _printable(text: str, limit: int = 60) -> str:
    return shortened(text if text.isprintable() else ascii(text), limit)


class _Dumper(yaml.SafeDumper):
    """Quotes what either this loader or a YAML 1.1 reader would take for something else."""


for _kind, _pattern in (("int", INT), ("float", FLOAT)):
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Dumper.add_implicit_resolver(CORE_TAG + _kind, _whole, list("-+.0123456789"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(CORE_TAG + "str", text, style=style)


def _represent_mapping(dumper: yaml.SafeDumper, mapping: dict[str, Any]) -> yaml.Node:
    nested = any(isinstance(value, dict) for value in mapping.values())
    block = nested or "name" in mapping
    return dumper.represent_mapping(CORE_TAG + "map", mapping.items(), flow_style=not block)


def _represent_list(dumper: yaml.SafeDumper, items: Sequence[Any]) -> yaml.Node:
    return dumper.represent_sequence(CORE_TAG + "seq", items, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(dict, _represent_mapping)
_Dumper.add_representer(tuple, _represent_list)


def _shortest(value: Any) -> Any:
    """Mappings that an int is short for become that int."""
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (only := next(iter(value))) in ("keep", "count"):
        inner = value[only]
        if isinstance(inner, int):
            return inner
    return {key: _shortest(item) for key, item in value.items()}
