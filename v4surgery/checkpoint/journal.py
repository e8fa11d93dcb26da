"""Whose the output folder is, and what is already in it: the lock and the journal.

While a run is unfinished the folder holds ``.v4surgery/``::

    lock            flock'ed by the process that writes
    journal.jsonl   {"format": 1, "plan_id": ..., "layout": ...}
                    {"job": 3, "chunk": 0, "of": 2, "bytes": [8388608], "digests": ["9f..."]}
                    ...
    journal-2.jsonl the same lines without the first, of rank 2 of a run on several; the next run
                    appends them to journal.jsonl, however many ranks it has

A line is appended after a chunk's bytes were handed to the kernel, not synced: after a kill the
page cache still has both; after a power loss the line may promise bytes that the disk has not. That
is why a journal line is only a claim. Resuming hashes the bytes on disk and believes the digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from v4surgery.errors import OutputError

WORK_DIR = ".v4surgery"
PROVENANCE_FILE = "v4surgery.json"
_FORMAT = 1
_JOURNAL_FILE = "journal.jsonl"
_RANK_JOURNALS = "journal-*.jsonl"
_LOCK_FILE = "lock"

State = Literal["fresh", "unfinished", "complete"]


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """A job's progress after one of its chunks.

    Args:
        chunk: The chunk, counted from 0.
        num_chunks: How many the job had when this was written.
        num_bytes: For each output, the bytes of it that exist.
        digests: For each output, BLAKE3 of those bytes, in hex.
        state: What the job had measured by then.
    """

    chunk: int
    num_chunks: int
    num_bytes: tuple[int, ...]
    digests: tuple[str, ...]
    state: Mapping[str, Any] = field(default_factory=dict)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes everything at the file position; a plain write may stop short."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_dir(folder: Path) -> None:
    """Makes the names in a folder durable: a rename is not, until its folder is synced."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Claim:
    """The output folder, locked for this process, with its journal open for appending.

    Args:
        state: What the folder was when it was claimed. ``complete``: nothing is to be done, and
            there is no journal.
        records: The last record of every job that has one, by job index.
    """

    def __init__(
        self, out: Path, state: State, lock_fd: int | None, journal_fd: int | None
    ) -> None:
        self.out, self.state = out, state
        self.records: dict[int, ChunkRecord] = {}
        self._lock_fd, self._journal_fd = lock_fd, journal_fd
        self._append_lock = threading.Lock()

    def append(self, job: int, record: ChunkRecord) -> None:
        """Notes that a chunk of a job is written. Thread-safe; one line, one ``write``."""
        assert self._journal_fd is not None
        fields: dict[str, object] = {
            "job": job,
            "chunk": record.chunk,
            "of": record.num_chunks,
            "bytes": record.num_bytes,
            "digests": record.digests,
        }
        if record.state:
            fields["state"] = record.state
        with self._append_lock:
            write_all(self._journal_fd, _line(fields))

    def close(self) -> None:
        """Lets go of the folder and keeps the journal for the next run."""
        for fd in (self._journal_fd, self._lock_fd):
            if fd is not None:
                os.close(fd)
        self._journal_fd = self._lock_fd = None

    def remove(self) -> None:
        """Takes ``.v4surgery`` away: the run is done (or, if it was fresh, never was).

        The journal goes first, because a folder without one is a finished folder.
        """
        work = self.out / WORK_DIR
        (work / _JOURNAL_FILE).unlink(missing_ok=True)
        for path in work.glob(_RANK_JOURNALS):
            path.unlink(missing_ok=True)
        (work / _LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # someone else's file in it is not ours to delete
            work.rmdir()
        sync_dir(self.out)


def claim_folder(out: Path, plan_id: str, layout_id: str) -> Claim:
    """Locks ``out`` for one run of one plan, creating it if it does not exist.

    Args:
        out: The output folder.
        plan_id: Identifies what is to be written.
        layout_id: Identifies the shards; the same plan with other shards cannot be resumed.

    Raises:
        OutputError: The folder is someone else's, another plan's, or being written right now.
    """
    try:
        if _state(out, plan_id, layout_id) == "complete" and not (out / WORK_DIR).exists():
            return Claim(out, "complete", None, None)
        (out / WORK_DIR).mkdir(parents=True, exist_ok=True)
        lock_fd = _lock(out)
    except OSError as error:
        raise OutputError(
            f"the output folder cannot be used: {error.strerror}",
            where=out,
            hint="choose another --out",
        ) from error
    try:
        return _claim_locked(out, plan_id, layout_id, lock_fd)
    except BaseException:
        os.close(lock_fd)
        raise


def _claim_locked(out: Path, plan_id: str, layout_id: str, lock_fd: int) -> Claim:
    # Looked at again, because another process may have finished between the look and the lock.
    state = _state(out, plan_id, layout_id)
    if state == "complete":
        claim = Claim(out, state, lock_fd, None)
        claim.remove()
        return claim
    path = out / WORK_DIR / _JOURNAL_FILE
    journal_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    claim = Claim(out, state, lock_fd, journal_fd)
    try:
        if state == "fresh":
            for other in path.parent.glob(_RANK_JOURNALS):
                other.unlink()
            os.ftruncate(journal_fd, 0)
            header = {"format": _FORMAT, "plan_id": plan_id, "layout": layout_id}
            write_all(journal_fd, _line(header))
        else:
            os.ftruncate(journal_fd, _whole_lines(path))
            for other in sorted(path.parent.glob(_RANK_JOURNALS)):
                write_all(journal_fd, other.read_bytes()[: _whole_lines(other)])
                other.unlink()
            claim.records.update(_read_records(path))
    except BaseException:
        os.close(journal_fd)
        raise
    return claim


def join_claim(out: Path, rank: int, state: State, records: Mapping[int, ChunkRecord]) -> Claim:
    """What the first rank has claimed, for another rank: its own journal, and no lock.

    Raises:
        OutputError: This rank does not see the first one's folder.
    """
    if state == "complete":
        return Claim(out, state, None, None)
    work = out / WORK_DIR
    if not (work / _JOURNAL_FILE).exists():
        raise OutputError(
            f"rank {rank} does not see the output folder of the first rank",
            where=out,
            rule="all machines write into one folder, of a file system that they share",
            hint="choose such a folder with --out",
        )
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    claim = Claim(out, state, None, os.open(work / f"journal-{rank}.jsonl", flags, 0o666))
    claim.records.update(records)
    return claim


def _line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _lock(out: Path) -> int:
    path = out / WORK_DIR / _LOCK_FILE
    while True:
        path.parent.mkdir(exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that finished meanwhile has unlinked the file that we hold open.
            if _is_open_as(path, fd):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise OutputError(
                "another process is writing this output folder",
                where=out,
                hint="wait for it to end and run the same command again, or choose another --out",
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_open_as(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _state(out: Path, plan_id: str, layout_id: str) -> State:
    """What ``out`` is to this run. Raises OutputError unless it is empty or ours."""
    if not out.exists():
        return "fresh"
    journal = _read_header(out / WORK_DIR / _JOURNAL_FILE)
    if journal is not None:
        _check_header(out, journal, plan_id, layout_id)
        return "unfinished"
    others = sorted(path.name for path in out.iterdir() if path.name != WORK_DIR)
    if not others:
        return "fresh"
    finished_plan = _finished_plan(out / PROVENANCE_FILE)
    if finished_plan == plan_id:
        return "complete"
    if finished_plan is not None:
        raise OutputError(
            "the output folder holds the finished output of another plan",
            where=out,
            value=f"plan {finished_plan}",
            rule=f"empty, or of plan {plan_id}",
            hint="choose another --out",
        )
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    raise OutputError(
        "the output folder is not empty, and what is in it is not ours",
        where=out,
        value=", ".join(others[:4]) + more,
        rule="a new or empty folder, or one that the same command has begun",
        hint="choose another --out",
    )


def _check_header(out: Path, journal: dict[str, object], plan_id: str, layout_id: str) -> None:
    found = (journal.get("format"), journal.get("plan_id"), journal.get("layout"))
    if found == (_FORMAT, plan_id, layout_id):
        return
    if found[1] != plan_id:
        what, value, rule = "another plan", f"plan {found[1]}", f"plan {plan_id}"
    else:
        what, value, rule = "this plan laid out differently", f"layout {found[2]}", layout_id
    raise OutputError(
        f"the output folder holds an unfinished run of {what}",
        where=out,
        value=value,
        rule=rule,
        hint="finish it with the command that began it, delete the folder, or choose another --out",
    )


def _read_header(path: Path) -> dict[str, object] | None:
    """The first line, or None where there is no journal or not even its first line is whole."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 16)
    except FileNotFoundError:
        return None
    header = _parse(line) if line.endswith(b"\n") else None
    return header if header is not None and "plan_id" in header else None


def _finished_plan(path: Path) -> str | None:
    try:
        provenance = _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    plan = provenance.get("plan_hash") if provenance is not None else None
    return plan if isinstance(plan, str) else None


def _read_records(path: Path) -> Iterator[tuple[int, ChunkRecord]]:
    with path.open("rb") as file:
        for line in file:
            fields = _parse(line) if line.endswith(b"\n") else None
            record = _record(fields) if fields is not None else None
            if record is not None:
                yield record


def _record(fields: dict[str, object]) -> tuple[int, ChunkRecord] | None:
    match fields:
        case {
            "job": int(job),
            "chunk": int(chunk),
            "of": int(num_chunks),
            "bytes": list(num_bytes),
            "digests": list(digests),
        } if all(isinstance(n, int) for n in num_bytes):
            state = fields.get("state", {})
            if not isinstance(state, dict):
                return None
            return job, ChunkRecord(chunk, num_chunks, tuple(num_bytes), tuple(digests), state)
    return None


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _whole_lines(path: Path) -> int:
    """The journal's length without a torn last line, which must not swallow the next one."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
    return end
