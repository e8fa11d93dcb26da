"""One layer: attention, then experts, each between hyper-connections."""

from __future__ import annotations

from torch import Tensor

from v4surgery.catalogue import Block as BlockSpec
from v4surgery.config import V4Config
from v4surgery.model.attention import Attention
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.hyper_connections import Connected
from v4surgery.model.moe import Experts, MoE
from v4surgery.model.norm import RMSNorm
from v4surgery.model.numerics import Numerics


class Block(Connected):
    """One layer: attention, then experts, each between hyper-connections."""

    def __init__(
        self,
        config: V4Config,
        spec: BlockSpec,
        numerics: Numerics,
        experts: Experts | None = None,
    ) -> None:
        super().__init__(config, numerics)
        self.prefix, self.index = spec.prefix, spec.index
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, numerics)
        self.attn = Attention(config, spec.ratio, numerics)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, numerics)
        self.ffn = MoE(config, numerics, is_hash=spec.is_hash, experts=experts)
        for name in ("attn", "ffn"):
            self.add_connection(name, (2 + config.hc_mult) * config.hc_mult, 3)

    def forward(self, h: Tensor, ids: Tensor, progress: Progress, cache: LayerCache) -> Tensor:
        """Streams ``(B, S, M, D)`` to streams; ids int64 ``(B, S)``."""
        x, post, comb = self.collapse("attn", h)
        h = self.expand(self.attn(self.attn_norm(x), progress, cache), h, post, comb)
        x, post, comb = self.collapse("ffn", h)
        return self.expand(self.ffn(self.ffn_norm(x), ids), h, post, comb)
