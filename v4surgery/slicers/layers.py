"""Which parent layer each replica layer is cut from.

A layer is (sliding | CSA | HCA) x (hash | score), and a replica layer must come from a parent
layer of its own kind, in increasing order. With the replica's ratios given, the assignment is a
shortest path: conversions cost most, then a change of HCA ratio, then what ``by`` prefers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from v4surgery.config import CSA, HCA, SLIDING, V4Config, attention_kind
from v4surgery.errors import PlanError
from v4surgery.importance.scorebook import Scores
from v4surgery.recipes.schema import Layers
from v4surgery.slicers.pick import best, check_keep, even, generator

FIELD = "keep.layers"
CONVERSION_COST = 1e12
RATIO_CHANGE_COST = 1e9
KIND_NAMES = {SLIDING: "sliding", CSA: "CSA", HCA: "HCA"}


@dataclass(frozen=True)
class LayerKind:
    """What decides which parent layers can stand in for a layer."""

    ratio: int
    is_hash: bool

    @property
    def attention(self) -> str:
        return attention_kind(self.ratio)

    def __str__(self) -> str:
        ratio = f" {self.ratio}" if self.attention == HCA else ""
        return f"{KIND_NAMES[self.attention]}{ratio}, {'hash' if self.is_hash else 'score'}"


@dataclass(frozen=True)
class LayerAssignment:
    """Sources of the replica's layers, and what each becomes."""

    sources: tuple[int, ...]
    kinds: tuple[LayerKind, ...]


def parent_kinds(config: V4Config) -> tuple[LayerKind, ...]:
    return tuple(
        LayerKind(config.compress_ratios[i], i < config.num_hash_layers)
        for i in range(config.num_hidden_layers)
    )


def assign_layers(
    recipe: Layers | None, config: V4Config, *, seed: int = 0, scores: Scores | None = None
) -> LayerAssignment:
    """Choose a source for every replica layer.

    Raises:
        PlanError: A replica layer has no possible source; the message says which.
    """
    kinds = parent_kinds(config)
    if recipe is None:
        return LayerAssignment(tuple(range(len(kinds))), kinds)
    check_keep(recipe.count, len(kinds), FIELD)
    if recipe.ids is not None and max(recipe.ids) >= len(kinds):
        raise PlanError(
            "the recipe names layers that the parent does not have",
            where=f"{FIELD}.ids",
            value=max(recipe.ids),
            rule=f"ids from 0 to {len(kinds) - 1}",
        )
    if recipe.compress_ratios is None and recipe.hash_layers is None:
        sources = _free_choice(recipe, kinds, seed, scores)
        return LayerAssignment(sources, tuple(kinds[i] for i in sources))
    return _assign(recipe, kinds, config, seed, scores)


def _free_choice(
    recipe: Layers, kinds: tuple[LayerKind, ...], seed: int, scores: Scores | None
) -> tuple[int, ...]:
    """Sources when the replica's kinds simply follow from them."""
    count, size = recipe.count, len(kinds)
    if recipe.ids is not None:
        chosen = np.asarray(recipe.ids)
    elif recipe.by == "first":
        chosen = np.arange(count)
    elif recipe.by == "kinds":
        chosen = _round_robin(kinds, count)
    elif recipe.by == "even":
        chosen = _even_by_kind(kinds, count)
    elif recipe.by == "random":
        chosen = np.sort(generator(_seed(recipe, seed), FIELD, "model").permutation(size)[:count])
    else:
        assert scores is not None and isinstance(recipe.by, str)  # settled
        chosen = best(scores(recipe.by, "model"), count)
    return tuple(int(i) for i in chosen)


def _round_robin(kinds: tuple[LayerKind, ...], count: int) -> NDArray[np.int64]:
    """The first layer of every kind in order of appearance, then the second of each, ..."""
    seen: dict[LayerKind, int] = {}
    rounds = []
    for i, kind in enumerate(kinds):
        rounds.append((seen.get(kind, 0), i))
        seen[kind] = seen.get(kind, 0) + 1
    return np.sort([i for _, i in sorted(rounds)[:count]])


def _even_by_kind(kinds: tuple[LayerKind, ...], count: int) -> NDArray[np.int64]:
    """Every kind keeps its share (at least one layer while there is room), evenly spread in it."""
    members = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    quota = dict.fromkeys(members, 0)
    for _ in range(count):
        # Largest remainder: the kind furthest below its share is next; kinds with none first.
        needy = max(
            (kind for kind in members if quota[kind] < len(members[kind])),
            key=lambda k: (quota[k] == 0, len(members[k]) * count / len(kinds) - quota[k]),
        )
        quota[needy] += 1
    chosen = [layers[i] for kind, layers in members.items() for i in even(quota[kind], len(layers))]
    return np.sort(np.asarray(chosen, dtype=np.int64))


def _assign(
    recipe: Layers,
    kinds: tuple[LayerKind, ...],
    config: V4Config,
    seed: int,
    scores: Scores | None,
) -> LayerAssignment:
    """Sources for wanted kinds, by the cheapest increasing assignment."""
    wanted = _wanted(recipe, config)
    preference = _preference(recipe, len(kinds), seed, scores)
    cost = np.full((len(wanted), len(kinds)), np.inf)
    for j, (ratio, is_hash) in enumerate(wanted):
        for i, kind in enumerate(kinds):
            cost[j, i] = _conversion_cost(kind, ratio, is_hash, recipe.hash_to_score == "zero-bias")
    cost[~np.isfinite(preference)] = np.inf
    sources = _cheapest_increasing(cost, preference)
    if len(sources) < len(wanted):
        j = len(sources)
        ratio, is_hash = wanted[j]
        routing = "hash" if is_hash else "score"
        name = str(LayerKind(ratio, is_hash)) if ratio is not None else routing
        raise PlanError(
            f"replica layer {j} ({name}) has no source in the parent",
            where=FIELD,
            value="the parent's layers: " + _kinds_in_words(kinds),
            rule="a layer comes from one of its own kind, after the source of the layer before; "
            "HCA may change its ratio, any layer may become sliding, and hash becomes score with "
            "hash_to_score: zero-bias",
            hint="change compress_ratios or hash_layers, or see which kinds exist: "
            "v4surgery inspect PARENT",
        )
    final = [
        LayerKind(kinds[i].ratio if ratio is None else ratio, is_hash)
        for i, (ratio, is_hash) in zip(sources, wanted, strict=True)
    ]
    return LayerAssignment(sources, tuple(final))


def _wanted(recipe: Layers, config: V4Config) -> list[tuple[int | None, bool]]:
    """Ratio (None: the source's own) and routing of each replica layer."""
    num_hash = recipe.hash_layers
    if num_hash is None:
        num_hash = min(config.num_hash_layers, recipe.count)
    ratios: tuple[int | None, ...] = recipe.compress_ratios or (None,) * recipe.count
    return [(ratio, j < num_hash) for j, ratio in enumerate(ratios)]


def _conversion_cost(
    kind: LayerKind, ratio: int | None, is_hash: bool, hash_to_score: bool
) -> float:
    if kind.is_hash != is_hash and (is_hash or not hash_to_score):
        return np.inf
    cost = CONVERSION_COST if kind.is_hash != is_hash else 0.0
    wanted = kind.attention if ratio is None else attention_kind(ratio)
    if wanted != kind.attention:
        return cost + CONVERSION_COST if wanted == SLIDING else np.inf
    return cost + (RATIO_CHANGE_COST if ratio not in (None, kind.ratio) else 0.0)


def _preference(
    recipe: Layers, num_parent: int, seed: int, scores: Scores | None
) -> NDArray[np.float64]:
    """What ``by`` prefers, ``(replica layers, parent layers)``: the least; inf is no choice."""
    count = recipe.count
    if recipe.ids is not None:
        table = np.full((count, num_parent), np.inf)
        table[np.arange(count), list(recipe.ids)] = 0.0
        return table
    position = np.arange(num_parent, dtype=np.float64)
    if recipe.by in ("first", "kinds"):
        row = position
    elif recipe.by == "random":
        row = generator(_seed(recipe, seed), FIELD, "model").random(num_parent)
    elif recipe.by == "even":
        ideal = np.linspace(0, num_parent - 1, count)
        return np.asarray((position[None] - ideal[:, None]) ** 2)
    else:
        assert scores is not None and isinstance(recipe.by, str)
        row = -scores(recipe.by, "model")
    return np.broadcast_to(row, (count, num_parent))


def _cheapest_increasing(
    cost: NDArray[np.float64], preference: NDArray[np.float64]
) -> tuple[int, ...]:
    """Strictly increasing columns, one a row, of least total cost; of equal cost, best preferred.

    The two are compared one after the other, not added up: beside a conversion's cost a
    difference of scores would drown in rounding. Fewer columns come back if a row has none.
    """
    num_rows, num_cols = cost.shape
    ends = list(zip(cost[0].tolist(), preference[0].tolist(), strict=True))
    back: list[list[int]] = []
    for j in range(num_rows):
        if j:
            before, ends, cheapest = ends, [(np.inf, 0.0)], 0
            back.append([0])
            for i in range(1, num_cols):  # cheapest: the best end of row j - 1 before column i
                cheapest = i - 1 if before[i - 1] < before[cheapest] else cheapest
                spent, liked = before[cheapest]
                ends.append((spent + float(cost[j, i]), liked + float(preference[j, i])))
                back[-1].append(cheapest)
        if not np.isfinite(min(ends)[0]):
            return tuple(range(j))
    path = [min(range(num_cols), key=lambda i: ends[i])]
    for pointers in reversed(back):
        path.append(pointers[path[-1]])
    return tuple(reversed(path))


def _seed(recipe: Layers, seed: int) -> int:
    return seed if recipe.seed is None else recipe.seed


def _kinds_in_words(kinds: tuple[LayerKind, ...]) -> str:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[str(kind)] = counts.get(str(kind), 0) + 1
    return "; ".join(f"{count} x {name}" for name, count in counts.items())
