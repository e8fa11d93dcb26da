"""The routed experts of a layer, their SwiGLU, and the sum of what they give.

    h = silu(min(g, limit)) * clamp(u, -limit, limit) * weight        g = w1 x, u = w3 x
    y[t, k] = w2 h                                out[t] = shared[t] + sum over k of y[t, k]

experts sorts the slots (t, k) by expert and runs grouped products over the rows of each: two fused
ones for FP4 on Hopper (experts_hopper), else one for each matrix. swiglu: a program owns BLOCK
elements. combine_experts: a program owns BLOCK columns of one token.

Rounded: sums in float32; g, u, h, y and the total once to the dtype of x; in mode official x and h
to FP8. The total adds experts in ascending order, whatever the slots' order is.
Source: spec/forward.md, "Experts" and "Quantization in the official code".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import launch
from v4surgery.kernels.act_quant import act_quant_simulate
from v4surgery.kernels.codes import narrow, widen
from v4surgery.kernels.expert_rows import sort_slots
from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.kernels.grouped_linear import grouped_linear
from v4surgery.kernels.launch import require_dtype, require_same_device, require_shape
from v4surgery.kernels.routing import sigmoid

HOPPER = (9, 0)
FP8_GROUP = 128
BLOCK = 1024
# Rows of a tile: enough for the average expert, since decoding a matrix costs as much for few rows.
LEAST_ROWS, MOST_ROWS = 16, 128


@triton.jit
def swiglu_kernel(
    h_ptr,
    gate_ptr,
    up_ptr,
    weight_ptr,
    num_cols,
    limit,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = row * num_cols + cols, cols < num_cols
    gate = widen(tl.load(gate_ptr + at, mask=mask, other=0.0))
    up = widen(tl.load(up_ptr + at, mask=mask, other=0.0))
    # Comparisons, which are false for NaN, let it through.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    hidden = gate * sigmoid(gate) * up
    if HAS_WEIGHT:
        hidden = hidden * tl.load(weight_ptr + row)
    tl.store(h_ptr + at, narrow(hidden, h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine_experts_kernel(
    out_ptr,
    slots_ptr,
    indices_ptr,
    shared_ptr,
    num_cols,
    stride_sm,
    NUM_SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    slots = tl.arange(0, BLOCK_K)
    last: tl.constexpr = 0x7FFFFFFF
    experts = tl.load(indices_ptr + row * NUM_SLOTS + slots, mask=slots < NUM_SLOTS, other=last)
    theirs, their_slots = experts[None, :], slots[None, :]
    is_before = (theirs < experts[:, None]) | (
        (theirs == experts[:, None]) & (their_slots < slots[:, None])
    )
    rank = tl.sum(is_before.to(tl.int32), 1)
    total = widen(tl.load(shared_ptr + row * stride_sm + cols, mask=mask, other=0.0))
    for place in tl.static_range(NUM_SLOTS):
        slot = tl.sum(tl.where(rank == place, slots, 0), 0)
        at = (row * NUM_SLOTS + slot) * num_cols + cols
        total += widen(tl.load(slots_ptr + at, mask=mask, other=0.0))
    tl.store(out_ptr + row * num_cols + cols, narrow(total, out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """The hidden activations of an expert.

    Args:
        gate: bf16 or float32 ``(..., F)``.
        up: Likewise.
        limit: Clamp.
        weight: Routing weight, float32 ``(..., 1)``, or None for the shared expert.

    Returns:
        ``(..., F)``, dtype of ``gate``.

    Raises:
        UsageError: A wrong shape, dtype or device.
    """
    require_same_device("swiglu", gate, up, weight)
    require_dtype("swiglu", "gate", gate, torch.bfloat16, torch.float32)
    require_dtype("swiglu", "up", up, gate.dtype)
    require_shape("swiglu", "up", up, tuple(gate.shape))
    if weight is not None:
        require_dtype("swiglu", "weight", weight, torch.float32)
        require_shape("swiglu", "weight", weight, (*gate.shape[:-1], 1))
    hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not hidden.numel():
        return hidden
    num_cols = gate.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(num_cols))
    swiglu_kernel[(hidden.numel() // num_cols, triton.cdiv(num_cols, block))](
        hidden, gate.contiguous(), up.contiguous(),
        gate if weight is None else weight.contiguous(), num_cols, float(limit),
        HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return hidden


def combine_experts(slots: Tensor, indices: Tensor, shared: Tensor) -> Tensor:
    """What all experts give to each token.

    Args:
        slots: Of the routed experts, bf16 or float32 ``(T, K, D)``.
        indices: The expert of each slot, int64 ``(T, K)``; they are added in ascending order.
        shared: Of the shared expert, ``(T, D)``, dtype of ``slots``; its rows are contiguous.

    Returns:
        ``(T, D)``, summed in float32 and rounded once.

    Raises:
        UsageError: A wrong shape, dtype or device.
    """
    require_same_device("combine_experts", slots, indices, shared)
    require_dtype("combine_experts", "slots", slots, torch.bfloat16, torch.float32)
    require_dtype("combine_experts", "shared", shared, slots.dtype)
    require_dtype("combine_experts", "indices", indices, torch.int64)
    num_tokens, num_slots, num_cols = slots.shape
    require_shape("combine_experts", "indices", indices, (num_tokens, num_slots))
    require_shape("combine_experts", "shared", shared, (num_tokens, num_cols))
    out = torch.empty(shared.shape, dtype=shared.dtype, device=shared.device)
    if not out.numel():
        return out
    shared = shared if shared.stride(1) == 1 else shared.contiguous()
    block = min(BLOCK, triton.next_power_of_2(num_cols))
    combine_experts_kernel[(num_tokens, triton.cdiv(num_cols, block))](
        out, slots.contiguous(), indices.contiguous(), shared, num_cols, shared.stride(0),
        NUM_SLOTS=num_slots, BLOCK_K=triton.next_power_of_2(num_slots), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    w1: ExpertWeights,
    w2: ExpertWeights,
    w3: ExpertWeights,
    *,
    limit: float,
    official: bool,
    out: Tensor | None = None,
) -> Tensor:
    """What each chosen expert that is in memory gives to its token.

    Args:
        x: bf16 or float32 ``(T, D)``; bf16 in mode official.
        indices: Chosen experts, int64 ``(T, K)``, each below the number of experts.
        weights: Routing weights, float32 ``(T, K)``.
        w1: Gate matrices ``(F, D)``.
        w2: Down matrices ``(D, F)``.
        w3: Up matrices ``(F, D)``, of the experts that w1 and w2 have.
        limit: Clamp of SwiGLU.
        official: Round x and the hidden activations to FP8 where the weights have scales.
        out: Where to write ``(T, K, D)``, contiguous, for experts that come in batches.

    Returns:
        ``(T, K, D)``, dtype of ``x``, ``out`` if given. Slots of experts that are not in memory
        are left as they are in ``out``, else zero.

    Raises:
        UsageError: A wrong shape, dtype or device.
    """
    _require_fit(x, indices, weights, (w1, w2, w3), official)
    make = torch.empty if all(w1.is_present) else torch.zeros
    if out is None:
        out = make(*indices.shape, x.shape[1], dtype=x.dtype, device=x.device)
    require_shape("experts", "out", out, (*indices.shape, x.shape[1]))
    require_dtype("experts", "out", out, x.dtype)
    if not out.is_contiguous():
        raise UsageError(
            "out lies scattered", where="experts", value=out.stride(), rule="contiguous"
        )
    if not out.numel() or not w1.present:
        return out
    x, routing = x if x.stride(1) == 1 else x.contiguous(), weights.flatten()
    y = out.view(-1, x.shape[1])
    tile_rows = _tile_rows(x, len(y), len(w1.matrices))
    rows = sort_slots(indices.contiguous(), w1.addresses[0], tile_rows)
    is_rounded = official and w1.present[0][1] is not None
    if launch.capability(x.device) == HOPPER:
        # Gluon needs a newer Triton than the rest, so it is imported only where it runs.
        from v4surgery.kernels import experts_hopper

        if experts_hopper.serves(x, w1):
            matrices = (w1, w2, w3)
            experts_hopper.run_experts(y, x, rows, routing, matrices, limit, is_rounded)
            return out
    if is_rounded:
        x = act_quant_simulate(x, FP8_GROUP)
    shape = (len(y), w1.out_features)
    gate, up = (make(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    grouped_linear(gate, x, rows, w1, gather=True)
    grouped_linear(up, x, rows, w3, gather=True)
    hidden = swiglu(gate, up, limit, routing.index_select(0, rows.slots)[:, None])
    if is_rounded:
        hidden = act_quant_simulate(hidden, FP8_GROUP)
    grouped_linear(y, hidden, rows, w2, scatter=True)
    return out


def _tile_rows(x: Tensor, num_slots: int, num_experts: int) -> int:
    """Rows of a tile: a power of two; float32 multiplies without tensor cores, in small tiles."""
    if x.dtype == torch.float32:
        return LEAST_ROWS
    average = 1 << (num_slots // num_experts).bit_length()
    return min(max(average, LEAST_ROWS), MOST_ROWS)


def _require_fit(
    x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[ExpertWeights, ...], official: bool
) -> None:
    first = (matrix for each in matrices for matrix, _ in each.present[:1])
    require_same_device("experts", x, indices, weights, *first)
    dtypes = (torch.bfloat16,) if official else (torch.bfloat16, torch.float32)
    require_dtype("experts", "x", x, *dtypes)
    require_dtype("experts", "indices", indices, torch.int64)
    require_dtype("experts", "weights", weights, torch.float32)
    require_shape("experts", "indices", indices, (len(x), indices.shape[-1]))
    require_shape("experts", "weights", weights, tuple(indices.shape))
    outer, inner = x.shape[1], matrices[0].out_features
    expected = ((inner, outer), (outer, inner), (inner, outer))
    for name, each, shape in zip(("w1", "w2", "w3"), matrices, expected, strict=True):
        if each.is_present != matrices[0].is_present or each.format != matrices[0].format:
            raise UsageError(
                f"{name} and w1 differ",
                where="experts",
                value=f"{len(each.present)} matrices of {each.format or 'no format'}",
                rule=f"the same experts, {matrices[0].format or 'no format'}",
            )
        if each.present and (each.out_features, each.in_features) != shape:
            value = (each.out_features, each.in_features)
            raise UsageError(
                f"{name} has the wrong shape", where="experts", value=value, rule=str(shape)
            )
