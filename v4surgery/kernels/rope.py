"""RoPE on the last dims of a head, interleaved pairs (2i, 2i+1), in float32.

(a, b) at angle t * freq_i becomes (a cos - b sin, a sin + b cos); inverse rotates by -t.

One program owns BLOCK_M rows (heads of tokens) of the dims that are written: all of them, or in
place only the rotated ones. Cosines and sines are computed by the program, once for all rows that
are heads of one token.

Exact: dims that are not rotated; the angle is the float32 product that the reference takes.
Rounded: cosine and sine as the device's full-range cosf and sinf give them (2 units in the last
place at any angle; never the approximate instructions); two products and a sum, not contracted;
the result, once. Source: spec/forward.md, "Attention".
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import launch
from v4surgery.kernels.codes import narrow, widen
from v4surgery.kernels.rms_norm import as_rows, row_tile


@triton.jit
def rotated(x, positions, frequency_ptr, num_pairs, first_pair, INVERSE: tl.constexpr):
    """Rows of float32 ``(BLOCK_M, BLOCK_D)``, ``num_pairs`` pairs from ``first_pair`` on turned.

    ``positions`` are int64 ``(BLOCK_M,)``, or ``(1,)`` if they are the same for all rows.
    """
    PAIRS: tl.constexpr = x.shape[1] // 2
    pairs = tl.arange(0, PAIRS) - first_pair
    is_rotated = (pairs >= 0) & (pairs < num_pairs)
    frequency = tl.load(frequency_ptr + pairs, mask=is_rotated, other=0.0)
    angle = positions.to(tl.float32)[:, None] * frequency[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if INVERSE:
        sin = -sin
    a, b = tl.split(tl.reshape(x, (x.shape[0], PAIRS, 2)))
    turned_a = tl.where(is_rotated[None, :], a * cos - b * sin, a)
    turned_b = tl.where(is_rotated[None, :], a * sin + b * cos, b)
    return tl.reshape(tl.join(turned_a, turned_b), x.shape)


@triton.jit
def rope_kernel(
    x_ptr,
    position_ptr,
    frequency_ptr,
    y_ptr,
    num_rows,
    num_cols,
    num_heads,
    num_pairs,
    stride_xm,
    stride_ym,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    rows, cols = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    x = widen(tl.load(x_ptr + wide_rows * stride_xm + cols[None, :], mask=mask, other=0.0))
    heads = first + tl.arange(0, TOKENS)
    positions = tl.load(position_ptr + heads // num_heads, mask=heads < num_rows, other=0)
    y = rotated(x, positions, frequency_ptr, num_pairs, num_cols // 2 - num_pairs, INVERSE)
    y = narrow(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + wide_rows * stride_ym + cols[None, :], y, mask=mask)


def require_rotatable(operation: str, x: Tensor, positions: Tensor, frequencies: Tensor) -> int:
    """Check the arguments of a rotation; the heads of a token.

    Raises:
        UsageError: A wrong dtype or shape.
    """
    launch.require_dtype(operation, "x", x, torch.bfloat16, torch.float32)
    launch.require_dtype(operation, "positions", positions, torch.int64)
    launch.require_dtype(operation, "frequencies", frequencies, torch.float32)
    launch.require_shape(operation, "positions", positions, tuple(x.shape[:2]))
    launch.require_shape(operation, "frequencies", frequencies, (frequencies.numel(),))
    nope = x.shape[-1] - 2 * len(frequencies)
    if x.dim() < 3 or nope < 0 or nope % 2:
        raise UsageError(
            "x does not fit the frequencies",
            where=operation,
            value=f"{tuple(x.shape)} and {len(frequencies)} frequencies",
            rule="(B, S, ..., H) with H at least twice the frequencies, and even",
        )
    return math.prod(x.shape[2:-1])


def rotation_tile(row_size: int, num_heads: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_D, warps, and the positions of a program: one if its rows are of one token.

    Otherwise every row has its own cosines, and a program as few rows as its warps allow.
    """
    block_m, block_d, warps = row_tile(max(row_size, 2))
    if num_heads % block_m == 0:
        return block_m, block_d, warps, 1
    block_m, block_d, warps = row_tile(max(row_size, 2), is_small=True)
    return block_m, block_d, warps, block_m if num_heads % block_m else 1


def rope(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    inverse: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Rotate the last ``2 * len(frequencies)`` dims.

    Args:
        x: bf16 or float32 ``(B, S, ..., H)``.
        positions: int64 ``(B, S)``.
        frequencies: Radians a position, float32 ``(R/2,)``.
        inverse: Rotate back.
        inplace: Overwrite the rotated dims of ``x``, and touch no others.

    Returns:
        Shape and dtype of ``x``: contiguous, or with ``inplace`` ``x`` itself.

    Raises:
        UsageError: Another dtype, shape or device; ``inplace`` where the rows of ``x`` have no
            common stride.
    """
    device = launch.require_same_device("rope", x, positions, frequencies)
    num_heads = require_rotatable("rope", x, positions, frequencies)
    source = x
    if inplace:
        source = x[..., x.shape[-1] - 2 * len(frequencies) :]
    if not source.numel():
        return x if inplace else torch.empty(x.shape, dtype=x.dtype, device=device)
    rows = as_rows(source)
    if not inplace:
        y = torch.empty(x.shape, dtype=x.dtype, device=device)
        target = y.view(rows.shape)
    elif rows.data_ptr() == source.data_ptr():
        y, target = x, rows
    else:
        raise UsageError(
            "x cannot be rotated in place",
            where="rope",
            value=f"strides {x.stride()}",
            rule="one stride from row to row, and contiguous rows",
            hint="pass x.contiguous(), or inplace=False",
        )
    block_m, block_d, warps, num_positions = rotation_tile(rows.shape[1], num_heads)
    rope_kernel[(triton.cdiv(rows.shape[0], block_m),)](
        rows,
        positions.contiguous(),
        frequencies.contiguous(),
        target,
        *rows.shape,
        num_heads,
        len(frequencies),
        rows.stride(0),
        target.stride(0),
        INVERSE=inverse,
        TOKENS=num_positions,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y
