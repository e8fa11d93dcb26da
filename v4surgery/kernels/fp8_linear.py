"""y = x W^T with FP8 activations (groups of 128) and FP8 weights (blocks of 128x128).

    y[t, n] = sum over groups g of  xs[t, g] * ws[n // 128, g] * p[t, n, g]
    p[t, n, g] = sum over the 128 inputs k of group g of  x[t, k] * w[n, k]

p is a product of its own for each group; scaled, it joins the float32 sum over groups, which is
rounded once to bf16. Scaling one running sum from group to group would save the second sum, but
Hopper's tensor cores keep about 14 bits of one: simulated over 4,096 inputs, an error of 1e-3 for
random signs and of 7e-2 for equal ones; fresh for each group, 1e-4 and 6e-4.

Codes are E4M3 bytes; below sm_89 they are decoded to bf16 and multiplied there. A program owns
BLOCK_M tokens and at most 128 outputs, which have one weight scale a group. Few tokens go to
fp8_linear_few, others on Hopper to fp8_linear_hopper.

Exact: decoding, products, powers of two. Rounded: sums, other weight scales, bf16.
Source: spec/forward.md, "Quantization in the official code"; spec/checkpoint.md, "Number formats".
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels import launch
from v4surgery.kernels.act_quant import act_quant
from v4surgery.kernels.codes import FP8_BLOCK, e8m0_to_float, narrow
from v4surgery.kernels.fp8_linear_few import as_codes, multiply, multiply_few

HOPPER = (9, 0)
FEW_TOKENS = 64
# Up to so many tokens codes are decoded to bf16, whose sums are whole float32: there is little to
# win, and short prompts, as CI has them, get the official code's roundings. With E4M3 products an
# expert's output was 1.7e-3 from the recorded one, where the reference is identical.
EXACT_TOKENS = 512
# Up to so many tokens every program quantizes them again, rather than wait for a launch.
FUSED_TOKENS = 16
# BLOCK_M, BLOCK_N, warps, stages: where the GPU multiplies E4M3, and where codes are decoded.
TILE, DECODED_TILE = (128, 128, 8, 3), (128, 64, 8, 3)
GROUP_M = 8


@triton.jit
def fp8_linear_kernel(
    y_ptr,
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    num_rows,
    num_out,
    num_in,
    stride_xm,
    stride_xsm,
    stride_wn,
    stride_sn,
    NATIVE: tl.constexpr,
    HAS_BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs near each other in time share tokens and weights in the cache.
    width = GROUP_M * tl.cdiv(num_out, BLOCK_N)
    first = tl.program_id(0) // width * GROUP_M
    size = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first, GROUP_M)
    m0 = (first + tl.program_id(0) % width % size) * BLOCK_M
    n0 = tl.program_id(0) % width // size * BLOCK_N

    rows = m0 + tl.arange(0, BLOCK_M)
    outs = n0 + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, FP8_BLOCK)
    has_row, has_out = rows < num_rows, outs < num_out
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + cols
    x_scale_ptrs = x_scale_ptr + rows.to(tl.int64) * stride_xsm
    weight_ptrs = weight_ptr + outs.to(tl.int64)[:, None] * stride_wn + cols
    scale_ptr += n0 // FP8_BLOCK * stride_sn

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(tl.cdiv(num_in, FP8_BLOCK)):
        col = group * FP8_BLOCK
        has_col = (col + cols < num_in)[None, :]
        x = tl.load(x_ptrs + col, mask=has_row[:, None] & has_col, other=0.0)
        weight = tl.load(weight_ptrs + col, mask=has_out[:, None] & has_col, other=0.0)
        x_scale = e8m0_to_float(tl.load(x_scale_ptrs + group, mask=has_row, other=0))
        scale = tl.load(scale_ptr + group)
        if HAS_BYTES:
            scale = e8m0_to_float(scale)
        product = multiply(x, tl.trans(weight), NATIVE)
        total = tl.fma(product, tl.broadcast_to((x_scale * scale)[:, None], product.shape), total)

    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * num_out + outs
    tl.store(y_ptrs, narrow(total, tl.bfloat16), mask=has_row[:, None] & has_out[None, :])


def fp8_linear(x: Tensor | tuple[Tensor, Tensor], weight: Tensor, scale: Tensor) -> Tensor:
    """Linear of the official code.

    Args:
        x: bf16 or float32 ``(..., in)``; or what act_quant makes of it, codes ``(..., in)`` and
            scale bytes ``(..., ceil(in/128))``, which several linears can share.
        weight: E4M3 codes, uint8 ``(out, in)``.
        scale: E8M0 bytes or float32 ``(ceil(out/128), ceil(in/128))``.

    Returns:
        bf16 ``(..., out)``.

    Raises:
        UsageError: A wrong shape, dtype or device.
    """
    values, x_scale = x if isinstance(x, tuple) else (x, None)
    device = launch.require_same_device("fp8_linear", values, x_scale, weight, scale)
    _check(values, x_scale, weight, scale)
    shape, (num_out, num_in) = values.shape[:-1], weight.shape
    y = torch.empty((shape.numel(), num_out), dtype=torch.bfloat16, device=device)
    if y.numel():
        if x_scale is None and len(y) > FUSED_TOKENS:
            values, x_scale = act_quant(values)
        if x_scale is not None:
            x_scale = _rows(x_scale.reshape(len(y), scale.shape[1]))
        values, weight = _rows(values.reshape(len(y), num_in)), _rows(weight)
        _multiply(y, values, x_scale, weight, _rows(scale))
    return y.view(*shape, num_out)


def _check(x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor) -> None:
    num_out, num_in = weight.shape
    num_groups = ceil(num_in / 128)
    launch.require_dtype("fp8_linear", "weight", weight, torch.uint8)
    launch.require_dtype("fp8_linear", "scale", scale, torch.uint8, torch.float32)
    launch.require_shape("fp8_linear", "scale", scale, (ceil(num_out / 128), num_groups))
    launch.require_shape("fp8_linear", "x", x, (*x.shape[:-1], num_in))
    if x_scale is None:
        launch.require_dtype("fp8_linear", "x", x, torch.bfloat16, torch.float32)
        return
    launch.require_dtype("fp8_linear", "x", x, torch.uint8)
    launch.require_dtype("fp8_linear", "the scale of x", x_scale, torch.uint8)
    launch.require_shape("fp8_linear", "the scale of x", x_scale, (*x.shape[:-1], num_groups))


def _rows(x: Tensor) -> Tensor:
    """The matrix with each row's elements next to each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def _multiply(y: Tensor, x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor) -> None:
    """Fill ``y`` by the kernel for so many tokens on this device."""
    is_native = launch.has_fp8(y.device)
    if len(y) <= FEW_TOKENS:
        multiply_few(y, x, x_scale, weight, scale, is_native)
        return
    assert x_scale is not None
    if len(y) <= EXACT_TOKENS:
        multiply_many(y, x, x_scale, weight, scale, False)
        return
    if launch.capability(y.device) == HOPPER:
        # Gluon needs a newer Triton than the rest, so it is imported only where it runs.
        from v4surgery.kernels import fp8_linear_hopper

        if fp8_linear_hopper.can_multiply(x, weight):
            fp8_linear_hopper.multiply(y, x, x_scale, weight, scale)
            return
    multiply_many(y, x, x_scale, weight, scale, is_native)


def multiply_many(
    y: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    is_native: bool,
    tile: tuple[int, int, int, int] | None = None,
) -> None:
    """Fill ``y``, any number of rows."""
    block_m, block_n, num_warps, num_stages = tile or (TILE if is_native else DECODED_TILE)
    grid = (triton.cdiv(y.shape[0], block_m) * triton.cdiv(y.shape[1], block_n),)
    fp8_linear_kernel[grid](
        y, as_codes(codes, is_native), x_scale, as_codes(weight, is_native), scale,
        *y.shape, codes.shape[1],
        codes.stride(0), x_scale.stride(0), weight.stride(0), scale.stride(0),
        NATIVE=is_native, HAS_BYTES=scale.dtype == torch.uint8,
        BLOCK_M=block_m, BLOCK_N=block_n, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
