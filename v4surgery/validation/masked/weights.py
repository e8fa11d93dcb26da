"""The parent's weights, whole, decoded one at a time; what a recipe does to each number alone.

Two things that a recipe may do are no selection and still exact: ``compensate`` multiplies norm
weights and mHC projections by a factor, and a stored dtype rounds each number once. Both are done
here to the whole tensor, so that the masked parent has the replica's numbers wherever both have
the unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import V4Config
from v4surgery.kernels.reference.dequant import dequant_fp4, dequant_fp8
from v4surgery.model.loader import read_tensor
from v4surgery.validation.masked.record import Kept

PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class Weights:
    """Weights of one parent block, or of the model itself, float32 on the device.

    Attributes:
        parent: Where they are.
        replica: Says in which dtype it stores each.
        kept: The block.
        compensate: Whether the recipe compensates.
        device: Where they go.
    """

    parent: Checkpoint
    replica: Checkpoint
    kept: Kept
    compensate: bool
    device: torch.device
    _cache: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str) -> Tensor:
        """A tensor of the block, by its name inside it; kept for the next call."""
        if name not in self._cache:
            self._cache[name] = self._read(name, name)
        return self._cache[name]

    def has(self, name: str) -> bool:
        """Whether the parent's block has a tensor."""
        return self.kept.source + name in self.parent.tensors

    def expert(self, expert: int, matrix: str) -> Tensor:
        """``w1``, ``w2`` or ``w3`` of a kept expert, by its number in the parent; not kept."""
        own = self.kept.experts.index(expert)
        return self._read(f"ffn.experts.{expert}.{matrix}", f"ffn.experts.{own}.{matrix}")

    def ape(self, name: str, ratio: int) -> Tensor:
        """The window's positions for the replica's ratio, ``(ratio, c*H)``.

        Rows of another ratio are the recorded ones, or lie between the parent's: row i of r' at
        ``(i + 1/2) * r / r' - 1/2``, linear, held inside the first and the last.
        """
        rows = self(name)
        if self.kept.ape_rows is not None:
            return rows[list(self.kept.ape_rows)]
        if len(rows) == ratio:
            return rows
        at = (np.arange(ratio) + 0.5) * len(rows) / ratio - 0.5
        columns = rows.cpu().double().numpy().T
        mixed = [np.interp(at, np.arange(len(rows)), column) for column in columns]
        return torch.from_numpy(np.stack(mixed, axis=1).astype(np.float32)).to(self.device)

    def _read(self, name: str, own_name: str) -> Tensor:
        value = decoded(self.parent, self.kept.source + name, self.device)
        if self.compensate:
            factor = compensation(name, self.kept, self.parent.config)
            value = value if factor == 1 else (value.double() * factor).float()
        own = self.replica.tensors.get(self.kept.target + own_name)
        return value.to(PLAIN[own.fmt]).float() if own and own.fmt in PLAIN else value


def decoded(checkpoint: Checkpoint, stem: str, device: torch.device) -> Tensor:
    """A floating tensor of a checkpoint, float32, as it is stored in values."""
    stored = checkpoint.tensors[stem]
    weight = read_tensor(checkpoint, stored.weight, device)
    if stored.scale is None:
        return weight.float()
    scale = read_tensor(checkpoint, stored.scale, device)
    return (dequant_fp4 if stored.fmt == "FP4" else dequant_fp8)(weight, scale)


def compensation(name: str, kept: Kept, config: V4Config) -> float:
    """sqrt(units before / units after) of the mean square that a weight follows.

    Source: spec/slicing.md, trap 10.
    """
    head_dim = len(kept.nope) + 2 * len(kept.pairs)
    channels = config.hidden_size / len(kept.channels)
    if name.endswith("_fn"):
        return sqrt(channels * config.hc_mult / len(kept.streams))
    if name in ("attn.kv_norm", "attn.compressor.norm"):
        return sqrt(config.head_dim / head_dim)
    if name == "attn.q_norm":
        return sqrt(config.q_lora_rank / len(kept.q_ranks))
    if name in ("norm", "attn_norm", "ffn_norm", "enorm", "hnorm"):
        return sqrt(channels)
    return 1.0
