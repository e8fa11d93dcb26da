"""Writing one checkpoint with several ranks: each writes whole files, the first one does the rest.

A file is written by one rank, because file systems of several machines do not keep apart what two
of them write into one page. Tensors that belong to one job may lie in two files (a weight and its
scale where a shard was full); one rank writes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from v4surgery.checkpoint.journal import Claim, claim_folder, join_claim
from v4surgery.checkpoint.layout import ShardLayout
from v4surgery.errors import OutputError

if TYPE_CHECKING:
    from v4surgery.checkpoint.writer import Job
    from v4surgery.distributed.team import Team


def claim_together(team: Team | None, out: Path, plan_id: str, layout_id: str) -> Claim:
    """The output folder for all ranks: the first one claims it, and tells what is done.

    Raises:
        OutputError: As for one process; or the ranks do not plan the same output.
    """
    if team is None:
        return claim_folder(out, plan_id, layout_id)
    plans = team.gather((plan_id, layout_id))
    for rank, plan in enumerate(plans):
        if plan != plans[0]:
            raise OutputError(
                "the ranks do not plan the same output",
                where=f"rank {rank}",
                value=f"plan {plan[0]}",
                rule=f"the first rank's, {plans[0][0]}",
                hint="give all machines the same parent, recipe, scores and version",
            )
    if not team.is_first:
        return join_claim(out, team.rank, *team.tell(("fresh", {})))
    claim = claim_folder(out, plan_id, layout_id)
    team.tell((claim.state, claim.records))
    return claim


def deal_out(shards: Sequence[ShardLayout], jobs: Sequence[Job], ranks: int) -> list[int]:
    """The rank that does each job: whole files, the largest first, to who has least."""
    number = {item.key: i for i, shard in enumerate(shards) for item in shard.tensors}
    root = list(range(len(shards)))

    def find(shard: int) -> int:
        while root[shard] != shard:
            shard = root[shard]
        return shard

    for job in jobs:
        first, *others = {find(number[item.key]) for item in job.outputs}
        for other in others:
            root[other] = first
    sizes: dict[int, int] = {}
    for i, shard in enumerate(shards):
        sizes[find(i)] = sizes.get(find(i), 0) + shard.payload_bytes
    loads, owner = [0] * ranks, dict[int, int]()
    for unit in sorted(sizes, key=lambda i: (-sizes[i], i)):
        owner[unit] = loads.index(min(loads))
        loads[owner[unit]] += sizes[unit]
    return [owner[find(number[job.outputs[0].key])] for job in jobs]
