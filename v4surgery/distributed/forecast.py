"""How long a streamed forward takes on several ranks: a model of bytes and rates. Imports no torch.

    read    = bytes of a layer / min(ranks x rate of one rank, rate of the storage)
    compute = replicated + experts / ranks + exchange
    total   = read + (layers - 1) x max(read, compute) + compute + read of the head

since a layer is read while the one before it computes and exchanges. A rank computes everything but
the routed experts itself (attention, norms, the shared expert), and of those its share. Exchanged
are each layer's dense weights (an all-gather: every rank receives what others read) and the
experts' sums (an all-reduce of float32: 2 (n - 1) / n times their bytes). Ranks that share a GPU,
or the cores of one machine, compute one after the other there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        layers: Blocks of the trunk.
        expert_bytes: Routed experts of one layer that are read.
        dense_bytes: Everything else of one layer.
        head_bytes: Embedding rows and the head.
        tokens: Of all prompts.
        hidden_size: Channels of a token.
    """

    layers: int
    expert_bytes: int
    dense_bytes: int
    head_bytes: int
    tokens: int
    hidden_size: int

    @property
    def total_bytes(self) -> int:
        return self.layers * (self.expert_bytes + self.dense_bytes) + self.head_bytes


@dataclass(frozen=True)
class Rates:
    """What a machine does, measured on one rank.

    Attributes:
        rank_read: Bytes a second that one rank brings from the storage to its device.
        storage_read: Bytes a second that the storage gives to all ranks together.
        link: Bytes a second between ranks, each way.
        replicated_seconds: Of one layer's compute, what every rank does.
        expert_seconds: Of one layer's compute, what ranks split.
    """

    rank_read: float
    storage_read: float
    link: float
    replicated_seconds: float = 0.0
    expert_seconds: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """Seconds that a forward is expected to take.

    Attributes:
        read: One layer's bytes from the storage.
        exchange: One layer's bytes between ranks.
        compute: One layer, exchange included.
        streamed: The whole forward, reading.
        resident: All layers, with the weights on the devices.
    """

    read: float
    exchange: float
    compute: float
    streamed: float
    resident: float


def forecast(work: Work, rates: Rates, ranks: int, ranks_a_device: int = 1) -> Forecast:
    """The expected time on so many ranks.

    Args:
        work: What is to be done.
        rates: Of one rank that has a device for itself.
        ranks: All of them.
        ranks_a_device: How many share one GPU, or the cores of one machine.
    """
    rate = min(ranks * rates.rank_read, rates.storage_read)
    read = (work.expert_bytes + work.dense_bytes) / rate
    others = (ranks - 1) / ranks
    sums = 4 * work.tokens * work.hidden_size
    summing = 2 * others * sums / rates.link
    exchange = summing + others * work.dense_bytes / rates.link
    own = ranks_a_device * (rates.replicated_seconds + rates.expert_seconds / ranks)
    compute = own + exchange
    streamed = read + (work.layers - 1) * max(read, compute) + compute + work.head_bytes / rate
    return Forecast(read, exchange, compute, streamed, work.layers * (own + summing))
