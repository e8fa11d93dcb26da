"""Rules of a cut that need no forward: the replica's config, layers and frequencies.

Expected values come from the recipe, the record's lists and the parent's config alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from v4surgery.config import CSA_RATIO, V4Config
from v4surgery.validation.masked.frequencies import frequency_rules
from v4surgery.validation.masked.record import Kept, Record
from v4surgery.validation.masked.report import Rule

CONFIG_FILE, RECORD_FILE = "config.json", "v4surgery.json"

# Constants that no cut changes.
CONSTANTS = (
    "rms_norm_eps",
    "hc_eps",
    "hc_sinkhorn_iters",
    "rope_theta",
    "compress_rope_theta",
    "scoring_func",
    "norm_topk_prob",
    "topk_method",
    "swiglu_limit",
    "n_shared_experts",
)


def broken_rules(record: Record, replica: V4Config, parent: V4Config) -> list[Rule]:
    """Rules that config and record break; sizes and hash tables have functions of their own."""
    return [
        *_layer_rules(record, replica, parent),
        *_config_rules(record, replica, parent),
        *frequency_rules(record, replica, parent),
    ]


def _config_rules(record: Record, replica: V4Config, parent: V4Config) -> Iterator[Rule]:
    """Numbers are those of the recipe, or else the parent's."""
    expected = {name: getattr(parent, name) for name in CONSTANTS}
    expected |= _numbers(record, parent)
    for name, value in expected.items():
        found = getattr(replica, name)
        if found != value:
            yield Rule(f"{CONFIG_FILE}: {name}", f"is {found!r}, and must be {value!r}")


def size_rules(record: Record, replica: V4Config) -> list[Rule]:
    """Sizes of the config against the lengths of the record's lists, block by block."""
    found: dict[str, Rule] = {}
    for block in record.blocks:
        for name, size in _sizes(block, replica).items():
            value = getattr(replica, name)
            if value != size:
                rule = f"is {value}, and the record keeps {size} in {block.target}"
                found.setdefault(name, Rule(f"{CONFIG_FILE}: {name}", rule))
    return list(found.values())


def _sizes(block: Kept, replica: V4Config) -> dict[str, int]:
    rope = 2 * len(block.pairs)
    sizes = {
        "hidden_size": len(block.channels),
        "hc_mult": len(block.streams),
        "vocab_size": len(block.tokens),
        "qk_rope_head_dim": rope,
        "head_dim": len(block.nope) + rope,
        "q_lora_rank": len(block.q_ranks),
        "o_groups": len(block.groups),
        "num_attention_heads": sum(map(len, block.heads)),
        "n_routed_experts": len(block.experts),
    }
    for name, lists in (
        ("o_lora_rank", block.o_ranks),
        ("moe_intermediate_size", block.neurons),
    ):
        lengths = {len(units) for units in lists}
        sizes[name] = lengths.pop() if len(lengths) == 1 else -1
    if ratio_of(replica, block.target) == CSA_RATIO:
        sizes["index_n_heads"] = len(block.index_heads)
        sizes["index_head_dim"] = len(block.index_nope) + rope
    return sizes


def _numbers(record: Record, parent: V4Config) -> dict[str, Any]:
    """Numbers that a recipe may set without a tensor changing."""
    keep, config = record.recipe.keep, record.recipe.config
    wanted = {
        "sliding_window": keep.sliding_window,
        "index_topk": keep.indexer.topk if keep.indexer else None,
        "num_experts_per_tok": keep.experts.per_token if keep.experts else None,
        "routed_scaling_factor": config.routed_scaling_factor,
    }
    return {
        name: getattr(parent, name) if value is None else value for name, value in wanted.items()
    }


def _layer_rules(record: Record, replica: V4Config, parent: V4Config) -> Iterator[Rule]:
    """Each layer comes from one of its own kind, in order; drafters are whole or gone.

    Source: spec/slicing.md, traps 6, 8 and 13.
    """
    trunk = [block for block in record.blocks if block.target.startswith("layers.")]
    drafters = [block.source for block in record.blocks if not block.target.startswith("layers.")]
    wanted = [f"mtp.{j}." for j in range(parent.num_drafters)]
    wanted = wanted if record.recipe.keep.mtp == "keep" else []
    if drafters != wanted:
        yield Rule(RECORD_FILE, f"{len(drafters)} drafters come over, and must be {len(wanted)}")
    for before, after in pairwise(trunk):
        if number_of(after.source) <= number_of(before.source):
            what = f"comes from {after.source} behind {before.source}: sources must rise"
            yield Rule(f"{RECORD_FILE}: {after.target}", what)
    for block in record.blocks:
        yield from _ratio_rules(block, record, replica, parent)
    for block in trunk:
        yield from _routing_rules(block, record, replica, parent)


def _ratio_rules(
    block: Kept, record: Record, replica: V4Config, parent: V4Config
) -> Iterator[Rule]:
    """HCA may change its ratio and any layer may become sliding; nothing else may change."""
    was, now = ratio_of(parent, block.source), ratio_of(replica, block.target)
    layers, is_layer = record.recipe.keep.layers, block.target.startswith("layers.")
    wanted = was
    if layers is not None and layers.compress_ratios is not None and is_layer:
        wanted = layers.compress_ratios[number_of(block.target)]
    if now != wanted:
        what = f"{block.target} has {now}, and must have {wanted}"
        yield Rule(f"{CONFIG_FILE}: compress_ratios", what)
    both_hca = not {was, now} & {0, CSA_RATIO}
    if now not in (0, was) and not both_hca:
        yield Rule(block.target, f"ratio {now} cannot come from {block.source} with ratio {was}")
    rows = block.ape_rows
    if now and rows is not None and (len(rows) != now or max(rows) >= was):
        what = f"keeps {len(rows)} of {was} rows of ape for a ratio of {now}"
        yield Rule(block.target, what)


def _routing_rules(
    block: Kept, record: Record, replica: V4Config, parent: V4Config
) -> Iterator[Rule]:
    """Hash layers are hash layers; they become score layers if the recipe says so."""
    layers = record.recipe.keep.layers
    was = block.source.startswith("layers.") and number_of(block.source) < parent.num_hash_layers
    now = number_of(block.target) < replica.num_hash_layers
    allowed = layers is not None and layers.hash_to_score == "zero-bias"
    if now != was and (now or not allowed):
        routed = {True: "hash", False: "score"}
        what = f"{routed[now]} routing cannot come from {block.source}, routed by {routed[was]}"
        yield Rule(block.target, what)


def number_of(prefix: str) -> int:
    """3 of ``layers.3.``."""
    return int(prefix.split(".")[1])


def ratio_of(config: V4Config, prefix: str) -> int:
    """Compress ratio of a block; drafters stand behind the layers."""
    behind = 0 if prefix.startswith("layers.") else config.num_hidden_layers
    return config.compress_ratios[behind + number_of(prefix)]
