"""What carrying out a plan measures: counted job by job, and summed up for the record.

A job's state is journaled with every chunk and restored on resume, so that a resumed run reports
what one run would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.catalogue import FP4, FP8, FP8_F32
from v4surgery.checkpoint.job import Job
from v4surgery.errors import V4SurgeryError
from v4surgery.slicers.blocks import by_block
from v4surgery.slicers.edit import REMAP, TensorEdit
from v4surgery.slicers.plan import Plan


class NonFiniteError(V4SurgeryError):
    """NaN or infinite weights met where the recipe asks to stop."""


class Tally:
    """What is counted while one edit is carried out.

    Args:
        edit: The edit.
        nonfinite: What happens where a decoded weight is NaN or infinite: error, warn or keep.

    Attributes:
        state: The counts, as plain JSON data.
    """

    def __init__(self, edit: TensorEdit, nonfinite: str) -> None:
        self.edit, self.nonfinite = edit, nonfinite
        self.state: dict[str, Any] = {}

    def check_finite(self, bad: NDArray[np.bool_]) -> None:
        """Count values that are NaN or infinite.

        Raises:
            NonFiniteError: There are some, and the recipe or the format refuses them.
        """
        count = int(np.count_nonzero(bad))
        if not count:
            return
        self.state["nonfinite"] = self.state.get("nonfinite", 0) + count
        if self.nonfinite == "error" or self.edit.fmt == FP4:
            raise NonFiniteError(
                "the parent has weights that are NaN or infinite",
                where=self.edit.source.entry.stem if self.edit.source else None,
                value=f"{count} in one chunk",
                rule="finite weights where they are decoded (FP4 cannot store others)",
                hint="store: {nonfinite: warn} keeps them where the format can",
            )

    def count_rounded(self, bits: NDArray[np.uint16], values: NDArray[np.float32]) -> None:
        """Count values that bf16 does not hold."""
        changed = np.count_nonzero(formats.bf16_to_f32(bits) != values)
        self.state["rounded"] = self.state.get("rounded", 0) + int(changed)

    def count_requantized(self, values: NDArray[np.float32], again: NDArray[np.float32]) -> None:
        """Count what quantization changed; ``again`` is what the codes stand for."""
        stats = formats.quantized_error(values, again)
        if self.edit.fmt not in (FP8, FP8_F32):
            self.add(stats)
            return
        changed = by_block(np.logical_or, values != again)  # a chunk is whole rows of blocks
        self.add(stats, changed.size, int(np.count_nonzero(changed)))

    def add(
        self, stats: formats.ErrorStats, blocks: int | None = None, blocks_changed: int = 0
    ) -> None:
        """Add what quantization changed; ``blocks`` of FP8, or None."""
        for name in ("count", "num_changed", "num_nonfinite", "sum_sq_err", "sum_sq"):
            self.state[name] = self.state.get(name, 0) + getattr(stats, name)
        self.state["max_abs"] = max(self.state.get("max_abs", 0.0), stats.max_abs)
        if blocks is not None:
            self.state["blocks"] = self.state.get("blocks", 0) + blocks
            self.state["blocks_changed"] = self.state.get("blocks_changed", 0) + blocks_changed

    def count_lost_experts(self, lost: Sequence[int] | NDArray[np.int64]) -> None:
        """Add tokens by how many of their experts are gone."""
        before = self.state.get("tokens_by_lost_experts", [0] * len(lost))
        self.state["tokens_by_lost_experts"] = [
            a + int(b) for a, b in zip(before, lost, strict=True)
        ]


def measure(plan: Plan, jobs: Sequence[Job]) -> dict[str, Any]:
    """What the jobs measured, as plain data in the order of the tensors."""
    requantized, tables, rounded = {}, {}, {}
    for edit, job in zip(plan.edits, jobs, strict=True):
        state = job.state
        if "num_changed" in state:
            requantized[edit.target.stem] = _requantization(state)
        elif edit.transform == REMAP:
            tables[edit.target.stem] = state["tokens_by_lost_experts"]
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
        "nonfinite": nonfinite_by_stem(
            (edit, job.state) for edit, job in zip(plan.edits, jobs, strict=True)
        ),
    }
    return report


def nonfinite_by_stem(states: Iterable[tuple[TensorEdit, Mapping[str, Any]]]) -> dict[str, int]:
    """Values that are NaN or infinite, of each tensor that has some."""
    return {edit.target.stem: state["nonfinite"] for edit, state in states if "nonfinite" in state}


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
