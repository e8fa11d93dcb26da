"""One parent for all ranks, which each opens itself; and choices that need its weights, made once.

A branch of a repository may move between two openings, and machines may have copies of their own.
"""

from __future__ import annotations

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.distributed.team import Team
from v4surgery.errors import CheckpointError
from v4surgery.recipes import Recipe
from v4surgery.slicers.plan import Plan, plan_selected
from v4surgery.slicers.select import select


def require_same(team: Team | None, checkpoint: Checkpoint) -> None:
    """Hold what this rank has opened against what the others have.

    Raises:
        CheckpointError: Other headers, or another commit of a repository.
    """
    if team is None:
        return
    identity = checkpoint.source.identity()
    commit = identity["revision"] if identity["kind"] == "hub" else None
    found = team.gather((checkpoint.fingerprint, commit))
    for rank, (fingerprint, other) in enumerate(found):
        if (fingerprint, other) != found[0]:
            raise CheckpointError(
                "the ranks have not opened the same checkpoint",
                where=f"{checkpoint.name} on rank {rank}",
                value=f"fingerprint {fingerprint[:16]}, commit {other}",
                rule="the first rank's: fingerprint {:.16}, commit {}".format(*found[0]),
                hint="name a commit, ORG/NAME@COMMIT: a branch may have moved meanwhile; or give "
                "all machines the same folder",
            )


def plan_together(team: Team, parent: Checkpoint, recipe: Recipe) -> Plan:
    """The plan of all ranks. The first one chooses what is kept: that may read every weight.

    Raises:
        PlanError: The recipe cannot be applied to this parent.
        CheckpointError: The ranks have opened different ones.
    """
    require_same(team, parent)
    selected = team.tell(select(parent, recipe) if team.is_first else None)
    assert selected is not None
    resolved = recipe.model_copy(update={"scores_blake3": selected.scores_blake3})
    return plan_selected(parent, resolved, selected)
