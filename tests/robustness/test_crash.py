"""A slice that is killed or interrupted: the same command finishes it, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import v4surgery
from tests.cli.conftest import Run, Start
from v4surgery.synth import plan_synthesis, write_synthesis

WORKERS = 2
RECIPE = "name: big\nkeep: {layers: {count: 10}}\nstore: {dtype: bf16, max_shard_size: 40MB}\n"


class Undisturbed(NamedTuple):
    """A run that nobody disturbed."""

    parent: Path
    recipe: Path
    out: Path
    chunks: int
    digests: dict[str, str]

    def command(self, out: Path) -> tuple[object, ...]:
        return (
            *("slice", "--recipe", self.recipe, "--parent", self.parent, "--out", out),
            *("--max-workers", WORKERS, "--json"),
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """60 MB of parent, 120 MB of replica in 4 files and 1400 chunks: a second or two of work."""
    folder = tmp_path_factory.mktemp("crash")
    changes = {"n_routed_experts": 32, "vocab_size": 16384}
    write_synthesis(plan_synthesis("demo", changes=changes), folder / "parent", workers=2)
    (folder / "big.yaml").write_text(RECIPE)
    with v4surgery.open(folder / "parent") as parent:
        plan = v4surgery.plan(parent, v4surgery.load_recipe(folder / "big.yaml"))
        written = v4surgery.slice(plan, folder / "replica", workers=WORKERS).written
    return Undisturbed(
        *(folder / "parent", folder / "big.yaml", folder / "replica"),
        chunks=written.chunks_computed,
        digests=digests(folder / "replica"),
    )


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder; so it also says which files there are."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def journal(out: Path) -> list[bytes]:
    """The chunk lines that are whole: all but the first line, and a torn one at the end."""
    path = out / ".v4surgery" / "journal.jsonl"
    return path.read_bytes().split(b"\n")[1:-1] if path.is_file() else []


def wait_for_chunks(process: subprocess.Popen[str], out: Path, chunks: int) -> None:
    deadline = time.monotonic() + 60
    while len(journal(out)) < chunks:
        assert process.poll() is None, "it was done before it could be disturbed"
        assert time.monotonic() < deadline, "it does not get on"
        time.sleep(0.005)


def kill(process: subprocess.Popen[str], out: Path, chunks: int) -> None:
    """kill -9 once the journal has so many chunks."""
    wait_for_chunks(process, out, chunks)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def num_whole_tensors(out: Path, finished: Path) -> int:
    """How many tensors stand in the shards of ``out``, finished or .part, as they must be."""
    whole = 0
    for path in finished.glob("*.safetensors"):
        part = out / f"{path.name}.part"
        found = part if part.exists() else out / path.name
        if not found.exists():
            continue
        want, have = path.read_bytes(), found.read_bytes()
        base = 8 + int.from_bytes(want[:8], "little")
        for info in json.loads(want[8:base]).values():
            begin, end = (base + offset for offset in info["data_offsets"])
            whole += want[begin:end] == have[begin:end]
    return whole


def finish(run: Run, undisturbed: Undisturbed, out: Path) -> dict[str, Any]:
    """The same command again: it ends well, with the same files; returns what it reports."""
    done = run(*undisturbed.command(out))
    assert (done.code, done.err) == (0, "")
    report: dict[str, Any] = json.loads(done.out)
    assert digests(out) == undisturbed.digests
    return report


def test_slice_that_was_killed_twice_finishes_with_the_same_bytes(
    undisturbed: Undisturbed, start: Start, v4: Run, tmp_path: Path
) -> None:
    out = tmp_path / "replica"
    for share in (8, 3):
        kill(start(*undisturbed.command(out)), out, undisturbed.chunks // share)
    lines = [json.loads(line) for line in journal(out)]
    assert undisturbed.chunks // 3 <= len(lines) < undisturbed.chunks
    ended = {line["job"] for line in lines if line["chunk"] + 1 == line["of"]}
    # What is whole on the disk and not in the journal is done again: what each worker had begun.
    redone = num_whole_tensors(out, undisturbed.out) - len(ended)
    assert 0 <= redone <= WORKERS
    report = finish(v4, undisturbed, out)
    assert report["chunks_reused"] == len(lines)
    assert report["chunks_computed"] == undisturbed.chunks - len(lines)
    assert report["already_complete"] is False and report["bytes_reused"] > 0


def test_slice_that_was_interrupted_exits_130_and_resumes(
    undisturbed: Undisturbed, start: Start, v4: Run, tmp_path: Path
) -> None:
    out = tmp_path / "replica"
    process = start(*undisturbed.command(out))
    wait_for_chunks(process, out, undisturbed.chunks // 4)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "interrupted: synth, slice, convert and push go on from here when run again\n"
    lines = journal(out)
    report = finish(v4, undisturbed, out)
    assert report["chunks_reused"] == len(lines) >= undisturbed.chunks // 4
    assert report["chunks_computed"] == undisturbed.chunks - len(lines)


def test_second_process_on_the_same_out_is_refused(
    undisturbed: Undisturbed, start: Start, v4: Run, tmp_path: Path
) -> None:
    out = tmp_path / "replica"
    process = start(*undisturbed.command(out))
    wait_for_chunks(process, out, 10)
    process.send_signal(signal.SIGSTOP)
    done = v4(*undisturbed.command(out))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: another process is writing this output folder\n")
    assert f"  where: {out}\n" in done.err and "  next: wait for it to end" in done.err
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["chunks_computed"] == undisturbed.chunks
    assert digests(out) == undisturbed.digests


def test_only_the_same_recipe_goes_on_with_what_was_killed(
    undisturbed: Undisturbed, start: Start, v4: Run, tmp_path: Path
) -> None:
    out = tmp_path / "replica"
    kill(start(*undisturbed.command(out)), out, 100)
    before = digests(out)
    done = v4(*undisturbed.command(out), "--set", "keep.layers.count=9")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: the output folder holds an unfinished run of another plan\n")
    assert digests(out) == before
    *same, _ = undisturbed.command(out)  # without --json
    done = v4(*same)
    text = done.out.replace("\n  ", " ")
    assert (done.code, done.err) == (0, "") and text.startswith(f"{out}: found ")
    assert " done, wrote the other " in text
