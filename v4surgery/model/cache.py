"""What a layer remembers between calls: the window, compressed entries, the compressor's state.

Rows of a batch may be at different positions; each row's tokens are contiguous from position 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Progress:
    """How far each row of a batch is, and what a call adds.

    Attributes:
        seen: Tokens before this call, int64 ``(B,)``.
        positions: Position of each token of the call, int64 ``(B, S)``.
        lengths: Tokens of the call that count, int64 ``(B,)``; the rest is padding at the end.
        end: The most tokens that a row has after this call; known without asking the device.
    """

    seen: Tensor
    positions: Tensor
    lengths: Tensor
    end: int

    @classmethod
    def start(cls, batch: int, device: torch.device) -> Progress:
        """Before the first token."""
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zero, zero[:, None][:, :0], zero, 0)

    def advance(self, num_positions: int, lengths: Tensor | None = None) -> Progress:
        """The next call: ``num_positions`` tokens a row, of which ``lengths`` count."""
        seen = self.seen + self.lengths
        offsets = torch.arange(num_positions, device=seen.device)
        positions = seen[:, None] + offsets
        if lengths is None:
            lengths, end = torch.full_like(seen, num_positions), self.end + num_positions
        else:
            end = int((seen + lengths).max())
        return Progress(seen, positions, lengths, end)

    @property
    def is_valid(self) -> Tensor:
        """Which tokens of the call count, bool ``(B, S)``."""
        return self.positions < (self.seen + self.lengths)[:, None]


@dataclass
class CompressorCache:
    """Compressed entries so far, and the projected tokens of the windows still open.

    Attributes:
        entries: ``(B, C, H)``; row b has seen_b // ratio of them.
        kv: Projected tokens from the start of the window before the open one (CSA) or of the
            open one (HCA), float32 ``(B, L, c*H)``.
        gate: Their scores; -inf where there is no token.
    """

    entries: Tensor
    kv: Tensor
    gate: Tensor


@dataclass
class LayerCache:
    """State of one block.

    Attributes:
        window: The newest W keys, oldest first, ``(B, W, H)``.
        compressors: By module name: ``compressor``, ``indexer.compressor``.
    """

    window: Tensor | None = None
    compressors: dict[str, CompressorCache] = field(default_factory=dict)


@dataclass
class Cache:
    """State of a whole model: one LayerCache for each block prefix, and the progress."""

    layers: dict[str, LayerCache] = field(default_factory=dict)
    progress: Progress | None = None

    def layer(self, prefix: str) -> LayerCache:
        return self.layers.setdefault(prefix, LayerCache())
