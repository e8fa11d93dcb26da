"""The number formats of DeepSeek-V4 checkpoints, decoded and encoded with numpy alone.

Codes and bit patterns are unsigned integers of the same width: ``uint8`` for E2M1 (one code an
element, or two packed), E4M3 and E8M0, ``uint16`` for BF16. Values are ``float32``.

* FP4: value = e2m1(code) * 2^(scale - 127), one E8M0 scale for an output row and 32 inputs.
* FP8: value = e4m3(code) * scale, one scale for a 128x128 block, E8M0 or (Base) float32.

Decoding looks (scale, code) up in a table of all products, so no rounding is left to the order of
operations. Encoding rounds float32 to odd on 16 bits, which keeps what nearest-even needs for a
format of at most 6 significant bits, and looks the final code up in 65536 entries.

Source: spec/checkpoint.md, "Number formats"; OCP Microscaling Formats (MX) v1.0, section 5.3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

__all__ = [
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "E4M3_VALUES",
    "E8M0_BIAS",
    "E8M0_NAN",
    "E8M0_VALUES",
    "F4",
    "FP4_GROUP",
    "FP8_BLOCK",
    "ITEM_BYTES",
    "ErrorStats",
    "bf16_to_f32",
    "decode_fp4",
    "decode_fp8",
    "e8m0_scales",
    "encode_e2m1",
    "encode_e4m3",
    "f32_to_bf16",
    "pack_fp4",
    "quantize_fp4",
    "quantize_fp8",
    "quantized_error",
    "unpack_fp4",
]

U8Array = npt.NDArray[np.uint8]
U16Array = npt.NDArray[np.uint16]
F32Array = npt.NDArray[np.float32]
Output = Literal["bf16", "f32"]
ScaleDtype = Literal["F8_E8M0", "F32"]

ITEM_BYTES: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}

F4 = "F4"
"""safetensors' name for two E2M1 codes a byte; its shapes count codes, not bytes."""

FP4_GROUP = 32
FP8_BLOCK = 128
E4M3_MAX = 448.0
E2M1_MAX = 6.0
E8M0_BIAS = 127
E8M0_NAN = 255

# 64 Ki elements keep a chunk's index (8 bytes each inside np.take) within a core's L2 cache.
_CHUNK = 1 << 16


def _frozen(values: F32Array) -> F32Array:
    values.setflags(write=False)
    return values


def _e4m3_values() -> F32Array:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10)
    ).astype(np.float32)
    magnitude[0x7F] = np.nan
    return _frozen(np.concatenate([magnitude, -magnitude]))


def _e8m0_values() -> F32Array:
    # ldexp, because shifting the byte into a float32's exponent turns code 0 (2^-127) into 0.
    powers = np.ldexp(np.ones(E8M0_NAN, np.float32), np.arange(E8M0_NAN) - E8M0_BIAS)
    return _frozen(np.append(powers, np.float32(np.nan)))


_E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_VALUES = _frozen(np.concatenate([_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES]))
E4M3_VALUES = _e4m3_values()
E8M0_VALUES = _e8m0_values()


def _require_dtype(name: str, array: npt.NDArray[Any], *dtypes: type[np.generic]) -> None:
    if array.dtype not in dtypes:
        wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {wanted}")


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis that cover about ``_CHUNK`` elements each."""
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def bf16_to_f32(bits: U16Array) -> F32Array:
    """Float32 values of BF16 bit patterns, of the same shape; exact, NaN payloads included."""
    _require_dtype("bits", bits, np.uint16)
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def f32_to_bf16(x: F32Array) -> U16Array:
    """BF16 bit patterns of float32 values, of the same shape, rounded to nearest even.

    Beyond the largest BF16 the result is infinity. A NaN becomes a quiet NaN and keeps its sign.
    """
    _require_dtype("x", x, np.float32)
    result = np.empty(x.shape, np.uint16)
    for rows in _row_chunks(x.shape):
        bits = x[rows].view(np.uint32)
        # Just under half a unit, and the rest if the unit is odd: a tie goes to even.
        rounded = (bits >> 16) & 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        is_nan = np.isnan(x[rows])
        if is_nan.any():
            rounded[is_nan] = (bits[is_nan] >> 16) | 0x40
        result[rows] = rounded
    return result


def unpack_fp4(packed: U8Array, cols: npt.NDArray[np.integer[Any]] | None = None) -> U8Array:
    """E2M1 codes, one a byte, of packed FP4 weights.

    Args:
        packed: ``(R, C/2)`` uint8; the low nibble is the even input index.
        cols: ``(C',)`` indices into the C inputs, in any order; all of them if None.

    Returns:
        ``(R, C')`` uint8, each 0..15.

    Raises:
        ValueError: If ``packed`` is not uint8.
        IndexError: If an index lies outside the C inputs.
    """
    _require_dtype("packed", packed, np.uint8)
    if cols is not None:
        codes = np.take(packed, cols >> 1, axis=-1)
        codes >>= ((cols & 1) << 2).astype(np.uint8)
        codes &= 0x0F
        return codes
    # A byte hl becomes the little-endian word 0x0h0l, which lies in memory as the bytes l, h.
    words = packed.astype("<u2")
    words |= words << 4
    words &= 0x0F0F
    return words.view(np.uint8)


def pack_fp4(codes: U8Array) -> U8Array:
    """Packed FP4 ``(R, C/2)`` uint8 of E2M1 codes ``(R, C)`` uint8: the inverse of `unpack_fp4`.

    Raises:
        ValueError: If C is odd or a code is above 15.
    """
    _require_dtype("codes", codes, np.uint8)
    _require_e2m1(codes)
    if codes.shape[-1] % 2:
        raise ValueError(f"codes have shape {codes.shape}; the last axis must be even")
    return codes[..., 0::2] | np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)


def _require_e2m1(codes: U8Array) -> None:
    largest = codes.max(initial=0)
    if largest > 0x0F:
        raise ValueError(f"codes reach {largest}; an E2M1 code is 0..15, so unpack them first")


@functools.cache
def _product_table(fmt: Literal["e2m1", "e4m3"], out: Output) -> U16Array | F32Array:
    """All products, flat, at index ``scale * len(values) + code``."""
    if out not in ("bf16", "f32"):
        raise ValueError(f"out is {out!r}; it must be 'bf16' or 'f32'")
    values = E2M1_VALUES if fmt == "e2m1" else E4M3_VALUES
    exact = np.multiply.outer(E8M0_VALUES, values, dtype=np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    # The sign of a computed NaN depends on the processor: give it the code's.
    rounded = np.where(np.isnan(rounded), np.copysign(np.float32(np.nan), values), rounded)
    return (f32_to_bf16(rounded) if out == "bf16" else rounded).ravel()


def _look_up(
    table: U16Array | F32Array, codes: U8Array, scales: U8Array, code_bits: int
) -> U16Array | F32Array:
    scales = np.broadcast_to(scales, codes.shape)
    result = np.empty(codes.shape, table.dtype)
    for rows in _row_chunks(codes.shape):
        index = np.left_shift(scales[rows], code_bits, dtype=np.uint16)
        np.bitwise_or(index, codes[rows], out=index)
        # No index can leave the table; a mode other than "raise" skips the check and a copy.
        np.take(table, index, mode="wrap", out=result[rows])
    return result


@overload
def decode_fp4(codes: U8Array, scales: U8Array, out: Literal["bf16"] = ...) -> U16Array: ...
@overload
def decode_fp4(codes: U8Array, scales: U8Array, out: Literal["f32"]) -> F32Array: ...
def decode_fp4(codes: U8Array, scales: U8Array, out: Output = "bf16") -> U16Array | F32Array:
    """Values of E2M1 codes under E8M0 scales; exact up to the overflow to infinity.

    Args:
        codes: ``(R, C')`` uint8, 0..15, as from `unpack_fp4`.
        scales: uint8 E8M0, of a shape that broadcasts to the codes'; 255 makes NaN. For whole
            rows ``(R, C/32, 32)`` codes and ``(R, C/32, 1)`` scales spare a repeated copy.
        out: "bf16" for BF16 bit patterns, "f32" for float32.

    Returns:
        uint16 or float32 of the codes' shape. Only scales of 2^126 and 2^127 can overflow.

    Raises:
        ValueError: For a wrong dtype or shape, a code above 15 or an unknown ``out``.
    """
    _require_dtype("codes", codes, np.uint8)
    _require_dtype("scales", scales, np.uint8)
    _require_e2m1(codes)
    return _look_up(_product_table("e2m1", out), codes, scales, 4)


@overload
def decode_fp8(
    codes: U8Array, scales: U8Array | F32Array, out: Literal["bf16"] = ...
) -> U16Array: ...
@overload
def decode_fp8(codes: U8Array, scales: U8Array | F32Array, out: Literal["f32"]) -> F32Array: ...
def decode_fp8(
    codes: U8Array, scales: U8Array | F32Array, out: Output = "bf16"
) -> U16Array | F32Array:
    """Values of E4M3 codes under block scales that the caller has spread over the elements.

    With E8M0 scales, float32 is exact below the overflow to infinity, and BF16 too except for
    subnormals finer than 2^-133. With float32 scales the product is rounded to float32, then, if
    asked, to BF16.

    Args:
        codes: ``(R, C')`` uint8 E4M3; 0x7f and 0xff are NaN.
        scales: uint8 E8M0 or float32, of a shape that broadcasts to the codes'.
        out: "bf16" for BF16 bit patterns, "f32" for float32.

    Returns:
        uint16 or float32 of the codes' shape.

    Raises:
        ValueError: For a wrong dtype or shape or an unknown ``out``.
    """
    _require_dtype("codes", codes, np.uint8)
    _require_dtype("scales", scales, np.uint8, np.float32)
    table = _product_table("e4m3", out)
    if scales.dtype == np.uint8:
        return _look_up(table, codes, scales.view(np.uint8), 8)
    scales_f32 = np.broadcast_to(scales.view(np.float32), codes.shape)
    result = np.empty(codes.shape, table.dtype)
    for rows in _row_chunks(codes.shape):
        values = np.take(E4M3_VALUES, codes[rows], mode="wrap")
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values *= scales_f32[rows]
        result[rows] = f32_to_bf16(values) if out == "bf16" else values
    return result


@functools.cache
def _encode_table(fmt: Literal["e2m1", "e4m3"]) -> U8Array:
    """The code of each BF16 bit pattern, saturating; for NaN 0x7f and, in E2M1 too, not a code."""
    grid = E2M1_VALUES[:8] if fmt == "e2m1" else E4M3_VALUES[:0x7F]
    halves = (grid[:-1] + grid[1:]) / 2
    magnitudes = bf16_to_f32(np.arange(1 << 15, dtype=np.uint16))
    # The two searches differ exactly on a tie, by one: take whichever is even.
    below = np.searchsorted(halves, magnitudes, side="left")
    above = np.searchsorted(halves, magnitudes, side="right")
    codes = np.where(below % 2 == 0, below, above)
    codes[np.isnan(magnitudes)] = 0x7F
    return np.concatenate([codes, codes | (8 if fmt == "e2m1" else 0x80)]).astype(np.uint8)


def _encode(fmt: Literal["e2m1", "e4m3"], x: F32Array) -> U8Array:
    _require_dtype("x", x, np.float32)
    table = _encode_table(fmt)
    codes = np.empty(x.shape, np.uint8)
    for rows in _row_chunks(x.shape):
        bits = x[rows].view(np.uint32)
        # Round to odd: the last bit remembers whether anything was cut off.
        index = (bits >> 16).astype(np.uint16)
        index |= (bits & 0xFFFF) != 0
        np.take(table, index, mode="wrap", out=codes[rows])
    return codes


def encode_e4m3(x: F32Array) -> U8Array:
    """E4M3 codes of float32 values, of the same shape, rounded to nearest even.

    Beyond +-448, infinity included, they saturate. Zero keeps its sign, and NaN (0x7f) too.
    """
    return _encode("e4m3", x)


def encode_e2m1(x: F32Array) -> U8Array:
    """E2M1 codes (0..15) of float32 values, of the same shape, rounded to nearest even.

    Beyond +-6, infinity included, they saturate. Zero keeps its sign.

    Raises:
        ValueError: If ``x`` holds a NaN: E2M1 has none.
    """
    codes = _encode("e2m1", x)
    if codes.max(initial=0) > 0x0F:
        raise ValueError(f"x holds {int(np.isnan(x).sum())} NaN; E2M1 cannot express NaN")
    return codes


def _finite_magnitudes(x: F32Array) -> F32Array:
    magnitudes = np.abs(x)
    magnitudes[~np.isfinite(magnitudes)] = 0
    return magnitudes


def e8m0_scales(amax: F32Array, limit: float) -> U8Array:
    """E8M0 codes of 2^ceil(log2(amax / limit)), held within 0..254, and of 1 where amax is 0.

    Args:
        amax: Largest magnitudes, float32, finite.
        limit: The largest value of the format.
    """
    limit_mantissa, limit_exponent = math.frexp(limit)
    mantissa, exponent = np.frexp(amax)
    # Both mantissas are in [1/2, 1), so their ratio is in (1/2, 2): its ceil is 0 or 1.
    power = exponent - limit_exponent + (mantissa > limit_mantissa)
    codes = np.clip(power + E8M0_BIAS, 0, E8M0_NAN - 1)
    return np.where(amax == 0, E8M0_BIAS, codes).astype(np.uint8)


def _divide(x: F32Array, scales: F32Array) -> F32Array:
    # Exact for a power of two, where nothing that still counts is lost to a float32 subnormal.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.divide(x, scales)


@overload
def quantize_fp8(x: F32Array, scale_dtype: Literal["F8_E8M0"]) -> tuple[U8Array, U8Array]: ...
@overload
def quantize_fp8(
    x: F32Array, scale_dtype: Literal["F32"], block_scales: F32Array | None = ...
) -> tuple[U8Array, F32Array]: ...
def quantize_fp8(
    x: F32Array, scale_dtype: ScaleDtype, block_scales: F32Array | None = None
) -> tuple[U8Array, U8Array | F32Array]:
    """FP8 codes and 128x128 block scales of a matrix; the last blocks may be partial.

    The largest finite magnitude ``amax`` of a block sets its scale: 2^ceil(log2(amax / 448)) for
    E8M0, held within codes 0..254, or amax / 448 for F32; 1 where amax is 0. Infinities saturate
    and NaN stays NaN. What one E8M0 block or FP4 group holds comes back exactly from an E8M0
    scale, and FP4 groups that share a block too while their scales lie within 2^14 of each other
    (the published converter stops at 2^6), through 1/64 of the largest if that group holds a 6.

    Args:
        x: ``(R, C)`` float32.
        scale_dtype: "F8_E8M0" or "F32".
        block_scales: ``(ceil(R/128), ceil(C/128))`` float32, positive and finite, with "F32"
            only: the scales to use as they are. Values of one parent block under its own scale
            come back exactly.

    Returns:
        Codes ``(R, C)`` uint8, and scales ``(ceil(R/128), ceil(C/128))`` uint8 or float32.

    Raises:
        ValueError: For a wrong dtype or shape, or block scales that cannot be used.
    """
    _require_dtype("x", x, np.float32)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; it must be a matrix")
    num_rows, num_cols = x.shape
    grid = -(-num_rows // FP8_BLOCK), -(-num_cols // FP8_BLOCK)
    _require_scales(scale_dtype, block_scales, grid)
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty(grid, np.uint8 if scale_dtype == "F8_E8M0" else np.float32)
    starts = np.arange(0, num_cols, FP8_BLOCK)
    for block, start in enumerate(range(0, num_rows, FP8_BLOCK)):
        rows = x[start : start + FP8_BLOCK]
        if block_scales is not None:
            scales[block] = block_scales[block]
        else:
            amax = np.maximum.reduceat(_finite_magnitudes(rows).max(axis=0), starts)
            scales[block] = _block_scales(amax, scale_dtype)
        divisors = E8M0_VALUES[scales[block]] if scale_dtype == "F8_E8M0" else scales[block]
        codes[start : start + FP8_BLOCK] = encode_e4m3(
            _divide(rows, np.repeat(divisors, FP8_BLOCK)[:num_cols])
        )
    return codes, scales


def _require_scales(
    scale_dtype: ScaleDtype, block_scales: F32Array | None, grid: tuple[int, int]
) -> None:
    if scale_dtype not in ("F8_E8M0", "F32"):
        raise ValueError(f"scale_dtype is {scale_dtype!r}; it must be 'F8_E8M0' or 'F32'")
    if block_scales is None:
        return
    if scale_dtype != "F32":
        raise ValueError("block_scales are float32; they need scale_dtype 'F32'")
    _require_dtype("block_scales", block_scales, np.float32)
    if block_scales.shape != grid:
        raise ValueError(f"block_scales have shape {block_scales.shape}; x needs {grid}")
    if not (np.isfinite(block_scales) & (block_scales > 0)).all():
        raise ValueError("block_scales hold a value that is not positive and finite")


def _block_scales(amax: F32Array, scale_dtype: ScaleDtype) -> U8Array | F32Array:
    if scale_dtype == "F8_E8M0":
        return e8m0_scales(amax, E4M3_MAX)
    scales = _divide(amax, np.array(E4M3_MAX, np.float32))
    # A subnormal amax underflows here; its block is as good as zero.
    scales[scales == 0] = 1
    return scales


def quantize_fp4(x: F32Array) -> tuple[U8Array, U8Array]:
    """Packed FP4 weights and E8M0 scales of a matrix, one scale for 32 values along a row.

    The scale is 2^ceil(log2(amax / 6)) for the largest finite magnitude ``amax`` of the group,
    1 for a group of zeros. Infinities saturate. Values of one FP4 group come back exactly.

    Args:
        x: ``(R, C)`` float32, C a multiple of 32.

    Returns:
        Packed codes ``(R, C/2)`` uint8 and scales ``(R, C/32)`` uint8 E8M0.

    Raises:
        ValueError: For a wrong dtype or shape, or a NaN.
    """
    _require_dtype("x", x, np.float32)
    if x.ndim != 2 or x.shape[1] % FP4_GROUP:
        raise ValueError(f"x has shape {x.shape}; it must be (R, C) with C a multiple of 32")
    num_rows, num_cols = x.shape
    groups = x.reshape(num_rows, num_cols // FP4_GROUP, FP4_GROUP)
    packed = np.empty((*groups.shape[:2], FP4_GROUP // 2), np.uint8)
    scales = np.empty(groups.shape[:2], np.uint8)
    for rows in _row_chunks(x.shape):
        amax = _finite_magnitudes(groups[rows]).max(axis=-1)
        scales[rows] = e8m0_scales(amax, E2M1_MAX)
        scaled = _divide(groups[rows], E8M0_VALUES[scales[rows]][..., None])
        packed[rows] = pack_fp4(encode_e2m1(scaled))
    return packed.reshape(num_rows, num_cols // 2), scales


@dataclass(frozen=True)
class ErrorStats:
    """How far decoded values lie from the original ones; ``+`` merges, ``ErrorStats()`` is zero.

    Attributes:
        count: Elements compared: those finite on both sides. -0 equals 0.
        num_changed: Compared elements that differ.
        max_abs: Largest absolute difference.
        sum_sq_err: Sum of squared differences.
        sum_sq: Sum of squared original values.
        num_nonfinite: Elements left out, NaN or infinite on either side.
    """

    count: int = 0
    num_changed: int = 0
    max_abs: float = 0.0
    sum_sq_err: float = 0.0
    sum_sq: float = 0.0
    num_nonfinite: int = 0

    def __add__(self, other: ErrorStats) -> ErrorStats:
        return ErrorStats(
            self.count + other.count,
            self.num_changed + other.num_changed,
            max(self.max_abs, other.max_abs),
            self.sum_sq_err + other.sum_sq_err,
            self.sum_sq + other.sum_sq,
            self.num_nonfinite + other.num_nonfinite,
        )

    @property
    def lossless(self) -> bool:
        """Whether every element was compared and none changed."""
        return self.num_changed == 0 and self.num_nonfinite == 0

    @property
    def relative_rms(self) -> float:
        """Root of squared error over squared original; 0 without error, inf over zeros."""
        if self.sum_sq_err == 0:
            return 0.0
        return math.sqrt(self.sum_sq_err / self.sum_sq) if self.sum_sq else math.inf


def quantized_error(original: F32Array, decoded: F32Array) -> ErrorStats:
    """Error of ``decoded`` against ``original``, two float32 arrays of one shape, in float64.

    Raises:
        ValueError: For a wrong dtype or different shapes.
    """
    _require_dtype("original", original, np.float32)
    _require_dtype("decoded", decoded, np.float32)
    if original.shape != decoded.shape:
        raise ValueError(f"original has shape {original.shape}, decoded {decoded.shape}")
    return sum(
        (_chunk_error(original[rows], decoded[rows]) for rows in _row_chunks(original.shape)),
        ErrorStats(),
    )


def _chunk_error(original: F32Array, decoded: F32Array) -> ErrorStats:
    finite = np.isfinite(original) & np.isfinite(decoded)
    left = original[finite].astype(np.float64)
    error = np.abs(left - decoded[finite])
    return ErrorStats(
        count=left.size,
        num_changed=int(np.count_nonzero(error)),
        max_abs=float(error.max(initial=0.0)),
        sum_sq_err=float(np.sum(np.square(error))),
        sum_sq=float(np.sum(np.square(left))),
        num_nonfinite=original.size - left.size,
    )
