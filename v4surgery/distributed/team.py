"""Ranks that work together: who they are, and how they exchange tensors and plain data.

Collectives run in the thread that computes, in program order, the same on every rank; reading
threads take no part in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from v4surgery.distributed.launch import Launch, find_launch, lost_rank
from v4surgery.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
# Ranks wait for each other as long as one reads or writes; that one is gone is seen otherwise.
_PATIENCE = timedelta(days=2)
NODES, GPUS = "nodes", "gpus"


class Team:
    """All ranks of a run.

    Args:
        launch: The place of this one.
        mesh: Machines x processes on each.
    """

    def __init__(self, launch: Launch, mesh: DeviceMesh) -> None:
        self.launch, self.mesh = launch, mesh
        self.rank, self.size = launch.rank, launch.size

    @property
    def is_first(self) -> bool:
        """Whether this rank writes results."""
        return self.rank == 0

    @property
    def place(self) -> int:
        """This rank's part of a tensor that is joined."""
        return self.launch.local_rank * self.launch.nodes + self.launch.node

    def share(self, count: int) -> range:
        """This rank's run of ``count`` things; shares differ by one at most and may be empty."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def join(self, parts: Tensor) -> None:
        """Fill ``(size, ...)``, of which each rank has the row of its place.

        A row crosses between machines once, to the process with the same number there, and goes to
        the others of the machine from it.
        """
        import torch.distributed as dist

        nodes, ranks = self.launch.nodes, self.launch.local_size
        flat = parts.view(self.size, -1)
        theirs = flat[self.launch.local_rank * nodes :][:nodes]
        # Torch 2.13 has a new name for it, and warns of the old one.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with _peers():
            if nodes > 1:
                all_gather(theirs, flat[self.place][None], group=self.mesh.get_group(NODES))
            if ranks > 1:
                all_gather(flat, theirs, group=self.mesh.get_group(GPUS))

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        import torch.distributed as dist

        with _peers():
            dist.all_reduce(tensor)
        return tensor

    def agree(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor."""
        import torch.distributed as dist

        tensor = tensor.contiguous()
        with _peers():
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, value: T) -> list[T]:
        """What every rank says, by rank; plain data and host tensors. Waits for all."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(found, value)
        return found

    def tell(self, value: T) -> T:
        """What the first rank says."""
        import torch.distributed as dist

        told: list[Any] = [value]
        with _peers():
            dist.broadcast_object_list(told, 0)
        result: T = told[0]
        return result

    def close(self) -> None:
        """Part once all are here."""
        import torch.distributed as dist

        meet(self)
        dist.destroy_process_group()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


def leads(team: Team | None) -> bool:
    """Whether this process writes results: the first rank, or the only process."""
    return team is None or team.is_first


def meet(team: Team | None) -> None:
    """Wait until all ranks are here."""
    if team is not None:
        team.gather(None)


def form_team(device: str | torch.device = "cpu") -> Team | None:
    """The ranks that torchrun started; None where this process runs alone.

    Args:
        device: ``cpu`` (gloo), or this rank's GPU (NCCL, and gloo for plain data).

    Raises:
        UsageError: torchrun's variables are wrong.
        RankError: The other ranks do not come.
    """
    launch = find_launch()
    if launch is None:
        return None
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    with _peers():
        dist.init_process_group(backend, timeout=_PATIENCE)
        shape = (launch.nodes, launch.local_size)
        mesh = init_device_mesh(place.type, shape, mesh_dim_names=(NODES, GPUS))
    return Team(launch, mesh)


def rank_device(name: str, launch: Launch) -> str:
    """The device of a rank for ``--device``: each has a GPU of its own.

    Raises:
        UsageError: One GPU for all, or fewer GPUs than ranks on this machine.
    """
    import torch

    if not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise UsageError(
            "several ranks cannot compute on one GPU",
            where="--device",
            value=name,
            rule="cuda: each rank takes the GPU of its LOCAL_RANK",
        )
    found = torch.cuda.device_count()
    if launch.local_size > found:
        raise UsageError(
            "more ranks on this machine than GPUs",
            where="LOCAL_WORLD_SIZE",
            value=f"{launch.local_size} ranks, {found} GPU(s)",
            rule="a GPU for each rank",
            hint=f"torchrun --nproc-per-node {max(found, 1)}, or --device cpu",
        )
    return f"cuda:{launch.local_rank}"


@contextmanager
def _peers() -> Iterator[None]:
    """Turns what a collective raises into an error that says what happened."""
    try:
        yield
    except RuntimeError as error:
        raise lost_rank("a collective", str(error).partition("\n")[0]) from error
