"""Masks in the parent's shapes, and where the replica's coordinates lie among the parent's.

A mask is 1 where a unit is kept. The masked parent multiplies activations by masks and takes means
over what they leave; it never cuts a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4surgery.config import V4Config
from v4surgery.validation.masked.record import Kept


class Masks:
    """Float32 masks of one block.

    Attributes:
        stream_M, channel_D, dim_H, q_rank_Q, expert_E, index_head_X, index_dim_Y: By unit.
        head_GN: By group and head inside it; zero for all heads of a removed group.
        o_rank_GL: By group and rank; zero for all ranks of a removed group.
    """

    def __init__(self, kept: Kept, config: V4Config, device: torch.device) -> None:
        self.kept, self.config, self.device = kept, config, device
        rotated = [dim for pair in kept.pairs for dim in (2 * pair, 2 * pair + 1)]
        nope, index_nope = config.nope_head_dim, config.index_nope_head_dim
        self.stream_M = self._ones(config.hc_mult, kept.streams)
        self.channel_D = self._ones(config.hidden_size, kept.channels)
        self.dim_H = self._ones(config.head_dim, [*kept.nope, *(nope + d for d in rotated)])
        self.q_rank_Q = self._ones(config.q_lora_rank, kept.q_ranks)
        self.expert_E = self._ones(config.n_routed_experts, kept.experts)
        self.index_head_X = self._ones(config.index_n_heads, kept.index_heads)
        self.index_dim_Y = self._ones(
            config.index_head_dim, [*kept.index_nope, *(index_nope + d for d in rotated)]
        )
        self.head_GN = self._nested(config.heads_per_group, kept.heads)
        self.o_rank_GL = self._nested(config.o_lora_rank, kept.o_ranks)

    def neuron_F(self, expert: int | None) -> Tensor:  # noqa: N802 - shape suffix
        """Neurons of a kept expert, given by its number in the parent, or of the shared one."""
        row = -1 if expert is None else self.kept.experts.index(expert)
        return self._ones(self.config.moe_intermediate_size, self.kept.neurons[row])

    def spread_pairs(self, frequencies: Tensor) -> Tensor:
        """The replica's frequencies ``(R'/2,)`` at the parent's pairs ``(R/2,)``, 0 elsewhere."""
        spread = torch.zeros(self.config.qk_rope_head_dim // 2, device=self.device)
        spread[list(self.kept.pairs)] = frequencies.to(self.device)
        return spread

    def _ones(self, size: int, units: Sequence[int]) -> Tensor:
        mask = torch.zeros(size, device=self.device)
        mask[list(units)] = 1
        return mask

    def _nested(self, size: int, rows: Sequence[Sequence[int]]) -> Tensor:
        mask = torch.zeros(self.config.o_groups, size, device=self.device)
        for group, units in zip(self.kept.groups, rows, strict=True):
            mask[group, list(units)] = 1
        return mask


@dataclass(frozen=True)
class Coordinates:
    """Where a replica's activation lies in the parent's: an index for each axis behind tokens.

    Attributes:
        shape: The parent's shape behind the tokens.
        index: Broadcasting index tensors, int64.
    """

    shape: tuple[int, ...]
    index: tuple[Tensor, ...]

    def seen(self, value: Tensor) -> Tensor:
        """What the replica has of a parent's activation, in the replica's order."""
        return value[self._at]

    def placed(self, value: Tensor) -> Tensor:
        """A replica's activation among the parent's units, zero where it has none."""
        spread = value.new_zeros(value.shape[0], *self.shape)
        spread[self._at] = value
        return spread

    @property
    def _at(self) -> tuple[slice | Tensor, ...]:
        return (slice(None), *self.index)


class Places:
    """Coordinates of the activations of one block."""

    def __init__(self, kept: Kept, config: V4Config, device: torch.device) -> None:
        def units(ids: Sequence[int]) -> Tensor:
            return torch.tensor(list(ids), dtype=torch.int64, device=device)

        per_group, nope = config.heads_per_group, config.nope_head_dim
        rotated = [2 * pair + half for pair in kept.pairs for half in (0, 1)]
        heads = [
            group * per_group + head
            for group, ids in zip(kept.groups, kept.heads, strict=True)
            for head in ids
        ]
        channels, hidden = units(kept.channels), config.hidden_size
        self.channels = Coordinates((hidden,), (channels,))
        self.streams = Coordinates(
            (config.hc_mult, hidden), (units(kept.streams)[:, None], channels)
        )
        self.heads = Coordinates(
            (config.num_attention_heads, config.head_dim),
            (units(heads)[:, None], units([*kept.nope, *(nope + d for d in rotated)])),
        )
        index_nope = config.index_nope_head_dim
        index_dims = [*kept.index_nope, *(index_nope + d for d in rotated)]
        self.index_heads = Coordinates(
            (config.index_n_heads, config.index_head_dim),
            (units(kept.index_heads)[:, None], units(index_dims)),
        )
        self.index_dims = Coordinates((config.index_head_dim,), (units(index_dims),))
        self.index_weights = Coordinates((config.index_n_heads,), (units(kept.index_heads),))
        self.expert_scores = Coordinates((config.n_routed_experts,), (units(kept.experts),))
        self.tokens = units(kept.tokens)
