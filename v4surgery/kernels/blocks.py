"""What the weight quantizers share: exact scales, and a program for each block of 128x128."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.codes import E4M3_MAX, FP8_BLOCK, float_to_e4m3
from v4surgery.kernels.launch import require_dtype, require_same_device

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x):
    """Bits of float32 without their sign, int32: in order, infinity at INFINITY_BITS, NaN above."""
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32, bitcast=True)


@triton.jit
def finite_magnitude_bits(x):
    """The same; 0 for infinity and NaN."""
    magnitude = magnitude_bits(x)
    return tl.where(magnitude < INFINITY_BITS, magnitude, 0)


@triton.jit
def scale_byte(amax, LIMIT: tl.constexpr):
    """E8M0 byte, int32, of 2^ceil(log2(amax / LIMIT)), 1 for 0, of the bits of finite amax.

    LIMIT is 448 = 1.75 * 2^8 or 6 = 1.5 * 2^2: the exponent is the difference of the exponents,
    and one more for a mantissa above LIMIT's. The byte never passes 253.
    """
    EXPONENT: tl.constexpr = 8 if LIMIT == 448.0 else 2
    MANTISSA: tl.constexpr = 0x600000 if LIMIT == 448.0 else 0x400000
    byte = (amax >> 23) - EXPONENT + tl.where((amax & 0x7FFFFF) > MANTISSA, 1, 0)
    return tl.where(amax == 0, 127, tl.maximum(byte, 0))


@triton.jit
def encode_e4m3(x, NATIVE_FP8: tl.constexpr):
    """E4M3 codes of any float32: infinity saturates, NaN is 0x7f."""
    if NATIVE_FP8:
        code = float_to_e4m3(x, NATIVE_FP8)
    else:
        code = float_to_e4m3(tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX), NATIVE_FP8)
        code = tl.where(x != x, 0x7F, code).to(tl.uint8)
    return code


@triton.jit
def find_block(num_rows, num_cols, BLOCK_N: tl.constexpr):
    """Number of this program's block among all, its first row, and its first element, int64."""
    number = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    first_row = tl.program_id(1) * FP8_BLOCK
    start = tl.program_id(2).to(tl.int64) * num_rows + first_row
    start = start * num_cols + tl.program_id(0) * BLOCK_N
    return number * tl.num_programs(0) + tl.program_id(0), first_row, start


def new_blocks(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized value for each block of matrices of ``shape``."""
    grid = (triton.cdiv(size, FP8_BLOCK.value) for size in shape[-2:])
    return torch.empty((*shape[:-2], *grid), dtype=dtype, device=device)


def block_grid(blocks: Tensor) -> tuple[int, int, int]:
    """A program for each block, the blocks of a row next to each other."""
    return blocks.shape[-1], blocks.shape[-2], blocks.shape[0] if blocks.ndim == 3 else 1


def require_matrices(operation: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse what is no matrix or stack of matrices of one of the dtypes.

    Raises:
        UsageError: What it is and what it must be.
    """
    require_same_device(operation, tensor)
    require_dtype(operation, name, tensor, *dtypes)
    if tensor.ndim not in (2, 3):
        raise UsageError(
            f"{name} has the wrong shape",
            where=operation,
            value=tuple(tensor.shape),
            rule="a matrix or a stack of them",
        )
