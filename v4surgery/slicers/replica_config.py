"""The replica's config.json as data: every size follows from the recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import V4Config
from v4surgery.errors import PlanError
from v4surgery.recipes.schema import Choice, Keep, Recipe
from v4surgery.slicers.drafters import remap_targets
from v4surgery.slicers.heads import index_nope, rope_dims
from v4surgery.slicers.layers import LayerAssignment
from v4surgery.slicers.pick import check_keep
from v4surgery.slicers.rope import RopeCut
from v4surgery.slicers.selection import IntArray, Kept
from v4surgery.slicers.storage import storage_fields
from v4surgery.slicers.vocabulary import new_token_id


def replica_config(
    parent: Checkpoint, recipe: Recipe, layers: LayerAssignment, rope: RopeCut, model: Kept
) -> V4Config:
    """The replica's config.

    Args:
        parent: Opened.
        recipe: What to do.
        layers: Where its layers come from.
        rope: Which rope dims stay.
        model: Dims that are cut the same way in the whole model.

    Raises:
        PlanError: More than the parent has, or dimensions that contradict each other.
    """
    keep, config, ids = recipe.keep, parent.config, model["vocab_size"]
    sizes = _sizes(keep, config)
    drafters = config.compress_ratios[config.num_hidden_layers :] if keep.mtp == "keep" else ()
    changes: dict[str, Any] = {
        **sizes,
        "num_hidden_layers": len(layers.kinds),
        "num_hash_layers": sum(kind.is_hash for kind in layers.kinds),
        "compress_ratios": (*(kind.ratio for kind in layers.kinds), *drafters),
        "rope_scaling": _scaling(recipe, rope),
        "bos_token_id": new_token_id(ids, config.bos_token_id),
        "eos_token_id": new_token_id(ids, config.eos_token_id),
        "pad_token_id": new_token_id(ids, config.pad_token_id),
        **_drafter_fields(config, layers, ids, is_kept=keep.mtp == "keep"),
        **storage_fields(parent, recipe),
    }
    for name in ("routed_scaling_factor", "max_position_embeddings"):
        value = getattr(recipe.config, name)
        if value is not None:
            changes[name] = value
    replica = config.replace(**changes)
    problems = replica.problems()
    if problems:
        raise PlanError(
            "the replica's dimensions contradict each other",
            where=f"recipe {recipe.name}",
            value="; ".join(problems),
        )
    return replica


def _sizes(keep: Keep, config: V4Config) -> dict[str, int]:
    """Every number of units that the recipe says, held against the parent's."""

    def kept(choice: Choice | None, size: int, field: str) -> int:
        if choice is None or choice.keep is None:
            return size
        check_keep(choice.keep, size, f"keep.{field}")
        return choice.keep

    experts = kept(keep.experts, config.n_routed_experts, "experts")
    per_token = _experts_per_token(keep, config, experts)
    heads, index = keep.heads, keep.indexer
    groups = kept(heads.groups if heads else None, config.o_groups, "heads.groups")
    per_group = kept(heads.per_group if heads else None, config.heads_per_group, "heads.per_group")
    rope = rope_dims(keep, config)
    nope = keep.head_dim.nope if keep.head_dim else None
    of_index = index_nope(keep, config)
    return {
        "hidden_size": kept(keep.hidden_size, config.hidden_size, "hidden_size"),
        "hc_mult": kept(keep.hc_mult, config.hc_mult, "hc_mult"),
        "vocab_size": kept(keep.vocab_size, config.vocab_size, "vocab_size"),
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": kept(
            keep.moe_intermediate_size, config.moe_intermediate_size, "moe_intermediate_size"
        ),
        "o_groups": groups,
        "num_attention_heads": groups * per_group,
        "qk_rope_head_dim": rope,
        "head_dim": kept(nope, config.nope_head_dim, "head_dim.nope") + rope,
        "q_lora_rank": kept(keep.q_lora_rank, config.q_lora_rank, "q_lora_rank"),
        "o_lora_rank": kept(keep.o_lora_rank, config.o_lora_rank, "o_lora_rank"),
        "index_n_heads": kept(
            index.heads if index else None, config.index_n_heads, "indexer.heads"
        ),
        "index_head_dim": kept(of_index, config.index_nope_head_dim, "indexer.head_dim") + rope,
        "index_topk": (index.topk if index else None) or config.index_topk,
        "sliding_window": keep.sliding_window or config.sliding_window,
    }


def _experts_per_token(keep: Keep, config: V4Config, experts: int) -> int:
    per_token = keep.experts.per_token if keep.experts else None
    if per_token is not None:
        check_keep(per_token, config.num_experts_per_tok, "keep.experts.per_token")
    elif experts < config.num_experts_per_tok:
        raise PlanError(
            "fewer experts than a token takes",
            where="keep.experts.keep",
            value=experts,
            rule=f"at least the parent's {config.num_experts_per_tok}, or keep.experts.per_token",
        )
    return per_token or config.num_experts_per_tok


def _scaling(recipe: Recipe, rope: RopeCut) -> Any:
    betas = {name: getattr(recipe.config, name) for name in ("beta_fast", "beta_slow")}
    given = {name: value for name, value in betas.items() if value is not None}
    return replace(rope.scaling, **given) if rope.scaling and given else rope.scaling


def _drafter_fields(
    config: V4Config, layers: LayerAssignment, ids: IntArray | None, *, is_kept: bool
) -> dict[str, Any]:
    dspark = ("block_size", "noise_token_id", "target_layer_ids", "markov_rank")
    if not is_kept:
        return {"num_nextn_predict_layers": 0, **{f"dspark_{name}": None for name in dspark}}
    return {
        "dspark_target_layer_ids": remap_targets(config, layers.sources)
        if config.is_dspark
        else config.dspark_target_layer_ids,
        "dspark_noise_token_id": new_token_id(ids, config.dspark_noise_token_id),
    }
