"""Manifold-constrained hyper-connections: collapse of the streams, their weights, and expansion.

hc_pre and hc_head launch the two kernels of :mod:`v4surgery.kernels.hyper_connections_pre`, which
says what they compute, exactly and rounded. hc_post: h'_n = post_n y + sum_m comb[m, n] h_m; a
program owns BLOCK_D columns of a token, in all streams. Rounded: M products and sums in float32;
the result, once. Source: spec/forward.md, "Residual streams (mHC)".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels import launch
from v4surgery.kernels.codes import narrow, widen
from v4surgery.kernels.hyper_connections_pre import collapse_kernel, project_kernel

# Programs of the projection that fill a GPU; the columns are split until there are about as many.
FULL_GRID = 264
MAX_SPLITS = 128
# Tokens up to which a row serves: BLOCK_T, BLOCK_K x COLS, warps, stages.
PROJECT_TILES = ((128, 16, 4096, 4, 3), (1 << 62, 64, 4096, 4, 3))
# float32 products run on no tensor core.
PROJECT_FLOAT32 = (32, 1024, 4, 2)
# Warps that own a token's columns, LANE_COLS to a warp's loads: for few tokens, for many.
FEW_TOKENS = 16
COLLAPSE_WARPS = (2, 4)
EXPAND_WARPS = (1, 4)
LANE_COLS = 256
COMB_ELEMENTS = 2048  # of all parts that a program of collapse_kernel adds up


@triton.jit
def expand_kernel(
    y_ptr,
    h_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    hidden,
    num_blocks,
    M: tl.constexpr,
    MP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    n, cols = tl.arange(0, MP), tl.program_id(0) % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    is_stream, is_col = n < M, cols < hidden
    post = tl.load(post_ptr + token * M + n, mask=is_stream, other=0.0)
    y = widen(tl.load(y_ptr + token * hidden + cols, mask=is_col, other=0.0))
    out = post[:, None] * y[None, :]
    for m in tl.static_range(M):
        weights = tl.load(comb_ptr + (token * M + m) * M + n, mask=is_stream, other=0.0)
        h = widen(tl.load(h_ptr + (token * M + m) * hidden + cols, mask=is_col, other=0.0))
        out += weights[:, None] * h[None, :]
    out_ptrs = out_ptr + (token * M + n)[:, None] * hidden + cols[None, :]
    mask = is_stream[:, None] & is_col[None, :]
    tl.store(out_ptrs, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Projected:
    """Sums of :func:`project_kernel` ``(T, parts, COLS)``, and the streams they are of."""

    partial: Tensor
    streams: Tensor  # (T, M, D), contiguous
    num_mixes: int


def project(operation: str, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Projected:
    """Check the arguments of a collapse, and launch its first kernel.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    device = launch.require_same_device(operation, h, fn, scale, base)
    launch.require_dtype(operation, "h", h, torch.bfloat16, torch.float32)
    num_streams, hidden = h.shape[-2:]
    width = num_streams * hidden
    is_head = operation == "hc_head"
    num_mixes = num_streams if is_head else (2 + num_streams) * num_streams
    shapes = {"fn": (num_mixes, width), "scale": (1 if is_head else 3,), "base": (num_mixes,)}
    for (name, shape), tensor in zip(shapes.items(), (fn, scale, base), strict=True):
        launch.require_shape(operation, name, tensor, shape)
        launch.require_dtype(operation, name, tensor, torch.float32)
    streams = h.reshape(-1, num_streams, hidden).contiguous()
    num_tokens = streams.shape[0]
    tile = next(tile for most, *tile in PROJECT_TILES if num_tokens <= most)
    block_t, elements, warps, stages = PROJECT_FLOAT32 if h.dtype == torch.float32 else tile
    cols = max(triton.next_power_of_2(num_mixes + 1), 16)
    block_k = min(max(elements // cols, 16), 128)
    blocks, steps = triton.cdiv(num_tokens, block_t), triton.cdiv(width, block_k)
    wanted = min(max(FULL_GRID // max(blocks, 1), 1), MAX_SPLITS, steps)
    splits = 1 << (wanted.bit_length() - 1)
    partial = torch.empty((num_tokens, splits, cols), dtype=torch.float32, device=device)
    if num_tokens:
        project_kernel[(blocks * splits,)](
            streams,
            fn.contiguous(),
            partial,
            num_tokens,
            width,
            num_mixes,
            triton.cdiv(steps, splits) * block_k,
            SPLITS=splits,
            COLS=cols,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return Projected(partial, streams, num_mixes)


def collapse(
    projected: Projected,
    scale: Tensor,
    base: Tensor,
    post: Tensor | None,
    comb: Tensor | None,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
) -> Tensor:
    """The weighted sum ``(T, D)`` of projected streams; fills post and comb if they are given."""
    streams, partial = projected.streams, projected.partial
    num_tokens, num_streams, hidden = streams.shape
    x = torch.empty((num_tokens, hidden), dtype=streams.dtype, device=streams.device)
    if not num_tokens:
        return x
    splits, cols = partial.shape[1:]
    padded = triton.next_power_of_2(num_streams)
    warps = COLLAPSE_WARPS[num_tokens > FEW_TOKENS]
    block_d = min(LANE_COLS * warps, triton.next_power_of_2(hidden))
    block_t = max(COMB_ELEMENTS // (splits * padded**2), 1)
    blocks = triton.cdiv(hidden, block_d)
    combs = 0 if comb is None else triton.cdiv(num_tokens, block_t)
    collapse_kernel[(combs + num_tokens * blocks,)](
        partial,
        streams,
        scale.contiguous(),
        base.contiguous(),
        x,
        x if post is None else post,
        x if comb is None else comb,
        num_tokens,
        hidden,
        projected.num_mixes,
        combs,
        blocks,
        iterations,
        hc_eps,
        norm_eps,
        HAS_COMB=comb is not None,
        M=num_streams,
        MP=padded,
        SPLITS=splits,
        COLS=cols,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return x


def hc_pre(
    h: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams for a sublayer, and the weights to expand its output with.

    Args:
        h: Streams, bf16 or float32 ``(..., M, D)``.
        fn: float32 ``((2 + M) * M, M * D)``: rows of pre M, of post M, of comb M*M.
        scale: float32 ``(3,)``.
        base: float32 ``((2 + M) * M,)``.
        iterations: Sinkhorn iterations.
        hc_eps: Added to pre, to the softmax and to each sum.
        norm_eps: Of the norm over all streams.

    Returns:
        x ``(..., D)`` in the dtype of ``h``; post ``(..., M)`` and comb ``(..., M, M)``, float32.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    projected = project("hc_pre", h, fn, scale, base)
    num_streams = h.shape[-2]
    post = torch.empty((*h.shape[:-2], num_streams), dtype=torch.float32, device=h.device)
    comb = torch.empty((*post.shape, num_streams), dtype=torch.float32, device=h.device)
    x = collapse(projected, scale, base, post, comb, iterations, hc_eps, norm_eps)
    return x.view(*h.shape[:-2], h.shape[-1]), post, comb


def hc_head(
    h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, hc_eps: float, norm_eps: float
) -> Tensor:
    """Collapse the streams after the last block.

    Args:
        h: Streams, bf16 or float32 ``(..., M, D)``.
        fn: float32 ``(M, M * D)``.
        scale: float32 ``(1,)``.
        base: float32 ``(M,)``.
        hc_eps: Added to the weights.
        norm_eps: Of the norm over all streams.

    Returns:
        ``(..., D)``, dtype of ``h``.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    projected = project("hc_head", h, fn, scale, base)
    x = collapse(projected, scale, base, None, None, 1, hc_eps, norm_eps)
    return x.view(*h.shape[:-2], h.shape[-1])


def hc_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Expand a sublayer's output: h'_n = post_n y + sum_m comb[m, n] h_m.

    Args:
        y: bf16 or float32 ``(..., D)``.
        h: Streams before the sublayer, bf16 or float32 ``(..., M, D)``.
        post: float32 ``(..., M)``.
        comb: float32 ``(..., M, M)``.

    Returns:
        ``(..., M, D)``, dtype of ``h``, contiguous.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    device = launch.require_same_device("hc_post", y, h, post, comb)
    *tokens, num_streams, hidden = h.shape
    shapes = {
        "y": (*tokens, hidden),
        "post": (*tokens, num_streams),
        "comb": (*tokens, num_streams, num_streams),
    }
    for (name, shape), tensor in zip(shapes.items(), (y, post, comb), strict=True):
        launch.require_shape("hc_post", name, tensor, shape)
    for name, tensor in (("y", y), ("h", h)):
        launch.require_dtype("hc_post", name, tensor, torch.bfloat16, torch.float32)
    for name, tensor in (("post", post), ("comb", comb)):
        launch.require_dtype("hc_post", name, tensor, torch.float32)
    out = torch.empty(h.shape, dtype=h.dtype, device=device)
    if not out.numel():
        return out
    padded = triton.next_power_of_2(num_streams)
    num_tokens = y.numel() // hidden
    warps = EXPAND_WARPS[num_tokens > FEW_TOKENS]
    block_d = min(LANE_COLS * warps, triton.next_power_of_2(hidden))
    blocks = triton.cdiv(hidden, block_d)
    expand_kernel[(num_tokens * blocks,)](
        y.contiguous(),
        h.contiguous(),
        post.contiguous(),
        comb.contiguous(),
        out,
        hidden,
        blocks,
        M=num_streams,
        MP=padded,
        BLOCK_D=block_d,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out
