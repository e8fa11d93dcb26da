"""A V4 checkpoint opened for reading: config and headers now, tensor bytes when asked.

Opening reads ``config.json``, the index and the header of every shard, and holds them against the
catalogue: every tensor known, none missing, every shape and storage as the config says. After
that a tensor is a :class:`StoredTensorRef`, and rows of it are read by range, never more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.catalogue import BF16, FP4, FP8, FP8_F32, QUANTIZED
from v4surgery.checkpoint.header import read_header
from v4surgery.checkpoint.index import check_index, expected_heads, read_index, shard_files
from v4surgery.checkpoint.matching import match_tensors
from v4surgery.checkpoint.official_view import as_published
from v4surgery.checkpoint.place import open_source
from v4surgery.checkpoint.refs import StoredTensorRef, TensorRef
from v4surgery.checkpoint.source import Source, merge_ranges, read_json_file
from v4surgery.config import V4Config, load_config
from v4surgery.errors import CheckpointError

CONFIG_FILE = "config.json"
SCRATCH_BYTES = 4 << 20

Rows = slice | NDArray[np.int64]
Bytes = NDArray[np.uint8]
Array = NDArray[Any]


class Checkpoint:
    """A parent or a replica, lazily: headers in memory, bytes by range.

    Attributes:
        source: Where the bytes come from.
        config: The model's config.
        catalogue: The tensors that the config implies.
        tensors: Every logical tensor by its stem (``layers.3.attn.wq_a``), in published order.
        fingerprint: BLAKE3 of config and headers: the identity of names, shapes and places.
        payload_bytes: Bytes of all tensors.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        names = source.list_files()
        if CONFIG_FILE not in names:
            raise CheckpointError(
                "no config.json: not a checkpoint",
                where=source.name,
                rule="a folder with config.json and model*.safetensors",
            )
        config_text = read_json_file(source, CONFIG_FILE)
        self.config: V4Config = load_config(config_text, f"{source.name}/{CONFIG_FILE}")
        digest = blake3(config_text)
        found: dict[str, TensorRef] = {}
        weight_map = read_index(source, names)
        self.files: tuple[str, ...] = shard_files(source, names, weight_map)
        source.fetch_heads(expected_heads(self.files, weight_map))
        for file in self.files:
            header, tensors = read_header(source, file)
            digest.update(header)
            for name, info in tensors.items():
                if name in found:
                    raise CheckpointError(
                        "a tensor stands in two files",
                        where=name,
                        value=f"{found[name].file} and {file}",
                        rule="every tensor once",
                    )
                found[name] = TensorRef(file, info.dtype, info.shape, info.begin, info.end)
        check_index(source, weight_map, found)
        self.fingerprint = digest.hexdigest()
        self.payload_bytes = sum(ref.end - ref.begin for ref in found.values())
        self.num_tensors = len(found)
        self.catalogue, self.tensors = match_tensors(self.config, found, source.name)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def weights_id(self) -> str | None:
        """Tells its weights from others with the same headers; None if only reading them would."""
        return self.source.weights_id(self.files)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def companions(self) -> list[str]:
        """Small files that travel with the weights: tokenizer, generation config, licence."""
        return [name for name in COMPANION_FILES if name in self.source.list_files()]

    def read_file(self, name: str) -> bytes:
        return self.source.read(name, 0, self.source.size(name))

    def read_rows(self, ref: TensorRef, rows: Rows) -> Bytes:
        """Bytes of some rows (outermost positions) of a stored tensor.

        Args:
            ref: The stored tensor.
            rows: A half-open slice without step, or int64 positions in any order.

        Returns:
            uint8 ``(rows, bytes per row)``, C-contiguous.

        Raises:
            ReadError: The source could not give exactly these bytes.
        """
        width = ref.row_bytes
        if isinstance(rows, slice):
            start, stop, step = rows.indices(ref.shape[0])
            assert step == 1, rows
            out = np.empty((max(stop - start, 0), width), dtype=np.uint8)
            if out.size:
                self.source.read_into(ref.file, ref.begin + start * width, _as_bytes(out))
            return out
        out = np.empty((len(rows), width), dtype=np.uint8)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        assert not len(rows) or (ordered[0] >= 0 and ordered[-1] < ref.shape[0]), (ref, rows)
        batch: list[tuple[slice, Bytes]] = []
        for first, last in _segments(ordered, width, self.source.gap_bytes):
            base, end = int(ordered[first]), int(ordered[last - 1]) + 1
            batch.append((slice(first, last), np.empty((end - base, width), dtype=np.uint8)))
            if sum(chunk.nbytes for _, chunk in batch) >= SCRATCH_BYTES:
                self._read_segments(ref, ordered, order, batch, out)
                batch = []
        self._read_segments(ref, ordered, order, batch, out)
        return out

    def _read_segments(
        self,
        ref: TensorRef,
        ordered: NDArray[np.int64],
        order: NDArray[np.int64],
        batch: list[tuple[slice, Bytes]],
        out: Bytes,
    ) -> None:
        """Read runs of rows side by side, and put each row where it was asked for."""
        width = ref.row_bytes
        bases = [int(ordered[part.start]) for part, _ in batch]
        self.source.read_many(
            ref.file,
            [
                (ref.begin + base * width, _as_bytes(chunk))
                for base, (_, chunk) in zip(bases, batch, strict=True)
            ],
        )
        for base, (part, chunk) in zip(bases, batch, strict=True):
            out[order[part]] = chunk[ordered[part] - base]

    def read_float(self, stored: StoredTensorRef, rows: Rows) -> NDArray[np.float32]:
        """Rows of a floating tensor, decoded to float32 ``(rows, columns)``."""
        codes, scales = self.read_codes(stored, rows)
        return decode(stored.fmt, codes, scales, "f32")

    def read_codes(
        self,
        stored: StoredTensorRef,
        rows: Rows,
        cols: NDArray[np.int64] | None = None,
    ) -> tuple[Array, Array | None]:
        """Rows and columns of a logical tensor as stored: codes, and one scale for each code.

        Args:
            stored: The tensor.
            rows: Rows to read.
            cols: Logical columns to keep, in order; None keeps all.

        Returns:
            Codes ``(rows, cols)`` (uint8 for FP4 and FP8, uint16 bits for BF16, else the dtype)
            and, for quantized tensors, the scale of each code, broadcastable to it.
        """
        raw = self.read_rows(stored.weight, rows)
        if stored.fmt not in QUANTIZED:
            values = raw.view(NUMPY_DTYPE[stored.weight.dtype])
            return (values if cols is None else np.take(values, cols, axis=1)), None
        scale = stored.scale
        assert scale is not None
        if stored.fmt == FP4:
            codes = formats.unpack_fp4(raw, cols)
            scales = self.read_rows(scale, rows)
            group = _block_of(cols, codes.shape[1], formats.FP4_GROUP)
        else:
            codes = raw if cols is None else np.take(raw, cols, axis=1)
            row_blocks, inverse = np.unique(
                _positions(rows, stored.weight.shape[0]) // formats.FP8_BLOCK, return_inverse=True
            )
            blocks = self.read_rows(scale, row_blocks).view(NUMPY_DTYPE[scale.dtype])
            scales = np.take(blocks, inverse.reshape(-1), axis=0)
            group = _block_of(cols, codes.shape[1], formats.FP8_BLOCK)
        return codes, np.take(scales, group, axis=1)


NUMPY_DTYPE: Mapping[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "I64": np.int64,
    "I8": np.uint8,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
}

COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    workers: int | None = None,
) -> Checkpoint:
    """Open a local folder, or a repository on the Hub, lazily.

    Shards of the official inference code (``model0-mp4.safetensors``) are read as the published
    layout that they were made from.

    Args:
        path: A folder, ``org/name`` or ``org/name@revision``. What is there as a folder is one.
        revision: Branch, tag or commit of a repository; not for a folder.
        token: For a repository: a token, False for none, None for huggingface_hub's own.
        workers: For a repository: threads that fetch headers.

    Raises:
        CheckpointError: Not a checkpoint, or one that does not hold what its config says.
        UsageError: A revision of a folder, or two revisions.
    """
    source = open_source(path, revision=revision, token=token, workers=workers)
    try:
        return Checkpoint(as_published(source))
    except BaseException:
        source.close()
        raise


@overload
def decode(
    fmt: str, codes: Array, scales: Array | None, out: Literal["bf16"]
) -> NDArray[np.uint16]: ...
@overload
def decode(
    fmt: str, codes: Array, scales: Array | None, out: Literal["f32"]
) -> NDArray[np.float32]: ...
def decode(fmt: str, codes: Array, scales: Array | None, out: Literal["bf16", "f32"]) -> Array:
    """Values of stored codes, as float32 or as bf16 bits in uint16.

    Exact for FP4, FP8 with E8M0 scales (see formats.decode_fp8 for the far ends of the range) and
    BF16; FP8 with F32 scales rounds once.
    """
    if fmt == FP4:
        assert scales is not None
        return formats.decode_fp4(codes, scales, out)
    if fmt in (FP8, FP8_F32):
        assert scales is not None
        return formats.decode_fp8(codes, scales, out)
    if fmt == BF16:
        return codes if out == "bf16" else formats.bf16_to_f32(codes)
    values = codes.astype(np.float32)
    return formats.f32_to_bf16(values) if out == "bf16" else values


def row_segments(rows: Rows, ref: TensorRef, gap_bytes: int) -> tuple[int, int]:
    """Requests and bytes that reading some rows costs."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(ref.shape[0])
        return (1, (stop - start) * ref.row_bytes) if stop > start else (0, 0)
    runs = _runs(np.sort(rows), ref.row_bytes, gap_bytes)
    return len(runs), int((runs[:, 1] - runs[:, 0]).sum()) * ref.row_bytes


def _runs(ordered: NDArray[np.int64], width: int, gap_bytes: int) -> NDArray[np.int64]:
    """Half-open runs of rows, int64 ``(n, 2)``, that cover sorted rows, small gaps included."""
    return merge_ranges(np.stack([ordered, ordered + 1], axis=1), gap_bytes // max(width, 1))


def _segments(ordered: NDArray[np.int64], width: int, gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs of sorted rows that one read serves, each at most SCRATCH_BYTES long."""
    bounds = np.searchsorted(ordered, _runs(ordered, width, gap_bytes))
    limit = max(SCRATCH_BYTES // max(width, 1), 1)
    for first, last in bounds.tolist():
        while first < last:
            stop = int(np.searchsorted(ordered, ordered[first] + limit))
            yield first, min(stop, last)
            first = min(stop, last)


def _as_bytes(array: Bytes) -> memoryview:
    # numpy's stubs call arrays buffers only from Python 3.12 on.
    return memoryview(array).cast("B")  # type: ignore[arg-type,unused-ignore]


def _positions(rows: Rows, size: int) -> NDArray[np.int64]:
    return np.arange(*rows.indices(size)) if isinstance(rows, slice) else rows


def _block_of(cols: NDArray[np.int64] | None, num_cols: int, block: int) -> NDArray[np.int64]:
    return (np.arange(num_cols) if cols is None else cols) // block
