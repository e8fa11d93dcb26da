"""Config, index and headers of a commit, kept on disk: a second plan asks the Hub next to nothing.

They lie in huggingface_hub's folder for what libraries keep (``HF_ASSETS_CACHE``)::

    v4surgery/<host>/<org>--<name>/<commit>/<file>.v1      64 bytes of digest, then the bytes
    v4surgery/<host>/<org>--<name>/refs/<revision>.v1      the commit, for work offline

What is found is used only if its digest, which covers the file's name, size and ETag too, is
right; so a torn or tampered file is fetched again. All of it is never more than 512 MB: the
commits that were not used for longest go. A cache that cannot be written is none, not an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote, urlsplit

from blake3 import blake3
from huggingface_hub import cached_assets_path, constants

MAX_CACHE_BYTES = 512_000_000
_SUFFIX = ".v1"
_DIGEST_BYTES = 64


class MetadataCache:
    """Pieces of one repository's metadata.

    Args:
        endpoint: Of the Hub: other Hubs may have other repositories by the same name.
        repo_id: ``org/name``.
    """

    def __init__(self, endpoint: str, repo_id: str) -> None:
        host = re.sub(r"[^\w.-]", "_", urlsplit(endpoint).netloc.rpartition("@")[2]) or "_"
        self._folder: Path | None = None
        with contextlib.suppress(OSError, ValueError):
            self._folder = cached_assets_path(
                "v4surgery",
                namespace=host,
                subfolder=repo_id.replace("/", "--"),
                assets_dir=constants.HF_ASSETS_CACHE,
            )

    def load(self, commit: str, name: str, key: str = "") -> bytes | None:
        """What was stored under this name with the very same key; None if there is nothing."""
        path = self._path(commit, name)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != _digest(name, key, payload):
            return None
        with contextlib.suppress(OSError):
            os.utime(path.parent)  # when this commit was used last
        return payload

    def store(self, commit: str, name: str, payload: bytes, key: str = "") -> None:
        path = self._path(commit, name)
        if path is None or len(payload) > MAX_CACHE_BYTES // 4:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(_digest(name, key, payload) + payload)
                Path(part).replace(path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise

    def trim(self) -> None:
        """Delete the commits that were used least lately until the rest is small enough."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            root = self._folder.parents[1]
            commits = [path for path in root.glob("*/*/*") if path.is_dir()]
            found = sorted((path.stat().st_mtime, path, _size(path)) for path in commits)
            total = sum(size for _, _, size in found)
            for _, path, size in found:
                if total <= MAX_CACHE_BYTES:
                    return
                shutil.rmtree(path, ignore_errors=True)
                total -= size

    def _path(self, commit: str, name: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / commit / (quote(name, safe="") + _SUFFIX)


def _digest(name: str, key: str, payload: bytes) -> bytes:
    hasher = blake3(f"{len(name)} {name} {len(key)} {key} ".encode())
    hasher.update(payload)
    return hasher.hexdigest().encode()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


__all__ = ["MAX_CACHE_BYTES", "MetadataCache"]
