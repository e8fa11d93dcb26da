"""The two sides of a diff: traces, or models that are run into temporary ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.errors import CheckpointError, UsageError
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import BlockTiming, StreamOptions
from v4surgery.slicers.provenance import read_provenance, read_recipe
from v4surgery.validation.default_prompts import choose_prompts
from v4surgery.validation.diff import TOLERANCE, Diff, View, diff_traces
from v4surgery.validation.mapping import ReplicaMapping
from v4surgery.validation.record import record_trace
from v4surgery.validation.taps import TAPS
from v4surgery.validation.trace import read_about

DIFF_TAPS = ("embed", *TAPS, "logits")


@dataclass(frozen=True)
class Side:
    """A trace, or an opened model with its record if it is a replica."""

    path: Path
    model: Checkpoint | None
    record: dict[str, Any] | None

    @property
    def fingerprint(self) -> str | None:
        if self.model is not None:
            return self.model.fingerprint
        fingerprint: str | None = read_about(self.path)["model"].get("fingerprint")
        return fingerprint

    @property
    def plan_hash(self) -> str | None:
        """Of a replica: what its units and their values follow from."""
        return self.record["plan_hash"] if self.record else None

    @property
    def origin(self) -> str | None:
        """Fingerprint of the parent that a replica was cut from."""
        return self.record["parent"]["fingerprint"] if self.record else None


def diff_models(
    a: str,
    b: str,
    *,
    parent: str | None = None,
    prompts: Path | None = None,
    tokens: int | None = None,
    taps: Sequence[str] = DIFF_TAPS,
    make_numerics: Callable[[], Numerics] = Numerics,
    device: torch.device | str = "cpu",
    options: StreamOptions | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[BlockTiming], None] | None = None,
) -> Diff:
    """Compare two sides; models are run, layer by layer, into files of a temporary folder.

    Args:
        a: Folder of a parent or a replica, or a trace file.
        b: Another one, that the errors are relative to.
        parent: What two replicas were both cut from; by default what the first's recipe names.
        prompts: File of prompts, in the first model's vocabulary; a trace brings its own.
        tokens: Only the first tokens of each prompt.
        taps: What to compare.
        make_numerics: Mode, dtype and operations of each model.
        device: Where blocks compute.
        options: Budgets of each model.
        tolerance: Largest relative error that counts as equal.
        progress: Called after each block of each model.

    Raises:
        UsageError: The sides have nothing in common, or their prompts differ.
    """
    with ExitStack() as stack:
        sides = [_open(name, stack) for name in (a, b)]
        views = _views(sides, parent, stack)
        shared = _prompts(sides, views, prompts, tokens)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        traces = []
        for number, (side, view) in enumerate(zip(sides, views, strict=True)):
            if side.model is None:
                traces.append(side.path)
                continue
            traces.append(folder / f"{number}.safetensors")
            record_trace(
                side.model,
                [view.own_ids(ids, side.model.name) for ids in shared],
                traces[-1],
                taps=taps,
                numerics=make_numerics(),
                device=device,
                options=options,
                progress=progress,
            )
        return diff_traces(
            traces[0], traces[1], view_a=views[0], view_b=views[1], tolerance=tolerance
        )


def _open(name: str, stack: ExitStack) -> Side:
    path = Path(name)
    if path.is_file():
        read_about(path)  # says what is wrong with a file that is no trace
        return Side(path, None, None)
    model = stack.enter_context(open_checkpoint(name))
    try:
        return Side(path, model, read_provenance(model))
    except CheckpointError:
        return Side(path, model, None)


def _views(sides: Sequence[Side], parent: str | None, stack: ExitStack) -> list[View]:
    """The space that both share: a parent's if one is cut from the other, or both from one."""
    first, second = sides
    for child, origin in ((first, second), (second, first)):
        if child.origin is not None and child.origin == origin.fingerprint:
            source = origin.model or _open_origin(child, parent, stack)
            return [View(_mapping(side, source)) if side is child else View() for side in sides]
    if first.origin is not None and first.origin == second.origin:
        if first.plan_hash == second.plan_hash:  # fingerprints are of sizes, not of what was kept
            return [View(), View()]
        source = _open_origin(first, parent, stack)
        return [View(_mapping(side, source)) for side in sides]
    return [View(), View()]


def _mapping(side: Side, parent: Checkpoint) -> ReplicaMapping:
    assert side.model is not None and side.record is not None, side
    return ReplicaMapping(side.model, parent, side.record)


def _open_origin(side: Side, parent: str | None, stack: ExitStack) -> Checkpoint:
    assert side.model is not None, side
    path = parent or read_recipe(side.model).parent
    if path is None:
        raise UsageError(
            "replicas are compared in their parent's units, and it is not named",
            where=side.path,
            rule="the folder of what it was cut from",
            hint="name it with --parent",
        )
    source = stack.enter_context(open_checkpoint(path))
    if source.fingerprint != side.origin:
        raise UsageError(
            "this is not the parent that the replica was cut from",
            where=source.name,
            value=f"fingerprint {source.fingerprint[:16]}",
            rule=f"fingerprint {str(side.origin)[:16]}",
            hint="name the right one with --parent",
        )
    return source


def _prompts(
    sides: Sequence[Side], views: Sequence[View], file: Path | None, tokens: int | None
) -> list[list[int]]:
    """Ids in the shared space: of the trace, if there is one, else for the first model."""
    for side, view in zip(sides, views, strict=True):
        if side.model is None:
            if file is not None or tokens is not None:
                raise UsageError(
                    "a trace brings its own prompts",
                    where=side.path,
                    rule="no --prompts and no --tokens with a trace",
                )
            return [view.shared_ids(ids) for ids in read_about(side.path)["prompts"]]
    model = sides[0].model
    assert model is not None
    # A cut vocabulary has every one of its tokens in the parent's; not the other way round.
    cut = [i for i, view in enumerate(views) if view.mapping is not None]
    chosen = cut[0] if cut and file is None else 0
    source = sides[chosen].model
    assert source is not None
    return [views[chosen].shared_ids(ids) for ids in choose_prompts(source, file, tokens)]
