"""Before the first block and behind the last one: embedding and logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.validation.masked.grading import Grades, relative, token_errors
from v4surgery.validation.masked.masks import Masks, Places
from v4surgery.validation.masked.record import Record
from v4surgery.validation.masked.streams import MaskedStreams
from v4surgery.validation.masked.weights import Weights

TABLE_ROWS = 8192


class MaskedEnds:
    """What the parent has outside any block, masked."""

    def __init__(
        self, replica: Checkpoint, parent: Checkpoint, record: Record, device: torch.device
    ) -> None:
        self.replica, self.parent, self.kept = replica, parent, record.model
        self.device = device
        self.masks = Masks(record.model, parent.config, device)
        self.places = Places(record.model, parent.config, device)
        weight = Weights(parent, replica, record.model, record.recipe.compensate, device)
        self.streams = MaskedStreams(parent.config, self.masks, weight)

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding of the replica's ids, ``(S, D)``."""
        used, inverse = self.places.tokens[ids].unique(return_inverse=True)
        return self._rows("embed", used.cpu().numpy())[inverse] * self.masks.channel_D

    def grade_start(self, ids: Tensor, h: Tensor, grades: Grades, first: str, prompt: int) -> None:
        """Grade the streams that enter the first block, ``(S, M', D')``."""
        mine = self.embed(ids)[:, None] * self.masks.stream_M[:, None]
        errors = token_errors(self.places.streams.seen(mine), h)
        grades.add(first, "in", errors, prompt, graded=True)

    def grade_embedding(self, grades: Grades) -> None:
        """Grade every row of the embedding; its position is the token id."""
        errors = []
        for begin in range(0, len(self.kept.tokens), TABLE_ROWS):
            rows = np.arange(begin, min(begin + TABLE_ROWS, len(self.kept.tokens)))
            mine = self.embed(torch.from_numpy(rows).to(self.device))
            values = self.replica.read_float(self.replica.tensors["embed"], rows)
            theirs = torch.from_numpy(values).to(self.device)
            errors.append(token_errors(self.places.channels.seen(mine), theirs))
        grades.add("", "embed", torch.cat(errors), 0, graded=True)

    def grade_logits(
        self, last: Sequence[Tensor], logits: Sequence[Tensor], grades: Grades
    ) -> None:
        """Grade logits ``(S, V')`` of each prompt from the last streams ``(S, M', D')``."""
        xs = [
            self.streams.norm("norm", self.streams.collapse_head(self.places.streams.placed(h)))
            for h in last
        ]
        difference = [torch.zeros(len(x), dtype=torch.float64, device=self.device) for x in xs]
        size = [torch.zeros_like(total) for total in difference]
        for begin in range(0, len(self.kept.tokens), TABLE_ROWS):
            part = slice(begin, begin + TABLE_ROWS)
            rows = self._rows("head", np.asarray(self.kept.tokens[part]))
            for i, x in enumerate(xs):
                mine = x @ rows.T
                off = mine - logits[i][:, part].to(self.device)
                difference[i] += off.double().square().sum(1)
                size[i] += mine.double().square().sum(1)
        for i in range(len(xs)):
            errors = relative(difference[i].sqrt(), size[i].sqrt())
            grades.add("", "logits", errors.float(), i, graded=True)

    def _rows(self, stem: str, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        values = self.parent.read_float(self.parent.tensors[stem], rows)
        return torch.from_numpy(values).to(self.device)
