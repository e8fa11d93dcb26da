"""Which layers a replica keeps, and what each of them becomes."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictInt,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from v4surgery.recipes._section import (
    MAX_LAYERS,
    Index,
    LayerCount,
    Section,
    SeedInt,
    broken_rule,
    is_whole,
)
from v4surgery.recipes._ways import (
    LayersWays,
    Way,
    check_ids,
    check_ways,
    length,
    long_choice,
    settled,
)

__all__ = ["Layers"]


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
    return length(ratios)


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
    by: LayersWays = Field(
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
        return long_choice(value, "count")

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        if "ids" in written and "by" not in written:
            written["by"] = "ids"
        named = written.get("by") == "ids" or "compress_ratios" in written
        if "count" not in written and named:
            # A list in error is reported itself; count then only stands in.
            ratios = written.get("compress_ratios")
            known = length(written.get("ids")) or _num_ratios(ratios) or 1
            written["count"] = min(known, MAX_LAYERS)
        return written

    @field_validator("by")
    @classmethod
    def _ways_fit(cls, by: Way) -> Way:
        check_ways(by, cls.scored, takes_gate=False)
        return by

    @field_validator("ids")
    @classmethod
    def _ids_fit(cls, ids: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        check_ids(info.data.get("by"), ids)
        if ids is None:
            return None
        for before, after in pairwise(ids):
            if after <= before:
                raise broken_rule(
                    "must rise, but {after} follows {before}", after=after, before=before
                )
        count = settled(info, "count")
        if count is not None and count != len(ids):
            raise broken_rule("has {n} ids, but count is {count}", n=len(ids), count=count)
        return ids

    @field_validator("compress_ratios")
    @classmethod
    def _one_ratio_each(
        cls, ratios: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        count = settled(info, "count")
        if ratios is not None and count is not None and count != len(ratios):
            raise broken_rule(
                "stands for {n} layers, but there are {count}", n=len(ratios), count=count
            )
        return ratios

    @field_validator("hash_layers")
    @classmethod
    def _hash_layers_exist(cls, hash_layers: int | None, info: ValidationInfo) -> int | None:
        count = settled(info, "count", "ids", "compress_ratios")
        if hash_layers is not None and count is not None and hash_layers > count:
            raise broken_rule("must be at most the number of layers, {count}", count=count)
        return hash_layers
