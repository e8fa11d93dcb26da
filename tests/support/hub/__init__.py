"""A Hub on loopback: enough of the real protocol for the real client, with faults and a log.

::

    with LoopbackHub(latency=0.05) as hub:
        hub.add_token("hf_canary", "alice")
        repo = hub.add_repo("org/name", folder)           # a folder of files, or {name: content}
        repo.commit({"config.json": b"{}"})               # -> commit hash; refs["main"] moves
        with hub_environment(monkeypatch, hub, home): ...  # what huggingface_hub reads
        hub.inject("status", on_storage("00002"), status=503, times=1)
        assert len(hub.resolves()) == 1 and hub.body_bytes("storage") < 10_000

* :mod:`.repos` -- :class:`Repo`, :class:`Commit` and blobs: in memory, on disk, generated.
* :mod:`.server` -- :class:`LoopbackHub`: two origins (``endpoint`` and ``storage``), routes, log.
* :mod:`.messages` -- :class:`Request`, :class:`Response` (``of_json``, ``error``, or a blob's
  range), :class:`LoggedRequest`.
* :mod:`.faults` -- :class:`Fault` with its kinds, and ``on_hub``, ``on_storage``.
* :mod:`.read` -- whoami, model info, tree, paths-info, refs, resolve, storage; and helpers for
  other handlers: ``find_repo`` and ``find_commit`` (access checked, or the error response),
  ``file_info``, ``sign``.
* :mod:`.write`, where present, adds what uploads: ``write.add_routes(hub)`` is called by whoever
  needs it; it extends ``hub.route(method, pattern, handler, origin=...)``.
* :mod:`.generated` -- V4 checkpoints of any size whose bytes are computed when they are asked for.
* :mod:`.environment` -- :func:`hub_environment`: points huggingface_hub, in this process and in
  its children, at a Hub and at a home of its own.
"""

from __future__ import annotations

from tests.support.hub.environment import hub_environment
from tests.support.hub.faults import Fault, on_hub, on_storage
from tests.support.hub.messages import LoggedRequest, Request, Response
from tests.support.hub.repos import Blob, Commit, FileBlob, GeneratedBlob, MemoryBlob, Repo
from tests.support.hub.server import LoopbackHub

__all__ = [
    "Blob",
    "Commit",
    "Fault",
    "FileBlob",
    "GeneratedBlob",
    "LoggedRequest",
    "LoopbackHub",
    "MemoryBlob",
    "Repo",
    "Request",
    "Response",
    "hub_environment",
    "on_hub",
    "on_storage",
]
