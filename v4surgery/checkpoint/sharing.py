"""Writing one checkpoint with several ranks: who writes what, and whose the folder is.

A file is written by one rank where there are files enough, because file systems of several machines
do not keep apart what two of them write into one page. Tensors that belong to one job may lie in
several files (a weight and its scale where a shard was full); one rank writes them. Where files are
too few, the ranks of the first machine write tensors into all of them, and the others have nothing
to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from v4surgery.checkpoint.claim import Claim, claim_folder, join_claim
from v4surgery.checkpoint.job import Job
from v4surgery.checkpoint.journal import RunId
from v4surgery.checkpoint.layout import ShardLayout
from v4surgery.checkpoint.shard import PART
from v4surgery.errors import OutputError

if TYPE_CHECKING:
    from v4surgery.distributed.team import Team


@dataclass(frozen=True)
class Shares:
    """Who does what.

    Attributes:
        owners: The rank that does each job.
        files_are_shared: Whether several ranks write into one file, so that none is whole before
            all ranks are done.
    """

    owners: Sequence[int]
    files_are_shared: bool = False


def deal_out(shards: Sequence[ShardLayout], jobs: Sequence[Job], team: Team | None) -> Shares:
    """Files to ranks, or tensors where files are too few: the largest first, to who has least."""
    if team is None:
        return Shares([0] * len(jobs))
    units = _units(shards, jobs)
    weights = [sum(item.nbytes for item in job.outputs) for job in jobs]
    local = team.launch.local_size
    shared = len(set(units)) < min(team.size, local)
    if shared:
        units = list(range(len(jobs)))
    sizes = dict.fromkeys(units, 0)
    for unit, weight in zip(units, weights, strict=True):
        sizes[unit] += weight
    owner = _spread(sizes, local if shared else team.size)
    return Shares([owner[unit] for unit in units], shared)


def _units(shards: Sequence[ShardLayout], jobs: Sequence[Job]) -> list[int]:
    """A number for each job, the same for all that write into the same files."""
    number = {item.key: i for i, shard in enumerate(shards) for item in shard.tensors}
    root = list(range(len(shards)))

    def find(shard: int) -> int:
        while root[shard] != shard:
            shard = root[shard]
        return shard

    for job in jobs:
        first, *others = sorted({find(number[item.key]) for item in job.outputs})
        for other in others:
            root[other] = first
    return [find(number[job.outputs[0].key]) for job in jobs]


def _spread(sizes: dict[int, int], ranks: int) -> dict[int, int]:
    loads, owner = [0] * ranks, dict[int, int]()
    for unit in sorted(sizes, key=lambda i: (-sizes[i], i)):
        owner[unit] = loads.index(min(loads))
        loads[owner[unit]] += sizes[unit]
    return owner


def claim_together(team: Team | None, out: Path, run: RunId, unfinish: Iterable[str] = ()) -> Claim:
    """The output folder for all ranks: the first one claims it, and tells what is done.

    Args:
        team: All ranks, or None.
        out: The output folder.
        run: What it is written for.
        unfinish: Files that several ranks will write into: a finished one is unfinished again
            before any of them looks.

    Raises:
        OutputError: As for one process; or the ranks do not plan the same output.
    """
    if team is None:
        return claim_folder(out, run)
    runs = team.gather(run)
    for rank, other in enumerate(runs):
        if other != runs[0]:
            raise OutputError(
                "the ranks do not plan the same output",
                where=f"rank {rank}",
                value=f"plan {other.plan}",
                rule=f"the first rank's, {runs[0].plan}",
                hint="give all machines the same parent, recipe, scores and version",
            )
    if not team.is_first:
        return join_claim(out, team.rank, *team.tell(("fresh", {})))
    claim = claim_folder(out, run)
    for file in unfinish if claim.state == "unfinished" else ():
        if (out / file).exists():
            (out / file).replace(out / (file + PART))
    team.tell((claim.state, claim.records))
    return claim
