"""The observer that measures scores while a model runs through a streamed forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from v4surgery.config import V4Config
from v4surgery.distributed.team import Team
from v4surgery.importance.names import key_of
from v4surgery.importance.probes import moments, streams
from v4surgery.importance.probes.attention import (
    HeadsProbe,
    NopeProbe,
    OutputRankProbe,
    QueryRankProbe,
)
from v4surgery.importance.probes.experts import ExpertsProbe, NeuronsProbe
from v4surgery.importance.probes.indexer import IndexerProbe
from v4surgery.importance.probes.probe import Probe, on_output
from v4surgery.importance.totals import Totals
from v4surgery.model.block import Block
from v4surgery.model.ends import Collapse
from v4surgery.model.mtp import MTPBlock

BLOCK_PROBES: Mapping[str, type[Probe]] = {
    "experts": ExpertsProbe,
    "moe_intermediate_size": NeuronsProbe,
    "heads": HeadsProbe,
    "head_dim": NopeProbe,
    "q_lora_rank": QueryRankProbe,
    "o_lora_rank": OutputRankProbe,
    "indexer": IndexerProbe,
}
MODEL_PROBES: Mapping[str, type[Probe]] = {
    "layers": streams.LayersProbe,
    "hidden_size": streams.ChannelsProbe,
    "hc_mult": streams.StreamsProbe,
}
BLOCK_MOMENTS: Mapping[str, type[Probe]] = {
    "q_lora_rank": moments.QueryRankMoment,
    "o_lora_rank": moments.OutputRankMoment,
    "heads": moments.HeadsMoment,
}


class Scorer:
    """Hangs the probes of the wanted axes on each block, and gives out its totals when it is done.

    Model-wide scores are of the trunk; drafters have scores of their own blocks only.

    Args:
        config: The model.
        axes: Of :data:`v4surgery.importance.names.AXES`.
        second_moments: Of :data:`v4surgery.importance.names.MOMENTS`.
        num_prompts: How many prompts run through each block.
        head: The trunk's, for what the end of the trunk adds.
        done: Takes the totals of a block after its last prompt.
        team: Ranks that split the experts.
    """

    def __init__(
        self,
        config: V4Config,
        axes: Collection[str],
        second_moments: Collection[str],
        num_prompts: int,
        head: Collapse,
        done: Callable[[Totals], None],
        team: Team | None = None,
    ) -> None:
        self.config, self.axes, self.moments = config, axes, second_moments
        self.num_prompts, self.head, self.done, self.team = num_prompts, head, done, team
        self.model = Totals()
        self._prefix, self._totals, self._probes = "", Totals(), list[Probe]()

    @property
    def scores_blocks(self) -> bool:
        """Whether drafters have anything to measure."""
        return any(axis in BLOCK_PROBES for axis in self.axes) or any(
            axis in BLOCK_MOMENTS for axis in self.moments
        )

    def count_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        """Frequencies of token ids, for the vocabulary."""
        if "vocab_size" in self.axes:
            ids = torch.cat([torch.tensor(prompt) for prompt in prompts])
            counts = torch.bincount(ids, minlength=self.config.vocab_size).double()
            self.model.add(key_of("frequency", "vocab_size"), counts, len(ids))

    def __call__(self, module: nn.Module, prefix: str, prompt: int) -> Callable[[], None]:
        """Attach to a block for one prompt; returns what detaches."""
        if not isinstance(module, Block):
            return _nothing
        if prefix != self._prefix:
            self._begin(module)
        handles = [handle for probe in self._probes for handle in probe.attach(module)]
        is_last = module.index == self.config.num_hidden_layers - 1
        if is_last and not isinstance(module, MTPBlock):
            handles.append(on_output(module, self._add_end))

        def detach() -> None:
            for handle in handles:
                handle.remove()
            if prompt == self.num_prompts - 1:
                self.flush()

        return detach

    def flush(self) -> None:
        """Give out the totals of the block that was measured last."""
        if self.team is not None:
            self._totals.merge_ranks(self.team)
        self.done(self._totals)
        self._prefix, self._totals, self._probes = "", Totals(), []

    def _begin(self, block: Block) -> None:
        self.flush()
        self._prefix = block.prefix
        kinds = [kind for axis, kind in BLOCK_PROBES.items() if axis in self.axes]
        kinds += [kind for axis, kind in BLOCK_MOMENTS.items() if axis in self.moments]
        if not isinstance(block, MTPBlock):
            kinds += [kind for axis, kind in MODEL_PROBES.items() if axis in self.axes]
            kinds += [moments.HiddenMoment] if "hidden_size" in self.moments else []
        self._probes = [kind(block.prefix, self._totals, self.model) for kind in kinds]

    def _add_end(self, h: Tensor) -> None:
        wanted = {"channels": "hidden_size" in self.axes, "streams": "hc_mult" in self.axes}
        streams.add_end(self.model, self.head, h, **wanted)
        if "hidden_size" in self.moments:
            moments.add_end(self.model, self.head, h)


def _nothing() -> None:
    pass
