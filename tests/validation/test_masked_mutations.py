"""Mistakes in the slicer's own code: verify makes them again and passes, grade two sees them.

That is why the masked parent shares no code with the slicers.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

import v4surgery
from tests.validation.masked_support import KEEP, Case, cut, graded
from v4surgery import axes

Array = np.ndarray[Any, Any]


class Mutation(NamedTuple):
    """A mistake in the slicer's code, and where grade two must see it."""

    target: str
    make: Callable[[Any], Any]
    place: str
    keep: dict[str, Any] = KEEP
    fields: Mapping[str, Any] = MappingProxyType({})


def wrong_index(axis: str, change: Callable[..., Any]) -> Callable[[Any], Any]:
    """axis_index, other for one axis: ``change(right, sizes, kept)`` gives its index."""
    wanted = axes.parse_axis(axis)

    def make(right: Any) -> Any:
        def index(parsed: Any, sizes: Any, kept: Any) -> Any:
            found = right(parsed, sizes, kept)
            return change(found, sizes, kept) if parsed == wanted else found

        return index

    return make


def channel_major(index: Array, sizes: Any, kept: Any) -> Array:
    return np.asarray(index.reshape(len(kept["streams"]), -1).T.reshape(-1))


def first_groups(index: Array, sizes: Any, kept: Any) -> Any:
    groups = np.arange(len(kept["o_groups"]))
    axis = axes.parse_axis("num_attention_heads*head_dim")
    return axes.axis_index(axis, sizes, {**kept, "o_groups": groups})


def rope_first(index: Array, sizes: Any, kept: Any) -> Array:
    return np.roll(index, len(kept["rope"]))


def first_pairs_of_all(right: Any) -> Any:
    return lambda count, _: np.arange(count)


def least_similar(right: Any) -> Any:
    return lambda gate, kept: -right(gate, kept)


def always(right: Any) -> Any:
    return lambda *_: True


def upside_down(right: Any) -> Any:
    return lambda *arguments: 1 / right(*arguments)


def other_rows(stem: str) -> Callable[[Any], Any]:
    """_indices_of, with the first units instead of the kept ones for one tensor."""

    def make(right: Any) -> Any:
        def indices_of(self: Any, entry: Any, *arguments: Any) -> Any:
            rows, cols = right(self, entry, *arguments)
            return (np.arange(len(rows)), cols) if entry.template.stem == stem else (rows, cols)

        return indices_of

    return make


PLANNER = "v4surgery.slicers.planner."
MUTATIONS = {
    "heads of other groups than those recorded": Mutation(
        PLANNER + "axis_index",
        wrong_index("num_attention_heads*head_dim", first_groups),
        "layers.0.attn.heads",
    ),
    "the first rope pairs, in tensors and record": Mutation(
        "v4surgery.slicers.rope.even",
        first_pairs_of_all,
        "rope frequencies",
    ),
    "rope dims before the others": Mutation(
        PLANNER + "axis_index",
        wrong_index("head_dim", rope_first),
        "layers.0.attn.heads",
    ),
    "streams inside channels": Mutation(
        PLANNER + "axis_index",
        wrong_index("streams*hidden_size", channel_major),
        "layers.0.attn.hc",
    ),
    "the least similar expert stands in": Mutation(
        "v4surgery.slicers.transform.similarity_rank",
        least_similar,
        "layers.0.gate.indices",
    ),
    "blocks that are not whole keep their scales": Mutation(
        PLANNER + "_is_whole_blocks",
        always,
        "layers.0.attn.heads",
        {"hidden_size": [*range(64, 192), *range(256, 384)]},
        {"store": {"dtype": "native"}},
    ),
    "compensation upside down": Mutation(
        PLANNER + "Planner._factor",
        upside_down,
        "layers.0.attn.hc",
        KEEP,
        {"compensate": True},
    ),
    "gate.bias of the first experts": Mutation(
        PLANNER + "Planner._indices_of", other_rows("ffn.gate.bias"), "layers.2.gate."
    ),
    "the drafter's first channels": Mutation(
        PLANNER + "Planner._indices_of", other_rows("e_proj"), "mtp.0.in"
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_of_the_slicer_passes_verify_and_is_caught_by_grade_two(
    name: str, tiny_case: Case, blocks_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation = MUTATIONS[name]
    parent = (blocks_case if mutation.keep is not KEEP else tiny_case).parent
    right = pkgutil.resolve_name(mutation.target)
    monkeypatch.setattr(mutation.target, mutation.make(right))
    path = cut(parent, tmp_path / "replica", mutation.keep, **mutation.fields)
    assert v4surgery.verify(path, parent, workers=1).passed
    report = graded(path, parent)
    assert report.first_failure is not None
    assert report.first_failure.startswith(mutation.place), report.failures
