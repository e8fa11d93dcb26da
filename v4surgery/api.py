"""The library's verbs: open, score, plan, slice, verify, validate and convert."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.conversion.run import Converted, plan_conversion, run_conversion
from v4surgery.distributed.launch import find_launch
from v4surgery.errors import UsageError
from v4surgery.recipes import Recipe, load_recipe
from v4surgery.slicers.apply import DEFAULT_MEMORY_BYTES, Replica, WriteOptions, slice_plan
from v4surgery.slicers.plan import Plan, make_plan
from v4surgery.slicers.verified import record_verification
from v4surgery.slicers.verify import Verification, verify_replica

if TYPE_CHECKING:
    import torch

    from v4surgery.distributed.team import Team
    from v4surgery.importance.score import Scoring
    from v4surgery.validation.verdict import Validation

PathLike = str | os.PathLike[str]


def open(  # noqa: A001 - the public name is v4surgery.open
    path: PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> Checkpoint:
    """Open a parent or a replica lazily: config and headers are read and checked, nothing else.

    Args:
        path: A local folder, or ``org/name`` or ``org/name@revision`` on the Hub.
        revision: Branch, tag or commit of a repository.
        token: For the Hub: a token, False for none, None for huggingface_hub's own.

    Raises:
        CheckpointError: Not a DeepSeek-V4 checkpoint, or one that contradicts itself; or no such
            folder or repository, or none that may be read.
        ReadError: The Hub does not answer as it should.
    """
    return open_checkpoint(path, revision=revision, token=token)


def score(
    parent: Checkpoint | PathLike,
    prompts: Sequence[Sequence[int]] | PathLike,
    out: PathLike,
    *,
    axes: Sequence[str] | None = None,
    second_moments: Sequence[str] = (),
    mode: str = "exact",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    implementation: str = "reference",
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Scoring:
    """Score a parent's units by its activations, for ``by: scores`` and the like in recipes.

    Args:
        parent: What is scored; streamed, never in memory as a whole.
        prompts: Token ids of each, or a file of prompts.
        out: The scores file.
        axes: Keys below ``keep`` in a recipe; None scores all of them.
        second_moments: Axes of which to keep second moments too, large matrices.
        mode: ``exact``, or ``official``: every rounding of the official inference code.
        dtype: Of activations; by default float32 in exact, else bfloat16.
        device: Where it computes.
        implementation: Which operations run.
        workers: Threads; by default one for each core.
        progress: Called with each block's prefix as it is done.

    Raises:
        UsageError: The prompts cannot be run.
        OutputError: Something else than scores stands at ``out``, or a score is not finite.
    """
    import torch

    from v4surgery.importance.names import AXES
    from v4surgery.importance.score import score_parent
    from v4surgery.kernels.dispatch import Ops
    from v4surgery.model.numerics import Numerics
    from v4surgery.model.streaming import StreamOptions
    from v4surgery.validation.default_prompts import choose_prompts

    source = parent if isinstance(parent, Checkpoint) else open_checkpoint(parent)
    if isinstance(prompts, str | os.PathLike):
        prompts = choose_prompts(source, Path(prompts))
    dtype = dtype or (torch.bfloat16 if mode == "official" else torch.float32)
    return score_parent(
        source,
        prompts,
        Path(out),
        axes=AXES if axes is None else axes,
        second_moments=second_moments,
        numerics=Numerics(mode, dtype, Ops(implementation)),
        device=device,
        options=StreamOptions(workers=workers or default_workers(source)),
        progress=None if progress is None else lambda timing: progress(timing.prefix),
    )


def plan(
    parent: Checkpoint,
    recipe: Recipe | str,
    overrides: Sequence[str] = (),
    *,
    scores: PathLike | None = None,
    team: Team | None = None,
) -> Plan:
    """Everything about a replica before its first byte is written; print it, save it, hash it.

    Args:
        parent: An opened parent.
        recipe: A recipe, the name of a built-in one, or the path of a file.
        overrides: ``key.path=value`` changes to a named recipe.
        scores: Scores file, instead of the recipe's.
        team: Ranks that are to write it; all of them call this, and the first one chooses.

    Raises:
        RecipeError: The recipe has problems; all are listed.
        PlanError: It cannot be applied to this parent, or the scores are of another one.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise UsageError("overrides go with a recipe's name, not with a Recipe object")
    if scores is not None:
        recipe = recipe.model_copy(update={"scores": os.fspath(scores)})
    return make_plan(parent, recipe, team)


def slice(  # noqa: A001 - the public name is v4surgery.slice
    plan: Plan,
    out: PathLike,
    *,
    workers: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
    team: Team | None = None,
) -> Replica:
    """Write the replica of a plan; the same call again resumes, or finds it done.

    Args:
        plan: From :func:`plan`.
        out: The replica's folder; new, empty, or holding this very plan.
        workers: Threads; by default 8 where the Hub is read, else one for each core.
        memory_bytes: Bound on what the workers use together.
        device: Where weights are decoded: auto (a GPU if there is one), cpu or cuda.
        progress: Called with payload bytes as they are written.
        team: Ranks that write whole files each; all of them call this.

    Raises:
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The parent could not be read exactly, or changed meanwhile.
    """
    options = WriteOptions(
        workers or default_workers(plan.parent), memory_bytes, device, progress, team
    )
    return slice_plan(plan, Path(out), options)


def verify(
    replica: Checkpoint | Replica | PathLike,
    parent: Checkpoint | PathLike,
    *,
    sample: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Grade one of faithfulness: compute every tensor again from the parent and compare bytes.

    Where all of them are equal, ``verified.json`` is written beside the replica.

    Args:
        replica: What to check.
        parent: What it was cut from.
        sample: Compare only so many random chunks.
        workers: Threads; by default 8 where the Hub is read, else one for each core.
        progress: Called with bytes as they are compared.

    Raises:
        UsageError: The parent is another one.
        CheckpointError: Either is no checkpoint, or the replica has no record.
    """
    path = replica.path if isinstance(replica, Replica) else replica
    opened = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    source = parent if isinstance(parent, Checkpoint) else open_checkpoint(parent)
    workers = workers or default_workers(opened, source)
    verdict = verify_replica(opened, source, sample=sample, workers=workers, progress=progress)
    record_verification(opened, verdict, workers=workers)
    return verdict


def validate(
    replica: Checkpoint | Replica | PathLike,
    parent: Checkpoint | PathLike,
    prompts: Sequence[Sequence[int]] | PathLike | None = None,
    *,
    masked: bool = False,
    report: PathLike | None = None,
    sample: int | None = None,
    mode: str = "exact",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    implementation: str = "reference",
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Validation:
    """Judge a replica by its parent: bytes, function if asked for, behaviour on prompts.

    Args:
        replica: What to judge.
        parent: What it was cut from; streamed, never in memory as a whole.
        prompts: Token ids in the replica's vocabulary, or a file of prompts; by default a few
            built-in ones.
        masked: Whether to compare with the masked parent too.
        report: Folder for report.html and validation.json.
        sample: Compare the bytes of so many random chunks only.
        mode: ``exact``, or ``official``: every rounding of the official inference code.
        dtype: Of activations; by default float32 in exact, else bfloat16.
        device: Where both compute.
        implementation: Which operations run.
        workers: Threads; by default one for each core.
        progress: Called with ``bytes`` and each block's prefix as they are done.

    Returns:
        The report; ``passed`` and ``failures`` say what came out.

    Raises:
        UsageError: The parent is another one, or the prompts cannot be run.
        CheckpointError: Either is no checkpoint, or the replica has no record.
        OutputError: The report cannot be written.
    """
    import torch

    from v4surgery.kernels.dispatch import Ops
    from v4surgery.model.numerics import Numerics
    from v4surgery.model.streaming import StreamOptions
    from v4surgery.validation.default_prompts import choose_prompts
    from v4surgery.validation.report import write_report
    from v4surgery.validation.validate import validate_replica

    path = replica.path if isinstance(replica, Replica) else replica
    opened = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    source = parent if isinstance(parent, Checkpoint) else open_checkpoint(parent)
    if prompts is None or isinstance(prompts, str | os.PathLike):
        prompts = choose_prompts(opened, None if prompts is None else Path(prompts))
    dtype = dtype or (torch.bfloat16 if mode == "official" else torch.float32)
    workers = workers or default_workers(opened, source)
    found = validate_replica(
        opened,
        source,
        prompts,
        make_numerics=lambda: Numerics(mode, dtype, Ops(implementation)),
        device=device,
        masked=masked,
        sample=sample,
        workers=workers,
        options=StreamOptions(workers=workers),
        progress=progress,
    )
    if report is not None:
        write_report(found, Path(report))
    return found


def convert(
    source: Checkpoint | PathLike,
    out: PathLike,
    to: str,
    *,
    ranks: int | None = None,
    max_shard_size: int | None = None,
    nonfinite: str = "error",
    workers: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write a checkpoint in another format or layout; the same call again resumes.

    Args:
        source: A checkpoint: published, saved by transformers, or official shards.
        out: A new or empty folder, or one that holds this very conversion.
        to: ``bf16``, ``fp8``, ``official`` or ``published``.
        ranks: Tensor-parallel ranks of ``official``.
        max_shard_size: Largest file in bytes; by default one for each block.
        nonfinite: What happens where a decoded weight is NaN or infinite: error, warn or keep.
        workers: Threads; by default 8 where the Hub is read, else one for each core.
        memory_bytes: Bound on what the workers use together.
        device: Where weights are decoded: auto (a GPU if there is one), cpu or cuda.
        progress: Called with payload bytes as they are written.

    Raises:
        UsageError: An unknown target, or an option that it does not take.
        PlanError: The target cannot store this checkpoint.
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The source could not be read exactly, or changed meanwhile.
    """
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    conversion = plan_conversion(
        opened, to, ranks=ranks, max_shard_size=max_shard_size, nonfinite=nonfinite
    )
    options = WriteOptions(workers or default_workers(opened), memory_bytes, device, progress)
    return run_conversion(conversion, Path(out), options)


def default_workers(*read: Checkpoint) -> int:
    """Eight where the Hub is read, which waits more than it works; else one a core, at most 8.

    Ranks of one machine share its cores.
    """
    if any(checkpoint.source.identity()["kind"] == "hub" for checkpoint in read):
        return 8
    launch = find_launch()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    return max(min(cores // (1 if launch is None else launch.local_size), 8), 1)
