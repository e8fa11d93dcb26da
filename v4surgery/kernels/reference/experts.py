"""The routed experts of a layer, their SwiGLU, and the sum of what they give.

h = silu(min(g, limit)) * clamp(u, -limit, limit) * weight, in float32, rounded once before w2.
Source: spec/forward.md, "Experts".
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.kernels.reference.dequant import dequant_fp4, dequant_fp8
from v4surgery.kernels.reference.fp4_linear import fp4_linear
from v4surgery.kernels.reference.fp8_linear import fp8_linear


def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """The hidden activations of an expert.

    Args:
        gate: ``(..., F)``.
        up: ``(..., F)``.
        limit: Clamp.
        weight: Routing weight, float32 ``(..., 1)``, or None for the shared expert.

    Returns:
        ``(..., F)``, dtype of ``gate``.
    """
    hidden = torch.nn.functional.silu(gate.float().clamp(max=limit))
    hidden = hidden * up.float().clamp(-limit, limit)
    return (hidden if weight is None else hidden * weight).to(gate.dtype)


def combine_experts(slots: Tensor, indices: Tensor, shared: Tensor) -> Tensor:
    """What all experts give to each token.

    Args:
        slots: Of the routed experts, bf16 or float32 ``(T, K, D)``.
        indices: The expert of each slot, int64 ``(T, K)``; they are added in ascending order.
        shared: Of the shared expert, ``(T, D)``, dtype of ``slots``.

    Returns:
        ``(T, D)``, summed in float32 and rounded once.
    """
    total = shared.float()
    order = indices.argsort(dim=-1, stable=True)
    for slot in order.unbind(-1):
        total = total + slots[torch.arange(len(slots), device=slots.device), slot].float()
    return total.to(shared.dtype)


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
        out: Where to write ``(T, K, D)``, for experts that come in batches.

    Returns:
        ``(T, K, D)``, dtype of ``x``, ``out`` if given. Slots of experts that are not in memory
        are left as they are in ``out``, else zero.
    """
    y = x.new_zeros(*indices.shape, x.shape[1]) if out is None else out
    for expert in indices.unique().tolist():
        if w1.matrices[expert] is None:
            continue
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (_linear(x[token], each, expert, official) for each in (w1, w3))
        hidden = swiglu(gate, up, limit, weights[token, slot, None])
        y[token, slot] = _linear(hidden, w2, expert, official)
    return y


def _linear(x: Tensor, weights: ExpertWeights, expert: int, official: bool) -> Tensor:
    matrix = weights.matrices[expert]
    assert matrix is not None
    weight, scale = matrix
    if scale is None:
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    is_fp4 = weights.format == "fp4"
    if official:
        return (fp4_linear if is_fp4 else fp8_linear)(x, weight, scale)
    dense = (dequant_fp4 if is_fp4 else dequant_fp8)(weight, scale, x.dtype)
    return torch.nn.functional.linear(x, dense)
