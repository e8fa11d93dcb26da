"""The two grouped products of FP4 experts on Hopper, with all that stands between them.

    h[row] = quantize(silu(min(g, limit)) * clamp(u) * weight)      g = w1 x, u = w3 x
    y[slot] = w2 h[row]

A program of the first kernel owns 128 hidden activations, one group of FP8, of one tile of rows of
one expert; of the second, 256 outputs. Tiles of experts that are in memory are as expert_rows maps
them. x and h are in the order of inputs that grouped_linear_hopper explains: permute_rows brings x
into it, and the first kernel takes its rows of w1 and w3 in it.

Exact: decoding. Rounded: sums in float32; g, u, h and y to bf16; h to FP8 in mode official.
Source: spec/forward.md, "Experts" and "Quantization in the official code".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from v4surgery.kernels import codes
from v4surgery.kernels.act_quant import AMAX_FLOOR
from v4surgery.kernels.codes import E4M3_MAX
from v4surgery.kernels.expert_rows import TILE_COLUMNS, SortedSlots, permute_rows
from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.kernels.grouped_linear_hopper import (
    COPY_CODES,
    COPY_X,
    NUM_WARPS,
    input_at,
    multiply_pair,
)

scale_exponent = gluon.jit(codes.scale_exponent.fn)
power_of_two = gluon.jit(codes.power_of_two.fn)

BLOCK = gl.constexpr(128)
# Rows of a tile -> stages, registers of a thread (None: as many as there are).
TILES = {16: (5, 128), 32: (4, 128), 64: (6, None), 128: (4, None)}
STORE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [NUM_WARPS.value, 1], [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [NUM_WARPS.value], [0]))
# 1 / (1 + 2^(-x log2 e)), each step to one or two float32 steps.
SIGMOID = gl.constexpr(
    """{
.reg .f32 power;
mul.f32 power, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 power, power;
add.f32 power, power, 0f3F800000;
rcp.approx.ftz.f32 $0, power;
}"""
)
# Two values rounded to bf16, or to E4M3, and back. Alone the compiler converts one at a time.
ROUND_BF16 = gl.constexpr(
    """{
.reg .b32 pair;
cvt.rn.bf16x2.f32 pair, $3, $2;
shl.b32 $0, pair, 16;
and.b32 $1, pair, 0xffff0000;
}"""
)
ROUND_E4M3 = gl.constexpr(
    """{
.reg .b16 codes, low, high;
.reg .b32 pair;
cvt.rn.satfinite.e4m3x2.f32 codes, $3, $2;
cvt.rn.f16x2.e4m3x2 pair, codes;
mov.b32 {low, high}, pair;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
}"""
)


@gluon.jit
def round_pairs(x, HOW: gl.constexpr):
    return gl.inline_asm_elementwise(HOW, "=r,=r,r,r", [x], gl.float32, is_pure=True, pack=2)


@gluon.jit
def store_rows(y_ptr, rows, has_row, stride, values):
    """(128, BLOCK_T) to rows of y, 128 neighbours each."""
    values = gl.convert_layout(values.permute([1, 0]), STORE)
    cols = gl.arange(0, 128, gl.SliceLayout(0, STORE))[None, :]
    has_row = gl.convert_layout(has_row, gl.SliceLayout(1, STORE))[:, None]
    rows = gl.convert_layout(rows, gl.SliceLayout(1, STORE)).to(gl.int64)[:, None]
    gl.store(y_ptr + rows * stride + cols, values, mask=has_row)


@gluon.jit
def experts_hidden_kernel(
    h_ptr,
    x_ptr,
    slots_ptr,
    tiles_ptr,
    weights_ptr,
    gate_ptr,
    up_ptr,
    num_experts,
    num_in,
    num_hidden,
    per_token,
    limit,
    OFFICIAL: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_T, 16])
    num_blocks = num_hidden // BLOCK
    tile_ptr = tiles_ptr + gl.program_id(0) // num_blocks * TILE_COLUMNS
    expert = gl.load(tile_ptr)
    if expert < 0:
        return
    begin, end = gl.load(tile_ptr + 1), gl.load(tile_ptr + 2)
    rows = begin + gl.arange(0, BLOCK_T, LINE)
    slot = gl.load(slots_ptr + rows, mask=rows < end, other=0)
    weight = gl.load(weights_ptr + slot, mask=rows < end, other=0.0)
    token = gl.convert_layout(slot // per_token, gl.SliceLayout(1, COPY_X)).to(gl.int64)
    has_x = gl.convert_layout(rows < end, gl.SliceLayout(1, COPY_X))[:, None]
    cols = gl.arange(0, 128, gl.SliceLayout(0, COPY_X))[None, :]
    x_ptrs = x_ptr + token[:, None] * (num_in // 128 * 128) + cols
    first = gl.program_id(0) % num_blocks * BLOCK
    place = gl.arange(0, 128, gl.SliceLayout(1, COPY_CODES))
    outs = first + input_at(place)
    gate, up = multiply_pair(
        x_ptrs, has_x, gate_ptr, up_ptr, expert, num_experts, outs, outs, num_in,
        MMA, BLOCK_T, STAGES,
    )  # fmt: skip
    gate, up = round_pairs(gate, ROUND_BF16), round_pairs(up, ROUND_BF16)
    gate = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = gl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    sigmoid = gl.inline_asm_elementwise(SIGMOID, "=r,r", [gate], gl.float32, is_pure=True, pack=1)
    weight = gl.convert_layout(weight, gl.SliceLayout(0, MMA))[None, :]
    hidden = gate * sigmoid * up * weight
    if OFFICIAL:
        hidden = quantize(round_pairs(hidden, ROUND_BF16))
    hidden = hidden.to(gl.bfloat16)
    store_rows(h_ptr + first, rows, rows < end, num_hidden, hidden)


@gluon.jit
def quantize(x):
    """Round columns of 128 to FP8 and back; one that holds NaN or infinity becomes all NaN."""
    magnitude = (x.to(gl.uint32, bitcast=True) & 0x7FFFFFFF).to(gl.int32, bitcast=True)
    largest = gl.max(magnitude, 0)
    is_finite = largest < 0x7F800000
    amax = gl.maximum(gl.where(is_finite, largest, 0).to(gl.float32, bitcast=True), AMAX_FLOOR)
    exponent = scale_exponent(amax, E4M3_MAX)
    scale = gl.where(is_finite, power_of_two(exponent), float("nan"))
    return round_pairs(x * power_of_two(-exponent)[None, :], ROUND_E4M3) * scale[None, :]


@gluon.jit
def experts_output_kernel(
    y_ptr,
    h_ptr,
    slots_ptr,
    tiles_ptr,
    down_ptr,
    num_experts,
    num_hidden,
    num_out,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_T, 16])
    num_blocks = gl.cdiv(num_out, 2 * BLOCK)
    tile_ptr = tiles_ptr + gl.program_id(0) // num_blocks * TILE_COLUMNS
    expert = gl.load(tile_ptr)
    if expert < 0:
        return
    begin, end = gl.load(tile_ptr + 1), gl.load(tile_ptr + 2)
    rows = begin + gl.arange(0, BLOCK_T, LINE)
    slot = gl.load(slots_ptr + rows, mask=rows < end, other=0)
    h_rows = begin + gl.arange(0, BLOCK_T, gl.SliceLayout(1, COPY_X))
    cols = gl.arange(0, 128, gl.SliceLayout(0, COPY_X))[None, :]
    h_ptrs = h_ptr + h_rows.to(gl.int64)[:, None] * (num_hidden // 128 * 128) + cols
    first = gl.program_id(0) % num_blocks * (2 * BLOCK)
    outs = first + gl.arange(0, 128, gl.SliceLayout(1, COPY_CODES))
    y0, y1 = multiply_pair(
        h_ptrs, (h_rows < end)[:, None], down_ptr, down_ptr, expert, num_experts,
        outs, gl.minimum(outs + BLOCK, num_out - 1), num_hidden, MMA, BLOCK_T, STAGES,
    )  # fmt: skip
    has_row = rows < end
    store_rows(y_ptr + first, slot, has_row, num_out, y0.to(gl.bfloat16))
    has_row = has_row & (first + BLOCK < num_out)
    store_rows(y_ptr + first + BLOCK, slot, has_row, num_out, y1.to(gl.bfloat16))


def serves(x: Tensor, w1: ExpertWeights) -> bool:
    """Whether these kernels can do it: FP4 and bf16, sizes that are multiples of 128."""
    is_whole = w1.in_features % BLOCK.value == 0 and w1.out_features % BLOCK.value == 0
    return is_whole and w1.format == "fp4" and x.dtype == torch.bfloat16


def run_experts(
    y: Tensor,
    x: Tensor,
    rows: SortedSlots,
    routing: Tensor,
    matrices: tuple[ExpertWeights, ExpertWeights, ExpertWeights],
    limit: float,
    official: bool,
) -> None:
    """Both products.

    Args:
        y: bf16 ``(N, D)``, by slot; rows of experts that are not in memory are left alone.
        x: bf16 ``(T, D)``.
        rows: Of which expert each row is.
        routing: Weights, float32 ``(N,)``, by slot.
        matrices: w1, w2, w3.
        limit: Clamp.
        official: Round x and h to FP8.
    """
    w1, w2, w3 = matrices
    num_hidden, num_experts, num_out = w1.out_features, len(w1.matrices), y.shape[1]
    stages, registers = TILES[rows.tile_rows]
    options = {"num_warps": NUM_WARPS.value, "maxnreg": registers}
    x = permute_rows(x, quantize=official)
    h = torch.empty(len(rows.slots), num_hidden, dtype=x.dtype, device=x.device)
    experts_hidden_kernel[(num_hidden // BLOCK.value * len(rows.tiles),)](
        h, x, rows.slots, rows.tiles, routing, w1.addresses, w3.addresses, num_experts,
        x.shape[1], num_hidden, rows.per_token, float(limit),
        OFFICIAL=official, BLOCK_T=rows.tile_rows, STAGES=stages, **options,
    )  # fmt: skip
    experts_output_kernel[(triton.cdiv(num_out, 2 * BLOCK.value) * len(rows.tiles),)](
        y, h, rows.slots, rows.tiles, w2.addresses, num_experts, num_hidden, num_out,
        BLOCK_T=rows.tile_rows, STAGES=stages, **options,
    )  # fmt: skip
