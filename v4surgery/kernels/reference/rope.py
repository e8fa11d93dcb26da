"""RoPE on the last dims of a head, interleaved pairs (2i, 2i+1), in float32.

(a, b) at angle t * freq_i becomes (a cos - b sin, a sin + b cos); inverse rotates by -t.
Source: spec/forward.md, "Attention".
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        x: ``(B, S, ..., H)``.
        positions: int64 ``(B, S)``.
        frequencies: Radians a position, float32 ``(R/2,)``.
        inverse: Rotate back.
        inplace: Overwrite the rotated dims of ``x``, and touch no others.

    Returns:
        Shape and dtype of ``x``; with ``inplace`` ``x`` itself.
    """
    rope_dims = 2 * len(frequencies)
    angles = positions.float()[..., None] * frequencies
    angles = angles.reshape(*positions.shape, *(1,) * (x.dim() - 3), len(frequencies))
    cos, sin = angles.cos(), -angles.sin() if inverse else angles.sin()
    nope, rotated = x[..., :-rope_dims], x[..., -rope_dims:].float().unflatten(-1, (-1, 2))
    a, b = rotated.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    if inplace:
        x[..., -rope_dims:] = turned
        return x
    return torch.cat((nope, turned.to(x.dtype)), dim=-1)
