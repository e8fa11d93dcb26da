"""Writing a checkpoint: many workers, bounded memory, atomic files, and a run that resumes.

A :class:`~v4surgery.checkpoint.job.Job` computes one or a few output tensors chunk by chunk;
:func:`write_checkpoint` runs jobs in a pool of threads (:mod:`.workers`), hashes their bytes
(BLAKE3: SHA-256 runs at 0.36 GB/s a core on CPUs without SHA extensions, BLAKE3 at 3 to 5), and
puts them at their offsets in ``<shard>.part``.

The order of events is what makes any interruption harmless:

1. chunk bytes into ``.part``, then a line into the journal (see :mod:`.journal`);
2. a shard whose tensors are all there: fsync, rename to its final name, fsync of the folder;
3. after the last shard: the small files, each written aside and renamed, the index last;
4. the journal goes. A folder without journal and with ``v4surgery.json`` is finished.

On resume every byte that the journal claims is read and hashed again before it is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from v4surgery.checkpoint.durable import sync_dir, write_all
from v4surgery.checkpoint.job import Job, WriteResult
from v4surgery.checkpoint.journal import WORK_DIR, RunId
from v4surgery.checkpoint.layout import INDEX_FILE, ShardLayout
from v4surgery.checkpoint.shard import OPEN_FLAGS, PART, writing
from v4surgery.checkpoint.sharing import claim_together, deal_out
from v4surgery.checkpoint.workers import WriteRun
from v4surgery.distributed.team import Team, leads, meet
from v4surgery.errors import OutputError


def write_checkpoint(
    out: Path,
    shards: Sequence[ShardLayout],
    jobs: Sequence[Job],
    *,
    plan_id: str,
    weights_id: str | None = None,
    workers: int = 2,
    prepare: Callable[[], None] = lambda: None,
    extra_files: Callable[[WriteResult], Mapping[str, bytes]] = lambda _: {},
    index: bool | None = None,
    progress: Callable[[int], None] | None = None,
    cancel: Callable[[], None] | None = None,
    team: Team | None = None,
) -> WriteResult:
    """Writes all shards, then the extra files, then the index; or takes up where it was stopped.

    Args:
        out: A folder that does not exist, is empty, or holds the same plan, unfinished or finished.
        shards: From :func:`~v4surgery.checkpoint.layout.pack`.
        jobs: Between them they have every tensor of the shards as an output once.
        plan_id: Identifies the output bytes. ``extra_files`` must put it as ``plan_hash`` into
            ``v4surgery.json``: that is how a finished folder is recognised.
        weights_id: Identifies what is read, if that is known: what was begun or finished from
            others is neither continued nor taken for this.
        workers: Threads. They change the speed, not one byte of the result.
        prepare: Called once the folder is ours, before the first job, unless all is done.
        extra_files: Gets the result so far; gives basename -> content, written in that order.
        index: Whether to write an index; None: if there is more than one shard.
        progress: Called with payload bytes as they are written or found intact, by any worker, by
            one at a time.
        cancel: Called when the run has failed or was interrupted, while workers may still be in
            ``compute``, so that they need not be waited for.
        team: Ranks that write whole files each, into one folder. Every rank calls this with the
            same arguments and gets the same result; jobs' states are then those of all ranks.

    Raises:
        OutputError: The folder is not ours or in use, the disk is too small, or writing failed.
            In the last case the same call resumes.
    """
    assert workers > 0, workers
    _check_jobs(shards, jobs)
    files = tuple(shard.file for shard in shards)
    shares = deal_out(shards, jobs, team)
    unfinish = files if shares.files_are_shared else ()
    run_id = RunId(plan_id, _layout_id(shards, jobs), weights_id)
    claim = claim_together(team, out, run_id, unfinish)
    try:
        if claim.state == "complete":
            return WriteResult(out, files, already_complete=True)
        run = WriteRun(claim, shards, jobs, progress, cancel, shares, team)
        if leads(team):
            try:
                run.check_disk()
            except OutputError:
                if claim.state == "fresh":
                    claim.remove()
                raise
            with writing(out, run.kept):
                # It may not stand beside unchecked shards.
                (out / INDEX_FILE).unlink(missing_ok=True)
            prepare()
        meet(team)
        if not leads(team):
            prepare()
        run.work(workers)
        run.merge_ranks()
        result = run.result()
        extras = dict(extra_files(result))
        if index or (index is None and len(shards) > 1):
            assert INDEX_FILE not in extras, INDEX_FILE
            extras[INDEX_FILE] = _index(shards)
        meet(team)  # none has anything to object
        if leads(team):
            with writing(out, run.kept):
                _write_extras(out, extras, taken=files)
                claim.remove()
        meet(team)
        return result
    finally:
        claim.close()


def _check_jobs(shards: Sequence[ShardLayout], jobs: Sequence[Job]) -> None:
    wanted = [item for shard in shards for item in shard.tensors]
    outputs = [item for job in jobs for item in job.outputs]
    names = {item.key for item in outputs}
    assert len(wanted) == len(outputs) == len(names), "a tensor with no job, or with two"
    assert set(wanted) == set(outputs), "the jobs' outputs are not the shards' tensors"


def _layout_id(shards: Sequence[ShardLayout], jobs: Sequence[Job]) -> str:
    """Fingerprint of what a journal's job numbers and byte counts refer to."""
    hasher = blake3()
    for shard in shards:
        hasher.update(json.dumps([shard.file, len(shard.header)]).encode())
        hasher.update(shard.header)
    for job in jobs:
        hasher.update(json.dumps([job.hole, *(item.key for item in job.outputs)]).encode())
    return hasher.hexdigest()[:32]


def _index(shards: Sequence[ShardLayout]) -> bytes:
    weight_map = {item.name: shard.file for shard in shards for item in shard.tensors}
    total = sum(shard.payload_bytes for shard in shards)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write_extras(out: Path, extras: Mapping[str, bytes], taken: Sequence[str]) -> None:
    for name, content in extras.items():
        assert name == Path(name).name and name not in ("", ".", "..", WORK_DIR), name
        assert name not in taken and not name.endswith(PART), name
        part = out / (name + PART)
        fd = os.open(part, OPEN_FLAGS | os.O_TRUNC, 0o666)
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        part.replace(out / name)
        sync_dir(out)
