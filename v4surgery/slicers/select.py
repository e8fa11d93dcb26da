"""From a recipe and a parent to everything that is kept: the config and the selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from v4surgery.catalogue import (
    BF16,
    EXPERT,
    F32,
    FP4,
    FP8,
    FP8_F32,
    I64,
    LINEAR,
    QUANTIZED,
    Block,
    Catalogue,
    Template,
)
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import HCA, QUANTIZATION_CONFIG, V4Config, attention_kind
from v4surgery.errors import PlanError
from v4surgery.importance.names import SCORE_NAMES
from v4surgery.importance.scorebook import ScoreBook, neuron_dim
from v4surgery.recipes.schema import BasisPick, Choice, Heads, Keep, Recipe
from v4surgery.slicers.compress_ratios import choose_ape_rows
from v4surgery.slicers.drafters import remap_targets
from v4surgery.slicers.heads import choose_heads, choose_in_groups
from v4surgery.slicers.layers import LayerAssignment, assign_layers
from v4surgery.slicers.pick import check_keep, choose
from v4surgery.slicers.record_shape import check_selections
from v4surgery.slicers.rope import RopeCut, cut_rope
from v4surgery.slicers.selection import BlockSelection, IntArray, Kept, Selections
from v4surgery.slicers.vocabulary import choose_vocabulary, load_tokenizer, new_token_id

SAME_EVERYWHERE = ("first", "even", "ids")


def selecting(choice: BasisPick | None) -> BasisPick | None:
    """The choice if it selects units; None where another method leaves the dim whole."""
    return choice if choice is not None and choice.method == "select" else None


@dataclass(frozen=True)
class Selected:
    """The outcome of selection: what is kept, the replica's config, and what to tell people."""

    selections: Selections
    config: V4Config
    notes: tuple[str, ...]
    bytes_read: int
    scores_blake3: str | None = None


def select(parent: Checkpoint, recipe: Recipe) -> Selected:
    """Make every choice that the recipe asks for.

    Raises:
        PlanError: The recipe cannot be applied to this parent.
        ConfigError: The replica's dimensions would contradict each other.
    """
    keep, config = recipe.keep, parent.config
    book = ScoreBook.of_recipe(parent, recipe)
    layers = assign_layers(
        book.settle(keep.layers, "layers", None),
        config,
        seed=recipe.seed,
        scores=book.of("layers", None),
    )
    rope = _rope(recipe, config)
    model = _model_dims(parent, recipe, book, rope)
    replica = _replica_config(parent, recipe, layers, rope, model)
    targets = Catalogue(replica).blocks
    sources = parent.catalogue.blocks
    chosen = [sources[i] for i in layers.sources]
    if keep.mtp == "keep":
        chosen += sources[config.num_hidden_layers :]
    blocks = tuple(
        BlockSelection(
            target, source, {**model, **_block_dims(config, recipe, book, target, source)}
        )
        for target, source in zip(targets, chosen, strict=True)
    )
    notes = (
        *_layer_notes(layers, config),
        *_notes(recipe, config, replica, rope),
        *book.notes(),
    )
    digest = book.file.blake3 if book.file else None
    return Selected(Selections(model, blocks), replica, notes, book.bytes_read, digest)


def restore(
    parent: Checkpoint, recipe: Recipe, record: Mapping[str, Any], notes: tuple[str, ...]
) -> Selected:
    """The outcome of an earlier selection from its record: units as recorded, config as they imply.

    Raises:
        PlanError: The recorded layers cannot be those of the recipe.
        CheckpointError: Recorded blocks or units that the parent does not have.
    """
    config = parent.config
    sources = {block.prefix: block for block in parent.catalogue.blocks}
    trunk = [sources[s] for item in record["blocks"] if (s := item["source"]) in sources]
    ids = tuple(block.index for block in trunk if not block.is_drafter)
    layers = recipe.keep.layers
    if layers is not None:
        layers = layers.model_copy(update={"by": "ids", "ids": ids})
    model = {name: np.asarray(units, np.int64) for name, units in record["model"].items()}
    whole = dict.fromkeys(("hidden_size", "streams", "vocab_size", "rope"))
    replica = _replica_config(
        parent, recipe, assign_layers(layers, config), _rope(recipe, config), {**whole, **model}
    )
    targets = {block.prefix: block for block in Catalogue(replica).blocks}
    check_selections(record, targets, parent.catalogue, "v4surgery.json: selections")
    return Selected(Selections.from_json(record, targets, sources), replica, notes, 0)


def _rope(recipe: Recipe, config: V4Config) -> RopeCut:
    head_dim = recipe.keep.head_dim
    wanted = head_dim.rope if head_dim and head_dim.rope else config.qk_rope_head_dim
    allow = head_dim is not None and head_dim.frequencies == "any"
    return cut_rope(config, wanted, allow_mismatch=allow)


def _model_dims(parent: Checkpoint, recipe: Recipe, book: ScoreBook, rope: RopeCut) -> Kept:
    """Dims that are cut the same way in the whole model."""
    keep, config = recipe.keep, parent.config

    def pick(choice: Choice | None, dim: str, size: int, field: str) -> IntArray | None:
        choice, scores = book.settle(choice, dim, None), book.of(dim, None)
        return choose(choice, size, field=f"keep.{field}", seed=recipe.seed, scores=scores)

    tokenizer = None
    if keep.vocab_size is not None and "tokenizer.json" in parent.companions():
        tokenizer = load_tokenizer(parent.read_file("tokenizer.json"), "tokenizer.json")
    return {
        "hidden_size": pick(
            selecting(keep.hidden_size), "hidden_size", config.hidden_size, "hidden_size"
        ),
        "streams": pick(keep.hc_mult, "streams", config.hc_mult, "hc_mult"),
        "vocab_size": choose_vocabulary(
            book.settle(keep.vocab_size, "vocab_size", None),
            config,
            tokenizer,
            seed=recipe.seed,
            scores=book.of("vocab_size", None),
        ),
        "rope": rope.dims,
    }


def _block_dims(
    config: V4Config, recipe: Recipe, book: ScoreBook, target: Block, source: Block
) -> dict[str, IntArray | None]:
    """Dims that each block cuts in its own way."""
    keep, seed, place = recipe.keep, recipe.seed, source.prefix

    def pick(choice: Choice | None, dim: str, size: int, field: str) -> IntArray | None:
        choice, scores = book.settle(choice, dim, source), book.of(dim, source)
        return choose(choice, size, field=f"keep.{field}", place=place, seed=seed, scores=scores)

    kept = choose_heads(
        _settled_heads(book, keep.heads, source),
        config,
        place=place,
        seed=seed,
        group_scores=book.of("o_groups", source),
        head_scores=book.of("num_attention_heads", source),
    )
    groups = kept.get("o_groups")
    nope = keep.head_dim.nope if keep.head_dim else None
    kept |= {
        "nope": pick(nope, "nope", config.nope_head_dim, "head_dim.nope"),
        "q_lora_rank": pick(
            selecting(keep.q_lora_rank), "q_lora_rank", config.q_lora_rank, "q_lora_rank"
        ),
        "o_lora_rank": choose_in_groups(
            book.settle(selecting(keep.o_lora_rank), "o_groups*o_lora_rank", source),
            config.o_lora_rank,
            np.arange(config.o_groups) if groups is None else groups,
            field="keep.o_lora_rank",
            place=place,
            seed=seed,
            scores=book.of("o_groups*o_lora_rank", source),
        ),
    }
    experts = keep.experts if keep.experts and keep.experts.keep else None
    kept["n_routed_experts"] = pick(experts, "n_routed_experts", config.n_routed_experts, "experts")
    kept["moe_intermediate_size"] = _neurons(
        config, keep, book, source, kept["n_routed_experts"], seed
    )
    if "csa" in source.traits:
        heads = keep.indexer.heads if keep.indexer else None
        kept["index_n_heads"] = pick(heads, "index_n_heads", config.index_n_heads, "indexer.heads")
        kept["index_nope"] = pick(
            _index_nope(keep, config), "index_nope", config.index_nope_head_dim, "indexer.head_dim"
        )
    if "compressed" in target.traits:
        mode = keep.layers.ape if keep.layers else "pick"
        kept["compress_ratio"] = choose_ape_rows(target.ratio, source.ratio, mode, target.prefix)
    return {name: units for name, units in kept.items() if units is not None}


def _settled_heads(book: ScoreBook, heads: Heads | None, source: Block) -> Heads | None:
    if heads is None:
        return None
    groups = book.settle(heads.groups, "o_groups", source)
    per_group = book.settle(heads.per_group, "num_attention_heads", source)
    return heads.model_copy(update={"groups": groups, "per_group": per_group})


def _neurons(
    config: V4Config,
    keep: Keep,
    book: ScoreBook,
    source: Block,
    experts: IntArray | None,
    seed: int,
) -> IntArray | None:
    """Neurons kept: the same for all experts, or a row for each and one for the shared expert."""
    size, field = config.moe_intermediate_size, "keep.moe_intermediate_size"
    asked = keep.moe_intermediate_size
    choice = book.settle(asked, "moe_intermediate_size", source)
    if choice is None or choice.by in SAME_EVERYWHERE:
        return choose(choice, size, field=field, place=source.prefix, seed=seed)
    ids = range(config.n_routed_experts) if experts is None else experts.tolist()
    rows = []
    for expert in (*ids, None):
        place = f"{source.prefix}expert.{'shared' if expert is None else expert}"
        own = book.settle(asked, neuron_dim(expert), source) if choice.by in SCORE_NAMES else choice
        scores = book.of_expert(source, expert)
        units = choose(own, size, field=field, place=place, seed=seed, scores=scores)
        if units is None:
            return None
        rows.append(units)
    return np.stack(rows)


def _index_nope(keep: Keep, config: V4Config) -> Choice | None:
    """The choice among the index dims without position: the total less the rope dims."""
    choice = keep.indexer.head_dim if keep.indexer else None
    if choice is None:
        return None
    nope = choice.keep - _rope_dims(keep, config)
    if nope < 1:
        raise PlanError(
            "the index head has no room for dims without position",
            where="keep.indexer.head_dim",
            value=choice.keep,
            rule=f"more than the {_rope_dims(keep, config)} rope dims",
        )
    check_keep(nope, config.index_nope_head_dim, "keep.indexer.head_dim less the rope dims")
    if choice.ids is not None and len(choice.ids) != nope:
        raise PlanError(
            "the index head's ids do not add up to its size with the rope dims",
            where="keep.indexer.head_dim",
            value=f"{len(choice.ids)} ids, keep {choice.keep}",
            rule=f"{nope} ids, beside the {_rope_dims(keep, config)} rope dims",
        )
    return choice.model_copy(update={"keep": nope})


def _rope_dims(keep: Keep, config: V4Config) -> int:
    rope = keep.head_dim.rope if keep.head_dim else None
    return rope or config.qk_rope_head_dim


def _replica_config(
    parent: Checkpoint, recipe: Recipe, layers: LayerAssignment, rope: RopeCut, model: Kept
) -> V4Config:
    """The replica's config.json as data; every size follows from the recipe."""
    keep, config = recipe.keep, parent.config

    def kept(choice: Choice | None, size: int, field: str) -> int:
        if choice is None or choice.keep is None:
            return size
        check_keep(choice.keep, size, f"keep.{field}")
        return choice.keep

    experts = kept(keep.experts, config.n_routed_experts, "experts")
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
    heads, index = keep.heads, keep.indexer
    groups = kept(heads.groups if heads else None, config.o_groups, "heads.groups")
    per_group = kept(heads.per_group if heads else None, config.heads_per_group, "heads.per_group")
    rope_dims = _rope_dims(keep, config)
    nope_pick = keep.head_dim.nope if keep.head_dim else None
    index_nope = _index_nope(keep, config)
    drafters = config.compress_ratios[config.num_hidden_layers :] if keep.mtp == "keep" else ()
    ids = model["vocab_size"]
    changes: dict[str, Any] = {
        "num_hidden_layers": len(layers.kinds),
        "num_hash_layers": sum(kind.is_hash for kind in layers.kinds),
        "compress_ratios": (*(kind.ratio for kind in layers.kinds), *drafters),
        "hidden_size": kept(keep.hidden_size, config.hidden_size, "hidden_size"),
        "hc_mult": kept(keep.hc_mult, config.hc_mult, "hc_mult"),
        "vocab_size": kept(keep.vocab_size, config.vocab_size, "vocab_size"),
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token or config.num_experts_per_tok,
        "moe_intermediate_size": kept(
            keep.moe_intermediate_size, config.moe_intermediate_size, "moe_intermediate_size"
        ),
        "o_groups": groups,
        "num_attention_heads": groups * per_group,
        "qk_rope_head_dim": rope_dims,
        "head_dim": kept(nope_pick, config.nope_head_dim, "head_dim.nope") + rope_dims,
        "q_lora_rank": kept(keep.q_lora_rank, config.q_lora_rank, "q_lora_rank"),
        "o_lora_rank": kept(keep.o_lora_rank, config.o_lora_rank, "o_lora_rank"),
        "index_n_heads": kept(
            index.heads if index else None, config.index_n_heads, "indexer.heads"
        ),
        "index_head_dim": kept(index_nope, config.index_nope_head_dim, "indexer.head_dim")
        + rope_dims,
        "index_topk": (index.topk if index else None) or config.index_topk,
        "sliding_window": keep.sliding_window or config.sliding_window,
        "rope_scaling": _scaling(recipe, rope),
        "bos_token_id": new_token_id(ids, config.bos_token_id),
        "eos_token_id": new_token_id(ids, config.eos_token_id),
        "pad_token_id": new_token_id(ids, config.pad_token_id),
        **_drafter_fields(config, layers, ids, is_kept=keep.mtp == "keep"),
        **_storage_fields(parent, recipe),
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


def _scaling(recipe: Recipe, rope: RopeCut) -> Any:
    from dataclasses import replace

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


def target_format(template: Template, parent_format: str, dtype: str) -> str:
    """Format of a replica tensor: the parent's, or what ``store.dtype`` makes of it."""
    if dtype == "f32":
        return parent_format if template.storage == I64 else F32
    if template.storage in (LINEAR, EXPERT):
        if dtype == "bf16":
            return BF16
        if dtype == "fp8":
            return FP8_F32 if parent_format == FP8_F32 else FP8
    if dtype != "native" and parent_format in QUANTIZED:
        return BF16  # older Base revisions quantize the compressor; only linears stay quantized
    if dtype != "native" and template.storage == BF16 and parent_format == F32:
        return BF16  # transformers saves norms in F32
    return parent_format


def _storage_fields(parent: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    formats: dict[str, set[str]] = {LINEAR: set(), EXPERT: set()}
    for stored in parent.tensors.values():
        template = stored.entry.template
        if template.storage in formats:
            formats[template.storage].add(target_format(template, stored.fmt, recipe.store.dtype))
    if recipe.init == "random":
        return {"expert_dtype": None, "quantization_config": None}
    if recipe.store.dtype == "f32":
        own = parent.config.extra
        extra = {**own, "torch_dtype": "float32"} | ({"dtype": "float32"} if "dtype" in own else {})
        return {"expert_dtype": None, "quantization_config": None, "extra": extra}
    if not (formats[LINEAR] | formats[EXPERT]) & QUANTIZED:
        return {"expert_dtype": None, "quantization_config": None}
    names: Mapping[str, str] = {FP4: "fp4", FP8: "fp8", FP8_F32: "fp8"}
    expert = {names.get(fmt, "bf16") for fmt in formats[EXPERT]}
    return {
        "expert_dtype": expert.pop() if len(expert) == 1 else None,
        "quantization_config": _without_expert_dtype(
            parent.config.quantization_config or QUANTIZATION_CONFIG
        ),
    }


def _without_expert_dtype(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the experts' format, which transformers writes here and a cut may change."""
    return {key: value for key, value in quantization.items() if key != "expert_dtype"}


def _layer_notes(layers: LayerAssignment, config: V4Config) -> list[str]:
    """One note for each kind of change, with the layers concerned."""
    changed: dict[str, list[str]] = {}
    for target, (source, kind) in enumerate(zip(layers.sources, layers.kinds, strict=True)):
        was, is_hash = config.compress_ratios[source], source < config.num_hash_layers
        if was != kind.ratio:
            what = f"ratio {was} becomes {kind.ratio}" if kind.ratio else "compressor dropped"
            changed.setdefault(what, []).append(str(target))
        if is_hash and not kind.is_hash:
            what = "hash routing becomes score routing, with a gate bias of zero"
            changed.setdefault(what, []).append(str(target))
    return [f"{what} in layer {', '.join(targets)}" for what, targets in changed.items()]


def _notes(recipe: Recipe, config: V4Config, replica: V4Config, rope: RopeCut) -> list[str]:
    notes = []
    if rope.dims is not None:
        notes.append(
            f"rope frequencies: largest relative difference {rope.plain_error:.2g} in sliding "
            f"layers, {rope.scaled_error:.2g} in compressed layers (YaRN ramp, rounded to dims)"
        )
    rates = {r for r in replica.compress_ratios if attention_kind(r) == HCA}
    if len(rates) > 1:
        notes.append(
            f"HCA ratios {sorted(rates)}: transformers knows one HCA ratio for a model, and "
            "would run all at the first"
        )
    rope_dims, head_dim = replica.qk_rope_head_dim, replica.head_dim
    if int(head_dim * (rope_dims / head_dim)) != rope_dims:
        notes.append(
            f"transformers computes the rope size as int({head_dim} * ({rope_dims}/{head_dim})), "
            f"which is not {rope_dims}: choose another head_dim for it"
        )
    if replica.n_routed_experts < config.n_routed_experts:
        notes.append(
            "fewer experts: top-K of what is left is not top-K of all; gate.bias and "
            "routed_scaling_factor stay the parent's unless the recipe sets the latter"
        )
    if replica.index_head_dim & (replica.index_head_dim - 1):
        notes.append(
            f"index_head_dim {replica.index_head_dim} is no power of two: the Hadamard rotation "
            "becomes block-diagonal (scores do not change)"
        )
    if recipe.keep.mtp == "drop" and config.num_drafters:
        notes.append(f"{config.num_drafters} drafter block(s) dropped")
    return notes
