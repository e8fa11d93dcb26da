"""All three grades of faithfulness in one report with a verdict.

*Bytes*: every tensor is what the plan makes of the parent. *Function*: the replica is its parent
with the removed units masked out (on request). *Behaviour*: how close its activations and
predictions come to the parent's. A difference of bytes or of function fails the replica; how close
it must come is for the recipe's ``validate:`` section to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from v4surgery.catalogue import I64
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import StreamOptions
from v4surgery.slicers.provenance import read_provenance, read_recipe
from v4surgery.slicers.verify import Verification, verify_replica
from v4surgery.text.prompts import check_ids
from v4surgery.validation.behaviour import compare_behaviour
from v4surgery.validation.masked import check_masked
from v4surgery.validation.thresholds import check_thresholds, summarize_behaviour
from v4surgery.validation.verdict import Assignment, BrokenTensor, Setting, Validation

Step = Callable[[str], None]


def validate_replica(
    replica: Checkpoint,
    parent: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    make_numerics: Callable[[], Numerics] = Numerics,
    device: torch.device | str = "cpu",
    masked: bool = False,
    sample: int | None = None,
    workers: int = 2,
    options: StreamOptions | None = None,
    progress: Step | None = None,
) -> Validation:
    """Judge a replica by its parent.

    Args:
        replica: What to judge.
        parent: What it was cut from; streamed, and never in memory as a whole.
        prompts: Token ids in the replica's vocabulary.
        make_numerics: Mode, dtype and operations; called for each model, so that what ran is
            counted for each.
        device: Where blocks compute.
        masked: Whether to compare with the masked parent too, in float32.
        sample: Compare the bytes of so many random chunks only; None compares all.
        workers: Threads that compare bytes.
        options: Budgets of each model.
        progress: Called with ``bytes``, then with each block's prefix when it is done.

    Raises:
        UsageError: The parent is another one, or the prompts cannot be run.
        CheckpointError: Either is no checkpoint, or the replica has no record.
    """
    if not prompts:
        raise UsageError("no prompts", rule="at least one")
    for number, ids in enumerate(prompts):
        check_ids(ids, replica.config, f"prompt {number}")
    team = None if options is None else options.team
    if masked and team is not None:
        raise UsageError(
            "the masked parent is compared in one process",
            where="--masked",
            value=f"{team.size} ranks",
            rule="without torchrun",
        )
    record, recipe = read_provenance(replica), read_recipe(replica)
    verification = verify_replica(replica, parent, sample=sample, workers=workers, team=team)
    if progress is not None:
        progress("bytes")
    broken = find_broken_tensors(replica, verification)
    unsafe = _why_not_run(replica, verification, broken)
    grade_two = behaviour = None
    if not unsafe:
        if masked:
            grade_two = check_masked(
                replica, parent, prompts, device=device, options=options, progress=progress
            )
        behaviour = compare_behaviour(
            replica,
            parent,
            record,
            prompts,
            make_numerics=make_numerics,
            device=device,
            options=options,
            progress=None if progress is None else lambda timing: progress(timing.prefix),
        )
    summary = {"tensors_compared": float(verification.tensors)}
    if grade_two is not None and grade_two.worst is not None:
        summary["masked_error"] = grade_two.worst.error
    checks: tuple[Any, ...] = ()
    if behaviour is not None:
        summary |= summarize_behaviour(behaviour)
        checks = check_thresholds(recipe.validate_, summary)
    return Validation(
        replica=replica.name,
        parent=parent.name,
        recipe=recipe.name,
        setting=Setting.of(make_numerics(), device, prompts),
        verification=verification,
        broken=broken,
        masked=grade_two,
        behaviour=behaviour,
        not_run=unsafe,
        checks=checks,
        numbers=summary,
        assignment=Assignment.of(replica, parent, record),
        transforms=_transforms(record),
    )


def find_broken_tensors(replica: Checkpoint, verified: Verification) -> tuple[BrokenTensor, ...]:
    """Layer and sub-module of every tensor that the verification names, in the replica's order."""
    problems = {name: what for name, _, what in (p.partition(": ") for p in verified.problems)}
    found = []
    for stored in replica.tensors.values():
        entry = stored.entry
        for name in (entry.stem + entry.template.suffix, entry.stem + ".scale"):
            if name in problems:
                block = entry.block.prefix.rstrip(".") if entry.block else "model"
                inner = entry.stem[len(entry.block.prefix) :] if entry.block else entry.stem
                found.append(BrokenTensor(name, block, inner, problems[name]))
    return tuple(found)


def _why_not_run(
    replica: Checkpoint, verified: Verification, broken: Sequence[BrokenTensor]
) -> str | None:
    """Why the models cannot be run side by side, if so.

    A wrong value can be run and compared. A hash table may name experts that there are not, and
    of tensors of other shapes than planned nothing says what to compare with what.
    """
    for tensor in broken:
        if replica.tensors[_stem(replica, tensor.name)].entry.template.storage == I64:
            return f"{tensor.name} may name experts that the replica does not have"
        if "and must be" in tensor.what:
            return f"{tensor.name}: {tensor.what}"
    ends = ("planned, but not in the replica", "in the replica, but not planned")
    return next((problem for problem in verified.problems if problem.endswith(ends)), None)


def _stem(replica: Checkpoint, name: str) -> str:
    for suffix in (".weight", ".scale", ""):
        stem = name.removesuffix(suffix) if suffix else name
        if stem in replica.tensors:
            return stem
    raise KeyError(name)


def _transforms(record: Any) -> dict[str, int]:
    """How many stored tensors came about in each way."""
    counts: dict[str, int] = {}
    for item in record["tensors"].values():
        counts[item["how"]] = counts.get(item["how"], 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
