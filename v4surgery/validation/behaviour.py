"""Grade three of faithfulness: a replica's activations beside its parent's, layer by layer.

Parent and replica go through the layers in step, so that no more than one block of each, and the
streams between blocks, are in memory. Each replica block runs twice: *free*, on what the replica
computed so far, and *taught*, on the parent's input to the block's source, cut to the replica's
coordinates, which shows what this block alone adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError
from v4surgery.model.block import Block
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import BlockTiming, Streamer, StreamOptions
from v4surgery.slicers.selection import BlockSelection
from v4surgery.validation.mapping import TAP_AXES, ReplicaMapping
from v4surgery.validation.measures import (
    Alignment,
    Closeness,
    LogitAgreement,
    RouterAgreement,
)
from v4surgery.validation.taps import MODEL_TAPS, TapRecorder

FREE, TAUGHT = "free", "taught"
WAYS = (FREE, TAUGHT)
BLOCK_TAPS = tuple(tap for tap in TAP_AXES if tap not in MODEL_TAPS)
GATE = "gate.indices"
Values = dict[str, Tensor]


@dataclass
class LayerBehaviour:
    """One block of the replica beside its source.

    Attributes:
        target: The replica's block, ``layers.3.``.
        source: The parent's block.
        kind: Compress ratio, and whether routing is by hash.
        taps: For each way, how close each tap is.
        router: For each way, whether tokens go to the same experts.
        cka: For each way, linear CKA of all of the parent's channels and all of the replica's, of
            ``out`` averaged over its streams; empty where both have as many channels.
    """

    target: str
    source: str
    kind: str
    taps: dict[str, dict[str, Closeness]] = field(default_factory=lambda: {way: {} for way in WAYS})
    router: dict[str, RouterAgreement] = field(
        default_factory=lambda: {way: RouterAgreement() for way in WAYS}
    )
    cka: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "source": self.source,
            "kind": self.kind,
            "taps": {
                way: {tap: close.to_json() for tap, close in taps.items()}
                for way, taps in self.taps.items()
            },
            "router": {
                way: {"share": router.share, "same_sets": router.same_sets}
                for way, router in self.router.items()
            },
            "cka": self.cka,
        }


@dataclass
class Behaviour:
    """A replica beside its parent, on some prompts.

    Attributes:
        layers: Each block of the trunk, in order.
        embed: Rows of the embedding.
        logits: Predictions, running freely.
        num_tokens: Of all prompts.
        ran: Operations that ran, by model and name.
        bytes_read: By model.
        timings: Of the parent's blocks, with the replica's inside them.
    """

    layers: list[LayerBehaviour]
    embed: Closeness
    logits: LogitAgreement
    num_tokens: int = 0
    ran: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes_read: dict[str, int] = field(default_factory=dict)
    timings: list[BlockTiming] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "embed": self.embed.to_json(),
            "logits": self.logits.to_json(),
            "tokens": self.num_tokens,
            "ran": self.ran,
            "bytes_read": self.bytes_read,
            "seconds": sum(timing.seconds for timing in self.timings),
        }


def compare_behaviour(
    replica: Checkpoint,
    parent: Checkpoint,
    record: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    make_numerics: Callable[[], Numerics],
    device: torch.device | str = "cpu",
    options: StreamOptions | None = None,
    progress: Callable[[BlockTiming], None] | None = None,
) -> Behaviour:
    """Run both models on some prompts and compare them wherever both have values.

    Args:
        replica: What to judge.
        parent: What it was cut from; streamed.
        record: v4surgery.json of the replica.
        prompts: Token ids in the replica's vocabulary.
        make_numerics: Mode, dtype and operations; called for each model, so that what ran is
            counted for each.
        device: Where blocks compute.
        options: Budgets of each model.
        progress: Called after each block of the parent.

    Raises:
        UsageError: No prompts, or the replica's layers are not in the parent's order.
    """
    if not prompts:
        raise UsageError("no prompts", rule="at least one")
    mapping = ReplicaMapping(replica, parent, record)
    numerics = {name: make_numerics() for name in ("parent", "replica")}
    with (
        Streamer(parent, numerics["parent"], device, options) as leader,
        Streamer(replica, numerics["replica"], device, options) as follower,
    ):
        rows = [torch.tensor([list(ids)], dtype=torch.int64) for ids in prompts]
        walk = _Walk(mapping, follower, rows)
        leader.run(
            [mapping.ids(ids[0]).tolist() for ids in rows],
            observe=walk.observe,
            logits="all",
            progress=progress,
        )
        walk.behaviour.bytes_read = {
            "parent": leader.bytes_read,
            "replica": follower.bytes_read,
        }
        walk.behaviour.timings = leader.timings
    walk.behaviour.ran = {name: dict(sorted(n.ops.ran.items())) for name, n in numerics.items()}
    return walk.behaviour


class _Walk:
    """Sees the parent run, and runs the replica beside it."""

    def __init__(self, mapping: ReplicaMapping, replica: Streamer, rows: list[Tensor]) -> None:
        self.mapping, self.replica, self.rows = mapping, replica, rows
        sources = [block.source.index for block in mapping.blocks]
        if sources != sorted(set(sources)):
            raise UsageError(
                "the replica's layers are not in the parent's order",
                value=sources,
                rule="increasing source layers",
            )
        self.behaviour = Behaviour(
            [
                LayerBehaviour(
                    block.target.prefix,
                    block.source.prefix,
                    f"ratio {block.target.ratio}, {'hash' if block.target.is_hash else 'score'}",
                )
                for block in mapping.blocks
            ],
            Closeness(),
            LogitAgreement(),
            sum(ids.shape[1] for ids in rows),
        )
        self._streams: list[Tensor] = []
        self._loaded: tuple[str, Block] | None = None
        self._alignments: dict[str, Alignment] = {}

    def observe(self, module: nn.Module, prefix: str, prompt: int) -> Callable[[], None]:
        """For the parent's streamer: record a module, then compare when it has run."""
        values: Values = {}
        taps = (prefix,) if prefix in MODEL_TAPS else (*BLOCK_TAPS, GATE)
        block = self.mapping.by_source.get(prefix)
        if block is None and prefix not in MODEL_TAPS:
            return lambda: None
        recorder = TapRecorder(taps, _into(values, prompt, prefix))
        detach = recorder(module, prefix, prompt)

        def done() -> None:
            detach()
            if prefix == "embed":
                self._embed(values, prompt)
            elif prefix == "logits":
                self._logits(values, prompt)
            elif block is not None:
                self._block(values, block, prompt)

        return done

    def _embed(self, values: Values, prompt: int) -> None:
        if not self._streams:
            self._streams = list(self.replica.embed(self.rows))
        expected = self.mapping.cut("embed", values["embed"], None)
        self.behaviour.embed.add(self._streams[prompt][0, :, 0].cpu(), expected[0].cpu(), prompt)

    def _logits(self, values: Values, prompt: int) -> None:
        (actual,) = self.replica.head([self._streams[prompt]])
        expected = self.mapping.cut("logits", values["logits"], None)[0]
        self.behaviour.logits.add(actual, expected, self.rows[prompt][0])

    def _block(self, values: Values, selection: BlockSelection, prompt: int) -> None:
        number = self.mapping.blocks.index(selection)
        layer = self.behaviour.layers[number]
        module = self._load(selection)
        expected = {
            tap: self.mapping.cut(tap, values[tap], selection)
            for tap in BLOCK_TAPS
            if tap in values
        }
        choices = self.mapping.experts(values[GATE], selection)
        for way, h in ((FREE, self._streams[prompt]), (TAUGHT, expected["in"])):
            actual: Values = {}
            prefix = selection.target.prefix
            recorder = TapRecorder((*BLOCK_TAPS, GATE), _into(actual, prompt, prefix))
            detach = recorder(module, prefix, prompt)
            out = self.replica.run_block(module, h, self.rows[prompt])
            detach()
            if way == FREE:
                self._streams[prompt] = out.cpu()
            for tap, value in expected.items():
                close = layer.taps[way].setdefault(tap, Closeness())
                close.add(actual[tap].flatten(0, 1), value.flatten(0, 1), prompt)
            layer.router[way].add(actual[GATE], choices)
            self._align(layer, way, out[0].mean(1), values["out"][0].mean(1), prompt)

    def _align(self, layer: LayerBehaviour, way: str, x: Tensor, y: Tensor, prompt: int) -> None:
        """Add one prompt's ``(S, D)`` to a layer's CKA; products of widths are kept for no more."""
        if x.shape[1] == y.shape[1]:
            return
        self._alignments.setdefault(way, Alignment()).add(x, y)
        if prompt == len(self.rows) - 1:
            layer.cka[way] = self._alignments.pop(way).cka

    def _load(self, selection: BlockSelection) -> Block:
        prefix = selection.target.prefix
        if self._loaded is None or self._loaded[0] != prefix:
            self._loaded = (prefix, self.replica.load_block(selection.target))
        return self._loaded[1]


def _into(values: Values, prompt: int, prefix: str) -> Callable[[str, Tensor], None]:
    """A recorder that keeps values under the tap's name alone."""
    head = f"{prompt}/{'' if prefix in MODEL_TAPS else prefix}"

    def record(name: str, value: Tensor) -> None:
        values[name.removeprefix(head)] = value

    return record
