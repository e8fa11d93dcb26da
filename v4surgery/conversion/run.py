"""One checkpoint in another format or layout: which plan it takes, what is lost, carrying it out.

``bf16``, ``fp8`` and ``published`` are plans of slice that keep everything; a recipe says how they
store it, so that ``verify`` compares the result with its source like any replica. ``official`` has
shards of its own kind (:mod:`.official`). Reading knows the layouts, so that every source takes
every target.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4surgery.catalogue import FP8_F32, LINEAR, QUANTIZED
from v4surgery.checkpoint.job import WriteResult
from v4surgery.checkpoint.official import SCALES_FILE
from v4surgery.checkpoint.reader import CONFIG_FILE, Checkpoint
from v4surgery.conversion.official import MAX_RANKS, OfficialPlan, plan_official, write_official
from v4surgery.distributed.parent import require_same
from v4surgery.errors import UsageError
from v4surgery.recipes.schema import Recipe
from v4surgery.slicers.apply import WriteOptions, slice_plan
from v4surgery.slicers.edit import DEQUANTIZE
from v4surgery.slicers.plan import Plan, make_plan
from v4surgery.slicers.transform import WORKER_BYTES

TARGETS: Mapping[str, str] = {
    "bf16": "every weight in bf16",
    "fp8": "FP4 experts as FP8 with a scale for 128x128 values, exact where their scales allow it",
    "official": "shards of the official inference code, one for each tensor-parallel rank",
    "published": "the published names, formats and files",
}
_DRAFTER_KEYS = ("num_nextn_predict_layers", "dspark_block_size")


@dataclass(frozen=True)
class Conversion:
    """A conversion before its first byte is written.

    Attributes:
        to: One of :data:`TARGETS`.
        plan: How every tensor comes about.
        lost: What the source's layout does not have, or the target's has no place for.
        nonfinite: What happens where a decoded weight is NaN or infinite.
    """

    to: str
    plan: Plan | OfficialPlan
    lost: tuple[str, ...]
    nonfinite: str

    def summary(self) -> dict[str, Any]:
        """What would be done, as plain data."""
        plan = self.plan
        parent = plan.parent
        data: dict[str, Any] = {
            "to": self.to,
            "from": parent.name,
            "layout": parent.source.identity().get("layout"),
            "plan_hash": plan.plan_hash,
            "bytes_written": sum(shard.total_bytes for shard in plan.shards),
            "files": [shard.file for shard in plan.shards],
            "lost": list(self.lost),
            "notes": list(plan.notes),
            "bytes_of_memory_per_worker": WORKER_BYTES,
        }
        if isinstance(plan, OfficialPlan):
            transforms = [piece.edit.transform for piece in plan.pieces]
            data["transforms"] = {name: transforms.count(name) for name in sorted({*transforms})}
            exact = plan.linear != FP8_F32
            data["inexact"] = {} if exact else {DEQUANTIZE: transforms.count(DEQUANTIZE)}
        else:
            data["transforms"] = dict(sorted(plan.transforms.items()))
            data["inexact"] = {name: len(stems) for name, stems in plan.inexact().items()}
        return data


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        path: Its folder.
        conversion: What was done.
        written: Bytes and chunks written or found intact.
        report: What was measured; see :func:`v4surgery.slicers.tally.measure`.
    """

    path: Path
    conversion: Conversion
    written: WriteResult
    report: Mapping[str, Any]


def plan_conversion(
    source: Checkpoint,
    to: str,
    *,
    ranks: int | None = None,
    max_shard_size: int | None = None,
    nonfinite: str = "error",
) -> Conversion:
    """Plan a conversion; nothing is written.

    Args:
        source: A checkpoint in any layout that is read.
        to: One of :data:`TARGETS`.
        ranks: Tensor-parallel ranks, for ``official``; 1 by default.
        max_shard_size: Largest file in bytes; not for ``official``.
        nonfinite: What happens where a decoded weight is NaN or infinite: error, warn or keep.

    Raises:
        UsageError: An unknown target, or an option that it does not take.
        PlanError: The target cannot store this checkpoint.
    """
    _check_options(to, ranks, max_shard_size)
    lost = _lost(source)
    if to == "official":
        plan = plan_official(source, ranks or 1)
        return Conversion(to, plan, (*lost, *plan.lost), nonfinite)
    dtype = to if to != "published" else "native" if _is_quantized(source) else "bf16"
    store = {"dtype": dtype, "layout": "published", "nonfinite": nonfinite}
    recipe = Recipe.model_validate(
        {
            "name": f"convert-{to}",
            "description": TARGETS[to],
            # Without drafters the config may not announce any.
            "keep": {"mtp": "keep" if source.config.num_drafters else "drop"},
            "store": {**store, "max_shard_size": max_shard_size},
        }
    )
    planned = make_plan(source, recipe)
    noted = dataclasses.replace(planned, notes=(*planned.notes, *lost))
    return Conversion(to, noted, lost, nonfinite)


def run_conversion(conversion: Conversion, out: Path, options: WriteOptions) -> Converted:
    """Write a conversion; the same call again resumes, or finds it done.

    Raises:
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The source could not be read exactly, or changed meanwhile.
    """
    plan = conversion.plan
    if isinstance(plan, OfficialPlan):
        require_same(options.team, plan.parent)
        written, report = write_official(plan, out, options, nonfinite=conversion.nonfinite)
        return Converted(out, conversion, written, report)
    replica = slice_plan(plan, out, options)
    return Converted(out, conversion, replica.written, replica.report)


def _check_options(to: str, ranks: int | None, max_shard_size: int | None) -> None:
    if to not in TARGETS:
        raise UsageError(
            "unknown target", where="--to", value=to, rule="one of " + ", ".join(TARGETS)
        )
    if ranks is not None and to != "official":
        raise UsageError("only official shards have ranks", where="--tp", value=f"--to {to}")
    if ranks is not None and not 1 <= ranks <= MAX_RANKS:
        raise UsageError("not a number of ranks", where="--tp", value=ranks, rule="1, 2, 4, 8, ...")
    if max_shard_size is not None and to == "official":
        raise UsageError(
            "official shards are one file for each rank, whatever its size",
            where="--max-shard-size",
            hint="choose more ranks with --tp",
        )


def _is_quantized(source: Checkpoint) -> bool:
    return any(stored.fmt in QUANTIZED for stored in source.tensors.values())


def _lost(source: Checkpoint) -> tuple[str, ...]:
    """What transformers, or the official code's converter, did not write down."""
    if source.source.identity().get("layout"):
        return _lost_by_official(source)
    config = json.loads(source.read_file(CONFIG_FILE))
    if "transformers_version" not in config or "compress_ratios" in config:
        return ()
    lost = [
        "compress_ratios and num_hash_layers, made again from layer_types, compress_rates and "
        "mlp_layer_types"
    ]
    announced = next((key for key in _DRAFTER_KEYS if config.get(key)), None)
    if announced is not None and not source.config.num_drafters:
        lost.append(
            f"the drafter blocks (mtp.*) that {announced} {config[announced]} speaks of: "
            "transformers does not load them; num_nextn_predict_layers becomes 0"
        )
    if not _is_quantized(source):
        lost.append("FP4 and FP8 storage, if there was any: transformers saves what it computed in")
    if "tokenizer.json" not in source.companions():
        lost.append("the tokenizer: save_pretrained of the model does not write it")
    return tuple(lost)


def _lost_by_official(source: Checkpoint) -> tuple[str, ...]:
    linears = {s.fmt for s in source.tensors.values() if s.entry.template.storage == LINEAR}
    if len(linears) == 1:
        return ()
    return (
        f"the scales of wo_a: without {SCALES_FILE} its F32 scales cannot be found again, and it "
        "stays bf16",
    )


__all__ = ["TARGETS", "Conversion", "Converted", "plan_conversion", "run_conversion"]
