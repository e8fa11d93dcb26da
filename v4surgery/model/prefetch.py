"""What a streamed model reads next, in the background, and how long it was waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from v4surgery.distributed.team import Team
from v4surgery.model.ranges import RangeLoader

T = TypeVar("T")


class Prefetcher:
    """One thread that reads ahead.

    Args:
        loader: Brings stored tensors to the device.
        team: Ranks that read parts each, or None.

    Attributes:
        waited: Seconds that the computing thread has waited for bytes.
    """

    def __init__(self, loader: RangeLoader, team: Team | None) -> None:
        self.loader, self.team, self.waited = loader, team, 0.0
        self._ahead = ThreadPoolExecutor(1, "v4surgery-prefetch")

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Read in the background."""
        return self._ahead.submit(call)

    def wait(self, future: Future[T]) -> T:
        """What was read in the background."""
        return self.timed(future.result)

    def timed(self, call: Callable[[], T]) -> T:
        """Read at once."""
        began = time.perf_counter()
        result = call()
        self.waited += time.perf_counter() - began
        return result

    def close(self) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self.loader.close()
