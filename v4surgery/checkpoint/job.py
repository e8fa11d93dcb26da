"""What the writer is given, jobs that compute tensors, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from v4surgery.checkpoint.layout import OutputTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer


class Job(Protocol):
    """A unit of work that yields one or more whole output tensors, such as a weight and its scale.

    ``compute(chunk)`` is called with 0, 1, ... ``num_chunks - 1`` by one thread at a time, after
    an interruption with the first chunk that is missing. For each output it returns the next
    consecutive bytes (a C-contiguous array or any buffer; None or an empty one for nothing). The
    buffers may be overwritten by the next call. What it raises ends the run and is passed on.

    ``state`` holds what the job measures on the way, as plain JSON data. It is journaled with each
    chunk and put back before a job goes on, so that a resumed run reports what one run would.

    With ``hole`` nothing is computed: the payloads stay holes of a sparse file and get no digest.
    """

    @property
    def outputs(self) -> tuple[OutputTensor, ...]: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def hole(self) -> bool: ...
    @property
    def state(self) -> dict[str, Any]: ...
    def compute(self, chunk: int, /) -> Sequence[Buffer | NDArray[Any] | None]: ...


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a run wrote.

    Args:
        out: The folder.
        files: The shards, in order.
        digests: BLAKE3 in hex by the tensors' keys, in file order, for all that are not holes.
        payload_bytes: Of all tensors, holes included: the index's ``total_size``.
        hole_bytes: The part of it that takes no disk.
        bytes_written: Payload bytes written by this run.
        bytes_reused: Payload bytes found intact from an earlier run.
        chunks_computed: Chunks computed by this run.
        chunks_reused: Chunks that an earlier run had computed.
        already_complete: An earlier run had finished; this one touched nothing, and the other
            fields but ``out`` and ``files`` are empty.
    """

    out: Path
    files: tuple[str, ...]
    digests: Mapping[str, str] = field(default_factory=dict)
    payload_bytes: int = 0
    hole_bytes: int = 0
    bytes_written: int = 0
    bytes_reused: int = 0
    chunks_computed: int = 0
    chunks_reused: int = 0
    already_complete: bool = False
