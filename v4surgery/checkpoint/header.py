"""The header of a safetensors file: read without trusting a byte of it, and written.

A file is an 8-byte little-endian header length n, n bytes of JSON, then the data of the tensors::

    {"__metadata__": {"format": "pt"},
     "norm.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, ...}

``data_offsets`` count from the end of the header. The headers read here come over the network
or from folders of strangers, so whatever is accepted must be a subset of what the safetensors
package accepts. It is stricter where a careful writer never goes: names and metadata keys that
repeat (the package lets the last one win), space before the ``{``, keys it would ignore, entries
written as arrays, ``null`` metadata, sizes of 2**63 and more, dtypes that V4 files never hold.

Source: https://github.com/huggingface/safetensors#format and ``safetensors/src/tensor.rs`` there.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from v4surgery.errors import HeaderError
from v4surgery.formats import F4, ITEM_BYTES

if TYPE_CHECKING:
    from v4surgery.checkpoint.source import Source

__all__ = [
    "MAX_HEADER_BYTES",
    "TensorInfo",
    "build_header",
    "header_length",
    "parse_header",
    "payload_bytes",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000

_PREFIX_BYTES = 8
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_COUNT = 2**63 - 1
_DTYPES = (*ITEM_BYTES, F4)
_DOWNLOAD_AGAIN = "download the file again"

# Names and values are a stranger's: escaped, and cut where a message would flood the terminal.
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 160


class TensorInfo(NamedTuple):
    """Where a tensor lies: ``begin`` and ``end`` are absolute in the file, half open."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Refused:
    """Stands for JSON that is valid but never ours: a negative number, NaN, a key twice."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def header_length(first8: bytes, file_bytes: int, where: str) -> int:
    """Length of the JSON header in bytes, without the prefix.

    Args:
        first8: The first 8 bytes of the file, fewer if it has fewer.
        file_bytes: Size of the whole file.
        where: The file, for the message.

    Raises:
        HeaderError: The prefix is cut, or the header is over the limit or longer than the file.
    """
    if len(first8) < _PREFIX_BYTES or file_bytes < _PREFIX_BYTES:
        raise HeaderError(
            "the file is too short to be a safetensors file",
            where=where,
            value=f"{min(len(first8), file_bytes)} bytes",
            rule=f"the first {_PREFIX_BYTES} bytes hold the length of the header",
            hint=_DOWNLOAD_AGAIN,
        )
    num_bytes = int.from_bytes(first8[:_PREFIX_BYTES], "little")
    _check_length(num_bytes, file_bytes, where)
    return num_bytes


def parse_header(
    header: bytes, file_bytes: int, where: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata.

    Args:
        header: The JSON header without its 8-byte prefix.
        file_bytes: Size of the whole file: prefix, header and data.
        where: The file, for the messages.

    Raises:
        HeaderError: Anything else than a header whose tensors cover the rest of the file exactly.
    """
    _check_length(len(header), file_bytes, where)
    base = _PREFIX_BYTES + len(header)
    root = _load_json(header, base, where)
    metadata = _parse_metadata(root.pop(_METADATA, {}), where)
    for name, info in root.items():
        if type(info) is not TensorInfo:
            raise _entry_error(name, info, _broken_rule(info), where)
        if not name.isascii() and _has_lone_surrogate(name):
            raise _entry_error(name, info, "a name without lone surrogates", where)
    infos = sorted(root.items(), key=lambda item: item[1][2:])
    _check_cover(infos, base, file_bytes, where)
    return dict(infos), metadata


def read_header(source: Source, file: str) -> tuple[bytes, dict[str, TensorInfo]]:
    """The JSON header of a file, as bytes and as its tensors in the order of their bytes.

    Raises:
        HeaderError: See :func:`parse_header`.
        ReadError: The file could not be read.
    """
    where = f"{source.name}/{file}"
    size = source.size(file)
    length = header_length(source.read(file, 0, min(_PREFIX_BYTES, size)), size, where)
    header = source.read(file, _PREFIX_BYTES, _PREFIX_BYTES + length)
    return header, parse_header(header, size, where)[0]


def payload_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor's data.

    Raises:
        HeaderError: An unknown dtype, a dimension that is no size, or 2**63 bytes and more.
    """
    dims = tuple(shape)
    if dtype not in _DTYPES:
        raise HeaderError(f"unknown dtype {_shown.repr(dtype)}", rule=_dtype_rule())
    num_bytes = _checked_bytes(dtype, dims)
    if num_bytes is None:
        raise HeaderError(
            "not the shape of a tensor", value=_shown.repr(dims), rule="sizes, below 2**63 bytes"
        )
    return num_bytes


def build_header(
    entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Everything of a file before its data: prefix, compact JSON, spaces up to 8-byte alignment.

    Byte for byte what safetensors writes for the same order of tensors.

    Args:
        entries: Name, dtype and shape of each tensor, in the order of their data.
        metadata: Written as ``__metadata__`` if given; published V4 shards have none.

    Raises:
        HeaderError: A name that repeats or cannot be stored, a bad shape, a header over the limit.
    """
    table: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    begin = 0
    for name, dtype, shape in entries:
        if name in table or name == _METADATA:
            raise HeaderError(
                f"tensor {_shown.repr(name)} cannot be written",
                rule=f"names are unique, and none is {_METADATA}",
            )
        end = begin + payload_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise HeaderError(
            "a name or metadata text cannot be written as UTF-8",
            value=_shown.repr(error.object[max(0, error.start - 60) : error.end + 60]),
            rule="no lone surrogates",
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or begin > _MAX_COUNT:
        raise HeaderError(
            "too much for one safetensors file",
            value=f"a header of {len(text):,} bytes for {begin:,} bytes of data",
            rule=f"at most {MAX_HEADER_BYTES:,} bytes of header, below 2**63 bytes of data",
            hint="split the tensors over more shards",
        )
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def _check_length(num_bytes: int, file_bytes: int, where: str) -> None:
    if num_bytes > MAX_HEADER_BYTES:
        raise HeaderError(
            "the header is too long",
            where=where,
            value=f"{num_bytes:,} bytes",
            rule=f"at most {MAX_HEADER_BYTES:,} bytes",
            hint="check that this is a safetensors file",
        )
    if _PREFIX_BYTES + num_bytes > file_bytes:
        raise HeaderError(
            "the file ends inside its header",
            where=where,
            value=f"a header of {num_bytes:,} bytes in a file of {file_bytes:,} bytes",
            rule=f"{_PREFIX_BYTES} bytes and the header fit in the file",
            hint=_DOWNLOAD_AGAIN,
        )


def _load_json(header: bytes, base: int, where: str) -> dict[str, Any]:
    """The outermost object, in which every well-formed entry is a ``TensorInfo`` already."""

    def load_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | TensorInfo | _Refused:
        table = dict(pairs)
        if len(table) < len(pairs):
            ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
            return _Refused(f"an object with {_shown.repr(key)} twice")
        return _tensor_info(table, base) or table

    if header[:1] != b"{":
        raise _header_error("no JSON object", where, header[:20], "it starts with {")
    try:
        root = json.loads(
            header.decode(),
            object_pairs_hook=load_object,
            # Only a header with a minus sign somewhere pays for a Python call per integer.
            parse_int=_load_int if b"-" in header else int,
            parse_float=_Refused,
            parse_constant=_Refused,
        )
    except RecursionError:
        raise _header_error("nested too deeply", where, header[:20], "three levels") from None
    except MemoryError:
        raise _header_error("too large for this machine's memory", where) from None
    except ValueError as error:
        raise _header_error("not valid JSON", where, str(error), "JSON in UTF-8") from None
    if type(root) is not dict:
        raise _header_error("no table of tensors", where, root, "unique names, each with an object")
    return root


def _load_int(text: str) -> int | _Refused:
    # Python reads -0 as 0; serde_json reads it as a float, which is no size.
    return _Refused(text) if text[0] == "-" else int(text)


def _tensor_info(entry: dict[str, Any], base: int) -> TensorInfo | None:
    """None unless the entry is well formed. Integers that come here are never negative."""
    if len(entry) != 3 or "dtype" not in entry:
        return None
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or dtype not in _DTYPES or type(shape) is not list:
        return None
    if type(offsets) is not list or len(offsets) != 2:
        return None
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or end > _MAX_COUNT:
        return None
    num_bytes = _checked_bytes(dtype, shape)
    if num_bytes is None or num_bytes != end - begin:
        return None
    return TensorInfo(dtype, tuple(shape), base + begin, base + end)


def _broken_rule(entry: Any) -> str:
    """The rule that an entry breaks which ``_tensor_info`` refused."""
    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        return "an object of dtype, shape and data_offsets, each once"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _DTYPES:
        return _dtype_rule()
    if type(shape) is not list or not all(map(_is_size, shape)):
        return "shape is an array of sizes"
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return "data_offsets is an array of two byte offsets"
    if offsets[0] > offsets[1]:
        return "data_offsets do not run backwards"
    num_bytes = _checked_bytes(dtype, shape)
    if num_bytes is None:
        return "a tensor is smaller than 2**63 bytes"
    return f"{dtype} of this shape takes {num_bytes:,} bytes"


def _parse_metadata(metadata: Any, where: str) -> dict[str, str]:
    if type(metadata) is not dict:
        raise _entry_error(_METADATA, metadata, "an object of strings", where)
    for key, text in metadata.items():
        if type(text) is not str:
            raise _entry_error(f"{_METADATA}.{key}", text, "a string", where)
        if _has_lone_surrogate(key) or _has_lone_surrogate(text):
            raise _entry_error(f"{_METADATA}.{key}", text, "text without lone surrogates", where)
    return metadata


def _check_cover(
    infos: list[tuple[str, TensorInfo]], base: int, file_bytes: int, where: str
) -> None:
    """The sorted tensors must tile the data: no overlap, no hole, nothing missing or left over."""
    cursor = base
    for name, info in infos:
        if info.begin != cursor:
            kind = "overlaps the one before it" if info.begin < cursor else "comes after a hole"
            raise HeaderError(
                f"tensor {_shown.repr(name)} {kind}",
                where=where,
                value=f"data_offsets [{info.begin - base}, {info.end - base}]",
                rule=f"it begins where the one before ends, at {cursor - base}",
            )
        if info.end > file_bytes:
            raise HeaderError(
                f"the file ends before tensor {_shown.repr(name)} does",
                where=where,
                value=f"data_offsets [{info.begin - base}, {info.end - base}]",
                rule=f"the file has {file_bytes - base:,} bytes of data",
                hint=_DOWNLOAD_AGAIN,
            )
        cursor = info.end
    if cursor != file_bytes:
        raise HeaderError(
            "the file has bytes that belong to no tensor",
            where=where,
            value=f"{file_bytes - cursor:,} bytes at the end",
            rule="the file ends with its last tensor",
            hint=_DOWNLOAD_AGAIN,
        )


def _checked_bytes(dtype: str, shape: Sequence[object]) -> int | None:
    # Zeros are left out of the product: safetensors multiplies in order and sees the overflow
    # of [2**62, 4, 0], where a plain product would see nothing.
    num_bytes = ITEM_BYTES.get(dtype, 1)
    for dim in shape:
        if type(dim) is not int or dim < 0:
            return None
        num_bytes *= dim or 1
        if num_bytes > _MAX_COUNT:
            return None
    if 0 in shape:
        return 0
    if dtype != F4:
        return num_bytes
    return None if num_bytes % 2 else num_bytes // 2  # whole bytes only, as in safetensors


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number <= _MAX_COUNT


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _dtype_rule() -> str:
    return f"the dtype is one of {', '.join(_DTYPES)}"


def _header_error(
    problem: str, where: str, value: object = None, rule: str | None = None
) -> HeaderError:
    shown = None if value is None else _shown.repr(value)
    hint = "check that this is a safetensors file, then download it again"
    return HeaderError(f"the header is {problem}", where=where, value=shown, rule=rule, hint=hint)


def _entry_error(name: str, value: object, rule: str, where: str) -> HeaderError:
    what = f"the header entry of {_shown.repr(name)} is malformed"
    return HeaderError(what, where=where, value=_shown.repr(value), rule=rule)
