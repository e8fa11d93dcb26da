"""The server of the loopback Hub: two origins, a routing table, a log, faults, latency.

:class:`LoopbackHub` listens on two ports of 127.0.0.1: ``endpoint`` (what HF_ENDPOINT names) and
``storage`` (another origin, where links to large files lead, as on the real Hub). A request goes
to the first route whose method and pattern match::

    hub.route("POST", r"/api/repos/create", create)          # on the endpoint
    hub.route("PUT", r"/upload/(?P<oid>[0-9a-f]+)", upload, origin="storage")

    def create(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response: ...

Patterns match the whole path, percent-encoded and without the query. Handlers run in the threads
of the server; whatever they change they change under ``hub.lock`` (reentrant). Repositories are
``hub.repos[repo_id]``; tokens are ``hub.tokens[token] -> user``.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.support.hub import read
from tests.support.hub.faults import Fault
from tests.support.hub.messages import LoggedRequest, Request, Response
from tests.support.hub.repos import Blob, Content, Repo

HUB, STORAGE = "hub", "storage"
Handler = Callable[["LoopbackHub", Request, "re.Match[str]"], Response]
_PIECE = 1 << 16


class LoopbackHub:
    """A Hub on loopback; a context manager that starts and stops it.

    Attributes:
        repos: Repositories by id.
        tokens: User by token; a token that is not here is refused with 401.
        latency: Seconds slept before each answer.
        bandwidth: Bytes a second of each answer's body, or None.
        log: Every request in order of arrival.
        links: What the signed links of storage stand for.
    """

    def __init__(self, *, latency: float = 0.0, bandwidth: float | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.latency, self.bandwidth = latency, bandwidth
        self.log: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self.links: dict[str, Blob] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._routes: list[tuple[str, str, re.Pattern[str], Handler]] = []
        read.add_routes(self)
        self._servers = {origin: _Server(self, origin) for origin in (HUB, STORAGE)}
        self.endpoint = self._servers[HUB].url
        self.storage = self._servers[STORAGE].url

    def __enter__(self) -> LoopbackHub:
        for server in self._servers.values():
            server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.stop()

    def route(self, method: str, pattern: str, handler: Handler, *, origin: str = HUB) -> None:
        """Adds a handler; routes added later come first, so that they can replace others."""
        self._routes.insert(0, (origin, method, re.compile(pattern), handler))

    def add_repo(
        self, repo_id: str, files: Mapping[str, Content] | Path | None = None, **options: Any
    ) -> Repo:
        """A repository with one commit on main: a folder of plain files, or content by name."""
        repo = Repo(repo_id, **options)
        if isinstance(files, Path):
            files = {path.name: path for path in sorted(files.iterdir()) if path.is_file()}
        repo.commit(files or {}, title="initial commit")
        self.repos[repo_id] = repo
        return repo

    def add_token(self, token: str, user: str) -> str:
        self.tokens[token] = user
        return token

    def inject(self, kind: str, on: Callable[[LoggedRequest], bool], **options: Any) -> Fault:
        """Adds a fault; see :class:`~tests.support.hub.faults.Fault`."""
        fault = Fault(kind, on, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def expire_links(self) -> None:
        """Storage refuses every link that was given out so far with 403."""
        with self.lock:
            self.links.clear()

    def reset_log(self) -> None:
        with self.lock:
            self.log.clear()

    def requests(self, origin: str | None = None, part: str = "") -> list[LoggedRequest]:
        """Logged requests to an origin whose path contains ``part``."""
        with self.lock:
            return [r for r in self.log if origin in (None, r.origin) and part in r.path]

    def resolves(self) -> list[LoggedRequest]:
        return [r for r in self.requests(HUB) if r.is_resolve]

    def body_bytes(self, origin: str | None = None) -> int:
        """Bytes of all bodies that were sent."""
        return sum(r.body_bytes for r in self.requests(origin))

    def answer(self, request: Request) -> Response:
        if request.bad_token:
            return Response.error(401, "Invalid credentials in Authorization header")
        for origin, method, pattern, handler in self._routes:
            methods = ("GET", "HEAD") if method == "GET" else (method,)
            found = pattern.fullmatch(request.path) if request.method in methods else None
            if origin == request.origin and found is not None:
                return handler(self, request, found)
        return Response.error(404, f"no route for {request.method} {unquote(request.path)}")

    def fault_of(self, logged: LoggedRequest) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.applies(logged)), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, hub: LoopbackHub, origin: str) -> None:
        self.hub, self.origin = hub, origin
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):  # keep-alive connections would wait for ever
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Dropped(Exception):
    """The connection ends here."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        logged = LoggedRequest(self.server.origin, self.command, path, query, headers)
        body = self._read_body(headers)
        with hub.lock:
            hub.log.append(logged)
        if hub.latency:
            hub.closing.wait(hub.latency)
        fault = hub.fault_of(logged)
        logged.fault = fault.kind if fault else None
        if fault is not None and fault.kind == "reset":
            self._drop()
            return
        if fault is not None and fault.kind == "status":
            response = Response(fault.status, dict(fault.headers), b"out of order\n")
        else:
            token = headers.get("authorization", "").removeprefix("Bearer ")
            user = hub.tokens.get(token)
            bad = bool(token) and user is None and self.server.origin == HUB
            if fault is not None and fault.kind == "ignore_range":
                headers = {name: value for name, value in headers.items() if name != "range"}
            response = hub.answer(
                Request(self.server.origin, self.command, path, query, headers, body, user, bad)
            )
        with contextlib.suppress(_Dropped, OSError):
            self._send(response, logged, fault)
            return
        self._drop()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, response: Response, logged: LoggedRequest, fault: Fault | None) -> None:
        response = _spoilt(response, fault)
        logged.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.status not in (204, 304) and "Content-Length" not in response.headers:
            self.send_header("Content-Length", str(response.length))
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return
        for piece in self._pieces(response, fault):
            logged.body_bytes += piece

    def _pieces(self, response: Response, fault: Fault | None) -> Iterator[int]:
        """Sends the body piece by piece; yields how many bytes each had."""
        hub, end = self.server.hub, response.length
        kind = fault.kind if fault else None
        if fault is not None and kind in ("cut", "stall"):
            end = min(fault.after, end)
        step = 1 if kind == "trickle" else _PIECE if hub.bandwidth else 1 << 22
        fd = response.blob.open_fd() if response.blob is not None else None
        try:
            for begin in range(0, end, step):
                size = min(step, end - begin)
                self._write(response, fd, begin, size)
                yield size
                pause = fault.seconds if fault and kind == "trickle" else 0.0
                pause += size / hub.bandwidth if hub.bandwidth else 0.0
                if pause and hub.closing.wait(pause):
                    raise _Dropped
        finally:
            if fd is not None:
                os.close(fd)
        if fault is not None and kind == "stall":
            self._wait_for_client(fault.seconds)
        if kind in ("cut", "stall"):
            raise _Dropped

    def _write(self, response: Response, fd: int | None, begin: int, size: int) -> None:
        if response.blob is None:
            self.wfile.write(response.body[begin : begin + size])
        elif fd is None:
            at = response.begin + begin
            self.wfile.write(response.blob.read(at, at + size))
        else:
            done = 0
            while done < size:
                at = response.begin + begin + done
                sent = os.sendfile(self.connection.fileno(), fd, at, size - done)
                if not sent:
                    raise _Dropped
                done += sent
        self.wfile.flush()

    def _wait_for_client(self, seconds: float) -> None:
        """Silence, until the client gives up, the time is over, or the Hub closes."""
        deadline = time.monotonic() + seconds
        self.connection.settimeout(0.02)
        while time.monotonic() < deadline and not self.server.hub.closing.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    return

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _spoilt(response: Response, fault: Fault | None) -> Response:
    kind = fault.kind if fault else None
    headers = response.headers
    content_range = headers.get("Content-Range", "bytes 0-0/1")
    if kind == "compress":
        blob, begin, end = response.blob, response.begin, response.end
        body = blob.read(begin, end) if blob is not None else response.body
        return Response(
            response.status, headers | {"Content-Encoding": "gzip"}, gzip.compress(body, 1)
        )
    if kind == "wrong_range":
        span, _, size = content_range.removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        response.headers = headers | {"Content-Range": f"bytes {int(first) + 1}-{last}/{size}"}
    if kind == "wrong_size":
        response.headers = headers | {"Content-Range": content_range + "1"}
    if fault is not None and kind == "headers":
        response.headers = headers | dict(fault.headers)
    return response
