"""Which scores there are, as data: of which dim, under which key of a recipe, by which name.

A scores file holds a vector under ``<score>/<dim>/<place>``; the place is a block's prefix, or
``model``. What each score is, with its formula: docs/scores.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from v4surgery.errors import UsageError

MODEL = "model"
SECOND_MOMENT = "second_moment"


@dataclass(frozen=True)
class Scored:
    """A dim that has scores from activations.

    Attributes:
        axis: Key below ``keep`` in a recipe, and what ``score --axes`` calls it.
        dim: Axis expression (:mod:`v4surgery.axes`), or ``layers``.
        scores: Names of its scores, the one of ``by: scores`` first.
        fallback: How units are chosen in a block that the forward cannot score.
    """

    axis: str
    dim: str
    scores: tuple[str, ...]
    fallback: str = "norm"


SCORED = (
    Scored("layers", "layers", ("influence",)),
    Scored("hidden_size", "hidden_size", ("energy",)),
    Scored("hc_mult", "streams", ("energy",)),
    Scored("vocab_size", "vocab_size", ("frequency",)),
    Scored("experts", "n_routed_experts", ("reap", "frequency"), fallback="gate"),
    Scored("moe_intermediate_size", "moe_intermediate_size", ("activation",)),
    Scored("heads", "o_groups", ("contribution",)),
    Scored("heads", "num_attention_heads", ("contribution",)),
    Scored("head_dim", "nope", ("energy",)),
    Scored("q_lora_rank", "q_lora_rank", ("activation",)),
    Scored("o_lora_rank", "o_groups*o_lora_rank", ("activation",)),
    Scored("indexer", "index_n_heads", ("contribution",)),
    Scored("indexer", "index_nope", ("energy",)),
)
AXES = tuple(dict.fromkeys(item.axis for item in SCORED))
SCORE_NAMES = tuple(dict.fromkeys(name for item in SCORED for name in item.scores))

MOMENTS: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "q_lora_rank": "q_lora_rank",
    "o_lora_rank": "o_groups*o_lora_rank",
    "heads": "heads",
}
"""Axes with second moments, and what stands in their keys."""

_BY_DIM = {item.dim: item for item in SCORED}


def scored_dim(dim: str) -> Scored:
    """The entry of a dim; ``moe_intermediate_size.experts.3`` is one of moe_intermediate_size."""
    return _BY_DIM[dim.partition(".")[0]]


def key_of(score: str, dim: str, place: str = MODEL) -> str:
    """The key of one vector or matrix in a scores file."""
    return f"{score}/{dim}/{place}"


def parse_axes(text: str | None, known: Sequence[str], where: str) -> tuple[str, ...]:
    """Axes from a comma-separated list, in the order of ``known``; ``all`` is every one.

    Raises:
        UsageError: A name that is none of them.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    return tuple(known) if names == ["all"] else check_axes(names, known, where)


def check_axes(names: Sequence[str], known: Sequence[str], where: str) -> tuple[str, ...]:
    """Axes in the order of ``known``.

    Raises:
        UsageError: A name that is none of them.
    """
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UsageError(
                "unknown axis",
                where=where,
                value=name,
                rule=f"did you mean {near[0]}?" if near else "one of: " + ", ".join(known),
            )
    return tuple(name for name in known if name in names)
