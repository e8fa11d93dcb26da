"""RMS norm and then RoPE in one pass: rope(rms_norm(x)), bit for bit.

One program owns BLOCK_M whole rows, as in :mod:`v4surgery.kernels.rms_norm`, with the same tiles,
so that a row is summed in the same order; the normed row is rounded to the dtype of x, as the two
operations would between them, before it is rotated as in :mod:`v4surgery.kernels.rope`.

Exact and rounded: as those two say. Source: spec/forward.md, "Attention".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.kernels import launch
from v4surgery.kernels.codes import narrow, widen
from v4surgery.kernels.rms_norm import as_rows, normalised
from v4surgery.kernels.rope import require_rotatable, rotated, rotation_tile


@triton.jit
def norm_rope_kernel(
    x_ptr,
    weight_ptr,
    position_ptr,
    frequency_ptr,
    y_ptr,
    num_rows,
    num_cols,
    num_heads,
    num_pairs,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    rows, cols = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    is_col = cols < num_cols
    mask = (rows < num_rows)[:, None] & is_col[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    x = widen(tl.load(x_ptr + wide_rows * stride_xm + cols[None, :], mask=mask, other=0.0))
    y = normalised(x, num_cols, eps)
    if HAS_WEIGHT:
        y = y * widen(tl.load(weight_ptr + cols, mask=is_col, other=0.0))[None, :]
    y = widen(narrow(y, y_ptr.dtype.element_ty))
    heads = first + tl.arange(0, TOKENS)
    positions = tl.load(position_ptr + heads // num_heads, mask=heads < num_rows, other=0)
    y = rotated(y, positions, frequency_ptr, num_pairs, num_cols // 2 - num_pairs, False)
    y = narrow(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + wide_rows * num_cols + cols[None, :], y, mask=mask)


def norm_rope(
    x: Tensor, weight: Tensor | None, positions: Tensor, frequencies: Tensor, eps: float
) -> Tensor:
    """Normalise the last axis, round, and rotate its last ``2 * len(frequencies)`` dims.

    Args:
        x: bf16 or float32 ``(B, S, ..., H)``.
        weight: bf16 or float32 ``(H,)``, or None.
        positions: int64 ``(B, S)``.
        frequencies: Radians a position, float32 ``(R/2,)``.
        eps: Added to the mean square.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        UsageError: Another dtype, shape or device.
    """
    device = launch.require_same_device("norm_rope", x, weight, positions, frequencies)
    num_heads = require_rotatable("norm_rope", x, positions, frequencies)
    if weight is not None:
        launch.require_shape("norm_rope", "weight", weight, (x.shape[-1],))
        launch.require_dtype("norm_rope", "weight", weight, torch.bfloat16, torch.float32)
        weight = weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    if not x.numel():
        return y
    rows = as_rows(x)
    block_m, block_d, warps, num_positions = rotation_tile(x.shape[-1], num_heads)
    norm_rope_kernel[(triton.cdiv(rows.shape[0], block_m),)](
        rows,
        rows if weight is None else weight,
        positions.contiguous(),
        frequencies.contiguous(),
        y,
        *rows.shape,
        num_heads,
        len(frequencies),
        rows.stride(0),
        eps,
        HAS_WEIGHT=weight is not None,
        TOKENS=num_positions,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y
