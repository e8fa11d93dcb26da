"""RMS norms over kept units, and the residual streams of the masked parent.

Source: spec/forward.md, "Residual streams (mHC)".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from v4surgery.config import V4Config
from v4surgery.validation.masked.masks import Masks
from v4surgery.validation.masked.weights import Weights


def masked_norm(x: Tensor, mask: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """RMS norm of the last axis, its mean over what the mask keeps; zero elsewhere."""
    mean = (x.square() * mask).sum(-1, keepdim=True) / mask.sum()
    normed = x * mask * torch.rsqrt(mean + eps)
    return normed if weight is None else normed * weight


class Mixing(NamedTuple):
    """How a sublayer's output joins the streams: post ``(S, M)``, comb ``(S, M, M)``."""

    post: Tensor
    comb: Tensor


class MaskedStreams:
    """The connections of one block, or the head's: streams ``(S, M, D)`` in the parent's shape."""

    def __init__(self, config: V4Config, masks: Masks, weight: Weights) -> None:
        self.config, self.masks, self.weight = config, masks, weight

    def norm(self, name: str, x: Tensor) -> Tensor:
        """A norm over the kept channels."""
        return masked_norm(x, self.masks.channel_D, self.config.rms_norm_eps, self.weight(name))

    def collapse(self, part: str, h: Tensor) -> tuple[Tensor, Mixing]:
        """The input of a sublayer ``(S, D)``, and how its output will join."""
        streams, eps = self.config.hc_mult, self.config.hc_eps
        scale, base = self.weight(f"hc_{part}_scale"), self.weight(f"hc_{part}_base")
        mixes = self._mixes(f"hc_{part}_fn", h)
        alive = self.masks.stream_M
        pre = (torch.sigmoid(mixes[:, :streams] * scale[0] + base[:streams]) + eps) * alive
        wide = slice(streams, 2 * streams)
        post = 2 * torch.sigmoid(mixes[:, wide] * scale[1] + base[wide]) * alive
        comb = mixes[:, 2 * streams :] * scale[2] + base[2 * streams :]
        comb = self._doubly_stochastic(comb.unflatten(1, (streams, streams)))
        return torch.einsum("sm,smd->sd", pre, h), Mixing(post, comb)

    def collapse_head(self, h: Tensor) -> Tensor:
        """The input of the last norm, ``(S, D)``."""
        mixes = self._mixes("hc_head_fn", h)
        pre = torch.sigmoid(mixes * self.weight("hc_head_scale") + self.weight("hc_head_base"))
        pre = (pre + self.config.hc_eps) * self.masks.stream_M
        return torch.einsum("sm,smd->sd", pre, h)

    def expand(self, y: Tensor, h: Tensor, mixing: Mixing) -> Tensor:
        """Streams after a sublayer with output ``(S, D)``."""
        return mixing.post[:, :, None] * y[:, None] + torch.einsum("smn,smd->snd", mixing.comb, h)

    def _mixes(self, name: str, h: Tensor) -> Tensor:
        """The normalised streams projected, ``(S, rows)``; removed streams and channels unseen."""
        live = h * self.masks.stream_M[:, None] * self.masks.channel_D
        count = self.masks.stream_M.sum() * self.masks.channel_D.sum()
        mean = live.square().sum((1, 2)) / count
        fn = self.weight(name).unflatten(1, h.shape[1:])
        projected = torch.einsum("smd,omd->so", live, fn)
        return projected * torch.rsqrt(mean + self.config.rms_norm_eps)[:, None]

    def _doubly_stochastic(self, comb: Tensor) -> Tensor:
        """Sinkhorn among the kept streams: no other stream is in any sum."""
        kept, eps = self.masks.stream_M, self.config.hc_eps
        alive = kept[:, None] * kept
        comb = comb.masked_fill(kept == 0, float("-inf")).softmax(2)
        comb = (comb + eps) * alive
        for axis in (1, *(2, 1) * (self.config.hc_sinkhorn_iters - 1)):
            sums = (comb.sum(axis, keepdim=True) + eps).clamp_min(torch.finfo(comb.dtype).tiny)
            comb = comb / sums
        return comb
