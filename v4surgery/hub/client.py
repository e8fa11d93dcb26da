"""The Hub as a push sees it: huggingface_hub's own client, with patience and clear errors.

Every call goes through :meth:`Hub._call`. It retries what may pass by itself (huggingface_hub
does so for uploads, not for creating a repository or for a commit), puts a bound on silence, and
turns whatever is raised into a :class:`~v4surgery.errors.HubError`, see :mod:`.failures`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from v4surgery.checkpoint.patience import Attempts, Patience
from v4surgery.errors import ReadError, UsageError
from v4surgery.hub.failures import CONFLICTS, cause_of, explained, status_of, transient_of
from v4surgery.version import __version__

logger = logging.getLogger("v4surgery.hub")
Result = TypeVar("Result")

# A commit of many files may keep the Hub busy for a minute; this long without a byte is a stall.
STALL_SECONDS = 120.0
MAX_PULL_REQUESTS = 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and SHA-256 for LFS files or else git's SHA-1."""

    size: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True)
class Remote:
    """A revision of a repository.

    Attributes:
        head: Its commit.
        private: Whether the repository is.
        files: What lies at its root, by name.
    """

    head: str
    private: bool
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Committed:
    """A commit that was made, and the pull request that it opened, if any."""

    oid: str
    url: str
    pull_request_url: str | None = None


class Hub:
    """A Hub and who asks it.

    Args:
        token: Instead of the one that huggingface_hub finds (HF_TOKEN, or the one logged in with).
        show_progress: Whether huggingface_hub may draw its progress bars.
        patience: How often a call is tried, and how long.

    Raises:
        UsageError: The token could not stand in a request.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        show_progress: bool = False,
        patience: Patience | None = None,
    ) -> None:
        if token is not None and not (token.isascii() and token.isprintable() and token):
            raise UsageError("not a token", where="--token", rule="printable ASCII, not empty")
        self.api = HfApi(token=token, library_name="v4surgery", library_version=__version__)
        self._token = token or get_token()
        self._show_progress, self._patience = show_progress, patience or Patience()

    @property
    def endpoint(self) -> str:
        return self.api.endpoint

    def remote(self, repo_id: str, revision: str) -> Remote | None:
        """A revision as it is now; None if there is no such repository, or none to be seen.

        Raises:
            HubError: The Hub refused or failed, or the repository has no such revision.
        """

        def look() -> ModelInfo | None:
            try:
                return self._info(repo_id, revision, files_metadata=True)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError as error:
                # The Hub answers 401 for what does not exist, too, to whoever has no token.
                if self._token is None and error.response.status_code == 401:
                    raise
                return None

        info = self._call(f"look at {revision}", repo_id, look)
        if info is None:
            return None
        assert info.sha is not None
        files = {
            item.rfilename: RemoteFile(
                item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id or ""
            )
            for item in info.siblings or ()
            if "/" not in item.rfilename
        }
        return Remote(info.sha, bool(info.private), files)

    def has_revision(self, repo_id: str, revision: str) -> bool:
        """Whether a repository that is there has this branch, tag, commit or pull request."""

        def look() -> bool:
            try:
                self._info(repo_id, revision)
            except RevisionNotFoundError:
                return False
            except RepositoryNotFoundError:
                return True  # remote() says better what is wrong
            return True

        return self._call(f"look for {revision}", repo_id, look)

    def open_pull_requests(self, repo_id: str) -> list[str]:
        """Their git references, newest first, at most :data:`MAX_PULL_REQUESTS`."""

        def look() -> list[str]:
            found = self.api.get_repo_discussions(
                repo_id, discussion_type="pull_request", discussion_status="open"
            )
            numbers = [item.num for _, item in zip(range(MAX_PULL_REQUESTS), found, strict=False)]
            return [f"refs/pr/{number}" for number in sorted(numbers, reverse=True)]

        return self._call("list the pull requests", repo_id, look)

    def create(self, repo_id: str, *, private: bool) -> None:
        """Create a repository; one that is there meanwhile is left as it is."""
        self._call(
            "create the repository",
            repo_id,
            lambda: self.api.create_repo(repo_id, private=private, exist_ok=True),
        )

    def create_branch(self, repo_id: str, branch: str) -> None:
        self._call(
            f"create the branch {branch}",
            repo_id,
            lambda: self.api.create_branch(repo_id, branch=branch, exist_ok=True),
        )

    def upload(
        self,
        repo_id: str,
        operation: CommitOperationAdd,
        *,
        revision: str,
        create_pr: bool,
    ) -> None:
        """Send the content of a large file ahead of the commit; small ones travel in it.

        What storage has already is not sent again. huggingface_hub retries each request itself.
        """
        self._call(
            f"upload {operation.path_in_repo}",
            repo_id,
            lambda: self.api.preupload_lfs_files(
                repo_id,
                [operation],
                revision=revision,
                create_pr=create_pr,
                free_memory=False,
            ),
            tries=1,
        )

    def commit(
        self,
        repo_id: str,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        *,
        revision: str,
        create_pr: bool,
        message: str,
        description: str,
        parent: str,
        find_made: Callable[[], Committed | None],
    ) -> Committed:
        """Make one commit on top of ``parent``, or a pull request of it.

        ``find_made`` looks whether the commit is there, and is asked after each failure: the
        answer may be what was lost, and a second try would make a second one.
        """

        def send() -> Committed:
            made = self.api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return Committed(made.oid, made.commit_url, made.pr_url)

        return self._call("commit", repo_id, send, find_made=find_made)

    def _info(self, repo_id: str, revision: str, *, files_metadata: bool = False) -> ModelInfo:
        # Without a timeout of its own this call waits for ever, whatever the session's is.
        return self.api.model_info(
            repo_id, revision=revision, timeout=STALL_SECONDS, files_metadata=files_metadata
        )

    def _call(
        self,
        what: str,
        repo_id: str,
        call: Callable[[], Result],
        *,
        tries: int | None = None,
        find_made: Callable[[], Result | None] | None = None,
    ) -> Result:
        patience = replace(self._patience, tries=tries or self._patience.tries)
        attempts = Attempts(patience, threading.Event(), f"{self.endpoint}/{repo_id}")
        while True:
            logger.debug("%s: %s", attempts.where, what)
            try:
                with self._session():
                    return call()
            except Exception as error:
                cause = cause_of(error)
                transient = transient_of(cause)
                if find_made is not None and (transient or status_of(cause) in CONFLICTS):
                    made = find_made()
                    if made is not None:
                        return made
                failed = explained(what, attempts.where, cause, self._token)
                if transient is None:
                    raise failed from None
                try:
                    attempts.pause(transient)
                except ReadError:
                    raise failed from None

    @contextmanager
    def _session(self) -> Iterator[None]:
        """A bound on silence, and nothing from huggingface_hub on stderr but wanted bars.

        Its warnings name signed links, which are as good as a password for as long as they work.
        """
        session, verbosity = get_session(), hub_logging.get_verbosity()
        timeout, session.timeout = session.timeout, STALL_SECONDS
        hide = not self._show_progress and not are_progress_bars_disabled()
        if hide:
            disable_progress_bars()
        hub_logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            hub_logging.set_verbosity(verbosity)
            if hide:
                enable_progress_bars()
            session.timeout = timeout


def adding(name: str, content: Path | bytes, sha256: str) -> CommitOperationAdd:
    """A file to send, whose digest is known already: it is not read once more to be hashed."""
    operation = CommitOperationAdd(name, content)
    operation.upload_info.sha256 = bytes.fromhex(sha256)
    return operation


__all__ = ["Committed", "Hub", "Remote", "RemoteFile", "adding"]
