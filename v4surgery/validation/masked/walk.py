"""The masked parent's way through one block, each step compared with the replica's.

Choices (experts, compressed entries) are graded by what they give away, and then followed: of two
scores that are equal but for rounding either may be taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from v4surgery.config import CSA_RATIO
from v4surgery.validation.masked.block import MaskedBlock
from v4surgery.validation.masked.experts import choice_error
from v4surgery.validation.masked.grading import Settler
from v4surgery.validation.masked.masks import Coordinates
from v4surgery.validation.masked.streams import Mixing


class _Half(NamedTuple):
    """A prompt before the experts: streams, their input, and how their output will join."""

    h: Tensor
    x: Tensor
    mixing: Mixing


def walk(
    block: MaskedBlock,
    settlers: Sequence[Settler],
    inputs: Sequence[Tensor],
    wrong_tokens: Sequence[Tensor | None],
) -> tuple[list[Tensor], set[int]]:
    """Grade a block on some prompts; experts are decoded once for all of them.

    Args:
        block: The masked block.
        settlers: One for each prompt.
        inputs: Streams of each prompt, ``(S, M, D)`` in the parent's coordinates.
        wrong_tokens: For hash layers which tokens have a wrong row in the replica's table, bool
            ``(S,)`` for each prompt; None for score layers.

    Returns:
        Streams after the block, and the parent experts that tokens went to.
    """
    halves = [_attend(block, settle, h) for settle, h in zip(settlers, inputs, strict=True)]
    routed = [
        _route(block, settle, half.x, wrong)
        for settle, half, wrong in zip(settlers, halves, wrong_tokens, strict=True)
    ]
    chosen = torch.cat([experts for experts, _ in routed])
    weights = torch.cat([shares for _, shares in routed])
    lengths = [len(half.x) for half in halves]
    outputs = block.experts.forward(torch.cat([half.x for half in halves]), chosen, weights)
    after = []
    for settle, half, y in zip(settlers, halves, outputs.split(lengths), strict=True):
        y = settle("ffn.out", y, block.places.channels)
        h = block.streams.expand(y, half.h, half.mixing)
        after.append(settle("out", h, block.places.streams))
    return after, set(chosen.unique().tolist())


def _attend(block: MaskedBlock, settle: Settler, h: Tensor) -> _Half:
    """Attention and the collapse for the experts."""
    channels = block.places.channels
    x, mixing = block.streams.collapse("attn", h)
    x = block.streams.norm("attn_norm", settle("attn.hc", x, channels))
    x = settle("attn.in", x, channels)
    heads = block.attention.heads(x, _visible(block, settle, x))
    heads = settle("attn.heads", heads, block.places.heads)
    y = settle("attn.out", block.attention.output(heads), channels)
    h = block.streams.expand(y, h, mixing)
    x, mixing = block.streams.collapse("ffn", h)
    x = block.streams.norm("ffn_norm", settle("ffn.hc", x, channels))
    return _Half(h, settle("ffn.in", x, channels), mixing)


def _visible(block: MaskedBlock, settle: Settler, x: Tensor) -> Tensor | None:
    """Compressed entries that each query sees, bool ``(S, C)``; the indexer's are the replica's."""
    if not block.own.ratio:
        return None
    past = block.attention.past_entries(len(x))
    if block.own.ratio != CSA_RATIO or not past.shape[1]:
        return past
    attention, places = block.attention, block.places
    q = settle("attn.indexer.wq_b", attention.index_queries(x), places.index_heads)
    k = attention.entries(x, "attn.indexer.compressor.", block.masks.index_dim_Y)
    k = settle("attn.indexer.compressor", k, places.index_dims)
    weights = attention.index_weights(x)
    weights = settle("attn.indexer.weights_proj", weights, places.index_weights)
    scores, sizes = attention.index_scores(q, k, weights)
    theirs = settle.theirs["attn.indexer"]
    # A column more takes what stands for no entry.
    chosen = torch.zeros(len(x), past.shape[1] + 1, dtype=torch.bool, device=x.device)
    chosen = chosen.scatter(1, torch.where(theirs < 0, past.shape[1], theirs), value=True)[:, :-1]
    errors = choice_error(scores, sizes.amax(1), chosen)
    wanted = past.sum(1).clamp_max(block.own.topk)
    settle.add("attn.indexer", errors.masked_fill(chosen.sum(1) != wanted, float("inf")))
    return chosen & past


def _route(
    block: MaskedBlock, settle: Settler, x: Tensor, wrong: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The replica's experts as the parent numbers them, ``(S, K)``, and their weights."""
    scores = block.experts.scores(x)
    theirs = settle.theirs["gate.indices"]
    experts = block.places.expert_scores.index[0]
    chosen = experts[theirs.clamp(0, len(experts) - 1)]
    if wrong is None:
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, value=True)
        steered = block.experts.steered(scores)
        sizes = steered.abs().masked_fill(steered.isinf(), 0).amax(1)
        errors = choice_error(steered, sizes, taken)
        errors = errors.masked_fill(taken.sum(1) != block.own.per_token, float("inf"))
    else:
        errors = torch.where(wrong, float("inf"), 0.0)
    settle.add("gate.indices", errors)
    settle("gate.scores", block.experts.biased(scores), block.places.expert_scores)
    slots = torch.arange(chosen.shape[1], device=x.device)
    places = Coordinates(tuple(slots.shape), (slots,))
    return chosen, settle("gate.weights", block.experts.weights(scores, chosen), places)
