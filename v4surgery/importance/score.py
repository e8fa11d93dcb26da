"""Scoring a parent: a streamed forward over some prompts, and the scores file that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.distributed.parent import require_same
from v4surgery.distributed.team import leads
from v4surgery.errors import UsageError
from v4surgery.importance.names import AXES, MOMENTS, check_axes
from v4surgery.importance.scorer import Scorer
from v4surgery.importance.scores_file import ScoresWriter
from v4surgery.importance.totals import Totals
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import BlockTiming, Streamer, StreamOptions
from v4surgery.text.prompts import check_ids
from v4surgery.version import __version__


@dataclass(frozen=True)
class Scoring:
    """What scoring a parent cost.

    Attributes:
        path: The scores file.
        axes: What was scored.
        second_moments: What has second moments.
        num_prompts: Prompts that ran.
        num_tokens: Of all prompts.
        num_scores: Vectors and matrices in the file.
        bytes_read: In all, embedding rows aside.
        timings: Of each block.
        ran: How often each operation ran.
    """

    path: Path
    axes: tuple[str, ...]
    second_moments: tuple[str, ...]
    num_prompts: int
    num_tokens: int
    num_scores: int
    bytes_read: int
    timings: tuple[BlockTiming, ...]
    ran: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def score_parent(
    parent: Checkpoint,
    prompts: Sequence[Sequence[int]],
    out: Path,
    *,
    axes: Sequence[str] = AXES,
    second_moments: Sequence[str] = (),
    numerics: Numerics | None = None,
    device: torch.device | str = "cpu",
    options: StreamOptions | None = None,
    progress: Callable[[BlockTiming], None] | None = None,
) -> Scoring:
    """Run a parent once over some prompts and write what its activations say of its units.

    Args:
        parent: What is scored.
        prompts: Token ids of each.
        out: The scores file; scores that stand there are replaced.
        axes: Which axes to score; others cost nothing.
        second_moments: Axes of which to keep second moments too.
        numerics: Mode, dtype and operations; exact float32 by default.
        device: Where blocks compute.
        options: Budgets.
        progress: Called after each block.

    Raises:
        UsageError: No prompts, or such that the model cannot run; no axes, or unknown ones.
        OutputError: Something else stands at ``out``, or a score is not finite.
        CheckpointError: The ranks have opened different parents.
    """
    if not prompts or not (axes or second_moments):
        what = "axes" if prompts else "prompts"
        raise UsageError(f"no {what}: there is nothing to score", rule="at least one")
    axes = check_axes(axes, AXES, "axes")
    second_moments = check_axes(second_moments, tuple(MOMENTS), "second_moments")
    for number, ids in enumerate(prompts):
        check_ids(ids, parent.config, f"prompt {number}")
    numerics = numerics or Numerics()
    team = None if options is None else options.team
    require_same(team, parent)
    writer = ScoresWriter(out) if leads(team) else None

    def write(totals: Totals) -> None:
        if writer is not None:
            writer.write(totals.scores())

    try:
        with Streamer(parent, numerics, device, options) as streamer:
            scorer = Scorer(
                parent.config,
                axes,
                second_moments,
                len(prompts),
                streamer.load_collapse(),
                write,
                team,
            )
            scorer.count_tokens(prompts)
            streamer.run(
                prompts,
                observe=scorer,
                logits="none",
                drafters=scorer.scores_blocks,
                progress=progress,
            )
            scorer.flush()
        write(scorer.model)
        if writer is not None:
            writer.finish(about_scores(parent, prompts, axes, second_moments, numerics))
    except BaseException:
        if writer is not None:
            writer.drop()
        raise
    return Scoring(
        out,
        axes,
        second_moments,
        len(prompts),
        sum(map(len, prompts)),
        0 if writer is None else len(writer),
        streamer.bytes_read,
        tuple(streamer.timings),
        dict(sorted(numerics.ops.ran.items())),
    )


def about_scores(
    parent: Checkpoint,
    prompts: Sequence[Sequence[int]],
    axes: Sequence[str],
    second_moments: Sequence[str],
    numerics: Numerics,
) -> dict[str, Any]:
    """What a scores file says of itself: nothing of the machine or the day."""
    return {
        "tool": {"name": "v4surgery", "version": __version__},
        "parent": {**parent.source.identity(), "fingerprint": parent.fingerprint},
        "axes": list(axes),
        "second_moments": list(second_moments),
        "num_prompts": len(prompts),
        "num_tokens": sum(map(len, prompts)),
        "prompts_blake3": blake3(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest(),
        "mode": numerics.mode,
        "dtype": str(numerics.dtype).removeprefix("torch."),
        "implementation": numerics.ops.implementation,
    }
