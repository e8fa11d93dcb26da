"""The ways to choose units of an axis, and the rules that all choices share.

Each rule is checked at the last field it needs, so that a mistake in one field never hides a
mistake in another.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo

from v4surgery.importance.names import SCORE_NAMES
from v4surgery.recipes._section import broken_rule, is_whole

__all__ = [
    "By",
    "LayersBy",
    "LayersWays",
    "Way",
    "Ways",
    "check_ids",
    "check_ways",
    "is_score",
    "length",
    "listed_ways",
    "long_choice",
    "settled",
]

By = Literal[
    "first",
    "even",
    "ids",
    "random",
    "norm",
    "gate",
    "scores",
    "reap",
    "frequency",
    "contribution",
    "activation",
    "energy",
]
LayersBy = Literal["even", "first", "kinds", "ids", "random", "norm", "scores", "influence"]
Way = str | tuple[str, ...]
"""One way to choose, or several: the first that the scores file has what it needs for."""


def _how_many(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


# Tags stand in the places of errors; they are no keys, which the parenthesis says.
Ways = Annotated[
    Annotated[By, Tag("(one)")]
    | Annotated[tuple[By, ...], Field(min_length=1, max_length=8), Tag("(several)")],
    Discriminator(lambda value: f"({_how_many(value)})"),
]
LayersWays = Annotated[
    Annotated[LayersBy, Tag("(one)")]
    | Annotated[tuple[LayersBy, ...], Field(min_length=1, max_length=8), Tag("(several)")],
    Discriminator(lambda value: f"({_how_many(value)})"),
]


def is_score(way: str) -> bool:
    """Whether a way to choose needs a scores file."""
    return way == "scores" or way in SCORE_NAMES


def listed_ways(by: Way) -> tuple[str, ...]:
    """The ways to choose in their order, be it one or several."""
    return (by,) if isinstance(by, str) else by


def check_ways(by: Way, scored: Collection[str], *, takes_gate: bool) -> None:
    """Each way fits the axis, and only the last of a list is always there."""
    ways = listed_ways(by)
    for way in ways:
        if way == "gate" and not takes_gate:
            raise broken_rule("`gate` chooses experts only; take another, such as norm or even")
        if way in SCORE_NAMES and way not in scored:
            raise broken_rule(
                "`{way}` is no score of this axis; it has {known}",
                way=way,
                known=" and ".join(scored) or "none",
            )
    if "ids" in ways and not isinstance(by, str):
        raise broken_rule("`ids` stands alone, not in a list")
    for way, after in pairwise(ways):
        if not is_score(way):
            raise broken_rule(
                "`{way}` is always there, so `{after}` would never be used", way=way, after=after
            )


def long_choice(value: object, key: str) -> object:
    """A number of units or a list of ids, as the mapping that it is short for."""
    if is_whole(value):
        return {key: value}
    return {"by": "ids", "ids": value} if isinstance(value, list | tuple) else value


def check_ids(by: Way | None, ids: tuple[int, ...] | None) -> None:
    """Ids are there where units are chosen by them, and only there."""
    if by == "ids" and ids is None:
        raise broken_rule("missing: `by: ids` needs a list of ids")
    if by is not None and by != "ids" and ids is not None:
        raise broken_rule(
            "only goes with `by: ids`, not with `by: {by}`", by=", ".join(listed_ways(by))
        )


def settled(info: ValidationInfo, name: str, *origins: str) -> int | None:
    """An earlier field, or None where it, or one that it may follow from, is in error."""
    if not {name, *origins} <= info.data.keys():
        return None
    value: int | None = info.data[name]
    return value


def length(value: object) -> int | None:
    """Of a list; None where it is none."""
    return len(value) if isinstance(value, list | tuple) else None
