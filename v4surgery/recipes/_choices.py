"""Which units of an axis a replica keeps: the models with rules between their fields.

Each rule is checked at the last field it needs, so that a mistake in one field never hides a
mistake in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StrictInt,
    Tag,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from v4surgery.importance.names import SCORE_NAMES
from v4surgery.recipes._section import (
    MAX_LAYERS,
    Count,
    Index,
    LayerCount,
    Section,
    SeedInt,
    broken_rule,
    is_whole,
)

__all__ = [
    "ActivationPick",
    "BasisPick",
    "By",
    "Choice",
    "ContributionPick",
    "EnergyPick",
    "Experts",
    "FactorPick",
    "FrequencyPick",
    "HiddenPick",
    "IndexDims",
    "Layers",
    "LayersBy",
    "Method",
    "Pick",
    "RankPick",
    "Way",
    "is_score",
    "listed_ways",
]

By = Literal[
    "first",
    "even",
    "ids",
    "random",
    "norm",
    "gate",
    "scores",
    "reap",
    "frequency",
    "contribution",
    "activation",
    "energy",
]
Method = Literal["select", "pca", "svd"]
LayersBy = Literal["even", "first", "kinds", "ids", "random", "norm", "scores", "influence"]
Way = str | tuple[str, ...]
"""One way to choose, or several: the first that the scores file has what it needs for."""


def _how_many(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


# Tags stand in the places of errors; they are no keys, which the parenthesis says.
_Ways = Annotated[
    Annotated[By, Tag("(one)")]
    | Annotated[tuple[By, ...], Field(min_length=1, max_length=8), Tag("(several)")],
    Discriminator(lambda value: f"({_how_many(value)})"),
]
_LayersWays = Annotated[
    Annotated[LayersBy, Tag("(one)")]
    | Annotated[tuple[LayersBy, ...], Field(min_length=1, max_length=8), Tag("(several)")],
    Discriminator(lambda value: f"({_how_many(value)})"),
]


def is_score(way: str) -> bool:
    """Whether a way to choose needs a scores file."""
    return way == "scores" or way in SCORE_NAMES


def listed_ways(by: Way) -> tuple[str, ...]:
    """The ways to choose in their order, be it one or several."""
    return (by,) if isinstance(by, str) else by


def _check_ways(by: Way, scored: Collection[str], *, takes_gate: bool) -> None:
    """Each way fits the axis, and only the last of a list is always there."""
    ways = listed_ways(by)
    for way in ways:
        if way == "gate" and not takes_gate:
            raise broken_rule("`gate` chooses experts only; take another, such as norm or even")
        if way in SCORE_NAMES and way not in scored:
            raise broken_rule(
                "`{way}` is no score of this axis; it has {known}",
                way=way,
                known=" and ".join(scored) or "none",
            )
    if "ids" in ways and not isinstance(by, str):
        raise broken_rule("`ids` stands alone, not in a list")
    for way, after in pairwise(ways):
        if not is_score(way):
            raise broken_rule(
                "`{way}` is always there, so `{after}` would never be used", way=way, after=after
            )


def _long_choice(value: object, key: str) -> object:
    if is_whole(value):
        return {key: value}
    return {"by": "ids", "ids": value} if isinstance(value, list | tuple) else value


def _check_ids(by: Way | None, ids: tuple[int, ...] | None) -> None:
    if by == "ids" and ids is None:
        raise broken_rule("missing: `by: ids` needs a list of ids")
    if by is not None and by != "ids" and ids is not None:
        raise broken_rule(
            "only goes with `by: ids`, not with `by: {by}`", by=", ".join(listed_ways(by))
        )


def _settled(info: ValidationInfo, name: str, *origins: str) -> int | None:
    """An earlier field, or None where it, or one that it may follow from, is in error."""
    if not {name, *origins} <= info.data.keys():
        return None
    value: int | None = info.data[name]
    return value


def _length(value: object) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


class Choice(Section):
    """Which units of one axis are kept; the base of Pick and Experts."""

    form: ClassVar[str] = "must be a whole number, a list of ids, or a mapping such as {keep: 8}"
    takes_gate: ClassVar[bool] = False
    scored: ClassVar[tuple[str, ...]] = ()
    """Names of the axis's scores, the one of `by: scores` first."""
    counts_ids: ClassVar[bool] = True
    """Whether `keep` is the number of ids."""

    keep: Count | None = Field(default=None, description="How many units are kept.")
    by: _Ways = Field(
        default="even",
        description="How units are chosen; of a list, the first that the scores file has.",
    )
    ids: Annotated[tuple[Index, ...], Field(min_length=1)] | None = Field(
        default=None, validate_default=True, description="Indices of the kept units, for `by: ids`."
    )
    seed: SeedInt | None = Field(
        default=None, description="Seed of `by: random`; the recipe's seed where it is not given."
    )
    block: Count = Field(
        default=1,
        description="Units are taken in whole aligned runs of this many; 128 keeps FP8 blocks, "
        "32 FP4 groups.",
    )

    @classmethod
    def long_form(cls, value: object) -> object:
        return _long_choice(value, "keep")

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        if "ids" in written and "by" not in written:
            written["by"] = "ids"
        if cls.counts_ids and "keep" not in written and written.get("by") == "ids":
            # Without a usable list the ids are in error themselves; keep then only stands in.
            written["keep"] = _length(written.get("ids")) or 1
        return written

    @field_validator("by")
    @classmethod
    def _ways_fit(cls, by: Way) -> Way:
        _check_ways(by, cls.scored, takes_gate=cls.takes_gate)
        return by

    @field_validator("ids")
    @classmethod
    def _ids_fit(cls, ids: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        _check_ids(info.data.get("by"), ids)
        if ids is None:
            return None
        if len(set(ids)) < len(ids):
            twice = next(index for index, times in Counter(ids).items() if times > 1)
            raise broken_rule("must be distinct, but {twice} is there twice", twice=twice)
        keep = _settled(info, "keep")
        if cls.counts_ids and keep is not None and keep != len(ids):
            raise broken_rule("has {n} ids, but keep is {keep}", n=len(ids), keep=keep)
        return ids

    @field_validator("block")
    @classmethod
    def _block_divides_keep(cls, block: int, info: ValidationInfo) -> int:
        keep = _settled(info, "keep", "ids")
        if cls.counts_ids and keep is not None and keep % block:
            raise broken_rule("must divide keep, which is {keep}", keep=keep)
        return block


class Pick(Choice):
    """A choice on one axis. An int is short for {keep: int}, a list for {by: ids, ids: list}."""

    keep: Count = Field(description="How many units are kept.")


class ActivationPick(Pick):
    """A choice among units that a matrix reads: `activation` scores them."""

    scored: ClassVar[tuple[str, ...]] = ("activation",)


class ContributionPick(Pick):
    """A choice among heads or groups of them: `contribution` scores them."""

    scored: ClassVar[tuple[str, ...]] = ("contribution",)


class EnergyPick(Pick):
    """A choice among channels, streams or dims: `energy` scores them."""

    scored: ClassVar[tuple[str, ...]] = ("energy",)


class FrequencyPick(Pick):
    """A choice among token ids: `frequency` scores them."""

    scored: ClassVar[tuple[str, ...]] = ("frequency",)


class BasisPick(Pick):
    """A choice on an axis whose basis is free: some units, or as many of the best directions."""

    other_method: ClassVar[Method] = "pca"
    choosing_keys: ClassVar[tuple[str, ...]] = ("by", "ids", "seed", "block")

    method: Method = Field(
        default="select",
        description="Units of the parent (select), or another basis, all of which stays exact "
        "where nothing is dropped: principal components (pca, of hidden_size and q_lora_rank), "
        "truncated SVD of each group's wo_b @ wo_a (svd, of o_lora_rank). See docs/methods.md.",
    )

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        method = written.get("method", "select")
        useless = [key for key in cls.choosing_keys if key in written]
        if method in ("pca", "svd") and useless:
            raise broken_rule(
                "`{key}` chooses units, and `method: {method}` mixes all of them: leave one out",
                key=useless[0],
                method=method,
            )
        return super()._completed(written)

    @field_validator("method")
    @classmethod
    def _fits_the_axis(cls, method: Method) -> Method:
        if method not in ("select", cls.other_method):
            raise broken_rule(
                "`{method}` is not for this axis, which takes select or {other}: pca is for "
                "hidden_size and q_lora_rank, svd for o_lora_rank",
                method=method,
                other=cls.other_method,
            )
        return method


class HiddenPick(BasisPick):
    """The same on hidden_size: `energy` scores its channels."""

    scored: ClassVar[tuple[str, ...]] = ("energy",)


class RankPick(BasisPick):
    """The same on q_lora_rank: `activation` scores its units."""

    scored: ClassVar[tuple[str, ...]] = ("activation",)


class FactorPick(RankPick):
    """The same on o_lora_rank, whose two sides are factors of one product."""

    other_method: ClassVar[Method] = "svd"


class IndexDims(Choice):
    """The index head dim: `keep` counts the rope dims too, the choice is among the others."""

    form: ClassVar[str] = "must be a whole number, or a mapping such as {keep: 96}"
    scored: ClassVar[tuple[str, ...]] = ("energy",)
    counts_ids: ClassVar[bool] = False

    keep: Count = Field(description="The whole index_head_dim of the replica, rope dims included.")
    ids: Annotated[tuple[Index, ...], Field(min_length=1)] | None = Field(
        default=None,
        validate_default=True,
        description="The kept dims before the rope ones, for `by: ids`.",
    )

    @field_validator("ids")
    @classmethod
    def _leave_room_for_rope(
        cls, ids: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        keep = _settled(info, "keep")
        if ids is not None and keep is not None and (len(ids) >= keep or (keep - len(ids)) % 2):
            raise broken_rule(
                "has {n} ids, so keep ({keep}) leaves no even number of rope dims",
                n=len(ids),
                keep=keep,
            )
        return ids


class Run(Section):
    """One entry of compress_ratios: an int, or a pattern that repeats."""

    form: ClassVar[str] = "must be a ratio, or a mapping such as {repeat: 12, of: [4, 112]}"

    repeat: LayerCount = Field(description="How often the pattern stands there.")
    of: Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_LAYERS)] = Field(
        description="The ratios of the pattern."
    )

    @classmethod
    def long_form(cls, value: object) -> object:
        return {"repeat": 1, "of": [value]} if is_whole(value) else value


_RUNS = TypeAdapter(list[Run])


def _flat_ratios(value: object) -> object:
    if value is None:
        return None
    runs = _RUNS.validate_python(list(value) if isinstance(value, tuple) else value)
    total = sum(run.repeat * len(run.of) for run in runs)
    if not 1 <= total <= MAX_LAYERS:
        raise broken_rule(
            "stands for {total} layers; 1 to {limit} are allowed", total=total, limit=MAX_LAYERS
        )
    return tuple(ratio for run in runs for ratio in run.of * run.repeat)


def _num_ratios(value: object) -> int | None:
    """How many layers a list stands for, or None where it is in error itself."""
    try:
        ratios = _flat_ratios(value)
    except ValueError:
        return None
    return _length(ratios)


class Layers(Section):
    """Which layers are kept. An int is short for {count: int}, a list for {by: ids, ids: list}."""

    form: ClassVar[str] = (
        "must be a whole number, a list of layer ids, or a mapping such as {count: 28}"
    )
    entry_sections: ClassVar[dict[str, type[Section]]] = {"compress_ratios": Run}
    scored: ClassVar[tuple[str, ...]] = ("influence",)

    count: LayerCount = Field(
        description="How many layers the replica has; follows from ids or compress_ratios."
    )
    by: _LayersWays = Field(
        default="even",
        description="How layers are chosen inside their kind; of a list, the first that the "
        "scores file has.",
    )
    ids: Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_LAYERS)] | None = Field(
        default=None,
        validate_default=True,
        description="Parent layers in rising order, for `by: ids`.",
    )
    seed: SeedInt | None = Field(
        default=None, description="Seed of `by: random`; the recipe's seed where it is not given."
    )
    compress_ratios: Annotated[tuple[Index, ...], BeforeValidator(_flat_ratios)] | None = Field(
        default=None,
        description="Ratio of each layer of the replica, drafters left out; "
        "{repeat: n, of: [...]} stands for a pattern.",
    )
    hash_layers: Annotated[StrictInt, Field(ge=0, le=MAX_LAYERS)] | None = Field(
        default=None, description="How many of the first layers route by the token's hash table."
    )
    ape: Literal["pick", "interpolate"] = Field(
        default="pick",
        description="How the rows of `ape` follow another ratio: picked or interpolated.",
    )
    hash_to_score: Literal["refuse", "zero-bias"] = Field(
        default="refuse",
        description="Whether a hash layer may become a score layer, with a gate bias of zeros.",
    )

    @classmethod
    def long_form(cls, value: object) -> object:
        return _long_choice(value, "count")

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        if "ids" in written and "by" not in written:
            written["by"] = "ids"
        named = written.get("by") == "ids" or "compress_ratios" in written
        if "count" not in written and named:
            # A list in error is reported itself; count then only stands in.
            ratios = written.get("compress_ratios")
            known = _length(written.get("ids")) or _num_ratios(ratios) or 1
            written["count"] = min(known, MAX_LAYERS)
        return written

    @field_validator("by")
    @classmethod
    def _ways_fit(cls, by: Way) -> Way:
        _check_ways(by, cls.scored, takes_gate=False)
        return by

    @field_validator("ids")
    @classmethod
    def _ids_fit(cls, ids: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        _check_ids(info.data.get("by"), ids)
        if ids is None:
            return None
        for before, after in pairwise(ids):
            if after <= before:
                raise broken_rule(
                    "must rise, but {after} follows {before}", after=after, before=before
                )
        count = _settled(info, "count")
        if count is not None and count != len(ids):
            raise broken_rule("has {n} ids, but count is {count}", n=len(ids), count=count)
        return ids

    @field_validator("compress_ratios")
    @classmethod
    def _one_ratio_each(
        cls, ratios: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        count = _settled(info, "count")
        if ratios is not None and count is not None and count != len(ratios):
            raise broken_rule(
                "stands for {n} layers, but there are {count}", n=len(ratios), count=count
            )
        return ratios

    @field_validator("hash_layers")
    @classmethod
    def _hash_layers_exist(cls, hash_layers: int | None, info: ValidationInfo) -> int | None:
        count = _settled(info, "count", "ids", "compress_ratios")
        if hash_layers is not None and count is not None and hash_layers > count:
            raise broken_rule("must be at most the number of layers, {count}", count=count)
        return hash_layers


class Experts(Choice):
    """Which routed experts are kept in each layer, and how many of them a token takes."""

    takes_gate: ClassVar[bool] = True
    scored: ClassVar[tuple[str, ...]] = ("reap", "frequency")

    per_token: Count | None = Field(default=None, description="num_experts_per_tok of the replica.")
    hash_table: Literal["nearest", "balanced", "keep-all"] = Field(
        default="nearest",
        description="Where hash layers send tokens of a removed expert: to the kept expert with "
        "the most similar gate row, evenly spread (balanced); keep-all refuses "
        "a cut in which a token would lose an expert.",
    )

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        written = super()._completed(written)
        if "keep" not in written and {"by", "ids", "seed", "block"} & set(written):
            written["keep"] = None  # a default is not checked, a written null is
        return written

    @field_validator("keep")
    @classmethod
    def _choosing_needs_keep(cls, keep: int | None) -> int:
        if keep is None:
            raise broken_rule("missing: how many experts are kept")
        return keep

    @field_validator("per_token")
    @classmethod
    def _enough_experts(cls, per_token: int | None, info: ValidationInfo) -> int | None:
        keep = _settled(info, "keep", "ids")
        if per_token is not None and keep is not None and per_token > keep:
            raise broken_rule("must be at most the number of kept experts, {keep}", keep=keep)
        return per_token
