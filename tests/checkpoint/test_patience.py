"""How long a server is put up with, by a clock that the test holds."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from v4surgery.checkpoint.patience import Attempts, Patience, Transient, Watchdog, asked_wait
from v4surgery.errors import ReadError


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def wait(self, wake: threading.Event, seconds: float) -> bool:
        self.now += seconds
        self.waits.append(seconds)
        return wake.is_set()


def attempts(clock: Clock, jitter: float = 0.5, **options: float) -> Attempts:
    patience = Patience(wait=clock.wait, clock=lambda: clock.now, jitter=lambda: jitter, **options)
    return Attempts(patience, threading.Event(), "org/name/file")


def test_five_tries_with_doubling_waits_from_one_to_eight_seconds() -> None:
    clock = Clock()
    tries = attempts(clock)
    for _ in range(4):
        tries.pause(Transient("status 503"))
    with pytest.raises(ReadError) as caught:
        tries.pause(Transient("status 503"))
    assert clock.waits == [1, 2, 4, 8]
    assert str(caught.value) == (
        "the server did not answer as it should, 5 time(s)\n"
        "  where: org/name/file\n"
        "  value: status 503\n"
        "  rule: 5 tries, 900 s in all\n"
        "  next: run the same command again: what is done is kept"
    )


@pytest.mark.parametrize(("jitter", "waits"), [(0.0, [1, 1.5, 3, 6]), (1.0, [1.25, 2.5, 5, 8])])
def test_jitter_spreads_waits_within_their_bounds(jitter: float, waits: list[float]) -> None:
    clock = Clock()
    tries = attempts(clock, jitter)
    for _ in range(4):
        tries.pause(Transient("status 503"))
    assert clock.waits == waits


def test_wait_that_the_server_asks_for_is_the_least() -> None:
    clock = Clock()
    tries = attempts(clock)
    tries.pause(Transient("status 429", 30.0))
    tries.pause(Transient("status 429", 0.0))
    assert clock.waits == [30.5, 2]


def test_wait_that_does_not_fit_before_the_deadline_ends_the_read() -> None:
    clock = Clock()
    tries = attempts(clock, deadline=100.0)
    clock.now = 90.0
    with pytest.raises(ReadError, match=r"asks to wait for 30 s\n  next: .* again in 30 s"):
        tries.pause(Transient("status 429", 30.0))
    assert clock.waits == []


def test_waiting_ends_when_reading_is_to_end() -> None:
    clock = Clock()
    tries = attempts(clock)
    tries.wake.set()
    with pytest.raises(ReadError, match="reading was stopped"):
        tries.pause(Transient("status 503"))
    with pytest.raises(ReadError, match="reading was stopped"):
        Watchdog(tries).count(1)


def test_watchdog_lets_flow_pass_and_stops_drips() -> None:
    clock = Clock()
    tries = attempts(clock, window=20.0, least_rate=1000.0, deadline=100.0)
    dog = Watchdog(tries)
    for _ in range(8):
        clock.now += 10.0
        dog.count(10_000)
    with pytest.raises(Transient, match="only 19,999 bytes in 20 s"):
        for num_bytes in (0, 19_999):
            clock.now += 10.0
            dog.count(num_bytes)


def test_deadline_ends_a_flow_too() -> None:
    clock = Clock()
    tries = attempts(clock, deadline=100.0)
    dog = Watchdog(tries)
    clock.now = 101.0
    with pytest.raises(Transient, match="not done after 100 s"):
        dog.count(1 << 30)
    with pytest.raises(ReadError, match="1 time"):
        tries.pause(Transient("not done after 100 s"))


def http_date(seconds: float) -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "120"}, 120),
        ({"retry-after": " 0 "}, 0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "\u0664"}, 4),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"resolvers"; r=0; t=12, "api";r=3;t=1'}, 12),
        ({"ratelimit": "nonsense"}, None),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "60"}, 60),
    ],
)
def test_waits_are_read_from_the_headers(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


def test_retry_after_may_be_a_date() -> None:
    wait = asked_wait({"retry-after": http_date(90)})
    assert wait is not None and 85 < wait <= 90
    assert asked_wait({"retry-after": http_date(-90)}) == 0
