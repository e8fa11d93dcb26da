"""The product of rows with FP4 matrices of experts on Hopper, decoded on the way to tensor cores.

A program multiplies one tile of rows of one expert with twice 128 outputs, in two warpgroups. The
matrix is the first operand, which Hopper takes from registers: a thread loads 16 bytes of a row of
the matrix, 32 codes of one group, and shifts them into bf16 pairs while the tensor cores multiply
what was decoded before. Rows of x are the second operand. All of it is copied STAGES - 2 steps of
128 inputs ahead; a slot is free again two steps after its product began.

Inside each 128 inputs, x is in the order in which threads hold the codes: place
32 w + 16 t + 8 h + 2 q + c holds input 32 q + 8 w + 4 c + 2 t + h.

A code's bits, put in place, are its value times 2^-126; it is multiplied by 2^(scale - 17), and the
sum by 2^16. So scales above 2^17 (byte 144) would leave bf16: they and byte 255 give NaN.

Exact: decoding. Rounded: sums, in float32. Source: spec/checkpoint.md, "Number formats"; CUDA PTX
ISA, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# Triton 3.6 has the second name only, 3.9 the first.
copy_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

NUM_WARPS = gl.constexpr(8)

# (128, 64) bytes: 16 neighbours and rows r, r + 8 in a thread, as the first operand wants them.
BYTES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 64],
    )
)
# The same bytes as (128, 4 groups, 16), and the groups' scales.
GROUPS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 4, 16],
    )
)
SCALES = gl.constexpr(gl.SliceLayout(2, GROUPS.value))
COPY_X = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [NUM_WARPS.value, 1], [1, 0]))
COPY_CODES = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [NUM_WARPS.value, 1], [1, 0]))
COPY_SCALES = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [NUM_WARPS.value, 1], [1, 0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))

# Four bytes, codes 0 to 7, times a scale: codes (0, 4), (1, 5) and (2, 6), (3, 7) as bf16 pairs.
# Sign to bits 15 and 31, the other three bits of a code to bits 6 to 8 and 22 to 24.
DECODE = gl.constexpr(
    """{
.reg .b32 low, high, sign, zero;
mov.b32 zero, 0x80008000;
shr.u32 high, $4, 8;
shl.b32 sign, $4, 12;
and.b32 sign, sign, 0x80008000;
shl.b32 low, $4, 6;
lop3.b32 low, low, 0x01c001c0, sign, 0xEA;
fma.rn.bf16x2 $0, low, $5, zero;
shl.b32 sign, $4, 8;
and.b32 sign, sign, 0x80008000;
shl.b32 low, $4, 2;
lop3.b32 low, low, 0x01c001c0, sign, 0xEA;
fma.rn.bf16x2 $1, low, $5, zero;
shl.b32 sign, $4, 4;
and.b32 sign, sign, 0x80008000;
shl.b32 low, high, 6;
lop3.b32 low, low, 0x01c001c0, sign, 0xEA;
fma.rn.bf16x2 $2, low, $5, zero;
and.b32 sign, $4, 0x80008000;
shl.b32 low, high, 2;
lop3.b32 low, low, 0x01c001c0, sign, 0xEA;
fma.rn.bf16x2 $3, low, $5, zero;
}"""
)


@gluon.jit
def decode(stored, scale, MMA: gl.constexpr):
    """(128, 64) bytes and (128, 4) scale bytes to a first operand (128, 128) times 2^-16."""
    bits = scale.to(gl.uint16)
    bits = gl.where(bits > 144, 0x7FC0, (bits + 110) << 7).to(gl.uint16)
    factor = bits.to(gl.bfloat16, bitcast=True)[:, :, None]
    stored = gl.convert_layout(stored.reshape([128, 4, 16]), GROUPS, assert_trivial=True)
    even, odd = gl.inline_asm_elementwise(
        DECODE,
        "=r,=r,=r,=r,r,r,r",
        [stored, factor],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )
    # (row, q, w, h, c, t) to (row, w, t, h, q, c): see the order of inputs above.
    values = gl.join(even, odd).reshape([128, 4, 4, 2, 2, 2]).permute([0, 2, 5, 3, 1, 4])
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    return gl.convert_layout(values.reshape([128, 128]), operand, assert_trivial=True)


@gluon.jit
def copy_step(slots, sources, has_row, slot, step, num_steps):
    x_slots, codes0, codes1, scales0, scales1 = slots
    x_ptrs, codes0_ptrs, codes1_ptrs, scales0_ptrs, scales1_ptrs = sources
    exists = step < num_steps
    copy_in(x_slots.index(slot), x_ptrs + step * 128, mask=has_row & exists)
    copy_in(codes0.index(slot), codes0_ptrs + step * 64, mask=exists)
    copy_in(codes1.index(slot), codes1_ptrs + step * 64, mask=exists)
    copy_in(scales0.index(slot), scales0_ptrs + step * 4, mask=exists)
    copy_in(scales1.index(slot), scales1_ptrs + step * 4, mask=exists)
    async_copy.commit_group()


@gluon.jit
def multiply_pair(
    x_ptrs,
    has_row,
    addresses0_ptr,
    addresses1_ptr,
    expert,
    num_experts,
    outs0,
    outs1,
    num_in,
    MMA: gl.constexpr,
    BLOCK_T: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Two products (128, BLOCK_T), float32: rows ``outs`` of two matrices with the rows of x."""
    codes_col = gl.arange(0, 64, gl.SliceLayout(0, COPY_CODES))[None, :]
    scales_col = gl.arange(0, 4, gl.SliceLayout(0, COPY_SCALES))[None, :]
    # From whole steps, so that the compiler knows how the rows are aligned.
    num_steps = num_in // 128
    row0 = gl.convert_layout(outs0, gl.SliceLayout(1, COPY_CODES))[:, None] * (num_steps * 64)
    row1 = gl.convert_layout(outs1, gl.SliceLayout(1, COPY_CODES))[:, None] * (num_steps * 64)
    group0 = gl.convert_layout(outs0, gl.SliceLayout(1, COPY_SCALES))[:, None] * (num_steps * 4)
    group1 = gl.convert_layout(outs1, gl.SliceLayout(1, COPY_SCALES))[:, None] * (num_steps * 4)
    sources = (
        x_ptrs,
        find(addresses0_ptr + expert) + (row0 + codes_col),
        find(addresses1_ptr + expert) + (row1 + codes_col),
        find(addresses0_ptr + num_experts + expert) + (group0 + scales_col),
        find(addresses1_ptr + num_experts + expert) + (group1 + scales_col),
    )
    # Buffers of their own for each, or writing one would be taken for overwriting the other.
    x_slots = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, 128], SWIZZLED)
    codes0 = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 64], PLAIN)
    codes1 = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 64], PLAIN)
    scales0 = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 4], PLAIN)
    scales1 = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 4], PLAIN)
    slots = (x_slots, codes0, codes1, scales0, scales1)
    for step in gl.static_range(STAGES - 2):
        copy_step(slots, sources, has_row, step, step, num_steps)
    total0 = warpgroup_mma_init(gl.zeros([128, BLOCK_T], gl.float32, MMA))
    total1 = warpgroup_mma_init(gl.zeros([128, BLOCK_T], gl.float32, MMA))
    slot, ahead = 0, STAGES - 2
    for step in range(num_steps):
        async_copy.wait_group(STAGES - 3)
        # Tensor cores read shared memory by another way than these copies wrote it.
        fence_async_shared()
        copy_step(slots, sources, has_row, ahead, step + STAGES - 2, num_steps)
        stored, scale = codes0.index(slot).load(BYTES), scales0.index(slot).load(SCALES)
        x = x_slots.index(slot).permute((1, 0))
        # At most one product runs on, so that its operand's registers are the only ones held.
        total0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[total0]))
        total0 = warpgroup_mma(decode(stored, scale, MMA), x, total0, is_async=True)
        stored, scale = codes1.index(slot).load(BYTES), scales1.index(slot).load(SCALES)
        total1 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[total1]))
        total1 = warpgroup_mma(decode(stored, scale, MMA), x, total1, is_async=True)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        ahead = gl.where(ahead == STAGES - 1, 0, ahead + 1)
    total0, total1 = warpgroup_mma_wait(0, deps=[total0, total1])
    return total0 * 65536.0, total1 * 65536.0


@gluon.jit
def find(address_ptr):
    return gl.multiple_of(gl.load(address_ptr).to(gl.pointer_type(gl.uint8)), 16)


@gluon.jit
def input_at(place):
    """Which of 128 inputs stands at a place."""
    high = ((place >> 1 & 3) << 5) | ((place >> 5 & 3) << 3) | ((place & 1) << 2)
    return high | ((place >> 4 & 1) << 1) | (place >> 3 & 1)
