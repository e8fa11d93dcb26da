"""Two traces beside each other: layer by layer, place by place, and where they part first.

Whatever is compared is a trace file: a model that is named instead of one is run into a temporary
file. Replicas are held against their parent, or against another replica of it, in the parent's
coordinates: the layers and units that both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.slicers.selection import BlockSelection
from v4surgery.validation.mapping import TAP_AXES, ReplicaMapping
from v4surgery.validation.measures import Alignment, Closeness
from v4surgery.validation.taps import MODEL_TAPS, TAPS
from v4surgery.validation.trace import read_about

# Another order of the same float32 sums; see validation.masked for what was measured.
TOLERANCE = 1e-5
CHOICES = {"gate.indices": "n_routed_experts", "attn.indexer": None}
_ORDER = {name: number for number, name in enumerate(("embed", *TAPS, "logits"))}


class Place(NamedTuple):
    """Where in a model an activation is: block (empty for the model's own taps) and tap."""

    block: str
    tap: str

    @classmethod
    def parse(cls, name: str) -> tuple[int, Place]:
        """Prompt and place of ``<prompt>/<block><tap>``."""
        prompt, _, rest = name.partition("/")
        if rest in MODEL_TAPS:
            return int(prompt), cls("", rest)
        kind, number, tap = rest.split(".", 2)
        return int(prompt), cls(f"{kind}.{number}.", tap)

    @property
    def order(self) -> tuple[float, int]:
        """Sorts places as the forward passes them."""
        layer = int(self.block.split(".")[1]) if self.block else -1
        return (float("inf") if self.tap == "logits" else layer, _ORDER.get(self.tap, 99))


class View:
    """How a model's layers, units and token ids are called in the space that both sides share.

    Args:
        mapping: Of a replica to its parent; None for a model that stands for itself.
    """

    def __init__(self, mapping: ReplicaMapping | None = None) -> None:
        self.mapping = mapping
        blocks = mapping.blocks if mapping else ()
        self._selections = {block.target.prefix: block for block in blocks}

    def source(self, block: str) -> str:
        return self._selections[block].source.prefix if block in self._selections else block

    def selection(self, block: str) -> BlockSelection | None:
        return self._selections.get(block)

    def units(self, axis: str, block: str) -> Tensor | None:
        """Names of the units along an axis; None where they are numbered as they stand."""
        if self.mapping is None:
            return None
        return self.mapping.index(axis, self._selections.get(block))

    def shared_ids(self, ids: Sequence[int]) -> list[int]:
        """A prompt's ids, as the shared space has them."""
        return list(ids) if self.mapping is None else self.mapping.ids(torch.tensor(ids)).tolist()

    def own_ids(self, shared: Sequence[int], where: str) -> list[int]:
        """The other way round.

        Raises:
            UsageError: The model's vocabulary was cut, and a token is not in it.
        """
        kept = None if self.mapping is None else self.mapping.index("vocab_size", None)
        if kept is None:
            return list(shared)
        numbers = {token: number for number, token in enumerate(kept.tolist())}
        missing = [token for token in shared if token not in numbers]
        if missing:
            raise UsageError(
                "a token is not in the replica's vocabulary",
                where=where,
                value=f"token {missing[0]} of the parent",
                rule="prompts that both vocabularies have",
            )
        return [numbers[token] for token in shared]


@dataclass(frozen=True)
class Row:
    """One place that both sides have, over all prompts.

    Attributes:
        place: Of the first side.
        other: The second side's block.
        close: Values, where they have the same shape in shared units.
        cka: Linear CKA where the shapes differ, or channels of two replicas cannot be matched
            because one of them was rotated (CKA does not depend on the basis).
        overlap: Share of equal choices, of places that are choices.
    """

    place: Place
    other: str
    close: Closeness | None
    cka: float | None
    overlap: float | None

    def diverges(self, tolerance: float) -> bool:
        """Whether it differs by more than rounding; unlike shapes can only be aligned."""
        if self.overlap is not None:
            return self.overlap != 1
        return self.close is not None and not self.close.relative_error <= tolerance

    def to_json(self) -> dict[str, Any]:
        measured = self.close.to_json() if self.close else {}
        more = {"linear_cka": self.cka, "overlap": self.overlap}
        values = {**measured, **{name: value for name, value in more.items() if value is not None}}
        clean = {
            name: None if isinstance(value, float) and not isfinite(value) else value
            for name, value in values.items()
        }
        return {"layer": self.place.block, "other": self.other, "tap": self.place.tap, **clean}


@dataclass(frozen=True)
class Diff:
    """All places that both sides have, as the forward passes them.

    Attributes:
        rows: Of each.
        tolerance: Largest relative error that counts as equal.
        only: Places that one side alone has, by side.
    """

    rows: tuple[Row, ...]
    tolerance: float
    only: tuple[int, int]

    @property
    def first_divergence(self) -> Row | None:
        return next((row for row in self.rows if row.diverges(self.tolerance)), None)

    def to_json(self) -> dict[str, Any]:
        first = self.first_divergence
        return {
            "tolerance": self.tolerance,
            "first_divergence": first.to_json() if first else None,
            "only_in_a": self.only[0],
            "only_in_b": self.only[1],
            "rows": [row.to_json() for row in self.rows],
        }


def diff_traces(
    a: Path,
    b: Path,
    *,
    view_a: View | None = None,
    view_b: View | None = None,
    tolerance: float = TOLERANCE,
) -> Diff:
    """Compare two traces of the same prompts; no more than one activation of each is in memory.

    Args:
        a: A trace file.
        b: Another one, that the errors are relative to.
        view_a: How the first model's units are called in the space that both share.
        view_b: The second's.
        tolerance: Largest relative error that counts as equal.

    Raises:
        OutputError: A file is no trace.
        UsageError: They are of other prompts, or have no place in common.
    """
    views = (view_a or View(), view_b or View())
    prompts = [
        [view.shared_ids(ids) for ids in read_about(path)["prompts"]]
        for path, view in zip((a, b), views, strict=True)
    ]
    if prompts[0] != prompts[1]:
        raise UsageError(
            "the traces are of different prompts",
            where=b,
            rule=f"the prompts of {a}",
            hint="trace both models with the same --prompts",
        )
    with _opened(a) as file_a, _opened(b) as file_b:
        found = [_places(file, view) for file, view in zip((file_a, file_b), views, strict=True)]
        common = sorted(
            (place for place in found[0] if place in found[1]), key=lambda place: place.order
        )
        if not common:
            raise UsageError("the traces have no place in common", where=b, rule=f"taps of {a}")
        rows = [
            _compare(file_a, file_b, found[0][place], found[1][place], views) for place in common
        ]
    only = (len(found[0]) - len(common), len(found[1]) - len(common))
    return Diff(tuple(rows), tolerance, only)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with safe_open(path, framework="pt") as file:
        yield file


def _places(file: Any, view: View) -> dict[Place, list[tuple[int, Place]]]:
    """By the shared name of each place: prompt and own name."""
    found: dict[Place, list[tuple[int, Place]]] = {}
    for name in sorted(file.keys(), key=lambda name: int(name.partition("/")[0])):
        prompt, place = Place.parse(name)
        found.setdefault(Place(view.source(place.block), place.tap), []).append((prompt, place))
    return found


def _compare(
    file_a: Any,
    file_b: Any,
    a: list[tuple[int, Place]],
    b: list[tuple[int, Place]],
    views: tuple[View, View],
) -> Row:
    own, other = a[0][1], b[0][1]
    close, alignment, overlaps = Closeness(), Alignment(), []
    for prompt in sorted({number for number, _ in a} & {number for number, _ in b}):
        x = file_a.get_tensor(f"{prompt}/{own.block}{own.tap}")
        y = file_b.get_tensor(f"{prompt}/{other.block}{other.tap}")
        if own.tap in CHOICES:
            overlaps.append(_overlap(x, y, own, other, views))
            continue
        x, y = _shared(*_in_one_basis(x, y, own, other, views), own, other, views)
        if own.tap == "gate.weights":  # which of a token's experts comes first means nothing
            x, y = (t.sort(-1, descending=True).values for t in (x, y))
        x, y = (t.flatten(0, 1) if own.tap in TAP_AXES else t for t in (x, y))
        if x.shape == y.shape and not _is_apart(own.tap, views):
            close.add(x, y, prompt)
        else:
            alignment.add(x, y)
    return Row(
        own,
        other.block,
        close if close.num_tokens else None,
        alignment.cka if alignment.num_tokens else None,
        sum(overlaps) / len(overlaps) if overlaps else None,
    )


def _in_one_basis(
    x: Tensor, y: Tensor, own: Place, other: Place, views: tuple[View, View]
) -> tuple[Tensor, Tensor]:
    """The parent's side in the basis of a replica that was rotated, where one of them is that."""
    first, second = (view.mapping for view in views)
    if own.tap in TAP_AXES and first is not None and second is None:
        y = first.rotated(own.tap, y, views[0].selection(own.block))
    if own.tap in TAP_AXES and second is not None and first is None:
        x = second.rotated(own.tap, x, views[1].selection(other.block))
    return x, y


def _is_apart(tap: str, views: tuple[View, View]) -> bool:
    """Whether channels of two replicas cannot be matched, because one was rotated."""
    mappings = [view.mapping for view in views]
    if "hidden_size" not in TAP_AXES.get(tap, ()) or None in mappings:
        return False
    return any(mapping is not None and mapping.is_rotated for mapping in mappings)


def _shared(
    x: Tensor, y: Tensor, own: Place, other: Place, views: tuple[View, View]
) -> tuple[Tensor, Tensor]:
    """Both cut to the units that both have, in one order."""
    axes = TAP_AXES.get(own.tap, ())
    for offset, axis in enumerate(axes):
        units = (views[0].units(axis, own.block), views[1].units(axis, other.block))
        for side, index in enumerate(_positions(*units)):
            if index is not None:
                value = (x, y)[side]
                value = value.index_select(value.dim() - len(axes) + offset, index)
                x, y = (value, y) if side == 0 else (x, value)
    return x, y


def _positions(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where each side has the units that both have; None for all as they stand."""
    if a is None or b is None:
        return b, a  # one side's units are the other's positions
    positions = {unit: position for position, unit in enumerate(b.tolist())}
    common = [(i, positions[unit]) for i, unit in enumerate(a.tolist()) if unit in positions]
    index = torch.tensor(common, dtype=torch.int64).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def _overlap(x: Tensor, y: Tensor, own: Place, other: Place, views: tuple[View, View]) -> float:
    """Of choices that both could make, the share that both made; -1 is no choice."""
    axis = CHOICES[own.tap]
    if axis is not None:
        names = (views[0].units(axis, own.block), views[1].units(axis, other.block))
        x, y = (t if n is None else n[t] for t, n in zip((x, y), names, strict=True))
        x, y = _known(x, names[1]), _known(y, names[0])
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    both = ((x[:, :, None] == y[:, None, :]) & (x >= 0)[:, :, None]).any(2).sum(1)
    least = torch.minimum((x >= 0).sum(1), (y >= 0).sum(1))
    return float(both.sum() / least.sum()) if least.sum() else 1.0


def _known(chosen: Tensor, units: Tensor | None) -> Tensor:
    """Choices of units that the other side does not have are none."""
    return chosen if units is None else torch.where(torch.isin(chosen, units), chosen, -1)
