"""Carrying out a plan: the only slicer that reads tensors and writes files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.job import Job, WriteResult
from v4surgery.checkpoint.layout import PROVENANCE_FILE, ShardLayout
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.writer import write_checkpoint
from v4surgery.distributed.parent import require_same
from v4surgery.distributed.team import leads
from v4surgery.recipes import dump_recipe
from v4surgery.slicers.basis_file import BasisFile
from v4surgery.slicers.decoding import Decoder, find_decoder
from v4surgery.slicers.edit import RANDOM, TensorEdit
from v4surgery.slicers.plan import Plan
from v4surgery.slicers.prepare import prepare_bases
from v4surgery.slicers.provenance import RECIPE_FILE, provenance_of
from v4surgery.slicers.tally import measure
from v4surgery.slicers.transform import EditJob, worker_bytes
from v4surgery.slicers.vocabulary import cut_companions
from v4surgery.synth import RandomJob
from v4surgery.text.chat import TEMPLATE_FILE, needs_template, template_text

if TYPE_CHECKING:
    from v4surgery.distributed.team import Team

DEFAULT_MEMORY_BYTES = 384_000_000
LONG_BYTES = 4 << 20


@dataclass(frozen=True)
class WriteOptions:
    """How a plan is carried out; the bytes do not depend on it.

    Attributes:
        workers: Threads; fewer run if the memory budget does not hold so many.
        memory_bytes: What the workers may use together.
        device: Where weights are decoded: auto (a GPU if there is one), cpu or cuda.
        progress: Called with payload bytes as they are written.
        team: Ranks that write whole files each; all of them carry out the plan.
    """

    workers: int
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    device: str = "auto"
    progress: Callable[[int], None] | None = None
    team: Team | None = None

    def workers_of(self, num_bytes: int) -> int:
        """Threads that the memory budget holds if each takes ``num_bytes``."""
        return max(min(self.workers, self.memory_bytes // num_bytes), 1)


class Planned(Protocol):
    """What every plan has: files, what they are made of, and what identifies their bytes."""

    @property
    def parent(self) -> Checkpoint: ...
    @property
    def plan_hash(self) -> str: ...
    @property
    def shards(self) -> Sequence[ShardLayout]: ...


@dataclass(frozen=True)
class Replica:
    """A finished replica on disk, and what making it cost.

    Attributes:
        path: Its folder.
        plan: What was done.
        written: Bytes and chunks written or found intact.
        report: What was measured: requantization errors, hash tables, non-finite weights.
    """

    path: Path
    plan: Plan
    written: WriteResult
    report: Mapping[str, Any]


def make_jobs(
    plan: Plan, device: str = "cpu", bases: BasisFile | None = None
) -> list[EditJob | RandomJob]:
    """A job of the writer for every edit; see :func:`find_decoder` for ``device``.

    Jobs of a plan with bases need the recorded ones before they compute: ``bases`` here, or in
    their attribute later.
    """
    decoder = find_decoder(device)
    return [_job(plan, edit, decoder, bases) for edit in plan.edits]


def _job(
    plan: Plan, edit: TensorEdit, decoder: Decoder, bases: BasisFile | None
) -> EditJob | RandomJob:
    if edit.transform != RANDOM:
        return EditJob(plan.parent, edit, plan.recipe.store.nonfinite, decoder, bases)
    return RandomJob(
        edit.target,
        edit.shape,
        edit.fmt,
        experts=plan.config.n_routed_experts,
        seed=plan.recipe.seed,
        noise=False,
    )


def slice_plan(plan: Plan, out: Path, options: WriteOptions) -> Replica:
    """Write the replica; the same call again resumes, or finds it done.

    Raises:
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The parent could not be read, or changed meanwhile.
        CheckpointError: The ranks have opened different parents.
    """
    require_same(options.team, plan.parent)
    jobs = make_jobs(plan, options.device)
    companions = companion_files(plan)
    bases: BasisFile | None = None

    def prepare() -> None:
        nonlocal bases
        if plan.bases:
            if leads(options.team):
                bases = prepare_bases(plan, out, options.progress)
            else:
                bases = BasisFile(LocalFolder(out), plan.bases)
            opened.callback(bases.close)
            for job in jobs:
                if isinstance(job, EditJob):
                    job.bases = bases

    def files(result: WriteResult, report: Mapping[str, Any]) -> dict[str, bytes]:
        return companions | _own_files(plan, result, report, bases)

    workers = options.workers_of(worker_bytes(plan))
    plan.parent.source.will_read(long_spans(plan), workers)
    with ExitStack() as opened:
        written, report = write_jobs(
            plan,
            out,
            jobs,
            replace(options, workers=workers),
            measure=lambda: measure(plan, jobs),
            extra_files=files,
            prepare=prepare,
        )
    return Replica(out, plan, written, report)


def write_jobs(
    plan: Planned,
    out: Path,
    jobs: Sequence[Job],
    options: WriteOptions,
    *,
    measure: Callable[[], dict[str, Any]],
    extra_files: Callable[[WriteResult, dict[str, Any]], Mapping[str, bytes]],
    prepare: Callable[[], None] = lambda: None,
    index: bool | None = None,
) -> tuple[WriteResult, dict[str, Any]]:
    """Write what jobs compute, and the record of it; gives what was written and measured.

    Args:
        plan: What is done.
        out: The folder.
        jobs: They compute every tensor of the plan's files.
        options: As many workers run as it says.
        measure: Gives the report, once all jobs are done.
        extra_files: Gives the files beside the tensors, with the report in v4surgery.json.
        prepare: Called once the folder is ours, before the first job.
        index: Whether to write an index; None: if there is more than one file.

    Raises:
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The parent could not be read, or changed meanwhile.
    """
    source = plan.parent.source

    def files(result: WriteResult) -> Mapping[str, bytes]:
        made = extra_files(result, measure())
        source.check_unchanged()
        return made

    written = write_checkpoint(
        out,
        plan.shards,
        jobs,
        plan_id=plan.plan_hash,
        weights_id=plan.parent.weights_id,
        workers=options.workers,
        prepare=prepare,
        extra_files=files,
        index=index,
        progress=options.progress,
        cancel=source.cancel,
        team=options.team,
    )
    if not written.already_complete:
        return written, measure()
    report: dict[str, Any] = json.loads((out / PROVENANCE_FILE).read_text())["report"]
    return written, report


def long_spans(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Tensors that are read whole, once, and in more than one piece."""
    for edit in plan.edits:
        is_read = edit.source is not None and edit.transform != RANDOM and edit.passes == 1
        if is_read and edit.source is not None and edit.rows is None:
            ref = edit.source.weight
            if ref.end - ref.begin > LONG_BYTES:
                yield ref.file, ref.begin, ref.end


def companion_files(plan: Plan) -> dict[str, bytes]:
    """Tokenizer and other small files, unchanged unless the vocabulary is cut.

    A tokenizer of V4's prompt format without a chat template gets one: the published format is a
    script, which replicas do not carry.
    """
    files = {name: plan.parent.read_file(name) for name in plan.parent.companions()}
    kept = plan.selections.model.get("vocab_size")
    if kept is not None:
        files = cut_companions(files, kept)
    if needs_template(files):
        files[TEMPLATE_FILE] = template_text().encode()
    return files


def _own_files(
    plan: Plan, result: WriteResult, report: Mapping[str, Any], bases: BasisFile | None
) -> dict[str, bytes]:
    provenance = provenance_of(plan, result.digests, report)
    if bases is not None:
        provenance["bases"] = bases.to_json()
    config = json.dumps(plan.config.to_dict(), indent=2) + "\n"
    return {
        RECIPE_FILE: dump_recipe(plan.recorded_recipe).encode(),
        PROVENANCE_FILE: (json.dumps(provenance, indent=1) + "\n").encode(),
        "config.json": config.encode(),
    }
