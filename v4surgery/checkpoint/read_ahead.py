"""Fetching the next pieces of a large tensor while one is worked on.

A tensor that is read front to back by one thread would cost a round trip for each piece, and no
second worker could help: the bytes of one tensor are computed and hashed in order.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

# With 8 tensors under way at once these are 64 MB at most.
_MAX_WAITING_BYTES = 64 << 20
_PIECES_AHEAD = 4

T = TypeVar("T")


class ReadAhead:
    """Pieces on their way, and those that came and wait.

    Args:
        fetch: Gives the bytes ``[begin, end)`` of a file.
        pool: Runs it. Nothing that runs there may wait for a piece.
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes], pool: ThreadPoolExecutor) -> None:
        self._fetch, self._pool = fetch, pool
        self._lock = threading.Lock()
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._pieces: dict[tuple[str, int, int], Future[bytes]] = {}
        self._num_bytes = 0

    def expect(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Spans (file, begin, end), none within another, instead of those expected before."""
        by_file: dict[str, list[tuple[int, int]]] = {}
        for file, begin, end in spans:
            by_file.setdefault(file, []).append((begin, end))
        with self._lock:
            self._spans = {file: sorted(items) for file, items in by_file.items()}

    def take(self, file: str, begin: int, view: memoryview) -> bool:
        """Fill ``view`` with a piece that was fetched ahead, if it was; start the next ones.

        Raises:
            ReadError: The piece could not be fetched.
        """
        end = begin + len(view)
        with self._lock:
            piece = self._pieces.pop((file, begin, end), None)
            self._num_bytes -= len(view) if piece is not None else 0
            self._start_next(file, end, len(view))
        if piece is None:
            return False
        view[:] = piece.result()
        return True

    def clear(self) -> None:
        """Forget all pieces; nothing is fetched ahead until more is expected."""
        with self._lock:
            pieces, self._pieces, self._spans, self._num_bytes = self._pieces, {}, {}, 0
        for piece in pieces.values():
            piece.cancel()

    def _start_next(self, file: str, begin: int, length: int) -> None:
        """Fetch the pieces behind one that ends at ``begin``, up to the end of its span."""
        spans = self._spans.get(file, [])
        found = bisect_right(spans, (begin - 1, 1 << 63)) - 1
        stop = spans[found][1] if found >= 0 else 0
        for _ in range(_PIECES_AHEAD):
            end = min(begin + length, stop)
            if end <= begin or self._num_bytes + end - begin > _MAX_WAITING_BYTES:
                return
            key = (file, begin, end)
            if key not in self._pieces:
                self._pieces[key] = self._pool.submit(self._fetch, *key)
                self._num_bytes += end - begin
            begin = end


def finish(futures: list[Future[T]]) -> None:
    """Wait for all; after a failure only for those that run already, and raise it."""
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


__all__ = ["ReadAhead", "finish"]
