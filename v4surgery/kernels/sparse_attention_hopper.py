"""The attention of sparse_attention for many queries of wide heads on Hopper.

One program owns 64 heads of one query and all 512 head dims, in two warpgroups. A tile of 64 keys,
64 KB, is gathered into one of two buffers while the other is multiplied: the scores, where each
warpgroup takes 32 of the keys, then the values, where each takes 256 of the head dims. The
probabilities pass from one to the other through shared memory.

The compiler's own pipeline of the kernel in sparse_attention computes all scores in both
warpgroups and begins to gather a tile after the last product of the tile before. The formula, what
is exact and what rounds are those of sparse_attention. Gluon is Triton's language below layouts
and pipelines. Source: "Gluon tutorials" 03 and 05 of the Triton repository; CUDA PTX ISA,
"Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from v4surgery.kernels import launch

# Triton 3.6 has the second names only, 3.9 the first.
copy_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

LOG2_E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1e30)
BLOCK_N = gl.constexpr(64)
BLOCK_Z = gl.constexpr(64)
BLOCK_H = gl.constexpr(512)
NUM_WARPS = 8
# Fewer queries of several tiles are served better by a split of their keys, fewer heads by
# programs with fewer of them.
FEWEST_QUERIES, FEWEST_HEADS = 64, 33

# Scores, and the sum of values: warps are 4 groups of 16 heads x 2 halves of the columns.
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_Z.value // 2, 16]))
VALUES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_H.value // 2, 16]))
HEADS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
# Both halves of a row of scores in each thread that holds a part of the row.
HALVES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, 0]],
        block_bases=[],
        shape=[64, 2],
    )
)
# A warp copies 512 bytes of one row at a time.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [NUM_WARPS, 1], [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def end_of_named(index_ptr, num_keys, stride_iz, SCAN: gl.constexpr):
    """One past the last key that is not -1, 0 if there is none."""
    last = 0
    for z in range(0, num_keys, SCAN):
        keys = z + gl.arange(0, SCAN, layout=LINE)
        is_named = gl.load(index_ptr + keys * stride_iz, mask=keys < num_keys, other=-1) >= 0
        last = gl.maximum(last, gl.max(gl.where(is_named, keys + 1, 0), 0))
    return last


@gluon.jit
def gather(buffer, kv_ptr, index_ptr, begin, num_keys, stride_kc, stride_iz):
    """Begin to copy the tile of keys [begin, begin + BLOCK_Z); zeros for -1 and for no key."""
    keys = begin + gl.arange(0, BLOCK_Z, layout=gl.SliceLayout(1, COPY))
    cols = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, COPY))
    entries = gl.load(index_ptr + keys * stride_iz, mask=keys < num_keys, other=-1).to(gl.int64)
    kv_ptrs = kv_ptr + (entries * stride_kc)[:, None] + cols[None, :]
    copy_in(buffer, kv_ptrs, mask=(entries >= 0)[:, None])
    async_copy.commit_group()


@gluon.jit
def wait_for_tile():
    """Every thread's copies are done, and visible to the tensor cores."""
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()


@gluon.jit
def row_max(scores):
    """Largest of each row; one exchange between the warpgroups."""
    halves = gl.max(scores.reshape([BLOCK_N, 2, BLOCK_Z // 2]), 2)
    return gl.convert_layout(gl.max(gl.convert_layout(halves, HALVES), 1), HEADS)


@gluon.jit
def sparse_attention_hopper_kernel(
    q_ptr,
    kv_ptr,
    sink_ptr,
    index_ptr,
    out_ptr,
    num_queries,
    num_heads,
    num_keys,
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qn,
    stride_kb,
    stride_kc,
    stride_ib,
    stride_is,
    stride_iz,
    SCAN: gl.constexpr,
):
    # Late queries see the most keys: they begin first.
    row = (gl.num_programs(0) - 1 - gl.program_id(0)).to(gl.int64)
    batch, position = row // num_queries, row % num_queries
    q_ptr += batch * stride_qb + position * stride_qs
    index_ptr += batch * stride_ib + position * stride_is
    kv_ptr += batch * stride_kb
    first_head = gl.program_id(1) * BLOCK_N
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_shared = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_H], SHARED)
    kv_shared = gl.allocate_shared_memory(dtype, [2, BLOCK_Z, BLOCK_H], SHARED)
    weights_shared = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_Z], SHARED)

    rows = first_head + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPY))
    cols = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, COPY))
    has_row = (rows < num_heads)[:, None]
    q_ptrs = q_ptr + (rows.to(gl.int64) * stride_qn)[:, None] + cols[None, :]
    copy_in(q_shared, q_ptrs, mask=has_row)
    gather(kv_shared.index(0), kv_ptr, index_ptr, 0, num_keys, stride_kc, stride_iz)
    end = end_of_named(index_ptr, num_keys, stride_iz, SCAN)

    heads = first_head + gl.arange(0, BLOCK_N, layout=HEADS)
    sink = gl.load(sink_ptr + heads, mask=heads < num_heads, other=0.0).to(gl.float32) * LOG2_E
    peak = gl.maximum(sink, LOWEST)
    totals = gl.zeros([BLOCK_N, BLOCK_Z], gl.float32, SCORES)
    zeros = gl.zeros([BLOCK_N, BLOCK_Z], gl.float32, SCORES)
    acc = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, VALUES)
    columns = gl.arange(0, BLOCK_Z, layout=gl.SliceLayout(0, SCORES))
    slot = 0
    wait_for_tile()
    for z in range(0, end, BLOCK_Z):
        kv = kv_shared.index(slot)
        scores = warpgroup_mma(q_shared, kv.permute((1, 0)), zeros, use_acc=False, is_async=True)
        slot ^= 1
        gather(
            kv_shared.index(slot), kv_ptr, index_ptr, z + BLOCK_Z, num_keys, stride_kc, stride_iz
        )
        keys = z + columns
        is_named = gl.load(index_ptr + keys * stride_iz, mask=keys < num_keys, other=-1) >= 0
        scores = warpgroup_mma_wait(0, deps=(scores,))
        scores = gl.where(is_named[None, :], scores * scale_log2, float("-inf"))
        # softmax, in powers of two, relative to the largest score so far and the sink
        new_peak = gl.maximum(peak, row_max(scores))
        weights = gl.exp2(scores - new_peak[:, None])
        shrink = gl.exp2(peak - new_peak)
        totals = totals * shrink[:, None] + weights
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
        weights_shared.store(weights.to(dtype))
        fence_async_shared()
        acc = warpgroup_mma(weights_shared, kv, acc, is_async=True)
        peak = new_peak
        # In flight across the end of the loop, ptxas would run all products in turn; in flight
        # across the fence of wait_for_tile, the ptxas of CUDA 12.8 and 12.9 crashes.
        acc = warpgroup_mma_wait(0, deps=(acc,))
        wait_for_tile()

    total = gl.sum(totals, 1) + gl.exp2(sink - peak)
    factor = 1.0 / gl.where(total > 0, total, 1.0)
    acc *= gl.convert_layout(factor, gl.SliceLayout(1, VALUES))[:, None]
    barrier()
    staged = kv_shared.index(0)
    staged.store(acc.to(dtype))
    out_ptrs = out_ptr + row * num_heads * BLOCK_H + (rows * BLOCK_H)[:, None] + cols[None, :]
    gl.store(out_ptrs, staged.load(COPY), mask=has_row)


def serves(q: Tensor, kv: Tensor, index: Tensor) -> bool:
    """Whether this kernel is the one of such arguments; its copies need rows aligned to 16."""
    batch, num_queries, num_heads, head_dim = q.shape
    return (
        launch.capability(q.device)[0] == 9
        and q.dtype == torch.bfloat16
        and head_dim == BLOCK_H.value
        and num_heads >= FEWEST_HEADS
        and (batch * num_queries >= FEWEST_QUERIES or index.shape[-1] <= BLOCK_Z.value)
        and all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, kv))
        and all(step % 16 == 0 for x in (q, kv) for step in x.stride()[:-1])
    )


def attend(
    out: Tensor, q: Tensor, kv: Tensor, sink: Tensor, index: Tensor, scale: float, scan: int
) -> None:
    """Fill ``out``, contiguous and of the shape of ``q``, for arguments that it :func:`serves`."""
    batch, num_queries, num_heads, _ = q.shape
    grid = (batch * num_queries, -(-num_heads // BLOCK_N.value))
    sparse_attention_hopper_kernel[grid](
        q,
        kv,
        sink,
        index,
        out,
        num_queries,
        num_heads,
        index.shape[-1],
        scale * LOG2_E.value,
        *q.stride()[:-1],
        *kv.stride()[:-1],
        *index.stride(),
        SCAN=scan,
        num_warps=NUM_WARPS,
    )
