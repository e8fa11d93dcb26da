"""Cutting a checkpoint into the shards of the official inference code.

A tensor becomes an edit of the slicers' kind, carried out by their job; :class:`RankedJob` deals
what comes out to the ranks. So bytes are read once, whatever the number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from v4surgery.catalogue import BF16, EXPERT, FP4, FP8_F32, LINEAR, StoredTensor, stored_tensors
from v4surgery.checkpoint.header import build_header
from v4surgery.checkpoint.job import WriteResult
from v4surgery.checkpoint.layout import PROVENANCE_FILE, OutputTensor, ShardLayout, payload_order
from v4surgery.checkpoint.official import (
    DECODED,
    SCALES_FILE,
    is_left_out,
    owners,
    rank_problems,
    reference_config,
    shard_axis,
    shard_name,
)
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.errors import PlanError
from v4surgery.formats import F4
from v4surgery.slicers.apply import WriteOptions, write_jobs
from v4surgery.slicers.decoding import Decoder, find_decoder
from v4surgery.slicers.edit import COPY, DEQUANTIZE, GATHER, TensorEdit
from v4surgery.slicers.provenance import origin_of
from v4surgery.slicers.tally import nonfinite_by_stem
from v4surgery.slicers.transform import WORKER_BYTES, Buffers, EditJob
from v4surgery.version import __version__

MAX_RANKS = 1024


@dataclass(frozen=True)
class OfficialPlan:
    """Shards of the official code before their first byte is written.

    Attributes:
        parent: What they are made from.
        ranks: Tensor-parallel ranks.
        linear: Format of the parent's linears.
        expert: Format of its routed experts.
    """

    parent: Checkpoint
    ranks: int
    linear: str
    expert: str

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256 of all that decides the bytes."""
        content = [__version__, self.parent.fingerprint, "official", self.ranks]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What is cut from the parent, in published order."""
        return tuple(self._pieces())

    @cached_property
    def shards(self) -> list[ShardLayout]:
        """One file for each rank, its tensors in the order that safetensors' own writer gives."""
        by_rank: list[list[OutputTensor]] = [[] for _ in range(self.ranks)]
        for piece in self.pieces:
            for output in piece.outputs:
                by_rank[cast("int", output.rank)].append(output)
        return [
            ShardLayout.build(shard_name(rank, self.ranks), payload_order(tensors))
            for rank, tensors in enumerate(by_rank)
        ]

    @property
    def lost(self) -> tuple[str, ...]:
        """What the layout has no place for."""
        tensors = self.parent.tensors
        stems = [stem for stem, stored in tensors.items() if is_left_out(stored.entry)]
        if not stems:
            return ()
        return (
            f"{', '.join(stems)}: the official code takes the trunk's embedding and head for its "
            "drafters",
        )

    @property
    def reference(self) -> dict[str, Any]:
        """config.json of the official code."""
        return reference_config(self.parent.config, self.linear, self.expert)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.linear != FP8_F32:
            return ()
        return (
            "F32 scales stay F32 here; the official code's linears have E8M0 scales, and loading "
            "into them rounds every scale that is no power of two; wo_a is rounded to bf16",
        )

    def scales(self) -> dict[StoredTensor, bytes]:
        """The scales of wo_a as they were, which the shards have no place for."""
        found = {}
        for stem, stored in self.parent.tensors.items():
            if stored.entry.template.stem == DECODED and (ref := stored.scale) is not None:
                tensor = StoredTensor(stem + ".scale", ref.dtype, ref.shape)
                found[tensor] = self.parent.source.read(ref.file, ref.begin, ref.end)
        return found

    def _pieces(self) -> Iterator[Piece]:
        for stored in self.parent.tensors.values():
            entry = stored.entry
            if is_left_out(entry):
                continue
            axis = shard_axis(entry)
            holders = owners(entry, self.parent.config.n_routed_experts, self.ranks)
            if axis == 0 and self.ranks > 1:
                for rank in holders:
                    yield self._piece(stored, [rank], axis)
            else:
                yield self._piece(stored, holders, axis if self.ranks > 1 else None)

    def _piece(self, stored: StoredTensorRef, ranks: Sequence[int], axis: int | None) -> Piece:
        shape = list(self.parent.catalogue.shape(stored.entry))
        rows = None
        if axis == 0:
            size = shape[0] // self.ranks
            rows = np.arange(ranks[0] * size, (ranks[0] + 1) * size)
            shape[0] = size
        is_decoded = stored.entry.template.stem == DECODED and stored.scale is not None
        fmt = BF16 if is_decoded else stored.fmt
        transform = DEQUANTIZE if is_decoded else COPY if axis is None else GATHER
        outputs = _stored(stored, fmt, tuple(shape))
        edit = TensorEdit(
            target=stored.entry,
            source=stored,
            transform=transform,
            fmt=fmt,
            shape=tuple(shape),
            rows=rows,
            cols=None,
            factor=1.0,
            remap=None,
            outputs=outputs,
        )
        return Piece(edit, tuple(ranks), by_columns=axis == 1)


@dataclass(frozen=True)
class Piece:
    """An edit, and the ranks that get its result: each all of it, or each its own columns."""

    edit: TensorEdit
    ranks: tuple[int, ...]
    by_columns: bool

    @cached_property
    def outputs(self) -> tuple[OutputTensor, ...]:
        parts = len(self.ranks) if self.by_columns else 1
        return tuple(
            OutputTensor(item.name, item.dtype, (*item.shape[:-1], item.shape[-1] // parts), rank)
            for rank in self.ranks
            for item in self.edit.outputs
        )


class RankedJob:
    """A piece as a job of the writer; see :class:`v4surgery.checkpoint.job.Job`."""

    hole = False

    def __init__(self, parent: Checkpoint, piece: Piece, nonfinite: str, decoder: Decoder) -> None:
        self.piece, self.inner = piece, EditJob(parent, piece.edit, nonfinite, decoder)
        self.outputs, self.num_chunks = piece.outputs, self.inner.num_chunks
        self.state = self.inner.state

    def compute(self, chunk: int) -> Buffers:
        """The next bytes of each output, rank after rank."""
        buffers = self.inner.compute(chunk)
        if not self.piece.by_columns:
            return [buffer for _ in self.piece.ranks for buffer in buffers]
        arrays = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
        assert len(arrays) == len(buffers), "a gather gives arrays"
        cut = [np.split(array, len(self.piece.ranks), axis=1) for array in arrays]
        return [np.ascontiguousarray(part) for parts in zip(*cut, strict=True) for part in parts]


def plan_official(parent: Checkpoint, ranks: int) -> OfficialPlan:
    """Plan the official code's shards.

    Raises:
        PlanError: The checkpoint cannot be cut for so many ranks, or its linears differ in format.
    """
    formats: dict[str, set[str]] = {LINEAR: set(), EXPERT: set()}
    for stored in parent.tensors.values():
        if stored.entry.template.storage in formats and stored.entry.template.stem != DECODED:
            formats[stored.entry.template.storage].add(stored.fmt)
    problems = rank_problems(parent.config, formats[LINEAR], ranks)
    problems += [
        f"{kind} linears are stored as {', '.join(sorted(found))}"
        for kind, found in formats.items()
        if len(found) != 1
    ]
    if problems:
        raise PlanError(
            f"the official code cannot load this checkpoint on {ranks} rank(s)",
            where=parent.name,
            value="; ".join(problems),
            rule="equal parts of whole blocks for every rank, and one format",
            hint="choose another --tp (1 takes every size)",
        )
    return OfficialPlan(parent, ranks, formats[LINEAR].pop(), formats[EXPERT].pop())


def write_official(
    plan: OfficialPlan, out: Path, options: WriteOptions, *, nonfinite: str
) -> tuple[WriteResult, dict[str, Any]]:
    """Write the shards; the same call again resumes. Gives what was written and measured.

    Raises:
        OutputError: The folder is not ours, in use, or the disk is too small.
        ReadError: The parent could not be read, or changed meanwhile.
    """
    parent, decoder = plan.parent, find_decoder(options.device)
    jobs = [RankedJob(parent, piece, nonfinite, decoder) for piece in plan.pieces]
    companions = {name: parent.read_file(name) for name in parent.companions()}

    def measure() -> dict[str, Any]:
        return {"nonfinite": nonfinite_by_stem((job.piece.edit, job.state) for job in jobs)}

    def files(result: WriteResult, report: Mapping[str, Any]) -> dict[str, bytes]:
        scales = plan.scales()
        record = _record(plan, result, report)
        files = dict(companions)
        if scales:
            header = build_header([(name, dtype, shape) for name, dtype, shape in scales])
            files[SCALES_FILE] = header + b"".join(scales.values())
        files["config.json"] = (json.dumps(plan.reference, indent=2) + "\n").encode()
        files[PROVENANCE_FILE] = (json.dumps(record, indent=1) + "\n").encode()
        return files

    workers = options.workers_of(WORKER_BYTES)
    return write_jobs(
        plan,
        out,
        jobs,
        dataclasses.replace(options, workers=workers),
        measure=measure,
        extra_files=files,
        index=False,
    )


def _record(plan: OfficialPlan, result: WriteResult, report: Mapping[str, Any]) -> dict[str, Any]:
    """v4surgery.json: what the shards were made from, and what reading them back needs."""
    parent = plan.parent
    return {
        **origin_of(parent, plan.plan_hash),
        "official": {
            "ranks": plan.ranks,
            "reference": plan.reference,
            "config": parent.config.to_dict(),
        },
        "notes": [*plan.lost, *plan.notes],
        "report": dict(report),
        "tensors": {key: {"blake3": digest} for key, digest in result.digests.items()},
    }


def _stored(stored: StoredTensorRef, fmt: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
    """The tensors of one rank, or before columns are dealt out: FP4 under safetensors' own name."""
    outputs = stored_tensors(stored.entry, shape, fmt)
    if fmt != FP4:
        return outputs
    weight, scale = outputs
    return weight._replace(dtype=F4, shape=shape), scale


__all__ = ["MAX_RANKS", "OfficialPlan", "RankedJob", "plan_official", "write_official"]
