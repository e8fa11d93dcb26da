"""Running sums: all that is kept of activations while scores are measured.

A score is a mean over what was seen, or a product of such means; sums and counts of two runs add
up to those of one run over both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v4surgery.distributed.team import Team
from v4surgery.importance.names import SECOND_MOMENT


@dataclass
class Totals:
    """Sums in float64 and counts, by the key of the score.

    Attributes:
        sums: One for each factor of a score.
        counts: How many were summed: one number, or one for each unit.
        by_rank: Keys whose sums are over the experts that this process runs.
    """

    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, list[Tensor]] = field(default_factory=dict)
    by_rank: set[str] = field(default_factory=set)

    def add(self, key: str, total: Tensor, count: float | Tensor, factor: int = 0) -> None:
        """Add a sum over ``count`` observations.

        Args:
            key: Of the score.
            total: ``(units,)``, or ``(..., units, units)`` for second moments.
            count: Observations, for all units or ``(units,)``.
            factor: Which mean of a product it belongs to; the first ones come first.
        """
        counted = torch.as_tensor(count, dtype=torch.float64, device=total.device)
        sums, counts = self.sums.setdefault(key, []), self.counts.setdefault(key, [])
        if factor < len(sums):
            sums[factor] += total
            counts[factor] = counts[factor] + counted
        else:
            assert factor == len(sums), (key, factor)
            sums.append(total.to(torch.float64, copy=True))
            counts.append(counted)

    def merge(self, other: Totals) -> None:
        """Add what another run summed."""
        for key, sums in other.sums.items():
            for factor, (total, count) in enumerate(zip(sums, other.counts[key], strict=True)):
                self.add(key, total, count, factor)

    def merge_ranks(self, team: Team) -> None:
        """Add what the other ranks of a run summed over their own experts."""
        own = {key: (self.sums[key][0].cpu(), self.counts[key][0].cpu()) for key in self.by_rank}
        for rank, part in enumerate(team.gather(own)):
            for key in sorted(part) if rank != team.rank else ():
                total, count = part[key]
                if key in self.sums:  # counts are of the gate's choices, which all ranks know
                    self.sums[key][0] += total.to(self.sums[key][0].device)
                else:
                    self.add(key, total, count)

    def scores(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Each score by its key, float32; 0 where nothing was seen. Second moments symmetric."""
        for key, sums in self.sums.items():
            value = torch.ones_like(sums[0])
            for total, count in zip(sums, self.counts[key], strict=True):
                value = value * (total / count.clamp_min(1))
            if key.startswith(SECOND_MOMENT):
                value = (value + value.mT) / 2
            yield key, value.float().cpu().numpy()
