"""Classic drafters: the replica's own, run on its trunk's streams, and the masked parent's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.loader import place, read_tensor, require_loaded
from v4surgery.model.mtp import MTPBlock
from v4surgery.model.numerics import Numerics
from v4surgery.validation.masked.block import MaskedBlock
from v4surgery.validation.masked.grading import Settler
from v4surgery.validation.masked.walk import walk


def load_drafter(
    replica: Checkpoint, prefix: str, numerics: Numerics, device: torch.device
) -> MTPBlock:
    """A replica's classic drafter, without its own embedding and head, which no forward reads.

    Raises:
        CatalogueError: A parameter stayed without a tensor.
    """
    (spec,) = (block for block in replica.catalogue.blocks if block.prefix == prefix)
    drafter = MTPBlock(replica.config, spec, numerics)
    for stem, stored in replica.tensors.items():
        if stored.entry.block != spec or stored.entry.template.optional:
            continue
        weight = read_tensor(replica, stored.weight, device)
        scale = read_tensor(replica, stored.scale, device) if stored.scale else None
        place(drafter, stem.removeprefix(prefix), stored, weight, scale, numerics)
    require_loaded(drafter.named_parameters(), prefix)
    return drafter.to(device).eval()


def run_drafter(drafter: MTPBlock, h: Tensor, embedded: Tensor, ids: Tensor) -> Tensor:
    """What the replica drafts at every position but the last, ``(S - 1, D')``.

    Args:
        drafter: The replica's.
        h: The trunk's streams, ``(S, M', D')``.
        embedded: Embedding of the ids, ``(S, D')``.
        ids: int64 ``(S,)``.
    """
    device = drafter.enorm.weight.device
    h, embedded, ids = (tensor.to(device) for tensor in (h, embedded, ids))
    progress = Progress.start(1, device).advance(len(ids) - 1)
    drafted = drafter.draft(h[None, :-1], embedded[None, 1:], ids[None, 1:], progress, LayerCache())
    return drafted[0]


def grade_drafter(
    block: MaskedBlock,
    settlers: Sequence[Settler],
    streams: Sequence[Tensor],
    embedded: Sequence[Tensor],
) -> set[int]:
    """Grade a drafter on some prompts.

    Args:
        block: The masked drafter.
        settlers: One for each prompt; ``draft`` is among their taps.
        streams: The trunk's, ``(S, M, D)`` in the parent's coordinates.
        embedded: Embedding of each prompt, ``(S, D)`` in the parent's coordinates.

    Returns:
        The parent experts that tokens went to.
    """
    inputs = [
        settle("in", block.drafter_input(h[:-1], e[1:]), block.places.streams)
        for settle, h, e in zip(settlers, streams, embedded, strict=True)
    ]
    after, used = walk(block, settlers, inputs, [None] * len(inputs))
    for settle, h in zip(settlers, after, strict=True):
        drafted = block.streams.norm("norm", block.streams.collapse_head(h))
        settle("draft", drafted, block.places.channels)
    return used
