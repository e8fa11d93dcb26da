"""From a trained model to a checkpoint in the published layout: FP4 experts, FP8 linears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from model import Attention, Block, Compressor, Connection, Drafter, Experts, TrainableV4
from numpy.typing import NDArray
from torch import Tensor

from v4surgery import formats
from v4surgery.catalogue import BF16, FP4, FP8, Catalogue, published_format, stored_tensors
from v4surgery.catalogue import file_group as group_of
from v4surgery.checkpoint.job import WriteResult
from v4surgery.checkpoint.layout import OutputTensor, pack
from v4surgery.checkpoint.writer import write_checkpoint
from v4surgery.config import V4Config

Named = Iterator[tuple[str, Tensor]]


def tensors(model: TrainableV4) -> dict[str, Tensor]:
    """Every tensor by the stem of its published name."""
    found = {"embed": model.embed, "head": model.head, "norm": model.norm}
    found |= _connection("hc_head", model.hc_head)
    for block in (*model.layers, *model.mtp):
        assert isinstance(block, Block)
        found |= {block.prefix + name: tensor for name, tensor in _block(block)}
    return {stem: tensor.detach().cpu() for stem, tensor in found.items()}


def _block(block: Block) -> Named:
    yield "attn_norm", block.attn_norm
    yield "ffn_norm", block.ffn_norm
    yield from _connection("hc_attn", block.hc_attn).items()
    yield from _connection("hc_ffn", block.hc_ffn).items()
    for name, tensor in _attention(block.attn):
        yield f"attn.{name}", tensor
    for name, tensor in _experts(block.ffn):
        yield f"ffn.{name}", tensor
    if isinstance(block, Drafter):
        for name in ("e_proj", "h_proj", "enorm", "hnorm", "norm"):
            yield name, getattr(block, name)
        yield from _connection("hc_head", block.hc_head).items()


def _attention(attn: Attention) -> Named:
    for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "attn_sink", "wo_a", "wo_b"):
        yield name, getattr(attn, name)
    if attn.compressor is not None:
        yield from _compressor("compressor", attn.compressor)
    if attn.indexer is not None:
        yield "indexer.wq_b", attn.indexer.wq_b
        yield "indexer.weights_proj", attn.indexer.weights_proj
        yield from _compressor("indexer.compressor", attn.indexer.compressor)


def _compressor(prefix: str, compressor: Compressor) -> Named:
    for name in ("wkv", "wgate", "norm", "ape"):
        yield f"{prefix}.{name}", getattr(compressor, name)


def _experts(ffn: Experts) -> Named:
    yield "gate", ffn.gate
    if ffn.tid2eid is not None:
        yield "gate.tid2eid", ffn.tid2eid
    if ffn.bias is not None:
        yield "gate.bias", ffn.bias
    for name in ("w1", "w2", "w3"):
        yield f"shared_experts.{name}", getattr(ffn, f"shared_{name}")
        for expert, matrix in enumerate(getattr(ffn, name)):
            yield f"experts.{expert}.{name}", matrix


def _connection(prefix: str, connection: Connection) -> dict[str, Tensor]:
    return {f"{prefix}_{name}": getattr(connection, name) for name in ("fn", "scale", "base")}


class _TensorJob:
    """One tensor, quantized as it is stored, as a job of the checkpoint writer."""

    num_chunks, hole = 1, False

    def __init__(self, outputs: tuple[OutputTensor, ...], values: NDArray[Any], fmt: str) -> None:
        self.outputs, self.values, self.fmt = outputs, values, fmt
        self.state: dict[str, Any] = {}

    def compute(self, _: int) -> tuple[NDArray[Any], ...]:
        if self.fmt == FP4:
            return formats.quantize_fp4(self.values)
        if self.fmt == FP8:
            return formats.quantize_fp8(self.values, "F8_E8M0")
        return (formats.f32_to_bf16(self.values) if self.fmt == BF16 else self.values,)


def write_published(
    found: dict[str, Tensor], config: V4Config, out: Path, companions: dict[str, bytes]
) -> WriteResult:
    """Write a folder that everything reads which reads V4-Flash; one shard.

    Args:
        found: From :func:`tensors`.
        config: Of the model.
        out: The folder.
        companions: Further files, such as the tokenizer's.
    """
    catalogue = Catalogue(config)
    jobs, groups = [], {}
    for entry in catalogue.entries():
        shape = catalogue.shape(entry)
        values = found[entry.stem].numpy()
        assert values.shape == shape, (entry.stem, values.shape, shape)
        fmt = published_format(entry.template, FP4, "F8_E8M0")
        outputs = tuple(OutputTensor(*t) for t in stored_tensors(entry, shape, fmt))
        jobs.append(_TensorJob(outputs, np.ascontiguousarray(values), fmt))
        groups.setdefault(group_of(entry), []).extend(outputs)
    files = {"config.json": (json.dumps(config.to_dict(), indent=2) + "\n").encode(), **companions}
    return write_checkpoint(
        out,
        pack(list(groups.values()), 10**9, merge=True),
        jobs,
        plan_id="trained",
        extra_files=lambda _: files,
    )
