"""Device functions that decode and encode the number formats, shared by the kernels.

They work on bits, so they are exact and the same on every GPU: below sm_89 Triton has no E4M3
type. A code's exponent and mantissa are moved to their place in float32 and the difference of the
biases is multiplied in, which serves normal and subnormal codes alike.

Exact: every decoding; ``widen``; ``scale_exponent``. Rounded, to nearest even: every encoding,
``round_to_e2m1`` and ``narrow``. The interpreter's own conversions truncate to bf16 and lose bf16
subnormals, so bits are moved there, too.
Source: spec/checkpoint.md, "Number formats"; OCP Microscaling Formats (MX) v1.0, section 5.3.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

FP4_GROUP = tl.constexpr(32)
FP8_BLOCK = tl.constexpr(128)
E4M3_MAX = tl.constexpr(448.0)
E2M1_MAX = tl.constexpr(6.0)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
TWO_22 = tl.constexpr(2.0**22)
TWO_120 = tl.constexpr(2.0**120)  # float32's bias 127 less E4M3's 7
TWO_126 = tl.constexpr(2.0**126)  # float32's bias 127 less E2M1's 1


@triton.jit
def e4m3_to_float(code, NATIVE: tl.constexpr = False):
    """float32 of E4M3 codes (uint8, without NATIVE any integer type); 0x7f and 0xff are NaN.

    NATIVE uses the conversion of sm_89 and later.
    """
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:  # noqa: RET505  (a traced return does not end the function)
        # The code at the top, then an arithmetic shift: the sign stays, the rest goes to its place.
        top = (code.to(tl.uint32) << 24).to(tl.int32, bitcast=True)
        bits = (top >> 4).to(tl.uint32, bitcast=True) & 0x87F00000
        value = bits.to(tl.float32, bitcast=True) * TWO_120
        return tl.where(tl.abs(value) == 480.0, float("nan"), value)


@triton.jit
def e2m1_to_float(code):
    """float32 of E2M1 codes in the low four bits of any integer type; the rest is ignored."""
    top = (code.to(tl.uint32) << 28).to(tl.int32, bitcast=True)
    bits = (top >> 6).to(tl.uint32, bitcast=True) & 0x81C00000
    return bits.to(tl.float32, bitcast=True) * TWO_126


@triton.jit
def e8m0_to_float(code):
    """float32 of E8M0 bytes: 2^(code - 127); 0 is the subnormal 2^-127, 255 is NaN."""
    bits = code.to(tl.uint32)
    pattern = tl.maximum(bits << 23, 0x400000)
    return tl.where(bits == 255, 0x7FC00000, pattern).to(tl.float32, bitcast=True)


@triton.jit
def scale_exponent(amax, LIMIT: tl.constexpr):
    """ceil(log2(amax / LIMIT)) of normal float32, int32, for amax / LIMIT as float32 rounds it."""
    bits = (amax * (1.0 / LIMIT)).to(tl.uint32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF).to(tl.int32) - 127
    return exponent + tl.where((bits & 0x7FFFFF) != 0, 1, 0)


@triton.jit
def power_of_two(exponent):
    """float32 2^exponent, for exponents from -126 to 127."""
    return ((exponent + 127).to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def float_to_e4m3(x, NATIVE: tl.constexpr):
    """E4M3 codes, uint8, of float32 within +-448, to nearest even; NaN stays NaN.

    NATIVE uses the conversion of sm_89 and later.
    """
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # In [2^14, 2^15) float32 steps by 2^-9, the step of E4M3's subnormals: adding rounds to it.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def round_to_e2m1(x):
    """float32 within +-6 to the nearest value of E2M1, ties to the even code; -0 stays."""
    bits = x.to(tl.uint32, bitcast=True)
    # From 2^22 float32 steps by 1/2, E2M1's step below 2; both steps double at 2 and at 4.
    power = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 1.0)
    magnitude = (tl.abs(x) + power * TWO_22) - power * TWO_22
    rounded = magnitude.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def float_to_e2m1(x):
    """E2M1 codes, uint8 below 16, of float32 within +-6, to nearest even."""
    bits = (round_to_e2m1(x) * (1.0 / TWO_126)).to(tl.uint32, bitcast=True)
    return ((bits << 1 >> 23) | ((bits >> 28) & 8)).to(tl.uint8)


@triton.jit
def widen(x):
    """float32 of bf16 or float32."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  (a traced return does not end the function)
        return x


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 as DTYPE, to nearest even."""
    if DTYPE.is_bf16() and INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505  (a traced return does not end the function)
        return x.to(DTYPE)
