"""RMS norm, rounded to the dtype of its input, and then RoPE."""

from __future__ import annotations

from torch import Tensor

from v4surgery.kernels.reference.rms_norm import rms_norm
from v4surgery.kernels.reference.rope import rope


def norm_rope(
    x: Tensor, weight: Tensor | None, positions: Tensor, frequencies: Tensor, eps: float
) -> Tensor:
    """Normalise the last axis, round, and rotate its last ``2 * len(frequencies)`` dims.

    Args:
        x: ``(B, S, ..., H)``.
        weight: ``(H,)``, or None.
        positions: int64 ``(B, S)``.
        frequencies: Radians a position, float32 ``(R/2,)``.
        eps: Added to the mean square.

    Returns:
        Shape and dtype of ``x``.
    """
    return rope(rms_norm(x, weight, eps), positions, frequencies)
