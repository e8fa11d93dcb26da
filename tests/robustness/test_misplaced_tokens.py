"""A Hub token typed where something else belongs: not repeated, not sent, not published."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import v4surgery
from tests.cli.conftest import Run
from tests.distributed.conftest import Torchrun
from tests.hub.support import REPO
from tests.support import parents
from tests.support.hub import LoopbackHub
from tests.support.hub.write import Writes
from v4surgery import redact
from v4surgery.hub.card import make_card

USER = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
ORGANISATION = "api_org_" + "zYxWvUtSrQpOnMlKjIhGfEdCbAzYxWvUtS"
BROWSER = "hf_oauth_" + "eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQiXX0.c2ln_bmF0-dXJl"
SHORTEST = "hf_" + "0123456789abcdefghij"
OWN = "a-value/of.no+known:form"
FORMS = {"user": USER, "organisation": ORGANISATION, "browser": BROWSER, "shortest": SHORTEST}
HEAD = 11
"""So many characters of a token are more than its prefix."""

MISTAKES = {
    "extra argument": "inspect org/flash {0}",
    "extra arguments": "verify a b {0}",
    "no such command": "{0}",
    "no such command of recipes": "recipes {0}",
    "unknown option": "push a org/b --tokn={0}",
    "token as an option": "synth --{0}",
    "token as a short option": "plan -{0}",
    "joined to an option": "plan -r demo -p{0}",
    "joined to --token": "inspect org/flash --token{0}",
    "number": "slice -r demo --max-workers {0}",
    "flag": "inspect org/flash --json={0}",
    "size": "slice -r demo --memory {0}",
    "device": "trace {1} --ids 1 --out {1}/t --device {0}",
    "mode": "trace {1} --ids 1 --out {1}/t --mode {0}",
    "layout": "convert {1} {1}/out --to {0}",
    "model": "inspect {0}",
    "folder": "inspect {1}/{0}/model",
    "repository": "inspect org/{0}",
    "organisation": "inspect {0}/flash",
    "revision": "inspect org/flash@{0}",
    "--revision": "inspect org/flash --revision {0}",
    "address": "inspect https://{0}@huggingface.co/org/flash",
    "encoded": "inspect https://huggingface.co/org%2F{0}",
    "recipe": "plan -r {0}",
    "recipe's path": "plan -r {1}/{0}/mine.yaml",
    "recipes show": "recipes show {0}",
    "key of --set": "plan -r demo --set {0}=1",
    "key inside --set": "plan -r demo --set keep.{0}=1",
    "value of --set": "plan -r demo --set keep.experts={0}",
    "list in --set": "plan -r demo --set keep.experts=[1,2,{{a:{0}}}]",
    "name": "plan -r demo --set name={0}",
    "description": "plan -r demo --set description={0}",
    "parent of a recipe": "plan -r demo --set parent=org/{0}",
    "scores": "plan -r demo -p {1} --scores {1}/{0}",
    "cut short": "plan -r demo --set keep.experts=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{0}",
    "like": "synth --like {0} --out {1}/out",
    "field of synth": "synth --like demo --out {1}/out --set {0}=1",
    "value of synth": "synth --like demo --out {1}/out --set hidden_size={0}",
    "no assignment": "synth --like demo --out {1}/out --set {0}",
    "ids": "trace {1} --ids {0} --out {1}/t",
    "prompts": "trace {1} --prompts {1}/{0} --out {1}/t",
    "traces": "diff {0} {1}/{0}",
    "pushed folder": "push {0} me/half",
    "pushed name": "push {1} {0}",
}

UNQUOTED = {
    *("unknown option", "token as a short option", "number", "flag"),  # by the parser
    *("repository", "organisation", "revision", "--revision", "pushed name"),
}
"""Mistakes whose error does not quote the value."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parents.write_small_parent(tmp_path_factory.mktemp("misplaced") / "small")


@pytest.fixture
def room(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a parent ``small``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to(small)
    return tmp_path


def assert_hidden(text: str, token: str) -> None:
    assert token not in text and token[:HEAD] not in text and token[-HEAD:] not in text, text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_misplaced_token_is_not_repeated(
    mistake: str, room: Path, hub: LoopbackHub, v4: Run
) -> None:
    for token in FORMS.values():
        words = [word.format(token, "small") for word in MISTAKES[mistake].split()]
        for command in (words, ["--debug", *words])[: 2 if token == USER else 1]:
            done = v4(*command)
            assert done.code in (1, 2) and done.err, done
            assert_hidden(done.out + done.err, token)
            assert ("hf_***" in done.err) == (mistake not in UNQUOTED), done.err
    assert not hub.log


@pytest.mark.parametrize("way", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file", "--token"])
def test_the_users_own_token_is_hidden_whatever_its_form(
    way: str, room: Path, v4: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    given: tuple[str, ...] = ()
    if way == "--token":
        given = ("--token", OWN)
    elif way == "file":
        monkeypatch.setenv("HF_HOME", str(room / "home"))
        (room / "home").mkdir()
        (room / "home" / "token").write_text(OWN + "\n")
    else:
        monkeypatch.setenv(way, OWN)
    for args in (
        ("inspect", "small", OWN),
        ("inspect", f"./{OWN}"),
        ("--debug", "plan", "-r", f"{OWN}.yaml"),
        ("plan", "-r", "demo", "--set", f"keep.experts={OWN}"),
        ("plan", "-r", "demo", "--set", f"keep.experts={'x' * 40}{OWN}"),
    ):
        done = v4(*args, *given)
        assert done.code in (1, 2) and "hf_***" in done.err
        assert OWN[: redact._SHORTEST_HEAD] not in done.out + done.err


def test_json_does_not_repeat_it_either(room: Path, v4: Run) -> None:
    (room / "mine.yaml").write_text(f"name: mine\n{USER}: 1\nkeep: {{experts: {USER}}}\n")
    done = v4("recipes", "check", room / "mine.yaml", "--json")
    assert done.code == 2 and len(json.loads(done.out)["problems"]) == 2
    assert_hidden(done.out + done.err, USER)
    out = room / USER
    done = v4("synth", "--like", "demo", "--layers", "1", "--out", out, "--json")
    assert done.code == 0 and json.loads(done.out)["out"] == str(room / "hf_***")
    assert (out / "config.json").is_file()
    done = v4("inspect", out)
    assert done.code == 0 and done.out.startswith("hf_***: ")
    assert_hidden(done.out, USER)


def test_whoever_writes_writes_without_it(v4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs, warnings, threads and programs that print: all that a verb may call."""

    def talk() -> None:
        sys.stdout.writelines([f"{USER}\n", f"a {USER}\n", "b\n"])
        logging.getLogger("v4surgery.test").warning("logged %s", USER)
        sys.stderr.write(warnings.formatwarning(f"warned {USER}", UserWarning, "file", 1))
        thread = threading.Thread(target=explode)
        thread.start()
        thread.join()
        try:
            explode()
        except ValueError as error:
            raise RuntimeError("outer") from error

    def explode() -> None:
        raise ValueError(f"raised {USER}")

    monkeypatch.setattr("v4surgery.recipes.builtin_names", talk)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    before = sys.stdout, sys.stderr
    done = v4("--debug", "recipes", "list")
    assert (sys.stdout, sys.stderr) == before
    assert done.code == 1 and done.out == "hf_***\na hf_***\nb\n"
    assert "logged hf_***" in done.err and "warned hf_***" in done.err
    assert done.err.count("ValueError: raised hf_***") == 2
    assert_hidden(done.err, USER)


def test_what_only_resembles_a_token_stays(v4: Run, room: Path) -> None:
    for text in (
        "hf_download",
        "hf_0123456789abcdefghi",
        "half_cut",
        "hf-aBcDeFgHiJkLmNoPqRsTuVwX",
    ):
        done = v4("inspect", room / text)
        assert done.code == 1 and text in done.err


def test_a_short_value_of_the_environment_shreds_nothing(
    v4: Run, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "small")
    assert v4("inspect", "small").out.startswith("small: ")


def test_a_repository_with_a_token_in_its_name_is_not_asked_for(
    room: Path, hub: LoopbackHub, v4: Run
) -> None:
    for name in (f"org/{USER}", f"{USER}/flash", f"org/flash@{USER}"):
        done = v4("inspect", name)
        assert done.code == 2 and not hub.log
        assert done.err.startswith("error: a Hub token stands where others would see it\n")
        assert "revoke it" in done.err


@pytest.mark.parametrize("key", ["name", "description", "parent", "scores"])
def test_a_recipe_with_a_token_is_refused(key: str, room: Path, v4: Run) -> None:
    (room / "mine.yaml").write_text(f"{key}: a {USER}\n" + "name: mine\n" * (key != "name"))
    for args in (("check", room / "mine.yaml"), ("show", "demo", "--set", f"{key}={USER}")):
        done = v4("recipes", *args)
        assert done.code == 2
        assert f"{key}: must not hold a Hub token: a recipe is copied into the replica" in done.err
        assert_hidden(done.out + done.err, USER)


def test_ranks_report_without_it(torchrun: Torchrun, room: Path) -> None:
    where = ("-p", room / "small", "-o", room / OWN)
    done = torchrun(2, "--debug", "slice", "-r", f"./{USER}.yaml", *where, HF_TOKEN=OWN)
    assert done.code == 1 and "UsageError: the recipe cannot be read" in done.err
    assert "hf_***.yaml" in done.err
    assert_hidden(done.out + done.err, USER)
    assert OWN not in done.out + done.err


def test_a_push_with_a_token_is_refused(
    replica: Path,
    writes: Writes,
    hub: LoopbackHub,
    v4: Run,
) -> None:
    for args in ((f"me/{USER}",), (REPO, "--revision", USER), (REPO, "--commit-message", USER)):
        done = v4("push", replica, *args, "--create")
        assert done.code == 2 and "a Hub token stands where others would see it" in done.err
        assert_hidden(done.out + done.err, USER)
    assert not hub.log and not hub.repos


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json"])
def test_a_file_with_a_token_is_not_pushed(
    name: str,
    replica: Path,
    hub: LoopbackHub,
    v4: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = replica / name
    for token in (USER, OWN):
        monkeypatch.setenv("HF_TOKEN", OWN)
        made_with = f"made with {token}"
        if name == "README.md":
            path.write_text(f"# Mine\n{made_with}\n")
        else:
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**found, "note": made_with}))
        done = v4("push", replica, REPO, "--create", "--force")
        assert done.code == 2 and f"\n  where: {path}\n" in done.err
        assert_hidden(done.out + done.err, token)
        assert not hub.repos


def test_card_and_report_hide_it(replica: Path, room: Path, v4: Run) -> None:
    named = replica.rename(replica.with_name(USER))
    with v4surgery.open(named) as opened:
        card = make_card(opened)
    assert "# hf" in card
    assert_hidden(card, USER)
    done = v4("validate", named, "-p", room / "small", "--report", room / "report", "--json")
    assert done.code == 0, done.err
    for path in (room / "report").iterdir():
        assert_hidden(path.read_text(), USER)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "~/elsewhere"},
        {"XDG_CACHE_HOME": "/cache"},
        {"HF_HOME": "$HOME/a", "XDG_CACHE_HOME": "/cache"},
        {"HF_HOME": "/b", "HF_TOKEN_PATH": "~/c/$USER.token"},
    ],
)
def test_the_log_in_is_where_huggingface_hub_has_it(environment: dict[str, str]) -> None:
    program = (
        "from huggingface_hub.constants import HF_TOKEN_PATH; from v4surgery import redact;"
        "print(HF_TOKEN_PATH); print(redact._log_in_file())"
    )
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "HOME": "/home/me", "USER": "me", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, ours = done.stdout.splitlines()
    assert ours == theirs


def test_streams_of_ascii_and_closed_ones_are_no_way_around(room: Path) -> None:
    def run(redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        command = f"'{sys.executable}' -m v4surgery inspect './é{USER}' {redirection}"
        return subprocess.run(
            command, shell=True, capture_output=True, check=False, env={**os.environ, **environment}
        )

    for done in (run(""), run("", PYTHONIOENCODING="ascii"), run(">&-")):
        assert done.returncode == 1 and done.stdout == b""
        assert "where: éhf_***\n".encode() in done.stderr, done
    assert run(">&- 2>&-").returncode == 1
