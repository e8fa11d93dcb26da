"""Store FP4 weights (E2M1, groups of 32) as FP8 (E4M3, blocks of 128x128), and count what changes.

    value = e2m1(code) * 2^(scale - 127)
    block scale = 2^ceil(log2(amax / 448)), the smallest that holds amax; 1 where amax is zero
    code  = e4m3(value / block scale)

amax is the largest finite value; what overflows float32 saturates, and NaN (scale byte 255) becomes
0x7f. A program owns one block; a byte of two FP4 codes becomes one 16-bit word of two FP8 codes in
a register.

Exact: while the scales in a block lie within 2^14 of each other. Rounded, to nearest even, and
counted: the others. Source: spec/checkpoint.md, "Number formats".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.blocks import (
    INFINITY_BITS,
    block_grid,
    encode_e4m3,
    find_block,
    finite_magnitude_bits,
    magnitude_bits,
    new_blocks,
    require_matrices,
    scale_byte,
)
from v4surgery.kernels.codes import (
    E4M3_MAX,
    FP4_GROUP,
    FP8_BLOCK,
    e2m1_to_float,
    e4m3_to_float,
    e8m0_to_float,
    power_of_two,
)
from v4surgery.kernels.launch import has_fp8, require_dtype, require_same_device, require_shape

GROUP_BYTES = tl.constexpr(16)
BLOCK_GROUPS = tl.constexpr(4)  # across a block

NUM_WARPS = 16


@triton.jit
def _decode_pair(byte, scale):
    return e2m1_to_float(byte) * scale, e2m1_to_float(byte >> 4) * scale


@triton.jit
def _encode_pair(byte, scale, block_byte, NATIVE_FP8: tl.constexpr):
    """Both values over the block's scale, and their E4M3 codes.

    The scales are applied one after the other, so that 0 under a huge scale stays 0.
    """
    low, high = _decode_pair(byte, scale)
    low, high = low * power_of_two(127 - block_byte), high * power_of_two(127 - block_byte)
    return low, high, encode_e4m3(low, NATIVE_FP8), encode_e4m3(high, NATIVE_FP8)


@triton.jit
def _count_changed(value, code, nibble, NATIVE_FP8: tl.constexpr):
    """How many values are not their E4M3 code's, or were so small that scaling made them 0."""
    changed = (e4m3_to_float(code, NATIVE_FP8) != value) & (value == value)
    changed |= (value == 0.0) & ((nibble & 7) != 0)
    return tl.sum(changed.to(tl.int32))


@triton.jit
def _fp4_to_fp8_kernel(
    codes_ptr,
    block_scale_ptr,
    changed_ptr,
    weight_ptr,
    scale_ptr,
    num_rows,
    num_groups,
    NATIVE_FP8: tl.constexpr,
):
    block, first_row, start = find_block(num_rows, num_groups, BLOCK_GROUPS)
    row, group = tl.arange(0, FP8_BLOCK)[:, None], tl.arange(0, BLOCK_GROUPS)[None, :]
    mask = (row < num_rows - first_row) & (group < num_groups - tl.program_id(0) * BLOCK_GROUPS)
    index = row * num_groups + group
    stored = tl.load(scale_ptr + start + index, mask=mask, other=0).to(tl.int32)
    scale = e8m0_to_float(stored)
    weight_ptr += start * GROUP_BYTES
    codes_ptr += start * GROUP_BYTES * 2
    mask = mask[:, :, None]
    index = index[:, :, None] * GROUP_BYTES + tl.arange(0, GROUP_BYTES)[None, None, :]
    index = tl.max_contiguous(index, [1, 1, 8])
    byte = tl.load(weight_ptr + index, mask=mask, other=0).to(tl.int32)

    # E2M1 codes without sign are in the order of their values: one a group is decoded.
    largest = tl.max(tl.maximum(byte & 7, (byte >> 4) & 7), 2)
    amax = tl.max(magnitude_bits(e2m1_to_float(largest) * scale))
    is_special = amax >= INFINITY_BITS
    if is_special:
        # Read again, as below: common blocks then need no registers for this.
        special = tl.load(weight_ptr + index, mask=mask, other=0, volatile=True).to(tl.int32)
        low, high = _decode_pair(special, scale[:, :, None])
        amax = tl.max(tl.maximum(finite_magnitude_bits(low), finite_magnitude_bits(high)))
    block_byte = scale_byte(amax, E4M3_MAX)
    tl.store(block_scale_ptr + block, block_byte.to(tl.uint8))

    _, _, low_code, high_code = _encode_pair(byte, scale[:, :, None], block_byte, NATIVE_FP8)
    # As bytes: put together as 16-bit words, every second low code of the native conversion was 0
    # on an H100 (ptxas 12.8).
    both = tl.reshape(tl.join(low_code, high_code), (FP8_BLOCK, BLOCK_GROUPS, FP4_GROUP))
    place = (row * num_groups + group)[:, :, None] * FP4_GROUP
    place = place + tl.arange(0, FP4_GROUP)[None, None, :]
    tl.store(codes_ptr + tl.max_contiguous(place, [1, 1, 16]), both, mask=mask)
    # Values are multiples of half their scale, and E4M3's steps are 2^-9: only scales below 2^-8
    # of the block's can change a value.
    smallest = tl.min(tl.where(largest > 0, stored, 255))
    num_changed = tl.full((), 0, tl.int32)
    if is_special | (smallest < block_byte - 8):
        byte = tl.load(weight_ptr + index, mask=mask, other=0, volatile=True).to(tl.int32)
        low, high, low_code, high_code = _encode_pair(
            byte, scale[:, :, None], block_byte, NATIVE_FP8
        )
        num_changed = _count_changed(low, low_code, byte, NATIVE_FP8)
        num_changed += _count_changed(high, high_code, byte >> 4, NATIVE_FP8)
    tl.store(changed_ptr + block, num_changed.to(tl.int64))


def fp4_to_fp8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store FP4 as FP8, without loss where the scales of a block lie within 2^14 of each other.

    Args:
        weight: Two E2M1 codes a byte, uint8 ``(R, C/2)``, or a stack ``(E, R, C/2)``.
        scale: E8M0 bytes, uint8 ``(R, C/32)``, under the stack's axis.

    Returns:
        E4M3 codes, uint8 ``(R, C)``; E8M0 bytes, uint8 ``(ceil(R/128), ceil(C/128))``; how many
        values of each block changed, int64 of the same shape. All under the stack's axis.

    Raises:
        UsageError: A wrong dtype, shape or device.
    """
    require_matrices("fp4_to_fp8", "weight", weight, torch.uint8)
    require_same_device("fp4_to_fp8", weight, scale)
    require_dtype("fp4_to_fp8", "scale", scale, torch.uint8)
    *rows, num_groups = scale.shape
    require_shape("fp4_to_fp8", "weight", weight, (*rows, num_groups * GROUP_BYTES.value))
    shape = (*rows, num_groups * FP4_GROUP.value)
    codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    block_scale = new_blocks(shape, torch.uint8, weight.device)
    changed = new_blocks(shape, torch.int64, weight.device)
    if codes.numel():
        _fp4_to_fp8_kernel[block_grid(block_scale)](
            codes, block_scale, changed, weight.contiguous(),
            scale.contiguous(), rows[-1], num_groups, has_fp8(weight.device),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return codes, block_scale, changed
