"""What a replica says of itself: the units that it kept, read as plain lists.

Nothing here knows how a tensor was cut. The record names units (channels, heads, ranks, experts)
of the parent; masks are made of them, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import V4Config
from v4surgery.errors import CheckpointError, UsageError
from v4surgery.recipes import Recipe, recipe_from_text

RECORD_FILE, RECIPE_FILE = "v4surgery.json", "recipe.yaml"

Units = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """What one block of the replica keeps of one block of the parent; every list is complete.

    Attributes:
        target: The replica's block, ``layers.3.``; empty for the model itself.
        source: The parent's.
        channels: Of each residual stream.
        streams: Residual streams.
        tokens: Token ids.
        nope: Head dims without position.
        pairs: Rotated pairs; pair p is the dims 2p and 2p + 1 of the rotated ones.
        q_ranks: Ranks of the query projection.
        groups: Output groups.
        heads: For each kept group, positions inside it.
        o_ranks: For each kept group, ranks of its output projection.
        experts: Routed experts.
        neurons: For each kept expert, its neurons; the last one for the shared expert.
        index_heads: Heads of the indexer.
        index_nope: Index dims without position.
        ape_rows: Positions of the compressor's window; None keeps or interpolates all.
    """

    target: str
    source: str
    channels: Units
    streams: Units
    tokens: Units
    nope: Units
    pairs: Units
    q_ranks: Units
    groups: Units
    heads: tuple[Units, ...]
    o_ranks: tuple[Units, ...]
    experts: Units
    neurons: tuple[Units, ...]
    index_heads: Units
    index_nope: Units
    ape_rows: Units | None


@dataclass(frozen=True)
class Record:
    """A replica's record.

    Attributes:
        recipe: The resolved recipe.
        model: What the model itself keeps.
        blocks: What each block keeps, in the order of the record.
        how: Transform of each stored tensor, by name.
        rounded: Stems whose values were quantized again with a loss.
    """

    recipe: Recipe
    model: Kept
    blocks: tuple[Kept, ...]
    how: Mapping[str, str]
    rounded: frozenset[str]


def read_record(replica: Checkpoint, parent: Checkpoint) -> Record:
    """The record of a replica, completed with the parent's sizes.

    Raises:
        CheckpointError: The replica has no record, or one that cannot be.
        UsageError: The parent is not the one it was cut from.
        RecipeError: Its recipe has problems.
    """
    where = f"{replica.name}/{RECORD_FILE}"
    try:
        data = json.loads(replica.read_file(RECORD_FILE))
        selections, origin = data["selections"], data["parent"]
        how = {name: item["how"] for name, item in data["tensors"].items()}
        rounded = frozenset(data["report"]["requantized"]["by_tensor"])
        items = [(item["target"], item["source"], item["kept"]) for item in selections["blocks"]]
        fingerprint = origin["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, CheckpointError):
        raise CheckpointError(
            "not a replica: it does not say what it was cut from",
            where=where,
            rule="a folder that `v4surgery slice` wrote",
        ) from None
    if fingerprint != parent.fingerprint:
        raise UsageError(
            "this is not the parent that the replica was cut from",
            where=parent.name,
            value=f"fingerprint {parent.fingerprint[:16]}",
            rule=f"fingerprint {fingerprint[:16]}",
            hint="name the right one with --parent",
        )
    text = replica.read_file(RECIPE_FILE).decode(errors="replace")
    recipe = recipe_from_text(text, RECIPE_FILE, is_whole=True)
    model = _Reader(parent.config, selections["model"], where)
    blocks: list[Kept] = []
    previous: dict[str, Any] = {}
    for target, source, kept in items:
        previous = {name: previous[name] if u == "same" else u for name, u in kept.items()}
        reader = _Reader(parent.config, {**selections["model"], **previous}, f"{where}, {target}")
        blocks.append(reader.kept(target, source))
    _check_blocks(blocks, replica, parent, where)
    return Record(recipe, model.kept("", ""), tuple(blocks), how, rounded)


def _check_blocks(
    blocks: Sequence[Kept], replica: Checkpoint, parent: Checkpoint, where: str
) -> None:
    """Every block of the replica once, in order, from blocks that the parent has."""
    targets = [block.prefix for block in replica.catalogue.blocks]
    sources = {block.prefix for block in parent.catalogue.blocks}
    strange = [block.source for block in blocks if block.source not in sources]
    if [block.target for block in blocks] != targets or strange:
        raise CheckpointError(
            "the record of the replica is not one of its blocks",
            where=where,
            value=f"from {', '.join(strange)}" if strange else f"{len(blocks)} blocks",
            rule=f"{', '.join(targets)}, each from a block of the parent",
        )


class _Reader:
    """Turns the lists of one block into a :class:`Kept`, refusing what cannot be."""

    def __init__(self, config: V4Config, units: Mapping[str, Any], where: str) -> None:
        self.config, self.units, self.where = config, dict(units), where

    def kept(self, target: str, source: str) -> Kept:
        config = self.config
        groups = self._flat("o_groups", config.o_groups)
        experts = self._flat("n_routed_experts", config.n_routed_experts)
        kept = Kept(
            target=target,
            source=source,
            channels=self._flat("hidden_size", config.hidden_size),
            streams=self._flat("streams", config.hc_mult),
            tokens=self._flat("vocab_size", config.vocab_size),
            nope=self._flat("nope", config.nope_head_dim),
            pairs=self._pairs(),
            q_ranks=self._flat("q_lora_rank", config.q_lora_rank),
            groups=groups,
            heads=self._nested("group_heads", config.heads_per_group, len(groups)),
            o_ranks=self._nested("o_lora_rank", config.o_lora_rank, len(groups)),
            experts=experts,
            neurons=self._nested(
                "moe_intermediate_size", config.moe_intermediate_size, len(experts) + 1
            ),
            index_heads=self._flat("index_n_heads", config.index_n_heads),
            index_nope=self._flat("index_nope", config.index_nope_head_dim),
            ape_rows=self._ape_rows(),
        )
        if self.units:
            raise self._malformed(", ".join(self.units), "kinds of units that every V4 has")
        return kept

    def _flat(self, name: str, size: int) -> Units:
        units = self.units.pop(name, None)
        return tuple(range(size)) if units is None else self._checked(name, units, size)

    def _nested(self, name: str, size: int, count: int) -> tuple[Units, ...]:
        """A list for each of ``count`` outer units; one list serves them all."""
        units = self.units.pop(name, None)
        if units is None:
            return (tuple(range(size)),) * count
        if not units or not isinstance(units[0], list):
            return (self._checked(name, units, size),) * count
        if len(units) != count:
            raise self._malformed(f"{name}: {len(units)} lists", f"{count}, one for each")
        return tuple(self._checked(name, row, size) for row in units)

    def _pairs(self) -> Units:
        dims = self._flat("rope", self.config.qk_rope_head_dim)
        first, second = dims[::2], dims[1::2]
        if any(a % 2 or b != a + 1 for a, b in zip(first, second, strict=False)) or len(dims) % 2:
            raise self._malformed("rope: " + _shown(dims), "whole pairs of dims, 2p and 2p + 1")
        return tuple(dim // 2 for dim in first)

    def _ape_rows(self) -> Units | None:
        rows = self.units.pop("compress_ratio", None)
        return None if rows is None else self._checked("compress_ratio", rows, 1 << 16)

    def _checked(self, name: str, units: Any, size: int) -> Units:
        if not isinstance(units, list) or not all(type(unit) is int for unit in units):
            raise self._malformed(f"{name}: {_shown(units)}", "a list of whole numbers")
        if not units or len(set(units)) < len(units) or min(units) < 0 or max(units) >= size:
            raise self._malformed(
                f"{name}: {_shown(units)}", f"distinct units from 0 to {size - 1}"
            )
        return tuple(units)

    def _malformed(self, value: str, rule: str) -> CheckpointError:
        return CheckpointError(
            "the record of the replica cannot be", where=self.where, value=value, rule=rule
        )


def _shown(units: Any) -> str:
    if not isinstance(units, Sequence) or len(units) <= 12:
        return repr(units)[:80]
    return ", ".join(map(repr, units[:12])) + ", ..."
