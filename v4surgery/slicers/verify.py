"""Grade one of faithfulness: every byte of a replica is what the plan makes of the parent.

The record in ``v4surgery.json`` says what was selected; the plan is made again from it, every
tensor is computed again from the parent and compared with the replica's bytes. Config against
tensors is checked both ways: opening the replica holds every tensor against the config, and the
plan's config and headers are held against the replica's.

Tensors in another basis are computed again with the recorded bases, whose orthogonality and digest
are checked. Their values are sums, which a BLAS may add in another order: a neighbour of the
expected value passes and is counted (see :mod:`.neighbours`), as long as the tensor's digest is the
recorded one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from v4surgery.checkpoint.layout import OutputTensor
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import TensorRef
from v4surgery.distributed.parent import require_same
from v4surgery.errors import UsageError
from v4surgery.slicers.apply import companion_files, long_spans, make_jobs
from v4surgery.slicers.basis_file import BASES_FILE, BasisFile
from v4surgery.slicers.neighbours import is_rounding
from v4surgery.slicers.plan import Plan, replay
from v4surgery.slicers.provenance import provenance_of, read_provenance, read_recipe
from v4surgery.slicers.transform import EditJob
from v4surgery.synth import RandomJob
from v4surgery.version import __version__

if TYPE_CHECKING:
    from v4surgery.distributed.team import Team


@dataclass(frozen=True)
class Verification:
    """The verdict of a verification.

    Attributes:
        tensors: Stored tensors compared.
        bytes_compared: Bytes compared.
        sampled: Whether only some were compared.
        problems: One sentence for each difference, worst first; empty when faithful.
        rounded: Tensors in another basis whose sums this machine rounds to a neighbouring value.
    """

    tensors: int
    bytes_compared: int
    sampled: bool
    problems: tuple[str, ...]
    rounded: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


def replay_replica(replica: Checkpoint, parent: Checkpoint) -> Plan:
    """The plan of a replica, from its own record.

    Raises:
        UsageError: The parent is not the one it was cut from.
    """
    record = read_provenance(replica)
    if record["parent"]["fingerprint"] != parent.fingerprint:
        raise UsageError(
            "this is not the parent that the replica was cut from",
            where=parent.name,
            value=f"fingerprint {parent.fingerprint[:16]}",
            rule=f"{record['parent']['name']}, fingerprint {record['parent']['fingerprint'][:16]}",
            hint="name the right one with --parent",
        )
    return replay(parent, read_recipe(replica), record)


def verify_replica(
    replica: Checkpoint,
    parent: Checkpoint,
    *,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    team: Team | None = None,
) -> Verification:
    """Compute a replica's tensors again and compare every byte.

    Args:
        replica: What to check.
        parent: What it was cut from.
        sample: Compare so many random chunks only.
        seed: Of the sample.
        workers: Threads.
        progress: Called with bytes as they are compared.
        team: Ranks that compare a part each.

    Raises:
        UsageError: The parent is another one.
        ReadError: Bytes could not be read.
        CheckpointError: The ranks have opened different checkpoints.
    """
    require_same(team, replica)
    require_same(team, parent)
    record = read_provenance(replica)
    plan = replay_replica(replica, parent)
    bases = BasisFile(replica.source, plan.bases) if plan.bases else None
    jobs = make_jobs(plan, bases=bases)
    problems = _record_problems(plan, record, replica) + _basis_problems(bases, record)
    chunks = [(job, chunk) for job in jobs for chunk in range(job.num_chunks)]
    if sample is not None and sample < len(chunks):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(chunks), size=sample, replace=False)
        work = [[chunks[i]] for i in sorted(chosen)]
    else:
        work = [[(job, chunk) for chunk in range(job.num_chunks)] for job in jobs]
        parent.source.will_read(long_spans(plan), workers)
    compare = _Comparison(replica, record["tensors"], progress)
    if team is not None:
        work = work[team.rank :: team.size]
    with ThreadPoolExecutor(workers, "v4surgery-verify") as pool:
        try:
            found = [line for lines in pool.map(compare.run, work) for line in lines]
        except BaseException:
            for checkpoint in (parent, replica):
                checkpoint.source.cancel()  # workers may be waiting for a server
            raise
    parent.source.check_unchanged()
    if team is not None:
        found = compare.merge_ranks(found, team)
    return Verification(
        tensors=len(compare.tensors),
        bytes_compared=compare.num_bytes,
        sampled=sample is not None and sample < len(chunks),
        problems=(*problems, *found),
        rounded=tuple(sorted(compare.rounded)),
    )


def _basis_problems(bases: BasisFile | None, record: Mapping[str, Any]) -> list[str]:
    """The recorded bases against the record, and against what a basis is."""
    if bases is None:
        return []
    problems, recorded = list(bases.problems()), record.get("bases", {})
    if recorded.get("blake3") != bases.digest:
        problems.append(f"{BASES_FILE}: not the file that was recorded: its digest is another one")
    elif json.loads(json.dumps(bases.to_json())) != recorded:
        problems.append(f"v4surgery.json: what it says of {BASES_FILE} is not in that file")
    return problems


def _record_problems(plan: Plan, record: Mapping[str, Any], replica: Checkpoint) -> list[str]:
    """Config, files and record against the plan."""
    wanted = {output.name: output for shard in plan.shards for output in shard.tensors}
    have = _stored(replica)
    problems = [f"{name}: planned, but not in the replica" for name in wanted.keys() - have.keys()]
    problems += [f"{name}: in the replica, but not planned" for name in have.keys() - wanted.keys()]
    problems += [
        f"{name}: {have[name].dtype} {list(have[name].shape)}, and must be "
        f"{wanted[name].dtype} {list(wanted[name].shape)}"
        for name in wanted.keys() & have.keys()
        if not _is_as_planned(have[name], wanted[name])
    ]
    problems += [
        f"{file}: no tensor of the index is in this file"
        for file in replica.source.list_files()
        if file.endswith(".safetensors") and file not in replica.files
    ]
    config = json.loads(replica.read_file("config.json"))
    wanted_config = json.loads(json.dumps(plan.config.to_dict()))
    for key in sorted(config.keys() | wanted_config.keys()):
        if config.get(key) != wanted_config.get(key):
            problems.append(
                f"config.json: {key} is {config.get(key)!r}, and must be {wanted_config.get(key)!r}"
            )
    for name, content in companion_files(plan).items():
        if name not in replica.source.list_files() or replica.read_file(name) != content:
            problems.append(f"{name}: not what the plan makes of the parent's")
    if record["tool"]["version"] == __version__:
        problems += _provenance_problems(plan, record)
    return sorted(problems)


def _provenance_problems(plan: Plan, record: Mapping[str, Any]) -> list[str]:
    """What the record says beside the selections: hash, sizes, and where each tensor is from."""
    wanted = json.loads(json.dumps(provenance_of(plan, {}, {})))
    found = record["tensors"]
    problems = [
        f"v4surgery.json: {name} does not come about as recorded"
        for name, item in wanted["tensors"].items()
        if {**found.get(name, {}), "blake3": None} != item
    ]
    problems += [
        f"v4surgery.json: {key} is not what the plan makes it"
        for key in ("recipe", "parameters", "num_tensors")
        if record.get(key) != wanted[key]
    ]
    if record["plan_hash"] != plan.plan_hash:
        problems.append("v4surgery.json: the plan's hash is not the recorded one")
    return problems


def _stored(replica: Checkpoint) -> dict[str, TensorRef]:
    """Every stored tensor by its published name."""
    found: dict[str, TensorRef] = {}
    for stored in replica.tensors.values():
        found[stored.entry.stem + stored.entry.template.suffix] = stored.weight
        if stored.scale is not None:
            found[stored.entry.stem + ".scale"] = stored.scale
    return found


def _is_as_planned(ref: TensorRef, output: OutputTensor) -> bool:
    return (ref.dtype, ref.shape) == (output.dtype, output.shape)


class _Comparison:
    """Compares chunks; one thread at a time has a job."""

    def __init__(
        self,
        replica: Checkpoint,
        records: Mapping[str, Mapping[str, Any]],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.replica, self.records, self.progress = replica, records, progress
        self.tensors: set[str] = set()
        self.rounded: set[str] = set()
        self.num_bytes = 0
        self.refs = _stored(replica)

    def run(self, chunks: list[tuple[EditJob | RandomJob, int]]) -> list[str]:
        """Differences of the given chunks of one job: all of them in order, or a single one."""
        job = chunks[0][0]
        is_whole = len(chunks) == job.num_chunks
        # Tensors of another shape or dtype are named where headers are compared.
        hashers = {
            output.name: blake3()
            for output in job.outputs
            if (ref := self.refs.get(output.name)) and _is_as_planned(ref, output)
        }
        problems: dict[str, str] = {}
        for _, chunk in chunks:
            offsets = job.offsets(chunk)
            for output, offset, buffer in zip(
                job.outputs, offsets, job.compute(chunk), strict=True
            ):
                if output.name not in hashers or not (expected := _as_bytes(buffer)):
                    continue
                ref = self.refs[output.name]
                begin = ref.begin + offset
                actual = self.replica.source.read(ref.file, begin, begin + len(expected))
                hashers[output.name].update(actual)
                if actual == expected:
                    pass
                elif is_rounding(job, output, actual, expected):
                    self.rounded.add(output.name)
                elif output.name not in problems:
                    problems[output.name] = _first_difference(output.name, actual, expected, begin)
                self._count(output.name, len(expected))
        if is_whole:
            for name, hasher in hashers.items():
                recorded = self.records.get(name, {}).get("blake3")
                if name not in problems and recorded != hasher.hexdigest():
                    right = (
                        "values are within rounding" if name in self.rounded else "bytes are right"
                    )
                    problems[name] = f"{name}: the {right}, the recorded digest is not"
        return list(problems.values())

    def merge_ranks(self, found: list[str], team: Team) -> list[str]:
        """Take in what the other ranks compared; gives the differences of all."""
        lines = []
        self.num_bytes, parts = 0, team.gather((found, self.tensors, self.rounded, self.num_bytes))
        for theirs, tensors, rounded, num_bytes in parts:
            lines += theirs
            self.tensors |= tensors
            self.rounded |= rounded
            self.num_bytes += num_bytes
        return lines

    def _count(self, name: str, num_bytes: int) -> None:
        self.tensors.add(name)
        self.num_bytes += num_bytes
        if self.progress is not None:
            self.progress(num_bytes)


def _as_bytes(buffer: Any) -> memoryview:
    view = memoryview(b"" if buffer is None else buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _first_difference(name: str, actual: bytes, expected: memoryview, begin: int) -> str:
    a, b = np.frombuffer(actual, np.uint8), np.frombuffer(expected, np.uint8)
    where = np.flatnonzero(a != b)
    return f"{name}: {len(where)} of {len(a)} bytes differ, first at file offset {begin + where[0]}"
