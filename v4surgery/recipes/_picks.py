"""Which units of an axis a replica keeps."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from v4surgery.recipes._section import Count, Index, Section, SeedInt, broken_rule
from v4surgery.recipes._ways import (
    Way,
    Ways,
    check_ids,
    check_ways,
    length,
    long_choice,
    settled,
)

__all__ = [
    "ActivationPick",
    "BasisPick",
    "Choice",
    "ContributionPick",
    "EnergyPick",
    "Experts",
    "FactorPick",
    "FrequencyPick",
    "HiddenPick",
    "IndexDims",
    "Method",
    "Pick",
    "RankPick",
]

Method = Literal["select", "pca", "svd"]


class Choice(Section):
    """Which units of one axis are kept; the base of Pick and Experts."""

    form: ClassVar[str] = "must be a whole number, a list of ids, or a mapping such as {keep: 8}"
    takes_gate: ClassVar[bool] = False
    scored: ClassVar[tuple[str, ...]] = ()
    """Names of the axis's scores, the one of `by: scores` first."""
    counts_ids: ClassVar[bool] = True
    """Whether `keep` is the number of ids."""

    keep: Count | None = Field(default=None, description="How many units are kept.")
    by: Ways = Field(
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
        return long_choice(value, "keep")

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        if "ids" in written and "by" not in written:
            written["by"] = "ids"
        if cls.counts_ids and "keep" not in written and written.get("by") == "ids":
            # Without a usable list the ids are in error themselves; keep then only stands in.
            written["keep"] = length(written.get("ids")) or 1
        return written

    @field_validator("by")
    @classmethod
    def _ways_fit(cls, by: Way) -> Way:
        check_ways(by, cls.scored, takes_gate=cls.takes_gate)
        return by

    @field_validator("ids")
    @classmethod
    def _ids_fit(cls, ids: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        check_ids(info.data.get("by"), ids)
        if ids is None:
            return None
        if len(set(ids)) < len(ids):
            twice = next(index for index, times in Counter(ids).items() if times > 1)
            raise broken_rule("must be distinct, but {twice} is there twice", twice=twice)
        keep = settled(info, "keep")
        if cls.counts_ids and keep is not None and keep != len(ids):
            raise broken_rule("has {n} ids, but keep is {keep}", n=len(ids), keep=keep)
        return ids

    @field_validator("block")
    @classmethod
    def _block_divides_keep(cls, block: int, info: ValidationInfo) -> int:
        keep = settled(info, "keep", "ids")
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
        keep = settled(info, "keep")
        if ids is not None and keep is not None and (len(ids) >= keep or (keep - len(ids)) % 2):
            raise broken_rule(
                "has {n} ids, so keep ({keep}) leaves no even number of rope dims",
                n=len(ids),
                keep=keep,
            )
        return ids


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
        keep = settled(info, "keep", "ids")
        if per_token is not None and keep is not None and per_token > keep:
            raise broken_rule("must be at most the number of kept experts, {keep}", keep=keep)
        return per_token
