"""Planning the edit of every tensor: the selections multiplied through the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from v4surgery.axes import axis_index, axis_size, parse_axis
from v4surgery.catalogue import (
    F32,
    FP4,
    I64,
    QUANTIZED,
    Block,
    Catalogue,
    Entry,
    stored_tensors,
)
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.errors import PlanError
from v4surgery.formats import FP4_GROUP, FP8_BLOCK
from v4surgery.recipes.schema import Recipe
from v4surgery.slicers.bases import Bases, Mix, mix_of
from v4surgery.slicers.edit import (
    COPY,
    DEQUANTIZE,
    FACTOR,
    FOLD,
    GATHER,
    INTERPOLATE,
    RANDOM,
    REMAP,
    REQUANTIZE,
    ROTATE,
    SCALE,
    ZERO,
    TensorEdit,
)
from v4surgery.slicers.hash_table import HashRemap, plan_remap
from v4surgery.slicers.selection import BlockSelection, IntArray, Kept, Selections
from v4surgery.slicers.storage import target_format


class Planner:
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
        self._indices: dict[tuple[str, str, int], IntArray | None] = {}
        self._factors: dict[tuple[str, str], float] = {}

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
