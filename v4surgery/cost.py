"""What serving a V4 costs at some context, beside V3.2: KV cache and FLOPs of one more token.

A formula that gives the figures of the V4 paper at 1M tokens (Pro 27 % of V3.2's FLOPs and 10 % of
its KV cache, Flash 10 % and 7 %; this one 26.8, 10.3, 10.0 and 7.2 %):

* KV cache, bytes a token: of every compressed layer one entry for ``ratio`` tokens, H - R dims in
  FP8 and R in BF16, beside it the indexer's Y dims in FP4. Sliding windows do not grow with the
  context; they are given beside the sum.
* FLOPs a token, in FP8 ones (BF16 counts double, FP4 half): 2 for each active parameter but the
  embedding's; attention in BF16 over the window and the entries seen, keys and values H wide; the
  indexer's scores in FP4 over all entries of a CSA layer.
* V3.2: 61 layers, 656 bytes of latent and 132 of indexer a token; 37e9 active parameters, 128 heads
  of 576 and 512 dims over 2048 chosen tokens in BF16, an indexer of 64 heads of 128 dims in FP8.

Source: spec/forward.md, "The paper's cost table, to reproduce from a config".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from v4surgery.catalogue import Catalogue
from v4surgery.config import CSA_RATIO, V4Config

V32_LAYERS = 61
V32_ACTIVE_PARAMETERS = 37e9
V32_TOPK = 2048
V32_KV_BYTES = 656 + 132
V32_HEADS, V32_KEY_AND_VALUE = 128, 576 + 512
V32_INDEX_HEADS, V32_INDEX_DIM = 64, 128


@dataclass(frozen=True)
class Cost:
    """KV cache and work at a context of some tokens.

    Attributes:
        context: Tokens before the next one.
        kv_bytes_per_token: By which the cache grows.
        window_bytes: Of the sliding windows, which stay as they are.
        flops: Of the next token.
        v32_kv_bytes_per_token: The same of V3.2.
        v32_flops: The same of V3.2.
    """

    context: int
    kv_bytes_per_token: float
    window_bytes: int
    flops: float
    v32_kv_bytes_per_token: int
    v32_flops: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, with sums over the context and shares of V3.2."""
        return {
            "context": self.context,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes": round(self.kv_bytes_per_token * self.context),
            "window_bytes": self.window_bytes,
            "flops_per_token": self.flops,
            "v32": {
                "kv_bytes_per_token": self.v32_kv_bytes_per_token,
                "kv_bytes": self.v32_kv_bytes_per_token * self.context,
                "flops_per_token": self.v32_flops,
            },
            "kv_share": self.kv_bytes_per_token / self.v32_kv_bytes_per_token,
            "flops_share": self.flops / self.v32_flops,
        }


def cost_of(catalogue: Catalogue, context: int) -> Cost:
    """The cost of a model at a context; drafters are left out.

    Args:
        catalogue: Of the model.
        context: Tokens, at least 1.
    """
    config = catalogue.config
    ratios = config.compress_ratios[: config.num_hidden_layers]
    entry_bytes = config.nope_head_dim + 2 * config.qk_rope_head_dim
    kv_bytes = sum(
        (entry_bytes + (config.index_head_dim / 2 if ratio == CSA_RATIO else 0)) / ratio
        for ratio in ratios
        if ratio
    )
    active = catalogue.num_active_parameters() - config.vocab_size * config.hidden_size
    return Cost(
        context=context,
        kv_bytes_per_token=kv_bytes,
        window_bytes=len(ratios) * min(config.sliding_window, context) * entry_bytes,
        flops=2 * active + sum(_layer_flops(config, ratio, context) for ratio in ratios),
        v32_kv_bytes_per_token=V32_LAYERS * V32_KV_BYTES,
        v32_flops=_v32_flops(context),
    )


def _layer_flops(config: V4Config, ratio: int, context: int) -> float:
    """Attention and indexer of one layer."""
    entries = context / ratio if ratio else 0.0
    seen = min(config.index_topk, entries) if ratio == CSA_RATIO else entries
    positions = min(config.sliding_window, context) + seen
    key_and_value = 2 * config.head_dim
    attention = 2 * (2 * config.num_attention_heads * key_and_value * positions)
    if ratio != CSA_RATIO:
        return attention
    return attention + 0.5 * (2 * config.index_n_heads * config.index_head_dim * entries)


def _v32_flops(context: int) -> float:
    attention = 2 * (2 * V32_HEADS * V32_KEY_AND_VALUE * min(V32_TOPK, context))
    indexer = 2 * V32_INDEX_HEADS * V32_INDEX_DIM * context
    return 2 * V32_ACTIVE_PARAMETERS + V32_LAYERS * (attention + indexer)


__all__ = ["Cost", "cost_of"]
