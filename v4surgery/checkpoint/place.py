"""Where a checkpoint is: a folder here, a parent in the box, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.source import Source
from v4surgery.errors import CheckpointError, UsageError
from v4surgery.parents import parent_folder
from v4surgery.redact import refuse_token

# How the Hub writes a repository, and the project a revision of it.
_REPOSITORY = re.compile(r"(?P<repo>(?P<org>\w[\w.-]*)/\w[\w.-]*)(?:@(?P<revision>[^@]+))?")


def open_source(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    workers: int | None = None,
) -> Source:
    """The files of a folder, of a parent in the box, or of a repository at one commit.

    What is there as a folder is one. Otherwise ``org/name`` is a repository, unless there is a
    folder ``org`` here, in which ``name`` must be a typing error: a revision settles that.

    Args:
        path: A folder, the name of a parent in the box, ``org/name`` or ``org/name@revision``.
        revision: Branch, tag or commit of a repository.
        token: A token, False for none, None for the one that huggingface_hub finds.
        workers: Threads that fetch headers.

    Raises:
        UsageError: A revision of a folder, two revisions, or a token in either.
        CheckpointError: No such folder or repository, or one that may not be read.
    """
    found = _REPOSITORY.fullmatch(os.fspath(path))
    if os.path.lexists(path) or found is None:
        if revision is not None and os.path.lexists(path):
            raise UsageError(
                "a folder has no revisions",
                where=path,
                value=revision,
                rule="a revision of a repository on the Hub",
                hint="leave --revision out, or go where no folder has the repository's name",
            )
        boxed = None if os.path.lexists(path) else parent_folder(path)
        return LocalFolder(boxed or Path(path))
    refuse_token(f"{path}@{revision}", where="the name of a repository, or its revision")
    named = found["revision"]
    if revision is not None and named is not None and revision != named:
        raise UsageError(
            "two revisions", where=path, value=f"{named} and {revision}", rule="one of them"
        )
    revision = revision or named
    if revision is None and Path(found["org"]).exists():
        raise CheckpointError(
            "no such folder",
            where=path,
            hint=f"check the path; if the repository on the Hub is meant: {path}@main",
        )
    from v4surgery.checkpoint.remote import DEFAULT_WORKERS, HubRepository

    return HubRepository(found["repo"], revision, token=token, workers=workers or DEFAULT_WORKERS)


__all__ = ["open_source"]
