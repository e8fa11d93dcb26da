"""The endpoints of the loopback Hub that read: who am I, listings, files, storage.

Source of paths, fields, headers and error codes: the client, huggingface_hub 1.0 to 2.4.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from tests.support.hub.messages import Request, Response
from tests.support.hub.repos import Blob, Commit, Repo

if TYPE_CHECKING:
    from tests.support.hub.server import LoopbackHub

REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = rf"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"


def add_routes(hub: LoopbackHub) -> None:
    hub.route("GET", r"/api/whoami-v2", whoami)
    hub.route("GET", MODEL, model_info)
    hub.route("GET", rf"{MODEL}/revision/{REVISION}", model_info)
    hub.route("GET", rf"{MODEL}/tree/{REVISION}(?:/(?P<folder>.+))?", tree)
    hub.route("GET", rf"{MODEL}/refs", refs)
    hub.route("POST", rf"{MODEL}/paths-info/{REVISION}", paths_info)
    hub.route("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve)
    hub.route("GET", r"/stored/(?P<link>[0-9a-f]+)/[^/]+", stored, origin="storage")


def whoami(hub: LoopbackHub, request: Request, _: re.Match[str]) -> Response:
    if request.user is None:
        return Response.error(401, "Invalid username or password.")
    return Response.of_json(
        {
            "type": "user",
            "id": "0" * 24,
            "name": request.user,
            "fullname": request.user,
            "email": None,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
        }
    )


def find_repo(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Repo | Response:
    """The repository of a path, or the error that someone without access to it sees."""
    repo_id = unquote(found["repo"])
    repo = hub.repos.get(repo_id)
    if repo is None or (repo.private and request.user not in repo.readers):
        status = 404 if request.user else 401
        return Response.error(status, "Repository not found", "RepoNotFound")
    return repo


def find_commit(
    hub: LoopbackHub, request: Request, found: re.Match[str]
) -> tuple[Repo, Commit] | Response:
    """Repository and commit of a path; main where the path names no revision."""
    repo = find_repo(hub, request, found)
    if isinstance(repo, Response):
        return repo
    revision = unquote(found.groupdict().get("revision") or "main")
    commit = repo.at(revision)
    if commit is None:
        return Response.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo, commit


def model_info(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response:
    place = find_commit(hub, request, found)
    if isinstance(place, Response):
        return place
    repo, commit = place
    blobs = request.query.get("blobs", ["false"])[0].lower() == "true"
    siblings = []
    for path, blob in commit.tree.items():
        item: dict[str, Any] = {"rfilename": path}
        if blobs:
            item |= {"size": blob.size, "blobId": blob.git_sha}
            if repo.is_lfs(path, blob):
                item["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
        siblings.append(item)
    data = {
        "_id": "0" * 24,
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.repo_id.split("/")[0],
        "sha": commit.sha,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }
    return Response.of_json(data)


def tree(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response:
    place = find_commit(hub, request, found)
    if isinstance(place, Response):
        return place
    repo, commit = place
    folder = unquote(found["folder"] or "")
    prefix = folder + "/" if folder else ""
    recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
    items: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.tree.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            items.setdefault(name, {"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
        if recursive or len(parts) == 1:
            items[path] = file_info(repo, path, blob)
    if folder and not items:
        return Response.error(404, f"{folder} does not exist", "EntryNotFound")
    return Response.of_json(list(items.values()))


def paths_info(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response:
    place = find_commit(hub, request, found)
    if isinstance(place, Response):
        return place
    repo, commit = place
    if "json" in request.headers.get("content-type", ""):
        paths = request.json()["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    return Response.of_json(
        [file_info(repo, path, commit.tree[path]) for path in paths if path in commit.tree]
    )


def file_info(repo: Repo, path: str, blob: Blob) -> dict[str, Any]:
    """A file as tree and paths-info describe it."""
    item: dict[str, Any] = {"type": "file", "oid": blob.git_sha, "size": blob.size, "path": path}
    if repo.is_lfs(path, blob):
        item["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return item


def refs(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response:
    repo = find_repo(hub, request, found)
    if isinstance(repo, Response):
        return repo
    branches, pulls = [], []
    for name, sha in repo.refs.items():
        is_pull = name.startswith("refs/pr/")
        ref = name if is_pull else f"refs/heads/{name}"
        (pulls if is_pull else branches).append({"name": name, "ref": ref, "targetCommit": sha})
    return Response.of_json(
        {"branches": branches, "tags": [], "converts": [], "pullRequests": pulls}
    )


def resolve(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response:
    place = find_commit(hub, request, found)
    if isinstance(place, Response):
        return place
    repo, commit = place
    if repo.gated and request.user not in repo.readers:
        message = f"Access to model {repo.repo_id} is restricted"
        if request.user is None:
            message += ". You must have access to it and be authenticated to access it."
            return Response.error(401, message + " Please log in.", "GatedRepo")
        message += " and you are not in the authorized list."
        return Response.error(403, message + " Ask for access.", "GatedRepo")
    path = unquote(found["path"])
    blob = commit.tree.get(path)
    if blob is None:
        return Response.error(404, "Entry not found", "EntryNotFound")
    headers = {
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{repo.etag(path, blob)}"',
        "Accept-Ranges": "bytes",
    }
    if not repo.is_lfs(path, blob):
        return ranged(request, blob, headers)
    headers |= {
        "X-Linked-Etag": f'"{blob.sha256}"',
        "X-Linked-Size": str(blob.size),
        "Location": sign(hub, path, blob),
    }
    return Response(302, headers, b"Found. Redirecting")


def sign(hub: LoopbackHub, path: str, blob: Blob) -> str:
    """A link to storage that works until :meth:`LoopbackHub.expire_links`."""
    link = secrets.token_hex(8)
    with hub.lock:
        hub.links[link] = blob
    name = quote(path.rsplit("/", 1)[-1])
    return f"{hub.storage}/stored/{link}/{name}?X-Amz-Expires=3600&X-Amz-Signature={link}"


def stored(hub: LoopbackHub, request: Request, found: re.Match[str]) -> Response:
    with hub.lock:
        blob = hub.links.get(found["link"])
    if "authorization" in request.headers:
        return Response(400, {}, b"Only one auth mechanism allowed")
    if blob is None:
        return Response(403, {"Content-Type": "application/xml"}, b"<Code>AccessDenied</Code>")
    return ranged(request, blob, {"ETag": f'"{blob.sha256[:32]}"', "Accept-Ranges": "bytes"})


def ranged(request: Request, blob: Blob, headers: dict[str, str]) -> Response:
    """A file, whole or the range that was asked for."""
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if wanted is None or not (wanted[1] or wanted[2]):
        return Response(200, headers, blob=blob, end=blob.size)
    if wanted[1]:
        begin = int(wanted[1])
        end = min(int(wanted[2]) + 1, blob.size) if wanted[2] else blob.size
    else:
        begin, end = max(blob.size - int(wanted[2]), 0), blob.size
    if begin >= end:
        return Response(416, headers | {"Content-Range": f"bytes */{blob.size}"})
    span = {"Content-Range": f"bytes {begin}-{end - 1}/{blob.size}"}
    return Response(206, headers | span, blob=blob, begin=begin, end=end)
