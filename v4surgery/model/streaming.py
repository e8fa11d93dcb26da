"""Running a model that does not fit: all tokens through one block before the next is read.

A block's dense weights are read while the block before it computes. Its experts are read when the
gate has chosen, only those that were routed to; where there are so many tokens that nearly all
will be, they are read ahead with the rest. Between blocks the streams wait on a GPU that has room
for them, or else in host memory or on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from v4surgery.catalogue import Block as BlockSpec
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.distributed.loading import SharedLoader
from v4surgery.distributed.team import Team
from v4surgery.errors import UsageError
from v4surgery.model.activations import ActivationStore
from v4surgery.model.block import Block
from v4surgery.model.cache import LayerCache, Progress
from v4surgery.model.ends import Collapse, Ends
from v4surgery.model.loader import place, require_loaded
from v4surgery.model.mtp import MTPBlock
from v4surgery.model.numerics import Numerics
from v4surgery.model.prefetch import Prefetcher
from v4surgery.model.ranges import RangeLoader, tensor_refs
from v4surgery.model.streamed_experts import StreamedExperts

DEFAULT_WEIGHT_BYTES = 8_000_000_000
DEFAULT_ACTIVATION_BYTES = 4_000_000_000
# Streams in and out, the sublayer's input and output, queries and scores of a token, in multiples
# of one token's streams: an estimate from Flash's shapes, not a measurement.
ACTIVATION_FACTOR = 24

Observer = Callable[[nn.Module, str, int], Callable[[], None]]
"""Called before a module runs a prompt: the module, its prefix, the prompt's number; what it
returns is called afterwards."""


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
        activations: Where the streams wait between blocks that find no room on a GPU: ``host`` or
            ``disk``.
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
        self._ends = Ends(checkpoint, numerics, self.loader, self.options.weight_bytes, self.team)
        self._prefetcher = Prefetcher(self.loader, self.team)
        self.timings: list[BlockTiming] = []
        self._counted = 0

    @property
    def waited(self) -> float:
        """Seconds that computing has waited for bytes."""
        return self._prefetcher.waited

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, by all ranks; embedding rows aside."""
        own = self.loader.bytes_read
        return own if self.team is None else sum(self.team.gather(own))

    def close(self) -> None:
        self._prefetcher.close()

    def __enter__(self) -> Streamer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.checkpoint.source.cancel()  # readers may be waiting for a server
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
        with ActivationStore(self._place_of_streams(prompts)) as store:
            return self._run(prompts, store, observe, logits, progress, drafters=drafters)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        store: ActivationStore,
        observe: Observer | None,
        logits: str,
        progress: Callable[[BlockTiming], None] | None,
        *,
        drafters: bool,
    ) -> list[Tensor]:
        rows = [torch.tensor([ids], dtype=torch.int64) for ids in prompts]
        self._check_activations(max(map(len, prompts)))
        specs = [spec for spec in self.checkpoint.catalogue.blocks if not spec.is_drafter]
        ahead = self._reads_experts_ahead(sum(map(len, prompts)))

        def fetch(spec: BlockSpec) -> Future[Callable[[], Block]]:
            return self._prefetcher.begin(partial(self._fetch_block, spec, ahead))

        fetched = fetch(specs[0])
        for number, h in enumerate(self.embed(rows, observe)):
            store[number] = h
        for spec, upcoming in zip(specs, [*specs[1:], None], strict=True):
            with self._timing(spec.prefix, progress):
                finish = self._prefetcher.wait(fetched)
                if upcoming is not None:
                    fetched = fetch(upcoming)  # while ranks exchange, too
                block = self._prefetcher.timed(finish)
                self._run_prompts(block, spec.prefix, rows, store, observe)
            del block, finish  # before the one after the next is read
        for spec in self.drafters if drafters else ():
            with self._timing(spec.prefix, progress):
                self._run_drafter(spec, rows, store, observe)
        streams = (store[number] for number in range(len(rows)))
        return [] if logits == "none" else self.head(streams, logits, observe)

    def _run_prompts(
        self,
        block: Block,
        prefix: str,
        rows: Sequence[Tensor],
        store: ActivationStore,
        observe: Observer | None,
    ) -> None:
        """Every prompt through a block."""
        for number, ids in enumerate(rows):
            detach = observe(block, prefix, number) if observe else None
            store[number] = self.run_block(block, store[number], ids)
            if detach is not None:
                detach()

    @property
    def drafters(self) -> list[BlockSpec]:
        """The drafter blocks that have a forward: classic ones."""
        return [spec for spec in self.checkpoint.catalogue.blocks if "classic" in spec.traits]

    def _run_drafter(
        self,
        spec: BlockSpec,
        rows: Sequence[Tensor],
        store: ActivationStore,
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
        """Records what one block costs; bytes are all since the block before."""
        began, waited = time.perf_counter(), self.waited
        yield
        read, self._counted = self.loader.bytes_read - self._counted, self.loader.bytes_read
        seconds = time.perf_counter() - began
        timing = BlockTiming(prefix, seconds, self.waited - waited, read)
        self.timings.append(timing)
        if progress is not None:
            progress(timing)

    def _place_of_streams(self, prompts: Sequence[Sequence[int]]) -> str:
        """The device where all prompts' fit beside the longest one's activations."""
        longest, all_tokens = max(map(len, prompts)), sum(map(len, prompts))
        needed = self._token_bytes * (longest * ACTIVATION_FACTOR + all_tokens - longest)
        is_roomy = self.device.type != "cpu" and needed <= self.options.activation_bytes
        return "device" if is_roomy else self.options.activations

    @property
    def _token_bytes(self) -> int:
        """Of a token's streams."""
        return self.config.hc_mult * self.config.hidden_size * self.numerics.dtype.itemsize

    def _check_activations(self, num_tokens: int) -> None:
        needed = num_tokens * self._token_bytes * ACTIVATION_FACTOR
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

    def _stored(self, prefix: str, *, experts: bool) -> dict[str, StoredTensorRef]:
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
        experts = StreamedExperts(
            self.config, self.numerics, self._prefetcher, spec.prefix, routed, budget
        )
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
        table = self._ends.embedded(used)
        for number, ids in enumerate(rows):
            x = table[torch.searchsorted(used, ids)]
            embedded = _Passed()
            detach = observe(embedded, "embed", number) if observe else None
            streams = embedded(x)[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
            if detach is not None:
                detach()
            yield streams

    def head(
        self, streams: Iterable[Tensor], wanted: str = "all", observe: Observer | None = None
    ) -> list[Tensor]:
        """Logits of each prompt from its last streams, float32 ``(positions, V)`` on the host.

        Args:
            streams: ``(1, S, M, D)`` of each prompt.
            wanted: ``all`` positions, or the ``last``.
            observe: See :meth:`run`.
        """
        collapse = self.load_collapse()
        outputs = []
        for number, h in enumerate(streams):
            h = h.to(self.device)
            x = collapse(h if wanted == "all" else h[:, -1:])
            head = _Passed()
            detach = observe(head, "logits", number) if observe else None
            outputs.append(head(self._ends.project(x))[0].cpu())
            if detach is not None:
                detach()
        return outputs

    def load_collapse(self) -> Collapse:
        """The collapse of the last streams and the last norm, on the device."""
        return self._ends.load_collapse()


class _Passed(nn.Module):
    """Passes its input on, for an observer to see."""

    def forward(self, x: Tensor) -> Tensor:
        return x
