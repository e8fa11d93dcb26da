"""What the command line says when something is wrong, where it says it, and how it exits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.support import parents
from tests.support.hub import LoopbackHub, hub_environment
from v4surgery.cli import _output

SIX_MISTAKES = Path(__file__).parents[1] / "recipes" / "golden" / "six_mistakes.yaml"


def failed(v4: Run, code: int, *args: object) -> str:
    """stderr of a command that must fail with ``code``, print nothing else, and no traceback."""
    done = v4(*args)
    assert done.code == code, done.err
    assert done.out == "" and "Traceback" not in done.err
    return done.err


def test_six_mistakes_are_six_lines(
    v4: Run, same_as_golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SIX_MISTAKES.parent)
    text = failed(v4, 2, "recipes", "check", "./six_mistakes.yaml")
    assert sum(line.startswith("six_mistakes.yaml:") for line in text.splitlines()) == 6
    same_as_golden("six-mistakes", text)


def test_six_mistakes_as_json_are_six_problems(v4: Run) -> None:
    done = v4("recipes", "check", SIX_MISTAKES, "--json")
    data = json.loads(done.out)
    assert done.code == 2 and data["ok"] is False and len(data["problems"]) == 6
    assert done.err.startswith("error: ")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("frob",), "No such command 'frob'"),
        (("plan",), "Missing option '--recipe' / '-r'"),
        (("plan", "--recipe"), "Option '--recipe' requires an argument"),
        (("plan", "--recipe", "demo", "--frob"), "No such option"),
        (("inspect",), "Missing argument 'MODEL'"),
        (("verify", "x", "--sample", "0"), "'--sample'"),
        (("slice", "-r", "demo", "--max-workers", "many"), "'--max-workers'"),
        (("synth", "--out", "x"), "Missing option '--like'"),
    ],
)
def test_a_command_that_makes_no_sense_exits_2(args: tuple[str, ...], text: str, v4: Run) -> None:
    err = failed(v4, 2, *args)
    assert text in err and "unexpected" not in err


def test_a_recipe_that_is_not_there_names_the_nearest(v4: Run) -> None:
    err = failed(v4, 2, "plan", "--recipe", "mini3")
    assert "no built-in recipe has this name\n  value: 'mini3'\n" in err
    assert "did you mean mini3b, mini300m, mini1b?" in err
    assert "next: `v4surgery recipes list`" in err
    assert "one of: demo, experts32" in failed(v4, 2, "recipes", "show", "qqq")
    assert "No such file or directory\n  where: no/such.yaml\n" in failed(
        v4, 2, "recipes", "check", "no/such.yaml"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("keep.hiden_size=3", "unknown key; did you mean hidden_size?"),
        ("keep", "must be dotted.key=value"),
        ("=3", "must be dotted.key=value"),
        ("keep.hidden_size=lots", "keep.hidden_size: must be a whole number"),
        ("store.dtype=bf61", "did you mean bf16?"),
        ("extends=mini3b", "stands in a file only"),
    ],
)
def test_a_mistake_in_set_is_told_with_the_option(
    override: str, text: str, demo_parent: Path, v4: Run
) -> None:
    err = failed(v4, 2, "plan", "-r", "demo", "-p", demo_parent, "--set", override)
    assert text in err and f"--set {override}: " in err


def test_all_mistakes_of_several_sets_are_told_at_once(v4: Run) -> None:
    err = failed(v4, 2, "recipes", "show", "demo", "--set", "a=1", "--set", "seed=-1")
    assert "2 problems" in err and "--set a=1: a: unknown" in err and "--set seed=-1: seed: " in err


def test_a_recipe_that_asks_for_too_much_exits_1(demo_parent: Path, v4: Run) -> None:
    err = failed(v4, 1, "plan", "-r", "demo", "-p", demo_parent, "--set", "keep.hidden_size=512")
    assert "keeps more than the parent has\n  where: keep.hidden_size\n  value: 512\n" in err


@pytest.mark.parametrize("option", ["--max-shard-size", "--memory"])
@pytest.mark.parametrize("value", ["5XB", "0", "-1", "", "five", "1.5", "²", "5GB, x: 1"])
def test_a_size_that_is_none_is_refused(
    option: str, value: str, demo_parent: Path, tmp_path: Path, v4: Run
) -> None:
    out = tmp_path / "r"
    err = failed(v4, 2, "slice", "-r", "demo", "-p", demo_parent, "-o", out, f"{option}={value}")
    assert err.startswith(f"error: not a size\n  where: {option}\n  value: {value}\n  rule: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (("--like", "flsh"), "--like"),
        (("--like", "demo", "--layers", "13"), "--layers"),
        (("--like", "demo", "--set", "hidden_sze=1"), "--set"),
        (("--like", "demo", "--set", "hidden_size"), "--set"),
        (("--like", "demo", "--set", "hidden_size=["), "--set"),
        (("--like", "demo", "--set", "hidden_size=100"), "--set"),
        (("--like", "demo", "--set", "hidden_size=lots"), "--set"),
        (("--like", "demo", "--set", "hidden_size=10000000000"), "--set"),
        (("--like", "demo", "--set", "compress_ratios=4"), "--set"),
    ],
)
def test_a_synthetic_parent_that_cannot_be_is_refused(
    args: tuple[str, ...], where: str, tmp_path: Path, v4: Run
) -> None:
    err = failed(v4, 2, "synth", *args, "--out", tmp_path / "p")
    assert f"\n  where: {where}\n" in err
    assert not (tmp_path / "p").exists()


def test_without_a_parent_the_error_says_how_to_get_one(v4: Run) -> None:
    err = failed(v4, 2, "plan", "--recipe", "demo")
    assert err.startswith("error: no parent\n  where: recipe demo\n")
    assert "--parent" in err and "synth --like demo" in err


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ((), "deepseek-ai/DeepSeek-V4-Flash@main"),
        (("--parent", "deepseek-ai/DeepSeek-V4-Pro"), "deepseek-ai/DeepSeek-V4-Pro@main"),
        (("--parent", "a/b@v1.0"), "a/b@v1.0"),
        (("--parent", "a/b", "--revision", "v1.0"), "a/b@v1.0"),
    ],
)
def test_a_parent_that_is_no_folder_is_looked_for_on_the_hub(
    args: tuple[str, ...], where: str, v4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with LoopbackHub() as hub:
        hub_environment(monkeypatch, hub, tmp_path / "home")
        err = failed(v4, 1, "plan", "--recipe", "mini3b", *args)
    assert err == (
        "error: no such repository, or none that may be read without a token\n"
        f"  where: {where}\n"
        "  value: 401 Repository not found\n"
        "  next: check the name; no local folder has it either. For a private repository log in "
        "with `hf auth login`, or set HF_TOKEN\n"
    )


def test_a_parent_that_is_not_there_is_told(
    v4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for parent in (tmp_path / "nowhere", "nowhere", "here/nowhere", "a/b/c"):
        err = failed(v4, 1, "plan", "--recipe", "demo", "--parent", parent)
        assert err.startswith(f"error: no such folder\n  where: {Path(parent)}\n")
        assert "hf download" not in err


def test_a_pickle_as_parent_is_refused(v4: Run, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x04.")
    for args in (("inspect", path), ("plan", "--recipe", "demo", "--parent", path)):
        assert failed(v4, 1, *args).startswith("error: pickles are never loaded\n")


def test_a_folder_that_is_no_checkpoint_is_refused(v4: Run, tmp_path: Path) -> None:
    assert "no config.json" in failed(v4, 1, "inspect", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in failed(v4, 1, "inspect", tmp_path)


def test_an_unreadable_folder_is_told(
    demo_parent: Path, v4: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not stop root, who may run the tests; so the call itself refuses.
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    err = failed(v4, 1, "inspect", demo_parent)
    assert err.startswith("error: the folder cannot be listed\n") and "Permission denied" in err


def test_out_that_is_not_ours_is_refused_and_left_alone(
    demo_parent: Path, v4: Run, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for args in (("slice", "-r", "demo", "-p", demo_parent), ("synth", "--like", "demo")):
        err = failed(v4, 1, *args, "--out", tmp_path)
        assert "not empty, and what is in it is not ours" in err and "notes.txt" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_out_that_holds_another_replica_is_refused(
    small_parent: Path, v4: Run, tmp_path: Path
) -> None:
    command = ("slice", "-r", "demo", "-p", small_parent, "-o", tmp_path / "r", *SMALL_CUT)
    assert v4(*command).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    err = failed(v4, 1, *command, "--set", "keep.hidden_size=32")
    assert "finished output of another plan" in err and "choose another --out" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_out_that_is_a_file_is_refused(small_parent: Path, v4: Run, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("mine")
    err = failed(v4, 1, "slice", "-r", "demo", "-p", small_parent, "-o", tmp_path / "r", *SMALL_CUT)
    assert "Not a directory" in err
    assert (tmp_path / "r").read_text() == "mine"


# The demo recipe on the small parent: no more than it has.
SMALL_CUT = [
    word
    for change in (
        "keep.layers=null",
        "keep.hidden_size=64",
        "keep.experts={keep: 2, by: gate}",
        "keep.moe_intermediate_size=32",
        "keep.heads=null",
        "keep.q_lora_rank=null",
        "keep.o_lora_rank=null",
        "keep.indexer=null",
    )
    for word in ("--set", change)
]


@pytest.fixture
def spoilt(small_parent: Path, v4: Run, tmp_path: Path) -> tuple[Path, str]:
    """A replica with one bit flipped, and the name of the tensor that has it."""
    out = tmp_path / "replica"
    assert v4("slice", "-r", "demo", "-p", small_parent, "-o", out, *SMALL_CUT).code == 0
    path, name = out / "model.safetensors", "layers.1.attn.wkv.weight"
    blob = bytearray(path.read_bytes())
    base = 8 + int.from_bytes(blob[:8], "little")
    begin, _ = json.loads(blob[8:base])[name]["data_offsets"]
    blob[base + begin + 5] ^= 1
    path.write_bytes(blob)
    return out, name


def test_verify_exits_3_after_one_flipped_bit_and_names_the_tensor(
    spoilt: tuple[Path, str], small_parent: Path, v4: Run
) -> None:
    out, name = spoilt
    err = failed(v4, 3, "verify", out, "--parent", small_parent)
    assert err.startswith(f"error: {out} is not what its plan makes of small: 1 problem(s)\n")
    assert f"  value: {name}: 1 of " in err


def test_a_failed_verify_as_json_says_the_same(
    spoilt: tuple[Path, str], small_parent: Path, v4: Run
) -> None:
    out, name = spoilt
    done = v4("verify", out, "--parent", small_parent, "--json")
    data = json.loads(done.out)
    assert done.code == 3 and data["passed"] is False
    assert len(data["problems"]) == 1 and data["problems"][0].startswith(f"{name}: 1 of ")


def test_many_problems_are_cut_short_for_people_only(
    small_parent: Path, v4: Run, tmp_path: Path
) -> None:
    out = tmp_path / "replica"
    assert v4("slice", "-r", "demo", "-p", small_parent, "-o", out, *SMALL_CUT).code == 0
    tensors = parents.read_shard(out / "model.safetensors")
    zeroed = {n: t._replace(data=bytes(len(t.data))) for n, t in tensors.items()}
    parents.write_shard(out / "model.safetensors", zeroed)
    done = v4("verify", out, "--parent", small_parent, "--json")
    problems = json.loads(done.out)["problems"]
    assert done.code == 3 and len(problems) == len(tensors)
    assert f"         and {len(problems) - 10} more\n" in done.err


def test_verify_against_another_parent_is_a_usage_error(
    spoilt: tuple[Path, str], small_parent: Path, v4: Run, tmp_path: Path
) -> None:
    other = parents.copy_checkpoint(small_parent, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "note": 1}))
    err = failed(v4, 2, "verify", spoilt[0], "--parent", other)
    assert "this is not the parent that the replica was cut from" in err


def test_verify_of_something_else_says_that_it_is_no_replica(small_parent: Path, v4: Run) -> None:
    err = failed(v4, 1, "verify", small_parent)
    assert err.startswith("error: not a replica: it does not say what it was cut from\n")


def test_a_traceback_comes_with_debug_only(v4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = v4("--debug", "plan", "--recipe", "demo")
    assert usage.code == 2 and usage.out == ""
    assert usage.err.startswith("Traceback") and "UsageError: no parent" in usage.err

    def explode() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("v4surgery.recipes.builtin_names", explode)
    err = failed(v4, 1, "recipes", "list")
    assert err.startswith("error: unexpected RuntimeError: boom\n  next: ") and "--debug" in err
    debug = v4("--debug", "recipes", "list")
    assert debug.code == 1 and debug.err.startswith("Traceback")
    assert debug.err.endswith("RuntimeError: boom\n")


def test_warnings_go_to_stderr(small_parent: Path, v4: Run, tmp_path: Path) -> None:
    name = "layers.1.attn.wkv.weight"
    tensor = parents.read_tensors(small_parent)[name]
    assert tensor.dtype == "F8_E4M3"
    spoilt = tensor._replace(data=b"\x7f" + tensor.data[1:])
    parent = parents.replace_tensor(small_parent, tmp_path / "nan", name, spoilt)
    command = ("slice", "-r", "demo", "-p", parent, *SMALL_CUT, "--set", "keep.hidden_size=null")
    assert "NaN" in failed(v4, 1, *command, "-o", tmp_path / "refused")
    done = v4(*command, "-o", tmp_path / "kept", "--set", "store.nonfinite=warn")
    assert done.code == 0
    assert done.err == "warning: layers.1.attn.wkv: 1 values are NaN or infinite\n"
    assert "NaN" not in done.out


def test_a_broken_pipe_ends_quietly(demo_parent: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for args in (["inspect", str(demo_parent)], ["recipes", "list", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "v4surgery", *args],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, "")
    os.close(writer)


@pytest.mark.skipif(not shutil.which("head"), reason="no head")
def test_head_takes_the_first_line(demo_parent: Path) -> None:
    command = f"'{sys.executable}' -m v4surgery inspect '{demo_parent}' | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "demo: DeepSeek-V4 architecture, not a published size\n"
    assert done.stderr == ""


def test_there_is_a_progress_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with _output.progress_bar(100, "slice", quiet=False) as progress:
        assert progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with _output.progress_bar(100, "slice", quiet=True) as progress:
        assert progress is None
    with _output.progress_bar(100, "slice", quiet=False) as progress:
        assert progress is not None
        progress(100)
