"""The endpoints of the loopback Hub that write: repositories, uploads, commits, pull requests.

::

    writes = write.add_routes(hub)
    writes.members["org"] = {"alice"}           # who may write there, besides "org" itself
    ...
    assert writes.stored_bytes == 0             # what reached storage since writes.reset()
    assert writes.commits[-1].files == [...]    # the lines of a commit, as the client sent them

An upload goes as on the real Hub: ``preupload`` says which files are LFS and what is there
already; the LFS ``batch`` gives a signed link for each object that storage does not have; the
client PUTs it there (whole, or in parts of ``part_bytes``, which a POST then completes) and has it
``verified``; the ``commit`` names the objects. Storage refuses bytes that do not have the digest
that they were announced under, and a commit refuses objects that storage does not have.

Source of paths, fields, headers and status codes: the client, huggingface_hub 1.0 to 2.4.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml

from tests.support.hub.messages import Request, Response
from tests.support.hub.read import MODEL, REPO, REVISION, find_commit, find_repo
from tests.support.hub.repos import LFS_BYTES, LFS_SUFFIXES, Blob, Content, MemoryBlob, Repo
from tests.support.hub.server import LoopbackHub

Found = re.Match[str]

_FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass
class SentCommit:
    """A commit as the client sent it."""

    repo_id: str
    revision: str
    create_pr: bool
    header: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def files(self) -> list[str]:
        """Paths of what it adds, in the order sent."""
        return [line["value"]["path"] for line in self.lines if line["key"] in ("file", "lfsFile")]

    @property
    def deleted(self) -> list[str]:
        return [line["value"]["path"] for line in self.lines if line["key"] == "deletedFile"]


@dataclass
class Upload:
    """A link that was signed for one object."""

    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class Writes:
    """What the write endpoints hold, and what reached them.

    Attributes:
        members: Users who may write in a namespace that is not their own.
        objects: Bytes of every LFS object in storage, by SHA-256.
        commits: Every commit that was accepted.
        created: Bodies of the repositories created.
        stored: SHA-256 of every object that was stored, in order, as often as it was.
        stored_bytes: Bytes of the objects and parts that reached storage.
        part_bytes: Larger objects go up in parts of so many bytes; None: none do.
        lose_answer: So many commits are made, and their answers are errors 504.
    """

    def __init__(self) -> None:
        self.members: dict[str, set[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, Upload] = {}
        self.commits: list[SentCommit] = []
        self.created: list[dict[str, Any]] = []
        self.part_bytes: int | None = None
        self.lose_answer = 0
        self.stored: list[str] = []
        self.stored_bytes = 0

    def reset(self) -> None:
        """Forgets what was sent, not what is stored."""
        self.commits, self.created, self.stored, self.stored_bytes = [], [], [], 0

    def may_write(self, namespace: str, user: str | None) -> bool:
        return user is not None and user in {namespace, *self.members.get(namespace, ())}


def add_routes(hub: LoopbackHub) -> Writes:
    """Adds what uploads to a Hub."""
    writes = Writes()

    def on(method: str, pattern: str, handler: Any, origin: str = "hub") -> None:
        hub.route(method, pattern, lambda _, request, found: handler(request, found), origin=origin)

    routes = _Routes(hub, writes)
    on("POST", r"/api/repos/create", routes.create)
    on("POST", r"/api/validate-yaml", routes.validate_yaml)
    on("POST", rf"{MODEL}/preupload/{REVISION}", routes.preupload)
    on("POST", rf"/{REPO}\.git/info/lfs/objects/batch", routes.batch)
    on("POST", rf"/{REPO}\.git/info/lfs/objects/verify", routes.verify)
    on("PUT", r"/upload/(?P<link>\w+)(?:/(?P<part>\d+))?", routes.upload, "storage")
    on("POST", r"/api/complete/(?P<link>\w+)", routes.complete)
    on("POST", rf"{MODEL}/commit/{REVISION}", routes.commit)
    on("POST", rf"{MODEL}/branch/(?P<branch>[^/]+)", routes.branch)
    on("GET", rf"{MODEL}/discussions", routes.discussions)
    return writes


class _Routes:
    def __init__(self, hub: LoopbackHub, writes: Writes) -> None:
        self.hub, self.writes = hub, writes

    def create(self, request: Request, _: Found) -> Response:
        body = request.json()
        if request.user is None:
            return Response.error(401, "Invalid username or password.")
        namespace: str = body.get("organization") or request.user
        if not self.writes.may_write(namespace, request.user):
            rights = f"You don't have the rights to create a model under the namespace {namespace}"
            return Response.error(403, rights)
        repo_id = f"{namespace}/{body['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                data = {"error": "You already created this model repo", "url": url}
                return Response.of_json(data, 409)
            private = body.get("visibility") == "private" or body.get("private") is True
            readers = {request.user, *self.writes.members.get(namespace, ())}
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            self.hub.add_repo(
                repo_id, {".gitattributes": attributes}, private=private, readers=readers
            )
            self.writes.created.append(body)
        return Response.of_json({"url": url, "name": repo_id, "id": "0" * 24})

    def validate_yaml(self, request: Request, _: Found) -> Response:
        found = _FRONT_MATTER.match(request.json()["content"])
        if found is None:
            message = "empty or missing yaml metadata in repo card"
            return Response.of_json({"errors": [], "warnings": [{"message": message}]})
        errors = []
        try:
            data = yaml.safe_load(found[2])
            relation = data.get("base_model_relation", "finetune")
            if relation not in _RELATIONS:
                errors.append({"message": f'"base_model_relation" must be one of {_RELATIONS}'})
            if not isinstance(data.get("license", ""), str):
                errors.append({"message": '"license" must be a string'})
        except (yaml.YAMLError, AttributeError) as error:
            errors.append({"message": str(error)})
        return Response.of_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, request: Request, found: Found) -> Response:
        is_pull = _creates_pull(request)
        place = self._writable(request, found, only_read=is_pull)
        if isinstance(place, Response):
            return place
        at = find_commit(self.hub, request, found)
        if isinstance(at, Response):
            return at
        files = []
        for item in request.json()["files"]:
            path, is_lfs = item["path"], _is_lfs(item["path"], item["size"])
            there = at[1].tree.get(path)
            answer = {
                "path": path,
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": False,
            }
            if there is not None:
                answer["oid"] = there.sha256 if is_lfs else there.git_sha
            files.append(answer)
        return Response.of_json({"files": files, "commitOid": at[1].sha})

    def batch(self, request: Request, found: Found) -> Response:
        # Without a ref (a pull request is to come) reading is enough.
        body = request.json()
        place = self._writable(request, found, only_read="ref" not in body)
        if isinstance(place, Response):
            return place
        assert body["operation"] == "upload" and body["hash_algo"] == "sha256", body
        objects = [self._actions(place, item) for item in body["objects"]]
        return Response.of_json({"transfer": "basic", "objects": objects})

    def _actions(self, repo: Repo, item: dict[str, Any]) -> dict[str, Any]:
        oid, size = item["oid"], item["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        with self.hub.lock:
            if oid in self.writes.objects or _is_committed(self.hub, oid):
                return answer
            link = secrets.token_hex(8)
            self.writes.uploads[link] = Upload(oid, size)
        signed = f"{self.hub.storage}/upload/{link}"
        verify = f"{self.hub.endpoint}/{repo.repo_id}.git/info/lfs/objects/verify"
        upload: dict[str, Any] = {"href": f"{signed}?X-Amz-Signature={link}"}
        part_bytes = self.writes.part_bytes
        if part_bytes is not None and size > part_bytes:
            numbers = range(1, -(-size // part_bytes) + 1)
            header = {f"{n:05d}": f"{signed}/{n}?X-Amz-Signature={link}" for n in numbers}
            upload = {
                "href": f"{self.hub.endpoint}/api/complete/{link}",
                "header": header | {"chunk_size": str(part_bytes)},
            }
        answer["authenticated"] = True
        answer["actions"] = {"upload": upload, "verify": {"href": verify}}
        return answer

    def upload(self, request: Request, found: Found) -> Response:
        upload = self.writes.uploads.get(found["link"])
        if upload is None or "authorization" in request.headers:
            return Response(403, {"Content-Type": "application/xml"}, b"<Code>AccessDenied</Code>")
        with self.hub.lock:
            self.writes.stored_bytes += len(request.body)
            if found["part"] is None:
                return self._keep(upload, request.body)
            upload.parts[int(found["part"])] = request.body
        return Response(200, {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def complete(self, request: Request, found: Found) -> Response:
        upload = self.writes.uploads.get(found["link"])
        if upload is None:
            return Response.error(404, "no such upload")
        parts = request.json()["parts"]
        etags = [f'"{hashlib.md5(upload.parts[p["partNumber"]]).hexdigest()}"' for p in parts]
        if etags != [part["etag"] for part in parts]:
            return Response.error(400, "an ETag is not the part's")
        with self.hub.lock:
            return self._keep(upload, b"".join(upload.parts[n] for n in sorted(upload.parts)))

    def _keep(self, upload: Upload, content: bytes) -> Response:
        if len(content) != upload.size or hashlib.sha256(content).hexdigest() != upload.oid:
            return Response(400, {"Content-Type": "application/xml"}, b"<Code>BadDigest</Code>")
        self.writes.objects[upload.oid] = content
        self.writes.stored.append(upload.oid)
        return Response(200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def verify(self, request: Request, found: Found) -> Response:
        place = find_repo(self.hub, request, found)
        if isinstance(place, Response):
            return place
        body = request.json()
        content = self.writes.objects.get(body["oid"])
        if content is None or len(content) != body["size"]:
            return Response.error(404, "the object was not uploaded")
        return Response.of_json({})

    def commit(self, request: Request, found: Found) -> Response:
        is_pull, revision = _creates_pull(request), unquote(found["revision"])
        place = self._writable(request, found, only_read=is_pull)
        if isinstance(place, Response):
            return place
        header, *lines = request.ndjson()
        assert header["key"] == "header", header
        with self.hub.lock:
            at = find_commit(self.hub, request, found)
            if isinstance(at, Response):
                return at
            wanted = header["value"].get("parentCommit")
            if wanted not in (None, at[1].sha):
                return Response.error(
                    412, "A commit has happened since. Please refresh and try again."
                )
            changes = self._changes(at[1].tree, lines)
            if isinstance(changes, Response):
                return changes
            title = header["value"]["summary"]
            answer = self._made(place, changes, revision, title, request.user if is_pull else None)
            sent = SentCommit(place.repo_id, revision, is_pull, header["value"], lines)
            self.writes.commits.append(sent)
            if self.writes.lose_answer:
                self.writes.lose_answer -= 1
                return Response(504, {"Content-Type": "text/html"}, b"<html>Gateway Timeout</html>")
        return Response.of_json(answer)

    def _changes(
        self, tree: Any, lines: list[dict[str, Any]]
    ) -> dict[str, Content | None] | Response:
        changes: dict[str, Content | None] = {}
        for line in lines:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "deletedFile":
                if path not in tree:
                    message = f"A file with this name doesn't exist: {path}"
                    return Response.error(404, message, "EntryNotFound")
                changes[path] = None
            elif line["key"] == "file":
                try:
                    changes[path] = base64.b64decode(value["content"], validate=True)
                except binascii.Error:
                    return Response.error(400, f"not base64: {path}")
            else:
                assert line["key"] == "lfsFile" and value["algo"] == "sha256", line
                blob = self._object(value["oid"])
                if blob is None:
                    return Response.error(400, f"LFS object {value['oid']} of {path} is not there")
                changes[path] = blob
        return changes

    def _object(self, oid: str) -> Blob | None:
        if oid in self.writes.objects:
            return MemoryBlob(self.writes.objects[oid])
        return _committed(self.hub).get(oid)

    def _made(
        self,
        repo: Repo,
        changes: dict[str, Content | None],
        revision: str,
        title: str,
        author: str | None,
    ) -> dict[str, Any]:
        ref = revision
        answer: dict[str, Any] = {"success": True}
        if author is not None:
            number = len(repo.pull_requests) + 1
            ref = f"refs/pr/{number}"
            pull = {"num": number, "title": title, "author": author, "status": "open"}
            repo.pull_requests.append(pull)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo.repo_id}/discussions/{number}"
        sha = repo.commit(changes, title=title, ref=ref, base=revision)
        url = f"{self.hub.endpoint}/{repo.repo_id}/commit/{sha}"
        return answer | {"commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def branch(self, request: Request, found: Found) -> Response:
        place = self._writable(request, found)
        if isinstance(place, Response):
            return place
        name, start = unquote(found["branch"]), request.json().get("startingPoint", "main")
        with self.hub.lock:
            if name in place.refs:
                return Response.error(409, f"Reference already exists: refs/heads/{name}")
            at = place.at(start)
            if name.startswith("refs/") or at is None:
                return Response.error(400, f"Invalid reference for a branch: {name}")
            place.refs[name] = at.sha
        return Response.of_json({"success": True})

    def discussions(self, request: Request, found: Found) -> Response:
        place = find_repo(self.hub, request, found)
        if isinstance(place, Response):
            return place
        items = [
            {
                "num": pull["num"],
                "title": pull["title"],
                "author": {"name": pull["author"]},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": pull["status"],
                "repo": {"name": place.repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for pull in reversed(place.pull_requests)
            if request.query.get("status", ["all"])[0] != "open" or pull["status"] == "open"
        ]
        return Response.of_json({"discussions": items, "count": len(items), "start": 0})

    def _writable(
        self, request: Request, found: Found, *, only_read: bool = False
    ) -> Repo | Response:
        place = find_repo(self.hub, request, found)
        if isinstance(place, Response):
            return place
        if request.user is None:
            return Response.error(401, "Invalid username or password.")
        if only_read or self.writes.may_write(place.repo_id.split("/")[0], request.user):
            return place
        return Response.error(403, "Forbidden: you need write access to this repository")


def _creates_pull(request: Request) -> bool:
    return request.query.get("create_pr", ["0"])[0] == "1"


def _is_lfs(path: str, size: int) -> bool:
    return size > LFS_BYTES or path.endswith(LFS_SUFFIXES)


def _committed(hub: LoopbackHub) -> dict[str, Blob]:
    """Every LFS file of every commit, by SHA-256: storage has what repositories were made with."""
    return {
        blob.sha256: blob
        for repo in hub.repos.values()
        for commit in repo.commits.values()
        for path, blob in commit.tree.items()
        if repo.is_lfs(path, blob)
    }


def _is_committed(hub: LoopbackHub, oid: str) -> bool:
    return oid in _committed(hub)


__all__ = ["SentCommit", "Upload", "Writes", "add_routes"]
