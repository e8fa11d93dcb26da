"""Experts that are read when a token is routed to them, a group at a time within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from v4surgery.checkpoint.refs import StoredTensorRef, TensorRef
from v4surgery.config import V4Config
from v4surgery.distributed.experts import combine_ranks
from v4surgery.model.loader import place
from v4surgery.model.moe import Expert, Experts, Matrices
from v4surgery.model.numerics import Numerics
from v4surgery.model.prefetch import Prefetcher
from v4surgery.model.ranges import tensor_refs


class StreamedExperts(Experts):
    """Experts that are read when a token is routed to them, within a budget.

    On several ranks each has a run of them, and reads and runs no others.
    """

    def __init__(
        self,
        config: V4Config,
        numerics: Numerics,
        prefetcher: Prefetcher,
        prefix: str,
        stored: Mapping[str, StoredTensorRef],
        budget: int,
    ) -> None:
        super().__init__()
        self._config, self._numerics, self._prefetcher = config, numerics, prefetcher
        self._prefix, self._stored = prefix, stored
        sizes = [item.nbytes for item in stored.values()]
        self._per_expert = max(sum(sizes) // max(len(sizes) // 3, 1), 1)
        self._capacity = max(budget // self._per_expert, 1)
        self._team, count = prefetcher.team, config.n_routed_experts
        self.owned = range(count) if self._team is None else self._team.share(count)

    def agree(self, routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The first rank's choice: else an expert could be chosen where it is not, by rounding."""
        if self._team is None:
            return routed
        indices, weights = routed
        return self._team.agree(indices), self._team.agree(weights)

    def combine(self, slots: Tensor, indices: Tensor, shared: Tensor, numerics: Numerics) -> Tensor:
        """The sum over the experts of all ranks."""
        if self._team is None:
            return super().combine(slots, indices, shared, numerics)
        return combine_ranks(self._team, slots, shared)

    def each(self, experts: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """The experts in order; the next group is read while one computes."""
        for group in self._groups([e for e in experts if e in self.owned]):
            yield from super().each(group)

    def _groups(self, experts: Sequence[int]) -> Iterator[Sequence[int]]:
        """Experts that are in memory together; the next group is read while one computes."""
        size = max(self._capacity // 2, 1)
        groups = [experts[i : i + size] for i in range(0, len(experts), size)]
        for number, group in enumerate(groups):
            self._require(group)
            upcoming = groups[number + 1] if number + 1 < len(groups) else []
            future = self._prefetcher.begin(partial(self._read, upcoming))
            yield group
            self._adopt(self._prefetcher.wait(future), keep=upcoming)

    def batches(self, indices: Tensor) -> Iterator[Matrices]:
        """As many experts at a time as the budget holds; all at once if they were read ahead."""
        count = self._config.n_routed_experts
        if self._team is None and len(self) == count:
            yield self.matrices(count, range(count))
            return
        chosen = [expert for expert in indices.unique().tolist() if expert in self.owned]
        if chosen and len(self) == len(self.owned):
            yield self.matrices(count, self.owned)
            return
        for group in self._groups(chosen):
            yield self.matrices(count, group)

    def adopt_all(self, tensors: dict[TensorRef, Tensor]) -> None:
        """Take experts that were read ahead."""
        for expert in self.owned:
            self._build(expert, tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamedExperts:
        """Nothing moves: what was read is on its device."""
        del fn, recurse
        return self

    def _require(self, experts: Sequence[int]) -> None:
        self._adopt(self._prefetcher.timed(lambda: self._read(experts)), keep=experts)

    def _read(self, experts: Sequence[int]) -> dict[TensorRef, Tensor]:
        missing = [expert for expert in experts if str(expert) not in self]
        return self._prefetcher.loader.load(self.refs(missing))

    def refs(self, experts: Iterable[int]) -> list[TensorRef]:
        """Where some experts are stored."""
        stems = (stem for expert in experts for stem in self._stems(expert))
        return [ref for stem in stems for ref in tensor_refs(self._stored[stem])]

    def _adopt(self, tensors: dict[TensorRef, Tensor], keep: Sequence[int]) -> None:
        if len(self) + len(keep) > self._capacity:
            for name in [name for name in self if int(name) not in keep]:
                del self[name]
        for expert in keep:
            if str(expert) not in self and tensors:
                self._build(expert, tensors)

    def _build(self, expert: int, tensors: dict[TensorRef, Tensor]) -> None:
        module = Expert(self._config, self._numerics)
        for stem in self._stems(expert):
            stored = self._stored[stem]
            weight, *scale = (tensors[ref] for ref in tensor_refs(stored))
            leaf = stem.rsplit(".", 1)[1]
            place(module, leaf, stored, weight, scale[0] if scale else None, module.numerics)
        self[str(expert)] = module

    def _stems(self, expert: int) -> list[str]:
        return [f"{self._prefix}ffn.experts.{expert}.{name}" for name in ("w1", "w2", "w3")]
