"""Kernels of hc_pre and hc_head: projection of the streams, Sinkhorn, weighted sum.

mixes = (flat fn^T) rsqrt(mean(flat^2) + eps) with flat = h as M*D numbers; pre and post are
sigmoids of mixes, comb is made doubly stochastic by Sinkhorn iterations; x = sum_m pre_m h_m.

``project_kernel``: a program owns BLOCK_T tokens and one part of M*D, and leaves its sums, of
products and of squares, at partial[token, part, :]. ``collapse_kernel`` adds the parts up; its
first programs own BLOCK_T tokens' post and comb, each of the others BLOCK_D columns of a token's x.
M is padded to a power of two, MP; streams that are not there have weight zero.

Exact: the product of a bf16 h with fn, which is split into three bf16 numbers that add up to it.
Rounded: float32 sums; x, once. A tensor core may cut its sums off where float32 rounds them, so
that every step loses a little towards zero; a tile's sum, BLOCK_K / 16 such steps at full size, is
therefore added to the total outside of it. Parts are added by halves, always in the same order.
Source: spec/forward.md, "Residual streams (mHC)".
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4surgery.kernels.codes import INTERPRETED, narrow, widen

LOWEST = tl.constexpr(-1e30)  # a logit of no weight; unlike minus infinity it has differences


@triton.jit
def accumulate(a, b, total):
    """Sum of a product of two bf16 tiles and a total; the interpreter cannot multiply bf16."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), total, input_precision="ieee")
    else:  # noqa: RET505  (a traced return does not end the function)
        return tl.dot(a, b, total)


@triton.jit
def product(h, fn):
    """Float32 product of bf16 or float32 ``(BLOCK_T, BLOCK_K)`` and float32 ``(BLOCK_K, COLS)``."""
    if h.dtype == tl.float32:
        return tl.dot(h, fn, input_precision="ieee")
    else:  # noqa: RET505
        high = narrow(fn, tl.bfloat16)
        rest = fn - widen(high)
        middle = narrow(rest, tl.bfloat16)
        low = narrow(rest - widen(middle), tl.bfloat16)
        total = tl.zeros((h.shape[0], fn.shape[1]), tl.float32)
        total = accumulate(h, middle, accumulate(h, low, total))
        return accumulate(h, high, total)


@triton.jit
def project_kernel(
    h_ptr,
    fn_ptr,
    partial_ptr,
    num_tokens,
    width,
    num_mixes,
    part_width,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(0) % SPLITS
    tokens = tl.program_id(0) // SPLITS * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, COLS)
    is_token, is_mix = (tokens < num_tokens)[:, None], (cols < num_mixes)[None, :]
    h_ptrs = h_ptr + tokens.to(tl.int64)[:, None] * width
    fn_ptrs = fn_ptr + cols[None, :] * width
    mixes = tl.zeros((BLOCK_T, COLS), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_K // 8), tl.float32)
    first = part * part_width
    for start in range(first, tl.minimum(first + part_width, width), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(h_ptrs + k[None, :], mask=is_token & (k < width)[None, :], other=0.0)
        fn = tl.load(fn_ptrs + k[:, None], mask=is_mix & (k < width)[:, None], other=0.0)
        wide = widen(h)
        # Eight neighbours lie in one thread: this sum needs no exchange.
        squares += tl.sum(tl.reshape(wide * wide, (BLOCK_T, BLOCK_K // 8, 8)), axis=2)
        mixes += product(h, fn)
    total = tl.sum(squares, axis=1)
    result = tl.where((cols == num_mixes)[None, :], total[:, None], mixes)
    rows = tokens.to(tl.int64)[:, None] * SPLITS + part
    is_used = is_token & (cols <= num_mixes)[None, :]
    tl.store(partial_ptr + rows * COLS + cols[None, :], result, mask=is_used)


@triton.jit
def sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def divided(x, sums, is_real):
    """Quotient of x and sums that broadcast to it; x itself where there is no stream."""
    return tl.div_rn(x, tl.where(is_real, sums, 1.0))


@triton.jit
def sinkhorn(logits, is_real, iterations, eps):
    """Doubly stochastic ``(BLOCK_T, MP, MP)`` of logits; streams that are not real stay zero."""
    logits = tl.where(is_real, logits, LOWEST)
    weights = tl.exp(logits - tl.max(logits, axis=2, keep_dims=True))
    comb = divided(weights, tl.sum(weights, axis=2, keep_dims=True), is_real)
    comb = tl.where(is_real, comb + eps, 0.0)
    comb = divided(comb, tl.sum(comb, axis=1, keep_dims=True) + eps, is_real)
    for _ in range(iterations - 1):
        comb = divided(comb, tl.sum(comb, axis=2, keep_dims=True) + eps, is_real)
        comb = divided(comb, tl.sum(comb, axis=1, keep_dims=True) + eps, is_real)
    return comb


@triton.jit
def store_post_comb(
    block,
    partial_ptr,
    scale_ptr,
    base_ptr,
    post_ptr,
    comb_ptr,
    num_tokens,
    width,
    iterations,
    hc_eps,
    norm_eps,
    M: tl.constexpr,
    MP: tl.constexpr,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Weights of BLOCK_T tokens to expand with: post and comb."""
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < num_tokens
    rows = tokens.to(tl.int64)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    partial_ptrs = partial_ptr + rows * COLS
    squares = tl.load(partial_ptrs + (2 + M) * M, mask=is_token[:, None], other=1.0)
    root = tl.rsqrt(tl.sum(squares, axis=1) / width + norm_eps)
    partial_ptrs, is_row = partial_ptrs[:, :, None], is_token[:, None, None]

    n = tl.arange(0, MP)
    is_stream = n < M
    mixes = tl.load(partial_ptrs + M + n, mask=is_row & is_stream[None, None, :], other=0.0)
    mixes = tl.sum(mixes, axis=1) * root[:, None]
    base = tl.load(base_ptr + M + n, mask=is_stream, other=0.0)
    post = 2.0 * sigmoid(mixes * tl.load(scale_ptr + 1) + base[None, :])
    post_ptrs = post_ptr + tokens.to(tl.int64)[:, None] * M + n[None, :]
    tl.store(post_ptrs, post, mask=is_token[:, None] & is_stream[None, :])

    pair = tl.arange(0, MP * MP)
    is_real = (pair // MP < M) & (pair % MP < M)
    at = pair // MP * M + pair % MP
    mixes = tl.load(partial_ptrs + 2 * M + at, mask=is_row & is_real[None, None, :], other=0.0)
    mixes = tl.sum(mixes, axis=1) * root[:, None]
    base = tl.load(base_ptr + 2 * M + at, mask=is_real, other=0.0)
    logits = mixes * tl.load(scale_ptr + 2) + base[None, :]
    comb = sinkhorn(
        tl.reshape(logits, (BLOCK_T, MP, MP)),
        (is_stream[:, None] & is_stream[None, :])[None, :, :],
        iterations,
        hc_eps,
    )
    comb_ptrs = comb_ptr + tokens.to(tl.int64)[:, None] * (M * M) + at[None, :]
    comb = tl.reshape(comb, (BLOCK_T, MP * MP))
    tl.store(comb_ptrs, comb, mask=is_token[:, None] & is_real[None, :])


@triton.jit
def store_collapsed(
    token,
    block,
    partial_ptr,
    h_ptr,
    scale_ptr,
    base_ptr,
    x_ptr,
    hidden,
    num_mixes,
    hc_eps,
    norm_eps,
    M: tl.constexpr,
    MP: tl.constexpr,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of one token's x."""
    m, cols = tl.arange(0, MP), block * BLOCK_D + tl.arange(0, BLOCK_D)
    is_stream, is_col = m < M, cols < hidden
    h_ptrs = h_ptr + (token * M + m)[:, None] * hidden + cols[None, :]
    h = tl.load(h_ptrs, mask=is_stream[:, None] & is_col[None, :], other=0.0)
    partial_ptrs = partial_ptr + (token * SPLITS + tl.arange(0, SPLITS)) * COLS
    squares = tl.sum(tl.load(partial_ptrs + num_mixes), axis=0)
    root = tl.rsqrt(squares / (M * hidden) + norm_eps)
    mixes = tl.load(partial_ptrs[:, None] + m[None, :], mask=is_stream[None, :], other=0.0)
    base = tl.load(base_ptr + m, mask=is_stream, other=0.0)
    pre = sigmoid(tl.sum(mixes, axis=0) * root * tl.load(scale_ptr) + base) + hc_eps
    x = tl.sum(pre[:, None] * widen(h), axis=0)
    tl.store(x_ptr + token * hidden + cols, narrow(x, x_ptr.dtype.element_ty), mask=is_col)


@triton.jit
def collapse_kernel(
    partial_ptr,
    h_ptr,
    scale_ptr,
    base_ptr,
    x_ptr,
    post_ptr,
    comb_ptr,
    num_tokens,
    hidden,
    num_mixes,
    num_combs,
    num_blocks,
    iterations,
    hc_eps,
    norm_eps,
    HAS_COMB: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    if program >= num_combs:
        # Backwards: what the projection read last may still be in the cache.
        program = tl.num_programs(0) - 1 - program
        store_collapsed(
            (program // num_blocks).to(tl.int64),
            program % num_blocks,
            partial_ptr,
            h_ptr,
            scale_ptr,
            base_ptr,
            x_ptr,
            hidden,
            num_mixes,
            hc_eps,
            norm_eps,
            M,
            MP,
            SPLITS,
            COLS,
            BLOCK_D,
        )
    elif HAS_COMB:
        store_post_comb(
            program,
            partial_ptr,
            scale_ptr,
            base_ptr,
            post_ptr,
            comb_ptr,
            num_tokens,
            M * hidden,
            iterations,
            hc_eps,
            norm_eps,
            M,
            MP,
            SPLITS,
            COLS,
            BLOCK_T,
        )
