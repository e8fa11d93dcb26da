"""From a recipe and a parent to everything that is kept: the config and the selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from v4surgery.catalogue import Block, Catalogue
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import V4Config
from v4surgery.importance.names import SCORE_NAMES
from v4surgery.importance.scorebook import ScoreBook, neuron_dim
from v4surgery.recipes.schema import BasisPick, Choice, Heads, Keep, Recipe
from v4surgery.slicers.compress_ratios import choose_ape_rows
from v4surgery.slicers.heads import choose_heads, choose_in_groups, index_nope, rope_dims
from v4surgery.slicers.layers import assign_layers
from v4surgery.slicers.notes import config_notes, layer_notes
from v4surgery.slicers.pick import choose
from v4surgery.slicers.record_shape import check_selections
from v4surgery.slicers.replica_config import replica_config
from v4surgery.slicers.rope import RopeCut, cut_rope
from v4surgery.slicers.selection import BlockSelection, IntArray, Kept, Selections
from v4surgery.slicers.vocabulary import choose_vocabulary, load_tokenizer

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
    replica = replica_config(parent, recipe, layers, rope, model)
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
        *layer_notes(layers, config),
        *config_notes(recipe, config, replica, rope),
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
    replica = replica_config(
        parent, recipe, assign_layers(layers, config), _rope(recipe, config), {**whole, **model}
    )
    targets = {block.prefix: block for block in Catalogue(replica).blocks}
    check_selections(record, targets, parent.catalogue, "v4surgery.json: selections")
    return Selected(Selections.from_json(record, targets, sources), replica, notes, 0)


def _rope(recipe: Recipe, config: V4Config) -> RopeCut:
    head_dim = recipe.keep.head_dim
    allow = head_dim is not None and head_dim.frequencies == "any"
    return cut_rope(config, rope_dims(recipe.keep, config), allow_mismatch=allow)


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
            index_nope(keep, config), "index_nope", config.index_nope_head_dim, "indexer.head_dim"
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
