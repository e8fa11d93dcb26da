"""Where every output tensor goes: which shard, which offset. Pure; nothing is read or written.

A shard is the header of :mod:`v4surgery.checkpoint.header` and then the payloads, back to back in
the order of its ``tensors``. :func:`pack` spreads tensors over shards; :meth:`ShardLayout.build`
lays out one file in an order of the caller's choosing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from v4surgery.checkpoint.header import build_header, payload_bytes
from v4surgery.formats import F4, FP8_BLOCK

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PROVENANCE_FILE = "v4surgery.json"

# The published shards have I64, F32, BF16, F8_E8M0, F8_E4M3, I8: the order in which safetensors'
# own writer sorts (its Dtype enumeration backwards: wide items first, so that all are aligned).
# The dtypes that no V4 has stand where that writer puts them.
# Source: safetensors/src/tensor.rs, `prepare` and `enum Dtype`; spec/checkpoint.md "Files".
_DTYPE_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", F4, "BOOL"),
)
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_ORDER)}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written; ``dtype`` is safetensors' name for it (``"BF16"``).

    ``rank`` says in which rank's file it is where every rank has one of that name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rank: int | None = None

    @property
    def key(self) -> str:
        """Its name in this checkpoint, different for each rank."""
        return self.name if self.rank is None else f"{self.rank}:{self.name}"

    @property
    def nbytes(self) -> int:
        return payload_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One safetensors file to be.

    Args:
        file: Its basename.
        tensors: Its tensors in file order.
        header: The bytes before the payload, length prefix included.
        offsets: Where each tensor begins, counted from the start of the file.
        total_bytes: The size of the file.
    """

    file: str
    tensors: tuple[OutputTensor, ...]
    header: bytes
    offsets: tuple[int, ...]
    total_bytes: int

    @classmethod
    def build(cls, file: str, tensors: Iterable[OutputTensor]) -> ShardLayout:
        """Lays out one file with the tensors in the order given."""
        ordered = tuple(tensors)
        header = build_header([(item.name, item.dtype, item.shape) for item in ordered])
        *offsets, total = accumulate((item.nbytes for item in ordered), initial=len(header))
        return cls(file, ordered, header, tuple(offsets), total)

    @property
    def payload_bytes(self) -> int:
        return self.total_bytes - len(self.header)


def payload_order(tensors: Iterable[OutputTensor]) -> tuple[OutputTensor, ...]:
    """The tensors in the published order: dtype (wide ones first), then name as a plain string."""
    last = len(_DTYPE_RANK)
    return tuple(sorted(tensors, key=lambda item: (_DTYPE_RANK.get(item.dtype, last), item.name)))


def pack(
    groups: Sequence[Sequence[OutputTensor]], max_shard_bytes: int | None, merge: bool
) -> list[ShardLayout]:
    """Spreads groups of tensors over shards, each shard in the published payload order.

    A group that is larger than a shard may be is cut, in payload order; so a weight and its scale
    may part. A tensor that alone is too large gets a shard to itself.

    Args:
        groups: The natural units in order (embedding, layers, head; or a parent's own files).
            Empty ones vanish.
        max_shard_bytes: Limit for the payload of a shard (as in transformers, the header is not
            counted); None for no limit.
        merge: Put consecutive groups into one shard as long as they fit. Otherwise every group
            begins a shard.
    """
    assert max_shard_bytes is None or max_shard_bytes > 0, max_shard_bytes
    pieces = [piece for group in groups for piece in _cut(payload_order(group), max_shard_bytes)]
    if merge:
        pieces = list(_merged(pieces, max_shard_bytes))
    names = [item.name for piece in pieces for item in piece]
    assert len(set(names)) == len(names), "a tensor name occurs twice"
    return [
        ShardLayout.build(shard_file(number, len(pieces)), payload_order(piece))
        for number, piece in enumerate(pieces, start=1)
    ]


def shard_file(number: int, num_shards: int) -> str:
    """The published file name of shard ``number``, counted from 1."""
    if num_shards == 1:
        return SINGLE_FILE
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def _cut(group: Sequence[OutputTensor], limit: int | None) -> Iterator[list[OutputTensor]]:
    return _merged([[item] for item in group], limit)


def _merged(
    pieces: Iterable[Sequence[OutputTensor]], limit: int | None
) -> Iterator[list[OutputTensor]]:
    current: list[OutputTensor] = []
    current_bytes = 0
    for piece in pieces:
        piece_bytes = sum(item.nbytes for item in piece)
        if current and limit is not None and current_bytes + piece_bytes > limit:
            yield current
            current, current_bytes = [], 0
        current.extend(piece)
        current_bytes += piece_bytes
    if current:
        yield current


def row_offsets(outputs: Sequence[OutputTensor], row: int) -> tuple[int, ...]:
    """Byte offset of a row in a weight, and of its scale's row (one for 128 rows where FP8)."""
    num_rows = outputs[0].shape[0]
    return tuple(
        (row if output.shape[0] == num_rows else row // FP8_BLOCK)
        * (output.nbytes // max(output.shape[0], 1))
        for output in outputs
    )
