"""Whether the other machines of a run still live. Imports no torch.

torchrun ends the ranks of its own machine when one of them fails; of other machines it knows
nothing while they work. So one rank of each machine raises a counter in the store where ranks meet,
and looks whether the others' go on.
"""

from __future__ import annotations

from typing import Protocol

PERIOD = 2.0
# Longer than a thread waits for the interpreter's lock, and short enough to end within 30 s.
PATIENCE = 20.0
_KEY = "v4surgery/pulse/"


class Counters(Protocol):
    """The part of torch.distributed's store that is used."""

    def add(self, key: str, amount: int, /) -> int: ...


class Pulse:
    """One machine's counter, and when those of the others last moved.

    Args:
        node: This machine.
        nodes: How many there are.
    """

    def __init__(self, node: int, nodes: int) -> None:
        self.node, self.others = node, [other for other in range(nodes) if other != node]
        self._seen: dict[int, tuple[int, float]] = {}

    def find_lost(self, store: Counters, now: float) -> int | None:
        """Raise the own counter; a machine whose counter stood still for too long, if there is one.

        To be asked once all machines have met: one whose counter never moves is lost as well.
        """
        store.add(f"{_KEY}{self.node}", 1)
        for other in self.others:
            count = store.add(f"{_KEY}{other}", 0)
            before, since = self._seen.get(other, (None, now))
            if count != before:
                self._seen[other] = count, now
            elif now - since > PATIENCE:
                return other
        return None
