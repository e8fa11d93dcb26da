"""Requests to the Hub that end in exactly the bytes asked for, or in an error that says why.

Everything goes through huggingface_hub's own client (``get_session``), endpoint and token rules.
What is added is what ranged reads of a hundred gigabytes need:

* redirects are followed here: on the endpoint itself with the token, to any other origin (the
  storage behind signed links) without it;
* ``Accept-Encoding: identity``, and an answer that is compressed all the same is dropped;
* 206 with the very ``Content-Range``, or nothing is read of the answer: a 200 would be the file;
* every failure that may pass by itself is a :class:`Transient`, see :mod:`.patience`.

Not through Xet: huggingface_hub (2.4) offers whole files by it and no ranges; its bridge serves
ranges of the same files by signed links, which is what is read here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from v4surgery.checkpoint.hub_errors import offline_error, refusal
from v4surgery.checkpoint.patience import (
    RETRIED_STATUSES,
    Attempts,
    Patience,
    Transient,
    Watchdog,
    asked_wait,
)
from v4surgery.errors import CheckpointError, UsageError
from v4surgery.redact import without_tokens
from v4surgery.version import __version__

logger = logging.getLogger("v4surgery.hub")

# The base of the transport's errors: httpx's in huggingface_hub 1, httpx2's in 2.
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]
_InvalidUrl: type[Exception] = import_module(_TransportError.__module__).InvalidURL
_MAX_REDIRECTS = 5
_MAX_ANSWER_BYTES = 64_000_000
_LINK_IS_DEAD = (401, 403, 404, 410)

T = TypeVar("T")


class LinkExpired(Exception):
    """Storage does not take the signed link; a new one may help."""


class Link(NamedTuple):
    """Where the bytes of a file are: on the endpoint, or behind a signed link to storage."""

    url: str
    is_signed: bool


class Span(NamedTuple):
    """A half-open range of a file of ``size`` bytes."""

    begin: int
    end: int
    size: int


class HubHttp:
    """GET and HEAD for one repository.

    Args:
        token: A token, False for none, None for the one that huggingface_hub finds.
        patience: For all requests.
        new_attempts: Makes the tries of one read; called with what is read.

    Raises:
        UsageError: The token could not stand in a request.
    """

    def __init__(
        self,
        token: str | bool | None,
        patience: Patience,
        new_attempts: Callable[[str], Attempts],
    ) -> None:
        if isinstance(token, str) and not (token.isascii() and token.isprintable() and token):
            raise UsageError("not a token", where="--token", rule="printable ASCII, not empty")
        self.endpoint = constants.ENDPOINT.rstrip("/")
        parts = urlsplit(self.endpoint)
        # For messages: an endpoint may have a user and a password in it.
        self.shown_endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._patience, self._new_attempts = patience, new_attempts
        headers = build_hf_headers(
            token=token, library_name="v4surgery", library_version=__version__
        )
        self._own_headers = headers | {"Accept-Encoding": "identity"}
        self._foreign_headers = {
            name: value
            for name, value in self._own_headers.items()
            if name.lower() != "authorization"
        }
        self._secret = headers.get("authorization", "").removeprefix("Bearer ")

    def clean(self, text: object) -> str:
        """A stranger's text for a message: one line, cut, and without the token."""
        line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
        return without_tokens(line, (self._secret,) if self._secret else ())[:300]

    def retrying(self, where: str, once: Callable[[Attempts], T]) -> T:
        """What ``once`` returns, called again after each Transient."""
        attempts = self._new_attempts(where)
        while True:
            try:
                return once(attempts)
            except Transient as failure:  # noqa: PERF203 - trying again is what the loop is for
                attempts.pause(failure)

    def get_answer(self, url: str, where: str) -> bytes:
        """The body of an answer of the API.

        Raises:
            CheckpointError: It is refused, or over 64 MB.
            ReadError: The server does not answer as it should.
        """

        def once(attempts: Attempts) -> bytes:
            target = url
            for _ in range(_MAX_REDIRECTS + 1):
                with self._stream("GET", target, self._own_headers, where) as response:
                    following = self._own_redirect(target, response, where)
                    if following is None:
                        self._check_status(response, where)
                        return _read_body(response, attempts)
                    target = following
            raise CheckpointError("the Hub redirects for ever", where=where)

        return self.retrying(where, lambda attempts: self._guarded(lambda: once(attempts), where))

    def resolve(self, url: str, where: str) -> tuple[Link, Mapping[str, str]]:
        """Where a file's bytes are, and the headers that describe it. One try.

        Raises:
            Transient: It may work later.
            CheckpointError: It is refused.
        """

        def once() -> tuple[Link, Mapping[str, str]]:
            target = url
            described: dict[str, str] = {}
            for _ in range(_MAX_REDIRECTS + 1):
                with self._stream("HEAD", target, self._own_headers, where) as response:
                    described = {**described, **_lowered(response.headers)}
                    location = described.pop("location", None)
                    if not 300 <= response.status_code < 400 or location is None:
                        self._check_status(response, where)
                        return Link(target, False), described
                    target = self._join(target, location, where)
                    if not self._is_own(target):
                        return Link(self._checked_storage(target, where), True), described
            raise CheckpointError("the Hub redirects for ever", where=where)

        return self._guarded(once, where)

    def read_span(
        self, link: Link, span: Span, take: Callable[[bytes], None], attempts: Attempts
    ) -> str | None:
        """Hand the bytes of a span to ``take``, piece by piece; gives the ETag. One try.

        Raises:
            LinkExpired: The link is signed, and storage does not take it.
            Transient: It may work later; what ``take`` got is right.
            CheckpointError: It is refused.
        """
        headers = self._foreign_headers if link.is_signed else self._own_headers
        headers = headers | {"Range": f"bytes={span.begin}-{span.end - 1}"}
        where = attempts.where

        def once() -> str | None:
            watchdog, left = Watchdog(attempts), span.end - span.begin
            # One storage may hand on to another; there is no token to be lost by following.
            with self._stream("GET", link.url, headers, where, follow=link.is_signed) as response:
                if link.is_signed and response.status_code in _LINK_IS_DEAD:
                    raise LinkExpired(f"status {response.status_code} from storage")
                self._check_status(response, where)
                self._check_span(response, span)
                for piece in response.iter_raw():
                    left -= len(piece)
                    if left < 0:
                        raise Transient("more bytes than were asked for")
                    take(piece)
                    watchdog.count(len(piece))
                if left:
                    raise Transient(f"ended {left:,} bytes early")
                return _etag(response.headers)

        return self._guarded(once, where)

    def _stream(
        self, method: str, url: str, headers: Mapping[str, str], where: str, *, follow: bool = False
    ) -> Any:
        logger.debug("%s %s %s", method, where, headers.get("Range", ""))
        silence = self._patience.silence
        return get_session().stream(
            method,
            url,
            headers=dict(headers),
            follow_redirects=follow,
            timeout=(silence, silence, silence, self._patience.deadline),
        )

    def _guarded(self, once: Callable[[], T], where: str) -> T:
        """``once()``, with the errors of the transport as ours; their texts may quote headers."""
        try:
            return once()
        except OfflineModeIsEnabled:
            raise offline_error(where) from None
        except _InvalidUrl as error:
            raise self._no_address(error, where) from None
        except _TransportError as error:
            reason = f"{type(error).__name__}: {self.clean(error)}".rstrip(": ")
            raise Transient(reason) from None

    def _is_own(self, url: str) -> bool:
        return _origin(url) == _origin(self.endpoint)

    def _join(self, url: str, location: str, where: str) -> str:
        try:
            target = urljoin(url, location)
            _origin(target)
        except ValueError as error:
            raise self._no_address(error, where) from None
        return target

    def _no_address(self, error: Exception, where: str) -> CheckpointError:
        return CheckpointError(
            "the Hub redirects to what is no address", where=where, value=self.clean(error)
        )

    def _own_redirect(self, url: str, response: Any, where: str) -> str | None:
        location = response.headers.get("location")
        if not 300 <= response.status_code < 400 or location is None:
            return None
        target = self._join(url, location, where)
        if not self._is_own(target):
            raise CheckpointError(
                "the Hub redirects to another server",
                where=where,
                value=self.clean("{}://{}:{}".format(*_origin(target))),
                rule=f"answers come from {self.shown_endpoint}",
            )
        return target

    def _checked_storage(self, url: str, where: str) -> str:
        scheme, wanted = urlsplit(url).scheme, urlsplit(self.endpoint).scheme
        if scheme != "https" and scheme != wanted:
            raise CheckpointError(
                "the Hub redirects to a server without encryption",
                where=where,
                value=self.clean("{}://{}:{}".format(*_origin(url))),
                rule="https",
            )
        return url

    def _check_status(self, response: Any, where: str) -> None:
        status = response.status_code
        if status in RETRIED_STATUSES:
            raise Transient(f"status {status}", asked_wait(_lowered(response.headers)))
        if status not in (200, 206):
            message = self.clean(response.headers.get("x-error-message", ""))
            code = response.headers.get("x-error-code")
            raise refusal(status, code, message, where, self.shown_endpoint, bool(self._secret))

    def _check_span(self, response: Any, span: Span) -> None:
        headers = response.headers
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise Transient(f"the bytes came encoded: {self.clean(encoding)}")
        is_whole = (span.begin, span.end) == (0, span.size)
        if response.status_code == 200 and not is_whole:
            raise Transient("status 200: the server sends the whole file instead of a range")
        length = span.end - span.begin
        if headers.get("content-length", str(length)) != str(length):
            raise Transient(f"{self.clean(headers['content-length'])} bytes instead of {length}")
        if response.status_code == 200:
            return
        found = headers.get("content-range", "")
        wanted = f"bytes {span.begin}-{span.end - 1}/"
        if found not in (f"{wanted}{span.size}", f"{wanted}*"):
            raise Transient(f"Content-Range {self.clean(found)!r} instead of {wanted}{span.size}")


def _read_body(response: Any, attempts: Attempts) -> bytes:
    watchdog, body = Watchdog(attempts), bytearray()
    for piece in response.iter_bytes():
        watchdog.count(len(piece))
        body += piece
        if len(body) > _MAX_ANSWER_BYTES:
            raise CheckpointError(
                "the Hub's answer is too long",
                where=attempts.where,
                rule=f"at most {_MAX_ANSWER_BYTES:,} bytes",
            )
    return bytes(body)


def _etag(headers: Mapping[str, str]) -> str | None:
    tag = headers.get("etag")
    return None if tag is None else str(tag).removeprefix("W/").strip('"')


def _lowered(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


__all__ = ["HubHttp", "Link", "LinkExpired", "Span"]
