"""Faults that a loopback Hub injects into requests that match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.support.hub.messages import LoggedRequest

KINDS = (
    "status",  # answers with ``status`` and ``headers`` instead
    "reset",  # closes the connection without an answer
    "cut",  # right headers, then only ``after`` bytes of the body, then a closed connection
    "stall",  # right headers, ``after`` bytes of the body, then silence for ``seconds``
    "trickle",  # right headers, then a byte every ``seconds``
    "ignore_range",  # 200 and the whole file
    "compress",  # gzip, and says so
    "wrong_range",  # a Content-Range other than the one asked for
    "wrong_size",  # a Content-Range with another size of the file
    "headers",  # the right answer with ``headers`` set over it
)


@dataclass
class Fault:
    """One kind of misbehaviour.

    Args:
        kind: One of :data:`KINDS`.
        on: Whether a request is met by it.
        times: So many requests, then no more; None: every one.
        skip: Leave so many matching requests alone first.
    """

    kind: str
    on: Callable[[LoggedRequest], bool]
    times: int | None = 1
    skip: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0
    seconds: float = 5.0
    met: int = 0

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def applies(self, request: LoggedRequest) -> bool:
        """Whether this request is to suffer; counts it if so. The caller holds the lock."""
        if (self.times is not None and self.met >= self.times) or not self.on(request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.met += 1
        return True


def on_hub(part: str = "", method: str | None = None) -> Callable[[LoggedRequest], bool]:
    """Requests to the endpoint whose path contains ``part``."""
    return lambda r: r.origin == "hub" and part in r.path and method in (None, r.method)


def on_storage(part: str = "") -> Callable[[LoggedRequest], bool]:
    """Requests to storage for files whose name contains ``part``."""
    return lambda r: r.origin == "storage" and part in r.path
