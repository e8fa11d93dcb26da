"""Carrying out a plan: the only slicer that reads tensors and writes files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4surgery.catalogue import I64
from v4surgery.checkpoint.folder import LocalFolder
from v4surgery.checkpoint.writer import Job, WriteResult, write_checkpoint
from v4surgery.distributed.parent import require_same
from v4surgery.recipes import dump_recipe
from v4surgery.slicers.basis_file import BasisFile
from v4surgery.slicers.decoding import Decoder, find_decoder
from v4surgery.slicers.lineage import describe_parent
from v4surgery.slicers.plan import RANDOM, REMAP, Plan, TensorEdit
from v4surgery.slicers.prepare import prepare_bases
from v4surgery.slicers.transform import EditJob, worker_bytes
from v4surgery.slicers.vocabulary import cut_companions
from v4surgery.summary import parameters
from v4surgery.synth import RandomJob
from v4surgery.text.chat import TEMPLATE_FILE, needs_template, template_text
from v4surgery.version import __version__

if TYPE_CHECKING:
    from v4surgery.distributed.team import Team

DEFAULT_MEMORY_BYTES = 384_000_000
LONG_BYTES = 4 << 20
PROVENANCE_FILE = "v4surgery.json"
RECIPE_FILE = "recipe.yaml"


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


def slice_plan(
    plan: Plan,
    out: Path,
    *,
    workers: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
    team: Team | None = None,
) -> Replica:
    """Write the replica; the same call again resumes, or finds it done.

    Args:
        plan: What to do.
        out: The replica's folder.
        workers: Threads; fewer run if the memory budget does not hold so many.
        memory_bytes: What the workers may use together.
        device: Where weights are decoded: auto (a GPU if there is one), cpu or cuda. The bytes
            are the same.
        progress: Called with payload bytes as they are written.
        team: Ranks that write whole files each; all of them call this.

    Raises:
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The parent could not be read, or changed meanwhile.
        CheckpointError: The ranks have opened different parents.
    """
    require_same(team, plan.parent)
    jobs: list[EditJob | RandomJob] = make_jobs(plan, device)
    companions = companion_files(plan)
    bases: BasisFile | None = None

    def prepare() -> None:
        nonlocal bases
        if plan.bases:
            if team is None or team.is_first:
                bases = prepare_bases(plan, out, progress)
            else:
                bases = BasisFile(LocalFolder(out), plan.bases)
            opened.callback(bases.close)
            for job in jobs:
                if isinstance(job, EditJob):
                    job.bases = bases

    def extra_files(result: WriteResult) -> dict[str, bytes]:
        plan.parent.source.check_unchanged()
        return companions | _own_files(plan, result, measure(plan, jobs), bases)

    workers = max(min(workers, memory_bytes // worker_bytes(plan)), 1)
    plan.parent.source.will_read(long_spans(plan), workers)
    writer_jobs: list[Job] = list(jobs)
    with ExitStack() as opened:
        written = write_checkpoint(
            out,
            plan.shards,
            writer_jobs,
            plan_id=plan.plan_hash,
            workers=workers,
            prepare=prepare,
            extra_files=extra_files,
            progress=progress,
            cancel=plan.parent.source.cancel,
            team=team,
        )
    if written.already_complete:
        report = json.loads((out / PROVENANCE_FILE).read_text())["report"]
    else:
        report = measure(plan, jobs)
    return Replica(out, plan, written, report)


def long_spans(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Tensors that are read whole, once, and in more than one piece."""
    for edit in plan.edits:
        is_read = edit.source is not None and edit.transform != RANDOM and edit.passes == 1
        if is_read and edit.source is not None and edit.rows is None:
            ref = edit.source.weight
            if ref.end - ref.begin > LONG_BYTES:
                yield ref.file, ref.begin, ref.end


def measure(plan: Plan, jobs: list[EditJob | RandomJob]) -> dict[str, Any]:
    """What the jobs measured, as plain data in the order of the tensors."""
    requantized, tables, nonfinite, rounded = {}, {}, {}, {}
    for edit, job in zip(plan.edits, jobs, strict=True):
        state = job.state
        if "num_changed" in state:
            requantized[edit.target.stem] = _requantization(state)
        elif edit.transform == REMAP:
            tables[edit.target.stem] = state["tokens_by_lost_experts"]
        if "nonfinite" in state:
            nonfinite[edit.target.stem] = state["nonfinite"]
        if state.get("rounded"):
            rounded[edit.target.stem] = state["rounded"]
    lossless = [stem for stem, item in requantized.items() if item["lossless"]]
    report: dict[str, Any] = {
        "transforms": dict(sorted(plan.transforms.items())),
        "requantized": {
            "tensors": len(requantized),
            "lossless": len(lossless),
            "largest_relative_rms": max(
                (item["relative_rms"] for item in requantized.values()), default=0.0
            ),
            "blocks": sum(item["blocks"] for item in requantized.values()),
            "blocks_changed": sum(item["blocks_changed"] for item in requantized.values()),
            "by_tensor": {k: v for k, v in requantized.items() if not v["lossless"]},
        },
        "rounded": rounded,
        "hash_tables": {"tokens_by_lost_experts": tables},
        "nonfinite": nonfinite,
    }
    return report


def _requantization(state: Mapping[str, Any]) -> dict[str, Any]:
    relative = (state["sum_sq_err"] / state["sum_sq"]) ** 0.5 if state["sum_sq"] else 0.0
    return {
        "lossless": state["num_changed"] == 0 and state["num_nonfinite"] == 0,
        "changed": state["num_changed"],
        "blocks": state.get("blocks", 0),
        "blocks_changed": state.get("blocks_changed", 0),
        "relative_rms": float(f"{relative:.6g}"),
        "max_abs": float(f"{state['max_abs']:.6g}"),
    }


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


def provenance_of(
    plan: Plan, digests: Mapping[str, str], report: Mapping[str, Any]
) -> dict[str, Any]:
    """v4surgery.json: where every tensor comes from, without a path or a date."""
    parent = plan.parent
    tensors = {}
    for edit in plan.edits:
        source = edit.source
        for output in edit.outputs:
            item: dict[str, Any] = {"how": edit.transform, "blake3": digests.get(output.name)}
            if source is not None:
                part = source.weight if output is edit.outputs[0] else source.scale
                item["from"] = source.entry.stem
                if part is not None:
                    item["range"] = [part.file, part.begin, part.end]
            if edit.mix is not None:
                item |= edit.mix.to_json()
            tensors[output.name] = item
    counted = [edit for edit in plan.edits if edit.target.template.storage != I64]
    return {
        "format": 1,
        "tool": {"name": "v4surgery", "version": __version__},
        "plan_hash": plan.plan_hash,
        "parent": {
            **parent.source.identity(),
            "fingerprint": parent.fingerprint,
            **describe_parent(parent),
        },
        "recipe": plan.recipe.name,
        "parameters": parameters(plan.catalogue),
        "num_tensors": len(counted),
        "notes": list(plan.notes),
        "selections": plan.selections.to_json(),
        "report": dict(report),
        "tensors": tensors,
    }


__all__ = ["Replica", "companion_files", "make_jobs", "slice_plan"]
