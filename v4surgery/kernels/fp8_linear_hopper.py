"""fp8_linear of many tokens on Hopper, whose tensor cores multiply what lies in shared memory.

A program stays on its multiprocessor and takes one tile of 128 tokens and 128 * HALVES outputs
after another. Its warps have roles. One warp copies codes (TMA) into a ring of STAGES slots, a
slot for one group of 128 inputs. Two warpgroups own 64 tokens of the tile each: for every group
and 128 outputs they multiply into a partial sum, 64 registers a thread, and add it, scaled, to the
total. While one of them adds, the other's product keeps the tensor cores busy.

The formula, what is exact and what rounds are those of fp8_linear; inside one product of 128 the
tensor cores keep about 14 bits of the sum. Written in Gluon, Triton's language beneath its own
choice of layouts and pipelines: that one adds between two products and spills registers.
Source: DeepSeek-V3 report, section 3.3.2; CUDA PTX ISA, "Asynchronous warpgroup level matrix
instructions"; Triton's Gluon tutorials 5 and 8.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from v4surgery.kernels.codes import e8m0_to_float

# Gluon is young: 3.5 specializes warps otherwise; 3.6 has only the second names, 3.9 the first.
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
FIRST_TRITON = (3, 6)
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK = gl.constexpr(128)
ROWS = gl.constexpr(64)  # tokens of a warpgroup
SUM = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
)
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
OUTPUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# A thread has 168 registers; the warpgroup that copies gives most of its own to the other two.
REGISTERS = 168
MATH_REGISTERS, COPY_REGISTERS = gl.constexpr(240), gl.constexpr(24)
STAGES = 4
GROUP_M = 8
NARROW_COST = 1.1  # tiles of 128 outputs read each token's codes twice as often


@gluon.jit
def find_tile(tile, num_m, num_n, HALVES: gl.constexpr, GROUP_M: gl.constexpr):
    """First token and first output of a tile; tiles near in time share both in the cache."""
    width = GROUP_M * num_n
    first = tile // width * GROUP_M
    size = gl.minimum(num_m - first, GROUP_M)
    return (first + tile % width % size) * BLOCK, tile % width // size * BLOCK * HALVES


@gluon.jit
def copy_codes(given, HALVES: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr):
    """The warp that copies: 2 x (64, 128) of x and HALVES x (128, 128) of the weight a slot."""
    descs, _, slots, signals, sizes = given
    x_desc, weight_desc, _ = descs
    x_slots, weight_slots, _ = slots
    is_full, is_empty = signals
    _, num_m, num_n, num_groups, _ = sizes
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m0, n0 = find_tile(tile, num_m, num_n, HALVES, GROUP_M)
        for group in range(num_groups):
            slot = step % STAGES
            # A new barrier counts as one whose phase 1 is over: the first wait passes.
            mbarrier.wait(is_empty.index(slot), (step // STAGES & 1) ^ 1)
            full = is_full.index(slot)
            mbarrier.expect(full, (1 + HALVES) * BLOCK * BLOCK)
            for part in gl.static_range(2):
                target = x_slots.index(slot * 2 + part)
                copy_in(x_desc, [m0 + part * ROWS, group * BLOCK], full, target)
            for half in gl.static_range(HALVES):
                target = weight_slots.index(slot * HALVES + half)
                copy_in(weight_desc, [n0 + half * BLOCK, group * BLOCK], full, target)
            step += 1


@gluon.jit
def add_product(total, partial, x, weight, factor, never):
    """Total + factor * x weight^T, and the registers of the partial sum for the next product.

    Each product starts from zero, yet takes the last one's registers, and the total is waited for:
    otherwise the compiler holds two partial sums at once, and registers spill.
    """
    partial = warpgroup_mma(x, weight, partial, use_acc=never, is_async=True)
    partial = warpgroup_mma_wait(0, deps=[partial])
    factor, partial = gl.broadcast(factor[:, None], partial)
    total = gl.fma(partial, factor, total)
    return warpgroup_mma_wait(0, deps=[total]), partial


@gluon.jit
def store_total(y_desc, y_slot, row, col, total):
    """Round to bf16 and copy out (TMA), once the slot's last content has left it."""
    tma.store_wait(0)
    y_slot.store(total.to(gl.bfloat16))
    fence_async_shared()
    copy_out(y_desc, [row, col], y_slot)


@gluon.jit
def add_groups(
    given,
    PART: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_BYTES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """A warpgroup that multiplies: tokens PART * 64 to PART * 64 + 63 of every tile."""
    descs, scales, slots, signals, sizes = given
    x_scale_ptr, scale_ptr, stride_xsm, stride_sn = scales
    x_slots, weight_slots, y_slots = slots
    is_full, is_empty = signals
    num_rows, num_m, num_n, num_groups, num_blocks = sizes
    y_slot = y_slots.index(PART)
    never = num_rows < 0  # unknown to the compiler, which would drop the registers
    partial = gl.zeros([ROWS, BLOCK], gl.float32, SUM)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m0, n0 = find_tile(tile, num_m, num_n, HALVES, GROUP_M)
        m0 += PART * ROWS
        rows = gl.minimum(m0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUM)), num_rows - 1)
        x_scale_ptrs = x_scale_ptr + rows.to(gl.int64) * stride_xsm
        scale_ptr0 = scale_ptr + n0 // BLOCK * stride_sn
        scale_ptr1 = scale_ptr + gl.minimum(n0 // BLOCK + 1, num_blocks - 1) * stride_sn
        total0 = gl.zeros([ROWS, BLOCK], gl.float32, SUM)
        total1 = gl.zeros([ROWS, BLOCK], gl.float32, SUM)
        x_code, code0, code1 = gl.load(x_scale_ptrs), gl.load(scale_ptr0), gl.load(scale_ptr1)
        for group in range(num_groups):
            slot = step % STAGES
            if HAS_BYTES:
                scale0, scale1 = e8m0_to_float(code0), e8m0_to_float(code1)
            else:
                scale0, scale1 = code0, code1
            x_scale = e8m0_to_float(x_code)
            # The next group's scales are on their way while this one is multiplied.
            ahead = gl.minimum(group + 1, num_groups - 1)
            x_code = gl.load(x_scale_ptrs + ahead)
            code0, code1 = gl.load(scale_ptr0 + ahead), gl.load(scale_ptr1 + ahead)
            mbarrier.wait(is_full.index(slot), step // STAGES & 1)
            x = x_slots.index(slot * 2 + PART)
            weight = weight_slots.index(slot * HALVES).permute((1, 0))
            total0, partial = add_product(total0, partial, x, weight, x_scale * scale0, never)
            if HALVES == 2:
                weight = weight_slots.index(slot * HALVES + 1).permute((1, 0))
                total1, partial = add_product(total1, partial, x, weight, x_scale * scale1, never)
            mbarrier.arrive(is_empty.index(slot), count=1)
            step += 1
        store_total(descs[2], y_slot, m0, n0, total0)
        if HALVES == 2:
            store_total(descs[2], y_slot, m0, n0 + BLOCK, total1)
    tma.store_wait(0)


@gluon.jit
def fp8_linear_hopper_kernel(
    x_desc,
    x_scale_ptr,
    weight_desc,
    scale_ptr,
    y_desc,
    num_rows,
    num_out,
    num_groups,
    stride_xsm,
    stride_sn,
    HALVES: gl.constexpr,
    HAS_BYTES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    x_slots = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, BLOCK], x_desc.layout)
    weight_slots = gl.allocate_shared_memory(
        gl.float8e4nv, [HALVES * STAGES, BLOCK, BLOCK], weight_desc.layout
    )
    y_slots = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, BLOCK], y_desc.layout)
    is_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    is_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(is_full.index(slot), count=1)
        mbarrier.init(is_empty.index(slot), count=2)
    descs = (x_desc, weight_desc, y_desc)
    scales = (x_scale_ptr, scale_ptr, stride_xsm, stride_sn)
    slots = (x_slots, weight_slots, y_slots)
    signals = (is_full, is_empty)
    num_m, num_n = gl.cdiv(num_rows, BLOCK), gl.cdiv(num_out, BLOCK * HALVES)
    sizes = (num_rows, num_m, num_n, num_groups, gl.cdiv(num_out, BLOCK))
    given = (descs, scales, slots, signals, sizes)
    gl.warp_specialize(
        [
            (add_groups, (given, 0, HALVES, HAS_BYTES, STAGES, GROUP_M)),
            (add_groups, (given, 1, HALVES, HAS_BYTES, STAGES, GROUP_M)),
            (copy_codes, (given, HALVES, STAGES, GROUP_M)),
        ],
        [4, 1],
        [MATH_REGISTERS, COPY_REGISTERS],
    )


def can_multiply(codes: Tensor, weight: Tensor) -> bool:
    """Whether rows of codes and of the output start at multiples of 16 bytes, as TMA needs."""
    is_aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in (codes, weight))
    return TRITON >= FIRST_TRITON and is_aligned and weight.shape[0] % 8 == 0


@lru_cache(maxsize=16)
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # compiled, not run
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_halves(num_rows: int, num_out: int, num_programs: int) -> int:
    """1 where tiles half as wide leave fewer multiprocessors idle, else 2."""
    tiles = [math.ceil(num_rows / 128) * math.ceil(num_out / (128 * n)) for n in (1, 2)]
    narrow, wide = (math.ceil(count / num_programs) for count in tiles)
    return 1 if narrow * NARROW_COST < wide * 2 else 2


def multiply(y: Tensor, codes: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Fill ``y``.

    Args:
        y: bf16 ``(rows, out)``, contiguous.
        codes: E4M3 codes, uint8 ``(rows, in)``, with :func:`can_multiply`.
        x_scale: E8M0 bytes, uint8 ``(rows, ceil(in/128))``.
        weight: E4M3 codes, uint8 ``(out, in)``.
        scale: E8M0 bytes or float32 ``(ceil(out/128), ceil(in/128))``.
    """
    num_rows, num_out = y.shape
    halves = choose_halves(num_rows, num_out, num_multiprocessors(y.device))
    multiply_tiles(y, codes, x_scale, weight, scale, halves, STAGES, GROUP_M)


def multiply_tiles(
    y: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    halves: int,
    stages: int,
    group_m: int,
) -> None:
    """Fill ``y`` with tiles of a chosen kind."""
    num_rows, num_out = y.shape
    num_tiles = math.ceil(num_rows / 128) * math.ceil(num_out / (128 * halves))
    fp8_linear_hopper_kernel[(min(num_tiles, num_multiprocessors(y.device)),)](
        TensorDescriptor.from_tensor(codes.view(torch.float8_e4m3fn), [64, 128], CODES),
        x_scale,
        TensorDescriptor.from_tensor(weight.view(torch.float8_e4m3fn), [128, 128], CODES),
        scale,
        TensorDescriptor.from_tensor(y, [64, 128], OUTPUT),
        num_rows,
        num_out,
        scale.shape[1],
        x_scale.stride(0),
        scale.stride(0),
        HALVES=halves,
        HAS_BYTES=scale.dtype == torch.uint8,
        STAGES=stages,
        GROUP_M=group_m,
        num_warps=4,
        maxnreg=REGISTERS,
    )
