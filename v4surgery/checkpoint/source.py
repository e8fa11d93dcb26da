"""Where the bytes of a parent come from: a local folder, or a repository on the Hub.

Everything above reads through ``Source``: whole files are never needed, every range comes back
exact or raises, and the source can say at the end whether it changed underneath.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

from v4surgery.errors import CheckpointError

__all__ = ["Source", "merge_ranges", "read_json_file", "read_whole", "safe_basename"]

Int64Array = npt.NDArray[np.int64]
SourceT = TypeVar("SourceT", bound="Source")

MAX_JSON_BYTES = 256_000_000
_MAX_NAME_BYTES = 255

_shown = reprlib.Repr()
_shown.maxstring = 160


class Source(Protocol):
    """Files by basename, read by half-open byte ranges, from any number of threads.

    ``name`` is what messages call it: the folder's name or the repository id. Reading through a
    gap of up to ``gap_bytes`` is cheaper than a second request.
    """

    name: str
    gap_bytes: int

    def list_files(self) -> list[str]:
        """Basenames, sorted."""
        ...

    def size(self, file: str) -> int:
        """Bytes in ``file``, as they were when it was first touched."""
        ...

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Exactly ``end - begin`` bytes.

        Raises:
            ReadError: The range is not in the file, or could not be read whole.
        """
        ...

    def read_into(self, file: str, begin: int, buffer: memoryview) -> None:
        """Fills ``buffer`` (writable, C-contiguous) from ``begin`` on.

        Raises:
            ReadError: The range is not in the file, or could not be read whole.
        """
        ...

    def identity(self) -> dict[str, str]:
        """What provenance records: ``kind``, ``name``, and ``revision`` where there is one."""
        ...

    def weights_id(self, files: Iterable[str]) -> str | None:
        """Tells these files from others with the same headers; None if only reading them would."""
        del files
        return None

    def check_unchanged(self) -> None:
        """Call after the last read.

        Raises:
            ReadError: A file that was read is no longer the one that was opened.
        """
        ...

    def close(self) -> None:
        """Releases what is open. Call it once no thread reads; reading afterwards raises."""
        ...

    def read_many(self, file: str, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fills several buffers of one file, each from its own begin on, as ``read_into`` does.

        Raises:
            ReadError: One of the ranges is not in the file, or could not be read whole.
        """
        for begin, buffer in pieces:
            self.read_into(file, begin, buffer)

    def fetch_heads(self, expected: Mapping[str, int]) -> None:
        """Makes reading the headers of these files cheap, where it is not.

        Args:
            expected: Files, each with about how many bytes its header has, rather too many.

        Raises:
            CheckpointError: A header cannot be read.
        """
        del expected

    def will_read(self, spans: Iterable[tuple[str, int, int]], workers: int) -> None:
        """Says what so many threads will read from now on.

        Args:
            spans: (file, begin, end) that are read whole and front to back, in equal pieces. A
                source may fetch the next pieces while one is worked on; no byte more.
            workers: Threads that read at once.
        """
        del spans, workers

    def cancel(self) -> None:
        """Ends the reads that run or wait now, in whatever thread, with a ReadError; not later."""
        return

    def __enter__(self: SourceT) -> SourceT:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_whole(source: Source, file: str, at_most: int, problem: str) -> bytes:
    """All of a file that has to be small.

    Raises:
        CheckpointError: It has more than ``at_most`` bytes; ``problem`` says so.
        ReadError: It could not be read whole.
    """
    size = source.size(file)
    if size > at_most:
        raise CheckpointError(
            problem,
            where=f"{source.name}/{file}",
            value=size,
            rule=f"at most {at_most} bytes",
        )
    return source.read(file, 0, size)


def read_json_file(source: Source, file: str) -> bytes:
    """The text of a config or an index.

    Raises:
        CheckpointError: It is larger than any of them.
        ReadError: It could not be read whole.
    """
    return read_whole(source, file, MAX_JSON_BYTES, "a JSON file is too large")


@overload
def merge_ranges(ranges: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]: ...
@overload
def merge_ranges(ranges: Int64Array, gap: int) -> Int64Array: ...
def merge_ranges(
    ranges: list[tuple[int, int]] | Int64Array, gap: int
) -> list[tuple[int, int]] | Int64Array:
    """Ranges that cover the given ones, joined wherever at most ``gap`` bytes lie between.

    Args:
        ranges: Half-open, sorted by their begin; they may touch, overlap or be empty (empty
            ones are dropped). An array is int64 ``(n, 2)``.
        gap: Bytes, at least 0.

    Raises:
        ValueError: Ranges out of order or running backwards, or a negative gap.
    """
    if isinstance(ranges, list):
        merged = merge_ranges(np.array(ranges, np.int64).reshape(-1, 2), gap)
        return [(begin, end) for begin, end in merged.tolist()]
    begins, ends = ranges[:, 0], ranges[:, 1]
    if gap < 0 or (ends < begins).any() or (begins[1:] < begins[:-1]).any():
        raise ValueError("ranges must be half open and sorted by begin, and gap at least 0")
    filled = ends > begins
    begins, ends = begins[filled], np.maximum.accumulate(ends[filled])
    splits = begins[1:] - ends[:-1] > gap
    first, last = np.ones(len(begins), np.bool_), np.ones(len(begins), np.bool_)
    first[1:], last[:-1] = splits, splits
    return np.stack([begins[first], ends[last]], axis=1)


def safe_basename(name: object, where: str) -> str:
    """``name`` itself, once it is known to be one plain file name.

    A shard's name comes out of an index that a stranger wrote, and ends up in paths and URLs.
    It is refused rather than cleaned: a cleaned name is another file.

    Raises:
        CheckpointError: It could lead elsewhere as a path or as part of a URL.
    """
    rule = _broken_rule(name)
    if rule is not None:
        raise CheckpointError(
            "not the name of a file in this checkpoint",
            where=where,
            value=_shown.repr(name),
            rule=rule,
            hint="get the checkpoint from a source you trust",
        )
    assert isinstance(name, str)
    return name


def _broken_rule(name: object) -> str | None:
    if not isinstance(name, str):
        return "a file name is a string"
    if name in ("", ".", ".."):
        return "a file name is not empty and not a folder"
    if not name.isprintable():
        return "a file name has printable characters only"
    found = next((char for char in name if char in '/\\%?#:*"<>|'), None)
    if found is not None:
        return f"a file name is one plain basename, without {found!r}"
    if name[0] in "~- " or name[-1] in " .":
        return "a file name starts with none of '~', '-', ' ' and ends with no ' ' or '.'"
    if len(name.encode()) > _MAX_NAME_BYTES:
        return f"a file name has at most {_MAX_NAME_BYTES} bytes"
    return None
