"""Which of the parent's activations a replica's stand for: layers, and coordinates of each tap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from v4surgery.axes import axis_index, parse_axis
from v4surgery.catalogue import Block
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.slicers.basis_file import read_rotation
from v4surgery.slicers.selection import BlockSelection, Kept, Selections

# The axes that end a tap's shape; those before them are of prompts and tokens.
TAP_AXES: Mapping[str, tuple[str, ...]] = {
    "in": ("streams", "hidden_size"),
    "attn.hc": ("hidden_size",),
    "attn.in": ("hidden_size",),
    "attn.heads": ("num_attention_heads", "head_dim"),
    "attn.out": ("hidden_size",),
    "ffn.hc": ("hidden_size",),
    "ffn.in": ("hidden_size",),
    "ffn.out": ("hidden_size",),
    "out": ("streams", "hidden_size"),
    "embed": ("hidden_size",),
    "logits": ("vocab_size",),
}
# Taps behind a norm whose weight a rotated replica has absorbed into what reads them.
ABSORBED: Mapping[str, str] = {"attn.in": "attn_norm", "ffn.in": "ffn_norm"}


class ReplicaMapping:
    """Where each block of a replica comes from, and what of the parent's values it has.

    Args:
        replica: Opened; its record says what was selected.
        parent: Opened.
        record: v4surgery.json of the replica.
    """

    def __init__(self, replica: Checkpoint, parent: Checkpoint, record: Mapping[str, Any]) -> None:
        self._parent = parent
        self._norms: dict[str, Tensor] = {}
        selections = Selections.from_json(
            record["selections"],
            {block.prefix: block for block in replica.catalogue.blocks},
            {block.prefix: block for block in parent.catalogue.blocks},
        )
        self._model: Kept = selections.model
        rotation = read_rotation(replica.source, record)
        self._rotation = None if rotation is None else torch.from_numpy(rotation).float()
        self.blocks = tuple(b for b in selections.blocks if not b.target.is_drafter)
        self.by_source = {block.source.prefix: block for block in self.blocks}

    def cut(self, tap: str, value: Tensor, block: BlockSelection | None) -> Tensor:
        """What the replica has of a parent's activation, in the replica's order.

        Args:
            tap: Name of the tap.
            value: The parent's activation there, ``(..., *axes of the tap)``.
            block: The block that it belongs to, or None for ``embed`` and ``logits``.
        """
        value = self.rotated(tap, value, block)
        axes = TAP_AXES[tap]
        for offset, axis in enumerate(axes):
            index = self.index(axis, block)
            if index is not None:
                value = value.index_select(value.dim() - len(axes) + offset, index.to(value.device))
        return value

    @property
    def is_rotated(self) -> bool:
        """Whether its channels are directions among the parent's, and not some of them."""
        return self._rotation is not None

    def rotated(self, tap: str, value: Tensor, block: BlockSelection | None) -> Tensor:
        """A parent's activation with its channels in the replica's basis, if that is another one.

        The replica has absorbed norm weights into what reads ``attn.in`` and ``ffn.in``: there the
        parent's weight is taken out first (a weight of 0 leaves nothing to compare: 0).
        """
        if self._rotation is None or TAP_AXES[tap][-1] != "hidden_size":
            return value
        norm = ABSORBED.get(tap)
        if norm is not None and block is not None:
            weight = self._norm(block.source.prefix + norm).to(value.device)
            value = torch.where(weight == 0, 0.0, value.float() / weight)
        return value.float() @ self._rotation.to(value.device)

    def _norm(self, stem: str) -> Tensor:
        if stem not in self._norms:
            stored = self._parent.tensors[stem]
            values = self._parent.read_float(stored, slice(0, stored.weight.shape[0]))
            self._norms[stem] = torch.from_numpy(values.reshape(-1))
        return self._norms[stem]

    def experts(self, chosen: Tensor, block: BlockSelection) -> Tensor:
        """The parent's choices ``(S, K)`` in the replica's numbers; -1 where it has none."""
        kept = self.index("n_routed_experts", block)
        if kept is None:
            return chosen
        numbers = torch.full((self._parent.config.n_routed_experts,), -1, device=chosen.device)
        numbers[kept.to(chosen.device)] = torch.arange(len(kept), device=chosen.device)
        return numbers[chosen]

    def ids(self, replica_ids: Tensor) -> Tensor:
        """The parent's token ids of a prompt in the replica's vocabulary."""
        kept = self.index("vocab_size", None)
        return replica_ids if kept is None else kept[replica_ids]

    def index(self, axis: str, block: BlockSelection | None) -> Tensor | None:
        """The parent's units that the replica has on a tap's axis, in its order; None for all."""
        source: Block | None = block.source if block else None
        kept = block.kept if block else self._model
        sizes = self._parent.catalogue.sizes(source)
        index = axis_index(parse_axis(axis), sizes, kept)
        return None if index is None else torch.from_numpy(index)
