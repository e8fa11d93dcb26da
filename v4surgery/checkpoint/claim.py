"""Whose an output folder is, and what is already in it: claimed for one run by a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from v4surgery.checkpoint.durable import sync_dir, write_all
from v4surgery.checkpoint.journal import (
    FORMAT,
    JOURNAL_FILE,
    RANK_JOURNALS,
    WORK_DIR,
    ChunkRecord,
    RunId,
    chunk_line,
    header_line,
    parse_object,
    read_header,
    read_records,
    whole_lines,
)
from v4surgery.checkpoint.layout import PROVENANCE_FILE
from v4surgery.errors import OutputError

_LOCK_FILE = "lock"

State = Literal["fresh", "unfinished", "complete"]


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
        with self._append_lock:
            write_all(self._journal_fd, chunk_line(job, record))

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
        (work / JOURNAL_FILE).unlink(missing_ok=True)
        for path in work.glob(RANK_JOURNALS):
            path.unlink(missing_ok=True)
        (work / _LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # someone else's file in it is not ours to delete
            work.rmdir()
        sync_dir(self.out)


def claim_folder(out: Path, run: RunId) -> Claim:
    """Locks ``out`` for one run of one plan, creating it if it does not exist.

    Raises:
        OutputError: The folder is someone else's, another plan's, or being written right now.
    """
    try:
        if _state(out, run) == "complete" and not (out / WORK_DIR).exists():
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
        return _claim_locked(out, run, lock_fd)
    except BaseException:
        os.close(lock_fd)
        raise


def _claim_locked(out: Path, run: RunId, lock_fd: int) -> Claim:
    # Looked at again, because another process may have finished between the look and the lock.
    state = _state(out, run)
    if state == "complete":
        claim = Claim(out, state, lock_fd, None)
        claim.remove()
        return claim
    path = out / WORK_DIR / JOURNAL_FILE
    journal_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    claim = Claim(out, state, lock_fd, journal_fd)
    try:
        if state == "fresh":
            for other in path.parent.glob(RANK_JOURNALS):
                other.unlink()
            os.ftruncate(journal_fd, 0)
            write_all(journal_fd, header_line(run))
        else:
            os.ftruncate(journal_fd, whole_lines(path))
            for other in sorted(path.parent.glob(RANK_JOURNALS)):
                write_all(journal_fd, other.read_bytes()[: whole_lines(other)])
                other.unlink()
            claim.records.update(read_records(path))
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
    if not (work / JOURNAL_FILE).exists():
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


def _state(out: Path, run: RunId) -> State:
    """What ``out`` is to this run. Raises OutputError unless it is empty or ours."""
    if not out.exists():
        return "fresh"
    journal = read_header(out / WORK_DIR / JOURNAL_FILE)
    if journal is not None:
        _check_header(out, journal, run)
        return "unfinished"
    others = sorted(path.name for path in out.iterdir() if path.name != WORK_DIR)
    if not others:
        return "fresh"
    finished = _finished(out / PROVENANCE_FILE)
    if finished is not None:
        plan, weights = finished
        if plan != run.plan:
            what, value, rule = "another plan", f"plan {plan}", f"empty, or of plan {run.plan}"
        elif _differ(weights, run.weights):
            what, value, rule = "other weights", f"weights {weights}", f"weights {run.weights}"
        else:
            return "complete"
        raise OutputError(
            f"the output folder holds the finished output of {what}",
            where=out,
            value=value,
            rule=rule,
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


def _check_header(out: Path, journal: dict[str, object], run: RunId) -> None:
    plan, layout, weights = (journal.get(key) for key in ("plan_id", "layout", "weights"))
    if plan != run.plan:
        what, value, rule = "another plan", f"plan {plan}", f"plan {run.plan}"
    elif (journal.get("format"), layout) != (FORMAT, run.layout):
        what, value, rule = "this plan laid out differently", f"layout {layout}", run.layout
    elif _differ(weights, run.weights):
        # The branch has moved: two commits in one replica would be neither.
        what, value, rule = "this plan on other weights", f"weights {weights}", str(run.weights)
    else:
        return
    raise OutputError(
        f"the output folder holds an unfinished run of {what}",
        where=out,
        value=value,
        rule=rule,
        hint="finish it with the command that began it, delete the folder, or choose another --out",
    )


def _differ(known: object, weights: str | None) -> bool:
    """Whether it is known that these are not the same weights."""
    return isinstance(known, str) and weights is not None and known != weights


def _finished(path: Path) -> tuple[str, object] | None:
    """The plan that a finished folder is of, and its weights if they are known."""
    try:
        provenance = parse_object(path.read_bytes()) or {}
    except FileNotFoundError:
        return None
    plan, parent = provenance.get("plan_hash"), provenance.get("parent")
    weights = parent.get("weights") if isinstance(parent, dict) else None
    return (plan, weights) if isinstance(plan, str) else None
