"""One block of the masked parent: which replica block it stands for, and its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.model.rope import rope_frequencies
from v4surgery.validation.masked.attention import MaskedAttention, Own
from v4surgery.validation.masked.experts import MaskedExperts
from v4surgery.validation.masked.masks import Masks, Places
from v4surgery.validation.masked.record import Kept, Record
from v4surgery.validation.masked.rules import number_of, ratio_of
from v4surgery.validation.masked.streams import MaskedStreams, masked_norm
from v4surgery.validation.masked.weights import Weights


class MaskedBlock:
    """A parent block with the replica's own constants, and all that it removed masked out.

    Attributes:
        kept: What the replica keeps of it.
        own: The replica's constants.
        places: Where the replica's activations lie in the parent's.
        weight: The parent's tensors.
        streams, attention, experts: Its parts.
    """

    def __init__(
        self,
        replica: Checkpoint,
        parent: Checkpoint,
        record: Record,
        kept: Kept,
        device: torch.device,
    ) -> None:
        config = parent.config
        masks = Masks(kept, config, device)
        self.kept, self.masks, self.config = kept, masks, config
        self.own = own_constants(replica, parent, record, kept)
        self.places = Places(kept, config, device)
        self.weight = Weights(parent, replica, kept, record.recipe.compensate, device)
        self.streams = MaskedStreams(config, masks, self.weight)
        self.attention = MaskedAttention(config, self.own, masks, self.weight)
        self.experts = MaskedExperts(config, self.own, masks, self.weight)

    def drafter_input(self, h: Tensor, embedded: Tensor) -> Tensor:
        """Streams that a classic drafter starts from, ``(S, M, D)``.

        Args:
            h: The trunk's streams.
            embedded: Embedding of the next ids, ``(S, D)``.

        Source: spec/forward.md, "MTP (classic)".
        """
        channel, eps = self.masks.channel_D, self.config.rms_norm_eps
        e = masked_norm(embedded, channel, eps, self.weight("enorm")) @ self.weight("e_proj").T
        h = masked_norm(h, channel, eps, self.weight("hnorm")) @ self.weight("h_proj").T
        return (e[:, None] + h) * channel * self.masks.stream_M[:, None]


def own_constants(replica: Checkpoint, parent: Checkpoint, record: Record, kept: Kept) -> Own:
    """What the replica's config, and not the parent's, says of a block."""
    config = replica.config
    ratio = ratio_of(config, kept.target)
    scaling = record.recipe.config.routed_scaling_factor
    is_drafter = not kept.target.startswith("layers.")
    return Own(
        ratio=ratio,
        is_hash=not is_drafter and number_of(kept.target) < config.num_hash_layers,
        window=config.sliding_window,
        topk=config.index_topk,
        per_token=config.num_experts_per_tok,
        scaling=parent.config.routed_scaling_factor if scaling is None else scaling,
        frequencies=rope_frequencies(config, ratio),
    )
