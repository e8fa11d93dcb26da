"""Which experts a token goes to, and with what weights.

    score = sqrt(softplus(logit)), or softmax or sigmoid of the logits, in float32
    weight = score of the chosen / sum of theirs * scaling           chosen: best of score + bias

A program owns BLOCK_T tokens and all experts, and takes the best expert K times; equal ones go to
the lower number. log(1 + e^-|x|) is 2 atanh(u / (2 + u)), u = e^-|x|, as a series: the GPU's own
logarithm loses the digits of small results.

Rounded: exponentials, roots and sums, in float32. NaN among the scores is chosen first and makes
the weights NaN. Source: spec/forward.md, "Experts".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels.launch import require_dtype, require_same_device, require_shape

SCORING = ("sqrtsoftplus", "softmax", "sigmoid")
ELEMENTS = 1024
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) without any large exponential."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, u, 1.0) / (1.0 + u)


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e^-|x|), to a few float32 steps."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    square = s * s
    series = 1.0 / 15.0
    for term in tl.static_range(6, -1, -1):
        series = series * square + 1.0 / (2 * term + 1)
    return tl.where(x > 0.0, x, 0.0) + tl.where(x == x, 2.0 * s * series, x)


@triton.jit
def route_kernel(
    indices_ptr,
    weights_ptr,
    logits_ptr,
    bias_ptr,
    chosen_ptr,
    num_tokens,
    num_experts,
    scaling,
    stride_lm,
    TOPK: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CHOSEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)[None, :]
    slots = tl.arange(0, BLOCK_K)[None, :]
    has_token, exists = tokens < num_tokens, experts < num_experts
    logits_ptrs = logits_ptr + tokens[:, None] * stride_lm + experts
    logits = tl.load(logits_ptrs, mask=has_token[:, None] & exists, other=0.0)
    if SCORING == "sqrtsoftplus":
        scores = tl.sqrt_rn(softplus(logits))
    elif SCORING == "sigmoid":
        scores = sigmoid(logits)
    else:
        shifted = tl.where(exists, logits, float("-inf"))
        scores = tl.exp(shifted - tl.max(shifted, 1, keep_dims=True))
        scores = scores / tl.sum(scores, 1, keep_dims=True)
    steered = scores
    if HAS_BIAS:
        steered += tl.load(bias_ptr + experts, mask=exists, other=0.0)
    steered = tl.where(steered == steered, tl.maximum(steered, LOWEST), float("inf"))
    steered = tl.where(exists, steered, float("-inf"))

    indices = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for slot in tl.static_range(TOPK):
        if HAS_CHOSEN:
            expert = tl.load(chosen_ptr + tokens * TOPK + slot, mask=has_token, other=0)
        else:
            expert = tl.argmax(steered, 1).to(tl.int64)
            steered = tl.where(experts == expert[:, None], float("-inf"), steered)
        score = tl.sum(tl.where(experts == expert[:, None], scores, 0.0), 1)
        indices = tl.where(slots == slot, expert[:, None], indices)
        weights = tl.where(slots == slot, score[:, None], weights)
    if NORMALISE:
        weights = weights / tl.sum(weights, 1, keep_dims=True)
    mask = has_token[:, None] & (slots < TOPK)
    at = tokens[:, None] * TOPK + slots
    tl.store(weights_ptr + at, weights * scaling, mask=mask)
    if not HAS_CHOSEN:
        tl.store(indices_ptr + at, indices, mask=mask)


def route(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    *,
    topk: int,
    scoring_func: str,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Choose experts by score plus bias, or take the chosen ones of a hash table.

    Args:
        logits: float32 ``(T, E)``.
        bias: float32 ``(E,)``; steers the choice, not the weights.
        chosen: int64 ``(T, K)`` for hash layers, else None.
        topk: K.
        scoring_func: sqrtsoftplus, softmax or sigmoid.
        normalise: Divide by the sum of the chosen.
        scaling: routed_scaling_factor.

    Returns:
        Indices int64 ``(T, K)``, ``chosen`` if given; weights float32 ``(T, K)``.

    Raises:
        UsageError: A wrong shape, dtype, device or scoring function.
    """
    require_same_device("route", logits, bias, chosen)
    require_dtype("route", "logits", logits, torch.float32)
    num_tokens, num_experts = logits.shape
    if scoring_func not in SCORING:
        raise UsageError("unknown scoring_func", value=scoring_func, rule=", ".join(SCORING))
    if not 0 < topk <= num_experts:
        raise UsageError("topk is out of range", value=topk, rule=f"from 1 to {num_experts}")
    if bias is not None:
        require_dtype("route", "bias", bias, torch.float32)
        require_shape("route", "bias", bias, (num_experts,))
    if chosen is not None:
        require_dtype("route", "chosen", chosen, torch.int64)
        require_shape("route", "chosen", chosen, (num_tokens, topk))
        chosen = chosen.contiguous()
    weights = torch.empty(num_tokens, topk, dtype=torch.float32, device=logits.device)
    indices = chosen
    if indices is None:
        indices = torch.empty(num_tokens, topk, dtype=torch.int64, device=logits.device)
    if not num_tokens:
        return indices, weights
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(ELEMENTS // block_e, 1)
    route_kernel[(triton.cdiv(num_tokens, block_t),)](
        indices, weights, logits, logits if bias is None else bias.contiguous(), indices,
        num_tokens, num_experts, scaling, logits.stride(0),
        TOPK=topk, SCORING=scoring_func, NORMALISE=normalise and scoring_func != "softmax",
        HAS_BIAS=bias is not None, HAS_CHOSEN=chosen is not None,
        BLOCK_K=triton.next_power_of_2(topk), BLOCK_T=block_t, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return indices, weights
