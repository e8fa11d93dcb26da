"""Which shards a checkpoint has: its index read, and held against the headers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from v4surgery.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from v4surgery.checkpoint.refs import TensorRef
from v4surgery.checkpoint.source import Source, read_json_file, safe_basename
from v4surgery.errors import CheckpointError

# Of a header entry beside the name, on average 77 and at most 83: {"dtype":"F8_E8M0",
# "shape":[2048,128],"data_offsets":[3566321000,3566321192]}, with quotes and commas.
_ENTRY_BYTES = 80
_UNKNOWN_HEADER_BYTES = 1 << 16


def read_index(source: Source, names: list[str]) -> dict[str, str] | None:
    """weight_map of the index, with every shard checked to be a plain basename.

    Raises:
        CheckpointError: It is malformed, or leads elsewhere.
    """
    if INDEX_FILE not in names:
        return None
    where = f"{source.name}/{INDEX_FILE}"
    try:
        data = json.loads(read_json_file(source, INDEX_FILE), object_pairs_hook=_unique)
        weight_map = data["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the index is malformed",
            where=where,
            value=f"{type(error).__name__}: {error}"[:200],
            rule='a JSON object {"metadata": {...}, "weight_map": {tensor: shard}}',
        ) from None
    return {name: safe_basename(shard, where) for name, shard in weight_map.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands twice another reader may take the other one."""
    table = dict(pairs)
    if len(table) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:160]!r} stands twice")
    return table


def shard_files(
    source: Source, names: list[str], weight_map: dict[str, str] | None
) -> tuple[str, ...]:
    """The checkpoint's shards, sorted.

    Raises:
        CheckpointError: Some are missing, or without an index it is not clear which they are.
    """
    if weight_map is not None:
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if shard not in names]
        if missing:
            raise CheckpointError(
                "the index names shards that are not there",
                where=f"{source.name}/{INDEX_FILE}",
                value=", ".join(missing[:5]),
                hint="download the missing files, or remove the index of a partial copy",
            )
        return tuple(shards)
    if SINGLE_FILE in names:
        return (SINGLE_FILE,)
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    if len(shards) != 1:
        raise CheckpointError(
            "no index, and not exactly one .safetensors file",
            where=source.name,
            value=", ".join(shards[:5]) or "none",
            rule=f"{INDEX_FILE}, or {SINGLE_FILE}, or one file by another name",
            hint="complete the download; pickles (.bin, .pt) are never loaded, convert them first",
        )
    return tuple(shards)


def expected_heads(files: tuple[str, ...], weight_map: dict[str, str] | None) -> dict[str, int]:
    """About how long each shard's header is, by the names that the index puts there."""
    expected = dict.fromkeys(files, _UNKNOWN_HEADER_BYTES if weight_map is None else 64)
    for name, shard in (weight_map or {}).items():
        expected[shard] += len(name) + _ENTRY_BYTES
    return expected


def check_index(
    source: Source, weight_map: dict[str, str] | None, found: Mapping[str, TensorRef]
) -> None:
    """Hold the index against the headers.

    Raises:
        CheckpointError: One names a tensor that the other does not, or puts it elsewhere.
    """
    if weight_map is None:
        return
    where = f"{source.name}/{INDEX_FILE}"
    for name, shard in weight_map.items():
        if name not in found or found[name].file != shard:
            actual = found[name].file if name in found else "no shard"
            raise CheckpointError(
                "index and shards disagree",
                where=where,
                value=f"{name}: the index says {shard}, the headers say {actual}",
                rule="every tensor stands in the shard that the index names",
            )
    extra = next((name for name in found if name not in weight_map), None)
    if extra is not None:
        raise CheckpointError(
            "a shard holds a tensor that the index does not name",
            where=where,
            value=f"{extra} in {found[extra].file}",
            rule="every tensor stands in the index",
        )
