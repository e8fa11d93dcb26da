"""A repository on the Hub as a parent: the same as a folder, pinned and cached."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import hf_hub_download, snapshot_download

import v4surgery as v4
from tests.cli.conftest import Run
from tests.hub.remote_support import (
    PARENT,
    data_spans,
    half,
    header_bytes,
    open_parent,
    outside,
    quick_patience,
    weights_of,
)
from tests.hub.support import TOKEN
from tests.support.hub import LoopbackHub, Repo, Response, hub_environment
from tests.support.hub.repos import Content
from tests.support.parents import INDEX_FILE
from v4surgery.checkpoint.hub_cache import MetadataCache
from v4surgery.checkpoint.remote import HubRepository
from v4surgery.errors import (
    CheckpointError,
    OutputError,
    ReadError,
    UsageError,
    V4SurgeryError,
)
from v4surgery.recipes import dump_recipe
from v4surgery.slicers.estimate import estimate_plan

SHARD = "model-00002-of-00007.safetensors"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_patience(monkeypatch)


@pytest.fixture
def repo(hub: LoopbackHub, small_parent: Path) -> Repo:
    return hub.add_repo(PARENT, small_parent)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_slice_of_a_repository_is_the_slice_of_its_folder(
    repo: Repo, small_parent: Path, tmp_path: Path
) -> None:
    with v4.open(small_parent) as folder, open_parent() as remote:
        assert remote.fingerprint == folder.fingerprint
        near = v4.slice(v4.plan(folder, half()), tmp_path / "near")
        far = v4.slice(v4.plan(remote, half()), tmp_path / "far")
        assert v4.verify(far, remote).passed
    assert weights_of(near.path) == weights_of(far.path) != {}
    for name in ("config.json", "recipe.yaml"):
        assert (near.path / name).read_bytes() == (far.path / name).read_bytes()


def test_provenance_names_repository_and_commit(repo: Repo, tmp_path: Path) -> None:
    with open_parent() as remote:
        replica = v4.slice(v4.plan(remote, half()), tmp_path / "out")
    parent = json.loads((replica.path / "v4surgery.json").read_text())["parent"]
    assert (parent["kind"], parent["name"], parent["revision"]) == (
        "hub",
        PARENT,
        repo.refs["main"],
    )


def test_a_branch_that_moves_does_not_mix_two_commits(
    repo: Repo, small_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same headers, other weights: begun, finished, and beside a commit that is only words."""

    def slice_main(out: str, revision: str | None = None) -> v4.Replica:
        with open_parent(revision) as remote:
            return v4.slice(v4.plan(remote, half()), tmp_path / out)

    first = repo.refs["main"]
    slice_main("finished")
    with monkeypatch.context() as patched:
        patched.setattr(HubRepository, "check_unchanged", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            slice_main("begun")
    repo.commit({"README.md": b"only words"})
    assert slice_main("finished").written.already_complete
    content = bytearray((small_parent / SHARD).read_bytes())
    content[-1] ^= 1
    repo.commit({SHARD: bytes(content)})
    with pytest.raises(OutputError, match="holds an unfinished run of this plan on other weights"):
        slice_main("begun")
    with pytest.raises(OutputError, match="holds the finished output of other weights"):
        slice_main("finished")
    assert not slice_main("begun", first).written.already_complete
    assert weights_of(tmp_path / "begun") == weights_of(tmp_path / "finished")


def stop(source: HubRepository) -> None:
    raise RuntimeError("stopped")


def test_opening_pins_a_commit_that_every_request_names(
    repo: Repo, hub: LoopbackHub, small_parent: Path, tmp_path: Path
) -> None:
    pinned = repo.refs["main"]
    with open_parent() as remote:
        repo.commit({SHARD: b"another one", "config.json": b"{}"})
        replica = v4.slice(v4.plan(remote, half()), tmp_path / "out")
    first, *rest = (request.path for request in hub.requests("hub"))
    assert first == f"/api/models/{PARENT}/revision/main"
    assert rest and all(path.startswith(f"/{PARENT}/resolve/{pinned}/") for path in rest)
    with v4.open(small_parent) as folder:
        assert v4.verify(replica, folder).passed


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "feature/x", "COMMIT"])
def test_revision_is_taken_after_an_at_sign_or_as_an_argument(
    revision: str, repo: Repo, hub: LoopbackHub
) -> None:
    commit = repo.refs["main"]
    repo.refs |= {"v1.0": commit, "refs/pr/1": commit, "feature/x": commit}
    repo.commit({"config.json": b"{}"})
    revision = commit if revision == "COMMIT" else revision
    for opened in (
        v4.open(PARENT, revision=revision),
        v4.open(f"{PARENT}@{revision}"),
        v4.open(f"{PARENT}@{revision}", revision=revision),
    ):
        with opened as remote:
            assert remote.source.identity()["revision"] == commit
    with pytest.raises(UsageError, match="two revisions"):
        v4.open(f"{PARENT}@{revision}", revision="main")


@pytest.mark.parametrize("revision", ["..", "a/../b", "-x", "a b", "x\n", "", "a//b", "x" * 300])
def test_what_is_no_revision_is_asked_of_nobody(
    revision: str, repo: Repo, hub: LoopbackHub
) -> None:
    with pytest.raises(UsageError, match="not a revision"):
        HubRepository(PARENT, revision)
    assert not hub.log


@pytest.mark.parametrize("name", ["a--b/c", "org/..", "org/a..b", "org/x.", "datasets/org/name"])
def test_what_is_no_repository_is_asked_of_nobody(name: str, hub: LoopbackHub) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        HubRepository(name)
    assert not hub.log


def test_second_opening_makes_one_request_and_a_commit_none(
    repo: Repo, hub: LoopbackHub, home: Path
) -> None:
    with open_parent() as first:
        expected = first.fingerprint
    hub.reset_log()
    with open_parent() as second:
        assert second.fingerprint == expected
    assert [request.path for request in hub.log] == [f"/api/models/{PARENT}/revision/main"]
    hub.reset_log()
    with open_parent(repo.refs["main"]) as third:
        assert third.fingerprint == expected
    assert not hub.log
    kept = sum(path.stat().st_size for path in (home / "assets" / "v4surgery").rglob("*.v1"))
    assert 0 < kept < 500_000


def test_torn_and_tampered_cache_files_are_fetched_again(
    repo: Repo, hub: LoopbackHub, home: Path
) -> None:
    with open_parent() as first:
        expected = first.fingerprint
    kept = sorted(path for path in (home / "assets").rglob("*.v1") if "safetensors" in path.name)
    torn, flipped, swapped, other = kept[:4]
    torn.write_bytes(torn.read_bytes()[:100])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    swapped.write_bytes(other.read_bytes())
    hub.reset_log()
    with open_parent() as second:
        assert second.fingerprint == expected
    assert len(hub.resolves()) == 3


def test_a_cache_that_cannot_be_written_is_none(repo: Repo, hub: LoopbackHub, home: Path) -> None:
    home.mkdir()
    (home / "assets").write_text("a file where the folder should be")
    for _ in range(2):
        with open_parent() as remote:
            assert remote.num_tensors


def test_cache_keeps_the_commits_used_last(
    repo: Repo, home: Path, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub
) -> None:
    cache = MetadataCache(hub.endpoint, PARENT)
    for number in range(6):
        cache.store(f"{number}" * 40, "config.json", bytes(1000))
        cache.load("0" * 40, "config.json")
    monkeypatch.setattr("v4surgery.checkpoint.hub_cache.MAX_CACHE_BYTES", 3500)
    cache.trim()
    found = [n for n in range(6) if cache.load(f"{n}" * 40, "config.json") is not None]
    assert found == [0, 4, 5]


def test_each_shard_is_resolved_once_however_many_threads_read(
    repo: Repo, hub: LoopbackHub
) -> None:
    source = HubRepository(PARENT)
    size = source.size(SHARD)
    hub.latency = 0.02
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: source.read(SHARD, i * 100, i * 100 + 100), range(32)))
    blob = repo.commits[source.commit].tree[SHARD]
    assert b"".join(parts) == blob.read(0, 3200) and size == blob.size
    assert len(hub.resolves()) == 1
    source.close()


def test_shard_by_any_name_is_read_by_ranges(
    hub: LoopbackHub, small_parent: Path, home: Path
) -> None:
    files: dict[str, Content] = {path.name: path for path in small_parent.iterdir()}
    files["weights.of.layer.0"] = files.pop(SHARD)
    index = (small_parent / INDEX_FILE).read_text().replace(SHARD, "weights.of.layer.0")
    hub.add_repo(PARENT, {**files, INDEX_FILE: index.encode()})
    with open_parent() as remote:
        ref = next(s.scale for s in remote.tensors.values() if s.scale and "of" in s.scale.file)
        hub.reset_log()
        remote.source.read(ref.file, ref.begin, ref.end)
    assert [request.range for request in hub.log] == [(ref.begin, ref.end)]
    kept = next((home / "assets").rglob("weights*.v1"))
    assert kept.stat().st_size < 10_000 < (small_parent / SHARD).stat().st_size


def test_near_rows_come_in_one_request_and_far_ones_side_by_side(
    repo: Repo, hub: LoopbackHub
) -> None:
    with open_parent() as remote:
        gap = remote.source.gap_bytes
        ref = max((s.weight for s in remote.tensors.values()), key=lambda ref: ref.shape[0])
        remote.read_rows(ref, slice(0, 1))  # so that the shard is resolved
        rows = np.asarray([5, 0, 3, 3], dtype=np.int64)
        for kind, gap_bytes in {"near": gap, "far": 2 * ref.row_bytes - 1}.items():
            remote.source.gap_bytes = gap_bytes
            hub.reset_log()
            found = remote.read_rows(ref, rows)
            blob = repo.commits[repo.refs["main"]].tree[ref.file]
            whole = blob.read(ref.begin, ref.begin + 6 * ref.row_bytes)
            wanted = np.frombuffer(whole, np.uint8).reshape(6, -1)[rows]
            assert np.array_equal(found, wanted)
            assert len(hub.log) == (1 if kind == "near" else 2)
        fetched = sorted(request.range or (0, 0) for request in hub.log)
        row = ref.row_bytes
        assert fetched == [
            (ref.begin, ref.begin + row),
            (ref.begin + 3 * row, ref.begin + 6 * row),
        ]


def test_files_in_the_users_cache_are_read_from_there(
    repo: Repo, hub: LoopbackHub, small_parent: Path, tmp_path: Path
) -> None:
    hf_hub_download(PARENT, SHARD)
    hub.reset_log()
    with open_parent() as remote, v4.open(small_parent) as folder:
        far = v4.slice(v4.plan(remote, half()), tmp_path / "far")
        assert v4.verify(far, folder).passed
    assert not hub.requests(part=SHARD)
    assert hub.requests("storage", "model-00003")


def test_cached_copy_of_another_size_is_not_used(
    repo: Repo, hub: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(hf_hub_download(PARENT, SHARD)).resolve()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-10])
    hub.reset_log()
    with caplog.at_level("WARNING", "v4surgery"), open_parent() as remote:
        assert remote.num_tensors
    assert hub.requests("storage", SHARD)
    assert "the cached copy has another size" in caplog.text


def test_cached_copy_that_changes_while_it_is_read_is_told(repo: Repo, tmp_path: Path) -> None:
    path = Path(hf_hub_download(PARENT, SHARD)).resolve()
    with open_parent() as remote:
        plan = v4.plan(remote, half())
        path.chmod(0o644)
        path.write_bytes(path.read_bytes())
        with pytest.raises(ReadError, match="changed while it was being read"):
            v4.slice(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_offline_slices_what_is_downloaded(
    repo: Repo, hub: LoopbackHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download(PARENT)
    hub_environment(monkeypatch, hub, home, offline=True)
    hub.reset_log()
    with open_parent() as remote:
        replica = v4.slice(v4.plan(remote, half()), tmp_path / "out")
        assert v4.verify(replica, remote).passed
    parent = json.loads((replica.path / "v4surgery.json").read_text())["parent"]
    assert parent["revision"] == repo.refs["main"]
    assert not hub.log


def test_offline_plans_what_was_planned_and_slices_nothing_that_is_not_there(
    repo: Repo, hub: LoopbackHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_parent() as remote:
        online, _ = estimate_plan(remote, half())
    hub_environment(monkeypatch, hub, home, offline=True)
    hub.reset_log()
    with open_parent() as remote:
        offline, _ = estimate_plan(remote, half())
        assert offline.cost == online.cost
        with pytest.raises(ReadError, match="HF_HUB_OFFLINE is set") as caught:
            v4.plan(remote, half())
    assert f"where: {PARENT}@" in str(caught.value) and f"hf download {PARENT}" in str(caught.value)
    assert not hub.log


def test_offline_without_anything_cached_is_told(
    hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_environment(monkeypatch, hub, home, offline=True)
    with pytest.raises(ReadError) as caught:
        open_parent()
    assert str(caught.value) == (
        "this is not in the cache, and the Hub may not be asked\n"
        f"  where: {PARENT}@main\n"
        "  value: HF_HUB_OFFLINE is set\n"
        "  rule: offline, everything that is needed is in the cache\n"
        f"  next: unset HF_HUB_OFFLINE, or download the repository first: hf download {PARENT}"
    )


REFUSALS = {
    "missing": ("no such repository, or none that may be read with this token", "check the name"),
    "missing, no token": ("or none that may be read without a token", "hf auth login"),
    "private": ("no such repository, or none that may be read with this token", "check the name"),
    "private, no token": ("or none that may be read without a token", "hf auth login"),
    "gated": ("access to this repository is gated", "ask for access at http"),
    "gated, no token": ("access to this repository is gated", "then log in with `hf auth login`"),
    "wrong token": ("the Hub does not accept the token", "unset HF_TOKEN for a public"),
    "no revision": ("no such revision in this repository", "/commits/main"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_told_apart(
    case: str, hub: LoopbackHub, small_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "missing" not in case:
        hub.add_repo(PARENT, small_parent, private="private" in case, gated="gated" in case)
    if "no token" in case:
        monkeypatch.delenv("HF_TOKEN")
    token = "hf_wrong" if case == "wrong token" else None
    with pytest.raises(CheckpointError) as caught:
        open_parent("v9" if case == "no revision" else None, token=token)
    what, hint = REFUSALS[case]
    assert what in str(caught.value) and hint in str(caught.value)
    assert f"where: {PARENT}@" in str(caught.value)
    assert TOKEN not in str(caught.value) and "hf_wrong" not in str(caught.value)
    assert len(hub.requests("hub")) <= 2


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_a_token_with_access_reads(kind: str, hub: LoopbackHub, small_parent: Path) -> None:
    options = {kind: True}
    hub.add_repo(PARENT, small_parent, readers={"alice"}, **options)
    token = hub.add_token("hf_alice", "alice")
    with open_parent(token=token) as remote:
        assert remote.num_tensors


@pytest.mark.parametrize("token", ["", "hf_x\n", "hf_\u00e4", "hf_\x00"])
def test_what_cannot_be_a_token_is_not_shown(token: str, hub: LoopbackHub) -> None:
    with pytest.raises(UsageError, match="not a token") as caught:
        open_parent(token=token)
    assert "hf_" not in str(caught.value)
    assert not hub.log


def test_renamed_repository_is_followed_on_the_same_server(repo: Repo, hub: LoopbackHub) -> None:
    def moved(hub: LoopbackHub, request: object, found: object) -> Response:
        path = request.path.replace("/org/old", f"/{PARENT}")  # type: ignore[attr-defined]
        query = request.query_string  # type: ignore[attr-defined]
        return Response(307, {"Location": f"{path}?{query}" if query else path})

    hub.route("GET", r"/api/models/org/old(/.*)?", moved)
    hub.route("GET", r"/org/old/.*", moved)
    with v4.open("org/old") as remote:
        assert remote.num_tensors and remote.name == "org/old"


def test_a_folder_goes_first_and_has_no_revisions(
    repo: Repo,
    hub: LoopbackHub,
    small_parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / PARENT).symlink_to(small_parent)
    with v4.open(PARENT) as opened:
        assert opened.source.identity()["kind"] == "folder"
    with pytest.raises(UsageError, match="a folder has no revisions"):
        v4.open(PARENT, revision="main")
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        v4.open("org/flesh")
    assert "if the repository on the Hub is meant: org/flesh@main" in str(caught.value)
    assert not hub.log


def test_reading_outside_a_file_or_a_closed_repository_is_refused(repo: Repo) -> None:
    source = HubRepository(PARENT)
    size = source.size(SHARD)
    for begin, end in ((-1, 4), (5, 4), (0, size + 1), (0, 1 << 62)):
        with pytest.raises(ReadError, match="not a range of this file"):
            source.read(SHARD, begin, end)
    for name in ("../x", "/etc/passwd", "a/b", ""):
        with pytest.raises(CheckpointError, match="not the name of a file"):
            source.read(name, 0, 1)
    with pytest.raises(ReadError, match="no such file in this repository"):
        source.read("model-9.safetensors", 0, 1)
    assert source.read(SHARD, 7, 7) == b""
    source.read_into(SHARD, 7, memoryview(b""))
    source.close()
    source.close()
    with pytest.raises(ReadError, match="was closed"):
        source.read(SHARD, 0, 1)


def test_plan_of_a_repository_fetches_headers_only_and_leaves_experts_open(
    repo: Repo, hub: LoopbackHub, small_parent: Path, tmp_path: Path, v4_cli: Run
) -> None:
    recipe = tmp_path / "half.yaml"
    recipe.write_text(dump_recipe(half()))
    summaries = {}
    for verb in (("plan",), ("slice", "--dry-run")):
        done = v4_cli(*verb, "--recipe", recipe, "--parent", PARENT, "--json")
        summaries[verb[0]] = json.loads(done.out)
    assert not data_spans(hub.log, header_bytes(small_parent))
    assert summaries["plan"] == summaries["slice"]
    remote = summaries["plan"]
    local = json.loads(v4_cli("plan", "-r", recipe, "-p", small_parent, "--json").out)
    assert remote.pop("plan_hash") is None and local.pop("plan_hash") is not None
    assert "which experts are kept is left open" in remote.pop("notes")[-1]
    same = remote.keys() - {"parent", "requests", "bytes_read"}
    assert {key: remote[key] for key in same} == {key: local[key] for key in same}


def test_every_verb_takes_a_repository(
    repo: Repo, hub: LoopbackHub, small_parent: Path, tmp_path: Path, v4_cli: Run
) -> None:
    recipe = tmp_path / "half.yaml"
    recipe.write_text(dump_recipe(half()))
    out = tmp_path / "out"
    assert PARENT in v4_cli("inspect", PARENT, "--revision", "main").out
    done = v4_cli("slice", "--recipe", recipe, "--parent", PARENT, "--out", out, "-q")
    assert done.code == 0 and done.out.endswith(f"next: v4surgery verify {out}\n"), done.err
    # main moves on: what is on record is the commit.
    repo.commit({SHARD: b"another one"})
    done = v4_cli("verify", out, "-q")
    assert done.code == 0 and f"verified against {PARENT}" in " ".join(done.out.split()), done.err
    hub.add_repo("org/half", out)
    assert "replica: recipe half" in v4_cli("inspect", "org/half@main").out
    done = v4_cli("verify", "org/half", "-q")
    assert done.code == 0, done.err
    done = v4_cli("trace", "org/half", "--ids", "1,2,3", "--out", tmp_path / "trace", "-q")
    assert done.code == 0, done.err
    assert not [path for path in outside(hub) if not path.startswith(("/org/half", "/api"))]


def test_verbose_tells_every_request_and_no_link(repo: Repo, hub: LoopbackHub, v4_cli: Run) -> None:
    hub.inject("status", lambda request: request.origin == "storage", status=503)
    done = v4_cli("inspect", PARENT, "-vv")
    assert f"debug: GET {PARENT}@{repo.refs['main'][:12]}/{SHARD} bytes=0-" in done.err
    assert "info: " in done.err and "status 503; try 2 of 5 in" in done.err
    assert "Signature" not in done.err and "debug" not in v4_cli("inspect", PARENT).err


@pytest.fixture
def v4_cli(cli: Run) -> Run:
    return cli


def test_errors_of_the_hub_are_all_ours(hub: LoopbackHub) -> None:
    with pytest.raises(V4SurgeryError):
        open_parent()
