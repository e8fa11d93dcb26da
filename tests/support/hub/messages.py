"""Requests and responses of the loopback Hub, and the errors that it answers with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from tests.support.hub.repos import Blob


@dataclass
class Request:
    """A request as a handler sees it.

    ``path`` is still percent-encoded and has no query; header names are in lower case; ``user``
    is None without a (valid) token.
    """

    origin: str
    method: str
    path: str
    query_string: str
    headers: Mapping[str, str]
    body: bytes
    user: str | None
    bad_token: bool

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.query_string, keep_blank_values=True)

    def json(self) -> Any:
        return json.loads(self.body)

    def ndjson(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]


@dataclass
class Response:
    """Status, headers, and either bytes or a range of a blob."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    blob: Blob | None = None
    begin: int = 0
    end: int = 0

    @property
    def length(self) -> int:
        return self.end - self.begin if self.blob is not None else len(self.body)

    @classmethod
    def of_json(cls, data: Any, status: int = 200, **headers: str) -> Response:
        return cls(
            status, {"Content-Type": "application/json", **headers}, json.dumps(data).encode()
        )

    @classmethod
    def error(cls, status: int, message: str, code: str | None = None) -> Response:
        """As the Hub says it: the message in the body and in X-Error-Message, and a code."""
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        return cls(status, headers, json.dumps({"error": message}).encode())


@dataclass
class LoggedRequest:
    """What one request asked and got; ``body_bytes`` is what was sent of the response's body."""

    origin: str
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    status: int = 0
    body_bytes: int = 0
    fault: str | None = None

    @property
    def range(self) -> tuple[int, int] | None:
        """Half-open, of a ``bytes=a-b`` header."""
        first, _, last = self.headers.get("range", "").removeprefix("bytes=").partition("-")
        return (int(first), int(last) + 1) if first and last else None

    @property
    def is_resolve(self) -> bool:
        return self.origin == "hub" and "/resolve/" in self.path

    @property
    def file(self) -> str:
        """Basename of what is asked for: of a resolve, or of what a storage link stands for."""
        return self.path.rsplit("/", 1)[-1]
