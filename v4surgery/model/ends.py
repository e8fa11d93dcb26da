"""The ends of a streamed model: the embedding rows that prompts use, and the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import TensorRef
from v4surgery.config import V4Config
from v4surgery.distributed.team import Team
from v4surgery.model.hyper_connections import Connected
from v4surgery.model.linear import Linear
from v4surgery.model.loader import place
from v4surgery.model.norm import RMSNorm
from v4surgery.model.numerics import Numerics
from v4surgery.model.ranges import RangeLoader

HEAD_ROWS = 8192


class Collapse(Connected):
    """The weighted sum of the last streams, and the last norm."""

    def __init__(self, config: V4Config, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, numerics)
        self.add_connection("head", config.hc_mult, 1)

    def forward(self, h: Tensor) -> Tensor:
        x: Tensor = self.norm(self.collapse_head(h))
        return x


class Ends:
    """Reads and runs what stands before the first block and after the last.

    Args:
        checkpoint: A parent or a replica.
        numerics: Mode, dtype and operations.
        loader: Reads to the device.
        head_bytes: Memory for the head's rows; more of them are read again for each prompt.
        team: Ranks that read parts of the rows each, or None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        numerics: Numerics,
        loader: RangeLoader,
        head_bytes: int,
        team: Team | None,
    ) -> None:
        self.checkpoint, self.numerics, self.loader = checkpoint, numerics, loader
        self.team = team
        head = checkpoint.tensors["head"].weight
        size = head.shape[0] * head.shape[1] * numerics.dtype.itemsize
        self._fits = size <= head_bytes
        self._kept: list[Linear] | None = None

    def embedded(self, rows: Tensor) -> Tensor:
        """Some rows of the embedding, on the host; each rank reads a part of them.

        Args:
            rows: Token ids, int64 ``(N,)``.

        Returns:
            ``(N, D)`` in the dtype of activations.
        """
        stored = self.checkpoint.tensors["embed"]

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

    def load_collapse(self) -> Collapse:
        """What comes before the head, on the device."""
        collapse = Collapse(self.checkpoint.config, self.numerics)
        stems = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm")
        refs = [self.checkpoint.tensors[stem] for stem in stems]
        tensors = self.loader.load_common([stored.weight for stored in refs])
        for stem, stored in zip(stems, refs, strict=True):
            place(collapse, stem, stored, tensors[stored.weight], None, self.numerics)
        return collapse.to(self.loader.device)

    def project(self, x: Tensor) -> Tensor:
        """Logits, float32 ``(1, S, V)``, of normed ``(1, S, D)``."""
        return torch.cat([linear.wide(x) for linear in self._head()], -1)

    def _head(self) -> Iterable[Linear]:
        """Slices of the head's rows: read once where they all fit, else every time."""
        if not self._fits:
            return self._read_head()
        if self._kept is None:
            self._kept = list(self._read_head())
        return self._kept

    def _read_head(self) -> Iterator[Linear]:
        ref = self.checkpoint.tensors["head"].weight
        for begin in range(0, ref.shape[0], HEAD_ROWS):
            end = min(begin + HEAD_ROWS, ref.shape[0])
            rows = TensorRef(
                ref.file,
                ref.dtype,
                (end - begin, *ref.shape[1:]),
                ref.begin + begin * ref.row_bytes,
                ref.begin + end * ref.row_bytes,
            )
            linear = Linear(end - begin, ref.shape[1], self.numerics)
            weight = self.loader.load_common([rows])[rows]
            linear.weight = nn.Parameter(weight.to(self.numerics.dtype), requires_grad=False)
            yield linear
