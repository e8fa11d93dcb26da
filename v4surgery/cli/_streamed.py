"""A verb that streams a model over some prompts: everything opened, encoded and ready."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from v4surgery.cli._groups import Computing, Reading, Streaming, Texts

if TYPE_CHECKING:
    import torch

    from v4surgery.checkpoint.reader import Checkpoint
    from v4surgery.model.numerics import Numerics
    from v4surgery.model.streaming import StreamOptions


@dataclass(frozen=True)
class Streamed:
    """What runs.

    Attributes:
        checkpoint: The model.
        prompts: Token ids of each.
        numerics: How it computes.
        device: Where.
        options: What it may take, and the ranks that it runs on.
    """

    checkpoint: Checkpoint
    prompts: Sequence[Sequence[int]]
    numerics: Numerics
    device: torch.device
    options: StreamOptions


@contextmanager
def open_streamed(
    model: str, texts: Texts, computing: Computing, streaming: Streaming, reading: Reading
) -> Iterator[Streamed]:
    """Open a model and encode the prompts.

    Raises:
        UsageError: An option is wrong, or the prompts are.
        CheckpointError: It is no model.
    """
    from v4surgery.cli._output import parse_size
    from v4surgery.cli._ranks import computing_ranks
    from v4surgery.model.streaming import StreamOptions
    from v4surgery.text.prompts import PromptEncoder, gather_prompts
    from v4surgery.text.tokenizer import read_tokenizer

    options = StreamOptions(
        parse_size(streaming.weight_memory, "--weight-memory"),
        parse_size(streaming.activation_memory, "--activation-memory"),
        streaming.activations,
    )
    wanted = gather_prompts(text=texts.prompt, file=texts.prompts, ids=texts.ids)
    numerics = computing.numerics()
    with (
        computing_ranks(computing.device) as (team, device),
        reading.open(model) as checkpoint,
    ):
        encoder = PromptEncoder(checkpoint.config, read_tokenizer(checkpoint))
        encoded = [item.ids[: texts.tokens] for item in encoder.encode_all(wanted)]
        workers = reading.workers(checkpoint)
        yield Streamed(
            checkpoint, encoded, numerics, device, replace(options, workers=workers, team=team)
        )
