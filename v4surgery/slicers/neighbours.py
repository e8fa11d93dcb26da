"""Whether stored values that differ are neighbours: the same sum, added in another order.

A sum in another order is off by at most the job's ``slack``, far below one unit of any stored
format; rounded, it is the same value or the next one. So a value passes that is the expected one or
a neighbour of it, or within the slack where terms cancelled. Scales must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.checkpoint.layout import OutputTensor
from v4surgery.slicers.transform import EditJob

# One unit in the last place of a value is at most this share of it.
_UNITS = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}
_TO_F32: dict[str, Callable[[bytes | memoryview], NDArray[np.float32]]] = {
    "F32": lambda data: np.frombuffer(data, np.float32),
    "F16": lambda data: np.frombuffer(data, np.float16).astype(np.float32),
    "BF16": lambda data: formats.bf16_to_f32(np.frombuffer(data, np.uint16)),
}


def is_rounding(
    job: object, output: OutputTensor, actual: bytes, expected: bytes | memoryview
) -> bool:
    """Whether bytes that differ stand for sums of a job that were added in another order.

    Args:
        job: What computed the expected bytes last.
        output: Whose bytes they are.
        actual: As stored.
        expected: As computed.
    """
    if not isinstance(job, EditJob) or not job.is_mixed:
        return False
    if output is job.outputs[0] and output.dtype in ("I8", "F8_E4M3"):
        return bool((np.abs(_rank(actual, output.dtype) - _rank(expected, output.dtype)) < 2).all())
    if output.dtype not in _UNITS or output is not job.outputs[0]:
        return False
    with np.errstate(invalid="ignore"):  # NaN compares false
        a, b = (_TO_F32[output.dtype](data).astype(np.float64) for data in (actual, expected))
        allowed = job.slack + _UNITS[output.dtype] * np.maximum(np.abs(a), np.abs(b))
        return bool((np.abs(a - b) <= allowed).all())


def _rank(data: bytes | memoryview, dtype: str) -> NDArray[Any]:
    """Codes by their place in the order of the values that they stand for; both zeros alike."""
    codes = np.frombuffer(data, np.uint8)
    if dtype == "I8":
        codes, sign = np.stack([codes & 15, codes >> 4]), 8
    else:
        sign = 128
    size = (codes & (sign - 1)).astype(np.int16)
    return np.where(codes & sign, -size, size)
