"""Groups, heads and head dims: what each block keeps of its attention.

Heads are not one flat list: group g of wo_a sees only its own heads. So groups are chosen first,
then heads inside each kept group. A head is (nope dims, rope pairs), in that order, and one
selection of them serves query, key/value, compressor and output of the whole model.

Source: spec/slicing.md, traps 1 to 3.
"""

from __future__ import annotations

import numpy as np

from v4surgery.config import V4Config
from v4surgery.errors import PlanError
from v4surgery.importance.scorebook import Scores
from v4surgery.recipes.schema import Choice, Heads, Keep
from v4surgery.slicers.pick import check_keep, choose
from v4surgery.slicers.selection import IntArray


def choose_heads(
    recipe: Heads | None,
    config: V4Config,
    *,
    place: str,
    seed: int,
    group_scores: Scores,
    head_scores: Scores,
) -> dict[str, IntArray | None]:
    """Groups kept, and the heads kept in each, as positions inside their group.

    Args:
        recipe: What the recipe says; None keeps all heads.
        config: The parent.
        place: The parent block's prefix.
        seed: The recipe's seed.
        group_scores: Scores of groups, ``(G,)``.
        head_scores: Scores of all heads, ``(N,)``.
    """
    if recipe is None:
        return {}
    groups = choose(
        recipe.groups,
        config.o_groups,
        field="keep.heads.groups",
        place=place,
        seed=seed,
        scores=group_scores,
    )
    heads = choose_in_groups(
        recipe.per_group,
        config.heads_per_group,
        np.arange(config.o_groups) if groups is None else groups,
        field="keep.heads.per_group",
        place=place,
        seed=seed,
        scores=head_scores,
    )
    return {"o_groups": groups, "group_heads": heads}


def choose_in_groups(
    pick: Choice | None,
    size: int,
    groups: IntArray,
    *,
    field: str,
    place: str,
    seed: int,
    scores: Scores,
) -> IntArray | None:
    """The same pick inside each kept group, int64 ``(groups, kept)``; None when all are whole.

    ``scores`` gives one number for every unit of every parent group, group-major.
    """
    if pick is None:
        return None
    rows = []
    for group in groups.tolist():

        def of_group(
            by: str, _: str, group: int = group
        ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return scores(by, place)[group * size : (group + 1) * size]

        rows.append(
            choose(
                pick, size, field=field, place=f"{place}group.{group}", seed=seed, scores=of_group
            )
        )
    if all(row is None for row in rows):
        return None
    return np.stack([np.arange(size, dtype=np.int64) if row is None else row for row in rows])


def index_nope(keep: Keep, config: V4Config) -> Choice | None:
    """The choice among the index dims without position: the total less the rope dims.

    Raises:
        PlanError: The total leaves no room for them, or ids that do not add up to it.
    """
    choice = keep.indexer.head_dim if keep.indexer else None
    if choice is None:
        return None
    nope = choice.keep - rope_dims(keep, config)
    if nope < 1:
        raise PlanError(
            "the index head has no room for dims without position",
            where="keep.indexer.head_dim",
            value=choice.keep,
            rule=f"more than the {rope_dims(keep, config)} rope dims",
        )
    check_keep(nope, config.index_nope_head_dim, "keep.indexer.head_dim less the rope dims")
    if choice.ids is not None and len(choice.ids) != nope:
        raise PlanError(
            "the index head's ids do not add up to its size with the rope dims",
            where="keep.indexer.head_dim",
            value=f"{len(choice.ids)} ids, keep {choice.keep}",
            rule=f"{nope} ids, beside the {rope_dims(keep, config)} rope dims",
        )
    return choice.model_copy(update={"keep": nope})


def rope_dims(keep: Keep, config: V4Config) -> int:
    """How many rope dims every head of the replica has."""
    rope = keep.head_dim.rope if keep.head_dim else None
    return rope or config.qk_rope_head_dim
