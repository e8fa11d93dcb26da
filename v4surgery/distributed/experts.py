"""The sum of experts that several ranks hold: each adds its own, the ranks' sums are added up.

All ranks have all tokens. Sums are in float32 and rounded once to the dtype of the tokens, as in
one process; there the order is ascending by expert, here by slot and then by rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4surgery.distributed.team import Team


def combine_ranks(team: Team, slots: Tensor, shared: Tensor) -> Tensor:
    """What all experts give to each token.

    Args:
        team: All ranks.
        slots: What this rank's experts give, ``(T, K, D)``; zero for others.
        shared: Of the shared expert, ``(T, D)``, the same on every rank.

    Returns:
        ``(T, D)``, dtype of ``shared``.
    """
    total = team.add_up(slots.sum(1, dtype=torch.float32))
    return (total + shared).to(shared.dtype)
