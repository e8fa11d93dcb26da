"""A checkpoint in a repository on the Hub, read by ranges and pinned to one commit.

One request tells the commit, the files and their sizes; from then on every request names that
commit. Each shard is resolved once (a HEAD, answered by a redirect to a signed link), and again
only when storage does not take the link any more. Files that the user's Hub cache has are read
from there; config, index and headers are kept by commit (see :mod:`.hub_cache`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3
from huggingface_hub import constants, hf_hub_url

from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.header import MAX_HEADER_BYTES, header_length
from v4surgery.checkpoint.hub_cache import MetadataCache
from v4surgery.checkpoint.hub_http import HubHttp, Link, LinkExpired, Span
from v4surgery.checkpoint.hub_listing import RemoteFile, check_names, pin, snapshot_folder
from v4surgery.checkpoint.patience import Attempts, Patience, Transient
from v4surgery.checkpoint.read_ahead import ReadAhead, finish
from v4surgery.checkpoint.source import Source, safe_basename
from v4surgery.errors import ReadError

logger = logging.getLogger("v4surgery.hub")

DEFAULT_WORKERS = 8
# The client keeps up to 20 connections open; one more would be made anew for every request.
_MAX_SIDE_READS = 16

# Small files are read whole and kept with the headers: the tokenizer has 8 MB, the index of the
# largest checkpoint 12.
_MAX_WHOLE_BYTES = 64_000_000
_MAX_GUESS_BYTES = 16_000_000


class HubRepository(Source):
    """Files of ``org/name`` at one commit.

    Args:
        repo_id: ``org/name``.
        revision: A branch, tag, commit or ``refs/pr/N``; None for main.
        token: A token, False for none, None for the one that huggingface_hub finds.
        workers: Threads that fetch headers.
        patience: Tries, waits and timeouts; HF_HUB_DOWNLOAD_TIMEOUT is the default's silence.

    Raises:
        UsageError: Not the name of a repository or a revision.
        CheckpointError: There is no such repository or revision, or it may not be read.
        ReadError: The Hub cannot be reached, or does not answer as it should.
    """

    # Break-even is latency times bandwidth: at 50 ms, 32 KiB take as long as a request where a
    # connection carries 0.66 MB/s, and far less on any better one. More would soon be paid for in
    # bytes. V4-Flash, requests and bytes read by bytes needed (rows whole), at gaps of
    #     4 KiB              32 KiB            128 KiB
    # tiny-ci   7,874  1.01     6,624  1.01      786  1.23
    # mini3b  110,745  1.93     9,471  2.11    5,832  2.16
    # mini1b  202,445  1.66     5,849  2.11    3,387  2.16
    # layers4   7,867  1.00     7,867  1.00    7,867  1.00
    gap_bytes = 32 * 1024

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        workers: int = DEFAULT_WORKERS,
        patience: Patience | None = None,
    ) -> None:
        check_names(repo_id, revision)
        self.name = repo_id
        self._workers = workers
        self._patience = patience or Patience(silence=float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        self._wake = threading.Event()
        self._http = HubHttp(token, self._patience, self._new_attempts)
        self._cache = MetadataCache(self._http.endpoint, repo_id)
        self._lock = threading.Lock()
        self._file_locks: dict[str, threading.Lock] = {}
        self._links: dict[str, Link] = {}
        self._etags: dict[str, str] = {}
        self._heads: dict[str, bytes] = {}
        self._is_closed = False
        self._pool = _side_pool(workers)
        self._ahead = ReadAhead(self._fetch, self._pool)
        self._listing = pin(self._http, self._cache, repo_id, revision)
        self._twin, self._twin_files = self._open_twin()

    @property
    def commit(self) -> str:
        return self._listing.commit

    def list_files(self) -> list[str]:
        return sorted(self._listing.files)

    def size(self, file: str) -> int:
        return self._file(file).size

    def read(self, file: str, begin: int, end: int) -> bytes:
        self._check_range(file, begin, end)
        if (twin := self._twin_with(file)) is not None:
            return twin.read(file, begin, end)
        head = self._heads.get(file, b"")
        if end <= len(head):
            return head[begin:end]
        size = self.size(file)
        if not (head or file.endswith(".safetensors")) and size <= _MAX_WHOLE_BYTES:
            return self._whole(file, size)[begin:end]
        return self._fetch(file, begin, end)

    def read_into(self, file: str, begin: int, buffer: memoryview) -> None:
        self._check_range(file, begin, begin + buffer.nbytes)
        if (twin := self._twin_with(file)) is not None:
            twin.read_into(file, begin, buffer)
        elif buffer.nbytes and not self._ahead.take(file, begin, buffer.cast("B")):
            self._fetch_into(file, begin, buffer.cast("B"))

    def read_many(self, file: str, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Side by side: a few rows here and there cost the latency of a request each."""
        if len(pieces) < 2 or self._twin_with(file) is not None:
            super().read_many(file, pieces)
            return
        for begin, buffer in pieces:
            self._check_range(file, begin, begin + buffer.nbytes)
        finish(
            [
                self._pool.submit(self._fetch_into, file, begin, buffer.cast("B"))
                for begin, buffer in pieces
                if buffer.nbytes
            ]
        )

    def will_read(self, spans: Iterable[tuple[str, int, int]], workers: int) -> None:
        if workers != self._workers:
            self._ahead.clear()
            self._pool.shutdown()
            self._workers, self._pool = workers, _side_pool(workers)
            self._ahead = ReadAhead(self._fetch, self._pool)
        self._ahead.expect(span for span in spans if self._twin_with(span[0]) is None)

    def fetch_heads(self, expected: Mapping[str, int]) -> None:
        missing = []
        for file, guess in expected.items():
            if self._twin_with(file) is None:
                head = self._cache.load(self.commit, file, self._key(file))
                if head is not None:
                    self._heads[file] = head
                else:
                    missing.append((file, guess))
        with ThreadPoolExecutor(self._workers, "v4surgery-headers") as pool:
            finish([pool.submit(self._fetch_head, file, guess) for file, guess in missing])
        if missing:
            self._cache.trim()

    def identity(self) -> dict[str, str]:
        return {"kind": "hub", "name": self.name, "revision": self.commit}

    def weights_id(self, files: Iterable[str]) -> str | None:
        """By the content hashes that the Hub lists; offline there may be none."""
        etags = [(file, self._file(file).etag) for file in sorted(files)]
        if not all(etag for _, etag in etags):
            return None
        return blake3(json.dumps(etags).encode()).hexdigest()[:32]

    def check_unchanged(self) -> None:
        """A commit does not change, and every answer was held against it; the cache's files may."""
        if self._twin is not None:
            self._twin.check_unchanged()

    def cancel(self) -> None:
        with self._lock:
            wake, self._wake = self._wake, threading.Event()
        wake.set()
        self._ahead.clear()

    def close(self) -> None:
        self._is_closed = True
        self.cancel()
        self._ahead.clear()
        self._pool.shutdown()
        self._heads.clear()
        if self._twin is not None:
            self._twin.close()

    def _new_attempts(self, where: str) -> Attempts:
        return Attempts(self._patience, self._wake, where)

    def _open_twin(self) -> tuple[LocalFolder | None, frozenset[str]]:
        """The cache's snapshot of the commit, and the files that it has as the Hub lists them."""
        folder = snapshot_folder(self.name, self.commit, self._listing.files)
        if folder is None:
            return None, frozenset()
        twin, same = LocalFolder(folder), set()
        for file in set(twin.list_files()) & self._listing.files.keys():
            with contextlib.suppress(ReadError):  # a link into blobs that are gone
                if twin.size(file) == self.size(file):
                    same.add(file)
                else:
                    logger.warning("%s: the cached copy has another size", self._where(file))
        return twin, frozenset(same)

    def _twin_with(self, file: str) -> LocalFolder | None:
        return self._twin if file in self._twin_files else None

    def _file(self, file: str) -> RemoteFile:
        if self._is_closed:
            raise ReadError("the repository was closed", where=self._where(file))
        found = self._listing.files.get(safe_basename(file, self.name))
        if found is None:
            raise ReadError(
                "no such file in this repository",
                where=self._where(file),
                hint="check the revision; the repository may be incomplete",
            )
        return found

    def _where(self, file: str) -> str:
        return f"{self.name}@{self.commit[:12]}/{file}"

    def _key(self, file: str) -> str:
        return f"{self.size(file)} {self._file(file).etag}"

    def _check_range(self, file: str, begin: int, end: int) -> None:
        size = self.size(file)
        if not 0 <= begin <= end <= size:
            raise ReadError(
                f"bytes [{begin:,}, {end:,}) could not be read: not a range of this file",
                where=self._where(file),
                value=f"the file has {size:,} bytes",
                rule="a range comes back whole or not at all",
            )

    def _whole(self, file: str, size: int) -> bytes:
        content = self._cache.load(self.commit, file, self._key(file))
        if content is None or len(content) != size:
            content = self._fetch(file, 0, size)
            self._cache.store(self.commit, file, content, self._key(file))
        return content

    def _fetch_head(self, file: str, guess: int) -> None:
        """The header and its prefix: in one request if the guess of its length was enough."""
        size = self.size(file)
        head = self._fetch(file, 0, min(8 + min(guess, _MAX_GUESS_BYTES, MAX_HEADER_BYTES), size))
        end = 8 + header_length(head[:8], size, self._where(file))
        if end > len(head):
            head += self._fetch(file, len(head), end)
        self._heads[file] = head[:end]
        self._cache.store(self.commit, file, head[:end], self._key(file))

    def _fetch(self, file: str, begin: int, end: int) -> bytes:
        content = bytearray(end - begin)
        if content:
            self._fetch_into(file, begin, memoryview(content))
        return bytes(content)

    def _fetch_into(self, file: str, begin: int, view: memoryview) -> None:
        """Fill ``view``: what a try got is kept, the next goes on behind it."""
        attempts, done, refused_at = self._new_attempts(self._where(file)), 0, -1
        size, end = self.size(file), begin + len(view)

        def take(piece: bytes) -> None:
            nonlocal done
            view[done : done + len(piece)] = piece
            done += len(piece)

        while done < len(view):
            link = None
            try:
                attempts.check_time()
                link = self._link(file)
                etag = self._http.read_span(link, Span(begin + done, end, size), take, attempts)
                self._pin_etag(file, etag)
            except LinkExpired as refused:
                self._forget(file, link)
                if done == refused_at:  # a new link, and it gave nothing
                    if attempts.is_last:
                        raise self._refused(file, refused) from None
                    attempts.pause(Transient(f"the signed link is refused: {refused}"))
                refused_at = done
            except Transient as failure:
                attempts.pause(failure)

    def _link(self, file: str) -> Link:
        """Where a file is; the first thread that needs to know asks, the others wait for it."""
        link = self._links.get(file)
        if link is not None:
            return link
        with self._lock:
            lock = self._file_locks.setdefault(file, threading.Lock())
        with lock:
            if file not in self._links:
                self._links[file] = self._resolve(file)
            return self._links[file]

    def _forget(self, file: str, link: Link | None) -> None:
        with self._lock:
            if self._links.get(file) == link:
                self._links.pop(file, None)

    def _resolve(self, file: str) -> Link:
        where, listed = self._where(file), self._file(file)
        url = hf_hub_url(self.name, file, revision=self.commit, endpoint=self._http.endpoint)
        link, described = self._http.resolve(url, where)
        commit = described.get("x-repo-commit", self.commit)
        size = described.get("x-linked-size", str(listed.size))
        etag = described.get("x-linked-etag", listed.etag).strip('"')
        if (commit, size) != (self.commit, str(listed.size)) or etag not in (listed.etag, ""):
            raise self._changed(file, f"commit {commit}, {size} bytes, {etag}")
        return link

    def _pin_etag(self, file: str, etag: str | None) -> None:
        if etag is not None and self._etags.setdefault(file, etag) != etag:
            raise self._changed(file, f"ETag {self._etags[file]} became {etag}")

    def _refused(self, file: str, refused: LinkExpired) -> ReadError:
        return ReadError(
            "storage refuses the signed link, and new ones too",
            where=self._where(file),
            value=refused,
            rule="a link is good for a while",
            hint="check the clock and the proxies of this machine, then run the command again: "
            "what is done is kept",
        )

    def _changed(self, file: str, found: str) -> ReadError:
        return ReadError(
            "the file is no longer the one that was opened",
            where=self._where(file),
            value=self._http.clean(found),
            rule="a file of a commit never changes",
            hint="start again; if it stays so, the server or a proxy mixes files up",
        )


def _side_pool(workers: int) -> ThreadPoolExecutor:
    """Threads that fetch what the workers wait for: two requests at a time for each."""
    return ThreadPoolExecutor(min(2 * workers, _MAX_SIDE_READS), "v4surgery-hub")


__all__ = ["DEFAULT_WORKERS", "HubRepository"]
