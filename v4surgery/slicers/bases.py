"""Axes whose basis is free: which of them a replica mixes instead of picking units, and how.

Picking keeps some coordinates. Three axes of V4 allow any basis, without truncation exactly, so a
replica may keep the best directions instead. With ``n(x) = x / rms(x)``:

* ``hidden_size`` (pca). Streams are mixed by scalars, so a rotation R of the channels commutes with
  everything that happens between norms, and ``n(x R) = n(x) R``. A norm weight w does not commute:
  it is absorbed first, ``W diag(w) n(x) = (W diag(w) R) n(x R)``, and the norm becomes ones. What
  writes into the streams is rotated on its rows (R^T wo_b, R^T w2), the embedding on its columns,
  and so are the mHC projections, inside each stream (their norm has no weight). A drafter's own
  norm stands before the trunk's head, which can absorb one norm only: drafters are refused.
* ``q_lora_rank`` (pca). The same between wq_a (rows), q_norm (absorbed) and wq_b, indexer.wq_b.
* ``o_lora_rank`` (svd). A group's ``wo_b_g wo_a_g`` is one matrix of rank L; any pair of factors
  serves, and a truncated SVD is the best one of fewer ranks (:mod:`.basis_math`).

A basis of keep of size directions has a matrix ``into`` (keep, size) for the rows of what writes
and ``out`` (size, keep) for the columns of what reads, with ``into out = 1``; for a rotation they
are R^T and R. Only which bases there are is decided here, from headers alone; what they are is
computed when the plan is carried out, and recorded beside the replica (:mod:`.basis_file`).

``compensate``: after truncation a norm divides by the mean square of keep instead of size numbers,
whose sum is the share k of the energy before: what was ``R^T n(x)`` becomes that times
sqrt(keep / (k size)). The norm takes sqrt(k size / keep), k being that of the second moment that
the basis diagonalises; picked units have no known k, and there the factor is sqrt(size / keep).

Source: spec/forward.md; spec/slicing.md, trap 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from v4surgery.axes import Dim, contains, parse_axis
from v4surgery.catalogue import Block, Entry, norm_before
from v4surgery.checkpoint.header import payload_bytes
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.config import V4Config
from v4surgery.errors import PlanError
from v4surgery.importance.moments import has_moments
from v4surgery.importance.scores_file import ScoresFile
from v4surgery.recipes.schema import BasisPick, Recipe
from v4surgery.slicers.selection import BlockSelection, Selections

PCA, SVD, SELECT = "pca", "svd", "select"
AXES: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "q_lora_rank": "q_lora_rank",
    "o_lora_rank": "o_groups*o_lora_rank",
}
"""Dims that take a method, each with the axis that its second moments are filed under."""


@dataclass(frozen=True)
class Basis:
    """One change of basis that a plan asks for.

    Attributes:
        dim: ``hidden_size``, ``q_lora_rank`` or ``o_lora_rank``.
        method: PCA or SVD.
        selection: The block, or None for the whole model.
        size: Units of the parent.
        keep: Directions kept.
        groups: Bases side by side: the kept groups of ``o_lora_rank``, else 1.
        moments: Digest of the scores file whose second moments it is made of; None for weights.
        file: That file; None when a replica's record says all that is needed.
    """

    dim: str
    method: str
    selection: BlockSelection | None
    size: int
    keep: int
    groups: int
    moments: str | None
    file: str | None

    @property
    def source(self) -> Block | None:
        """The parent's block; None for the whole model."""
        return None if self.selection is None else self.selection.source

    @property
    def key(self) -> str:
        return f"{self.dim}/{self.selection.target.prefix if self.selection else 'model'}"

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is recorded: name, dtype and shape; ``kept`` is the share of energy kept."""
        groups, size, keep = self.groups, self.size, self.keep
        found = {f"{self.key}/kept": ("F64", (groups,)), self.out: ("F32", (groups, size, keep))}
        if self.method == SVD:
            found[self.into] = ("F32", (groups, keep, size))
        return found

    @property
    def out(self) -> str:
        return f"{self.key}/out"

    @property
    def into(self) -> str:
        """Name of the recorded ``into``; of a rotation it is ``out`` transposed."""
        return f"{self.key}/into" if self.method == SVD else self.out

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "size": self.size,
            "keep": self.keep,
            "groups": self.groups,
            "moments": self.moments,
        }


@dataclass(frozen=True)
class Bases:
    """All changes of basis of a plan, the model's first."""

    items: tuple[Basis, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.items)

    @property
    def nbytes(self) -> int:
        """Of the recorded arrays."""
        arrays = [array for basis in self.items for array in basis.arrays.values()]
        return sum(payload_bytes(dtype, shape) for dtype, shape in arrays)

    def to_json(self) -> dict[str, Any]:
        return {basis.key: basis.to_json() for basis in self.items}

    def on(self, axis: str, block: Block | None) -> Basis | None:
        """The basis of an axis in a block of the replica."""
        place = block.prefix if block else ""
        for basis in self.items:
            own = basis.selection.target.prefix if basis.selection else place
            if own == place and contains(parse_axis(axis), Dim(basis.dim)):
                return basis
        return None


@dataclass(frozen=True, slots=True)
class Mix:
    """What an edit does beside picking.

    Attributes:
        rows: Basis whose ``into`` multiplies the rows.
        cols: Basis whose ``out`` multiplies the columns.
        fold: Norm whose weight multiplies the columns first.
        kept: Basis whose share of energy the factor of ``compensate`` takes.
    """

    rows: Basis | None
    cols: Basis | None
    fold: StoredTensorRef | None
    kept: Basis | None

    @property
    def is_factored(self) -> bool:
        return any(basis is not None and basis.method == SVD for basis in (self.rows, self.cols))

    def to_json(self) -> dict[str, Any]:
        """What a replica's record says beside where a tensor is from."""
        named = {"rows": self.rows, "cols": self.cols}
        data: dict[str, Any] = {
            "bases": {side: basis.key for side, basis in named.items() if basis is not None}
        }
        return data if self.fold is None else {**data, "absorbs": self.fold.entry.stem}


def plan_bases(
    parent: Checkpoint,
    recipe: Recipe,
    config: V4Config,
    selections: Selections,
    record: Mapping[str, Any] | None = None,
) -> Bases:
    """Which bases a recipe asks for.

    Args:
        parent: Opened.
        recipe: What to do.
        config: The replica's.
        selections: What it keeps otherwise.
        record: ``bases.of`` of a replica's record, which says what they were made of; None looks
            into the scores files.

    Raises:
        PlanError: Drafters stand in the way, or a scores file is not of this parent.
    """
    if recipe.init == "random":
        return Bases()
    found: list[Basis] = []
    file = None
    if record is None and recipe.scores is not None:
        file = ScoresFile(Path(recipe.scores))
        file.require_parent(parent)
    for dim, axis in AXES.items():
        choice: BasisPick | None = getattr(recipe.keep, dim)
        if choice is None or choice.method == SELECT:
            continue
        if dim == "hidden_size" and config.num_drafters:
            raise _drafters_in_the_way(parent)
        for selection in (None,) if dim == "hidden_size" else selections.blocks:
            basis = Basis(
                dim,
                choice.method,
                selection,
                getattr(parent.config, dim),
                getattr(config, dim),
                config.o_groups if dim == "o_lora_rank" else 1,
                None,
                None,
            )
            if record is not None:
                basis = replace(basis, moments=record.get(basis.key, {}).get("moments"))
            elif file is not None and has_moments(file, parent, axis, basis.source):
                basis = replace(basis, moments=file.blake3, file=str(file.path))
            found.append(basis)
    return Bases(tuple(found))


def _drafters_in_the_way(parent: Checkpoint) -> PlanError:
    return PlanError(
        "the hidden basis cannot be rotated with the drafters kept",
        where="keep.hidden_size.method",
        value=f"pca, with {parent.config.num_drafters} drafter block(s)",
        rule="a drafter's own norm stands before the trunk's head, whose columns absorb the "
        "trunk's norm: two weights cannot be absorbed into one head",
        hint="keep: {mtp: drop}, or method: select",
    )


def mix_of(
    bases: Bases,
    entry: Entry,
    selection: BlockSelection | None,
    parent: Checkpoint,
    *,
    compensate: bool,
) -> Mix | None:
    """What a tensor of the replica does beside picking; None where it only picks."""
    if not bases:
        return None
    axes = entry.template.axes
    found = [bases.on(axis, entry.block) for axis in axes]
    if not any(found):
        return None
    rows, cols = (found[0], None) if len(axes) == 1 else (found[0], found[1])
    norm = norm_before(entry.template)
    fold = None
    if cols is not None and norm is not None:
        fold = parent.tensors[(selection.source.prefix if selection else "") + norm]
    normalised = entry.template.normalises
    kept = bases.on(normalised, entry.block) if compensate and normalised else None
    return Mix(rows, cols, fold, kept)


def bytes_for_bases(parent: Checkpoint, bases: Bases, selections: Selections) -> int:
    """Bytes of the parent that are read to compute the bases."""

    def nbytes(prefix: str, *stems: str) -> int:
        return sum(parent.tensors[prefix + stem].nbytes for stem in stems)

    total = 0
    for basis in bases.items:
        if basis.method == SVD:
            assert basis.selection is not None
            total += nbytes(basis.selection.source.prefix, "attn.wo_a", "attn.wo_b")
        elif basis.moments is not None:
            continue
        elif basis.selection is not None:
            total += nbytes(basis.selection.source.prefix, "attn.wq_a")
        else:
            total += nbytes("", "embed")
            for block in selections.blocks:
                total += nbytes(block.source.prefix, "attn.wo_b", "ffn.shared_experts.w2")
    return total


def basis_notes(bases: Bases, *, compensate: bool) -> list[str]:
    """What people should know of the bases, before they are computed."""
    notes = []
    for dim in AXES:
        items = [basis for basis in bases.items if basis.dim == dim]
        if not items:
            continue
        measured = sum(basis.moments is not None for basis in items)
        source = (
            "second moments of the scores file"
            if measured == len(items)
            else "weights alone"
            if not measured
            else f"second moments in {measured} of {len(items)} blocks, weights in the others"
        )
        first = items[0]
        is_cut = first.keep < first.size
        notes.append(
            f"{dim}: {first.method}, {first.keep} of {first.size} directions, from {source}"
            + ("" if is_cut else "; nothing is dropped, so it changes nothing but roundings")
        )
        if is_cut and first.method == PCA and not compensate:
            notes.append(
                f"{dim}: norms divide by fewer units; `compensate: true` corrects that by the "
                "energy that the directions keep"
            )
    return notes
