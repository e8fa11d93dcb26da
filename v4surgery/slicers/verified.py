"""The record that ``verify`` passed, bound to the bytes that it saw.

``verified.json`` beside the replica's files holds the BLAKE3 digest of each of them. Whoever
changes a byte afterwards, adds a file or takes one away has a replica that is not verified any
more. Not SHA-256, by which the Hub knows large files: without instructions of its own for it a
CPU needs ten times as long, and verify would wait for that more than for its own work.

::

    {"format": 1, "tool": {"name": "v4surgery", "version": "0.1.0"},
     "parent": {"name": "...", "fingerprint": "..."},
     "tensors": 283, "bytes_compared": 4770000, "rounded": 0,
     "files": {"config.json": "9f...", "model.safetensors": "51...", ...}}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.layout import INDEX_FILE, PROVENANCE_FILE
from v4surgery.checkpoint.reader import CONFIG_FILE, Checkpoint
from v4surgery.checkpoint.shard import PART
from v4surgery.checkpoint.source import Source
from v4surgery.slicers.basis_file import BASES_FILE
from v4surgery.slicers.provenance import RECIPE_FILE, read_provenance
from v4surgery.slicers.verify import Verification
from v4surgery.version import __version__

VERIFIED_FILE = "verified.json"
_FORMAT = 1
_READ_BYTES = 4 << 20


def replica_files(replica: Checkpoint) -> list[str]:
    """Basenames of what ``slice`` wrote, in the order of a listing; nothing else in the folder."""
    names = set(replica.source.list_files())
    own = {CONFIG_FILE, INDEX_FILE, RECIPE_FILE, PROVENANCE_FILE, BASES_FILE}
    own |= set(replica.companions())
    return sorted((own & names) | set(replica.files))


class FileDigests(NamedTuple):
    """Digests of a whole file, in hex; ``sha256`` is empty where it was not asked for."""

    blake3: str
    sha256: str


def hash_files(
    source: Source,
    files: Iterable[str],
    *,
    workers: int,
    sha256: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, FileDigests]:
    """Digests of whole files, each read once.

    Args:
        source: Where they are.
        files: Their names.
        workers: Threads; one for each file at most.
        sha256: Whether SHA-256 is wanted as well.
        progress: Called with bytes as they are hashed.

    Raises:
        ReadError: A file could not be read whole.
    """

    def digest(file: str) -> FileDigests:
        size, buffer = source.size(file), bytearray(_READ_BYTES)
        fast, slow = blake3(), hashlib.sha256()
        for begin in range(0, size, _READ_BYTES):
            view = memoryview(buffer)[: min(_READ_BYTES, size - begin)]
            source.read_into(file, begin, view)
            fast.update(view)
            if sha256:
                slow.update(view)
            if progress is not None:
                progress(len(view))
        return FileDigests(fast.hexdigest(), slow.hexdigest() if sha256 else "")

    names = list(files)
    with ThreadPoolExecutor(workers, "v4surgery-hash") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def record_verification(replica: Checkpoint, verdict: Verification, *, workers: int) -> Path | None:
    """Write ``verified.json`` after a whole comparison that passed; take it away after a failure.

    Returns:
        The file; None where there is none to write: the replica failed, only a sample of it was
        compared, or it lies where nothing can be written.

    Raises:
        ReadError: The replica could not be read again, or changed since it was opened.
    """
    source = replica.source
    if not isinstance(source, LocalFolder):
        return None
    path = source.path / VERIFIED_FILE
    with contextlib.suppress(OSError):
        if not verdict.passed:
            path.unlink(missing_ok=True)
        elif not verdict.sampled:
            digests = hash_files(source, replica_files(replica), workers=workers)
            record = _record(replica, verdict, digests)
            source.check_unchanged()
            part = path.with_name(path.name + PART)
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)  # noqa: PTH105 - follows no link that stands at the target
            return path
    return None


def read_verified(replica: Checkpoint) -> dict[str, Any] | None:
    """The record of a replica; None if there is none, or none that can be read."""
    if VERIFIED_FILE not in replica.source.list_files():
        return None
    try:
        record = json.loads(replica.read_file(VERIFIED_FILE))
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("files"), dict):
        return record if record.get("format") == _FORMAT else None
    return None


def unverified(replica: Checkpoint, digests: Mapping[str, FileDigests]) -> str | None:
    """Why a replica with these digests does not count as verified; None if it does.

    Args:
        replica: An opened replica.
        digests: From :func:`hash_files`, of its :func:`replica_files`.
    """
    record = read_verified(replica)
    if record is None:
        return "verify has not passed on it"
    recorded = record["files"]
    for name in sorted(recorded.keys() | digests.keys()):
        if name not in digests:
            return f"{name} is missing since verify passed"
        if name not in recorded:
            return f"{name} was added since verify passed"
        if recorded[name] != digests[name].blake3:
            return f"{name} changed since verify passed"
    return None


def _record(
    replica: Checkpoint, verdict: Verification, digests: Mapping[str, FileDigests]
) -> dict[str, Any]:
    parent = read_provenance(replica)["parent"]
    return {
        "format": _FORMAT,
        "tool": {"name": "v4surgery", "version": __version__},
        "parent": {"name": parent["name"], "fingerprint": parent["fingerprint"]},
        "tensors": verdict.tensors,
        "bytes_compared": verdict.bytes_compared,
        "rounded": len(verdict.rounded),
        "files": {name: found.blake3 for name, found in digests.items()},
    }
