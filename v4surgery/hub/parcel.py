"""What a push sends: the replica's own files and its card, hashed, and fit to be sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.journal import WORK_DIR
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError, VerificationFailed
from v4surgery.hub.card import VALIDATION_FILE, card_of, is_empty
from v4surgery.redact import refuse_token
from v4surgery.slicers.lineage import CARD_FILE
from v4surgery.slicers.verified import (
    VERIFIED_FILE,
    hash_files,
    read_verified,
    replica_files,
    unverified,
)

_READ_BYTES = 4 << 20
_TEXTS = (".json", ".jinja", ".md", ".txt", ".yaml")


@dataclass(frozen=True)
class Item:
    """A file to send: a path, or for the card its bytes; ``sha256`` in hex."""

    name: str
    size: int
    sha256: str
    content: Path | bytes = field(repr=False)

    def git_sha1(self) -> str:
        """What git calls these bytes. The whole file is read."""
        hasher = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        if isinstance(self.content, bytes):
            hasher.update(self.content)
        else:
            with self.content.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    hasher.update(piece)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Parcel:
    """Everything of a replica that a push sends.

    Attributes:
        replica: Where it was read from.
        items: The files, by name.
        left_out: Names of what else lies in the folder.
        unverified: Why it does not count as verified, where that was let pass.
    """

    replica: Checkpoint
    items: tuple[Item, ...]
    left_out: tuple[str, ...]
    unverified: str | None


def pack_replica(
    replica: Checkpoint,
    repo_id: str,
    *,
    force: bool = False,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Parcel:
    """Collect and hash what is to be sent; nothing is written.

    Args:
        replica: A replica on disk.
        repo_id: Where it will live; the card names it.
        force: Let pass that verify has not.
        workers: Threads that hash.
        progress: Called with bytes as they are hashed.

    Raises:
        UsageError: It may not be sent: not on disk, unfinished, not verified, no card, or with a
            token in one of its texts.
        VerificationFailed: It is not, byte for byte, what verify passed on.
        CheckpointError: It is no replica, or it cannot be read.
    """
    folder = _folder_of(replica)
    card = card_of(replica, repo_id)
    if is_empty(card):
        raise UsageError(
            "the card is empty",
            where=folder / CARD_FILE,
            rule="a README.md that says what this is",
            hint="write it, or delete the file: push makes one",
        )
    names = replica_files(replica)
    reports = [name for name in (VERIFIED_FILE, VALIDATION_FILE) if name in _listed(replica)]
    refuse_token(card, where=folder / CARD_FILE)
    for name in (*names, *reports):
        if name.endswith(_TEXTS):
            refuse_token(replica.read_file(name).decode(errors="replace"), where=folder / name)
    digests = hash_files(replica.source, names, workers=workers, sha256=True, progress=progress)
    reason = unverified(replica, digests)
    if reason is not None and not force:
        raise _not_verified(replica, folder, reason)
    digests |= hash_files(replica.source, reports, workers=workers, sha256=True)
    items = [
        Item(name, replica.source.size(name), found.sha256, folder / name)
        for name, found in digests.items()
    ]
    text = card.encode()
    items.append(Item(CARD_FILE, len(text), hashlib.sha256(text).hexdigest(), text))
    return Parcel(
        replica,
        tuple(sorted(items, key=lambda item: item.name)),
        tuple(sorted(_listed(replica) - {item.name for item in items})),
        reason,
    )


def _listed(replica: Checkpoint) -> set[str]:
    return set(replica.source.list_files())


def _folder_of(replica: Checkpoint) -> Path:
    source = replica.source
    if not isinstance(source, LocalFolder):
        raise UsageError(
            "only a replica on disk can be pushed",
            where=source.name,
            hint="give the folder that `v4surgery slice` wrote",
        )
    if (source.path / WORK_DIR).exists():
        raise UsageError(
            "the replica is unfinished",
            where=source.path,
            hint="finish it with the slice command that began it",
        )
    return source.path


def _not_verified(
    replica: Checkpoint, folder: Path, reason: str
) -> UsageError | VerificationFailed:
    error = UsageError if read_verified(replica) is None else VerificationFailed
    return error(
        f"the replica is not verified: {reason}",
        where=folder,
        rule="a push sends what verify, against the whole parent, has passed on",
        hint=f"v4surgery verify {folder} --parent PARENT; or push with --force",
    )


__all__ = ["Item", "Parcel", "pack_replica"]
