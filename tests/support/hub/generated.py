"""A checkpoint in the published layout whose bytes are computed when they are asked for.

Names, shapes, dtypes, shards and headers are those of ``v4surgery synth``; the payload of a shard
is one pattern of a prime period that starts elsewhere in every shard, so that a range read from a
wrong place is wrong. No disk is used, and 160 GB are ready in a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from tests.support.hub.repos import Blob, Content, GeneratedBlob
from v4surgery.checkpoint.layout import INDEX_FILE, ShardLayout
from v4surgery.synth import plan_synthesis

_PERIOD = 1_000_003


def generated_checkpoint(
    like: str, *, layers: int | None = None, changes: Mapping[str, Any] | None = None
) -> dict[str, Content]:
    """Files by name: config, index, and shards as generated blobs."""
    synthesis = plan_synthesis(like, layers=layers, changes=dict(changes or {}))
    weight_map = {item.name: shard.file for shard in synthesis.shards for item in shard.tensors}
    total = sum(shard.payload_bytes for shard in synthesis.shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files: dict[str, Content] = {
        "config.json": json.dumps(synthesis.config.to_dict(), indent=2).encode(),
        INDEX_FILE: json.dumps(index, indent=2).encode(),
    }
    return files | {
        shard.file: _shard(shard, number) for number, shard in enumerate(synthesis.shards)
    }


def _shard(shard: ShardLayout, number: int) -> Blob:
    # Bytes below 0x40: finite in every format that V4 stores, and no expert id (I64) is among
    # them, since those tensors are zeros; they come first in a shard.
    start = len(shard.header) + sum(item.nbytes for item in shard.tensors if item.dtype == "I64")
    pattern = _pattern()

    def make(begin: int, end: int) -> bytes:
        pieces = [shard.header[begin:end]]
        begin = max(begin, len(shard.header))
        if begin < min(end, start):
            pieces.append(bytes(min(end, start) - begin))
        begin = max(begin, start)
        while begin < end:
            at = (begin + number * 7919) % _PERIOD
            size = min(end - begin, _PERIOD - at)
            pieces.append(pattern[at : at + size])
            begin += size
        return b"".join(pieces)

    return GeneratedBlob(shard.total_bytes, make, shard.file)


@cache
def _pattern() -> bytes:
    return np.random.default_rng(4).integers(0, 0x40, _PERIOD, dtype=np.uint8).tobytes()
