"""What is not pushed: replicas that may not go up, and places where they may not go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.hub.support import (
    MINE,
    REPO,
    changed_anything,
    files_of,
    on_the_hub,
    pushed,
    refused,
)
from tests.support.hub import LoopbackHub
from tests.support.hub.write import Writes


def test_a_replica_that_verify_has_not_passed_is_refused(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    (replica / "verified.json").unlink()
    err = refused(cli, replica, "--create", code=2)
    assert "verify has not passed on it" in err and f"v4surgery verify {replica}" in err
    assert not hub.requests()
    done = pushed(cli, replica, "--create", "--force")
    assert done.err == "warning: pushed by force: verify has not passed on it\n"
    assert "Bytes: not verified" in on_the_hub(hub)["README.md"].decode()


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "recipe.yaml", "v4surgery.json"]
)
def test_a_replica_that_changed_since_verify_is_refused(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, name: str
) -> None:
    path = replica / name
    if name.endswith(".safetensors"):
        flip_last_byte(path)
    else:
        path.write_text(path.read_text() + "\n")
    err = refused(cli, replica, "--create", code=3)
    assert f"{name} changed since verify passed" in err
    assert not hub.requests()
    assert pushed(cli, replica, "--create", "--force").err.endswith("since verify passed\n")


def test_a_file_that_was_added_since_verify_is_refused(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    (replica / "generation_config.json").write_text("{}")
    err = refused(cli, replica, "--create", code=3)
    assert "generation_config.json was added since verify passed" in err


def test_an_empty_card_is_refused_even_by_force(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    (replica / "README.md").write_text("---\nlicense: mit\n---\n\n<!-- todo -->\n")
    for args in ((), ("--force",)):
        assert "the card is empty" in refused(cli, replica, "--create", *args, code=2)
    assert not hub.requests()


def test_the_owners_card_is_sent_as_it_is(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    (replica / "README.md").write_text(MINE)
    pushed(cli, replica, "--create")
    assert on_the_hub(hub)["README.md"].decode() == MINE
    assert (replica / "README.md").read_text() == MINE


def test_front_matter_that_the_hub_does_not_take_is_told(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    (replica / "README.md").write_text("---\nbase_model_relation: pruned\n---\n# Mine\n")
    err = refused(cli, replica, "--create")
    assert "base_model_relation" in err and "correct the head of README.md" in err
    assert not writes.commits


def test_a_parent_is_no_replica(
    hub: LoopbackHub, writes: Writes, cli: Run, small_parent: Path
) -> None:
    assert "not a replica" in refused(cli, small_parent, "--create", "--force")
    assert not hub.requests()


def test_an_unfinished_replica_is_refused(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    (replica / ".v4surgery").mkdir()
    assert "unfinished" in refused(cli, replica, "--create", "--force", code=2)


def test_a_link_out_of_the_replica_is_not_followed(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (replica / "tokenizer.json").symlink_to(secret)
    assert "leaves the folder" in refused(cli, replica, "--create", "--force")
    assert not hub.requests()


@pytest.mark.parametrize(
    "repo_id",
    ["half", "a/b/c", "../x", "me/..", "me/a b", "https://e.example/me/x", "me/x?y", "/x"],
)
def test_a_name_that_is_no_repository_is_a_usage_error(
    hub: LoopbackHub, cli: Run, replica: Path, repo_id: str
) -> None:
    done = cli("push", replica, repo_id)
    assert (done.code, done.out) == (2, "") and "not the name of a repository" in done.err
    assert not hub.requests()


def test_another_model_is_not_overwritten(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    hub.add_repo(REPO, {"model.safetensors": b"precious", "config.json": b"{}"})
    err = refused(cli, replica, code=2)
    assert "holds a model that is no replica" in err and "model.safetensors" in err
    assert not changed_anything(hub)
    pushed(cli, replica, "--force")
    assert on_the_hub(hub) == files_of(replica)
