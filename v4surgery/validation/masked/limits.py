"""What the masked parent cannot tell of a replica, and why.

A selection can be masked, and what is done to each number alone can be repeated. Values quantized
again in blocks of the replica, random ones, and what no forward runs can not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import CSA_RATIO
from v4surgery.validation.masked.frequencies import largest_error, plain, scaled_errors
from v4surgery.validation.masked.record import Kept, Record
from v4surgery.validation.masked.report import NotGraded
from v4surgery.validation.masked.rules import number_of, ratio_of

# What a tensor decides first; behind that the replica's own activations are gone on with.
FIRST_TAPS = (
    ("attn.wq_a", ("attn.indexer.wq_b", "attn.heads")),
    ("attn.wq_b", ("attn.heads",)),
    ("attn.wkv", ("attn.heads",)),
    ("attn.compressor.", ("attn.heads",)),
    ("attn.indexer.wq_b", ("attn.indexer.wq_b",)),
    ("attn.indexer.weights_proj", ("attn.indexer.weights_proj",)),
    ("attn.indexer.compressor.", ("attn.indexer.compressor",)),
    ("attn.wo_", ("attn.out",)),
    ("ffn.experts.", ("ffn.out", "ffn.experts")),
    ("ffn.shared_experts.", ("ffn.out",)),
    ("e_proj", ("in",)),
    ("h_proj", ("in",)),
)
AS_THE_PARENTS = 1e-6


def ungraded_taps(record: Record, kept: Kept) -> dict[str, list[str]]:
    """Taps of a block that cannot be graded, each with the tensors that were rounded."""
    found: dict[str, list[str]] = {}
    for stem in sorted(record.rounded):
        if not stem.startswith(kept.target):
            continue
        name = stem.removeprefix(kept.target)
        for start, taps in FIRST_TAPS:
            if name.startswith(start):
                for tap in taps:
                    found.setdefault(tap, []).append(name)
    return found


def mixed_axes(record: Record) -> list[str]:
    """Axes that the recipe mixes instead of picking units of."""
    keep = record.recipe.keep
    named = (keep.hidden_size, keep.q_lora_rank, keep.o_lora_rank)
    return [
        f"{name}: {choice.method}"
        for name, choice in zip(("hidden_size", "q_lora_rank", "o_lora_rank"), named, strict=True)
        if choice is not None and choice.method != "select"
    ]


def limits_of(
    record: Record, replica: Checkpoint, parent: Checkpoint, prompts: Sequence[Sequence[int]]
) -> Iterator[NotGraded]:
    """Everything that is known before a forward runs."""
    if record.recipe.init == "random":
        yield NotGraded("model", "every tensor", "init: random takes nothing of the parent")
        return
    if mixed := mixed_axes(record):
        yield NotGraded(
            "model",
            "every activation",
            f"{', '.join(mixed)}: its units are mixtures of all of the parent's, and a mask can "
            "only remove units; verify compares its tensors, and without truncation logits tell",
        )
        return
    for kept in record.blocks:
        for tap, names in ungraded_taps(record, kept).items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            why = f"quantized again with a loss: {', '.join(names[:3])}{more}"
            yield NotGraded(kept.target, tap, why)
        yield from _unused_parts(kept, record, replica, max(map(len, prompts)))
    yield from _frequency_limits(record, replica, parent)
    yield from _drafter_limits(record, replica, max(map(len, prompts)))
    if record.recipe.compensate:
        yield NotGraded(
            "model",
            "compensate",
            "the masked parent's norms and mHC projections take the same factors, rounded as "
            "stored: what is compared is that function, not the parent's own",
        )


def _unused_parts(
    kept: Kept, record: Record, replica: Checkpoint, longest: int
) -> Iterator[NotGraded]:
    """Parts of a block that the prompts are too short for, and ape rows between the parent's."""
    config, ratio = replica.config, ratio_of(replica.config, kept.target)
    if ratio and longest < ratio:
        yield NotGraded(
            kept.target, "attn.compressor", f"no prompt fills its window of {ratio} tokens"
        )
    elif ratio == CSA_RATIO and longest // ratio <= config.index_topk:
        yield NotGraded(
            kept.target,
            "attn.indexer",
            f"prompts of {longest} tokens have {longest // ratio} entries, and index_topk "
            f"{config.index_topk} takes them all",
        )
    if record.how.get(f"{kept.target}attn.compressor.ape") == "interpolate":
        yield NotGraded(
            kept.target,
            "attn.compressor.ape",
            "its rows lie between the parent's, by the same rule on both sides: how well they "
            "stand for them no mask can tell",
        )


def _frequency_limits(
    record: Record, replica: Checkpoint, parent: Checkpoint
) -> Iterator[NotGraded]:
    """Pairs that do not turn as the parent's do; both sides turn as the replica's."""
    own, before, pairs = replica.config, parent.config, record.model.pairs
    if 2 * len(pairs) != own.qk_rope_head_dim:
        return
    wanted = plain(before.rope_theta, before.qk_rope_head_dim)[list(pairs)]
    errors = {"sliding": largest_error(plain(own.rope_theta, own.qk_rope_head_dim), wanted)}
    if own.rope_scaling is not None and before.rope_scaling is not None:
        errors["compressed"] = scaled_errors(pairs, own, before)[0]
    for layers, error in errors.items():
        if error > AS_THE_PARENTS:
            yield NotGraded(
                "rope frequencies",
                f"{layers} layers",
                f"a pair turns up to {error:.1%} off the parent's; both sides turn as the replica",
            )


def _drafter_limits(record: Record, replica: Checkpoint, longest: int) -> Iterator[NotGraded]:
    drafters = [kept.target for kept in record.blocks if not kept.target.startswith("layers.")]
    if drafters and replica.config.is_dspark:
        where = drafters[0] if len(drafters) == 1 else f"{drafters[0]} to {drafters[-1]}"
        yield NotGraded(
            where, "the whole block", "the forward has no DSpark drafter; verify compares its bytes"
        )
        return
    for target in drafters:
        if longest < 2:
            yield NotGraded(target, "the whole block", "a drafter needs a prompt of two tokens")
        if f"{target}head" in replica.tensors:
            yield NotGraded(
                target,
                f"emb.tok_emb and head of drafter {number_of(target)}",
                "no forward reads them; verify compares their bytes",
            )
