"""RMS norm: y = x * rsqrt(mean(x^2) + eps) in float32, times a weight if there is one.

One program owns BLOCK_M whole rows, which stay in registers between the sum and the product: every
element is read once and written once.

Rounded: the float32 sum of a row, by halves (an error that grows with the logarithm of its length);
rsqrt to 2 units in the last place; each product; the result, once, to the dtype of x. Products and
sums are not contracted, so that :mod:`v4surgery.kernels.norm_rope`, which has the same tiles, gets
the same bits. Source: spec/forward.md, head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels import launch
from v4surgery.kernels.codes import narrow, widen

# BLOCK_D up to which a row serves: elements of a program, warps. Lanes hold 8 neighbours each (4 of
# float32), so that the warps along a row, and with them the order of its sum, do not depend on the
# number of rows.
LANE_ELEMENTS = 256
TILES = ((256, 2048, 2), (512, 8192, 4), (2048, 4096, 4), (8192, 8192, 8))
LARGEST = 16  # warps


def row_tile(row_size: int, *, is_small: bool = False) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_D and warps for rows of a size; ``is_small`` for the fewest rows."""
    block = triton.next_power_of_2(row_size)
    for most, elements, warps in TILES:
        if block <= most:
            elements = LANE_ELEMENTS * warps if is_small else elements
            return max(elements // block, 1), block, warps
    return 1, block, LARGEST


def as_rows(x: Tensor) -> Tensor:
    """``(rows, D)`` with contiguous elements; a copy only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@triton.jit
def normalised(x, num_cols, eps):
    """Rows of float32 ``(BLOCK_M, BLOCK_D)``, zero beyond ``num_cols``, divided by their RMS."""
    mean = tl.sum(x * x, axis=1) / num_cols
    return x * tl.rsqrt(mean + eps)[:, None]


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    num_cols,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < num_cols
    mask = (rows < num_rows)[:, None] & is_col[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    x = widen(tl.load(x_ptr + wide_rows * stride_xm + cols[None, :], mask=mask, other=0.0))
    y = normalised(x, num_cols, eps)
    if HAS_WEIGHT:
        y = y * widen(tl.load(weight_ptr + cols, mask=is_col, other=0.0))[None, :]
    y = narrow(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + wide_rows * num_cols + cols[None, :], y, mask=mask)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis.

    Args:
        x: bf16 or float32 ``(..., D)``.
        weight: bf16 or float32 ``(D,)``, or None.
        eps: Added to the mean square.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    device = launch.require_same_device("rms_norm", x, weight)
    launch.require_dtype("rms_norm", "x", x, torch.bfloat16, torch.float32)
    if weight is not None:
        launch.require_shape("rms_norm", "weight", weight, (x.shape[-1],))
        launch.require_dtype("rms_norm", "weight", weight, torch.bfloat16, torch.float32)
        weight = weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    if not x.numel():
        return y
    rows = as_rows(x)
    block_m, block_d, warps = row_tile(x.shape[-1])
    rms_norm_kernel[(triton.cdiv(rows.shape[0], block_m),)](
        rows,
        rows if weight is None else weight,
        y,
        *rows.shape,
        rows.stride(0),
        eps,
        HAS_WEIGHT=weight is not None,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y
