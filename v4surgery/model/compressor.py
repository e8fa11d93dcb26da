"""The compressor: windows of ratio tokens become one entry each.

Source: spec/forward.md, "Compressor".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4surgery.config import CSA_RATIO, V4Config
from v4surgery.model.cache import CompressorCache, LayerCache, Progress
from v4surgery.model.linear import Linear
from v4surgery.model.norm import RMSNorm
from v4surgery.model.numerics import Numerics


class Compressor(nn.Module):
    """Compressed entries of a layer's attention, or of its indexer.

    Args:
        config: The model.
        ratio: Tokens a window; 4 has overlapping windows.
        head_dim: Of an entry: H, or Y for the indexer.
        name: Where its state lies in the layer's cache.
        frequencies: RoPE of the layer, float32 ``(R/2,)``.
        numerics: Shared settings.
    """

    frequencies: Tensor

    def __init__(
        self,
        config: V4Config,
        ratio: int,
        head_dim: int,
        name: str,
        frequencies: Tensor,
        numerics: Numerics,
    ) -> None:
        super().__init__()
        self.ratio, self.head_dim, self.name = ratio, head_dim, name
        self.overlap = ratio == CSA_RATIO
        self.numerics = numerics
        self.rope_dims = config.qk_rope_head_dim
        self.register_buffer("frequencies", frequencies, persistent=False)
        width = head_dim * (2 if self.overlap else 1)
        self.wkv = Linear(width, config.hidden_size, numerics)
        self.wgate = Linear(width, config.hidden_size, numerics)
        self.norm = RMSNorm(head_dim, config.rms_norm_eps, numerics)
        self.ape = nn.Parameter(torch.empty(ratio, width, device="meta"))

    def forward(self, x: Tensor, progress: Progress, cache: LayerCache) -> Tensor:
        """Add the call's tokens; all entries so far.

        Args:
            x: ``(B, S, D)``.
            progress: Where the rows are.
            cache: The layer's; its state is replaced.

        Returns:
            ``(B, C, H)``; row b's are valid up to (seen_b + length_b) // ratio.
        """
        state = self._state(x, cache)
        kv, gate = self.wkv.wide(x), self.wgate.wide(x)
        gate = gate + self.ape.float()[progress.positions % self.ratio]
        gate = gate.masked_fill(~progress.is_valid[..., None], float("-inf"))
        # Slots count from the first token that the state keeps: a whole number of windows back.
        kept = 2 * self.ratio if self.overlap else self.ratio
        origin = progress.seen // self.ratio * self.ratio - (kept - self.ratio)
        slot = progress.positions - origin[:, None]
        num_slots = -(-(kept + x.shape[1]) // self.ratio) * self.ratio
        all_kv, all_gate = _placed(state, kv, gate, slot, num_slots)
        entries = self._pool(all_kv, all_gate, origin)
        last = (progress.seen + progress.lengths) // self.ratio
        updated = self._stored(state.entries, entries, origin, progress, last)
        shift = last * self.ratio - (kept - self.ratio) - origin
        take = (shift[:, None] + torch.arange(kept, device=x.device))[..., None]
        take = take.clamp_max(num_slots - 1).expand(-1, -1, kv.shape[-1])
        is_open = (take[..., :1] + origin[:, None, None]) < (progress.seen + progress.lengths)[
            :, None, None
        ]
        cache.compressors[self.name] = CompressorCache(
            updated,
            all_kv.gather(1, take),
            all_gate.gather(1, take).masked_fill(~is_open, float("-inf")),
        )
        return updated

    def _state(self, x: Tensor, cache: LayerCache) -> CompressorCache:
        state = cache.compressors.get(self.name)
        if state is not None:
            return state
        kept = 2 * self.ratio if self.overlap else self.ratio
        shape = (x.shape[0], kept, self.wkv.out_features)
        kv = torch.zeros(shape, device=x.device)
        gate = torch.full(shape, float("-inf"), device=x.device)
        return CompressorCache(x.new_zeros(x.shape[0], 0, self.head_dim), kv, gate)

    def _pool(self, kv: Tensor, gate: Tensor, origin: Tensor) -> Tensor:
        """Entries of all windows from ``origin`` on, normalised and rotated."""
        kv, gate = (t.unflatten(1, (-1, self.ratio)) for t in (kv, gate))
        number = origin[:, None] // self.ratio + torch.arange(kv.shape[1], device=kv.device)
        # A window short of tokens is not used; all -inf would make it NaN. Before the first
        # window there is none, and -inf is its weight.
        is_whole = gate.isfinite().flatten(2).all(2) | (number < 0)
        gate = torch.where(is_whole[..., None, None], gate, torch.zeros_like(gate))
        pooled = self.numerics.ops.compressor_pool(kv, gate, overlap=self.overlap)
        first = origin // self.ratio + (1 if self.overlap else 0)
        windows = first[:, None] + torch.arange(pooled.shape[1], device=pooled.device)
        positions = (windows * self.ratio).clamp_min(0)
        return self.norm.rotated(pooled.to(self.numerics.dtype), positions, self.frequencies)

    def _stored(
        self,
        old: Tensor,
        new: Tensor,
        origin: Tensor,
        progress: Progress,
        last: Tensor,
    ) -> Tensor:
        """``old`` with the windows that this call completed."""
        capacity = max(progress.end // self.ratio, old.shape[1])
        grown = nn.functional.pad(old, (0, 0, 0, capacity - old.shape[1]))
        if not capacity:
            return grown
        first = origin // self.ratio + (1 if self.overlap else 0)
        column = torch.arange(capacity, device=new.device)
        is_new = (column >= (progress.seen // self.ratio)[:, None]) & (column < last[:, None])
        pick = (column - first[:, None]).clamp(0, new.shape[1] - 1)
        gathered = new.gather(1, pick[..., None].expand(-1, -1, new.shape[-1]))
        return torch.where(is_new[..., None], gathered, grown)


def _placed(
    state: CompressorCache, kv: Tensor, gate: Tensor, slot: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """State and new tokens side by side, by slot; ``(B, slots, c*H)`` each."""
    kept = state.kv.shape[1]
    extra = num_slots - kept
    all_kv = nn.functional.pad(state.kv, (0, 0, 0, extra))
    all_gate = nn.functional.pad(state.gate, (0, 0, 0, extra), value=float("-inf"))
    index = slot[..., None].expand_as(kv)
    return all_kv.scatter(1, index, kv), all_gate.scatter(1, index, gate)
