"""One shard on its way to the disk, and one tensor of it: files, offsets, hashes.

A shard is written as ``<file>.part`` and renamed when all its tensors are there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from v4surgery.checkpoint.durable import sync_dir
from v4surgery.checkpoint.layout import OutputTensor, ShardLayout
from v4surgery.errors import OutputError

PART = ".part"
# Hashed and written piece by piece, so that what the hash pulled into L2 is copied out of L2:
# a 2 GiB copy takes 2.1 s so, 3.0 s in whole 8 MiB chunks (medians of 5, two cores).
_PIECE_BYTES = 512 << 10
OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


RESUMES = "mend the cause and run the same command again: it resumes from what is kept"


@contextlib.contextmanager
def writing(path: Path, kept: Callable[[], str], hint: str = RESUMES) -> Iterator[None]:
    """Turns an OSError of the output side into an OutputError that says how to go on."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown")
        raise OutputError(
            f"writing failed: {error.strerror or error}",
            where=path,
            value=f"{code}; {kept()}",
            hint=hint,
        ) from error


class ShardFile:
    """A shard on its way: the open ``.part`` (or, when resuming, perhaps the final file)."""

    def __init__(self, out: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self.final, self.part = out / layout.file, out / (layout.file + PART)
        self.is_final = self.final.exists()
        self.missing = 0  # outputs not yet whole; guarded by the run's lock
        self._fd: int | None = None
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        return self.final if self.is_final else self.part

    def disk_bytes(self) -> int:
        """What the file takes on the disk now."""
        for path in (self.part, self.final):  # it may be renamed meanwhile, in this direction
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_blocks * 512
        return 0

    def fd(self) -> int:
        """The open file, with its header and its size right."""
        with self._lock:
            if self._fd is None:
                fd = os.open(self.path, OPEN_FLAGS, 0o666)
                try:
                    self._prepare(fd)
                except BaseException:
                    os.close(fd)
                    raise
                self._fd = fd
            return self._fd

    def _prepare(self, fd: int) -> None:
        layout = self.layout
        is_right_size = os.fstat(fd).st_size == layout.total_bytes
        if is_right_size and os.pread(fd, len(layout.header), 0) == layout.header:
            return
        self._demote()
        os.ftruncate(fd, layout.total_bytes)
        _pwrite_all(fd, memoryview(layout.header), 0)

    def _demote(self) -> None:
        if self.is_final:
            self.final.replace(self.part)
            self.is_final = False

    def write(self, data: memoryview, offset: int) -> None:
        fd = self.fd()
        if self.is_final:  # a finished shard with a tensor to redo is unfinished again
            with self._lock:
                self._demote()
        _pwrite_all(fd, data, offset)

    def finish(self) -> None:
        fd = self.fd()
        if not self.is_final:
            os.fsync(fd)
            self.part.replace(self.final)
            self.is_final = True
            sync_dir(self.final.parent)
        else:
            self.part.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


class OutputFile:
    """An output tensor of a running job: where its bytes go, how many there are, their hash."""

    def __init__(self, tensor: OutputTensor, shard: ShardFile, offset: int) -> None:
        self.tensor, self.shard = tensor, shard
        self.offset, self.num_bytes = offset, 0
        self.hasher = blake3()

    def append(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            self.hasher.update(piece)
            self.shard.write(piece, self.offset + self.num_bytes)
            self.num_bytes += len(piece)

    def reload(self, num_bytes: int, digest: str, buffer: bytearray) -> bool:
        """Reads back what the journal claims; whether the file really has it."""
        view = memoryview(buffer)
        fd = self.shard.fd()
        while self.num_bytes < num_bytes:
            room = view[: num_bytes - self.num_bytes]
            count = os.preadv(fd, [room], self.offset + self.num_bytes)
            if count == 0:
                return False
            self.hasher.update(room[:count])
            self.num_bytes += count
        return self.hasher.hexdigest() == digest
