"""Second moments: where the energy of an axis lies, from a scores file or from weights alone.

A scores file may hold symmetric float32 matrices beside its vectors, each the mean over tokens:

* ``second_moment/hidden_size/model`` (D, D): of n(x), the input of every sublayer without the
  norm's weight;
* ``second_moment/q_lora_rank/<block>`` (Q, Q): of n(wq_a x);
* ``second_moment/o_groups*o_lora_rank/<block>`` (G, L, L): of each group's wo_a output.

Its metadata must name the parent's fingerprint. Blocks are those of the parent.

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
from blake3 import blake3
from numpy.typing import NDArray

from v4surgery.axes import axis_size, parse_axis
from v4surgery.catalogue import Block
from v4surgery.checkpoint.matching import StoredTensorRef
from v4surgery.checkpoint.reader import Array, Checkpoint, decode
from v4surgery.errors import PlanError

Float = NDArray[np.float64]
Units = NDArray[np.int64] | None
_PANEL_ELEMENTS = 1 << 21
_READ_BYTES = 4 << 20
# Means in float32 of products in float32: a matrix whose halves differ by more is another thing.
_ASYMMETRY = 1e-3


class MomentFile:
    """Second moments of a scores file that belongs to a parent.

    Args:
        path: The file.
        parent: What it must be of.

    Raises:
        PlanError: It cannot be read, or was made of another parent.
    """

    def __init__(self, path: str, parent: Checkpoint) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self._parent = path, parent
        try:
            with safe_open(path, framework="numpy") as opened:
                self._shapes = {
                    name: tuple(opened.get_slice(name).get_shape())
                    for name in opened.keys()  # noqa: SIM118
                }
                metadata = opened.metadata() or {}
            self.digest = file_digest(path)
        except (SafetensorError, OSError) as error:
            raise PlanError(
                "the scores cannot be read",
                where=path,
                value=str(error),
                rule="a safetensors file of scores",
            ) from None
        if any(name.startswith("second_moment/") for name in self._shapes) and not any(
            parent.fingerprint in text for text in metadata.values()
        ):
            raise PlanError(
                "the second moments are not of this parent",
                where=path,
                value=metadata.get("fingerprint", "no fingerprint in its metadata"),
                rule=f"made of {parent.name}, fingerprint {parent.fingerprint}",
                hint="score this parent, or leave the file out: weights alone then decide",
            )

    def has(self, axis: str, block: Block | None) -> bool:
        """Whether it has the moments of an axis in a block of the parent.

        Raises:
            PlanError: It has them in another shape.
        """
        key = moment_key(axis, block)
        if key not in self._shapes:
            return False
        wanted = _shape(self._parent, axis, block)
        if self._shapes[key] != wanted:
            raise PlanError(
                "the second moments do not fit the parent",
                where=f"{self.path}: {key}",
                value=f"shape {list(self._shapes[key])}",
                rule=f"{list(wanted)}",
            )
        return True


def moment_key(axis: str, block: Block | None) -> str:
    return f"second_moment/{axis}/{block.prefix if block else 'model'}"


def _shape(parent: Checkpoint, axis: str, block: Block | None) -> tuple[int, ...]:
    sizes = parent.catalogue.sizes(block)
    *outer, size = (axis_size(parse_axis(part), sizes) for part in axis.split("*"))
    return (*outer, size, size)


def file_digest(path: str) -> str:
    hasher = blake3()
    with Path(path).open("rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
    return hasher.hexdigest()


def read_moments(path: str, axis: str, block: Block | None) -> Float:
    """Symmetric matrices of a scores file, ``(..., size, size)``.

    Raises:
        PlanError: Numbers that are not finite, or no symmetric matrix.
    """
    from safetensors import safe_open

    key = moment_key(axis, block)
    with safe_open(path, framework="numpy") as opened:
        values: Float = np.asarray(opened.get_tensor(key), dtype=np.float64)
    turned = values.swapaxes(-1, -2)
    off = np.abs(values - turned).max(initial=0)
    if not off <= _ASYMMETRY * np.abs(values).max(initial=0):  # NaN compares false
        raise PlanError(
            "the second moments are no symmetric matrices of finite numbers",
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
