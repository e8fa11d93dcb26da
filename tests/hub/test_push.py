"""Pushing, through huggingface_hub's real client, to a Hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import v4surgery as v4
from tests.cli.conftest import Run
from tests.hub.conftest import cut_and_verify
from tests.hub.support import (
    MINE,
    REPO,
    changed_anything,
    files_of,
    on_the_hub,
    pushed,
    refused,
    shards_of,
)
from tests.support import parents
from tests.support.hub import LoopbackHub
from tests.support.hub.write import Writes


def test_a_push_makes_a_private_repository_that_holds_the_replica(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    done = pushed(cli, replica, "--create")
    assert len(shards_of(replica)) >= 3
    assert on_the_hub(hub) == files_of(replica)
    assert len(writes.created) == 1 and hub.repos[REPO].private
    assert len(writes.commits) == 1
    sha = hub.repos[REPO].refs["main"]
    assert done.out.startswith(f"{hub.endpoint}/{REPO}/commit/{sha}: ")
    assert done.err == ""


def test_the_card_is_sent_and_kept_beside_the_replica(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    assert not (replica / "README.md").exists()
    pushed(cli, replica, "--create")
    card = on_the_hub(hub)["README.md"].decode()
    assert card == (replica / "README.md").read_text()
    assert f'from_pretrained("{REPO}")' in card and "Bytes: verified" in card


def test_public_opens_a_repository_that_is_made(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    pushed(cli, replica, "--create", "--public")
    assert len(writes.created) == 1 and not hub.repos[REPO].private


def test_without_create_no_repository_is_made(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    assert "--create makes it" in refused(cli, replica)
    assert not hub.repos and not changed_anything(hub)


def test_a_second_push_sends_nothing(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    pushed(cli, replica, "--create")
    hub.reset_log()
    writes.reset()
    done = pushed(cli, replica)
    assert done.out == f"{hub.endpoint}/{REPO}: has it all already, nothing was sent\n"
    assert not changed_anything(hub) and writes.stored_bytes == 0
    assert len(hub.requests()) <= 3


def test_a_copy_of_the_replica_elsewhere_sends_nothing_either(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, tmp_path: Path
) -> None:
    pushed(cli, replica, "--create")
    hub.reset_log()
    pushed(cli, parents.copy_checkpoint(replica, tmp_path / "another-name"))
    assert not changed_anything(hub)


def test_only_what_changed_is_sent(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    pushed(cli, replica, "--create")
    writes.reset()
    report = {"verdict": "pass", "grade": "behaviour", "summary": {"logit_kl": 0.5}}
    (replica / "validation.json").write_text(json.dumps(report))
    pushed(cli, replica)
    assert [commit.files for commit in writes.commits] == [["README.md", "validation.json"]]
    assert writes.stored_bytes == 0
    assert on_the_hub(hub) == files_of(replica)


def test_only_the_replicas_own_files_are_sent(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    strangers = ("notes.txt", ".env", "model.safetensors.part", "weights.bin", ".git-credentials")
    for name in strangers:
        (replica / name).write_text("secret")
    (replica / "sub").mkdir()
    (replica / "sub" / "config.json").write_text("{}")
    plan = json.loads(pushed(cli, replica, "--create", "--dry-run", "--json").out)
    assert plan["left_out"] == sorted(strangers)
    pushed(cli, replica, "--create")
    expected = {name for name in files_of(replica) if name not in strangers}
    assert on_the_hub(hub).keys() == expected


@pytest.mark.parametrize("again", [False, True], ids=["first", "after-a-change"])
def test_a_dry_run_says_exactly_what_is_sent(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, again: bool
) -> None:
    if again:
        pushed(cli, replica, "--create")
        (replica / "README.md").write_text(MINE)
        writes.reset()
    hub.reset_log()
    before = files_of(replica)
    plan = json.loads(pushed(cli, replica, "--create", "--dry-run", "--json").out)
    assert not changed_anything(hub) and files_of(replica) == before
    assert plan["dry_run"] and plan["commit"] is None

    done = json.loads(pushed(cli, replica, "--create", "--json").out)
    assert {**done, "dry_run": True, "commit": None} == plan
    (commit,) = writes.commits
    sent = [file for file in plan["files"] if file["change"] != "same"]
    assert sorted(commit.files) == [file["name"] for file in sent]
    assert commit.header["summary"] == plan["message"]
    large = [file["bytes"] for file in sent if file["name"].endswith(".safetensors")]
    assert writes.stored_bytes == sum(large)
    assert plan["bytes_to_send"] == sum(file["bytes"] for file in sent)
    stored = on_the_hub(hub)
    assert all(len(stored[file["name"]]) == file["bytes"] for file in sent)
    assert done["commit"]["oid"] == hub.repos[REPO].refs["main"]


def test_a_dry_run_for_people_names_every_file(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    text = pushed(cli, replica, "--create", "--dry-run").out
    assert text.startswith(f"{hub.endpoint}/{REPO} (private, to be made), revision main\n")
    for name, content in files_of(replica).items():
        assert any(
            line.split() == ["new", str(len(content)), name] for line in text.splitlines()
        ), name
    assert text.rstrip().endswith("in a commit: Replica half of small")


def test_a_large_file_goes_up_in_parts(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    writes.part_bytes = 100_000
    pushed(cli, replica, "--create")
    parts = [request for request in hub.requests("storage") if request.method == "PUT"]
    assert len(parts) > len(shards_of(replica))
    assert on_the_hub(hub) == files_of(replica)


def test_a_pull_request_leaves_the_branch_alone(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    repo = hub.add_repo(REPO, {".gitattributes": b"", "config.json": b"{}"})
    before = repo.refs["main"]
    done = pushed(cli, replica, "--create-pr")
    assert repo.refs["main"] == before
    assert on_the_hub(hub, "refs/pr/1") == files_of(replica)
    assert done.out.startswith(f"{hub.endpoint}/{REPO}/discussions/1: ")


def test_a_second_pull_request_is_not_opened_for_the_same_replica(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    hub.add_repo(REPO, {".gitattributes": b""})
    pushed(cli, replica, "--create-pr")
    hub.reset_log()
    done = pushed(cli, replica, "--create-pr")
    assert "nothing was sent" in done.out
    assert not changed_anything(hub) and len(hub.repos[REPO].pull_requests) == 1
    plan = json.loads(pushed(cli, replica, "--create-pr", "--dry-run", "--json").out)
    assert (plan["pull_request"], plan["done"], plan["bytes_to_send"]) == ("refs/pr/1", True, 0)


def test_whoever_may_only_read_can_open_a_pull_request(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    hub.add_repo("org/half", {".gitattributes": b""})
    err = refused(cli, replica, "org/half")
    assert "HTTP 403" in err and "--create-pr" in err
    done = cli("push", replica, "org/half", "--create-pr")
    assert done.code == 0, done.err
    assert hub.repos["org/half"].at("refs/pr/1") is not None


def test_a_push_goes_to_the_branch_that_is_named(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    repo = hub.add_repo(REPO, {".gitattributes": b""})
    before = dict(repo.refs)
    err = refused(cli, replica, "--revision", "v1/test")
    assert "v1/test" in err and "--create" in err and repo.refs == before
    pushed(cli, replica, "--revision", "v1/test", "--create")
    assert repo.refs["main"] == before["main"]
    assert on_the_hub(hub, "v1/test") == files_of(replica)
    writes.reset()
    pushed(cli, replica, "--revision", "v1/test")
    assert not writes.commits


def test_a_push_into_a_pull_request_adds_to_it(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    hub.add_repo(REPO, {".gitattributes": b""})
    pushed(cli, replica, "--create-pr")
    (replica / "README.md").write_text(MINE)
    writes.reset()
    pushed(cli, replica, "--revision", "refs/pr/1", "--commit-message", "A better card")
    assert [commit.files for commit in writes.commits] == [["README.md"]]
    assert writes.commits[0].header["summary"] == "A better card"
    assert on_the_hub(hub, "refs/pr/1") == files_of(replica)


def test_shards_of_an_earlier_replica_are_taken_away(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, small_parent: Path, tmp_path: Path
) -> None:
    pushed(cli, replica, "--create")
    single = cut_and_verify(small_parent, tmp_path / "single", store={"dtype": "bf16"})
    assert [path.name for path in shards_of(single)] == ["model.safetensors"]
    plan = json.loads(pushed(cli, single, "--dry-run", "--json").out)
    pushed(cli, single)
    old = [path.name for path in shards_of(replica)] + ["model.safetensors.index.json"]
    assert plan["deletes"] == writes.commits[-1].deleted == old
    assert on_the_hub(hub) == files_of(single)


def test_nothing_changes_in_the_replica_but_its_card(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    before = files_of(replica)
    pushed(cli, replica, "--create")
    after = files_of(replica)
    after.pop("README.md")
    assert after == before


def test_a_pushed_replica_is_one_again_when_downloaded(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, small_parent: Path, tmp_path: Path
) -> None:
    pushed(cli, replica, "--create")
    for name, content in on_the_hub(hub).items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    assert v4.verify(tmp_path / "down", small_parent).passed
    hub.reset_log()
    pushed(cli, tmp_path / "down")
    assert not changed_anything(hub)
