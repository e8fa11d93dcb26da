"""Workers that carry out jobs: one run over all of them, from what the journal has to whole shards.

Each worker computes a chunk, puts it at its place, hashes it and journals it; shards whose tensors
are all there are synced and renamed by a thread of their own.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, cast

from v4surgery.checkpoint.claim import Claim
from v4surgery.checkpoint.job import Job, WriteResult
from v4surgery.checkpoint.journal import WORK_DIR, ChunkRecord
from v4surgery.checkpoint.layout import ShardLayout
from v4surgery.checkpoint.schedule import Schedule
from v4surgery.checkpoint.shard import OutputFile, ShardFile, writing
from v4surgery.checkpoint.sharing import Shares
from v4surgery.errors import OutputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from v4surgery.distributed.team import Team

_CHECK_BYTES = 4 << 20
# Shards that wait for their fsync hold a file descriptor each.
_MAX_UNSYNCED_SHARDS = 8


class WriteRun:
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

    def _schedule(self) -> Schedule:
        """The jobs by shard and place, so that shards complete in turn and few files are open."""
        rank = {shard.layout.file: number for number, shard in enumerate(self.shards)}
        places = []
        for number in self.own:
            job = self.jobs[number]
            if job.outputs and not job.hole:
                found = (self.place[item.key] for item in job.outputs)
                first = min((rank[shard.layout.file], offset) for shard, offset in found)
                places.append((*first, number))
        return Schedule(sorted(places))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._stop.set()
        if self.cancel is not None:
            self.cancel()

    def _worker(self, schedule: Schedule, syncer: ThreadPoolExecutor) -> None:
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
