"""A checkpoint in a local folder, or in a snapshot of the Hub's cache."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import NamedTuple

from v4surgery.checkpoint.source import Source, safe_basename
from v4surgery.errors import CheckpointError, ReadError

__all__ = ["LocalFolder"]

_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}

# One call moves at most 2 GiB - 4 KiB on Linux and refuses INT_MAX on macOS.
_MAX_CALL_BYTES = 1 << 30


class _OpenFile(NamedTuple):
    fd: int
    size: int
    mtime_ns: int
    ino: int


class LocalFolder(Source):
    """Files of one folder, read with ``pread`` on descriptors that stay open.

    Not mapped: a mapped file that is truncated kills the process instead of raising.

    Args:
        path: The folder. A link in it must stay inside it, except that in a Hub cache
            (``models--org--name/snapshots/<revision>``) links lead into the ``blobs`` beside.

    Raises:
        CheckpointError: ``path`` is no folder.
    """

    # Two 2 KB pieces, two calls against one through the gap, medians on a 2-core VM (ext4):
    # cached 2.8 / 4.1 us at a gap of 16 KiB, 2.5 / 10 us at 64 KiB;
    # not cached 57 / 46 us at 16 KiB, 57 / 88 us at 64 KiB.
    gap_bytes = 16 * 1024

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._root = _resolve_folder(Path(path))
        self._lock = threading.Lock()
        self._files: dict[str, _OpenFile] | None = {}
        self._is_snapshot = self._root.parent.name == "snapshots"
        self.name = self._root.name or str(self._root)
        repo = self._root.parent.parent.name
        if self._is_snapshot and repo.startswith("models--"):
            self.name = repo.removeprefix("models--").replace("--", "/", 1)

    @property
    def path(self) -> Path:
        """The folder, links resolved."""
        return self._root

    def list_files(self) -> list[str]:
        try:
            with os.scandir(self._root) as entries:
                # Links count even when they lead nowhere: reading one says what is wrong.
                return sorted(each.name for each in entries if each.is_symlink() or each.is_file())
        except OSError as error:
            raise ReadError("the folder cannot be listed", where=self._root, value=error) from error

    def size(self, file: str) -> int:
        return self._file(file).size

    def read(self, file: str, begin: int, end: int) -> bytes:
        fd = self._check_range(file, begin, end)
        pieces = []
        cursor = begin
        while cursor < end:
            try:
                piece = os.pread(fd, min(end - cursor, _MAX_CALL_BYTES), cursor)
            except OSError as error:
                raise self._failed(file, begin, end, error) from error
            if not piece:
                raise self._failed(file, begin, end, f"ended at byte {cursor:,}")
            pieces.append(piece)
            cursor += len(piece)
        return b"".join(pieces)

    def read_into(self, file: str, begin: int, buffer: memoryview) -> None:
        end = begin + buffer.nbytes
        fd = self._check_range(file, begin, end)
        if begin == end:
            return
        view = buffer.cast("B")
        cursor = begin
        while cursor < end:
            try:
                done = os.preadv(fd, [view[cursor - begin :][:_MAX_CALL_BYTES]], cursor)
            except OSError as error:
                raise self._failed(file, begin, end, error) from error
            if not done:
                raise self._failed(file, begin, end, f"ended at byte {cursor:,}")
            cursor += done

    def identity(self) -> dict[str, str]:
        identity = {"kind": "folder", "name": self.name}
        return identity | {"revision": self._root.name} if self._is_snapshot else identity

    def check_unchanged(self) -> None:
        with self._lock:
            files = dict(self._files or {})
        for file, opened in files.items():
            path = self._root / file
            try:
                found: object = _fingerprint(path.stat())
            except OSError as error:
                found = error
            if found != opened[1:]:
                raise ReadError(
                    "the file changed while it was being read",
                    where=path,
                    value=f"(size, mtime_ns, inode) {opened[1:]} became {found}",
                    rule="a parent stays as it is until the work is done",
                    hint="wait until whatever writes this folder has finished, then start again",
                )

    def close(self) -> None:
        with self._lock:
            files, self._files = self._files or {}, None
        for opened in files.values():
            os.close(opened.fd)

    def _file(self, file: str) -> _OpenFile:
        with self._lock:
            if self._files is None:
                raise ReadError("the folder was closed", where=self._root / file)
            opened = self._files.get(file)
            if opened is None:
                opened = self._files[file] = self._open(file)
            return opened

    def _open(self, file: str) -> _OpenFile:
        path = self._root / safe_basename(file, str(self._root))
        try:
            target = Path(os.path.realpath(path, strict=True))
            self._check_target(path, target)
            # NONBLOCK: a pipe by the name of a shard must not hang us.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
            fd = os.open(target, flags)
        except OSError as error:
            raise ReadError(
                "the file cannot be opened",
                where=path,
                value=error,
                rule="every file that the checkpoint names is there and readable",
                hint="download the checkpoint again, or check the permissions",
            ) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise CheckpointError(
                "not a regular file", where=path, value=stat.filemode(status.st_mode)
            )
        return _OpenFile(fd, *_fingerprint(status))

    def _check_target(self, path: Path, target: Path) -> None:
        blobs = self._root.parent.parent / "blobs"
        if target.is_relative_to(self._root):
            return
        if not (self._is_snapshot and target.is_relative_to(blobs)):
            raise CheckpointError(
                "the file is a link that leaves the folder",
                where=path,
                value=target,
                rule="links stay inside the folder; only a Hub cache links to the blobs beside it",
                hint="replace the link by the file, or give the folder that holds the files",
            )

    def _check_range(self, file: str, begin: int, end: int) -> int:
        opened = self._file(file)
        if not 0 <= begin <= end <= opened.size:
            raise self._failed(file, begin, end, "not a range of this file")
        return opened.fd

    def _failed(self, file: str, begin: int, end: int, reason: object) -> ReadError:
        return ReadError(
            f"bytes [{begin:,}, {end:,}) could not be read: {reason}",
            where=self._root / file,
            value=f"the file had {self._file(file).size:,} bytes when it was opened",
            rule="a range comes back whole or not at all",
            hint="download the file again, and let nothing write to it meanwhile",
        )


def _resolve_folder(path: Path) -> Path:
    try:
        root = Path(os.path.realpath(path, strict=True))
        is_folder = root.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "no such folder", where=path, value=error, hint="check the path"
        ) from error
    if is_folder:
        return root
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise CheckpointError(
            "pickles are never loaded",
            where=path,
            rule="a checkpoint is a folder of safetensors files",
            hint="convert it to safetensors first, then give the folder",
        )
    raise CheckpointError(
        "this is a file, not a folder",
        where=path,
        rule="a checkpoint is a folder of safetensors files",
        hint=f"give the folder: {path.parent}",
    )


def _fingerprint(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
