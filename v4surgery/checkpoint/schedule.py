"""Which job of a write each worker does next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence


class Schedule:
    """Which job a worker does next: its own shard's, then a fresh shard's, then anyone's.

    The kernel lets one thread at a time write into a file, so workers on shards of their own write
    side by side where two on one shard would wait for each other.

    Args:
        places: Shard number, offset and job number of each job, sorted.
    """

    def __init__(self, places: Sequence[tuple[int, int, int]]) -> None:
        self._fresh: dict[int, deque[int]] = {}
        for shard, _, job in places:
            self._fresh.setdefault(shard, deque()).append(job)
        self._claimed: dict[int, deque[int]] = {}
        self._own = threading.local()

    def next_job(self) -> int | None:
        """The next job of the calling thread; the caller holds the lock."""
        queue: deque[int] | None = getattr(self._own, "queue", None)
        if not queue:
            queue = self._claim()
            self._own.queue = queue
        return queue.popleft() if queue else None

    def _claim(self) -> deque[int] | None:
        if self._fresh:
            shard = next(iter(self._fresh))
            self._claimed[shard] = self._fresh.pop(shard)
            return self._claimed[shard]
        return max(self._claimed.values(), key=len, default=None)
