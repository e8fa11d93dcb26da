"""What a loopback Hub holds: repositories, their commits, and the bytes of their files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LFS_BYTES = 10_000_000
"""The Hub keeps larger files, and every file with a weights' suffix, in LFS."""
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".npz", ".tar", ".zip", ".png")
_HASHED_BYTES = 64_000_000


class Blob:
    """The bytes of a file, read by range; ``sha256`` is the real one up to 64 MB."""

    size: int
    sha256: str
    git_sha: str

    def read(self, begin: int, end: int) -> bytes:
        raise NotImplementedError

    def open_fd(self) -> int | None:
        """A descriptor for sendfile, for whoever asks to close; None where there is no file."""
        return None

    def _name_content(self, key: str) -> None:
        if self.size <= _HASHED_BYTES:
            content = self.read(0, self.size)
            self.sha256 = hashlib.sha256(content).hexdigest()
            self.git_sha = git_blob_sha(content)
        else:
            self.sha256 = hashlib.sha256(key.encode()).hexdigest()
            self.git_sha = self.sha256[:40]


class MemoryBlob(Blob):
    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)
        self._name_content("")

    def read(self, begin: int, end: int) -> bytes:
        return self.content[begin:end]


class FileBlob(Blob):
    """A file on disk, which may be sparse and of any size."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self._name_content(f"{path.name} {self.size} {path.stat().st_mtime_ns}")

    def read(self, begin: int, end: int) -> bytes:
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), end - begin, begin)

    def open_fd(self) -> int | None:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)


class GeneratedBlob(Blob):
    """Bytes computed when asked for: ``make(begin, end)``."""

    def __init__(self, size: int, make: Callable[[int, int], bytes], key: str = "") -> None:
        self.size, self._make = size, make
        self._name_content(f"{key} {size}")

    def read(self, begin: int, end: int) -> bytes:
        return self._make(begin, end)


Content = bytes | Path | Blob


def as_blob(content: Content) -> Blob:
    if isinstance(content, Blob):
        return content
    return FileBlob(content) if isinstance(content, Path) else MemoryBlob(content)


def git_blob_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    tree: Mapping[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repo:
    """A repository: commits, and refs (``main``, other branches, tags, ``refs/pr/1``) to them.

    Args:
        repo_id: ``org/name``.
        private: Only users in ``readers`` see that it exists.
        gated: Everyone sees the listing, users in ``readers`` the files.
        readers: Names of users.
        lfs: Decides what redirects to storage; by default what the Hub keeps in LFS.
    """

    repo_id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[dict[str, object]] = field(default_factory=list)

    def commit(
        self,
        changes: Mapping[str, Content | None],
        *,
        title: str = "Upload",
        ref: str = "main",
        base: str | None = None,
    ) -> str:
        """A new commit on ``ref`` (made from ``base`` if it is new); None deletes a file."""
        parent = self.refs.get(ref) or (self.refs.get(base) if base else None)
        tree = dict(self.commits[parent].tree) if parent else {}
        for path, content in changes.items():
            if content is None:
                tree.pop(path, None)
            else:
                tree[path] = as_blob(content)
        key = repr((self.repo_id, parent, title, [(p, b.sha256) for p, b in sorted(tree.items())]))
        sha = hashlib.sha1(key.encode()).hexdigest()
        self.commits[sha] = Commit(sha, tree, title, parent)
        self.refs[ref] = sha
        return sha

    def at(self, revision: str) -> Commit | None:
        """The commit of a ref or of a full commit hash."""
        return self.commits.get(self.refs.get(revision, revision))

    def is_lfs(self, path: str, blob: Blob) -> bool:
        return blob.size > LFS_BYTES or path.endswith(LFS_SUFFIXES)

    def etag(self, path: str, blob: Blob) -> str:
        return blob.sha256 if self.is_lfs(path, blob) else blob.git_sha
