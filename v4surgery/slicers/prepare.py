"""Computing the bases of a plan and recording them, before the first tensor is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from v4surgery.axes import axis_index, parse_axis
from v4surgery.checkpoint.durable import sync_dir
from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.reader import Checkpoint, decode
from v4surgery.checkpoint.shard import PART, writing
from v4surgery.errors import PlanError
from v4surgery.importance.moments import (
    column_panels,
    hidden_moment,
    query_moment,
    read_moments,
)
from v4surgery.importance.scores_file import ScoresFile
from v4surgery.slicers.bases import AXES, Bases, Basis
from v4surgery.slicers.basis_file import BASES_FILE, BasisFile
from v4surgery.slicers.basis_math import factor_pair, principal_components
from v4surgery.slicers.plan import Plan
from v4surgery.slicers.selection import BlockSelection, IntArray

Float = NDArray[np.float64]


def prepare_bases(
    plan: Plan, out: Path, progress: Callable[[int], None] | None = None
) -> BasisFile:
    """The bases of a replica: those that an earlier run recorded, or new ones, recorded now.

    Args:
        plan: What is to be done.
        out: The replica's folder, which is ours.
        progress: Called with bytes as they are written or found.

    Raises:
        PlanError: Weights or second moments that are not finite, or a scores file that changed.
        OutputError: Writing failed.
    """
    if (out / BASES_FILE).exists():
        found = BasisFile(LocalFolder(out), plan.bases)
        if found.metadata.get("plan_hash") == plan.plan_hash:
            if progress is not None:
                progress(plan.bases.nbytes)
            return found
    _check_files(plan.bases)
    path = out / (BASES_FILE + PART)
    with writing(path, lambda: f"the same command goes on in {out}"), path.open("wb") as file:
        file.write(plan.basis_header)
        for data in _arrays(plan):
            file.write(data.tobytes())
            if progress is not None:
                progress(data.nbytes)
        file.flush()
        os.fsync(file.fileno())
    path.replace(out / BASES_FILE)
    sync_dir(out)
    return BasisFile(LocalFolder(out), plan.bases)


def _check_files(bases: Bases) -> None:
    for path, digest in {(b.file, b.moments) for b in bases.items if b.file is not None}:
        if ScoresFile(Path(path)).blake3 != digest:
            raise PlanError(
                "the scores file changed since the plan was made",
                where=path,
                hint="run the command again",
            )


def _arrays(plan: Plan) -> Iterator[NDArray[np.float32] | Float]:
    """What the file holds, in its order."""
    rotation: Float | None = None
    for basis in plan.bases.items:
        if basis.dim == "o_lora_rank":
            into, out, kept = _factors(plan, basis, rotation)
        else:
            directions, share = principal_components(_moment(plan, basis), basis.keep)
            out, kept, into = directions[None], np.array([share]), None
            rotation = directions if basis.dim == "hidden_size" else rotation
        yield kept
        yield out.astype(np.float32)
        if into is not None:
            yield into.astype(np.float32)


def _moment(plan: Plan, basis: Basis) -> Float:
    """What a rotation diagonalises, ``(size, size)``."""
    parent, selection = plan.parent, basis.selection
    if basis.file is not None:
        return read_moments(basis.file, parent, AXES[basis.dim], basis.source)
    if selection is None:
        ids = plan.selections.model.get("vocab_size")
        blocks = [
            (
                block.source,
                _index(parent, block, "o_groups*o_lora_rank"),
                _index(parent, block, "moe_intermediate_size"),
            )
            for block in plan.selections.blocks
        ]
        return _finite(hidden_moment(parent, ids, blocks), basis)
    channels = _index(parent, selection, "hidden_size")
    return _finite(query_moment(parent, selection.source, channels), basis)


def _factors(plan: Plan, basis: Basis, rotation: Float | None) -> tuple[Float, Float, Float]:
    """``into`` (G, keep, L), ``out`` (G, L, keep) and the energy kept (G,) of one block.

    The product is that of the replica: heads and head dims that it keeps, channels that it keeps
    or rotates.
    """
    parent, selection = plan.parent, basis.selection
    assert selection is not None
    moments = None
    kept_groups = selection.kept.get("o_groups")
    groups = np.arange(parent.config.o_groups) if kept_groups is None else kept_groups
    if basis.file is not None:
        moments = read_moments(basis.file, parent, AXES[basis.dim], basis.source)
    channels = selection.kept.get("hidden_size")
    wo_b = parent.tensors[selection.source.prefix + "attn.wo_b"]
    ranks = _index(parent, selection, AXES[basis.dim])
    pairs = []
    panels = column_panels(parent, wo_b, ranks, width=basis.size)
    for number, (group, b) in enumerate(zip(groups, panels, strict=True)):
        b = b if channels is None else b[channels]
        b = b if rotation is None else rotation.T @ b
        a = _group_rows(parent, selection, int(group), number)
        where = f"{selection.source.prefix}attn.wo_a, wo_b, group {group}"
        _finite(b, basis, where)
        moment = None if moments is None else moments[group]
        pairs.append(factor_pair(b, _finite(a, basis, where), basis.keep, moment))
    into, out, kept = (np.stack(parts) for parts in zip(*pairs, strict=True))
    return into, out, kept


def _group_rows(parent: Checkpoint, selection: BlockSelection, group: int, number: int) -> Float:
    """A group's wo_a, ``(L, kept heads * kept head dims)``; ``number`` counts kept groups."""
    stored = parent.tensors[selection.source.prefix + "attn.wo_a"]
    cols = _index(parent, selection, "group_heads*head_dim")
    if cols is not None and cols.ndim == 2:
        cols = cols[number]
    size = parent.config.o_lora_rank
    codes, scales = parent.read_codes(stored, slice(group * size, (group + 1) * size), cols)
    return decode(stored.fmt, codes, scales, "f32").astype(np.float64)


def _index(parent: Checkpoint, selection: BlockSelection, axis: str) -> IntArray | None:
    """Parent positions kept on an axis; neurons are those of the shared expert."""
    kept = selection.for_expert(None, is_shared=True)
    return axis_index(parse_axis(axis), parent.catalogue.sizes(selection.source), kept)


def _finite(values: Float, basis: Basis, where: str | None = None) -> Float:
    if not np.isfinite(values).all():
        raise PlanError(
            "a basis cannot be made of weights that are NaN or infinite",
            where=where or basis.key,
            rule="finite weights",
            hint="method: select does not look at them",
        )
    return values
