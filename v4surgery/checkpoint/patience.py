"""How long to put up with a server: tries, waits, silence, and a deadline over all of them.

A failure that may pass by itself is a :class:`Transient`; :class:`Attempts` waits after it, as
long as the server asks (``Retry-After``, or ``t=`` of the ``ratelimit`` header) or else 1, 2, 4
and 8 seconds, a quarter more or less at random so that threads which failed together do not come
back together. After the last try, or where the wait would pass the deadline, it raises.

Source: the tries and waits are those of huggingface_hub's ``http_backoff``; Retry-After is RFC
9110, section 10.2.3; ``ratelimit`` is draft-ietf-httpapi-ratelimit-headers-09, section 4.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from v4surgery.errors import ReadError

logger = logging.getLogger("v4surgery.hub")

RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
_RESET = re.compile(r";\s*t\s*=\s*(\d{1,9})\b")
_LONG_WAIT = 30.0


def _wait(wake: threading.Event, seconds: float) -> bool:
    return wake.wait(seconds)


@dataclass(frozen=True)
class Patience:
    """What is tolerated.

    Attributes:
        tries: Requests for the same bytes.
        first_wait: Seconds after the first failure; doubled after each, up to ``longest_wait``.
        longest_wait: Seconds.
        silence: Seconds without a byte before a connection counts as stalled.
        window: Seconds over which a connection must keep up ``least_rate``.
        least_rate: Bytes a second. Slower than this is a stall that drips.
        deadline: Seconds for one read, all its tries and waits together.
        wait: Waits so many seconds, or until the event is set; returns whether it is.
        clock: Seconds, monotonic.
        jitter: Random numbers from 0 to 1.
    """

    tries: int = 5
    first_wait: float = 1.0
    longest_wait: float = 8.0
    silence: float = 10.0
    window: float = 20.0
    least_rate: float = 1024.0
    deadline: float = 900.0
    wait: Callable[[threading.Event, float], bool] = _wait
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random


class Transient(Exception):
    """A failure that may pass by itself; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Attempts:
    """The tries of one read.

    Args:
        patience: How many, and how long.
        wake: Set by whoever wants all reads to end now.
        where: What is read, for messages.
    """

    def __init__(self, patience: Patience, wake: threading.Event, where: str) -> None:
        self.patience, self.wake, self.where = patience, wake, where
        self.failed = 0
        self._end = patience.clock() + patience.deadline

    @property
    def is_last(self) -> bool:
        """Whether a further failure ends the read."""
        return self.failed + 1 >= self.patience.tries

    def check_time(self) -> None:
        """Raises Transient once the deadline has passed: no further try will follow it."""
        if self.patience.clock() > self._end:
            raise Transient(f"not done after {self.patience.deadline:,.0f} s")

    def pause(self, failure: Transient) -> None:
        """Wait before the next try.

        Raises:
            ReadError: There is none: too many have failed, or the wait would be too long.
        """
        self.failed += 1
        patience = self.patience
        seconds = self._seconds(failure)
        left = self._end - patience.clock()
        if self.failed >= patience.tries or seconds > left:
            self._give_up(failure, seconds, left)
        level = logging.WARNING if seconds >= _LONG_WAIT else logging.INFO
        logger.log(
            level,
            "%s: %s; try %d of %d in %.1f s",
            self.where,
            failure.reason,
            self.failed + 1,
            patience.tries,
            seconds,
        )
        if patience.wait(self.wake, seconds):
            raise ReadError("reading was stopped", where=self.where)

    def _seconds(self, failure: Transient) -> float:
        patience = self.patience
        backoff: float = patience.first_wait * 2 ** (self.failed - 1)
        spread = 0.75 + 0.5 * patience.jitter()
        own = min(max(backoff * spread, patience.first_wait), patience.longest_wait)
        # What the server asks for is the least: a second more spreads the threads that wait.
        return own if failure.wait is None else max(failure.wait + patience.jitter(), own)

    def _give_up(self, failure: Transient, seconds: float, left: float) -> None:
        hint = "run the same command again: what is done is kept"
        rule = f"{self.patience.tries} tries, {self.patience.deadline:,.0f} s in all"
        if failure.wait is not None and seconds > left:
            rule += f"; the server asks to wait for {failure.wait:,.0f} s"
            hint = f"run the same command again in {failure.wait:,.0f} s: what is done is kept"
        raise ReadError(
            f"the server did not answer as it should, {self.failed} time(s)",
            where=self.where,
            value=failure.reason,
            rule=rule,
            hint=hint,
        ) from None


class Watchdog:
    """Tells a connection that drips from one that flows, and keeps the deadline."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts, self._patience = attempts, attempts.patience
        self._began, self._num_bytes = self._patience.clock(), 0

    def count(self, num_bytes: int) -> None:
        """Call with the bytes of each piece. Raises Transient on a stall."""
        self._num_bytes += num_bytes
        elapsed = self._patience.clock() - self._began
        if elapsed >= self._patience.window:
            if self._num_bytes < self._patience.least_rate * elapsed:
                raise Transient(f"only {self._num_bytes:,} bytes in {elapsed:.0f} s")
            self._began, self._num_bytes = self._patience.clock(), 0
        if self._attempts.wake.is_set():
            raise ReadError("reading was stopped", where=self._attempts.where)
        self._attempts.check_time()


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a refusal asks to wait, by ``Retry-After`` or ``ratelimit``; the longer one."""
    waits = [_retry_after(headers.get("retry-after", "").strip())]
    reset = _RESET.search(headers.get("ratelimit", ""))
    waits.append(float(reset[1]) if reset else None)
    return max((wait for wait in waits if wait is not None), default=None)


def _retry_after(text: str) -> float | None:
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0)


__all__ = ["RETRIED_STATUSES", "Attempts", "Patience", "Transient", "Watchdog", "asked_wait"]
