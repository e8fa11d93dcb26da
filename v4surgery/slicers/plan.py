"""The plan: one edit for every tensor of the replica, and what carrying it out will cost.

A plan multiplies the selections through the catalogue. It is pure: headers and the few scores
that a selection asked for have been read, nothing else, and nothing is written. ``plan``,
``slice``, ``verify`` and the masked-parent check consume the same object.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

from v4surgery.catalogue import (
    F16,
    F32,
    FP8_F32,
    Catalogue,
    file_group,
)
from v4surgery.checkpoint.header import build_header
from v4surgery.checkpoint.layout import OutputTensor, ShardLayout, pack
from v4surgery.checkpoint.reader import Checkpoint, row_segments
from v4surgery.config import V4Config
from v4surgery.distributed.parent import require_same
from v4surgery.distributed.team import Team
from v4surgery.recipes.schema import Recipe
from v4surgery.slicers.bases import (
    Bases,
    basis_notes,
    bytes_for_bases,
    plan_bases,
)
from v4surgery.slicers.edit import (
    DEQUANTIZE,
    FACTOR,
    INTERPOLATE,
    REQUANTIZE,
    ROTATE,
    SCALE,
    TensorEdit,
)
from v4surgery.slicers.notes import COMPENSATE_NOTE, partial_block_notes
from v4surgery.slicers.planner import Planner
from v4surgery.slicers.select import Selected, restore, select
from v4surgery.slicers.selection import Selections
from v4surgery.version import __version__

DEFAULT_PACKED_SHARD = 5_000_000_000


@dataclass(frozen=True)
class Cost:
    """What carrying out a plan reads and writes."""

    bytes_read: int
    requests: int
    bytes_written: int
    selection_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything about a replica before its first byte is written."""

    parent: Checkpoint
    recipe: Recipe
    config: V4Config
    selections: Selections
    edits: tuple[TensorEdit, ...]
    notes: tuple[str, ...]
    selection_bytes: int
    catalogue: Catalogue = field(repr=False)
    bases: Bases = field(default_factory=Bases)

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256 of all that decides the replica's bytes: parent, recipe, selections, version.

        A scores file counts by its content, which the recipe has; where it lies does not matter.
        """
        content = {
            "version": __version__,
            "parent": self.parent.fingerprint,
            "recipe": self.recipe.model_dump(
                mode="json", exclude_none=True, exclude={"description", "scores"}
            ),
            "selections": self.selections.to_json(),
            "shards": [shard.file for shard in self.shards],
        }
        if self.bases:
            content["bases"] = self.bases.to_json()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def recorded_recipe(self) -> Recipe:
        """The recipe as a replica carries it: without the folder of the scores file."""
        if self.recipe.scores is None:
            return self.recipe
        return self.recipe.model_copy(update={"scores": PurePath(self.recipe.scores).name})

    @cached_property
    def shards(self) -> list[ShardLayout]:
        """The replica's files: the parent's own grouping, or packed up to the largest size."""
        store = self.recipe.store
        native = store.layout == "auto" and store.dtype == "native"
        follow_parent = self.recipe.init == "parent" and (store.layout == "parent" or native)
        groups: dict[str, list[OutputTensor]] = {}
        for edit in self.edits:
            own = file_group(edit.target)
            key = edit.source.weight.file if follow_parent and edit.source else own
            groups.setdefault(key, []).extend(OutputTensor(*output) for output in edit.outputs)
        if store.layout == "published":
            return pack(list(groups.values()), store.max_shard_size, merge=False)
        if follow_parent:
            order = [groups[file] for file in self.parent.files if file in groups]
            order += [tensors for key, tensors in groups.items() if key not in self.parent.files]
            return pack(order, store.max_shard_size, merge=False)
        limit = store.max_shard_size or DEFAULT_PACKED_SHARD
        return pack(list(groups.values()), limit, merge=True)

    @cached_property
    def cost(self) -> Cost:
        gap, bytes_read, requests = self.parent.source.gap_bytes, 0, 0
        seen: dict[tuple[int, int], tuple[int, int]] = {}
        for edit in self.edits:
            if edit.source is None:
                continue
            ref = edit.source.weight
            key = (id(edit.rows) if edit.rows is not None else 0, ref.row_bytes)
            if edit.rows is None:
                count, size = 1, ref.end - ref.begin
            elif key in seen:
                count, size = seen[key]
            else:
                count, size = seen[key] = row_segments(edit.rows, ref, gap)
            scale = edit.source.scale
            requests += (count + (scale is not None)) * edit.passes
            bytes_read += size * edit.passes
            if scale is not None:
                part = (scale.end - scale.begin) * size // max(ref.end - ref.begin, 1)
                bytes_read += part * edit.passes
        written = sum(shard.total_bytes for shard in self.shards)
        written += len(self.basis_header) + self.bases.nbytes
        return Cost(bytes_read, requests, written, self.selection_bytes)

    @cached_property
    def basis_header(self) -> bytes:
        """Everything of the file of bases before its data; nothing where there are none."""
        entries = [(n, *array) for basis in self.bases.items for n, array in basis.arrays.items()]
        return build_header(entries, {"plan_hash": self.plan_hash}) if entries else b""

    @cached_property
    def transforms(self) -> Counter[str]:
        """Tensors by how they come about."""
        return Counter(edit.transform for edit in self.edits)

    def inexact(self) -> dict[str, list[str]]:
        """Transforms that may round, with the stems concerned."""
        found: dict[str, list[str]] = {}
        for edit in self.edits:
            is_wider = (
                edit.transform == DEQUANTIZE
                and edit.source is not None
                and (
                    edit.source.fmt == FP8_F32
                    or (edit.source.fmt in (F32, F16) and edit.fmt != F32)
                )
            )
            rounds = edit.transform in (REQUANTIZE, SCALE, INTERPOLATE, ROTATE, FACTOR)
            if rounds or is_wider:
                found.setdefault(edit.transform, []).append(edit.target.stem)
        return found


def make_plan(parent: Checkpoint, recipe: Recipe, team: Team | None = None) -> Plan:
    """Choose what to keep, and plan every tensor of the replica.

    Of several ranks the first one chooses, which may read every weight, and tells the others.

    Raises:
        PlanError: The recipe cannot be applied to this parent.
        CheckpointError: The ranks have opened different parents.
    """
    if team is None:
        selected = select(parent, recipe)
    else:
        require_same(team, parent)
        chosen = team.tell(select(parent, recipe) if team.is_first else None)
        assert chosen is not None
        selected = chosen
    resolved = recipe.model_copy(update={"scores_blake3": selected.scores_blake3})
    return plan_selected(parent, resolved, selected)


def plan_selected(
    parent: Checkpoint,
    recipe: Recipe,
    selected: Selected,
    record: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a replica whose choices have been made already (by a recipe, or on ``record``)."""
    catalogue = Catalogue(selected.config, optional=parent.catalogue.optional)
    known = None if record is None else record.get("bases", {}).get("of", {})
    bases = plan_bases(parent, recipe, selected.config, selected.selections, known)
    edits = tuple(Planner(parent, recipe, catalogue, selected.selections, bases).edits())
    notes = (
        *selected.notes,
        *((COMPENSATE_NOTE,) if recipe.compensate else ()),
        *basis_notes(bases, compensate=recipe.compensate),
        *partial_block_notes(edits),
    )
    return Plan(
        parent,
        recipe,
        selected.config,
        selected.selections,
        edits,
        notes,
        selected.bytes_read + bytes_for_bases(parent, bases, selected.selections),
        catalogue,
        bases,
    )


def replay(parent: Checkpoint, recipe: Recipe, record: Mapping[str, Any]) -> Plan:
    """The plan of a finished replica, from its record instead of making the choices again."""
    selected = restore(parent, recipe, record["selections"], tuple(record["notes"]))
    return plan_selected(parent, recipe, selected, record)
