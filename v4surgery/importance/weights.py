"""Scores from weights alone: the norm of what a unit owns, and the norms of gate rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from v4surgery.axes import Axis, axis_size, contains, fold_axis, parse_axis
from v4surgery.catalogue import Block
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef

Scores = NDArray[np.float64]
CHUNK_ELEMENTS = 1 << 20


def gate_norms(parent: Checkpoint, block: Block) -> Scores:
    """Euclidean norm of each expert's gate row, ``(E,)``."""
    gate = parent.tensors[block.prefix + "ffn.gate"]
    return np.sqrt(_row_and_column_squares(parent, gate)[0])


def gate_tensors(parent: Checkpoint, block: Block) -> list[StoredTensorRef]:
    return [parent.tensors[block.prefix + "ffn.gate"]]


def owning_tensors(parent: Checkpoint, part: Axis, block: Block | None) -> list[StoredTensorRef]:
    """Tensors that have ``part`` among their axes, in one block or (None) in the whole model.

    An expert owns its three matrices, and its gate row by its axis.
    """
    experts = parse_axis("n_routed_experts")
    return [
        stored
        for stored in parent.tensors.values()
        if (block is None or stored.entry.block == block)
        and stored.entry.template.storage != "I64"
        and len(stored.weight.shape) == 2
        and (
            any(contains(axis, part) for axis in owned_axes(stored))
            or (part == experts and stored.entry.expert is not None)
        )
    ]


def unit_norms(
    parent: Checkpoint, part: Axis, block: Block | None, stored: Iterable[StoredTensorRef]
) -> Scores:
    """Norm of all weights that each unit of ``part`` owns, ``(units,)``, by streaming.

    Args:
        parent: Where to read.
        part: The axis (or a part of one) whose units are scored, such as ``hidden_size``.
        block: The block whose sizes count; None for dims of the model.
        stored: The tensors to add up, from :func:`owning_tensors`.
    """
    sizes = parent.catalogue.sizes(block)
    total = np.zeros(axis_size(part, sizes))
    for tensor in stored:
        rows, cols = _row_and_column_squares(parent, tensor)
        if tensor.entry.expert is not None and part == parse_axis("n_routed_experts"):
            total[tensor.entry.expert] += rows.sum()
            continue
        own = parent.catalogue.sizes(tensor.entry.block)
        for axis, squares in zip(owned_axes(tensor), (rows, cols), strict=True):
            if contains(axis, part):
                total += fold_axis(axis, own, part, squares)
                if tensor.entry.template.is_block_diagonal:
                    break  # rows and columns of a group are the same weights
    return np.sqrt(total)


def layer_norms(parent: Checkpoint) -> Scores:
    """Norm of everything that each trunk layer owns, ``(layers,)``."""
    total = np.zeros(parent.config.num_hidden_layers)
    for stored in layer_tensors(parent):
        block = stored.entry.block
        assert block is not None
        total[block.index] += _row_and_column_squares(parent, stored)[0].sum()
    return np.sqrt(total)


def layer_tensors(parent: Checkpoint) -> list[StoredTensorRef]:
    return [
        stored
        for stored in parent.tensors.values()
        if stored.entry.block is not None
        and not stored.entry.block.is_drafter
        and stored.entry.template.storage != "I64"
    ]


def owned_axes(stored: StoredTensorRef) -> tuple[Axis, ...]:
    """A tensor's axes; wo_a's columns are those of all groups, not of one."""
    template = stored.entry.template
    axes = template.axes
    if template.is_block_diagonal:
        axes = (axes[0], "num_attention_heads*head_dim")
    return tuple(parse_axis(axis) for axis in axes)


def _row_and_column_squares(parent: Checkpoint, stored: StoredTensorRef) -> tuple[Scores, Scores]:
    """Sums of squares by row and by column; columns of wo_a by group, group-major."""
    entry = stored.entry
    shape = parent.catalogue.shape(entry)
    num_rows, num_cols = shape if len(shape) == 2 else (shape[0], 1)
    groups = parent.config.o_groups if entry.template.is_block_diagonal else 1
    rows, cols = np.zeros(num_rows), np.zeros((groups, num_cols))
    step = max(CHUNK_ELEMENTS // num_cols, 1)
    for group in range(groups):
        first, last = group * num_rows // groups, (group + 1) * num_rows // groups
        for begin in range(first, last, step):
            chunk = slice(begin, min(begin + step, last))
            values = parent.read_float(stored, chunk).reshape(-1, num_cols)
            squares = np.square(values, dtype=np.float64)
            rows[chunk] = squares.sum(axis=1)
            cols[group] += squares.sum(axis=0)
    return rows, cols.reshape(-1)
