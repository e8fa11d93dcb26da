"""Second moments: where the energy of an axis lies, from a scores file or from weights alone.

A scores file may hold symmetric float32 matrices beside its vectors, each the mean over tokens:

* ``second_moment/hidden_size/model`` (D, D): of n(x), the input of every sublayer without the
  norm's weight;
* ``second_moment/q_lora_rank/<block>`` (Q, Q): of n(wq_a x);
* ``second_moment/o_groups*o_lora_rank/<block>`` (G, L, L): of each group's wo_a output.

Blocks are those of the parent.

From weights alone, of what writes into an axis on inputs without any preferred direction:

* hidden: the mean of n(e) n(e)^T over embedding rows e, and, each with a mean square of 1 as a norm
  makes it, W W^T of every block's wo_b and shared w2. Routed experts are left out: they are most
  of the bytes, and one token meets few of them.
* q: A A^T with A = wq_a diag(attn_norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from v4surgery.axes import axis_size, parse_axis
from v4surgery.catalogue import Block
from v4surgery.checkpoint.reader import Array, Checkpoint, decode
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.errors import PlanError
from v4surgery.importance.scores_file import ScoresFile

Float = NDArray[np.float64]
Units = NDArray[np.int64] | None
_PANEL_ELEMENTS = 1 << 21
# Means in float32 of products in float32: a matrix whose halves differ by more is another thing.
_ASYMMETRY = 1e-3


def has_moments(file: ScoresFile, parent: Checkpoint, axis: str, block: Block | None) -> bool:
    """Whether a scores file has the second moments of an axis in a block of the parent.

    Raises:
        PlanError: It has them in another shape.
    """
    key = moment_key(axis, block)
    if key not in file.keys:
        return False
    file.require_shape(key, _shape(parent, axis, block))
    return True


def moment_key(axis: str, block: Block | None) -> str:
    return f"second_moment/{axis}/{block.prefix if block else 'model'}"


def _shape(parent: Checkpoint, axis: str, block: Block | None) -> tuple[int, ...]:
    sizes = parent.catalogue.sizes(block)
    *outer, size = (axis_size(parse_axis(part), sizes) for part in axis.split("*"))
    return (*outer, size, size)


def read_moments(path: str, parent: Checkpoint, axis: str, block: Block | None) -> Float:
    """Symmetric matrices of a scores file, ``(..., size, size)``.

    Raises:
        PlanError: Numbers that are not finite, or no symmetric matrix.
    """
    file, key = ScoresFile(Path(path)), moment_key(axis, block)
    values: Float = file.array(key, _shape(parent, axis, block)).astype(np.float64)
    turned = values.swapaxes(-1, -2)
    off = np.abs(values - turned).max(initial=0)
    if off > _ASYMMETRY * np.abs(values).max(initial=0):
        raise PlanError(
            "the second moments are no symmetric matrices",
            where=f"{path}: {key}",
            value=f"halves differ by {off:.3g}",
            rule="the mean of x x^T",
        )
    return (values + turned) / 2


def hidden_moment(
    parent: Checkpoint, rows: Units, blocks: Iterable[tuple[Block, Units, Units]]
) -> Float:
    """Second moment of n(x) as the weights alone suggest it, ``(D, D)`` with trace D.

    Args:
        parent: Where to read.
        rows: Kept token ids; None for all.
        blocks: Each kept block with the columns kept of its wo_b and of its shared w2.
    """
    size = parent.config.hidden_size
    total = np.zeros((size, size))
    count = 0
    embed = parent.tensors["embed"]
    ids = np.arange(embed.weight.shape[0]) if rows is None else rows
    step = max(_PANEL_ELEMENTS // size, 1)
    for begin in range(0, len(ids), step):
        part = ids[begin : begin + step]
        x = parent.read_float(embed, part if rows is not None else slice(part[0], part[-1] + 1))
        energy = np.square(x, dtype=np.float64).mean(axis=1, keepdims=True)
        x = (x / np.sqrt(np.where(energy > 0, energy, 1))).astype(np.float32)
        total += x.T @ x
    total /= len(ids)
    for block, ranks, neurons in blocks:
        for stem, cols in (("attn.wo_b", ranks), ("ffn.shared_experts.w2", neurons)):
            gram = np.zeros((size, size))
            for panel in column_panels(parent, parent.tensors[block.prefix + stem], cols):
                x = panel.astype(np.float32)
                gram += x @ x.T
            energy = np.trace(gram) / size
            if energy > 0:
                total += gram / energy
        count += 2
    return total / (1 + count)


def query_moment(parent: Checkpoint, block: Block, channels: Units) -> Float:
    """Second moment of wq_a x for inputs without preferred direction, ``(Q, Q)``."""
    norm = parent.read_float(
        parent.tensors[block.prefix + "attn_norm"], slice(0, parent.config.hidden_size)
    ).reshape(-1)
    norm = norm if channels is None else norm[channels]
    size, begin = parent.config.q_lora_rank, 0
    total = np.zeros((size, size))
    for panel in column_panels(parent, parent.tensors[block.prefix + "attn.wq_a"], channels):
        x = panel * norm[begin : begin + panel.shape[1]]
        total += x @ x.T
        begin += panel.shape[1]
    return total


def column_panels(
    parent: Checkpoint, stored: StoredTensorRef, cols: Units, width: int | None = None
) -> Iterator[Float]:
    """A matrix, read once, in panels of all rows and ``width`` columns each."""
    codes, scales = parent.read_codes(stored, slice(0, stored.weight.shape[0]), cols)
    width = width or max(_PANEL_ELEMENTS // len(codes), 1)
    for begin in range(0, codes.shape[1], width):
        part = slice(begin, begin + width)
        panel: Array = decode(
            stored.fmt, codes[:, part], None if scales is None else _columns(scales, part), "f32"
        )
        yield panel.astype(np.float64)


def _columns(scales: Array, part: slice) -> Array:
    return scales if scales.shape[1] == 1 else scales[:, part]
