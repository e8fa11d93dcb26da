"""How units of one dim are chosen: first, even, ids, random, or the best by a score."""

from __future__ import annotations

from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from v4surgery.errors import PlanError
from v4surgery.importance.scorebook import Scores
from v4surgery.recipes.schema import Choice
from v4surgery.slicers.selection import IntArray, whole_to_none


def even(count: int, size: int) -> IntArray:
    """``count`` of ``size`` units at even distance, starting with the first: ``i * size // count``.

    Where ``count`` divides ``size`` that is every s-th unit.
    """
    return np.arange(count, dtype=np.int64) * size // count


def choose(
    pick: Choice | None,
    size: int,
    *,
    field: str,
    place: str = "model",
    seed: int = 0,
    scores: Scores | None = None,
) -> IntArray | None:
    """Units that a pick keeps of a dim of ``size`` units, ascending (``ids``: as given).

    Args:
        pick: What the recipe says; None keeps the dim whole.
        size: Units of the parent.
        field: The recipe's key path, for messages.
        place: Block prefix or ``model``: random choices and scores differ by place.
        seed: The recipe's seed, unless the pick has one.
        scores: Gives the units' scores where ``by`` asks for them.

    Returns:
        int64 ``(keep,)``, or None when that is every unit in order.

    Raises:
        PlanError: More units than the parent has, ids that it does not have, or runs that do not
            come out even.
    """
    if pick is None:
        return None
    assert pick.keep is not None
    if pick.ids is not None:
        ids = np.asarray(pick.ids, dtype=np.int64)
        if ids.max(initial=-1) >= size:
            raise PlanError(
                "the recipe names units that the parent does not have",
                where=f"{field}.ids",
                value=int(ids.max()),
                rule=f"ids from 0 to {size - 1}",
            )
        return whole_to_none(ids, size)
    check_keep(pick.keep, size, field)
    if size % pick.block or pick.keep % pick.block:
        raise PlanError(
            "the units are no multiple of the block that the recipe takes",
            where=f"{field}.block",
            value=pick.block,
            rule=f"a divisor of {size}, which there are, and of {pick.keep}, which are chosen",
        )
    runs, keep = size // pick.block, pick.keep // pick.block
    chosen = _choose_runs(
        pick, runs, keep, size, place=place, field=field, seed=seed, scores=scores
    )
    units = (chosen[:, None] * pick.block + np.arange(pick.block)).reshape(-1)
    return whole_to_none(units, size)


def check_keep(keep: int, size: int, field: str) -> None:
    if keep > size:
        raise PlanError(
            "the recipe keeps more than the parent has",
            where=field,
            value=keep,
            rule=f"at most {size}",
            hint="lower it in the recipe, or with --set " + f"{field}=...",
        )


def _choose_runs(
    pick: Choice,
    runs: int,
    keep: int,
    size: int,
    *,
    place: str,
    field: str,
    seed: int,
    scores: Scores | None,
) -> IntArray:
    if pick.by == "first":
        return np.arange(keep, dtype=np.int64)
    if pick.by == "even":
        return even(keep, runs)
    if pick.by == "random":
        rng = generator(seed if pick.seed is None else pick.seed, field, place)
        return np.sort(rng.permutation(runs)[:keep]).astype(np.int64)
    assert scores is not None and isinstance(pick.by, str), (field, pick.by)  # settled
    if keep == runs:
        return np.arange(runs, dtype=np.int64)
    values = scores(pick.by, place)
    assert values.shape == (size,), (field, values.shape)
    return best(values.reshape(runs, pick.block).sum(axis=1), keep)


def best(values: NDArray[np.float64], keep: int) -> IntArray:
    """The ``keep`` units of highest score, ascending; ties go to the lower unit."""
    order = np.argsort(-values, kind="stable")[:keep]
    return np.sort(order).astype(np.int64)


def generator(seed: int, field: str, place: str) -> np.random.Generator:
    """The random stream of one field in one place, independent of all others."""
    return np.random.default_rng([seed, crc32(field.encode()), crc32(place.encode())])
