"""One parent for all ranks, which each of them opens itself.

A branch of a repository may move between two openings, and machines may have copies of their own.
"""

from __future__ import annotations

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.distributed.team import Team
from v4surgery.errors import CheckpointError


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
