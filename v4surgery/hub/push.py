"""Pushing a replica: what would be sent, and sending it.

:func:`plan_push` compares the replica with what the Hub has, and changes nothing on either side.
:func:`push` carries the plan out: shards first, one after another, so that a push which is killed
goes on after the last one that is whole; then one commit, or one pull request, with everything
else in it. It stands on the commit that the plan saw: what someone else changes meanwhile is not
overwritten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationDelete

from v4surgery.checkpoint.layout import INDEX_FILE, PROVENANCE_FILE
from v4surgery.checkpoint.shard import PART
from v4surgery.errors import HubError, OutputError, UsageError
from v4surgery.hub.card import is_generated
from v4surgery.hub.client import Committed, Hub, Remote, RemoteFile, adding
from v4surgery.hub.parcel import Item, Parcel
from v4surgery.redact import refuse_token
from v4surgery.slicers.lineage import CARD_FILE
from v4surgery.slicers.provenance import read_provenance

SAME, NEW, CHANGED = "same", "new", "changed"
SHARD = ".safetensors"
_WEIGHTS = (SHARD, ".bin", ".pt", ".pth", ".gguf")
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Destination:
    """Where a push goes, and how.

    Attributes:
        repo_id: ``org/name``.
        revision: Branch, or git reference of a pull request, to commit to.
        create: Make the repository, or the branch, if it is not there.
        private: Visibility of a repository that is made; one that is there keeps its own.
        create_pr: Open a pull request against the revision instead.
        message: First line of the commit; None: one that names recipe and parent.
    """

    repo_id: str
    revision: str = "main"
    create: bool = False
    private: bool = True
    create_pr: bool = False
    message: str | None = None

    def __post_init__(self) -> None:
        refuse_token(f"{self.repo_id}@{self.revision}", where="REPO_ID, or --revision")
        refuse_token(self.message, where="--commit-message")
        if not _REPO_ID.fullmatch(self.repo_id) or ".." in self.repo_id or "--" in self.repo_id:
            raise UsageError(
                "not the name of a repository",
                where="REPO_ID",
                value=self.repo_id,
                rule="ORG/NAME or USER/NAME, of letters, digits, '-', '_', '.'",
            )


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        parcel: What is sent.
        destination: Where to.
        head: The commit that it goes on; None where repository or branch are yet to be made.
        creates: What is made first: "repository", "branch" or None.
        private: Whether the repository is private, or will be.
        changes: For every file, whether the Hub lacks it (new), has another (changed) or this
            one (same).
        deletes: Weights and index of an earlier replica, which readers would take for this one's.
        pull_request: An open pull request that holds just this already.
        message: First line of the commit.
        description: The rest of it.
    """

    parcel: Parcel
    destination: Destination
    head: str | None
    creates: str | None
    private: bool
    changes: Mapping[str, str]
    deletes: tuple[str, ...]
    pull_request: str | None
    message: str
    description: str

    @property
    def to_send(self) -> tuple[Item, ...]:
        return tuple(item for item in self.parcel.items if self.changes[item.name] != SAME)

    @property
    def is_done(self) -> bool:
        """Whether the Hub has it all."""
        return self.pull_request is not None or not (self.to_send or self.deletes)


def plan_push(parcel: Parcel, to: Destination, hub: Hub, *, force: bool = False) -> PushPlan:
    """Compare a replica with what the Hub has. Nothing is written, here or there.

    Args:
        parcel: From :func:`v4surgery.hub.parcel.pack_replica`.
        to: Where it is to go.
        hub: The Hub, with a token.
        force: Also over a model that is no replica.

    Raises:
        UsageError: The repository holds another model.
        HubError: The Hub refused or failed, or there is no such repository.
    """
    remote, creates = _find(hub, to)
    files = remote.files if remote is not None else {}
    _check_foreign(files, f"{hub.endpoint}/{to.repo_id}", force)
    changes, deletes = _compare(parcel, files)
    record = read_provenance(parcel.replica)
    plan = PushPlan(
        parcel=parcel,
        destination=to,
        head=remote.head if remote is not None and creates is None else None,
        creates=creates,
        private=to.private if remote is None else remote.private,
        changes=changes,
        deletes=deletes,
        pull_request=None,
        message=to.message or f"Replica {record['recipe']} of {record['parent']['name']}",
        description=f"Made by v4surgery {record['tool']['version']}, plan {record['plan_hash']}.",
    )
    if to.create_pr and remote is not None and not plan.is_done:
        return replace(plan, pull_request=_same_pull_request(parcel, to, hub))
    return plan


def push(plan: PushPlan, hub: Hub) -> Committed | None:
    """Carry out a plan; the same push again resumes, or finds it done.

    Returns:
        The commit; None where the Hub has it all.

    Raises:
        HubError: The Hub refused or failed. What is up stays up.
        ReadError: The replica changed meanwhile.
        OutputError: The card could not be written beside the replica.
    """
    if plan.is_done:
        return None
    to, head = plan.destination, plan.head
    if plan.creates == "repository":
        hub.create(to.repo_id, private=plan.private)
    elif plan.creates == "branch":
        hub.create_branch(to.repo_id, to.revision)
    if head is None:
        head = _made_head(hub, to)
    operations = {item.name: adding(item.name, item.content, item.sha256) for item in plan.to_send}
    for name, operation in operations.items():
        if name.endswith(SHARD):
            hub.upload(to.repo_id, operation, revision=to.revision, create_pr=to.create_pr)
    plan.parcel.replica.source.check_unchanged()
    deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.deletes]
    committed = hub.commit(
        to.repo_id,
        [*operations.values(), *deletions],
        revision=to.revision,
        create_pr=to.create_pr,
        message=plan.message,
        description=plan.description,
        parent=head,
        find_made=lambda: _find_made(plan, hub),
    )
    _keep_card(plan)
    return committed


def summarize_push(plan: PushPlan, endpoint: str) -> dict[str, Any]:
    """A plan as plain data, for JSON and for tables."""
    to = plan.destination
    return {
        "repository": f"{endpoint}/{to.repo_id}",
        "revision": to.revision,
        "creates": plan.creates,
        "private": plan.private,
        "create_pr": to.create_pr,
        "pull_request": plan.pull_request,
        "parent_commit": plan.head,
        "message": plan.message,
        "done": plan.is_done,
        "files": [
            {
                "name": item.name,
                "bytes": item.size,
                "sha256": item.sha256,
                "change": plan.changes[item.name],
            }
            for item in plan.parcel.items
        ],
        "deletes": list(plan.deletes),
        "left_out": list(plan.parcel.left_out),
        "bytes_to_send": 0 if plan.is_done else sum(item.size for item in plan.to_send),
        "unverified": plan.parcel.unverified,
    }


def _find(hub: Hub, to: Destination) -> tuple[Remote | None, str | None]:
    """The revision that the commit goes on, and what has to be made first."""
    is_branch = not to.revision.startswith("refs/")
    if to.create and is_branch and not hub.has_revision(to.repo_id, to.revision):
        return hub.remote(to.repo_id, "main"), "branch"
    remote = hub.remote(to.repo_id, to.revision)
    if remote is not None:
        return remote, None
    if to.create:
        if to.revision != "main":
            raise UsageError(
                "a new repository has a main branch only",
                where="--revision",
                value=to.revision,
                hint="push to main first",
            )
        return None, "repository"
    raise HubError(
        "there is no such repository, or it is not yours to see",
        where=f"{hub.endpoint}/{to.repo_id}",
        hint="check REPO_ID and the token; --create makes it",
    )


def _check_foreign(files: Mapping[str, RemoteFile], where: str, force: bool) -> None:
    weights = sorted(name for name in files if name.endswith(_WEIGHTS))
    if weights and PROVENANCE_FILE not in files and not force:
        raise UsageError(
            "the repository holds a model that is no replica",
            where=where,
            value=", ".join(weights[:3]),
            rule="an empty repository, or one with an earlier replica",
            hint="choose another REPO_ID; --force puts the replica in the model's place",
        )


def _compare(
    parcel: Parcel, files: Mapping[str, RemoteFile]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """How each file stands to what is there, and what is there and may not stay."""
    changes = {}
    for item in parcel.items:
        there = files.get(item.name)
        changes[item.name] = NEW if there is None else SAME if _is_same(item, there) else CHANGED
    stale = [name for name in files if name.endswith(SHARD) or name == INDEX_FILE]
    return changes, tuple(sorted(set(stale) - changes.keys()))


def _is_same(item: Item, there: RemoteFile) -> bool:
    if item.size != there.size:
        return False
    if there.sha256 is not None:
        return item.sha256 == there.sha256
    return item.git_sha1() == there.git_sha1


def _same_pull_request(parcel: Parcel, to: Destination, hub: Hub) -> str | None:
    return next(
        (
            reference
            for reference in hub.open_pull_requests(to.repo_id)
            if _holds(parcel, hub.remote(to.repo_id, reference))
        ),
        None,
    )


def _holds(parcel: Parcel, remote: Remote | None) -> bool:
    if remote is None:
        return False
    changes, deletes = _compare(parcel, remote.files)
    return not deletes and set(changes.values()) == {SAME}


def _find_made(plan: PushPlan, hub: Hub) -> Committed | None:
    """The commit whose answer was lost, if it was made."""
    to, url = plan.destination, f"{hub.endpoint}/{plan.destination.repo_id}"
    reference = _same_pull_request(plan.parcel, to, hub) if to.create_pr else to.revision
    remote = hub.remote(to.repo_id, reference) if reference is not None else None
    if reference is None or remote is None or not _holds(plan.parcel, remote):
        return None
    number = reference.rpartition("/")[2]
    discussion = f"{url}/discussions/{number}" if to.create_pr else None
    return Committed(remote.head, f"{url}/commit/{remote.head}", discussion)


def _made_head(hub: Hub, to: Destination) -> str:
    remote = hub.remote(to.repo_id, to.revision)
    if remote is None:
        raise HubError(
            "the repository is there, but not for this token",
            where=f"{hub.endpoint}/{to.repo_id}",
            hint="ask its owner, or choose another REPO_ID",
        )
    return remote.head


def _keep_card(plan: PushPlan) -> None:
    """README.md beside the replica as it was pushed, unless its owner wrote it."""
    card = next(item for item in plan.parcel.items if item.name == CARD_FILE)
    config = next(item for item in plan.parcel.items if isinstance(item.content, Path))
    assert isinstance(card.content, bytes) and isinstance(config.content, Path)
    if not is_generated(card.content.decode()):
        return
    path = config.content.with_name(CARD_FILE)
    part = path.with_name(CARD_FILE + PART)
    try:
        part.write_bytes(card.content)
        os.replace(part, path)  # noqa: PTH105 - as in slicers/verified.py
    except OSError as error:
        raise OutputError(
            f"pushed, but the card could not be written: {error.strerror}", where=path
        ) from error


__all__ = ["Destination", "PushPlan", "plan_push", "push", "summarize_push"]
