"""Writing a checkpoint: many workers, bounded memory, atomic files, and a run that resumes.

A :class:`Job` computes one or a few output tensors chunk by chunk; :func:`write_checkpoint` runs
jobs in a pool of threads, hashes their bytes (BLAKE3: SHA-256 runs at 0.36 GB/s a core on CPUs
without SHA extensions, BLAKE3 at 3 to 5), and puts them at their offsets in ``<shard>.part``.

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
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from blake3 import blake3

from v4surgery.checkpoint.journal import (
    WORK_DIR,
    ChunkRecord,
    Claim,
    sync_dir,
    write_all,
)
from v4surgery.checkpoint.layout import INDEX_FILE, OutputTensor, ShardLayout
from v4surgery.checkpoint.shard import OPEN_FLAGS, PART, OutputFile, ShardFile, writing
from v4surgery.checkpoint.sharing import Shares, claim_together, deal_out
from v4surgery.errors import OutputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from v4surgery.distributed.team import Team

_CHECK_BYTES = 4 << 20
# Shards that wait for their fsync hold a file descriptor each.
_MAX_UNSYNCED_SHARDS = 8


class Job(Protocol):
    """A unit of work that yields one or more whole output tensors, such as a weight and its scale.

    ``compute(chunk)`` is called with 0, 1, ... ``num_chunks - 1`` by one thread at a time, after
    an interruption with the first chunk that is missing. For each output it returns the next
    consecutive bytes (a C-contiguous array or any buffer; None or an empty one for nothing). The
    buffers may be overwritten by the next call. What it raises ends the run and is passed on.

    ``state`` holds what the job measures on the way, as plain JSON data. It is journaled with each
    chunk and put back before a job goes on, so that a resumed run reports what one run would.

    With ``hole`` nothing is computed: the payloads stay holes of a sparse file and get no digest.
    """

    @property
    def outputs(self) -> tuple[OutputTensor, ...]: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def hole(self) -> bool: ...
    @property
    def state(self) -> dict[str, Any]: ...
    def compute(self, chunk: int, /) -> Sequence[Buffer | NDArray[Any] | None]: ...


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a run wrote.

    Args:
        out: The folder.
        files: The shards, in order.
        digests: BLAKE3 in hex by the tensors' keys, in file order, for all that are not holes.
        payload_bytes: Of all tensors, holes included: the index's ``total_size``.
        hole_bytes: The part of it that takes no disk.
        bytes_written: Payload bytes written by this run.
        bytes_reused: Payload bytes found intact from an earlier run.
        chunks_computed: Chunks computed by this run.
        chunks_reused: Chunks that an earlier run had computed.
        already_complete: An earlier run had finished; this one touched nothing, and the other
            fields but ``out`` and ``files`` are empty.
    """

    out: Path
    files: tuple[str, ...]
    digests: Mapping[str, str] = field(default_factory=dict)
    payload_bytes: int = 0
    hole_bytes: int = 0
    bytes_written: int = 0
    bytes_reused: int = 0
    chunks_computed: int = 0
    chunks_reused: int = 0
    already_complete: bool = False


def write_checkpoint(
    out: Path,
    shards: Sequence[ShardLayout],
    jobs: Sequence[Job],
    *,
    plan_id: str,
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
    is_first = team is None or team.is_first
    shares = deal_out(shards, jobs, team)
    unfinish = files if shares.files_are_shared else ()
    claim = claim_together(team, out, plan_id, _layout_id(shards, jobs), unfinish)
    try:
        if claim.state == "complete":
            return WriteResult(out, files, already_complete=True)
        run = _Run(claim, shards, jobs, progress, cancel, shares, team)
        if is_first:
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
        if team is not None:
            team.gather(None)
        if not is_first:
            prepare()
        run.work(workers)
        run.merge_ranks()
        result = run.result()
        extras = dict(extra_files(result))
        if index or (index is None and len(shards) > 1):
            assert INDEX_FILE not in extras, INDEX_FILE
            extras[INDEX_FILE] = _index(shards)
        if team is not None:
            team.gather(None)  # none has anything to object
        if is_first:
            with writing(out, run.kept):
                _write_extras(out, extras, taken=files)
                claim.remove()
        if team is not None:
            team.gather(None)
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


class _Schedule:
    """Which job a worker does next: its own shard's, then a fresh shard's, then anyone's.

    The kernel lets one thread at a time write into a file, so workers on shards of their own write
    side by side where two on one shard would wait for each other.

    Args:
        places: Shard number, offset and job number of each job, sorted.
    """

    def __init__(self, places: Sequence[tuple[int, int, int]]) -> None:
        self._fresh: dict[int, deque[int]] = {}
        for shard, _, job in places:
            self._fresh.setdefault(shard, deque()).append(job)
        self._claimed: dict[int, deque[int]] = {}
        self._own = threading.local()

    def next_job(self) -> int | None:
        """The next job of the calling thread; the caller holds the lock."""
        queue: deque[int] | None = getattr(self._own, "queue", None)
        if not queue:
            queue = self._claim()
            self._own.queue = queue
        return queue.popleft() if queue else None

    def _claim(self) -> deque[int] | None:
        if self._fresh:
            shard = next(iter(self._fresh))
            self._claimed[shard] = self._fresh.pop(shard)
            return self._claimed[shard]
        return max(self._claimed.values(), key=len, default=None)


class _Run:
    """One run over all jobs: the shared state of the workers."""

    def __init__(
        self,
        claim: Claim,
        shards: Sequence[ShardLayout],
        jobs: Sequence[Job],
        progress: Callable[[int], None] | None,
        cancel: Callable[[], None] | None,
        shares: Shares,
        team: Team | None,
    ) -> None:
        self.claim, self.jobs, self.progress, self.cancel = claim, jobs, progress, cancel
        self.shares, self.team = shares, team
        rank = 0 if team is None else team.rank
        self.own = [number for number, owner in enumerate(shares.owners) if owner == rank]
        self.shards = [ShardFile(claim.out, layout) for layout in shards]
        self.place = {
            item.key: (shard, offset)
            for shard in self.shards
            for item, offset in zip(shard.layout.tensors, shard.layout.offsets, strict=True)
        }
        own_shards: dict[str, ShardFile] = {}
        for number in self.own:
            for item in jobs[number].outputs:
                shard = self.place[item.key][0]
                own_shards[shard.layout.file] = shard
                shard.missing += not jobs[number].hole
        self.own_shards = list(own_shards.values())
        self.hole_bytes = sum(item.nbytes for job in jobs if job.hole for item in job.outputs)
        self.digests: dict[str, str] = {}
        self.bytes_written = self.bytes_reused = 0
        self.chunks_computed = self.chunks_reused = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._unsynced = threading.BoundedSemaphore(_MAX_UNSYNCED_SHARDS)

    def check_disk(self) -> None:
        """Raises OutputError unless what is still to be written fits on the disk."""
        holes = {item.key for job in self.jobs if job.hole for item in job.outputs}
        needed = 0
        for shard in self.shards:
            written = (item.nbytes for item in shard.layout.tensors if item.key not in holes)
            total = len(shard.layout.header) + sum(written)
            needed += max(0, total - shard.disk_bytes())
        needed += needed // 100
        free = shutil.disk_usage(self.claim.out).free
        if needed > free:
            raise OutputError(
                "the disk is too small for what is still to be written",
                where=self.claim.out,
                value=f"{free:,} bytes free",
                rule=f"{needed:,} bytes needed (1 % margin included)",
                hint="free some space, or choose another --out",
            )

    def kept(self) -> str:
        num_bytes = sum(shard.disk_bytes() for shard in self.shards)
        return f"{num_bytes:,} bytes are kept in {self.claim.out}"

    def result(self) -> WriteResult:
        layouts = [shard.layout for shard in self.shards]
        names = [item.key for layout in layouts for item in layout.tensors]
        return WriteResult(
            out=self.claim.out,
            files=tuple(layout.file for layout in layouts),
            digests={name: self.digests[name] for name in names if name in self.digests},
            payload_bytes=sum(layout.payload_bytes for layout in layouts),
            hole_bytes=self.hole_bytes,
            bytes_written=self.bytes_written,
            bytes_reused=self.bytes_reused,
            chunks_computed=self.chunks_computed,
            chunks_reused=self.chunks_reused,
        )

    def work(self, workers: int) -> None:
        """Runs all jobs and finishes all shards. The first error stops the rest and is raised."""
        schedule = self._schedule()
        with (
            ThreadPoolExecutor(1, "v4surgery-sync") as syncer,
            ThreadPoolExecutor(workers, "v4surgery-write") as pool,
        ):
            try:
                whole = [shard for shard in self.own_shards if not shard.missing]
                self._finish_later(whole, syncer)
                wait([pool.submit(self._worker, schedule, syncer) for _ in range(workers)])
            except BaseException as error:
                self._fail(error)
        for shard in self.shards:
            shard.close()
        if self._error is not None:
            raise self._error

    def merge_ranks(self) -> None:
        """Put together what all ranks did: every rank then knows the whole."""
        if self.team is None:
            return
        states = {number: self.jobs[number].state for number in self.own}
        counts = (
            *(self.bytes_written, self.bytes_reused),
            *(self.chunks_computed, self.chunks_reused),
        )
        parts = self.team.gather((self.digests, states, counts))
        for digests, theirs, _ in parts:
            self.digests |= digests
            for number, state in theirs.items():
                self.jobs[number].state.update(state)
        sums = (sum(column) for column in zip(*(part[2] for part in parts), strict=True))
        self.bytes_written, self.bytes_reused, self.chunks_computed, self.chunks_reused = sums
        if self.shares.files_are_shared and self.team.is_first:
            for shard in self.shards:
                with writing(shard.path, self.kept):
                    shard.finish()
                shard.close()

    def _schedule(self) -> _Schedule:
        """The jobs by shard and place, so that shards complete in turn and few files are open."""
        rank = {shard.layout.file: number for number, shard in enumerate(self.shards)}
        places = []
        for number in self.own:
            job = self.jobs[number]
            if job.outputs and not job.hole:
                found = (self.place[item.key] for item in job.outputs)
                first = min((rank[shard.layout.file], offset) for shard, offset in found)
                places.append((*first, number))
        return _Schedule(sorted(places))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._stop.set()
        if self.cancel is not None:
            self.cancel()

    def _worker(self, schedule: _Schedule, syncer: ThreadPoolExecutor) -> None:
        buffer = bytearray(_CHECK_BYTES if self.claim.records else 0)
        try:
            while not self._stop.is_set():
                with self._lock:
                    number = schedule.next_job()
                if number is None:
                    return
                self._run_job(number, buffer, syncer)
        except BaseException as error:
            self._fail(error)

    def _run_job(self, number: int, buffer: bytearray, syncer: ThreadPoolExecutor) -> None:
        job = self.jobs[number]
        outputs, first = self._resumed(number, buffer)
        is_whole = self._run_chunks(number, outputs, first)
        if not is_whole and first > 0:
            # Cut elsewhere than in the run that began it: another chunk size, as many chunks.
            outputs = self._outputs(job)
            job.state.clear()
            is_whole = self._run_chunks(number, outputs, 0)
        if self._stop.is_set():
            return
        assert is_whole, f"the chunks of {job.outputs[0].name} do not add up to its bytes"
        whole_shards = []
        with self._lock:
            for output in outputs:
                self.digests[output.tensor.key] = output.hasher.hexdigest()
                output.shard.missing -= 1
                if output.shard.missing == 0:
                    whole_shards.append(output.shard)
        self._finish_later(whole_shards, syncer)

    def _outputs(self, job: Job) -> list[OutputFile]:
        return [OutputFile(item, *self.place[item.key]) for item in job.outputs]

    def _resumed(self, number: int, buffer: bytearray) -> tuple[list[OutputFile], int]:
        """The outputs as the journal has them, if the disk agrees, and the first chunk to do."""
        job, record = self.jobs[number], self.claim.records.get(number)
        outputs = self._outputs(job)
        lengths = {len(record.num_bytes), len(record.digests)} if record is not None else set()
        if record is None or lengths != {len(outputs)}:
            return outputs, 0
        claims = list(zip(outputs, record.num_bytes, record.digests, strict=True))
        if all(output.tensor.nbytes == num_bytes for output, num_bytes, _ in claims):
            first = job.num_chunks  # finished, however it was cut into chunks
        elif record.num_chunks == job.num_chunks and 0 <= record.chunk < job.num_chunks:
            first = record.chunk + 1
        else:
            return outputs, 0
        for output, num_bytes, digest in claims:
            with writing(output.shard.path, self.kept):
                if not output.reload(num_bytes, digest, buffer):
                    return self._outputs(job), 0
        job.state.update(record.state)
        with self._lock:
            self.chunks_reused += first
            self.bytes_reused += sum(record.num_bytes)
            self._report(sum(record.num_bytes))
        return outputs, first

    def _run_chunks(self, number: int, outputs: Sequence[OutputFile], first: int) -> bool:
        """Computes and writes the chunks from ``first`` on; whether the outputs are then whole."""
        job = self.jobs[number]
        for chunk in range(first, job.num_chunks):
            if self._stop.is_set() or not self._run_chunk(job, chunk, outputs):
                return False
            record = ChunkRecord(
                chunk,
                job.num_chunks,
                tuple(output.num_bytes for output in outputs),
                tuple(output.hasher.hexdigest() for output in outputs),
                job.state,
            )
            with writing(self.claim.out / WORK_DIR, self.kept):
                self.claim.append(number, record)
        return all(output.num_bytes == output.tensor.nbytes for output in outputs)

    def _run_chunk(self, job: Job, chunk: int, outputs: Sequence[OutputFile]) -> bool:
        num_bytes = 0
        for output, content in zip(outputs, job.compute(chunk), strict=True):
            # numpy declares its arrays to be buffers from Python 3.12 on only.
            view = memoryview(cast("Buffer", content) if content is not None else b"")
            if view.nbytes == 0:  # cast() refuses these
                continue
            if output.num_bytes + view.nbytes > output.tensor.nbytes:
                return False
            with writing(output.shard.path, self.kept):
                output.append(view.cast("B"))
            num_bytes += view.nbytes
        with self._lock:
            self.chunks_computed += 1
            self.bytes_written += num_bytes
            self._report(num_bytes)
        return True

    def _report(self, num_bytes: int) -> None:
        if self.progress is not None and num_bytes:
            self.progress(num_bytes * len(self.jobs) // len(self.own))  # a sample of all ranks

    def _finish_later(self, shards: Sequence[ShardFile], syncer: ThreadPoolExecutor) -> None:
        for shard in () if self.shares.files_are_shared else shards:
            self._unsynced.acquire()
            syncer.submit(self._finish, shard)

    def _finish(self, shard: ShardFile) -> None:
        try:
            if not self._stop.is_set():
                with writing(shard.path, self.kept):
                    shard.finish()
        except BaseException as error:
            self._fail(error)
        finally:
            shard.close()
            self._unsynced.release()
