"""What torchrun tells a process of its place, and which verbs run on several. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4surgery.errors import RankError, UsageError

VERBS = ("trace", "validate", "score", "slice", "convert")
_SIGNS = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The place of this process.

    Attributes:
        rank: Of all processes.
        size: How many there are.
        local_rank: On this machine.
        local_size: How many run on this machine, and on every other.
        address: Where ranks meet.
        port: There.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    @property
    def nodes(self) -> int:
        return self.size // self.local_size

    @property
    def node(self) -> int:
        return self.rank // self.local_size


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The place of this process, or None where it runs alone.

    Raises:
        UsageError: torchrun's variables are not all there, or contradict each other.
    """
    if not any(name in environment for name in _SIGNS):
        return None
    values = {name: _number(environment, name) for name in _NUMBERS}
    if values["WORLD_SIZE"] == 1:
        return None
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise _wrong("MASTER_ADDR", None, "the host where ranks meet")
    rank, size, local_rank, local_size, port = values.values()
    if size < 1 or local_size < 1 or size % local_size:
        rule = f"WORLD_SIZE {size} is a multiple of it: as many processes on every machine"
        raise _wrong("LOCAL_WORLD_SIZE", local_size, rule)
    if not 0 <= rank < size:
        raise _wrong("RANK", rank, f"0 to WORLD_SIZE - 1, which is {size - 1}")
    if local_rank != rank % local_size:
        rule = f"RANK {rank} modulo LOCAL_WORLD_SIZE {local_size}"
        raise _wrong("LOCAL_RANK", local_rank, rule)
    return Launch(rank, size, local_rank, local_size, address, port)


def require_verb(arguments: Sequence[str], size: int) -> None:
    """Raise UsageError unless the verb runs on several ranks."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UsageError(
            f"{verb} runs in one process",
            value=f"WORLD_SIZE {size}",
            rule="several ranks run " + ", ".join(VERBS),
            hint=f"start it without torchrun: v4surgery {verb} ...",
        )


def lost_rank(seen_by: str, value: object = None) -> RankError:
    """What a rank says that finds another one gone."""
    return RankError(
        "a process of this run was lost, or the run was stopped",
        where=f"seen by {seen_by}",
        value=value,
        rule="all ranks run until the end",
        hint="torchrun's summary names the rank that failed first; the same command goes on: "
        "slice and convert from what is finished, the others from the start",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        raise _wrong(name, text, "a whole number")
    return int(text)


def _wrong(name: str, value: object, rule: str) -> UsageError:
    return UsageError(
        "torchrun's variables do not say where this process stands",
        where=name,
        value="not set" if value is None else value,
        rule=rule,
        hint="start it with torchrun --nproc-per-node N -m v4surgery ..., or unset "
        + " and ".join(_SIGNS),
    )
