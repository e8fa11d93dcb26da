"""Pieces that are fetched before they are asked for: none over, none twice, none lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from v4surgery.checkpoint import read_ahead
from v4surgery.checkpoint.read_ahead import ReadAhead, finish
from v4surgery.errors import ReadError

DATA = bytes(range(256)) * 40


class Fetched:
    """Counts what is fetched of one file."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.error: ReadError | None = None

    def __call__(self, file: str, begin: int, end: int) -> bytes:
        assert file == "file"
        self.spans.append((begin, end))
        if self.error is not None:
            raise self.error
        return DATA[begin:end]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as started:
        yield started


def read(ahead: ReadAhead, fetched: Fetched, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    if not ahead.take("file", begin, memoryview(buffer)):
        return fetched("file", begin, end)
    return bytes(buffer)


def test_a_span_is_fetched_once_and_to_its_end_only(pool: ThreadPoolExecutor) -> None:
    fetched = Fetched()
    ahead = ReadAhead(fetched, pool)
    ahead.expect([("file", 100, 1050), ("file", 2000, 3000), ("other", 0, 5000)])
    begins = range(100, 1050, 100)
    parts = [read(ahead, fetched, begin, min(begin + 100, 1050)) for begin in begins]
    assert b"".join(parts) == DATA[100:1050]
    assert sorted(fetched.spans) == [(begin, min(begin + 100, 1050)) for begin in begins]


def test_nothing_is_fetched_ahead_that_is_not_expected(pool: ThreadPoolExecutor) -> None:
    fetched = Fetched()
    ahead = ReadAhead(fetched, pool)
    assert read(ahead, fetched, 0, 100) == DATA[:100]
    ahead.expect([("file", 500, 600)])
    for begin in (0, 400, 500, 600):
        read(ahead, fetched, begin, begin + 100)
    assert fetched.spans == [(0, 100), (0, 100), (400, 500), (500, 600), (600, 700)]


def test_pieces_that_wait_stay_within_a_bound(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_MAX_WAITING_BYTES", 250)
    fetched = Fetched()
    ahead = ReadAhead(fetched, pool)
    ahead.expect([("file", 0, 1000)])
    read(ahead, fetched, 0, 100)
    pool.shutdown()
    assert sorted(fetched.spans) == [(0, 100), (100, 200), (200, 300)]


def test_failure_of_a_piece_is_raised_where_it_is_asked_for(pool: ThreadPoolExecutor) -> None:
    fetched = Fetched()
    ahead = ReadAhead(fetched, pool)
    ahead.expect([("file", 0, 200)])
    fetched.error = ReadError("gone")
    with pytest.raises(ReadError, match="gone"):
        fetched("file", 0, 100)
    assert not ahead.take("file", 0, memoryview(bytearray(100)))
    with pytest.raises(ReadError, match="gone"):
        ahead.take("file", 100, memoryview(bytearray(100)))
    fetched.error = None
    assert read(ahead, fetched, 100, 200) == DATA[100:200]


def test_after_clearing_everything_is_fetched_anew(pool: ThreadPoolExecutor) -> None:
    fetched = Fetched()
    ahead = ReadAhead(fetched, pool)
    ahead.expect([("file", 0, 1000)])
    read(ahead, fetched, 0, 100)
    ahead.clear()
    assert not ahead.take("file", 100, memoryview(bytearray(100)))


def test_finish_waits_for_what_runs_and_drops_what_does_not() -> None:
    gate, ran = threading.Event(), []

    def fail() -> None:
        raise ReadError("first")

    def slow() -> None:
        gate.wait(5)
        ran.append("slow")

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(slow), pool.submit(fail)]
        futures += [pool.submit(slow)]
        threading.Timer(0.05, gate.set).start()
        with pytest.raises(ReadError, match="first"):
            finish(futures[1:])
        assert futures[2].cancelled() or futures[2].done()
        finish(futures[:1])
    assert ran
