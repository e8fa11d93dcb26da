"""Where selections get their scores: gate rows, weight norms, or a scores file; and at what cost.

A recipe may name several ways to choose, ``by: [scores, gate]``: the first that the scores file
has a score for is taken. A block that the forward cannot score (a DSpark drafter, an expert that
no token went to) takes the next way of the list, or else the fallback of its dim
(:class:`v4surgery.importance.names.Scored`): gate rows for experts, weight norms for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from v4surgery.axes import axis_size, parse_axis
from v4surgery.catalogue import Block
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.errors import PlanError, UsageError
from v4surgery.importance import weights
from v4surgery.importance.names import MODEL, SCORE_NAMES, key_of, scored_dim
from v4surgery.importance.scores_file import ScoresFile
from v4surgery.recipes.schema import Choice, Layers, Recipe, is_score, listed_ways

Scores = Callable[[str, str], NDArray[np.float64]]
"""Scores of the units of a dim: called with ``by`` and the place (a block's prefix, or model)."""
Choosing = TypeVar("Choosing", Choice, Layers)


@dataclass
class ScoreBook:
    """Scores of one parent on demand, and the bytes that were read for them.

    Attributes:
        parent: The parent.
        path: The recipe's scores file, if it names one.
        blake3: The only content that it may have, or None.
        bytes_read: Of the parent, so far.
        used: Dims whose units a score of the file chose, by the score's name.
        replaced: Blocks whose units were chosen otherwise, by dim and way.
    """

    parent: Checkpoint
    path: str | None = None
    blake3: str | None = None
    bytes_read: int = 0
    used: dict[str, set[str]] = field(default_factory=dict)
    replaced: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _cache: dict[tuple[str, str, str], NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def of_recipe(cls, parent: Checkpoint, recipe: Recipe) -> ScoreBook:
        """The book that a recipe asks for; a file that it names is opened and held against it.

        Raises:
            PlanError: The scores are of another parent, or not those that the recipe is about.
        """
        book = cls(parent, recipe.scores, recipe.scores_blake3)
        if recipe.scores is not None:
            assert book.file is not None
        return book

    @cached_property
    def file(self) -> ScoresFile | None:
        """The scores file, held against the parent and the recipe."""
        if self.path is None:
            return None
        file = ScoresFile(Path(self.path))
        file.require_parent(self.parent)
        if self.blake3 is not None and file.blake3 != self.blake3:
            raise PlanError(
                "this is not the scores file that the recipe was resolved with",
                where=file.path,
                value=f"blake3 {file.blake3}",
                rule=f"blake3 {self.blake3}",
                hint="name that file with --scores, or take scores_blake3 out of the recipe",
            )
        return file

    def settle(self, pick: Choosing | None, dim: str, block: Block | None) -> Choosing | None:
        """A choice with one way to choose: the first of its list that there is.

        Args:
            pick: What the recipe says.
            dim: An axis expression, ``layers``, or ``moe_intermediate_size.experts.3``.
            block: The parent's block; None for dims of the model.

        Raises:
            UsageError: It asks for scores, and there is no scores file.
            PlanError: The file has none of this dim.
        """
        if pick is None:
            return None
        ways = listed_ways(pick.by)
        if not any(map(is_score, ways)):
            return pick.model_copy(update={"by": ways[0]})
        return pick.model_copy(update={"by": self._settled(pick, ways, dim, block)})

    def _settled(
        self, pick: Choice | Layers, ways: tuple[str, ...], dim: str, block: Block | None
    ) -> str:
        place = block.prefix if block else MODEL
        has_none = False  # whether a score of this dim is there, but not in this block
        for way in ways:
            if not is_score(way):
                return self._replaced(dim, way, place) if has_none else way
            name = pick.scored[0] if way == "scores" else way
            if self.file is None or (name, scored_dim(dim).dim) not in self.file.axes:
                if way == ways[-1] and not has_none:
                    self._refuse(name, dim)
                continue
            key = key_of(name, _sample(dim), place)
            if key in self.file.keys or not _may_lack(dim, block):
                self.used.setdefault(name, set()).add(scored_dim(dim).axis)
                return name
            has_none = True
        return self._replaced(dim, scored_dim(dim).fallback, place)

    def _replaced(self, dim: str, way: str, place: str) -> str:
        self.replaced.setdefault((scored_dim(dim).axis, way), []).append(
            f"{place}{dim.partition('.')[2]}"
        )
        return way

    def _refuse(self, name: str, dim: str) -> None:
        axis = scored_dim(dim).axis
        if self.file is None:
            raise UsageError(
                "the recipe asks for scores, and no scores file is named",
                where=f"keep.{axis}",
                value=name,
                rule="--scores FILE, or `scores: FILE` in the recipe",
                hint=f"make one: v4surgery score {self.parent.name} --prompts FILE --out SCORES",
            )
        known = sorted({f"{score} of {scored}" for score, scored in self.file.axes})
        raise PlanError(
            "the scores file does not have this score",
            where=f"{self.file.path}: {name} of {dim}",
            value=", ".join(known),
            rule=f"what keep.{axis} asks for",
            hint=f"v4surgery score {self.parent.name} --axes {axis} --prompts FILE --out SCORES",
        )

    def of(self, dim: str, block: Block | None) -> Scores:
        """Scores of ``dim`` (an axis expression, or ``layers``) in one block or the model."""

        def scores(by: str, _: str) -> NDArray[np.float64]:
            key = (dim, block.prefix if block else MODEL, by)
            if key not in self._cache:
                self._cache[key] = self._compute(dim, block, by)
            return self._cache[key]

        return scores

    def of_expert(self, block: Block, expert: int | None) -> Scores:
        """Scores of the neurons of one routed expert, or (None) of the shared expert."""

        def scores(by: str, _: str) -> NDArray[np.float64]:
            if by in SCORE_NAMES:
                return self._from_file(by, neuron_dim(expert), block)
            name = neuron_dim(expert).partition(".")[2]
            stored = [
                self.parent.tensors[f"{block.prefix}ffn.{name}.{w}"] for w in ("w1", "w2", "w3")
            ]
            self._count(stored)
            return weights.unit_norms(
                self.parent, parse_axis("moe_intermediate_size"), block, stored
            )

        return scores

    def notes(self) -> list[str]:
        """What the scores file decided, and where it could not."""
        if self.file is None:
            return []
        if not self.used:
            return [f"no `by` of the recipe took a score of {self.file.path.name}"]
        about = self.file.about
        told = "; ".join(f"{name} chose {_listed(axes)}" for name, axes in self.used.items())
        notes = [
            f"scores of {about.get('num_tokens', '?')} tokens, blake3 {self.file.blake3[:16]}: "
            f"{told}"
        ]
        for (axis, way), places in self.replaced.items():
            where = ", ".join(places[:4]) + (", ..." if len(places) > 4 else "")
            notes.append(
                f"no scores of {axis} in {len(places)} place(s), where `by: {way}` chose: {where}"
            )
        return notes

    def _compute(self, dim: str, block: Block | None, by: str) -> NDArray[np.float64]:
        if by in SCORE_NAMES:
            return self._from_file(by, dim, block)
        if by == "gate":
            assert block is not None
            self._count(weights.gate_tensors(self.parent, block))
            return weights.gate_norms(self.parent, block)
        assert by == "norm", by
        if dim == "layers":
            self._count(weights.layer_tensors(self.parent))
            return weights.layer_norms(self.parent)
        part = parse_axis(dim)
        stored = weights.owning_tensors(self.parent, part, block)
        self._count(stored)
        return weights.unit_norms(self.parent, part, block, stored)

    def _count(self, stored: Iterable[StoredTensorRef]) -> None:
        self.bytes_read += sum(tensor.nbytes for tensor in stored)

    def _from_file(self, by: str, dim: str, block: Block | None) -> NDArray[np.float64]:
        assert self.file is not None, by
        size = (
            self.parent.config.num_hidden_layers
            if dim == "layers"
            else axis_size(parse_axis(scored_dim(dim).dim), self.parent.catalogue.sizes(block))
        )
        place = block.prefix if block else MODEL
        return self.file.array(key_of(by, dim, place), (size,)).astype(np.float64)


def neuron_dim(expert: int | None) -> str:
    """What stands in a key for the neurons of a routed expert, or (None) of the shared one."""
    name = "shared_experts" if expert is None else f"experts.{expert}"
    return f"moe_intermediate_size.{name}"


def _sample(dim: str) -> str:
    """The key's dim that shows whether a block is scored; of all neurons the shared expert's."""
    return neuron_dim(None) if dim == "moe_intermediate_size" else dim


def _may_lack(dim: str, block: Block | None) -> bool:
    """Whether a scores file may have no score there: drafters, and experts without tokens."""
    return (block is not None and block.is_drafter) or ".experts." in dim


def _listed(axes: set[str]) -> str:
    return ", ".join(sorted(axes))
