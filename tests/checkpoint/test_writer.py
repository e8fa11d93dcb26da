from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from blake3 import blake3

from v4surgery.checkpoint.job import WriteResult
from v4surgery.checkpoint.layout import (
    INDEX_FILE,
    OutputTensor,
    ShardLayout,
    pack,
    payload_order,
)
from v4surgery.checkpoint.writer import write_checkpoint
from v4surgery.errors import OutputError
from v4surgery.formats import ITEM_BYTES

PLAN = "plan-1"
CHUNK = 512


def content(name: str, num_bytes: int) -> bytes:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).bytes(num_bytes)


class CopyJob:
    """Yields ``content`` of its outputs, the first in chunks, the others whole in chunk 0."""

    hole = False

    def __init__(self, outputs: Sequence[OutputTensor], chunk_bytes: int = CHUNK) -> None:
        self.outputs, self.chunk_bytes = tuple(outputs), chunk_bytes
        self.num_chunks = max(1, -(-self.outputs[0].nbytes // chunk_bytes))
        self.state: dict[str, Any] = {}

    def compute(self, chunk: int) -> Sequence[bytes | None]:
        event()
        first, *others = [content(item.name, item.nbytes) for item in self.outputs]
        rest = others if chunk == 0 else [None] * len(others)
        return [first[chunk * self.chunk_bytes :][: self.chunk_bytes], *rest]


class HoleJob:
    hole = True
    num_chunks = 0

    def __init__(self, *outputs: OutputTensor) -> None:
        self.outputs = outputs
        self.state: dict[str, Any] = {}

    def compute(self, _chunk: int) -> Sequence[bytes | None]:
        raise AssertionError("a hole has nothing to compute")


def event() -> None:
    """Replaced by tests that count or stop."""


def groups() -> list[list[OutputTensor]]:
    layers = [
        [
            OutputTensor(f"layers.{layer}.attn_norm.weight", "BF16", (64,)),
            OutputTensor(f"layers.{layer}.wq_a.scale", "F8_E8M0", (7, 5)),
            OutputTensor(f"layers.{layer}.wq_a.weight", "F8_E4M3", (100, 31)),
            OutputTensor(f"layers.{layer}.gate.tid2eid", "I64", (9, 6)),
            OutputTensor(f"layers.{layer}.nothing", "F32", (0, 4)),
        ]
        for layer in range(3)
    ]
    return [[OutputTensor("embed.weight", "BF16", (50, 64))], *layers, [], [HEAD]]


HEAD = OutputTensor("head.weight", "F32", (30, 11))


def shards() -> list[ShardLayout]:
    return pack(groups(), 4000, merge=True)


def jobs(chunk_bytes: int = CHUNK) -> list[CopyJob]:
    """A weight and its scale are one job, every other tensor is one of its own."""
    tensors = {item.name: item for group in groups() for item in group}
    scales = {name: name.replace(".weight", ".scale") for name in tensors}
    return [
        CopyJob(
            [item, *([tensors[scales[name]]] if scales[name] in tensors.keys() - {name} else [])],
            chunk_bytes,
        )
        for name, item in tensors.items()
        if not name.endswith(".scale")
    ]


NUM_CHUNKS = sum(job.num_chunks for job in jobs())


def extras(result: WriteResult) -> dict[str, bytes]:
    provenance = {"plan_hash": PLAN, "digests": dict(result.digests)}
    return {"config.json": b"{}\n", "v4surgery.json": json.dumps(provenance).encode()}


def write(out: Path, plan: str = PLAN, workers: int = 2, **options: object) -> WriteResult:
    arguments = {"extra_files": extras, **options}
    return write_checkpoint(out, shards(), jobs(), plan_id=plan, workers=workers, **arguments)  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    """Every file below ``folder``, work files included, with its sha256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_in(path: Path) -> list[tuple[str, bytes]]:
    """Name and bytes in file order, read by safetensors itself."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found = {name: bytes(item["data"]) for name, item in safetensors.deserialize(raw)}
    order = sorted(found, key=lambda name: (header[name]["data_offsets"], name))
    return [(name, found[name]) for name in order]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    write(out)
    return hashes(out)


@pytest.fixture
def each_event(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Lets a test put a callable into the list that runs at the start of every chunk."""
    hooks: list[object] = []

    def run_hooks() -> None:
        for hook in hooks:
            hook()  # type: ignore[operator]

    monkeypatch.setattr(sys.modules[__name__], "event", run_hooks)
    yield hooks


def stop_after(num_events: int, error: BaseException) -> object:
    lock, count = threading.Lock(), Counter[str]()

    def hook() -> None:
        with lock:
            count["events"] += 1
            if count["events"] == num_events:
                raise error

    return hook


# Layout


def test_payload_order_is_the_published_one() -> None:
    dtypes = ["I8", "F8_E4M3", "F8_E8M0", "BF16", "F32", "I64"]
    tensors = [OutputTensor(f"{name}.{dtype}", dtype, (8,)) for name in "ba" for dtype in dtypes]
    names = [item.name for item in payload_order(tensors)]
    assert names == [f"{name}.{dtype}" for dtype in reversed(dtypes) for name in "ab"]


def test_names_are_ordered_as_plain_strings() -> None:
    tensors = [OutputTensor(f"layers.{layer}.x", "F32", (1,)) for layer in (2, 10, 1)]
    names = [item.name for item in payload_order(tensors)]
    assert names == ["layers.1.x", "layers.10.x", "layers.2.x"]


def test_every_dtype_stands_where_safetensors_puts_it() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    torch_names = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
    torch_names |= {"BOOL": "bool", "F8_E5M2": "float8_e5m2"}
    torch_names |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
    torch_names |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    torch_names |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}
    assert set(torch_names) == set(ITEM_BYTES)
    names = random.Random(5).sample(sorted(torch_names), len(torch_names))
    data = {
        f"t{number:02d}.{dtype}": torch.zeros(3).to(getattr(torch, torch_names[dtype]))
        for number, dtype in enumerate(names)
    }
    tensors = [OutputTensor(name, name.partition(".")[2], (3,)) for name in data]
    layout = ShardLayout.build("model.safetensors", payload_order(tensors))
    assert save(data).startswith(layout.header)


def test_a_group_is_a_shard_unless_merging() -> None:
    layouts = pack(groups(), None, merge=False)
    assert [layout.file for layout in layouts] == [
        f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)
    ]
    assert layouts[1].tensors == payload_order(groups()[1])


def test_one_shard_has_the_plain_name() -> None:
    (layout,) = pack(groups(), None, merge=True)
    assert layout.file == "model.safetensors"


def test_no_tensors_give_no_shards() -> None:
    assert pack([[], []], None, merge=True) == []


@pytest.mark.parametrize("merge", [True, False])
def test_shards_keep_every_tensor_once_and_obey_the_limit(merge: bool) -> None:
    rng = random.Random(3)
    for _ in range(100):
        limit = rng.randrange(1, 400)
        names = iter(range(1000))
        some = [
            [OutputTensor(f"t{next(names)}", "I8", (rng.randrange(120),)) for _ in range(size)]
            for size in rng.choices(range(6), k=5)
        ]
        layouts = pack(some, limit, merge)
        placed = [item for layout in layouts for item in layout.tensors]
        assert Counter(placed) == Counter(item for group in some for item in group)
        for layout in layouts:
            assert layout.tensors == payload_order(layout.tensors)
            big = [item for item in layout.tensors if item.nbytes > 0]
            assert layout.payload_bytes <= limit or len(big) == 1


def test_merging_closes_a_shard_only_when_the_next_group_does_not_fit() -> None:
    some = [[OutputTensor(f"t{size}", "I8", (size,))] for size in (30, 60, 10, 1, 99)]
    layouts = pack(some, 100, merge=True)
    assert [layout.payload_bytes for layout in layouts] == [100, 100]


def test_a_tensor_over_the_limit_is_alone_in_its_shard() -> None:
    some = [[OutputTensor(f"t{number}", "I8", (size,)) for number, size in enumerate((5, 500, 5))]]
    layouts = pack(some, 100, merge=True)
    assert [layout.payload_bytes for layout in layouts] == [5, 500, 5]


def test_offsets_follow_each_other_after_the_header() -> None:
    layout = shards()[1]
    position = len(layout.header)
    for item, offset in zip(layout.tensors, layout.offsets, strict=True):
        assert offset == position
        position += item.nbytes
    assert position == layout.total_bytes


# What a run writes


def test_files_open_with_safetensors_and_hold_the_data(tmp_path: Path) -> None:
    write(tmp_path / "out")
    for layout in shards():
        found = tensors_in(tmp_path / "out" / layout.file)
        assert found == [(item.name, content(item.name, item.nbytes)) for item in layout.tensors]


def test_numpy_arrays_of_any_shape_are_written_as_their_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)

    class ArrayJob(CopyJob):
        def compute(self, chunk: int) -> Sequence[object]:  # type: ignore[override]
            return [array[0] if chunk == 0 else array[1], np.array(1.5) if chunk == 0 else None]

    tensors = [OutputTensor("a", "F16", (2, 3, 4)), OutputTensor("b", "F64", ())]
    write_checkpoint(
        tmp_path, pack([tensors], None, merge=True), [ArrayJob(tensors, 24)], plan_id=PLAN
    )
    found = dict(tensors_in(tmp_path / "model.safetensors"))
    assert found == {"a": array.tobytes(), "b": np.array(1.5).tobytes()}


def test_a_chunk_of_megabytes_is_written_whole(tmp_path: Path) -> None:
    item = OutputTensor("big", "I8", (3_000_001,))
    layouts = pack([[item]], None, merge=True)
    result = write_checkpoint(tmp_path, layouts, [CopyJob([item], 2_000_000)], plan_id=PLAN)
    expected = content("big", item.nbytes)
    assert dict(tensors_in(tmp_path / "model.safetensors")) == {"big": expected}
    assert result.digests["big"] == blake3(expected).hexdigest()


def test_the_result_counts_and_digests_what_was_written(tmp_path: Path) -> None:
    result = write(tmp_path)
    tensors = [item for layout in shards() for item in layout.tensors]
    total = sum(item.nbytes for item in tensors)
    assert dict(result.digests) == {
        item.name: blake3(content(item.name, item.nbytes)).hexdigest() for item in tensors
    }
    assert list(result.digests) == [item.name for item in tensors]
    assert (result.payload_bytes, result.bytes_written, result.bytes_reused) == (total, total, 0)
    assert (result.chunks_computed, result.chunks_reused) == (NUM_CHUNKS, 0)
    assert not result.already_complete


def test_the_folder_holds_the_files_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    files = {layout.file for layout in shards()}
    assert names == files | {"config.json", "v4surgery.json", INDEX_FILE}


def test_the_index_lists_every_tensor_and_the_payload_bytes(tmp_path: Path) -> None:
    result = write(tmp_path)
    text = (tmp_path / INDEX_FILE).read_text()
    index = json.loads(text)
    assert index == {
        "metadata": {"total_size": result.payload_bytes},
        "weight_map": {item.name: layout.file for layout in shards() for item in layout.tensors},
    }
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(("index", "expected"), [(None, False), (True, True), (False, False)])
def test_one_shard_has_an_index_only_if_asked(
    tmp_path: Path, index: bool | None, expected: bool
) -> None:
    layouts = pack(groups(), None, merge=True)
    write_checkpoint(tmp_path, layouts, jobs(), plan_id=PLAN, index=index)
    assert (tmp_path / INDEX_FILE).exists() is expected


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, workers: int, undisturbed: dict[str, str]
) -> None:
    write(tmp_path, workers=workers)
    assert hashes(tmp_path) == undisturbed


def test_progress_adds_up_to_the_payload(tmp_path: Path) -> None:
    steps: list[int] = []
    result = write(tmp_path, progress=steps.append)
    assert sum(steps) == result.payload_bytes
    assert all(steps)


def test_holes_take_no_disk_and_read_as_zeros(tmp_path: Path) -> None:
    big = OutputTensor("experts.weight", "I8", (64 << 20,))
    small = OutputTensor("norm.weight", "BF16", (64,))
    layouts = pack([[big], [small]], None, merge=True)
    result = write_checkpoint(tmp_path, layouts, [HoleJob(big), CopyJob([small])], plan_id=PLAN)
    status = (tmp_path / "model.safetensors").stat()
    assert status.st_size == layouts[0].total_bytes
    assert status.st_blocks * 512 < 64 << 10
    assert set(result.digests) == {"norm.weight"}
    assert (result.hole_bytes, result.bytes_written) == (64 << 20, 128)
    found = dict(tensors_in(tmp_path / "model.safetensors"))
    assert not any(found["experts.weight"])
    assert found["norm.weight"] == content("norm.weight", 128)


def test_a_shard_of_nothing_but_holes_is_written(tmp_path: Path) -> None:
    tensors = [OutputTensor(name, "I8", (1 << 20,)) for name in "ab"]
    layouts = pack([[item] for item in tensors], None, merge=False)
    write_checkpoint(tmp_path, layouts, [HoleJob(*tensors)], plan_id=PLAN)
    sizes = [(tmp_path / layout.file).stat().st_size for layout in layouts]
    assert sizes == [layout.total_bytes for layout in layouts]


def test_more_shards_than_file_descriptors_can_be_written(tmp_path: Path) -> None:
    tensors = [OutputTensor(f"t{number}", "I8", (8,)) for number in range(80)]
    layouts = pack([[item] for item in tensors], None, merge=False)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 30, hard))
    try:
        write_checkpoint(tmp_path, layouts, [CopyJob([item]) for item in tensors], plan_id=PLAN)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(Path("/proc/self/fd").iterdir())) == open_now


def test_chunks_that_do_not_add_up_are_our_bug(tmp_path: Path) -> None:
    class ShortJob(CopyJob):
        def compute(self, _chunk: int) -> Sequence[bytes | None]:
            return [bytes(3)]

    item = OutputTensor("short", "I8", (4,))
    with pytest.raises(AssertionError, match="short do not add up"):
        write_checkpoint(tmp_path, pack([[item]], None, True), [ShortJob([item])], plan_id=PLAN)


def test_an_extra_file_must_be_a_plain_name(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write(tmp_path / "out", extra_files=lambda _: {"../escaped": b""})
    assert not (tmp_path / "escaped").exists()


# Whose folder it is


def test_a_finished_folder_is_left_untouched(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path: path.stat() for path in tmp_path.iterdir()}
    result = write(tmp_path)
    assert result.already_complete
    assert {path: path.stat() for path in tmp_path.iterdir()} == before


def test_a_finished_folder_of_another_plan_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(OutputError, match="finished output of another plan") as caught:
        write(tmp_path, plan="plan-2")
    assert f"plan {PLAN}" in str(caught.value)
    assert "choose another --out" in str(caught.value)


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors.part", "v4surgery.json"])
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="not empty, and what is in it is not ours") as caught:
        write(tmp_path)
    assert f"value: {name}" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="cannot be used: Not a directory"):
        write(tmp_path / "out")


def test_an_unfinished_run_of_another_plan_is_refused(
    tmp_path: Path, each_event: list[object]
) -> None:
    interrupt(tmp_path, each_event, after=5)
    before = hashes(tmp_path)
    with pytest.raises(OutputError, match="unfinished run of another plan") as caught:
        write(tmp_path, plan="plan-2")
    assert f"value: plan {PLAN}" in str(caught.value)
    assert hashes(tmp_path) == before


def test_an_unfinished_run_with_other_shards_is_refused(
    tmp_path: Path, each_event: list[object]
) -> None:
    interrupt(tmp_path, each_event, after=5)
    with pytest.raises(OutputError, match="unfinished run of this plan laid out differently"):
        write_checkpoint(tmp_path, pack(groups(), None, merge=True), jobs(), plan_id=PLAN)


def test_a_second_writer_is_told_at_once(tmp_path: Path, each_event: list[object]) -> None:
    errors: list[str] = []

    def second_writer() -> None:
        if not errors:
            errors.append("")
            run = run_child(tmp_path)
            errors[0] = f"{run.returncode} {run.stderr}"

    each_event.append(second_writer)
    write(tmp_path, workers=1)
    assert errors[0].startswith("1 another process is writing this output folder")


def test_a_disk_that_is_too_small_is_found_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    needed = sum(layout.total_bytes for layout in shards())
    needed += needed // 100
    with pytest.raises(OutputError, match="disk is too small") as caught:
        write(tmp_path / "out")
    assert "1,234 bytes free" in str(caught.value)
    assert f"{needed:,} bytes needed" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_holes_need_no_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 16))
    item = OutputTensor("big", "I8", (1 << 30,))
    write_checkpoint(tmp_path, pack([[item]], None, True), [HoleJob(item)], plan_id=PLAN)


# Interruptions


def interrupt(
    out: Path, hooks: list[object], after: int, error: BaseException | None = None, workers: int = 1
) -> None:
    """Leaves ``out`` as a run that failed at the start of chunk number ``after``."""
    error = error or RuntimeError("stopped by the test")
    hooks.append(stop_after(after, error))
    with pytest.raises(type(error)):
        write(out, workers=workers)
    hooks.clear()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_keeps_what_was_done(
    tmp_path: Path,
    each_event: list[object],
    undisturbed: dict[str, str],
    error: BaseException,
    workers: int,
) -> None:
    interrupt(tmp_path, each_event, after=12, error=error, workers=workers)
    result = write(tmp_path)
    assert hashes(tmp_path) == undisturbed
    assert result.chunks_computed + result.chunks_reused == NUM_CHUNKS
    assert result.chunks_reused >= 11


def test_an_interrupt_of_the_main_thread_stops_the_run(
    tmp_path: Path, each_event: list[object], undisturbed: dict[str, str]
) -> None:
    lock, seen = threading.Lock(), Counter[str]()

    def press_control_c() -> None:
        with lock:
            seen["chunks"] += 1
            if seen["chunks"] == 4:
                os.kill(os.getpid(), signal.SIGINT)
                pressed.wait(10)

    pressed = threading.Event()

    def on_signal(*_: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    each_event.append(press_control_c)
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen["chunks"] < NUM_CHUNKS
    each_event.clear()
    write(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_resuming_reports_reused_bytes_as_progress(
    tmp_path: Path, each_event: list[object]
) -> None:
    interrupt(tmp_path, each_event, after=12)
    steps: list[int] = []
    result = write(tmp_path, progress=steps.append)
    assert result.bytes_reused > 0
    assert sum(steps) == result.payload_bytes == result.bytes_reused + result.bytes_written


def test_a_torn_journal_line_costs_its_chunk_only(
    tmp_path: Path, each_event: list[object], undisturbed: dict[str, str]
) -> None:
    interrupt(tmp_path, each_event, after=12)
    journal = tmp_path / ".v4surgery" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    interrupt(tmp_path, each_event, after=2)
    result = write(tmp_path)
    assert result.chunks_reused == 11
    assert hashes(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\n",
        b"[]\n",
        b'{"job":0}\n',
        b'{"job":0,"chunk":0,"of":1,"bytes":[],"digests":[]}\n',
        b'{"job":0,"chunk":9,"of":13,"bytes":[99999999],"digests":["00"]}\n',
        b'{"job":0,"chunk":-2,"of":13,"bytes":[-5],"digests":["00"]}\n',
        b'{"job":99999,"chunk":0,"of":1,"bytes":[1],"digests":["00"]}\n',
    ],
)
def test_a_journal_line_that_makes_no_sense_is_not_believed(
    tmp_path: Path, each_event: list[object], undisturbed: dict[str, str], line: bytes
) -> None:
    interrupt(tmp_path, each_event, after=12)
    with (tmp_path / ".v4surgery" / "journal.jsonl").open("ab") as journal:
        journal.write(line)
    write(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_a_folder_in_which_not_even_the_journal_began_is_fresh(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    (tmp_path / ".v4surgery").mkdir()
    (tmp_path / ".v4surgery" / "lock").touch()
    (tmp_path / ".v4surgery" / "journal.jsonl").write_text('{"format":1,"pla')
    write(tmp_path)
    assert hashes(tmp_path) == undisturbed


@pytest.mark.parametrize("where", ["payload", "header", "size"])
@pytest.mark.parametrize("is_renamed", [True, False])
def test_changed_content_is_found_on_resume_and_redone(
    tmp_path: Path,
    each_event: list[object],
    undisturbed: dict[str, str],
    where: str,
    is_renamed: bool,
) -> None:
    interrupt(tmp_path, each_event, after=NUM_CHUNKS - 3)
    suffix = ".safetensors" if is_renamed else ".part"
    path = next(path for path in sorted(tmp_path.iterdir()) if path.name.endswith(suffix))
    status = path.stat()
    layout = next(layout for layout in shards() if path.name.startswith(layout.file))
    raw = bytearray(path.read_bytes())
    if where == "size":
        del raw[len(layout.header) + 10 :]
    else:
        raw[len(layout.header) + 10 if where == "payload" else 12] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = write(tmp_path)
    assert hashes(tmp_path) == undisturbed
    assert (result.chunks_computed == 4) == (where == "header")


def test_a_finished_shard_is_unfinished_again_while_a_tensor_is_redone(
    tmp_path: Path, each_event: list[object], undisturbed: dict[str, str]
) -> None:
    interrupt(tmp_path, each_event, after=NUM_CHUNKS)
    path = tmp_path / shards()[0].file
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    interrupt(tmp_path, each_event, after=2)
    assert not path.exists()
    write(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_a_finished_job_is_kept_when_the_chunk_size_changes(
    tmp_path: Path, each_event: list[object], undisturbed: dict[str, str]
) -> None:
    interrupt(tmp_path, each_event, after=NUM_CHUNKS - 3)
    for chunk_bytes in (CHUNK - 100, CHUNK + 7):
        again = jobs(chunk_bytes)
        out = tmp_path.with_name(f"{tmp_path.name}-{chunk_bytes}")
        shutil.copytree(tmp_path, out)
        result = write_checkpoint(out, shards(), again, plan_id=PLAN, extra_files=extras)
        assert hashes(out) == undisturbed
        assert result.chunks_reused > result.chunks_computed


def test_as_many_chunks_cut_elsewhere_are_noticed(tmp_path: Path, each_event: list[object]) -> None:
    item = OutputTensor("t", "I8", (1000,))
    layouts = pack([[item]], None, merge=True)
    each_event.append(stop_after(2, RuntimeError()))
    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path, layouts, [CopyJob([item], 500)], plan_id=PLAN)
    each_event.clear()
    for chunk_bytes in (600, 999):
        out = tmp_path.with_name(f"{tmp_path.name}-{chunk_bytes}")
        shutil.copytree(tmp_path, out)
        write_checkpoint(out, layouts, [CopyJob([item], chunk_bytes)], plan_id=PLAN)
        assert dict(tensors_in(out / "model.safetensors")) == {"t": content("t", 1000)}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "write", "ftruncate"])
def test_a_write_error_keeps_what_was_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
    code: int,
    call: str,
) -> None:
    real, lock, calls = getattr(os, call), threading.Lock(), Counter[str]()

    def failing(*arguments: object) -> object:
        with lock:
            calls[call] += 1
            if calls[call] > 2:
                raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OutputError, match=f"writing failed: {os.strerror(code)}") as caught:
            write(tmp_path)
    assert errno.errorcode[code] in str(caught.value)
    assert f"bytes are kept in {tmp_path}" in str(caught.value)
    assert "run the same command again: it resumes" in str(caught.value)
    assert not (tmp_path / INDEX_FILE).exists()
    write(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    pwrite, plain_write = os.pwrite, os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
        patch.setattr(os, "write", lambda fd, data: plain_write(fd, data[:7]))
        write(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_a_file_size_limit_is_a_write_error_and_resumes(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    limit = sorted(layout.total_bytes for layout in shards())[-1] - 1
    run = run_child(tmp_path, "--file-size-limit", str(limit))
    assert run.returncode == 1
    assert run.stderr.startswith("writing failed: File too large")
    assert "value: EFBIG" in run.stderr
    result = write(tmp_path)
    assert result.chunks_reused > 0
    assert hashes(tmp_path) == undisturbed


def test_the_index_is_the_last_file_to_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appeared: list[str] = []
    replace = Path.replace

    def recording(path: Path, target: Path) -> Path:
        appeared.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", recording)
    write(tmp_path)
    files = [layout.file for layout in shards()]
    assert sorted(appeared[: len(files)]) == files
    assert appeared[len(files) :] == ["config.json", "v4surgery.json", INDEX_FILE]


def test_every_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def recording_fsync(fd: int) -> None:
        seen.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        fsync(fd)

    def recording_replace(path: Path, target: Path) -> Path:
        seen.append(("rename", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    write(tmp_path)
    renames = [number for number, (what, _) in enumerate(seen) if what == "rename"]
    assert len(renames) == len(shards()) + 3
    for number in renames:
        assert seen[number - 1] == ("sync", seen[number][1])
        assert seen[number + 1] == ("sync", tmp_path.name)


def test_a_part_beside_its_finished_shard_does_not_stay(
    tmp_path: Path, each_event: list[object], undisturbed: dict[str, str]
) -> None:
    interrupt(tmp_path, each_event, after=NUM_CHUNKS)
    path = tmp_path / shards()[0].file
    shutil.copy(path, f"{path}.part")
    write(tmp_path)
    assert hashes(tmp_path) == undisturbed


def test_an_error_in_the_extra_files_leaves_no_index(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    def failing(result: WriteResult) -> dict[str, bytes]:
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError, match="no card"):
        write(tmp_path, extra_files=failing)
    assert not (tmp_path / INDEX_FILE).exists()
    result = write(tmp_path)
    assert result.chunks_computed == 0
    assert hashes(tmp_path) == undisturbed


def test_an_index_left_by_a_kill_does_not_stand_beside_unchecked_shards(
    tmp_path: Path, each_event: list[object]
) -> None:
    interrupt(tmp_path, each_event, after=NUM_CHUNKS - 3)
    (tmp_path / INDEX_FILE).write_text("{}")
    interrupt(tmp_path, each_event, after=1)
    assert not (tmp_path / INDEX_FILE).exists()


def test_a_finished_folder_with_a_left_over_lock_is_complete(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / ".v4surgery").mkdir()
    (tmp_path / ".v4surgery" / "lock").touch()
    assert write(tmp_path).already_complete
    assert not (tmp_path / ".v4surgery").exists()


def check_kills(out: Path, undisturbed: dict[str, str], rng: random.Random, num_kills: int) -> None:
    """Kills run after run of one OUT at a random step each; the last one ends by itself."""
    workers, kills = rng.choice([1, 2, 7]), 0
    log = out.with_name(out.name + ".log")
    while kills < num_kills:
        step = rng.randrange(1, 2 * NUM_CHUNKS // num_kills)
        run = run_child(out, "--kill-at", str(step), "--workers", str(workers), "--log", str(log))
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
        kills += 1
    result = write(out, workers=workers)
    assert hashes(out) == undisturbed
    computed = log.stat().st_size + result.chunks_computed
    assert NUM_CHUNKS <= computed <= NUM_CHUNKS + kills * workers


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_any_step_then_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], seed: int
) -> None:
    check_kills(tmp_path / "out", undisturbed, random.Random(seed), num_kills=3)


@pytest.mark.slow
def test_fifty_kills_then_the_same_bytes(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    rng = random.Random(50)
    for number in range(10):
        check_kills(tmp_path / f"out{number}", undisturbed, rng, num_kills=5)


# The other process: ``python test_writer.py OUT ...`` writes the same checkpoint


def run_child(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, __file__, str(out), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )


def child_main(arguments: list[str]) -> int:
    out = Path(arguments.pop(0))
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    if "--file-size-limit" in options:
        limit = int(options["--file-size-limit"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "--kill-at" in options:
        kill_at_step(int(options["--kill-at"]), Path(options["--log"]))
    try:
        write(out, workers=int(options.get("--workers", "2")))
    except OutputError as error:
        sys.stderr.write(str(error))
        return 1
    return 0


def kill_at_step(step: int, log: Path) -> None:
    """Dies before the given step: a chunk, a sync, a rename or a removal. Logs chunks computed."""
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    lock, steps = threading.Lock(), Counter[str]()

    def count() -> None:
        with lock:
            steps["all"] += 1
            if steps["all"] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def count_chunk() -> None:
        count()
        os.write(log_fd, b".")

    def counted(function: object) -> object:
        def wrapper(*arguments: object, **keywords: object) -> object:
            count()
            return function(*arguments, **keywords)  # type: ignore[operator]

        return wrapper

    globals()["event"] = count_chunk
    os.fsync = counted(os.fsync)  # type: ignore[assignment]
    Path.replace = counted(Path.replace)  # type: ignore[assignment, method-assign]
    Path.unlink = counted(Path.unlink)  # type: ignore[assignment, method-assign]
    Path.rmdir = counted(Path.rmdir)  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1:]))
