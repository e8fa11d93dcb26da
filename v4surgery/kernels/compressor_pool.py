"""Pool windows of projected tokens into compressed entries, a softmax weight for each channel.

HCA pools the ratio tokens of its window. CSA pools the previous window with channels [:H] and the
current one with channels [H:]; both are read where they lie, each number once.

One program owns BLOCK_H channels of one entry. A window of nothing but -inf gives NaN, as the
softmax does. Rounded: exp to a few units in the last place, float32 sums, one division.
Source: spec/forward.md, "Compressor".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import launch

# BLOCK_R up to which a row serves: BLOCK_H, warps. Short windows have all their tokens in a thread.
TILES = ((8, 256, 2), (256, 32, 4), (1 << 62, 8, 8))


@triton.jit
def load_gate(gate_ptrs, mask, is_col):
    """Scores; -inf for slots that are not there, but 0 beyond the channels: no NaN arises."""
    gate = tl.load(gate_ptrs, mask=mask, other=float("-inf"))
    return tl.where(is_col[None, :], gate, 0.0)


@triton.jit
def pool_kernel(
    kv_ptr,
    gate_ptr,
    out_ptr,
    num_entries,
    num_windows,
    num_blocks,
    ratio,
    width,
    head_dim,
    OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    entry = (tl.program_id(0) // num_blocks).to(tl.int64)
    window = entry // num_entries * num_windows + entry % num_entries
    slots, cols = tl.arange(0, BLOCK_R), tl.program_id(0) % num_blocks * BLOCK_H
    cols += tl.arange(0, BLOCK_H)
    is_col = cols < head_dim
    mask = (slots < ratio)[:, None] & is_col[None, :]
    at = (window * ratio + slots)[:, None] * width + cols[None, :]
    gate = load_gate(gate_ptr + at, mask, is_col)
    kv = tl.load(kv_ptr + at, mask=mask, other=0.0)
    top = tl.max(gate, axis=0)
    if OVERLAP:
        at += ratio * width + head_dim
        next_gate = load_gate(gate_ptr + at, mask, is_col)
        next_kv = tl.load(kv_ptr + at, mask=mask, other=0.0)
        top = tl.maximum(top, tl.max(next_gate, axis=0))
    weight = tl.exp(gate - top[None, :])
    total, pooled = tl.sum(weight, axis=0), tl.sum(weight * kv, axis=0)
    if OVERLAP:
        weight = tl.exp(next_gate - top[None, :])
        total += tl.sum(weight, axis=0)
        pooled += tl.sum(weight * next_kv, axis=0)
    tl.store(out_ptr + entry * head_dim + cols, pooled / total, mask=is_col)


def compressor_pool(kv: Tensor, gate: Tensor, *, overlap: bool) -> Tensor:
    """Pool every window; with overlap the first one only gives to the second.

    Args:
        kv: Projected tokens, float32 ``(B, windows, ratio, c*H)``.
        gate: Their scores with ape added, the same shape; -inf for no token.
        overlap: CSA (c = 2) or HCA (c = 1).

    Returns:
        float32 ``(B, windows, H)``, or ``(B, windows - 1, H)`` with overlap: entry j has the
        windows j and j + 1.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    device = launch.require_same_device("compressor_pool", kv, gate)
    launch.require_shape("compressor_pool", "gate", gate, tuple(kv.shape))
    for name, tensor in (("kv", kv), ("gate", gate)):
        launch.require_dtype("compressor_pool", name, tensor, torch.float32)
    if kv.dim() != 4 or (overlap and kv.shape[3] % 2):
        raise UsageError(
            "kv is not windows of tokens",
            where="compressor_pool",
            value=tuple(kv.shape),
            rule="(B, windows, ratio, c*H)" + (", c = 2" if overlap else ""),
        )
    batch, num_windows, ratio, width = kv.shape
    entries, head_dim = max(num_windows - overlap, 0), width // (1 + overlap)
    out = torch.empty((batch, entries, head_dim), dtype=torch.float32, device=device)
    if not out.numel():
        return out
    block_r = triton.next_power_of_2(max(ratio, 1))
    most_channels, warps = next(tile for most, *tile in TILES if block_r <= most)
    block_h = min(most_channels, triton.next_power_of_2(head_dim))
    blocks = triton.cdiv(head_dim, block_h)
    pool_kernel[(batch * entries * blocks,)](
        kv.contiguous(),
        gate.contiguous(),
        out,
        entries,
        num_windows,
        blocks,
        ratio,
        width,
        head_dim,
        OVERLAP=overlap,
        BLOCK_R=block_r,
        BLOCK_H=block_h,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out
