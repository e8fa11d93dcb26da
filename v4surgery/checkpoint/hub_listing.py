"""Which commit a revision is, and which files it has: asked of the Hub once, or cached."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.hub_cache import MetadataCache
from v4surgery.checkpoint.hub_errors import offline_error
from v4surgery.checkpoint.hub_http import HubHttp
from v4surgery.checkpoint.source import safe_basename
from v4surgery.errors import CheckpointError, ReadError, UsageError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!.*(?:\.\.|//|/$))\w[\w./+-]{0,254}", re.ASCII)
_CONFIG_FILE = "config.json"
_LISTING, _REFS = "listing", "refs"


class RemoteFile(NamedTuple):
    """A file of the pinned commit; ``etag`` is the SHA-256 of LFS files, else git's."""

    size: int
    etag: str


class Listing(NamedTuple):
    """The pinned commit and its files at the top level."""

    commit: str
    files: Mapping[str, RemoteFile]


def check_names(repo_id: str, revision: str | None) -> None:
    """Raises UsageError unless both have the form that the Hub gives them."""
    try:
        hf_hub_url(repo_id, _CONFIG_FILE)
    except HFValidationError as error:
        raise UsageError("not the name of a repository", value=error, rule="org/name") from None
    if repo_id.count("/") != 1:
        raise UsageError("not the name of a repository", value=repo_id, rule="org/name")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageError(
            "not a revision", value=repr(revision)[:80], rule="a branch, a tag or a commit"
        )


def pin(http: HubHttp, cache: MetadataCache, repo_id: str, revision: str | None) -> Listing:
    """The commit of a revision and its files; a commit that was listed before is not asked for.

    Raises:
        CheckpointError: There is no such repository or revision, or it may not be read.
        ReadError: The Hub does not answer as it should; or offline, and it is not cached.
    """
    revision = revision or constants.DEFAULT_REVISION
    where = f"{repo_id}@{revision}"
    commit = revision if _COMMIT.fullmatch(revision) else None
    if constants.HF_HUB_OFFLINE:
        commit = commit or _cached_commit(cache, repo_id, revision)
        listing = (_cached_listing(cache, commit) or _snapshot(repo_id, commit)) if commit else None
        if listing is None:
            raise offline_error(where)
        return listing
    if commit is not None and (known := _cached_listing(cache, commit)) is not None:
        return known
    url = f"{http.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
    listing = _parse_listing(http.get_answer(f"{url}?blobs=true", where), where)
    content = json.dumps({name: list(file) for name, file in listing.files.items()})
    cache.store(listing.commit, _LISTING, content.encode())
    cache.store(_REFS, revision, listing.commit.encode())
    return listing


def snapshot_folder(repo_id: str, commit: str, names: Iterable[str]) -> Path | None:
    """The folder of a commit in the user's Hub cache, if it has one of these files."""
    for name in names:
        found = try_to_load_from_cache(
            repo_id, name, cache_dir=constants.HF_HUB_CACHE, revision=commit
        )
        if isinstance(found, str):
            return Path(found).parent
    return None


def _cached_commit(cache: MetadataCache, repo_id: str, revision: str) -> str | None:
    """The commit that a branch or tag had when it was last asked for."""
    folder = snapshot_folder(repo_id, revision, [_CONFIG_FILE])
    if folder is not None:
        return folder.name
    known = cache.load(_REFS, revision)
    return known.decode() if known is not None else None


def _cached_listing(cache: MetadataCache, commit: str) -> Listing | None:
    content = cache.load(commit, _LISTING)
    if content is None:
        return None
    return Listing(commit, {n: RemoteFile(*file) for n, file in json.loads(content).items()})


def _snapshot(repo_id: str, commit: str) -> Listing | None:
    """What the user's cache has of a commit, where nothing else is known about it."""
    folder = snapshot_folder(repo_id, commit, [_CONFIG_FILE])
    if folder is None:
        return None
    files = {}
    with LocalFolder(folder) as twin:
        for name in twin.list_files():
            with contextlib.suppress(ReadError):  # a link into blobs that are gone
                files[name] = RemoteFile(twin.size(name), "")
    return Listing(commit, files)


def _parse_listing(answer: bytes, where: str) -> Listing:
    """Commit and files out of the Hub's answer, which is not trusted to be well formed."""
    try:
        data = json.loads(answer)
        commit = data["sha"]
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"sha {commit!r}")
        files = {}
        for item in data["siblings"]:
            name, lfs = item["rfilename"], item.get("lfs") or {}
            size, etag = item.get("size", lfs.get("size")), lfs.get("sha256", item.get("blobId"))
            if type(name) is not str or type(size) is not int or size < 0:
                raise ValueError(f"file {name!r} of size {size!r}")
            with contextlib.suppress(CheckpointError):  # in a folder, or none that we would read
                file = safe_basename(name, where)
                files[file] = RemoteFile(size, etag if type(etag) is str else "")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "the Hub's description of the repository is malformed",
            where=where,
            value=f"{type(error).__name__}: {error}"[:200],
            rule="its commit, and each file with its size",
            hint="check HF_ENDPOINT",
        ) from None
    return Listing(commit, files)


__all__ = ["Listing", "RemoteFile", "check_names", "pin", "snapshot_folder"]
