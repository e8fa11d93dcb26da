"""A Hub that refuses, fails or goes silent; a push that is stopped; and where the token goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import _PROGRAM as PROGRAM
from tests.cli.conftest import Run
from tests.hub.support import (
    REPO,
    TOKEN,
    files_of,
    on_the_hub,
    pushed,
    refused,
    shards_of,
)
from tests.support.hub import LoopbackHub, on_hub, on_storage
from tests.support.hub.write import Writes

OTHER = "hf_SomeoneElsesThatIsSeen"
STATUSES = [
    (401, "HTTP 401"),
    (403, "a token that may write"),
    (404, "a repository that is there"),
    (409, "run the same command again"),
    (413, "HTTP 413"),
    (429, "the Hub's rate limit"),
    (500, "what is up stays up"),
    (503, "what is up stays up"),
]
STEPS = [
    ("look", on_hub(f"/api/models/{REPO}/revision/")),
    ("create", on_hub("/api/repos/create")),
    ("yaml", on_hub("/api/validate-yaml")),
    ("preupload", on_hub("/preupload/")),
    ("batch", on_hub("/lfs/objects/batch")),
    ("storage", on_storage("/upload/")),
    ("verify", on_hub("/lfs/objects/verify")),
    ("commit", on_hub("/commit/")),
]


@pytest.mark.parametrize(("status", "words"), STATUSES, ids=lambda value: str(value)[:3])
def test_what_the_hub_refuses_is_told(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, status: int, words: str
) -> None:
    hub.inject("status", on_hub("/commit/"), status=status, times=None)
    hub.add_repo(REPO, {".gitattributes": b""})
    err = refused(cli, replica)
    assert words in err and f"HTTP {status}" in err and hub.endpoint in err
    assert not writes.commits


@pytest.mark.parametrize(("step", "on"), STEPS, ids=[step for step, _ in STEPS])
def test_every_step_survives_a_server_that_is_out_of_order_for_a_while(
    hub: LoopbackHub,
    writes: Writes,
    cli: Run,
    replica: Path,
    waits: list[float],
    step: str,
    on: Any,
) -> None:
    fault = hub.inject("status", on, status=503, times=3, headers={"Retry-After": "7"})
    pushed(cli, replica, "--create")
    # huggingface_hub looks for JSON in the answer of validate-yaml before it looks at the status.
    asked = 1 if step == "yaml" else 7
    assert fault.met == 3 and len(waits) == 3 and min(waits) >= asked
    assert on_the_hub(hub) == files_of(replica) and len(writes.commits) == 1


@pytest.mark.parametrize(("step", "on"), STEPS, ids=[step for step, _ in STEPS])
@pytest.mark.parametrize("kind", ["reset", "status"])
def test_every_step_that_fails_for_good_is_told_and_resumed(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, step: str, on: Any, kind: str
) -> None:
    fault = hub.inject(kind, on, status=502, times=None)
    err = refused(cli, replica, "--create", "-vv")
    assert "the Hub did not" in err and "next: " in err
    assert 5 <= fault.met <= 6
    fault.times = 0
    sizes = [path.stat().st_size for path in shards_of(replica)]
    pushed(cli, replica, "--create")
    assert on_the_hub(hub) == files_of(replica)
    assert writes.stored_bytes == sum(sizes)


def test_a_push_that_was_cut_off_sends_only_what_is_missing(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    fault = hub.inject("status", on_storage("/upload/"), skip=2, times=None, status=503)
    missing = shards_of(replica)[2:]
    assert f"did not upload {missing[0].name}" in refused(cli, replica, "--create")
    assert len(writes.objects) == 2 and not writes.commits
    fault.times = 0
    writes.reset()
    pushed(cli, replica, "--create")
    assert writes.stored_bytes == sum(path.stat().st_size for path in missing)
    assert on_the_hub(hub) == files_of(replica)
    assert len(writes.created) == 0


def test_a_replica_that_changes_while_it_goes_up_is_not_committed(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    handle = hub.answer

    def answer(request: Any) -> Any:
        if "/upload/" in request.path:
            path = replica / "config.json"
            path.write_text(path.read_text() + " ")
        return handle(request)

    hub.answer = answer  # type: ignore[method-assign]
    assert "the file changed while it was being read" in refused(cli, replica, "--create")
    assert not writes.commits


def test_what_changes_meanwhile_is_not_overwritten(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    repo = hub.add_repo(REPO, {".gitattributes": b""})
    handle = hub.answer

    def answer(request: Any) -> Any:
        if "/commit/" in request.path:
            repo.commit({"theirs.txt": b"x"})
        return handle(request)

    hub.answer = answer  # type: ignore[method-assign]
    err = refused(cli, replica)
    assert "HTTP 412" in err and "run the same command again" in err
    assert on_the_hub(hub) == {"theirs.txt": b"x"}
    hub.answer = handle  # type: ignore[method-assign]
    writes.reset()
    pushed(cli, replica)
    assert writes.stored_bytes == 0
    assert on_the_hub(hub) == {**files_of(replica), "theirs.txt": b"x"}


@pytest.mark.parametrize("args", [(), ("--create-pr",)], ids=["commit", "pull-request"])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, args: tuple[str, ...]
) -> None:
    repo = hub.add_repo(REPO, {".gitattributes": b""})
    writes.lose_answer = 1
    done = json.loads(pushed(cli, replica, "--json", *args).out)
    assert len(writes.commits) == 1
    ref = "refs/pr/1" if args else "main"
    assert done["commit"]["oid"] == repo.refs[ref]
    url = f"{hub.endpoint}/{REPO}/discussions/1" if args else None
    assert done["commit"]["pull_request_url"] == url


def test_a_token_that_is_not_valid_is_told(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_NotATokenOfThisHub")
    err = refused(cli, replica, "--create")
    assert "HTTP 401" in err and "hf auth login" in err and "NotAToken" not in err


def test_without_a_token_the_next_step_is_to_log_in(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    err = refused(cli, replica, "--create")
    assert "pushing needs a token that may write" in err and "hf auth login" in err


def test_offline_mode_is_told(
    hub: LoopbackHub, cli: Run, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()
    try:
        assert "unset HF_HUB_OFFLINE" in refused(cli, replica)
    finally:
        close_session()
    assert not hub.requests()


def test_a_namespace_of_others_is_told(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    err = refused(cli, replica, "others/half", "--create")
    assert "HTTP 403" in err and "under the namespace others" in err and not hub.repos


def test_a_token_in_a_servers_answer_is_not_shown(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    headers = {"X-Error-Message": f"your token {TOKEN} and {OTHER} are bad"}
    hub.inject("status", on_hub("/commit/"), status=403, times=None, headers=headers)
    hub.add_repo(REPO, {".gitattributes": b""})
    err = refused(cli, replica)
    assert "your token hf_*** and hf_*** are bad" in err
    debug = cli("--debug", "push", replica, REPO, "-vv")
    assert debug.code == 1 and "Traceback" in debug.err and f"{REPO}: commit" in debug.err
    assert TOKEN not in debug.err + debug.out and OTHER not in debug.err


def test_the_token_goes_to_the_hub_alone_and_into_no_file(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, tmp_path: Path
) -> None:
    pushed(cli, replica, "--create")
    assert any(TOKEN in str(r.headers) for r in hub.requests("hub"))
    assert not any(TOKEN in str(r.headers) + r.path + r.query for r in hub.requests("storage"))
    assert all(TOKEN.encode() not in content for content in on_the_hub(hub).values())
    for folder, _, names in os.walk(tmp_path):
        assert all(TOKEN.encode() not in (Path(folder) / name).read_bytes() for name in names)


@pytest.mark.parametrize(("step", "on"), STEPS, ids=[step for step, _ in STEPS])
def test_a_server_that_goes_silent_does_not_hold_up_a_push_for_ever(
    hub: LoopbackHub,
    writes: Writes,
    cli: Run,
    replica: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    on: Any,
) -> None:
    monkeypatch.setattr("v4surgery.hub.client.STALL_SECONDS", 0.05)
    fault = hub.inject("stall", on, times=None, seconds=60)
    done = cli("push", replica, REPO, "--create")
    assert fault.met >= 1
    if step in ("storage", "commit"):  # all was done but for the answer, and the push finds out
        assert done.code == 0 and len(writes.commits) == 1
        assert on_the_hub(hub) == files_of(replica)
    else:
        assert done.code == 1 and "the Hub did not" in done.err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_push_that_was_stopped_sends_each_shard_once(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, how: signal.Signals
) -> None:
    hub.latency = 0.05
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "push", replica, REPO, "--create"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not writes.stored and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert 1 <= len(writes.stored) < len(shards_of(replica)) and not writes.commits
    assert out == "" and TOKEN not in err
    hub.latency = 0
    pushed(cli, replica, "--create")
    assert len(writes.stored) == len(shards_of(replica)) == len(set(writes.stored))
    assert on_the_hub(hub) == files_of(replica) and len(writes.commits) == 1
