"""Synthetic V4 parents: random values in the exact published layout, at any size.

What is published is only reachable by download; what is synthesized has the same names, shapes,
dtypes, shards, byte order and file sizes. Values are seeded by tensor name and chunk, so they do
not depend on the number of workers. With ``sparse`` the large matrices (experts, FP8 linears, the
head) are holes in sparse files, which read as zeros and take no disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.catalogue import (
    BF16,
    EXPERT,
    F32,
    FP4,
    FP8_F32,
    I64,
    LINEAR,
    Catalogue,
    Entry,
    file_group,
    published_format,
    stored_tensors,
)
from v4surgery.checkpoint.job import WriteResult
from v4surgery.checkpoint.layout import (
    PROVENANCE_FILE,
    OutputTensor,
    ShardLayout,
    pack,
    row_offsets,
)
from v4surgery.checkpoint.writer import write_checkpoint
from v4surgery.config import V4Config
from v4surgery.errors import ConfigError, UsageError
from v4surgery.formats import FP4_GROUP
from v4surgery.presets import Preset, preset
from v4surgery.version import __version__

CHUNK_ELEMENTS = 1 << 20
WEIGHT_STD = 0.02
SCALE_NOISE = 0.1


@dataclass(frozen=True)
class Synthesis:
    """A synthetic parent before it is written.

    Attributes:
        like: The preset it follows.
        config: Its config.
        shards: Its files, in the published layout.
        jobs: What computes them.
        plan_id: Identity of its bytes.
        sparse: Whether the large matrices are holes.
        seed: Of all values.
    """

    like: str
    config: V4Config
    shards: list[ShardLayout]
    jobs: list[RandomJob]
    plan_id: str
    sparse: bool
    seed: int

    @property
    def total_bytes(self) -> int:
        return sum(shard.total_bytes for shard in self.shards)

    @property
    def bytes_on_disk(self) -> int:
        holes = sum(item.nbytes for job in self.jobs if job.hole for item in job.outputs)
        return self.total_bytes - holes


class RandomJob:
    """One tensor of random values as a job of the writer.

    Args:
        entry: The tensor.
        shape: Its logical shape.
        fmt: How it is stored.
        experts: Routed experts, for hash tables.
        seed: Seed of the checkpoint.
        hole: Leave the payload a hole.
        noise: False gives a neutral initialisation: norms one, biases and positions zero.
    """

    def __init__(
        self,
        entry: Entry,
        shape: tuple[int, ...],
        fmt: str,
        *,
        experts: int,
        seed: int,
        hole: bool = False,
        noise: bool = True,
    ) -> None:
        self.entry, self.shape, self.fmt = entry, shape, fmt
        self.experts, self.seed, self.hole, self.noise = experts, seed, hole, noise
        self.outputs = tuple(OutputTensor(*t) for t in stored_tensors(entry, shape, fmt))
        self.state: dict[str, Any] = {}
        width = experts if fmt == I64 else shape[-1] if len(shape) == 2 else 1
        rows = max(CHUNK_ELEMENTS // width, 1)
        self._rows = max(rows // 128, 1) * 128
        self.num_chunks = max(-(-shape[0] // self._rows), 1)

    def compute(self, chunk: int) -> tuple[NDArray[Any], ...]:
        """The next rows of the weight, and of its scale."""
        begin = chunk * self._rows
        rows = min(self._rows, self.shape[0] - begin)
        shape = (rows, *self.shape[1:])
        rng = self._generator(chunk)
        if self.fmt == FP4:
            codes = np.take(_fp4_codes(), rng.integers(0, 256, shape, dtype=np.uint8))
            scales = rng.integers(118, 121, (rows, shape[1] // 32), dtype=np.uint8)
            return formats.pack_fp4(codes), scales
        if self.outputs[0].dtype == "F8_E4M3":
            codes = np.take(_fp8_codes(), rng.integers(0, 256, shape, dtype=np.uint8))
            blocks = (-(-rows // 128), -(-shape[1] // 128))
            if self.fmt == FP8_F32:
                spread = rng.uniform(0.5, 1.5, blocks)
                return codes, (spread * 2.0**-12).astype(np.float32)
            return codes, rng.integers(114, 117, blocks, dtype=np.uint8)
        if self.fmt == I64:
            order = rng.random((rows, self.experts), dtype=np.float32).argsort(axis=1)
            return (order[:, : shape[1]].astype(np.int64),)
        values = self._values(rng, shape)
        return (values if self.fmt == F32 else formats.f32_to_bf16(values),)

    def offsets(self, chunk: int) -> tuple[int, ...]:
        """Where a chunk's bytes begin in each output."""
        return row_offsets(self.outputs, chunk * self._rows)

    def _values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Matrices around 0, norms and mixing scales around 1, other vectors around 0."""
        axes = self.entry.template.axes
        is_weight = len(shape) == 2 and axes[0] != "compress_ratio"
        around_one = (len(shape) == 1 and self.fmt != F32) or axes[0] in ("one", "three")
        if not is_weight and not self.noise:
            return np.full(shape, float(around_one), dtype=np.float32)
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(WEIGHT_STD if is_weight else SCALE_NOISE)
        return values + np.float32(around_one and not is_weight)

    def _generator(self, chunk: int) -> np.random.Generator:
        name = blake3(f"{self.seed}/{self.entry.stem}/{chunk}".encode()).digest()
        return np.random.Generator(np.random.SFC64(np.frombuffer(name, dtype=np.uint32).tolist()))


def plan_synthesis(
    like: str,
    *,
    layers: int | None = None,
    changes: dict[str, Any] | None = None,
    seed: int = 0,
    sparse: bool = False,
) -> Synthesis:
    """Lay out a synthetic parent.

    Args:
        like: Name of a preset.
        layers: Keep only the first layers of the preset (drafters stay).
        changes: Published config fields to change, such as ``{"n_routed_experts": 16}``.
        seed: Of all values.
        sparse: Leave the large matrices as holes.

    Raises:
        UsageError: No such preset or field, or dimensions that contradict each other.
    """
    base = preset(like)
    config = _changed(base, layers, changes or {})
    catalogue = Catalogue(config, optional=base.optional_tensors)
    groups: dict[str, list[OutputTensor]] = {}
    jobs = []
    for entry in catalogue.entries():
        fmt = published_format(entry.template, base.expert_format, base.scale_dtype)
        large = entry.template.storage in (LINEAR, EXPERT) or (
            entry.template.storage == BF16 and entry.template.group == "head"
        )
        shape = catalogue.shape(entry)
        job = RandomJob(
            entry,
            shape,
            fmt,
            experts=config.n_routed_experts,
            seed=seed,
            hole=sparse and large and len(shape) == 2,
        )
        jobs.append(job)
        groups.setdefault(file_group(entry), []).extend(job.outputs)
    shards = pack(list(groups.values()), None, merge=False)
    identity = {"like": like, "config": config.to_dict(), "seed": seed, "sparse": sparse}
    plan_id = blake3(json.dumps([__version__, identity], sort_keys=True).encode()).hexdigest()
    return Synthesis(like, config, shards, jobs, plan_id, sparse, seed)


def write_synthesis(
    synthesis: Synthesis,
    out: Path,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> WriteResult:
    """Write a synthetic parent; the same call resumes.

    Raises:
        OutputError: The folder is not empty, in use, or the disk is too small.
    """

    def extra_files(_: WriteResult) -> dict[str, bytes]:
        about = {
            "plan_hash": synthesis.plan_id,
            "synthetic": True,
            "like": synthesis.like,
            "seed": synthesis.seed,
            "sparse": synthesis.sparse,
            "tool": {"name": "v4surgery", "version": __version__},
        }
        files = {PROVENANCE_FILE: about, "config.json": synthesis.config.to_dict()}
        return {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in files.items()}

    return write_checkpoint(
        out,
        synthesis.shards,
        synthesis.jobs,
        plan_id=synthesis.plan_id,
        workers=workers,
        extra_files=extra_files,
        progress=progress,
    )


def _changed(base: Preset, layers: int | None, changes: dict[str, Any]) -> V4Config:
    config = base.config
    known = {item.name for item in dataclasses.fields(V4Config)} - {"extra"}
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise UsageError(
            "unknown config field", where="--set", value=unknown[0], rule="a published field name"
        )
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise UsageError(
                "the preset has fewer layers",
                where="--layers",
                value=layers,
                rule=f"1 to {config.num_hidden_layers}",
            )
        drafters = config.compress_ratios[config.num_hidden_layers :]
        targets = config.dspark_target_layer_ids
        if targets is not None:
            first = max(layers - len(targets), 0)
            targets = tuple(min(first + i, layers - 1) for i in range(len(targets)))
        config = config.replace(
            num_hidden_layers=layers,
            num_hash_layers=min(config.num_hash_layers, layers),
            compress_ratios=(*config.compress_ratios[:layers], *drafters),
            dspark_target_layer_ids=targets,
        )
    try:
        changed = V4Config.from_dict({**config.to_dict(), **changes}, "--set")
    except ConfigError as error:
        raise UsageError(
            "the synthetic config contradicts itself", where="--set", value=error.value
        ) from error
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(changed, name) % FP4_GROUP:
            raise UsageError(
                "the synthetic config has a size that experts cannot have",
                where="--set",
                value=f"{name} {getattr(changed, name)}",
                rule=f"a multiple of {FP4_GROUP}",
            )
    return changed.replace(extra=config.extra)


@cache
def _fp4_codes() -> NDArray[np.uint8]:
    """E2M1 codes of normal values, one for each of 256 equally likely draws."""
    return formats.encode_e2m1(_normal_quantiles() * np.float32(2.2))


@cache
def _fp8_codes() -> NDArray[np.uint8]:
    """E4M3 codes of normal values, one for each of 256 equally likely draws."""
    return formats.encode_e4m3(_normal_quantiles() * np.float32(100.0))


def _normal_quantiles() -> NDArray[np.float32]:
    normal = NormalDist()
    return np.asarray([normal.inv_cdf((i + 0.5) / 256) for i in range(256)], dtype=np.float32)
