"""Sinkhorn normalisation with gradients: a Triton kernel each way, plain torch on a CPU.

    y_0 = x;  y_i = y_{i-1} / (s_i + eps),  s_i the sums of y_{i-1} over columns, rows, columns ...

Backward needs each y_{i-1} = y_i (s_i + eps) and s_i; with g the gradient of y_i that of y_{i-1}
is (g - sum(g y_i)) / (s_i + eps), the sum over the same axis. The forward stores the sums only: M
numbers a step. Source: spec of the forward pass, "Residual streams (mHC)", step 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _forward(x_ptr, y_ptr, sums_ptr, num_rows, eps, ITERATIONS: tl.constexpr, M: tl.constexpr,
             BLOCK_T: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = rows < num_rows
    i, j = tl.arange(0, M)[None, :, None], tl.arange(0, M)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * M * M + i * M + j
    y = tl.load(x_ptr + at, mask=mask[:, None, None], other=1.0)
    unit = tl.arange(0, M)[None, :]
    sums_ptr += rows.to(tl.int64)[:, None] * M + unit
    stride = tl.full([], num_rows, tl.int64) * M
    s = tl.sum(y, 1) + eps
    y = y / s[:, None, :]
    tl.store(sums_ptr, s, mask=mask[:, None])
    for _ in range(ITERATIONS - 1):
        s = tl.sum(y, 2) + eps
        y = y / s[:, :, None]
        sums_ptr += stride
        tl.store(sums_ptr, s, mask=mask[:, None])
        s = tl.sum(y, 1) + eps
        y = y / s[:, None, :]
        sums_ptr += stride
        tl.store(sums_ptr, s, mask=mask[:, None])
    tl.store(y_ptr + at, y, mask=mask[:, None, None])


@triton.jit
def _backward(y_ptr, sums_ptr, g_ptr, out_ptr, num_rows, ITERATIONS: tl.constexpr, M: tl.constexpr,
              BLOCK_T: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = rows < num_rows
    i, j = tl.arange(0, M)[None, :, None], tl.arange(0, M)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * M * M + i * M + j
    y = tl.load(y_ptr + at, mask=mask[:, None, None], other=0.25)
    g = tl.load(g_ptr + at, mask=mask[:, None, None], other=0.0)
    unit = tl.arange(0, M)[None, :]
    stride = tl.full([], num_rows, tl.int64) * M
    sums_ptr += rows.to(tl.int64)[:, None] * M + unit + stride * (2 * ITERATIONS - 2)
    for _ in range(ITERATIONS - 1):
        s = tl.load(sums_ptr, mask=mask[:, None], other=1.0)
        g = (g - tl.sum(g * y, 1)[:, None, :]) / s[:, None, :]
        y = y * s[:, None, :]
        sums_ptr -= stride
        s = tl.load(sums_ptr, mask=mask[:, None], other=1.0)
        g = (g - tl.sum(g * y, 2)[:, :, None]) / s[:, :, None]
        y = y * s[:, :, None]
        sums_ptr -= stride
    s = tl.load(sums_ptr, mask=mask[:, None], other=1.0)
    g = (g - tl.sum(g * y, 1)[:, None, :]) / s[:, None, :]
    tl.store(out_ptr + at, g, mask=mask[:, None, None])


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, iterations: int, eps: float) -> Tensor:
        x = x.contiguous()
        rows, m = x.numel() // x.shape[-1] ** 2, x.shape[-1]
        y, sums = torch.empty_like(x), x.new_empty(2 * iterations - 1, rows, m)
        grid = (triton.cdiv(rows, BLOCK),)
        _forward[grid](x, y, sums, rows, eps, ITERATIONS=iterations, M=m, BLOCK_T=BLOCK)
        ctx.save_for_backward(y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        y, sums = ctx.saved_tensors
        out, (steps, rows, m) = torch.empty_like(y), sums.shape
        iterations = (steps + 1) // 2
        grid = (triton.cdiv(rows, BLOCK),)
        grad = grad.contiguous()
        _backward[grid](y, sums, grad, out, rows, ITERATIONS=iterations, M=m, BLOCK_T=BLOCK)
        return out, None, None


def sinkhorn(x: Tensor, iterations: int, eps: float) -> Tensor:
    """Positive ``(..., M, M)`` float32: columns and rows normalised in turn, columns last."""
    if x.is_cuda:
        y: Tensor = _Sinkhorn.apply(x, iterations, eps)
        return y
    return plain_sinkhorn(x, iterations, eps)


def plain_sinkhorn(x: Tensor, iterations: int, eps: float) -> Tensor:
    """The same in plain torch."""
    for step in range(2 * iterations - 1):
        x = x / (x.sum(-2 if step % 2 == 0 else -1, keepdim=True) + eps)
    return x
