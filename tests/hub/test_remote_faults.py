"""What a server can do wrong, once and for good: recovered, or told; and nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import v4surgery as v4
from tests.cli.conftest import Run
from tests.hub.remote_support import (
    PARENT,
    half,
    open_parent,
    outside,
    quick_patience,
    weights_of,
)
from tests.hub.support import TOKEN
from tests.support import parents
from tests.support.hub import (
    LoggedRequest,
    LoopbackHub,
    Repo,
    Request,
    Response,
    hub_environment,
    on_hub,
    on_storage,
)
from v4surgery.checkpoint.hub_http import HubHttp
from v4surgery.checkpoint.patience import Attempts, Patience
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.remote import HubRepository
from v4surgery.errors import CheckpointError, ReadError
from v4surgery.recipes import dump_recipe

SHARD = "model-00002-of-00005.safetensors"
RECIPE = half(layers={"count": 2, "compress_ratios": [0, 4]})

On = Callable[[LoggedRequest], bool]


def shorten_silence(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where silence is the fault: elsewhere a busy machine may well be silent so long."""
    if case.kind == "stall":
        quick_patience(monkeypatch, silence=0.2)


class Case(NamedTuple):
    """A fault, and what is said when it does not go away."""

    kind: str
    on: On
    says: str
    options: dict[str, Any]
    passes: int = 3


def in_data(request: LoggedRequest) -> bool:
    """Ranges of tensors, not of headers."""
    return request.origin == "storage" and request.range is not None and request.range[0] > 0


RESOLVE = on_hub("/resolve/", method="HEAD")
LISTING = on_hub("/api/models/")

DATA_FAULTS = {
    "500": Case("status", in_data, "status 500", {"status": 500}),
    "503 with Retry-After": Case(
        "status", in_data, "status 503", {"status": 503, "headers": {"Retry-After": "3"}}
    ),
    "429": Case("status", in_data, "status 429", {"status": 429}),
    "429 with ratelimit": Case(
        "status",
        in_data,
        "status 429",
        {"status": 429, "headers": {"ratelimit": '"resolvers";r=0;t=9'}},
    ),
    "408": Case("status", in_data, "status 408", {"status": 408}),
    "reset": Case("reset", in_data, "disconnected", {}),
    "cut short": Case("cut", in_data, "", {"after": 30}),
    "stall": Case("stall", in_data, "Timeout", {"after": 30, "seconds": 4.0}),
    "range ignored": Case("ignore_range", in_data, "status 200", {}),
    "compressed": Case("compress", in_data, "encoded: gzip", {}),
    "other range": Case("wrong_range", in_data, "Content-Range", {}),
    "other size": Case("wrong_size", in_data, "Content-Range", {}),
    "too much": Case(
        "headers", in_data, "bytes instead of", {"headers": {"Content-Length": "9999999"}}
    ),
    "expired link": Case("status", in_data, "storage refuses the signed link", {"status": 403}),
    "link is gone": Case("status", in_data, "storage refuses the signed link", {"status": 404}),
}
RESOLVE_FAULTS = {
    "resolve 500": Case("status", RESOLVE, "status 500", {"status": 500}),
    "resolve 429": Case("status", RESOLVE, "status 429", {"status": 429}),
    "resolve reset": Case("reset", RESOLVE, "disconnected", {}),
}
LISTING_FAULTS = {
    "listing 503": Case("status", LISTING, "status 503", {"status": 503}),
    "listing 429": Case("status", LISTING, "status 429", {"status": 429}),
    "listing reset": Case("reset", LISTING, "disconnected", {}),
    "listing cut short": Case("cut", LISTING, "", {"after": 30}),
    "listing stall": Case("stall", LISTING, "Timeout", {"after": 30, "seconds": 4.0}),
}
OPEN_FAULTS = RESOLVE_FAULTS | LISTING_FAULTS


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return quick_patience(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent of two layers: many tests cut it."""
    changes = {**parents.SMALL, "num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}
    return parents.write_parent(tmp_path_factory.mktemp("two") / "layers", changes=changes)


@pytest.fixture
def repo(hub: LoopbackHub, folder: Path) -> Repo:
    return hub.add_repo(PARENT, folder)


class Undisturbed(NamedTuple):
    """What a slice gives and asks for when nothing goes wrong."""

    weights: dict[str, bytes]
    num_requests: int


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The weights come from the folder, the requests to storage (headers cached) from a Hub."""
    out = tmp_path_factory.mktemp("undisturbed")
    with v4.open(folder) as parent:
        weights = cut(parent, out / "near")
    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as hub:
        hub_environment(patch, hub, out / "home")
        hub.add_repo(PARENT, folder)
        with open_parent() as parent:
            hub.reset_log()
            assert cut(parent, out / "far", workers=1) == weights
            return Undisturbed(weights, len(hub.requests("storage")))


@pytest.fixture
def expected(undisturbed: Undisturbed) -> dict[str, bytes]:
    return undisturbed.weights


def cut(parent: Checkpoint, out: Path, workers: int = 2) -> dict[str, bytes]:
    return weights_of(v4.slice(v4.plan(parent, RECIPE), out, workers=workers).path)


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_fault_in_the_data_that_passes_is_recovered_from(
    name: str,
    repo: Repo,
    hub: LoopbackHub,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = DATA_FAULTS[name]
    shorten_silence(case, monkeypatch)
    with open_parent() as parent:
        fault = hub.inject(case.kind, case.on, times=case.passes, **case.options)
        assert cut(parent, tmp_path / "out") == expected
    assert fault.met == case.passes


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_fault_in_the_data_that_stays_is_told_and_nothing_is_lost(
    name: str,
    repo: Repo,
    hub: LoopbackHub,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, out = DATA_FAULTS[name], tmp_path / "out"
    shorten_silence(case, monkeypatch)
    with open_parent() as parent:
        plan = v4.plan(parent, RECIPE)
        hub.reset_log()
        fault = hub.inject(case.kind, case.on, times=None, skip=60, **case.options)
        with pytest.raises(ReadError) as caught:
            v4.slice(plan, out, workers=1)
    text = str(caught.value)
    assert case.says in text and f"where: {PARENT}@{repo.refs['main'][:12]}/model-0" in text
    assert "next: " in text and "what is done is kept" in text
    assert fault.met <= 15  # five tries of each of the reads that were under way
    assert not (out / "config.json").exists() and not list(out.glob("*.index.json"))
    done = len([r for r in hub.requests("storage") if r.fault is None])
    hub.faults.remove(fault)
    hub.reset_log()
    with open_parent() as parent:
        replica = v4.slice(v4.plan(parent, RECIPE), out, workers=1)
    assert weights_of(replica.path) == undisturbed.weights and replica.written.bytes_reused > 0
    # A tensor whose scale was not there yet is read again, and each shard's link is new.
    assert len(hub.requests("storage")) <= undisturbed.num_requests - done + 4


@pytest.mark.parametrize("name", OPEN_FAULTS)
def test_fault_at_opening_that_passes_is_recovered_from(
    name: str, repo: Repo, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OPEN_FAULTS[name]
    shorten_silence(case, monkeypatch)
    fault = hub.inject(case.kind, case.on, times=case.passes, **case.options)
    with open_parent(workers=1) as parent:
        assert parent.num_tensors
    assert fault.met == case.passes


@pytest.mark.parametrize("name", OPEN_FAULTS)
def test_fault_at_opening_that_stays_is_told(
    name: str, repo: Repo, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OPEN_FAULTS[name]
    shorten_silence(case, monkeypatch)
    fault = hub.inject(case.kind, case.on, times=None, **case.options)
    with pytest.raises(ReadError) as caught:
        open_parent(workers=1)
    assert case.says in str(caught.value) and "the server did not answer" in str(caught.value)
    assert fault.met == 5


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Repo-Commit": "0" * 40},
        {"X-Linked-Size": "17"},
        {"X-Linked-Etag": '"another"'},
    ],
)
def test_another_file_than_the_listed_one_is_refused(
    headers: dict[str, str], repo: Repo, hub: LoopbackHub
) -> None:
    hub.inject(
        "headers", on_hub(f"/resolve/{repo.refs['main']}/model"), times=None, headers=headers
    )
    with pytest.raises(ReadError, match="no longer the one that was opened"):
        open_parent()
    assert not hub.requests("storage")


def test_file_that_changes_in_storage_is_told(repo: Repo, hub: LoopbackHub, tmp_path: Path) -> None:
    with open_parent() as parent:
        hub.inject("headers", in_data, times=None, skip=20, headers={"ETag": '"changed"'})
        with pytest.raises(ReadError, match="no longer the one that was opened") as caught:
            cut(parent, tmp_path / "out")
    assert "became changed" in str(caught.value)


def test_whole_file_instead_of_a_range_is_not_read(hub: LoopbackHub) -> None:
    """20 MB are offered in place of 100 bytes; what fits into socket buffers may get sent."""
    hub.add_repo(PARENT, {"config.json": b"{}", "model.safetensors": bytes(20_000_000)})
    hub.inject("ignore_range", on_storage(), times=None)
    hub.bandwidth = 50e6  # so that the answer is sent in small pieces
    source = HubRepository(PARENT)
    with pytest.raises(ReadError, match="the whole file instead of a range"):
        source.read("model.safetensors", 5, 105)
    source.close()
    assert hub.body_bytes("storage") < 5 * 8_000_000


def test_whole_file_is_taken_where_it_was_asked_for(hub: LoopbackHub) -> None:
    hub.add_repo(PARENT, {"config.json": b"{}", "model.safetensors": b"whole"})
    hub.inject("ignore_range", on_storage(), times=None)
    source = HubRepository(PARENT)
    assert source.read("model.safetensors", 0, 5) == b"whole"
    source.close()


def test_connection_that_drips_is_given_up(
    repo: Repo, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_patience(monkeypatch, window=0.2, least_rate=1000.0)
    hub.inject("trickle", on_storage(SHARD), times=1, seconds=0.02)
    with open_parent() as parent:
        assert parent.num_tensors
    hub.inject("trickle", on_storage("00003"), times=None, seconds=0.02)
    source = HubRepository(PARENT)
    with pytest.raises(ReadError, match=r"only \d+ bytes in 0 s"):
        source.read("model-00003-of-00005.safetensors", 50, 5000)
    source.close()


def test_deadline_ends_what_would_go_on_for_ever(
    repo: Repo, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_parent():
        pass
    quick_patience(monkeypatch, deadline=0.3)
    hub.inject("trickle", on_storage(SHARD), times=None, seconds=0.02)
    source = HubRepository(PARENT)
    with pytest.raises(ReadError, match="not done after 0 s"):
        source.read(SHARD, 50, 5000)
    source.close()


def test_what_came_before_a_fault_is_kept(repo: Repo, hub: LoopbackHub) -> None:
    source = HubRepository(PARENT)
    hub.inject("cut", on_storage(SHARD), after=1000)
    hub.inject("cut", on_storage(SHARD), after=2000)
    blob = repo.commits[source.commit].tree[SHARD]
    assert source.read(SHARD, 100, 9100) == blob.read(100, 9100)
    assert [r.range for r in hub.requests("storage")] == [(100, 9100), (1100, 9100), (3100, 9100)]
    source.close()


def test_waits_are_those_that_the_server_asks_for(
    repo: Repo, hub: LoopbackHub, waited: list[float]
) -> None:
    source = HubRepository(PARENT)
    refusals = ({"Retry-After": "7"}, {"ratelimit": '"api";r=0;t=31'}, {}, {})
    for headers in refusals:
        hub.inject("status", on_storage(SHARD), status=429, headers=headers)
    source.read(SHARD, 0, 8)
    assert 7 <= waited[0] <= 8 and 31 <= waited[1] <= 32
    assert 3 <= waited[2] <= 5 and 6 <= waited[3] <= 8
    source.close()


def test_wait_beyond_the_deadline_is_told_at_once(repo: Repo, hub: LoopbackHub) -> None:
    source = HubRepository(PARENT)
    fault = hub.inject(
        "status", on_storage(SHARD), times=None, status=429, headers={"Retry-After": "3600"}
    )
    with pytest.raises(ReadError, match=r"run the same command again in 3,600 s"):
        source.read(SHARD, 0, 8)
    assert fault.met == 1
    source.close()


def test_expired_link_is_asked_for_once_more_by_all_threads_together(
    repo: Repo, hub: LoopbackHub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with open_parent() as parent:
        plan = v4.plan(parent, RECIPE)
        hub.latency = 0.02  # so that they all hold the old link when the first gets a new one
        hub.expire_links()
        hub.reset_log()
        assert weights_of(v4.slice(plan, tmp_path / "out", workers=8).path) == expected
    files = [request.file for request in hub.resolves() if request.file.startswith("model")]
    assert len(files) == len(set(files)) > 1


def test_late_refusal_of_an_old_link_does_not_cost_the_new_one(
    repo: Repo, hub: LoopbackHub
) -> None:
    with HubRepository(PARENT) as source:
        source.read(SHARD, 0, 8)
        hub.expire_links()
        hub.reset_log()
        hub.latency = 0.4
        late = threading.Thread(target=source.read, args=(SHARD, 8, 16))
        late.start()
        while not hub.requests("storage"):
            late.join(0.005)
        late.join(0.05)  # by now the answer to it is waiting
        hub.latency = 0.0
        source.read(SHARD, 16, 24)
        assert late.is_alive()
        late.join()
        assert len(hub.resolves()) == 1
        assert [r.status for r in hub.requests("storage")] == [403, 403, 206, 206]


def test_server_that_is_not_there_is_told(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ReadError, match="ConnectError") as caught:
        open_parent()
    assert f"where: {PARENT}@main" in str(caught.value)


ANSWERS = {
    "no JSON": b"<html>not the Hub</html>",
    "no object": b"[]",
    "no commit": b'{"siblings": []}',
    "a commit that leads elsewhere": b'{"sha": "../../x", "siblings": []}',
    "a size that is none": b'{"sha": "%s", "siblings": [{"rfilename": "x", "size": -1}]}'
    % (b"0" * 40),
    "a name that is none": b'{"sha": "%s", "siblings": [{"rfilename": 7, "size": 1}]}'
    % (b"0" * 40),
    "files that are none": b'{"sha": "%s", "siblings": {"a": 1}}' % (b"0" * 40),
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_that_makes_no_sense_is_told(name: str, hub: LoopbackHub) -> None:
    hub.route("GET", r"/api/models/.*", lambda *_: Response(200, {}, ANSWERS[name]))
    with pytest.raises(CheckpointError, match="description of the repository is malformed"):
        open_parent()


def test_answer_without_end_is_cut_off(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4surgery.checkpoint.hub_http._MAX_ANSWER_BYTES", 1000)
    hub.route("GET", r"/api/models/.*", lambda *_: Response(200, {}, b"[" * 100_000))
    with pytest.raises(CheckpointError, match="the Hub's answer is too long"):
        open_parent()


def test_redirects_are_followed_to_no_other_server_and_not_for_ever(
    repo: Repo, hub: LoopbackHub
) -> None:
    def away(*_: object) -> Response:
        return Response(302, {"Location": f"{hub.storage}/elsewhere"})

    def around(_: LoopbackHub, request: Request, __: object) -> Response:
        return Response(302, {"Location": request.path})

    hub.route("GET", r"/org/flash/resolve/.*", around)
    with (
        HubRepository(PARENT) as source,
        pytest.raises(CheckpointError, match="redirects for ever"),
    ):
        source.read("config.json", 0, 2)
    hub.route("GET", r"/api/models/.*", around)
    with pytest.raises(CheckpointError, match="redirects for ever"):
        open_parent()
    hub.route("GET", r"/api/models/.*", away)
    with pytest.raises(CheckpointError, match="the Hub redirects to another server"):
        open_parent()
    assert not hub.requests("storage") and len(hub.log) < 20


@pytest.mark.parametrize(
    "location", ["http://[", "http://x:999999/", "http://", "javascript:1", "file:///etc/passwd"]
)
def test_redirect_to_what_is_no_address_is_told(
    location: str, repo: Repo, hub: LoopbackHub
) -> None:
    hub.inject("headers", RESOLVE, times=None, headers={"Location": location})
    with pytest.raises(CheckpointError, match="the Hub redirects"):
        open_parent(workers=1)


def test_files_with_names_that_lead_elsewhere_are_not_there(repo: Repo, hub: LoopbackHub) -> None:
    repo.commit(dict.fromkeys(("..\\x", "a/b", "sub/config.json", "x%2fy", "q?x"), b"x"))
    with open_parent() as parent:
        assert parent.source.list_files() == sorted(
            path
            for path in repo.commits[repo.refs["main"]].tree
            if path.isascii() and not set("\\/%?") & set(path)
        )
    assert not outside(hub)


def test_compressed_answers_are_never_asked_for(
    repo: Repo, hub: LoopbackHub, tmp_path: Path
) -> None:
    with open_parent() as parent:
        cut(parent, tmp_path / "out")
    assert {request.headers["accept-encoding"] for request in hub.log} == {"identity"}
    assert all(r.range is not None for r in hub.log if r.method == "GET" and "/api/" not in r.path)


def test_link_without_encryption_is_refused_where_the_hub_has_it(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    patience = Patience()
    http = HubHttp(None, patience, lambda where: Attempts(patience, threading.Event(), where))
    with pytest.raises(CheckpointError, match="without encryption"):
        http._checked_storage("http://storage.example/x?Signature=s", PARENT)
    with pytest.raises(CheckpointError, match="without encryption"):
        http._checked_storage("file:///etc/passwd", PARENT)


HOSTILE = [
    "../x.safetensors",
    "/etc/passwd",
    "%2e%2e/x.safetensors",
    "..%2fx",
    "..\\x",
    "x\0.safetensors",
    "x?download=true",
    "x#y",
    "https://evil.example/x",
    "//evil.example/x",
    "org/other/resolve/main/x",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_index_makes_no_request_leave_the_repository(
    name: str, hub: LoopbackHub, folder: Path
) -> None:
    index = "model.safetensors.index.json"
    data = json.loads((folder / index).read_text())
    data["weight_map"]["embed.weight"] = name
    files = {path.name: path for path in folder.iterdir()}
    hub.add_repo(PARENT, {**files, index: json.dumps(data).encode()})
    with pytest.raises(CheckpointError, match="not the name of a file"):
        open_parent()
    assert not outside(hub) and not hub.requests("storage")
    assert hub.log[-1].path.endswith(index)


def test_shard_that_the_repository_lacks_is_told(hub: LoopbackHub, folder: Path) -> None:
    files = {path.name: path for path in folder.iterdir() if path.name != SHARD}
    hub.add_repo(PARENT, files)
    with pytest.raises(CheckpointError, match="names shards that are not there") as caught:
        open_parent()
    assert SHARD in str(caught.value) and not hub.requests("storage")


def canary_cases() -> dict[str, Case]:
    refused = {"headers": {"X-Error-Message": f"Bearer {TOKEN}", "X-Error-Code": "Other"}}
    echo = {"status": 400, **refused}
    return {
        **DATA_FAULTS,
        **OPEN_FAULTS,
        "echo by the API": Case("status", LISTING, "", echo),
        "echo by resolve": Case("status", RESOLVE, "", echo),
        "echo by storage": Case("status", in_data, "", echo),
        "echo in a header": Case(
            "headers", in_data, "", {"headers": {"Content-Range": f"Bearer {TOKEN}"}}
        ),
        "gated": Case(
            "status", RESOLVE, "", {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}
        ),
        "none": Case("reset", lambda _: False, "", {}),
    }


@pytest.mark.parametrize("name", canary_cases())
def test_token_is_nowhere_but_in_requests_to_the_endpoint(
    name: str,
    repo: Repo,
    hub: LoopbackHub,
    tmp_path: Path,
    cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, recipe = canary_cases()[name], tmp_path / "half.yaml"
    shorten_silence(case, monkeypatch)
    recipe.write_text(dump_recipe(RECIPE))
    hub.inject(case.kind, case.on, times=None, **case.options)
    args = (
        "slice",
        "-r",
        recipe,
        "-p",
        PARENT,
        "-o",
        tmp_path / "out",
        "--max-workers",
        "1",
        "-vv",
    )
    done = cli("--debug", *args) if "echo" in name else cli(*args)
    assert done.code == (0 if name == "none" else 1) and "debug: " in done.err
    assert TOKEN not in done.out + done.err
    own = hub.requests("hub")
    assert own and all(r.headers["authorization"] == f"Bearer {TOKEN}" for r in own)
    for request in hub.log:
        assert TOKEN not in request.path + request.query
        assert request.origin == "hub" or TOKEN not in str(request.headers)
    for path in tmp_path.rglob("*"):
        assert TOKEN not in str(path) and (path.is_dir() or TOKEN.encode() not in path.read_bytes())


def test_interruption_does_not_wait_for_the_server(
    repo: Repo, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits between tries is woken, and reading works again afterwards."""
    monkeypatch.setattr(
        "v4surgery.checkpoint.remote.Patience",
        partial(Patience, first_wait=60.0, longest_wait=60.0),
    )
    source = HubRepository(PARENT)
    fault = hub.inject("status", on_storage(SHARD), times=None, status=503)
    errors: list[ReadError] = []

    def read() -> None:
        with pytest.raises(ReadError) as caught:
            source.read(SHARD, 0, 8)
        errors.append(caught.value)

    thread = threading.Thread(target=read)
    thread.start()
    while not fault.met:
        thread.join(0.005)
    while thread.is_alive():
        source.cancel()
        thread.join(0.01)
    assert "reading was stopped" in str(errors[0])
    hub.faults.clear()
    assert len(source.read(SHARD, 0, 8)) == 8
    source.close()


def test_failed_run_does_not_wait_for_workers_that_wait_for_the_server(
    repo: Repo, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = partial(Patience, first_wait=60.0, longest_wait=60.0)
    monkeypatch.setattr("v4surgery.checkpoint.remote.Patience", patient)

    def stop(_: int) -> None:
        if fault.met:
            raise KeyboardInterrupt

    with open_parent() as parent:
        plan = v4.plan(parent, RECIPE)
        fault = hub.inject("status", in_data, times=1, skip=5, status=503)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            v4.slice(plan, tmp_path / "out", workers=4, progress=stop)
        assert time.monotonic() - began < 30
        assert v4.slice(plan, tmp_path / "out").written.bytes_reused
