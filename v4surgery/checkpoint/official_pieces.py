"""Tensors of the published layout, put together from what the ranks' files hold of them.

wo_a is BF16 in the shards. Beside the scales that it had (``wo_a-scales.safetensors``, which
v4surgery writes) its codes follow exactly: a BF16 value has 8 significant bits of a code's 4 times
the scale, so that dividing and rounding to E4M3 finds the code, for arbitrary F32 scales too.
Without them, power-of-two scales are taken by the official rule, 2^ceil(log2(amax / 448)): the
values are the same, and the bytes too if the scales were chosen so. Every block is decoded again
and compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.checkpoint.header import TensorInfo
from v4surgery.checkpoint.official import SCALES_FILE
from v4surgery.checkpoint.source import Source
from v4surgery.errors import ReadError
from v4surgery.formats import FP8_BLOCK

Scales = NDArray[np.uint8] | NDArray[np.float32]
"""E8M0 codes, or float32."""


class Place(NamedTuple):
    """Bytes of one tensor of one rank's file."""

    file: str
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        return self.info.end - self.info.begin


class Reader(Protocol):
    """Fills buffers from one tensor of the published layout, at any offset."""

    def fill(self, source: Source, begin: int, out: NDArray[np.uint8]) -> None: ...


class Joined:
    """Places one after another: a whole tensor, or one cut along its rows."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.begins = [0, *accumulate(place.nbytes for place in places)]

    def fill(self, source: Source, begin: int, out: NDArray[np.uint8]) -> None:
        done, number = 0, bisect_right(self.begins, begin) - 1
        while done < len(out):
            place, offset = self.places[number], begin + done - self.begins[number]
            size = min(place.nbytes - offset, len(out) - done)
            piece = memoryview(out[done : done + size])  # type: ignore[arg-type,unused-ignore]
            source.read_into(place.file, place.info.begin + offset, piece)
            done, number = done + size, number + 1


class Interleaved:
    """A tensor cut along its columns: row by row the places' rows beside each other."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.parts = [Joined([place]) for place in places]
        self.widths = [place.nbytes // max(place.info.shape[0], 1) for place in places]

    def fill(self, source: Source, begin: int, out: NDArray[np.uint8]) -> None:
        width = sum(self.widths)
        first, last = begin // width, -(-(begin + len(out)) // width)
        rows = np.empty((last - first, width), np.uint8)
        column = 0
        for part, size in zip(self.parts, self.widths, strict=True):
            piece = np.empty((last - first) * size, np.uint8)
            part.fill(source, first * size, piece)
            rows[:, column : column + size] = piece.reshape(-1, size)
            column += size
        out[:] = rows.reshape(-1)[begin - first * width :][: len(out)]


class Encoded:
    """FP8 codes of a linear that the shards hold in BF16, and its scales.

    Args:
        name: For messages.
        values: The BF16 values.
        shape: Logical shape.
        scales: ``(row blocks, column blocks)`` uint8 E8M0 or float32 as recorded; None takes
            power-of-two scales by the official rule.
    """

    def __init__(
        self,
        name: str,
        values: Joined,
        shape: tuple[int, ...],
        scales: Scales | None,
    ) -> None:
        self.name, self.values, self.shape, self.recorded = name, values, shape, scales

    def fill(self, source: Source, begin: int, out: NDArray[np.uint8]) -> None:
        block_bytes = FP8_BLOCK * self.shape[1]
        done = 0
        while done < len(out):
            block, offset = divmod(begin + done, block_bytes)
            codes = self.block(source, block)[0].reshape(-1)[offset:]
            size = min(len(codes), len(out) - done)
            out[done : done + size] = codes[:size]
            done += size

    def block(self, source: Source, block: int) -> tuple[NDArray[np.uint8], Scales]:
        """Codes ``(up to 128, columns)`` and scales ``(column blocks,)`` of a row of blocks.

        Raises:
            ReadError: The values are not codes times scales.
        """
        rows = min(FP8_BLOCK, self.shape[0] - block * FP8_BLOCK)
        raw = np.empty(2 * rows * self.shape[1], np.uint8)
        self.values.fill(source, 2 * block * FP8_BLOCK * self.shape[1], raw)
        bits = raw.view(np.uint16).reshape(rows, self.shape[1])
        values = formats.bf16_to_f32(bits)
        if self.recorded is None:
            codes, scales = formats.quantize_fp8(values, "F8_E8M0")
            spread: Scales = np.repeat(scales[0], FP8_BLOCK)[: self.shape[1]]
        else:
            spread = np.repeat(self.recorded[block], FP8_BLOCK)[: self.shape[1]]
            with np.errstate(all="ignore"):
                codes = formats.encode_e4m3(values / _as_f32(spread))
        changed = np.count_nonzero(formats.decode_fp8(codes, spread, "bf16") != bits)
        if changed:
            raise ReadError(
                "wo_a holds values that are no FP8 codes under its scales",
                where=self.name,
                value=f"{changed} values of rows {block * FP8_BLOCK} and on",
                rule=f"shards as they were made, with their {SCALES_FILE} or from "
                "power-of-two scales",
                hint="if the shards were changed afterwards, take wo_a from where it changed",
            )
        return codes, self.recorded[block] if self.recorded is not None else scales[0]


class EncodedScales:
    """The scales beside :class:`Encoded`, computed row of blocks by row of blocks."""

    def __init__(self, codes: Encoded) -> None:
        self.codes = codes
        self.width = -(-codes.shape[1] // FP8_BLOCK) * (
            1 if codes.recorded is None else codes.recorded.itemsize
        )

    def fill(self, source: Source, begin: int, out: NDArray[np.uint8]) -> None:
        recorded = self.codes.recorded
        if recorded is not None:
            out[:] = recorded.reshape(-1).view(np.uint8)[begin : begin + len(out)]
            return
        first, last = begin // self.width, -(-(begin + len(out)) // self.width)
        rows = [self.codes.block(source, block)[1] for block in range(first, last)]
        flat = np.concatenate(rows).view(np.uint8)
        out[:] = flat[begin - first * self.width :][: len(out)]


def _as_f32(scales: Scales) -> NDArray[np.float32]:
    values: NDArray[np.float32] = (
        formats.E8M0_VALUES[scales] if scales.dtype == np.uint8 else scales.view(np.float32)
    )
    return values


__all__ = ["Encoded", "EncodedScales", "Interleaved", "Joined", "Place", "Reader", "Scales"]
