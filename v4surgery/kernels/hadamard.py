"""The Hadamard rotation of the indexer's q and k, divided by the root of its size; also to FP4.

    for half = 1, 2, 4, ... SIZE/2:   (a, b) = (x[i], x[i + half])  ->  (a + b, a - b)
    y = x / sqrt(SIZE)

SIZE is the largest power of two that divides a row; other rows' rotation is block-diagonal. A
program owns BLOCK_M rows, padded with zeros to PARTS x WIDTH. Its tile is (PARTS * BLOCK_M, WIDTH),
parts first: a thread holds 8 neighbours of every part of its rows, and only the steps between 8
and WIDTH pass through other threads.

Rounded: float32 sums, in the order above, then once to the dtype of the row; ``hadamard_fp4``
rounds that to FP4 as fp4_quant.py does. Source: spec/forward.md, "Indexer"; spec/slicing.md,
trap 11.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.act_quant import rows_of
from v4surgery.kernels.codes import FP4_GROUP, narrow, widen
from v4surgery.kernels.fp4_quant import round_groups

MAX_SIZE = 4096

# Neighbours in a part of a row; elements and warps of a program.
PART_WIDTH = 32
TILE = (4096, 4)


@triton.jit
def _butterfly(x, DISTANCE: tl.constexpr):
    """Sums and differences of the elements that lie DISTANCE apart in row-major order."""
    pairs = tl.reshape(x, [x.numel // (2 * DISTANCE), 2, DISTANCE])
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, (0, 2, 1)), x.shape)


@triton.jit
def _hadamard_kernel(
    y_ptr,
    x_ptr,
    num_rows,
    num_cols,
    stride_xm,
    TO_FP4: tl.constexpr,
    STEPS: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    slot = tl.arange(0, PARTS * BLOCK_M)[:, None]
    row = tl.program_id(0) * BLOCK_M + slot % BLOCK_M
    col = slot // BLOCK_M * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (row < num_rows) & (col < num_cols)
    x = widen(tl.load(x_ptr + row.to(tl.int64) * stride_xm + col, mask=mask, other=0))
    for step in tl.static_range(STEPS):
        x = _butterfly(x, (1 << step) * (1 if (1 << step) < WIDTH else BLOCK_M))
    y = narrow(x * FACTOR, DTYPE)
    if TO_FP4:
        JOIN: tl.constexpr = GROUP // WIDTH
        groups = tl.reshape(widen(y), [PARTS // JOIN, JOIN, BLOCK_M, WIDTH])
        groups = tl.reshape(tl.permute(groups, (0, 2, 1, 3)), [PARTS // JOIN, BLOCK_M, GROUP])
        groups = tl.reshape(round_groups(groups), [PARTS // JOIN, BLOCK_M, JOIN, WIDTH])
        groups = tl.reshape(tl.permute(groups, (0, 2, 1, 3)), [PARTS * BLOCK_M, WIDTH])
        y = narrow(groups, DTYPE)
    tl.store(y_ptr + row.to(tl.int64) * num_cols + col, y, mask=mask)


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last axis, in float32, rounded once.

    Args:
        x: bf16 or float32 ``(..., Y)``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        UsageError: A wrong dtype or device, or rows above 4096.
    """
    return _launch("hadamard", x, to_fp4=False)


def hadamard_fp4(x: Tensor) -> Tensor:
    """The rotation, rounded to the dtype of ``x``, then to FP4 and back in groups of 32.

    Args:
        x: bf16 or float32 ``(..., Y)``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        UsageError: A wrong dtype or device, or rows above 4096.
    """
    return _launch("hadamard_fp4", x, to_fp4=True)


def _launch(operation: str, x: Tensor, *, to_fp4: bool) -> Tensor:
    rows = rows_of(operation, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    num_rows, num_cols = rows.shape
    if num_cols > MAX_SIZE:
        raise UsageError(
            "rows are too long", where=operation, value=num_cols, rule=f"at most {MAX_SIZE}"
        )
    padded = triton.next_power_of_2(num_cols)
    width = min(PART_WIDTH, padded)
    parts = padded // width
    size = num_cols & -num_cols
    elements, num_warps = TILE
    block = max(elements // (parts * width), 1)
    _hadamard_kernel[(triton.cdiv(num_rows, block),)](
        y, rows, num_rows, num_cols, rows.stride(0), to_fp4, size.bit_length() - 1, size**-0.5,
        min(FP4_GROUP.value, padded), parts, block, width, num_warps=num_warps,
    )  # fmt: skip
    return y
