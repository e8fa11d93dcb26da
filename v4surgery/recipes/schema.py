"""A recipe as data: which units of the parent a replica keeps, and how they are stored.

Every model refuses unknown keys and is frozen. A key whose value is null counts as not written, so
a recipe that extends another can take a key back.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt

from v4surgery.recipes._layers import Layers
from v4surgery.recipes._picks import (
    ActivationPick,
    BasisPick,
    Choice,
    ContributionPick,
    EnergyPick,
    Experts,
    FactorPick,
    FrequencyPick,
    HiddenPick,
    IndexDims,
    Method,
    Pick,
    RankPick,
)
from v4surgery.recipes._section import (
    Count,
    Digest,
    Line,
    NonNegative,
    Positive,
    Section,
    SeedInt,
    ShardBytes,
    Share,
    Slug,
    Text,
)
from v4surgery.recipes._ways import By, LayersBy, is_score, listed_ways

__all__ = [
    "EXTENDS_DESCRIPTION",
    "BasisPick",
    "By",
    "Choice",
    "ConfigChanges",
    "Experts",
    "FactorPick",
    "HeadDim",
    "Heads",
    "IndexDims",
    "Indexer",
    "Keep",
    "Layers",
    "LayersBy",
    "Method",
    "Pick",
    "Recipe",
    "Section",
    "Store",
    "Validate",
    "is_score",
    "listed_ways",
]

EXTENDS_DESCRIPTION = (
    "Built-in name, or path relative to this file, of the recipe that this one is laid over: "
    "mappings are merged, everything else is replaced."
)
"""The one key of a recipe file that is no field: the loader resolves it."""


class Heads(Section):
    """Heads live in groups: which groups are kept, then which heads inside each kept group."""

    form: ClassVar[str] = "must be a mapping such as {groups: 4, per_group: 6}"

    groups: ContributionPick | None = Field(
        default=None, description="The kept output groups (o_groups)."
    )
    per_group: ContributionPick | None = Field(
        default=None,
        description="The kept heads of each kept group; ids are positions inside the group.",
    )


class HeadDim(Section):
    """A head is its nope dims, then its rope dims; the replica's head_dim is the sum."""

    form: ClassVar[str] = "must be a mapping such as {nope: 32, rope: 32}"

    nope: EnergyPick | None = Field(default=None, description="The kept dims before the rope ones.")
    rope: Annotated[StrictInt, Field(ge=2, le=2**31 - 1, multiple_of=2)] | None = Field(
        default=None,
        description="qk_rope_head_dim of the replica; every s-th pair of the parent is kept.",
    )
    frequencies: Literal["match", "any"] = Field(
        default="match",
        description="Whether the unscaled rope frequencies must equal the parent's pairs.",
    )


class Indexer(Section):
    """The indexer of the CSA layers (compress ratio 4)."""

    form: ClassVar[str] = "must be a mapping such as {heads: 16, head_dim: 96, topk: 192}"

    heads: ContributionPick | None = Field(
        default=None, description="The kept index heads (index_n_heads)."
    )
    head_dim: IndexDims | None = Field(
        default=None, description="index_head_dim of the replica, rope dims included."
    )
    topk: Count | None = Field(default=None, description="index_topk of the replica.")


class Keep(Section):
    """What the replica keeps. An axis that is not named is kept whole."""

    layers: Layers | None = Field(default=None, description="The kept layers and their kinds.")
    hidden_size: HiddenPick | None = Field(
        default=None, description="The kept channels of the hidden state."
    )
    hc_mult: EnergyPick | None = Field(default=None, description="The kept residual streams.")
    vocab_size: FrequencyPick | None = Field(default=None, description="The kept token ids.")
    experts: Experts | None = Field(
        default=None, description="The kept routed experts of each layer."
    )
    moe_intermediate_size: ActivationPick | None = Field(
        default=None, description="The kept neurons of every expert, the shared one included."
    )
    heads: Heads | None = Field(
        default=None, description="The kept output groups and attention heads."
    )
    head_dim: HeadDim | None = Field(
        default=None, description="The kept dims of every attention head."
    )
    q_lora_rank: RankPick | None = Field(
        default=None, description="The kept ranks of the query bottleneck."
    )
    o_lora_rank: FactorPick | None = Field(
        default=None, description="The kept ranks of every group's output bottleneck."
    )
    indexer: Indexer | None = Field(
        default=None, description="The indexer's heads, dims and top-k."
    )
    sliding_window: Count | None = Field(default=None, description="sliding_window of the replica.")
    mtp: Literal["keep", "drop"] = Field(
        default="keep", description="Whether the drafter blocks (mtp.*) are cut along or dropped."
    )


class ConfigChanges(Section):
    """Numbers of config.json that change without a tensor changing."""

    routed_scaling_factor: Positive | None = Field(
        default=None, description="Factor on the routed experts' sum; the parent's where not given."
    )
    max_position_embeddings: Count | None = Field(
        default=None, description="Positions that the replica's config announces."
    )
    beta_fast: Positive | None = Field(
        default=None,
        description="YaRN beta_fast; fitted to the parent's frequencies where not given.",
    )
    beta_slow: Positive | None = Field(
        default=None,
        description="YaRN beta_slow; fitted to the parent's frequencies where not given.",
    )


class Store(Section):
    """How the replica's tensors are written."""

    dtype: Literal["native", "bf16", "fp8", "f32"] = Field(
        default="bf16",
        description="Format of the weights that the parent stores as FP4, FP8 or BF16; f32 stores "
        "every floating tensor so.",
    )
    layout: Literal["auto", "parent", "packed", "published"] = Field(
        default="auto",
        description="Shards cut as the parent's are (parent), filled one after another (packed), "
        "one for each block as in the published checkpoints (published), or whichever fits the "
        "recipe (auto).",
    )
    max_shard_size: ShardBytes | None = Field(
        default=None, description="Largest shard, in bytes or as 5GB, 500MB, 2GiB."
    )
    nonfinite: Literal["error", "warn", "keep"] = Field(
        default="error",
        description="What happens where a decoded weight is NaN or infinite: stop; keep it, say so "
        "and count it in the record; or keep it and only count it.",
    )


class Validate(Section):
    """Thresholds of `v4surgery validate`; without one the number is only reported."""

    logit_kl: NonNegative | None = Field(
        default=None,
        description="Largest mean KL divergence of the logits from the parent's, in nats.",
    )
    top1_agreement: Share | None = Field(
        default=None,
        description="Smallest share of positions with the parent's most likely token, 0 to 1.",
    )
    top5_agreement: Share | None = Field(
        default=None,
        description="Smallest share of the parent's five most likely tokens that are among the "
        "replica's, 0 to 1.",
    )
    perplexity_ratio: NonNegative | None = Field(
        default=None,
        description="Largest perplexity on the prompts, in multiples of the parent's.",
    )
    relative_error: NonNegative | None = Field(
        default=None,
        description="Largest relative error of a layer's output, parent and replica each running "
        "on its own.",
    )
    taught_error: NonNegative | None = Field(
        default=None,
        description="Largest relative error of a layer's output where each layer is fed the "
        "parent's input.",
    )
    router_agreement: Share | None = Field(
        default=None,
        description="Smallest share in a layer of the parent's choices of kept experts that the "
        "replica makes too, each layer fed the parent's input, 0 to 1.",
    )


class Recipe(Section):
    """A whole recipe: what `v4surgery plan` and `slice` do to a parent."""

    name: Slug = Field(description="Short name of the replica: a-z, 0-9, '.', '_', '-'.")
    description: Text = Field(default="", description="What it is for, in a sentence.")
    parent: Line | None = Field(
        default=None, description="Hub id or folder that is cut where the command names no other."
    )
    init: Literal["parent", "random"] = Field(
        default="parent", description="Weights from the parent, or a randomly initialised scaffold."
    )
    seed: SeedInt = Field(default=0, description="Seed of everything random in the recipe.")
    keep: Keep = Field(default=Keep(), description="What the replica keeps of each axis.")
    config: ConfigChanges = Field(
        default=ConfigChanges(),
        description="Changes to config.json beyond those that the cut implies.",
    )
    compensate: StrictBool = Field(
        default=False,
        description="Whether norms are rescaled for the channels that they no longer see.",
    )
    store: Store = Field(
        default=Store(), description="Number format, shards, and checks of the output."
    )
    validate_: Validate = Field(
        default=Validate(), alias="validate", description="Thresholds that a validation must meet."
    )
    scores: Line | None = Field(
        default=None,
        description="Scores file (from `v4surgery score`) of every `by` that names a score.",
    )
    scores_blake3: Digest | None = Field(
        default=None,
        description="BLAKE3 of the scores file, in hex: the only content it may have. A resolved "
        "recipe has it.",
    )
