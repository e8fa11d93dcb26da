"""The ranks of a verb that runs on several: what torchrun started, or this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from v4surgery.distributed.launch import find_launch

if TYPE_CHECKING:
    import torch

    from v4surgery.distributed.team import Team


@contextmanager
def computing_ranks(device: str) -> Iterator[tuple[Team | None, torch.device]]:
    """Ranks that compute on ``--device``, each on a GPU of its own; and this one's device.

    Raises:
        UsageError: No such device here, or more ranks than GPUs.
    """
    from v4surgery.cli._model import find_device

    launch = find_launch()
    if launch is None:
        yield None, find_device(device)
        return
    from v4surgery.distributed.team import form_team, rank_device

    place = find_device(rank_device(device, launch))
    team = form_team(place)
    assert team is not None
    with team:
        yield team, place


@contextmanager
def writing_ranks(device: str) -> Iterator[tuple[Team | None, str]]:
    """Ranks that write files, and where this one decodes: on a GPU that others may use as well."""
    launch = find_launch()
    if launch is None:
        yield None, device
        return
    import torch

    from v4surgery.distributed.team import form_team

    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    team = form_team()
    assert team is not None
    with team:
        yield team, device
