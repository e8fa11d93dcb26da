"""The indexer of CSA layers: which compressed entries a query sees.

Source: spec/forward.md, "Indexer".
"""

from __future__ import annotations

from torch import Tensor, nn

from v4surgery.config import V4Config
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.compressor import Compressor
from v4surgery.model.linear import Linear
from v4surgery.model.numerics import Numerics


class Indexer(nn.Module):
    """Scores compressed entries with small heads of its own and keeps the best index_topk."""

    def __init__(
        self, config: V4Config, ratio: int, frequencies: Tensor, numerics: Numerics
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.topk, self.ratio, self.numerics = config.index_topk, ratio, numerics
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.wq_b = Linear(self.num_heads * self.head_dim, config.q_lora_rank, numerics)
        self.weights_proj = Linear(self.num_heads, config.hidden_size, numerics)
        self.compressor = Compressor(
            config, ratio, self.head_dim, "indexer.compressor", frequencies, numerics
        )

    def forward(self, x: Tensor, qr: Tensor, progress: Progress, cache: LayerCache) -> Tensor:
        """Entries chosen for each query.

        Args:
            x: The layer's input ``(B, S, D)``.
            qr: Its query in the low rank ``(B, S, Q)``.
            progress: Where the rows are.
            cache: The layer's.

        Returns:
            int64 ``(B, S, Z)``; -1 where there are fewer past entries.
        """
        ops = self.numerics.ops
        q = self.wq_b(qr).unflatten(-1, (self.num_heads, self.head_dim))
        q = self.rounded(ops.rope(q, progress.positions, self.frequencies))
        k = self.rounded(self.compressor(x, progress, cache))
        weights = self.weights_proj(x).float() * (self.head_dim * self.num_heads) ** -0.5
        num_visible = (progress.positions + 1) // self.ratio
        chosen: Tensor = ops.indexer_topk(q, k, weights, num_visible, self.topk)
        return chosen

    def rounded(self, x: Tensor) -> Tensor:
        """Rotated, and in mode official rounded to FP4; scores do not change without rounding."""
        if not self.numerics.is_official:
            return x
        y: Tensor = self.numerics.ops.hadamard_fp4(x)
        return y
