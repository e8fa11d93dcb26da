"""Running a model that does not fit: all tokens through one block before the next is read.

A block's dense weights are read while the block before it computes. Its experts are read when the
gate has chosen, only those that were routed to; where there are so many tokens that nearly all
will be, they are read ahead with the rest. Between blocks the streams wait on the device, in host
memory or on disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from v4surgery.catalogue import Block as BlockSpec
from v4surgery.checkpoint.matching import StoredTensorRef, TensorRef
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import V4Config
from v4surgery.distributed.experts import combine_ranks
from v4surgery.distributed.loading import SharedLoader
from v4surgery.distributed.team import Team
from v4surgery.errors import UsageError
from v4surgery.model.block import Block
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.hyper_connections import Connected
from v4surgery.model.linear import Linear
from v4surgery.model.loader import place, require_loaded
from v4surgery.model.moe import Expert, Experts, Matrices
from v4surgery.model.mtp import MTPBlock
from v4surgery.model.norm import RMSNorm
from v4surgery.model.numerics import Numerics
from v4surgery.model.ranges import RangeLoader

HEAD_ROWS = 8192
DEFAULT_WEIGHT_BYTES = 8_000_000_000
DEFAULT_ACTIVATION_BYTES = 4_000_000_000
# Streams in and out, the sublayer's input and output, queries and scores of a token, in multiples
# of one token's streams: an estimate from Flash's shapes, not a measurement.
ACTIVATION_FACTOR = 24

StoredTensors = dict[str, StoredTensorRef]
Observer = Callable[[nn.Module, str, int], Callable[[], None]]
"""Called before a module runs a prompt: the module, its prefix, the prompt's number; what it
returns is called afterwards."""
T = TypeVar("T")


@dataclass(frozen=True)
class BlockTiming:
    """What one block cost: seconds in all, seconds of it waiting for bytes, bytes read."""

    prefix: str
    seconds: float
    waited: float
    bytes_read: int


@dataclass(frozen=True)
class StreamOptions:
    """Budgets of a streamed run.

    Attributes:
        weight_bytes: Weights in memory at a time: two blocks' dense weights, and experts.
        activation_bytes: What the longest prompt may take on the device.
        activations: Where the streams wait between blocks: ``host`` or ``disk``.
        workers: Reading threads.
        team: Ranks that split experts and reading between them; None for one process. Budgets are
            each rank's.
    """

    weight_bytes: int = DEFAULT_WEIGHT_BYTES
    activation_bytes: int = DEFAULT_ACTIVATION_BYTES
    activations: str = "host"
    workers: int = 4
    team: Team | None = None

    def __post_init__(self) -> None:
        if self.activations not in ("host", "disk"):
            raise UsageError(
                "unknown place for activations", value=self.activations, rule="host or disk"
            )


class StreamedExperts(Experts):
    """Experts that are read when a token is routed to them, within a budget.

    On several ranks each has a run of them, and reads and runs no others.
    """

    def __init__(self, streamer: Streamer, prefix: str, stored: StoredTensors, budget: int) -> None:
        super().__init__()
        self._streamer, self._prefix, self._stored = streamer, prefix, stored
        sizes = [item.nbytes for item in stored.values()]
        self._per_expert = max(sum(sizes) // max(len(sizes) // 3, 1), 1)
        self._capacity = max(budget // self._per_expert, 1)
        self._team, count = streamer.team, streamer.config.n_routed_experts
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
            future = self._streamer.background.submit(self._read, upcoming)
            yield group
            self._adopt(self._streamer.wait(future), keep=upcoming)

    def batches(self, indices: Tensor) -> Iterator[Matrices]:
        """As many experts at a time as the budget holds; all at once if they were read ahead."""
        count = self._streamer.config.n_routed_experts
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

    def _require(self, experts: Sequence[int]) -> None:
        self._adopt(self._streamer.timed(lambda: self._read(experts)), keep=experts)

    def _read(self, experts: Sequence[int]) -> dict[TensorRef, Tensor]:
        missing = [expert for expert in experts if str(expert) not in self]
        return self._streamer.loader.load(self.refs(missing))

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
        module = Expert(self._streamer.config, self._streamer.numerics)
        for stem in self._stems(expert):
            stored = self._stored[stem]
            weight, *scale = (tensors[ref] for ref in tensor_refs(stored))
            leaf = stem.rsplit(".", 1)[1]
            place(module, leaf, stored, weight, scale[0] if scale else None, module.numerics)
        self[str(expert)] = module

    def _stems(self, expert: int) -> list[str]:
        return [f"{self._prefix}ffn.experts.{expert}.{name}" for name in ("w1", "w2", "w3")]


class Streamer:
    """Runs the trunk of a checkpoint block by block.

    Args:
        checkpoint: A parent or a replica.
        numerics: Mode, dtype and operations.
        device: Where blocks compute.
        options: Budgets.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        numerics: Numerics,
        device: torch.device | str = "cpu",
        options: StreamOptions | None = None,
    ) -> None:
        self.checkpoint, self.config, self.numerics = checkpoint, checkpoint.config, numerics
        self.device = torch.device(device)
        self.options = options or StreamOptions()
        self.team = self.options.team
        workers = self.options.workers
        self.loader = (
            RangeLoader(checkpoint, self.device, workers)
            if self.team is None
            else SharedLoader(checkpoint, self.device, workers, self.team)
        )
        self.background = ThreadPoolExecutor(1, "v4surgery-prefetch")
        self.waited = 0.0
        self.timings: list[BlockTiming] = []

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, by all ranks; embedding rows aside."""
        own = self.loader.bytes_read
        return own if self.team is None else sum(self.team.gather(own))

    def close(self) -> None:
        self.background.shutdown(cancel_futures=True)
        self.loader.close()

    def __enter__(self) -> Streamer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        observe: Observer | None = None,
        logits: str = "last",
        drafters: bool = False,
        progress: Callable[[BlockTiming], None] | None = None,
    ) -> list[Tensor]:
        """One pass over some prompts.

        Args:
            prompts: Token ids of each.
            observe: Sees every module before and after it runs a prompt.
            logits: ``last`` position, ``all``, or ``none``.
            drafters: Run classic drafter blocks after the trunk, each on the trunk's streams and
                all tokens but the last; DSpark's have no forward here and are left out.
            progress: Called after each block.

        Returns:
            Logits of each prompt, float32 ``(positions, V)`` on the host.
        """
        with _ActivationStore(self.options.activations) as store:
            return self._run(prompts, store, observe, logits, progress, drafters=drafters)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        store: _ActivationStore,
        observe: Observer | None,
        logits: str,
        progress: Callable[[BlockTiming], None] | None,
        *,
        drafters: bool,
    ) -> list[Tensor]:
        rows = [torch.tensor([ids], dtype=torch.int64) for ids in prompts]
        for number, h in enumerate(self.embed(rows, observe)):
            store[number] = h
        specs = [spec for spec in self.checkpoint.catalogue.blocks if not spec.is_drafter]
        ahead = self._reads_experts_ahead(sum(len(ids) for ids in prompts))
        future = self.background.submit(self._fetch_block, specs[0], ahead)
        for spec, upcoming in zip(specs, [*specs[1:], None], strict=True):
            with self._timing(spec.prefix, progress):
                block = self.timed(self.wait(future))
                if upcoming is not None:
                    future = self.background.submit(self._fetch_block, upcoming, ahead)
                for number, ids in enumerate(rows):
                    detach = observe(block, spec.prefix, number) if observe else None
                    store[number] = self.run_block(block, store[number], ids)
                    if detach is not None:
                        detach()
        for spec in self.drafters if drafters else ():
            with self._timing(spec.prefix, progress):
                self._run_drafter(spec, rows, store, observe)
        streams = (store[number] for number in range(len(rows)))
        return [] if logits == "none" else self.head(streams, logits, observe)

    @property
    def drafters(self) -> list[BlockSpec]:
        """The drafter blocks that have a forward: classic ones."""
        return [spec for spec in self.checkpoint.catalogue.blocks if "classic" in spec.traits]

    def _run_drafter(
        self,
        spec: BlockSpec,
        rows: Sequence[Tensor],
        store: _ActivationStore,
        observe: Observer | None,
    ) -> None:
        """A drafter on every prompt of two or more tokens."""
        block = self.load_block(spec)
        assert isinstance(block, MTPBlock)
        for number, (ids, embedded) in enumerate(zip(rows, self.embed(rows), strict=True)):
            following = ids[:, 1:].to(self.device)
            if not following.numel():
                continue
            detach = observe(block, spec.prefix, number) if observe else None
            progress = Progress.start(1, self.device).advance(following.shape[1])
            h, next_x = store[number][:, :-1], embedded[:, 1:, 0]
            block.draft(
                h.to(self.device), next_x.to(self.device), following, progress, LayerCache()
            )
            if detach is not None:
                detach()

    @contextmanager
    def _timing(
        self, prefix: str, progress: Callable[[BlockTiming], None] | None
    ) -> Iterator[None]:
        """Records what one block costs."""
        began, read, waited = time.perf_counter(), self.loader.bytes_read, self.waited
        yield
        timing = BlockTiming(
            prefix,
            time.perf_counter() - began,
            self.waited - waited,
            self.loader.bytes_read - read,
        )
        self.timings.append(timing)
        if progress is not None:
            progress(timing)

    def wait(self, future: Future[T]) -> T:
        """The result of a background read; the time that it was waited for counts."""
        return self.timed(future.result)

    def timed(self, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = call()
        self.waited += time.perf_counter() - began
        return result

    def _check_activations(self, num_tokens: int) -> None:
        token = self.config.hc_mult * self.config.hidden_size * self.numerics.dtype.itemsize
        needed = num_tokens * token * ACTIVATION_FACTOR
        if needed > self.options.activation_bytes:
            raise UsageError(
                "the longest prompt does not fit the memory for activations",
                where="--activation-memory",
                value=f"{num_tokens} tokens need about {needed:,} bytes",
                rule=f"at most {self.options.activation_bytes:,}",
                hint="raise it, or cut the prompt with --tokens",
            )

    def _reads_experts_ahead(self, num_tokens: int) -> bool:
        """Whether nearly all experts will be routed to, and two blocks of them fit."""
        experts = self.config.n_routed_experts
        prefix = self.checkpoint.catalogue.blocks[0].prefix
        size = sum(item.nbytes for item in self._stored(prefix, experts=True).values())
        often = num_tokens * self.config.num_experts_per_tok >= 2 * experts
        size //= 1 if self.team is None else self.team.size
        return often and 2 * size <= self.options.weight_bytes

    def _stored(self, prefix: str, *, experts: bool) -> StoredTensors:
        return {
            stem: stored
            for stem, stored in self.checkpoint.tensors.items()
            if stored.entry.block is not None
            and stored.entry.block.prefix == prefix
            and stored.entry.template.per_expert == experts
            and not stored.entry.template.optional  # a drafter's own embedding: no forward reads it
        }

    def load_block(self, spec: BlockSpec, experts_ahead: bool = False) -> Block:
        """A block on the device; its experts are read when needed, or with it.

        Raises:
            CatalogueError: The checkpoint does not give all of its parameters.
        """
        return self._begin_block(spec, experts_ahead)()

    def _fetch_block(self, spec: BlockSpec, experts_ahead: bool) -> Callable[[], Block]:
        """Read a block in the background; several ranks exchange it where they compute."""
        finish = self._begin_block(spec, experts_ahead)
        if self.team is not None:
            return finish
        block = finish()
        return lambda: block

    def _begin_block(self, spec: BlockSpec, experts_ahead: bool) -> Callable[[], Block]:
        dense = self._stored(spec.prefix, experts=False)
        routed = self._stored(spec.prefix, experts=True)
        budget = self.options.weight_bytes - 2 * sum(item.nbytes for item in dense.values())
        experts = StreamedExperts(self, spec.prefix, routed, budget)
        kind = MTPBlock if spec.is_drafter else Block
        block = kind(self.config, spec, self.numerics, experts=experts)
        common = [ref for stored in dense.values() for ref in tensor_refs(stored)]
        own = experts.refs(experts.owned) if experts_ahead else []
        owned, exchange = self.loader.begin(common, own)
        if experts_ahead:
            experts.adopt_all(owned)

        def finish() -> Block:
            tensors = exchange()
            for stem, stored in dense.items():
                weight, *scale = (tensors[ref] for ref in tensor_refs(stored))
                name = stem.removeprefix(spec.prefix)
                place(block, name, stored, weight, scale[0] if scale else None, self.numerics)
            block.to(self.device)
            require_loaded(block.named_parameters(), spec.prefix)
            return block.eval()

        return finish

    def run_block(self, block: Block, h: Tensor, ids: Tensor) -> Tensor:
        """Streams ``(1, S, M, D)`` of a whole prompt, ids ``(1, S)``, through a loaded block."""
        progress = Progress.start(1, self.device).advance(ids.shape[1])
        out: Tensor = block(h.to(self.device), ids.to(self.device), progress, LayerCache())
        return out

    def embed(self, rows: Sequence[Tensor], observe: Observer | None = None) -> Iterator[Tensor]:
        """Streams ``(1, S, M, D)`` of each prompt ``(1, S)``; reads the rows that they use.

        Raises:
            UsageError: The longest prompt does not fit the memory for activations.
        """
        self._check_activations(max(ids.shape[1] for ids in rows))
        used = torch.cat([ids[0] for ids in rows]).unique()
        table = self._read_rows(self.checkpoint.tensors["embed"], used)
        for number, ids in enumerate(rows):
            x = table[torch.searchsorted(used, ids)]
            embedded = _Passed()
            detach = observe(embedded, "embed", number) if observe else None
            streams = embedded(x)[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
            if detach is not None:
                detach()
            yield streams

    def _read_rows(self, stored: StoredTensorRef, rows: Tensor) -> Tensor:
        """Some rows of a stored matrix, on the host; each rank reads a part of them."""

        def read(some: Tensor) -> Tensor:
            values = self.checkpoint.read_float(stored, some.numpy())
            return torch.from_numpy(values).to(self.numerics.dtype)

        if self.team is None:
            return read(rows)
        part = -(-len(rows) // self.team.size)
        mine = rows[self.team.place * part :][:part]
        parts = torch.zeros(self.team.size, part, stored.weight.shape[1], dtype=self.numerics.dtype)
        if len(mine):
            parts[self.team.place, : len(mine)] = read(mine)
        self.team.join(parts)
        return parts.flatten(0, 1)[: len(rows)]

    def head(
        self, streams: Iterable[Tensor], wanted: str = "all", observe: Observer | None = None
    ) -> list[Tensor]:
        """Logits of each prompt from its last streams, float32 ``(positions, V)`` on the host.

        Args:
            streams: ``(1, S, M, D)`` of each prompt.
            wanted: ``all`` positions, or the ``last``.
            observe: See :meth:`run`.
        """
        trunk = self.load_head()
        outputs = []
        for number, h in enumerate(streams):
            h = h.to(self.device)
            x = trunk(h if wanted == "all" else h[:, -1:])
            head = _Passed()
            detach = observe(head, "logits", number) if observe else None
            outputs.append(head(self._project(x))[0].cpu())
            if detach is not None:
                detach()
        return outputs

    def load_head(self) -> Head:
        """The collapse of the last streams and the last norm, on the device."""
        trunk = Head(self.config, self.numerics)
        stems = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm")
        refs = [self.checkpoint.tensors[stem] for stem in stems]
        tensors = self.loader.load_common([stored.weight for stored in refs])
        for stem, stored in zip(stems, refs, strict=True):
            place(trunk, stem, stored, tensors[stored.weight], None, self.numerics)
        return trunk.to(self.device)

    def _project(self, x: Tensor) -> Tensor:
        """Logits ``(1, S, V)``, a slice of the head's rows at a time."""
        stored = self.checkpoint.tensors["head"]
        ref = stored.weight
        parts = []
        for begin in range(0, ref.shape[0], HEAD_ROWS):
            end = min(begin + HEAD_ROWS, ref.shape[0])
            rows = TensorRef(
                ref.file,
                ref.dtype,
                (end - begin, *ref.shape[1:]),
                ref.begin + begin * ref.row_bytes,
                ref.begin + end * ref.row_bytes,
            )
            linear = Linear(end - begin, self.config.hidden_size, self.numerics)
            weight = self.loader.load_common([rows])[rows]
            linear.weight = nn.Parameter(weight.to(self.numerics.dtype), requires_grad=False)
            parts.append(linear.wide(x))
        return torch.cat(parts, -1)


class _Passed(nn.Module):
    """Passes its input on, for an observer to see."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Head(Connected):
    """Collapse of the streams and the last norm."""

    def __init__(self, config: V4Config, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, numerics)
        self.add_connection("head", config.hc_mult, 1)

    def forward(self, h: Tensor) -> Tensor:
        x: Tensor = self.norm(self.collapse_head(h))
        return x


class _ActivationStore:
    """Streams of every prompt between blocks: in host memory, or in files of a temporary folder."""

    def __init__(self, place: str) -> None:
        self._memory: dict[int, Tensor] = {}
        self._folder = tempfile.TemporaryDirectory() if place == "disk" else None

    def __enter__(self) -> _ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __setitem__(self, number: int, h: Tensor) -> None:
        if self._folder is None:
            self._memory[number] = h.cpu()
        else:
            save_file({"h": h.contiguous().cpu()}, self._path(number))

    def __getitem__(self, number: int) -> Tensor:
        if self._folder is None:
            return self._memory[number]
        # A copy lies where torch aligns it; off its alignment a product may round otherwise.
        return load_file(self._path(number))["h"].clone()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{number}.safetensors"


def tensor_refs(stored: StoredTensorRef) -> list[TensorRef]:
    """The weight, and the scale if there is one."""
    return [stored.weight] if stored.scale is None else [stored.weight, stored.scale]
