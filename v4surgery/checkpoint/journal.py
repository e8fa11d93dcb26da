"""The journal of an output folder: what an unfinished run has written so far.

While a run is unfinished the folder holds ``.v4surgery/``::

    lock            flock'ed by the process that writes
    journal.jsonl   {"format": 1, "plan_id": ..., "layout": ..., "weights": ...}
                    {"job": 3, "chunk": 0, "of": 2, "bytes": [8388608], "digests": ["9f..."]}
                    ...
    journal-2.jsonl the same lines without the first, of rank 2 of a run on several; the next run
                    appends them to journal.jsonl, however many ranks it has

A line is appended after a chunk's bytes were handed to the kernel, not synced: after a kill the
page cache still has both; after a power loss the line may promise bytes that the disk has not. That
is why a journal line is only a claim. Resuming hashes the bytes on disk and believes the digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORK_DIR = ".v4surgery"
JOURNAL_FILE = "journal.jsonl"
RANK_JOURNALS = "journal-*.jsonl"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunId:
    """What an output folder is written for.

    Attributes:
        plan: Identifies what is to be written.
        layout: Identifies the shards; the same plan with other shards cannot be resumed.
        weights: Identifies what is read, or None where only reading would tell it.
    """

    plan: str
    layout: str
    weights: str | None = None


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


def header_line(run: RunId) -> bytes:
    """The first line, which says what the others are about."""
    fields = {"format": FORMAT, "plan_id": run.plan, "layout": run.layout, "weights": run.weights}
    return _line(fields)


def chunk_line(job: int, record: ChunkRecord) -> bytes:
    """The line that says that a chunk of a job is written."""
    fields: dict[str, object] = {
        "job": job,
        "chunk": record.chunk,
        "of": record.num_chunks,
        "bytes": record.num_bytes,
        "digests": record.digests,
    }
    if record.state:
        fields["state"] = record.state
    return _line(fields)


def _line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def read_header(path: Path) -> dict[str, object] | None:
    """The first line, or None where there is no journal or not even its first line is whole."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 16)
    except FileNotFoundError:
        return None
    header = parse_object(line) if line.endswith(b"\n") else None
    return header if header is not None and "plan_id" in header else None


def read_records(path: Path) -> Iterator[tuple[int, ChunkRecord]]:
    """Job and record of every line that is whole and says one."""
    with path.open("rb") as file:
        for line in file:
            fields = parse_object(line) if line.endswith(b"\n") else None
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


def parse_object(line: bytes) -> dict[str, object] | None:
    """A JSON object, or None where it is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def whole_lines(path: Path) -> int:
    """The journal's length without a torn last line, which must not swallow the next one."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
    return end
