"""Streams and the layers that change them: scores of the whole model.

Source: ShortGPT, arXiv:2403.03853, for block influence, there of one stream. Minitron,
arXiv:2407.14679, for hidden channels by the outputs of norms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from v4surgery.importance.names import key_of
from v4surgery.importance.probes.probe import Probe, on_input, on_output, steps_of, tokens_of
from v4surgery.importance.totals import Totals
from v4surgery.model.block import Block
from v4surgery.model.ends import Collapse

INFLUENCE = key_of("influence", "layers")


class ChannelsProbe(Probe):
    """``energy`` of channels: in the streams before a block, and in both norms' outputs."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        return [
            on_input(block, lambda h: add_channels(self.model, tokens_of(h))),
            on_output(block.attn_norm, lambda x: add_channels(self.model, tokens_of(x))),
            on_output(block.ffn_norm, lambda x: add_channels(self.model, tokens_of(x))),
        ]


class StreamsProbe(Probe):
    """``energy`` of streams before a block."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        return [on_input(block, lambda h: add_streams(self.model, tokens_of(h)))]


class LayersProbe(Probe):
    """``influence``: mean of 1 - cos(streams before, streams after), all streams as one vector."""

    def attach(self, block: Block) -> list[RemovableHandle]:
        seen: dict[str, Tensor] = {}

        def after(h: Tensor) -> None:
            layers = torch.zeros(block.config.num_hidden_layers, dtype=torch.float64)
            counts = layers.clone()
            for a, b in zip(steps_of(seen.pop("before")), steps_of(h), strict=True):
                layers[block.index] += (1 - cosines(a.flatten(1), b.flatten(1))).sum().cpu()
                counts[block.index] += len(a)
            self.model.add(INFLUENCE, layers, counts)

        return [on_input(block, lambda h: seen.update(before=h)), on_output(block, after)]


def add_end(model: Totals, head: Collapse, h: Tensor, *, channels: bool, streams: bool) -> None:
    """What the end of the trunk adds: streams after the last block, and the last norm's output."""
    if channels:
        add_channels(model, tokens_of(h))
        add_channels(model, tokens_of(head(h)))
    if streams:
        add_streams(model, tokens_of(h))


def add_channels(model: Totals, x: Tensor) -> None:
    """Each channel's energy relative to the mean of the token's channels: ``(T, ..., D)``."""
    energy = x.square() if x.dim() == 2 else x.square().sum(1)
    _add_relative(model, key_of("energy", "hidden_size"), energy)


def add_streams(model: Totals, h: Tensor) -> None:
    """Each stream's energy relative to the mean of the token's streams: ``(T, M, D)``."""
    _add_relative(model, key_of("energy", "streams"), h.square().sum(2))


def _add_relative(model: Totals, key: str, energy: Tensor) -> None:
    energy = energy.double()
    mean = energy.mean(1, keepdim=True)
    relative = energy / torch.where(mean > 0, mean, torch.ones_like(mean))
    model.add(key, relative.sum(0), len(energy))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows, float64; 1 where both are zero, 0 where one is."""
    a, b = a.double(), b.double()
    product, sizes = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
    alike = (a == b).all(1).double()
    return torch.where(sizes > 0, product / torch.where(sizes > 0, sizes, 1.0), alike)
