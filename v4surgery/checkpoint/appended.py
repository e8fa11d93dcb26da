"""A safetensors file whose tensors come one after the other, in any number and of any size.

The payload is appended as tensors come, so that a file may be larger than memory; the header is
known at the end, and is put in front then. Nothing is there under the file's name until it is
whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from v4surgery.checkpoint.header import build_header
from v4surgery.checkpoint.shard import PART

_COPY_BYTES = 16 << 20


class AppendedFile:
    """Collects tensors for one file.

    Args:
        path: The file. What stands there is replaced at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[tuple[str, str, tuple[int, ...]]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._payload = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed by the end

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """Add a tensor; ``dtype`` is safetensors' name of it."""
        self._entries.append((name, dtype, shape))
        self._payload.write(data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the file."""
        with self._payload:
            header = build_header(self._entries, metadata)
            part = self.path.with_name(self.path.name + PART)
            self._payload.seek(0)
            with part.open("wb") as file:
                file.write(header)
                while block := self._payload.read(_COPY_BYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)

    def drop(self) -> None:
        """Forget everything; no file is written."""
        self._payload.close()
