"""A safetensors file whose tensors come one after the other, in any number and of any size.

The payload is appended as tensors come, so that a file may be larger than memory; the header is
known at the end, and is put in front then. Nothing is there under the file's name until it is
whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from v4surgery.checkpoint.header import build_header
from v4surgery.checkpoint.shard import PART, writing

_COPY_BYTES = 16 << 20


class AppendedFile:
    """Collects tensors for one file.

    Args:
        path: The file. What stands there is replaced at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[tuple[str, str, tuple[int, ...]]] = []
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._payload = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - see drop

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """Add a tensor; ``dtype`` is safetensors' name of it.

        Raises:
            OutputError: The disk does not take it.
        """
        self._entries.append((name, dtype, shape))
        with _told(self.path):
            self._payload.write(data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the file.

        Raises:
            OutputError: The disk does not take it; what stood there stays.
        """
        header = build_header(self._entries, metadata)
        part = self.path.with_name(self.path.name + PART)
        try:
            with _told(self.path):
                self._payload.seek(0)
                self._copy(header, part)
                part.replace(self.path)
        finally:
            self.drop()
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _copy(self, header: bytes, part: Path) -> None:
        with part.open("wb") as file:
            file.write(header)
            while block := self._payload.read(_COPY_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def drop(self) -> None:
        """Forget everything; no file is written."""
        with contextlib.suppress(OSError):  # of what a full disk did not take before
            self._payload.close()


def _told(path: Path) -> AbstractContextManager[None]:
    """Turns an OSError into an OutputError that says what is lost."""
    return writing(
        path,
        lambda: "nothing of this run is kept",
        hint="mend the cause and run the same command again",
    )
