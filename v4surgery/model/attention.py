"""Attention with one shared key/value head, a sliding window, and compressed entries.

Source: spec/forward.md, "Attention".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4surgery.config import CSA_RATIO, V4Config
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.compressor import Compressor
from v4surgery.model.indexer import Indexer
from v4surgery.model.linear import Linear
from v4surgery.model.norm import RMSNorm
from v4surgery.model.numerics import Numerics
from v4surgery.model.rope import rope_frequencies


class Attention(nn.Module):
    """The attention of one block; ``ratio`` decides its kind."""

    frequencies: Tensor

    def __init__(self, config: V4Config, ratio: int, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.ratio, self.numerics = config, ratio, numerics
        heads, head_dim, hidden = (
            config.num_attention_heads,
            config.head_dim,
            config.hidden_size,
        )
        frequencies = rope_frequencies(config, ratio)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.wq_a = Linear(config.q_lora_rank, hidden, numerics)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, numerics)
        self.wq_b = Linear(heads * head_dim, config.q_lora_rank, numerics)
        self.wkv = Linear(head_dim, hidden, numerics)
        self.kv_norm = RMSNorm(head_dim, config.rms_norm_eps, numerics)
        self.attn_sink = nn.Parameter(torch.empty(heads, device="meta"))
        group_width = heads * head_dim // config.o_groups
        self.wo_a = Linear(config.o_groups * config.o_lora_rank, group_width, numerics)
        self.wo_b = Linear(hidden, config.o_groups * config.o_lora_rank, numerics)
        self.heads = nn.Identity()  # where hooks see each head's output, (B, S, N, H)
        self.compressor = (
            Compressor(config, ratio, head_dim, "compressor", frequencies, numerics)
            if ratio
            else None
        )
        self.indexer = Indexer(config, ratio, frequencies, numerics) if ratio == CSA_RATIO else None

    def forward(self, x: Tensor, progress: Progress, cache: LayerCache) -> Tensor:
        """``(B, S, D)`` to ``(B, S, D)``; the cache takes the call's tokens."""
        config, ops = self.config, self.numerics.ops
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (config.num_attention_heads, config.head_dim))
        q = ops.norm_rope(q, None, progress.positions, self.frequencies, config.rms_norm_eps)
        kv = self.kv_norm.rotated(self.wkv(x), progress.positions, self.frequencies)
        keys, index = self._window(self.rounded(kv), progress, cache)
        if self.compressor is not None:
            entries = self.rounded(self.compressor(x, progress, cache))
            chosen = self._visible(x, qr, entries.shape[1], progress, cache)
            index = torch.cat((index, torch.where(chosen < 0, -1, chosen + keys.shape[1])), -1)
            keys = torch.cat((keys, entries), 1)
        out = ops.sparse_attention(q, keys, self.attn_sink, index, config.head_dim**-0.5)
        out = ops.rope(out, progress.positions, self.frequencies, inverse=True, inplace=True)
        return self.output(self.heads(out))

    def output(self, out: Tensor) -> Tensor:
        """Each group's heads to its low rank, and all groups to the hidden size."""
        config = self.config
        grouped = out.flatten(-2).unflatten(-1, (config.o_groups, -1))
        wo_a = self.wo_a.dense(out.dtype).unflatten(0, (config.o_groups, config.o_lora_rank))
        low = torch.einsum("bsgd,gld->bsgl", grouped, wo_a)
        y: Tensor = self.wo_b(low.flatten(-2))
        return y

    def rounded(self, kv: Tensor) -> Tensor:
        """In mode official the dims without position go to FP8 and back, in groups of 64."""
        if not self.numerics.is_official:
            return kv
        nope = self.config.head_dim - self.config.qk_rope_head_dim
        rounded: Tensor = self.numerics.ops.act_quant_simulate(kv, 64, num_cols=nope)
        return rounded

    def _window(self, kv: Tensor, progress: Progress, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Keys ``(B, W + S, H)``, and for each query the W that it may see, -1 before the start."""
        size, (batch, num_new, _) = self.config.sliding_window, kv.shape
        old = cache.window
        if old is None:
            old = kv.new_zeros(batch, size, kv.shape[-1])
        keys = torch.cat((old, kv), 1)
        # The query at offset s of the call sees slots s + 1 ... s + W; slot j is position
        # seen - W + j.
        device = kv.device
        slots = (
            torch.arange(1, size + 1, device=device) + torch.arange(num_new, device=device)[:, None]
        )
        index = slots.expand(batch, -1, -1)
        index = torch.where(index >= (size - progress.seen)[:, None, None], index, -1)
        kept = progress.lengths[:, None] + torch.arange(size, device=device)
        cache.window = keys.gather(1, kept[..., None].expand(-1, -1, kv.shape[-1]))
        return keys, index

    def _visible(
        self, x: Tensor, qr: Tensor, num_entries: int, progress: Progress, cache: LayerCache
    ) -> Tensor:
        """Compressed entries that each query sees, ``(B, S, Z)``: the best, or all past ones."""
        if self.indexer is not None:
            chosen: Tensor = self.indexer(x, qr, progress, cache)
            return chosen
        entries = torch.arange(num_entries, device=x.device)
        is_past = entries < ((progress.positions + 1) // self.ratio)[..., None]
        return torch.where(is_past, entries, -1)
