"""The classic multi-token-prediction block.

Source: spec/forward.md, "MTP (classic)".
"""

from __future__ import annotations

from torch import Tensor

from v4surgery.catalogue import Block as BlockSpec
from v4surgery.config import V4Config
from v4surgery.model.block import Block
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.linear import Linear
from v4surgery.model.moe import Experts
from v4surgery.model.norm import RMSNorm
from v4surgery.model.numerics import Numerics


class MTPBlock(Block):
    """A block that predicts the token after the next one."""

    def __init__(
        self,
        config: V4Config,
        spec: BlockSpec,
        numerics: Numerics,
        experts: Experts | None = None,
    ) -> None:
        super().__init__(config, spec, numerics, experts)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj = Linear(hidden, hidden, numerics)
        self.h_proj = Linear(hidden, hidden, numerics)
        self.enorm = RMSNorm(hidden, eps, numerics)
        self.hnorm = RMSNorm(hidden, eps, numerics)
        self.norm = RMSNorm(hidden, eps, numerics)
        self.add_connection("head", config.hc_mult, 1)

    def draft(
        self,
        h: Tensor,
        embedded: Tensor,
        next_ids: Tensor,
        progress: Progress,
        cache: LayerCache,
    ) -> Tensor:
        """What the trunk's head turns into logits of the token after the next.

        Args:
            h: The trunk's streams ``(B, S, M, D)``.
            embedded: Embedding of the next ids ``(B, S, D)``.
            next_ids: int64 ``(B, S)``.
            progress: Where the rows are.
            cache: Of this block.

        Returns:
            ``(B, S, D)``.
        """
        mixed = self.e_proj(self.enorm(embedded))[:, :, None] + self.h_proj(self.hnorm(h))
        out: Tensor = self(mixed, next_ids, progress, cache)
        drafted: Tensor = self.norm(self.collapse_head(out))
        return drafted
