"""Which rows each expert multiplies: a stable counting sort of routed slots, cut into tiles.

A slot is t * K + k, the k-th expert of token t. Sorted by expert they are the rows that the
products run over: expert e owns rows starts[e] to ends[e], and a tile is up to BLOCK_T of them.
The number of tiles is known on the GPU only; the table has room for the most there can be,
N / BLOCK_T + min(E, N), and its surplus says expert -1.

sort_slots: a program owns one expert. It counts the slots of experts below it and writes its own,
in order, so that nothing depends on timing. map_tiles: one program, one lane an expert.
Exact: everything is an integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels.act_quant import AMAX_FLOOR, group_exponent
from v4surgery.kernels.codes import (
    E4M3_MAX,
    e4m3_to_float,
    float_to_e4m3,
    narrow,
    power_of_two,
    widen,
)
from v4surgery.kernels.launch import has_fp8

BLOCK = 2048
TILE_COLUMNS = tl.constexpr(3)


@dataclass(frozen=True)
class SortedSlots:
    """Slots in the order of their experts.

    Attributes:
        slots: int32 ``(N,)``, rows to slots.
        tiles: int32 ``(num_tiles, 3)``: expert or -1, first row, end of the expert's rows.
        tile_rows: Most rows of a tile.
        per_token: K.
    """

    slots: Tensor
    tiles: Tensor
    tile_rows: int
    per_token: int


@triton.jit
def sort_slots_kernel(
    slots_ptr, bounds_ptr, experts_ptr, num_slots, num_experts, BLOCK: tl.constexpr
):
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, num_slots, BLOCK):
        slots = begin + lanes
        keys = tl.load(experts_ptr + slots, mask=slots < num_slots, other=num_experts)
        below += (keys < expert).to(tl.int32)
    row = tl.sum(below, 0)
    tl.store(bounds_ptr + expert, row)
    for begin in range(0, num_slots, BLOCK):
        slots = begin + lanes
        keys = tl.load(experts_ptr + slots, mask=slots < num_slots, other=num_experts)
        is_mine = keys == expert
        rank = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(slots_ptr + row + rank - 1, slots, mask=is_mine)
        row += tl.sum(is_mine.to(tl.int32), 0)
    tl.store(bounds_ptr + num_experts + expert, row)


@triton.jit
def map_tiles_kernel(
    tiles_ptr,
    bounds_ptr,
    addresses_ptr,
    num_experts,
    num_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    experts = tl.arange(0, BLOCK_E)
    exists = experts < num_experts
    start = tl.load(bounds_ptr + experts, mask=exists, other=0)
    end = tl.load(bounds_ptr + num_experts + experts, mask=exists, other=0)
    is_present = tl.load(addresses_ptr + experts, mask=exists, other=0) != 0
    count = tl.where(is_present, (end - start + BLOCK_T - 1) // BLOCK_T, 0)
    first = tl.cumsum(count, 0) - count
    for tile in range(tl.max(count, 0)):
        target = tiles_ptr + (first + tile) * TILE_COLUMNS
        mask = tile < count
        tl.store(target, experts, mask=mask)
        tl.store(target + 1, start + tile * BLOCK_T, mask=mask)
        tl.store(target + 2, end, mask=mask)
    for tile in range(tl.sum(count, 0), num_tiles, BLOCK_E):
        surplus = tile + experts
        mask = surplus < num_tiles
        tl.store(tiles_ptr + surplus * TILE_COLUMNS, tl.full((BLOCK_E,), -1, tl.int32), mask=mask)


def sort_slots(indices: Tensor, addresses: Tensor, tile_rows: int) -> SortedSlots:
    """Sort the slots of experts that are in memory, and of the others behind no tile.

    Args:
        indices: int64 ``(T, K)``, contiguous.
        addresses: int64 ``(E,)``; 0 for an expert that is not in memory.
        tile_rows: Most rows of a tile, a power of two.
    """
    num_slots, num_experts = indices.numel(), len(addresses)
    num_tiles = num_slots // tile_rows + min(num_experts, num_slots)
    # Zeros, so that rows of an expert that does not exist lead nowhere wrong.
    slots = torch.zeros(num_slots, dtype=torch.int32, device=indices.device)
    bounds = torch.empty(2, num_experts, dtype=torch.int32, device=indices.device)
    tiles = torch.empty(num_tiles, TILE_COLUMNS.value, dtype=torch.int32, device=indices.device)
    block = min(BLOCK, triton.next_power_of_2(num_slots))
    sort_slots_kernel[(num_experts,)](
        slots, bounds, indices, num_slots, num_experts, BLOCK=block, num_warps=4
    )
    map_tiles_kernel[(1,)](
        tiles, bounds, addresses, num_experts, num_tiles,
        BLOCK_T=tile_rows, BLOCK_E=triton.next_power_of_2(num_experts), num_warps=4,
    )  # fmt: skip
    return SortedSlots(slots, tiles, tile_rows, indices.shape[1])


@triton.jit
def permute_rows_kernel(
    y_ptr, x_ptr, num_cols, stride_xm, QUANTIZE: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, 128)[None, :]
    high = ((place >> 1 & 3) << 5) | ((place >> 5 & 3) << 3) | ((place & 1) << 2)
    col = high | ((place >> 4 & 1) << 1) | (place >> 3 & 1)
    start = (tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]) * 128
    mask = start + col < num_cols
    row = tl.program_id(0).to(tl.int64)
    x = widen(tl.load(x_ptr + row * stride_xm + start + col, mask=mask, other=0.0))
    if QUANTIZE:
        exponent, is_finite = group_exponent(x, E4M3_MAX, AMAX_FLOOR)
        code = float_to_e4m3(x * power_of_two(-exponent), NATIVE_FP8)
        scale = tl.where(is_finite, power_of_two(exponent), float("nan"))
        x = e4m3_to_float(code, NATIVE_FP8) * scale
    tl.store(y_ptr + row * num_cols + start + place, narrow(x, tl.bfloat16), mask=mask)


def permute_rows(x: Tensor, *, quantize: bool) -> Tensor:
    """Rows in the order of the kernels' inputs, rounded to FP8 and back on the way if wanted.

    Args:
        x: bf16 ``(T, D)``, D a multiple of 128, rows contiguous.
        quantize: As act_quant_simulate does with groups of 128.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (x.shape[0], triton.cdiv(x.shape[1], 1024))
    permute_rows_kernel[grid](
        y, x, x.shape[1], x.stride(0), quantize, has_fp8(x.device), 8, num_warps=4
    )
    return y
