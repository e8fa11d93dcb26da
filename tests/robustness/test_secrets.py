"""A canary token through every verb and failure at -vv: it reaches the Hub, and nothing else.

Not what is printed, tracebacks and JSON included; not files, caches included; not the addresses of
requests, nor the headers of requests to another origin.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.hub.remote_support import PARENT, quick_patience
from tests.hub.support import TOKEN
from tests.support import parents
from tests.support.hub import LoggedRequest, LoopbackHub, on_hub, on_storage
from tests.support.hub.write import add_routes
from v4surgery.cli import main

ECHO = {"X-Error-Message": f"Authorization: Bearer {TOKEN}", "X-Error-Code": f"Odd{TOKEN}"}
COMMON = ("-vv",)
# huggingface_hub 2.4 hands uploads to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def anything(_: LoggedRequest) -> bool:
    return True


def data(request: LoggedRequest) -> bool:
    return request.origin == "storage" and request.range is not None and request.range[0] > 0


FAILURES: dict[str, Callable[[LoopbackHub], object]] = {
    "none": lambda _: None,
    "echo by every answer": lambda hub: hub.inject(
        "status", anything, times=None, status=400, headers=ECHO
    ),
    "echo by storage": lambda hub: hub.inject(
        "status", on_storage(), times=None, status=418, headers=ECHO
    ),
    "echo in a redirect": lambda hub: hub.inject(
        "status",
        on_hub("/resolve/"),
        times=None,
        status=302,
        headers={"Location": f"http://{TOKEN}@127.0.0.1:9/x?token={TOKEN}"},
    ),
    "token refused": lambda hub: hub.tokens.clear(),
    "no repository": lambda hub: hub.repos.clear(),
    "server error": lambda hub: hub.inject("status", anything, times=None, status=500),
    "cut data": lambda hub: hub.inject("cut", data, times=None, after=10),
    "closed connections": lambda hub: hub.inject("reset", anything, times=None),
    "no server": lambda hub: hub.__exit__(None, None, None),
}
VERBS = {
    "inspect": "inspect org/flash --json",
    "plan": "plan -r {0}/half.yaml -p org/flash --json",
    "slice": "slice -r {0}/half.yaml -p org/flash -o {0}/out --json --max-workers 2",
    "verify": "verify {0}/replica -p org/flash --json",
    "convert": "convert org/flash {0}/bf16 --to bf16 --json",
    "trace": "trace org/flash --ids 1,2,3 --out {0}/trace",
    "score": "score org/flash --ids 1,2,3 --out {0}/scores",
    "generate": "generate org/flash --ids 1,2 --max-new-tokens 1",
    "push": "push {0}/replica me/half --create --json",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {**parents.SMALL, "num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}
    folder = tmp_path_factory.mktemp("secrets")
    parents.write_parent(folder / "flash", changes=changes)
    (folder / "half.yaml").write_text("name: half\nkeep: {experts: 2}\n")
    parent, replica = folder / "flash", folder / "replica"
    for args in (
        ["slice", "-r", folder / "half.yaml", "-p", parent, "-o", replica],
        ["verify", replica, "-p", parent],
    ):
        with pytest.raises(SystemExit):
            main([str(arg) for arg in args])
    assert (replica / "verified.json").is_file()
    return folder


@pytest.fixture
def room(small: Path, tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A replica, a recipe, and the parent in a private repository; the user is logged in."""
    quick_patience(monkeypatch)
    parents.copy_checkpoint(small / "replica", tmp_path / "replica")
    (tmp_path / "half.yaml").write_bytes((small / "half.yaml").read_bytes())
    repo = hub.add_repo(PARENT, small / "flash")
    repo.private = True
    repo.readers.add("me")
    add_routes(hub)
    return tmp_path


def assert_nowhere(room: Path, hub: LoopbackHub, printed: str) -> None:
    assert TOKEN not in printed
    for request in hub.log:
        assert TOKEN not in request.path + request.query
        assert request.origin == "hub" or TOKEN not in str(request.headers)
    for path in room.rglob("*"):
        assert TOKEN not in str(path)
        if path.is_file() and path.name != "token":
            assert TOKEN.encode() not in path.read_bytes(), path
    for repo in hub.repos.values():
        for commit in repo.commits.values():
            for blob in commit.tree.values():
                assert TOKEN.encode() not in blob.read(0, blob.size)


@pytest.mark.parametrize("failure", FAILURES)
def test_token_reaches_the_hub_and_nothing_else(
    failure: str, room: Path, hub: LoopbackHub, v4: Run
) -> None:
    FAILURES[failure](hub)
    codes = {}
    for verb, words in VERBS.items():
        done = v4("--debug", *words.format(room).split(), *COMMON)
        codes[verb] = done.code
        assert done.code in (0, 1, 2), done
        assert_nowhere(room, hub, done.out + done.err)
    assert (set(codes.values()) == {0}) == (failure == "none"), codes
    seen = {r.headers.get("authorization") for r in hub.requests("hub")}
    assert seen <= {f"Bearer {TOKEN}", None}
    assert failure == "no server" or f"Bearer {TOKEN}" in seen


@pytest.mark.parametrize("way", ["--token", "HF_TOKEN", "file"])
def test_token_is_taken_from_where_people_keep_it_and_stays_there(
    way: str, room: Path, hub: LoopbackHub, v4: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "HF_TOKEN":
        monkeypatch.delenv("HF_TOKEN")
    if way == "file":
        (room / "home").mkdir(exist_ok=True)
        (room / "home" / "token").write_text(TOKEN)
    more = ("--token", TOKEN) if way == "--token" else ()
    for words in (VERBS["slice"], VERBS["push"]):
        done = v4(*words.format(room).split(), *COMMON, *more)
        assert done.code == 0, done
        assert_nowhere(room, hub, done.out + done.err)


def test_error_that_is_not_ours_does_not_show_it_either(
    room: Path, hub: LoopbackHub, v4: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a library that quotes the header it choked on."""
    other = "hf_GivenOnTheCommandLine"

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}', or was it {other}?")

    monkeypatch.setattr("v4surgery.checkpoint.reader.open_source", fail)
    for debug in ((), ("--debug",)):
        done = v4(*debug, "inspect", PARENT, "--token", other)
        assert done.code == 1 and "Illegal header value" in done.err
        assert TOKEN not in done.err and other not in done.err


def test_usage_errors_do_not_repeat_it(v4: Run) -> None:
    for args in (
        ("inspect", PARENT, f"--tokn={TOKEN}"),
        ("inspect", PARENT, "--token", TOKEN, "--nothing"),
        ("inspect", PARENT, "--token", TOKEN, "one", "too", "many"),
        ("--debug", "inspect", TOKEN),
        ("inspect", TOKEN),
        ("inspect", f"https://{TOKEN}@huggingface.co/org/flash"),
    ):
        done = v4(*args)
        assert done.code in (1, 2) and TOKEN not in done.out + done.err, done
