"""Whether what stands in v4surgery.json can be a replica's record at all.

Records come with replicas from strangers. What reads them afterwards may take their shape for
granted: which keys there are, of which type, and units that the parent has.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from v4surgery.catalogue import Block, Catalogue
from v4surgery.errors import CheckpointError

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 120

Check = Callable[[Any], bool]


def shape_problem(record: Any) -> str | None:
    """The first rule that a record breaks, whatever JSON it is; None if it can be one."""
    return next(_problems(record), None)


def _problems(record: Any) -> Iterator[str]:
    if not isinstance(record, dict):
        yield "a record is a JSON object"
        return
    for path, (is_right, rule) in _RULES.items():
        found: Any = record
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if not is_right(found):
            yield f"{path} is {rule}, not {_shown.repr(found)}"
    bases = record.get("bases", {})
    if not isinstance(bases, dict) or not _is_table(bases.get("of", {}), dict):
        yield "bases.of is an object of objects"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any, of: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, of) for item in value.values())


def _is_units(value: Any) -> bool:
    """Units of a dim: whole numbers, or equally long lists of them."""
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return len({len(row) if isinstance(row, list) else -1 for row in value}) == 1 and all(
            map(_is_units, value)
        )
    return all(type(unit) is int and 0 <= unit < 2**31 for unit in value)


def _is_kept(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_units, value.values()))


def _is_blocks(value: Any) -> bool:
    """Blocks of a selection; ``"same"`` stands for what the block before it keeps."""
    if not isinstance(value, list):
        return False
    before: set[str] = set()
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("kept"), dict):
            return False
        kept = item["kept"]
        if not _is_text(item.get("target")) or not _is_text(item.get("source")):
            return False
        if not all(_is_units(u) or (u == "same" and name in before) for name, u in kept.items()):
            return False
        before = set(kept)
    return True


_RULES: Mapping[str, tuple[Check, str]] = {
    "selections.model": (_is_kept, "an object of lists of units"),
    "selections.blocks": (_is_blocks, "a list of {target, source, kept: {dim: units}}"),
    "parent.name": (_is_text, "text"),
    "parent.fingerprint": (_is_text, "text"),
    "tool.version": (_is_text, "text"),
    "plan_hash": (_is_text, "text"),
    "recipe": (_is_text, "text"),
    "notes": (lambda v: isinstance(v, list) and all(map(_is_text, v)), "a list of texts"),
    "tensors": (lambda v: _is_table(v, dict), "an object of objects"),
}


def check_selections(
    selections: Mapping[str, Any], targets: Mapping[str, Block], parent: Catalogue, where: str
) -> None:
    """Hold recorded units against the blocks and sizes of the parent.

    Args:
        selections: As recorded, of the right shape.
        targets: Blocks of the replica, by prefix.
        parent: The parent's catalogue.
        where: For the message.

    Raises:
        CheckpointError: A block or a unit that there is not.
    """
    sources = {block.prefix: block for block in parent.blocks}
    named = [item["target"] for item in selections["blocks"]]
    if named != list(targets):
        raise _unfit(where, f"blocks {_shown.repr(named)}", "the blocks that the recipe makes")
    for item in selections["blocks"]:
        source = sources.get(item["source"])
        if source is None:
            raise _unfit(where, item["source"], "a block of the parent")
        sizes = parent.sizes(source)
        for dim, units in {**selections["model"], **item["kept"]}.items():
            if dim not in sizes or (units != "same" and _largest(units) >= sizes[dim]):
                raise _unfit(
                    where,
                    f"{item['target']}{dim}: {_shown.repr(units)}",
                    f"units of the parent, below {sizes.get(dim, 0)}",
                )


def _largest(units: list[Any]) -> int:
    return max(_largest(unit) if isinstance(unit, list) else unit for unit in units)


def _unfit(where: str, value: str, rule: str) -> CheckpointError:
    return CheckpointError(
        "the record of the replica does not fit its parent", where=where, value=value, rule=rule
    )


__all__ = ["check_selections", "shape_problem"]
