"""The plan: one edit for every tensor of the replica, and what carrying it out will cost.

A plan multiplies the selections through the catalogue. It is pure: headers and the few scores
that a selection asked for have been read, nothing else, and nothing is written. ``plan``,
``slice``, ``verify`` and the masked-parent check consume the same object.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import PurePath
from typing import Any

import numpy as np

from v4surgery.axes import axis_index, axis_size, parse_axis
from v4surgery.catalogue import (
    F16,
    F32,
    FP4,
    FP8,
    FP8_F32,
    I64,
    QUANTIZED,
    Block,
    Catalogue,
    Entry,
    StoredTensor,
    file_group,
    stored_tensors,
)
from v4surgery.checkpoint.header import build_header
from v4surgery.checkpoint.layout import OutputTensor, ShardLayout, pack
from v4surgery.checkpoint.reader import Checkpoint, row_segments
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.config import V4Config
from v4surgery.errors import PlanError
from v4surgery.formats import FP4_GROUP, FP8_BLOCK
from v4surgery.recipes.schema import Recipe
from v4surgery.slicers.bases import (
    Bases,
    Mix,
    basis_notes,
    bytes_for_bases,
    mix_of,
    plan_bases,
)
from v4surgery.slicers.hash_table import HashRemap, plan_remap
from v4surgery.slicers.mixing import rows_at_a_time
from v4surgery.slicers.select import Selected, restore, select, target_format
from v4surgery.slicers.selection import BlockSelection, IntArray, Kept, Selections
from v4surgery.version import __version__

COPY, GATHER, DEQUANTIZE, REQUANTIZE, SCALE, REMAP, INTERPOLATE, ZERO, RANDOM = (
    "copy",
    "gather",
    "dequantize",
    "requantize",
    "scale",
    "remap",
    "interpolate",
    "zero",
    "random",
)
FOLD, ROTATE, FACTOR = "fold", "rotate", "factor"
TRANSFORMS: Mapping[str, str] = {
    COPY: "the parent's bytes, whole",
    GATHER: "the parent's bytes, some rows and columns (whole blocks where quantized)",
    DEQUANTIZE: "decoded to bf16 or f32 (exact, unless it was wider or has arbitrary F32 scales)",
    REQUANTIZE: "decoded, cut and quantized again (the error is measured and reported)",
    SCALE: "multiplied by the factor of `compensate`, rounded once",
    REMAP: "hash table rows with removed experts replaced",
    INTERPOLATE: "ape rows interpolated to another ratio",
    FOLD: "ones (times the factor of `compensate`): absorbed into the weights that follow",
    ROTATE: "in a rotated basis, norms absorbed, rounded once",
    FACTOR: "a factor of the truncated SVD of wo_b @ wo_a, rounded once",
    ZERO: "zeros (a gate bias that the parent does not have)",
    RANDOM: "random initialisation",
}
DEFAULT_PACKED_SHARD = 5_000_000_000


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """How one logical tensor of the replica comes about.

    Attributes:
        target: The replica's tensor.
        source: The parent's, as stored; None where nothing of the parent is used.
        transform: One of :data:`TRANSFORMS`.
        fmt: Format of the replica's tensor.
        shape: Logical shape of the replica's tensor.
        rows: Parent rows kept, int64, or None for all.
        cols: Parent columns kept; ``(groups, columns)`` for wo_a, whose columns depend on the
            row's group; None for all.
        factor: What ``compensate`` multiplies the values with.
        remap: For hash tables.
        outputs: The stored tensors: the weight, then its scale.
        mix: What happens to axes that are mixed; None where units are picked.
    """

    target: Entry
    source: StoredTensorRef | None
    transform: str
    fmt: str
    shape: tuple[int, ...]
    rows: IntArray | None
    cols: IntArray | None
    factor: float
    remap: HashRemap | None
    outputs: tuple[StoredTensor, ...]
    mix: Mix | None = None

    @property
    def row_slices(self) -> slice | IntArray:
        assert self.source is not None
        return slice(0, self.source.weight.shape[0]) if self.rows is None else self.rows

    @property
    def passes(self) -> int:
        """How often the source is read."""
        if self.mix is None or self.mix.rows is None or self.transform == FOLD:
            return 1
        return -(-self.shape[0] // rows_at_a_time(self))

    @property
    def nbytes(self) -> int:
        return sum(OutputTensor(*output).nbytes for output in self.outputs)


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


def make_plan(parent: Checkpoint, recipe: Recipe) -> Plan:
    """Choose what to keep, and plan every tensor of the replica.

    Raises:
        PlanError: The recipe cannot be applied to this parent.
    """
    selected = select(parent, recipe)
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
    planner = _Planner(parent, recipe, catalogue, selected.selections, bases)
    edits = tuple(planner.edits())
    notes = (
        *selected.notes,
        *planner.notes,
        *basis_notes(bases, compensate=recipe.compensate),
        *_partial_block_notes(edits),
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


def _partial_block_notes(edits: tuple[TensorEdit, ...]) -> list[str]:
    """Name an FP8 size that transformers (seen in 5.23) decodes wrongly where it dequantizes."""
    stems = [
        edit.target.stem
        for edit in edits
        if edit.fmt in (FP8, FP8_F32)
        and any(size > FP8_BLOCK and size % FP8_BLOCK for size in edit.shape)
    ]
    if not stems:
        return []
    return [
        f"{len(stems)} FP8 tensors ({stems[0]}, ...) are wider than 128 and no multiple of it: "
        "transformers, where it dequantizes (always on a CPU), takes other block bounds and "
        "decodes them wrongly; choose multiples of 128, or store bf16"
    ]


class _Planner:
    """Multiplies selections through the catalogue; indices are computed once per block and axis."""

    def __init__(
        self,
        parent: Checkpoint,
        recipe: Recipe,
        catalogue: Catalogue,
        selections: Selections,
        bases: Bases,
    ) -> None:
        self.parent, self.recipe, self.catalogue, self.bases = parent, recipe, catalogue, bases
        self.model = selections.model
        self.by_target = {block.target.prefix: block for block in selections.blocks}
        self.notes: list[str] = []
        self._indices: dict[tuple[str, str, int], IntArray | None] = {}
        self._factors: dict[tuple[str, str], float] = {}
        if recipe.compensate:
            self.notes.append(
                "compensate: norm weights and mHC projections take sqrt(units before / units "
                "after), times the root of the energy kept where a basis says it; the norm of a "
                "query head and the softmax scale cancel each other; rms_norm_eps, the softmax "
                "over fewer keys and top-K routing cannot be folded into weights"
            )

    def edits(self) -> Iterator[TensorEdit]:
        for entry in self.catalogue.entries():
            yield self._edit(entry)

    def _edit(self, entry: Entry) -> TensorEdit:
        template = entry.template
        selection = self.by_target[entry.block.prefix] if entry.block else None
        shape = self.catalogue.shape(entry)
        source = self._source(entry, selection)
        if source is None or self.recipe.init == "random":
            transform = RANDOM if self.recipe.init == "random" else ZERO
            # The one tensor that a cut may add: the gate bias of a hash layer turned score layer.
            assert transform == RANDOM or template.needs == {"score"}, entry.stem
            fmt = template.storage if template.storage in (F32, I64) else "BF16"
            outputs = stored_tensors(entry, shape, fmt)
            return TensorEdit(entry, None, transform, fmt, shape, None, None, 1.0, None, outputs)
        fmt = target_format(template, source.fmt, self.recipe.store.dtype)
        rows, cols = self._indices_of(entry, source, selection)
        factor = self._factor(entry, selection)
        remap = self._remap(selection) if template.storage == I64 else None
        mix = mix_of(self.bases, entry, selection, self.parent, compensate=self.recipe.compensate)
        transform = self._transform(entry, source, fmt, rows, cols, shape, factor, remap, mix)
        if fmt == FP4 and shape[-1] % FP4_GROUP:
            raise PlanError(
                "FP4 cannot store this width",
                where=entry.stem,
                value=f"{shape[-1]} inputs",
                rule=f"a multiple of {FP4_GROUP}",
                hint="choose another size, or store: {dtype: bf16}",
            )
        outputs = stored_tensors(entry, shape, fmt)
        return TensorEdit(
            entry, source, transform, fmt, shape, rows, cols, factor, remap, outputs, mix
        )

    def _source(self, entry: Entry, selection: BlockSelection | None) -> StoredTensorRef | None:
        expert = entry.expert
        if selection is not None and expert is not None:
            kept = selection.kept.get("n_routed_experts")
            expert = expert if kept is None else int(kept[expert])
        block = selection.source if selection else None
        return self.parent.tensors.get(Entry(entry.template, block, expert).stem)

    def _indices_of(
        self, entry: Entry, source: StoredTensorRef, selection: BlockSelection | None
    ) -> tuple[IntArray | None, IntArray | None]:
        axes = entry.template.axes
        is_shared = entry.template.group == "shared expert"
        variant = entry.expert if entry.expert is not None else -1
        kept: Kept = self.model
        if selection is not None:
            neurons = selection.kept.get("moe_intermediate_size")
            if neurons is None or neurons.ndim == 1:
                variant = -1
            kept = selection.for_expert(entry.expert, is_shared=is_shared)
        if entry.template.storage == I64:
            kept = {**kept, "num_experts_per_tok": None}  # columns are the remap's business
        block = source.entry.block
        indices = [self._index(axis, block, kept, variant, selection) for axis in axes]
        rows, cols = indices[0], indices[1] if len(indices) == 2 else None
        if entry.template.is_block_diagonal and cols is not None and cols.ndim == 2:
            same = bool((cols == cols[0]).all())
            cols = cols[0] if same else cols
        return rows, cols

    def _index(
        self,
        axis: str,
        block: Block | None,
        kept: Kept,
        variant: int,
        selection: BlockSelection | None,
    ) -> IntArray | None:
        key = (axis, selection.target.prefix if selection else "", variant)
        if key not in self._indices:
            self._indices[key] = axis_index(
                parse_axis(axis), self.parent.catalogue.sizes(block), kept
            )
        return self._indices[key]

    def _factor(self, entry: Entry, selection: BlockSelection | None) -> float:
        """sqrt(units before / units after) of the mean square in front of this weight."""
        axis = entry.template.normalises
        if not self.recipe.compensate or axis is None:
            return 1.0
        key = (axis, entry.block.prefix if entry.block else "")
        if key not in self._factors:
            source = selection.source if selection else None
            before = axis_size(parse_axis(axis), self.parent.catalogue.sizes(source))
            after = axis_size(parse_axis(axis), self.catalogue.sizes(entry.block))
            self._factors[key] = sqrt(before / after)
        return self._factors[key]

    def _remap(self, selection: BlockSelection | None) -> HashRemap | None:
        assert selection is not None
        kept = selection.kept.get("n_routed_experts")
        before, after = self.parent.config, self.catalogue.config
        if kept is None and after.num_experts_per_tok == before.num_experts_per_tok:
            return None
        policy = self.recipe.keep.experts.hash_table if self.recipe.keep.experts else "nearest"
        return plan_remap(kept, before.n_routed_experts, after.num_experts_per_tok, policy)

    def _transform(
        self,
        entry: Entry,
        source: StoredTensorRef,
        fmt: str,
        rows: IntArray | None,
        cols: IntArray | None,
        shape: tuple[int, ...],
        factor: float,
        remap: HashRemap | None,
        mix: Mix | None,
    ) -> str:
        if mix is not None:
            return FOLD if len(shape) == 1 else FACTOR if mix.is_factored else ROTATE
        parent_shape = self.parent.catalogue.shape(source.entry)
        if remap is not None:
            return REMAP
        if (
            entry.template.axes[0] == "compress_ratio"
            and rows is None
            and shape[0] != parent_shape[0]
        ):
            return INTERPOLATE
        if factor != 1.0:
            return SCALE
        if fmt == source.fmt:
            if rows is None and cols is None:
                return COPY
            if fmt not in QUANTIZED or _is_whole_blocks(fmt, rows, cols, shape, parent_shape):
                return GATHER
        return REQUANTIZE if fmt in QUANTIZED else DEQUANTIZE


def _is_whole_blocks(
    fmt: str,
    rows: IntArray | None,
    cols: IntArray | None,
    shape: tuple[int, ...],
    parent_shape: tuple[int, ...],
) -> bool:
    """Whether the parent's codes and scales serve as they are: whole aligned blocks only.

    Source: spec/slicing.md, trap 9. FP4 scales belong to a row, so rows may be cut freely.
    """
    block = FP4_GROUP if fmt == FP4 else FP8_BLOCK
    row_block = 1 if fmt == FP4 else block
    columns = [None] if cols is None else list(np.atleast_2d(cols))
    if cols is not None and cols.ndim == 2 and (shape[0] // len(columns)) % row_block:
        return False
    return _is_aligned(rows, parent_shape[0], row_block) and all(
        _is_aligned(units, parent_shape[1], block) for units in columns
    )


def _is_aligned(units: IntArray | None, size: int, block: int) -> bool:
    if units is None or block == 1:
        return True
    whole = len(units) // block * block
    runs, rest = units[:whole].reshape(-1, block), units[whole:]
    starts = runs[:, :1]
    if (starts % block).any() or (runs != starts + np.arange(block)).any():
        return False
    # A last, partial block may only be the parent's own last one.
    tail = size % block
    return not len(rest) or (
        len(rest) == tail and bool((rest == size - tail + np.arange(tail)).all())
    )


def replay(parent: Checkpoint, recipe: Recipe, record: Mapping[str, Any]) -> Plan:
    """The plan of a finished replica, from its record instead of making the choices again."""
    selected = restore(parent, recipe, record["selections"], tuple(record["notes"]))
    return plan_selected(parent, recipe, selected, record)
