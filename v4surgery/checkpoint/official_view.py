"""Shards of the official inference code, read as the published layout that they were made from.

A source like any other: it has a config.json in the published style and one ``model.safetensors``,
whose bytes are put together from the ranks' files as they are asked for. Whatever is planned on a
checkpoint works on such a folder too, and nothing else needs to know the layout.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod

import numpy as np

from v4surgery.catalogue import BF16, Catalogue, Entry
from v4surgery.checkpoint.header import TensorInfo, build_header, payload_bytes, read_header
from v4surgery.checkpoint.layout import INDEX_FILE, PROVENANCE_FILE, SINGLE_FILE
from v4surgery.checkpoint.official import (
    DECODED,
    SCALES_FILE,
    find_ranks,
    is_left_out,
    owners,
    shard_axis,
    shard_name,
)
from v4surgery.checkpoint.official_pieces import (
    Encoded,
    EncodedScales,
    Interleaved,
    Joined,
    Place,
    Reader,
    Scales,
)
from v4surgery.checkpoint.source import Source, read_whole
from v4surgery.config import V4Config, load_config
from v4surgery.errors import CatalogueError, CheckpointError, ReadError
from v4surgery.formats import F4, FP8_BLOCK

CONFIG_FILE = "config.json"
_MAX_SIDE_BYTES = 256_000_000


class OfficialView(Source):
    """The published layout over the ranks' files of another source."""

    def __init__(self, base: Source, ranks: int) -> None:
        self.base, self.ranks = base, ranks
        self.name, self.gap_bytes = base.name, base.gap_bytes
        names = base.list_files()
        shards = [shard_name(rank, ranks) for rank in range(ranks)]
        own = {CONFIG_FILE, PROVENANCE_FILE, SCALES_FILE}
        self._passed = [
            name for name in names if name not in own and not name.endswith(".safetensors")
        ]
        self._config_text, config = _config(base, names)
        base.fetch_heads(dict.fromkeys(shards, 1 << 16))
        headers = [read_header(base, shard)[1] for shard in shards]
        tensors = _Layout(base, config, headers, names).tensors()
        self._header = build_header([(name, dtype, shape) for name, dtype, shape, _ in tensors])
        self._readers = [reader for *_, reader in tensors]
        sizes = (payload_bytes(dtype, shape) for _, dtype, shape, _ in tensors)
        *begins, self._size = accumulate(sizes, initial=len(self._header))
        self._ends = [*begins[1:], self._size] if begins else []
        self._begins = begins

    def list_files(self) -> list[str]:
        return sorted([*self._passed, CONFIG_FILE, SINGLE_FILE])

    def size(self, file: str) -> int:
        if file == CONFIG_FILE:
            return len(self._config_text)
        return self._size if file == SINGLE_FILE else self.base.size(file)

    def read(self, file: str, begin: int, end: int) -> bytes:
        if file == CONFIG_FILE:
            return self._config_text[begin:end]
        if file != SINGLE_FILE:
            return self.base.read(file, begin, end)
        buffer = bytearray(end - begin)
        self.read_into(file, begin, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, file: str, begin: int, buffer: memoryview) -> None:
        if file != SINGLE_FILE:
            self.base.read_into(file, begin, buffer)
            return
        out = np.frombuffer(buffer, np.uint8)
        if not 0 <= begin <= begin + len(out) <= self._size:
            raise ReadError(
                "not a range of this checkpoint",
                where=f"{self.name}/{file}",
                value=f"bytes [{begin:,}, {begin + len(out):,}) of {self._size:,}",
            )
        head = self._header[begin : begin + len(out)]
        out[: len(head)] = np.frombuffer(head, np.uint8)
        done = len(head)
        number = bisect_right(self._ends, begin + done)
        while done < len(out):
            offset = begin + done - self._begins[number]
            size = min(self._ends[number] - begin - done, len(out) - done)
            self._readers[number].fill(self.base, offset, out[done : done + size])
            done, number = done + size, number + 1

    def identity(self) -> dict[str, str]:
        return {**self.base.identity(), "layout": f"official, {self.ranks} rank(s)"}

    def weights_id(self, files: Iterable[str]) -> str | None:
        del files  # they are made up
        names = self.base.list_files()
        return self.base.weights_id(name for name in names if name.endswith(".safetensors"))

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def close(self) -> None:
        self.base.close()

    def cancel(self) -> None:
        self.base.cancel()


def as_published(source: Source) -> Source:
    """The source itself, or its view if it has the official code's shards.

    Raises:
        CheckpointError: The shards are incomplete, or not those of the config.
    """
    files = source.list_files()
    ranks = None if INDEX_FILE in files else find_ranks(files, source.name)
    if ranks is None:
        return source
    if CONFIG_FILE not in files:
        raise CheckpointError(
            "shards of the official code without their config.json",
            where=source.name,
            rule="the inference/config.json that they belong to, beside them as config.json",
            hint="copy it there: convert.py of the official code does not",
        )
    return OfficialView(source, ranks)


class _Layout:
    """What every published tensor is made of, from the headers of all ranks."""

    def __init__(
        self,
        base: Source,
        config: V4Config,
        headers: Sequence[Mapping[str, TensorInfo]],
        files: Iterable[str],
    ) -> None:
        self.where, self.ranks = base.name, len(headers)
        self.places = [
            {name: Place(shard_name(rank, len(headers)), info) for name, info in header.items()}
            for rank, header in enumerate(headers)
        ]
        self.catalogue = Catalogue(config)
        scales = [info for name, info in headers[0].items() if name.endswith(".attn.wq_a.scale")]
        self.scale_dtype = scales[0].dtype if scales else None
        self.recorded = _recorded_scales(base) if SCALES_FILE in files else {}
        if config.n_routed_experts % self.ranks:
            raise CatalogueError(
                "the shards are not those of the config",
                where=self.where,
                value=f"{config.n_routed_experts} experts for {self.ranks} ranks",
            )

    def tensors(self) -> list[tuple[str, str, tuple[int, ...], Reader]]:
        """Name, dtype, shape and reader of every tensor of the published layout.

        Raises:
            CatalogueError: A tensor is missing from a rank, or one is over.
        """
        found = [
            item
            for entry in self.catalogue.entries()
            if not is_left_out(entry)
            for item in self._entry(entry)
        ]
        left = [name for places in self.places for name in places]
        if left:
            raise CatalogueError(
                "the shards hold tensors that the config does not have",
                where=self.where,
                value=", ".join(left[:5]),
                hint="check that config.json belongs to these shards",
            )
        return found

    def _entry(self, entry: Entry) -> list[tuple[str, str, tuple[int, ...], Reader]]:
        name = entry.stem + entry.template.suffix
        holders = owners(entry, self.catalogue.config.n_routed_experts, self.ranks)
        weight = self._take(name, holders)
        if not weight:
            raise CatalogueError(
                "a rank's file lacks a tensor",
                where=self.where,
                value=name,
                rule=f"in {', '.join(shard_name(rank, self.ranks) for rank in holders)}",
                hint="check that config.json belongs to these shards",
            )
        scale = self._take(entry.stem + ".scale", holders)
        axis = shard_axis(entry)
        info = weight[0].info
        if entry.template.stem == DECODED and (info.dtype, len(info.shape)) == (BF16, 2):
            encoded = self._encoded(entry, name, weight)
            if encoded:
                return encoded
        items = [(name, weight), (entry.stem + ".scale", scale)]
        return [_assembled(each, places, axis) for each, places in items if places]

    def _take(self, name: str, holders: range) -> list[Place]:
        """A tensor's places, taken off the list; none if a rank lacks it."""
        if any(name not in self.places[rank] for rank in holders):
            return []
        places = [self.places[rank].pop(name) for rank in holders]
        kinds = {(place.info.dtype, place.info.shape) for place in places}
        if len(kinds) > 1 or not places[0].info.shape:
            raise CatalogueError(
                "the ranks have a tensor in different shapes, or in none",
                where=self.where,
                value=f"{name}: " + ", ".join(f"{d} {list(s)}" for d, s in sorted(kinds)),
                rule="equal parts, or the whole in each",
            )
        return places

    def _encoded(
        self, entry: Entry, name: str, places: list[Place]
    ) -> list[tuple[str, str, tuple[int, ...], Reader]]:
        """wo_a as FP8, where its scales are on record or follow from the others' kind."""
        scales = self.recorded.get(entry.stem + ".scale")
        if scales is None and self.scale_dtype != "F8_E8M0":
            return []
        _, _, shape, values = _assembled(name, places, 0)
        assert isinstance(values, Joined)
        codes = Encoded(name, values, shape, scales)
        grid = (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK))
        if scales is not None and scales.shape != grid:
            raise CatalogueError(
                "the recorded scales do not fit",
                where=f"{self.where}/{SCALES_FILE}",
                value=f"{entry.stem}.scale {list(scales.shape)}, and must be {list(grid)}",
            )
        dtype = "F32" if scales is not None and scales.dtype == np.float32 else "F8_E8M0"
        return [
            (name, "F8_E4M3", shape, codes),
            (entry.stem + ".scale", dtype, grid, EncodedScales(codes)),
        ]


def _assembled(
    name: str, places: list[Place], axis: int | None
) -> tuple[str, str, tuple[int, ...], Reader]:
    """A tensor put together along its axis; where every rank has it whole, the first one's."""
    info = places[0].info
    shape = list(info.shape)
    if axis is None or axis >= len(shape):  # a wrong shape is reported against the config
        places = places[:1]
    else:
        shape[axis] *= len(places)
    dtype = info.dtype
    if dtype == F4:  # published shards call the same bytes I8
        dtype, shape[-1] = "I8", shape[-1] // 2
    reader: Reader = Interleaved(places) if axis == 1 else Joined(places)
    return name, dtype, tuple(shape), reader


def _recorded_scales(base: Source) -> dict[str, Scales]:
    found: dict[str, Scales] = {}
    infos = read_header(base, SCALES_FILE)[1]
    blob = np.frombuffer(_read_beside(base, SCALES_FILE), np.uint8)
    for name, info in infos.items():
        if info.dtype not in ("F32", "F8_E8M0") or not prod(info.shape):
            raise CheckpointError(
                "not a scale", where=f"{base.name}/{SCALES_FILE}", value=f"{name} {info.dtype}"
            )
        raw = blob[info.begin : info.end].copy()
        scales: Scales = raw.view(np.float32) if info.dtype == "F32" else raw
        found[name] = scales.reshape(info.shape)
    return found


def _read_beside(base: Source, file: str) -> bytes:
    return read_whole(base, file, _MAX_SIDE_BYTES, "a file beside the shards is too large")


def _config(base: Source, files: Iterable[str]) -> tuple[bytes, V4Config]:
    """The published config: as recorded, unless config.json was changed since."""
    text = _read_beside(base, CONFIG_FILE)
    config = load_config(text, f"{base.name}/{CONFIG_FILE}")
    if PROVENANCE_FILE in files:
        try:
            record = json.loads(_read_beside(base, PROVENANCE_FILE))["official"]
            is_as_written = json.loads(text) == record["reference"]
            published = (json.dumps(record["config"], indent=2) + "\n").encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            return text, config  # not a record of ours: config.json alone says what it is
        if is_as_written:
            return published, load_config(published, f"{base.name}/{PROVENANCE_FILE}")
    return text, config


__all__ = ["OfficialView", "as_published"]
