"""Recording a trace: a streamed run with taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.distributed.parent import require_same
from v4surgery.distributed.team import leads
from v4surgery.errors import UsageError
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import BlockTiming, Streamer, StreamOptions
from v4surgery.text.prompts import check_ids
from v4surgery.validation.taps import MODEL_TAPS, TAPS, TapRecorder
from v4surgery.validation.trace import TraceWriter
from v4surgery.version import __version__


@dataclass(frozen=True)
class Recording:
    """What recording a trace cost.

    Attributes:
        path: The trace file.
        timings: Of each block.
        bytes_read: In all, embedding rows aside.
        num_tokens: Of all prompts.
        num_activations: Tensors in the file.
        ran: How often each operation ran.
    """

    path: Path
    timings: tuple[BlockTiming, ...]
    bytes_read: int
    num_tokens: int
    num_activations: int
    ran: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def record_trace(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    out: Path,
    *,
    taps: Sequence[str],
    numerics: Numerics,
    device: torch.device | str = "cpu",
    options: StreamOptions | None = None,
    store_dtype: torch.dtype | None = None,
    progress: Callable[[BlockTiming], None] | None = None,
) -> Recording:
    """Run the trunk on some prompts, block by block, and keep activations.

    Args:
        checkpoint: A parent or a replica.
        prompts: Token ids of each.
        out: The trace file to write.
        taps: Names from validation.taps.
        numerics: Mode, dtype and operations.
        device: Where blocks compute.
        options: Budgets.
        store_dtype: Floating activations are stored so; None keeps theirs.
        progress: Called after each block.

    Raises:
        UsageError: Prompts that the model cannot run.
        OutputError: The trace exists already, or cannot be written.
        CheckpointError: The ranks have opened different checkpoints.
    """
    if not prompts:
        raise UsageError("no prompts", rule="at least one")
    for number, ids in enumerate(prompts):
        check_ids(ids, checkpoint.config, f"prompt {number}")
    team = None if options is None else options.team
    require_same(team, checkpoint)
    # The other ranks take part in the forward and keep nothing.
    writer = TraceWriter(out, store_dtype) if leads(team) else None
    about: dict[str, Any] | None = None
    try:
        with Streamer(checkpoint, numerics, device, options) as streamer:
            streamer.run(
                prompts,
                observe=None if writer is None else TapRecorder(taps, writer.record),
                logits="all" if "logits" in taps else "none",
                progress=progress,
            )
        about = _about(checkpoint, prompts, taps, numerics)
    finally:
        if writer is not None:
            writer.close(about)
    return Recording(
        out,
        tuple(streamer.timings),
        streamer.bytes_read,
        sum(len(ids) for ids in prompts),
        0 if writer is None else len(writer),
        dict(sorted(numerics.ops.ran.items())),
    )


def _about(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    taps: Sequence[str],
    numerics: Numerics,
) -> dict[str, Any]:
    """What the activations are, for whoever reads the file."""
    meanings = {**MODEL_TAPS, **{name: tap.meaning for name, tap in TAPS.items()}}
    return {
        "format": 1,
        "tool": {"name": "v4surgery", "version": __version__},
        "model": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "mode": numerics.mode,
        "dtype": str(numerics.dtype).removeprefix("torch."),
        "implementation": numerics.ops.implementation,
        "names": "<prompt>/<block><tap>",
        "taps": {name: meanings[name] for name in taps},
        "prompts": [list(ids) for ids in prompts],
    }
