"""What pydantic found, in our words, at the file and line where the value stands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import ValidationError

from v4surgery.recipes._nodes import KeyPath, Node, Problem, dotted, show
from v4surgery.recipes.schema import Recipe, Section

__all__ = ["schema_problems", "section_at"]

_WORDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must have at least {min_length} entry",
    "too_long": "must have at most {max_length} entries",
}

_PUBLISHED_NAMES = {
    "num_hidden_layers": "keep.layers.count",
    "num_hash_layers": "keep.layers.hash_layers",
    "n_routed_experts": "keep.experts",
    "num_experts_per_tok": "keep.experts.per_token",
    "num_attention_heads": "keep.heads.per_group",
    "o_groups": "keep.heads.groups",
    "qk_rope_head_dim": "keep.head_dim.rope",
    "index_n_heads": "keep.indexer.heads",
    "index_head_dim": "keep.indexer.head_dim",
    "index_topk": "keep.indexer.topk",
    "num_nextn_predict_layers": "keep.mtp",
    "torch_dtype": "store.dtype",
}
"""Where the fields of config.json that a recipe spells otherwise are found."""


def schema_problems(error: ValidationError, root: Node) -> Iterator[Problem]:
    """Yields a problem for each error that does not follow from one noted before."""
    for item in error.errors(include_url=False, include_input=False):
        loc: KeyPath = item["loc"]
        node, path, found = _locate(root, loc)
        if node.broken:
            continue
        if item["type"] == "extra_forbidden":
            place = node.key_place or node.place
            yield Problem(place, path, _unknown_key(loc))
            continue
        value = node.plain() if found else None
        message = _message(item["type"], item.get("ctx", {}), loc, value) or item["msg"]
        yield Problem(node.shown_place, path, message, show(value) if found else None)


def _locate(root: Node, loc: KeyPath) -> tuple[Node, KeyPath, bool]:
    """The node at ``loc``, or where there is none the one above; its path; whether it is there.

    Short forms end the walk early: what pydantic calls hidden_size.keep stands at hidden_size.
    """
    node = root
    path: KeyPath = ()
    for part in loc:
        if isinstance(part, str) and part.startswith("("):
            continue  # which form of a field was tried, no key
        if isinstance(node.value, dict) and isinstance(part, str):
            path = (*path, part)
            if part not in node.value:
                return node, path, False
            node = node.value[part]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node, path = node.value[part], (*path, part)
    return node, path, True


def _message(kind: str, ctx: Mapping[str, Any], loc: KeyPath, value: object) -> str | None:
    section = section_at(loc)
    if kind in ("model_type", "model_attributes_type") and section is not None:
        return section.form
    if kind == "missing":
        return f"missing: {_described(loc)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", ctx["expected"])
        near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"must be one of: {', '.join(choices)}{meant}"
    if kind == "string_type" and value is not None and not isinstance(value, list | dict):
        return "must be text; put it in quotes"
    words = _WORDS.get(kind)
    return words.format(**ctx) if words is not None else None


@cache
def _fields(section: type[Section]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _described(loc: KeyPath) -> str:
    section = section_at(loc[:-1])
    field = _fields(section).get(str(loc[-1])) if section is not None else None
    text = (field.description if field is not None else None) or "it has to be given"
    return text[0].lower() + text[1:].rstrip(".")


def _section_in(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section_in(arg) for arg in get_args(annotation))
    return next((section for section in inner if section is not None), None)


def section_at(loc: KeyPath) -> type[Section] | None:
    """The section of the schema that stands at ``loc``, if one does."""
    section: type[Section] | None = Recipe
    for part in loc:
        if section is None or isinstance(part, int):
            continue
        field = _fields(section).get(part)
        entry = section.entry_sections.get(part)
        section = entry or (_section_in(field.annotation) if field is not None else None)
    return section


@cache
def _key_paths(section: type[Section]) -> list[KeyPath]:
    """The path of every key in the section and below it, shallow ones first."""
    paths: list[KeyPath] = []
    for key, field in _fields(section).items():
        inner = _section_in(field.annotation)
        below = _key_paths(inner) if inner is not None else []
        paths += [(key,), *((key, *path) for path in below)]
    return sorted(paths, key=len)


def _unknown_key(loc: KeyPath) -> str:
    key = str(loc[-1])
    section = section_at(loc[:-1])
    known = list(_fields(section)) if section is not None else []
    if section is Recipe:
        known.append("extends")
    elsewhere = [
        path for path in _key_paths(Recipe) if path[-1] == key and path != loc[: len(path)]
    ]
    if key in _PUBLISHED_NAMES:
        return f"unknown key; did you mean {_PUBLISHED_NAMES[key]}?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"unknown key; did you mean {near[0]}?"
    if elsewhere and len(elsewhere[0]) not in [len(path) for path in elsewhere[1:]]:
        return f"unknown key; did you mean {dotted(elsewhere[0])}?"
    return f"unknown key; known here: {', '.join(known)}"
