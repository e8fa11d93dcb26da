"""``v4surgery generate``: text from a prompt, a file of prompts, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from v4surgery.cli._groups import Computing, Output, grouped
from v4surgery.cli._options import Revision, Token


@grouped
def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A parent or a replica: a folder, or ORG/NAME[@REVISION] on the Hub.",
        ),
    ],
    *,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="A text to continue, as it stands; with --chat a question."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: text, one a line; or .jsonl, a line "
            '{"prompt": ...}, {"ids": [...]} or {"messages": [...]}.',
        ),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="IDS", help="Token ids to continue: 0,17,42.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The published prompt format; without a prompt, talk: a line a turn."
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System text of --chat.")
    ] = None,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Reason before answering, in --chat and messages.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, help="0 is greedy; above it samples.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample among the likeliest that together have it."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the sampling.")] = 0,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts that run together.")
    ] = 8,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they come, prompt after prompt.")
    ] = False,
    computing: Computing,
    revision: Revision = None,
    token: Token = None,
    output: Output,
) -> None:
    """Continue prompts, or talk.

    stdout is the text only; from a model without a tokenizer, token ids.
    """
    import time

    from v4surgery.checkpoint.reader import open_checkpoint
    from v4surgery.cli._model import find_device
    from v4surgery.cli._output import print_json, set_verbosity
    from v4surgery.errors import UsageError
    from v4surgery.model.generate import Sampling
    from v4surgery.model.loader import load_model
    from v4surgery.text.completion import Completer
    from v4surgery.text.prompts import PromptEncoder, PromptFormat, gather_prompts
    from v4surgery.text.tokenizer import read_tokenizer

    if stream and output.as_json:
        raise UsageError("--json prints when all is done", rule="either --stream or --json")
    set_verbosity(output.verbose)
    wanted = gather_prompts(text=prompt, file=prompts, ids=ids, chat=chat)
    style = PromptFormat(chat, system, thinking)
    sampling = Sampling(temperature, top_p, seed)
    numerics, place = computing.numerics(), find_device(computing.device)
    with open_checkpoint(model, revision=revision, token=token) as checkpoint:
        encoder = PromptEncoder(
            checkpoint.config, read_tokenizer(checkpoint), style, max_new_tokens
        )
        # Before the weights are read: a wrong prompt should not wait for them.
        encoded = encoder.encode_all(wanted)
        loaded = load_model(checkpoint, numerics, device=place)
    completer = Completer(loaded, encoder, sampling, batch_size)
    on_text = _write if stream else None
    began, done = time.monotonic(), []
    for completion in (
        completer.complete(encoded, on_text) if wanted else completer.converse(_turns(), on_text)
    ):
        done.append(completion)
        if not (stream or output.as_json):
            typer.echo(completion.text)
    seconds = time.monotonic() - began
    if output.as_json:
        print_json(
            {
                "model": checkpoint.name,
                "mode": computing.mode,
                "dtype": str(numerics.dtype).removeprefix("torch."),
                "device": str(place),
                "implementation": computing.implementation,
                "operations": dict(sorted(numerics.ops.ran.items())),
                "seconds": round(seconds, 3),
                "completions": [asdict(completion) for completion in done],
            }
        )
    if not output.quiet:
        num_read = sum(len(completion.prompt_ids) for completion in done)
        num_new = sum(len(completion.ids) for completion in done)
        typer.echo(
            f"{len(done)} prompt(s), {num_read} tokens read, {num_new} written in {seconds:.1f} s; "
            f"mode {computing.mode}, {numerics.dtype}, {place}, "
            f"{computing.implementation} operations",
            err=True,
        )


def _write(text: str) -> None:
    typer.echo(text, nl=False)


def _turns() -> Iterator[str]:
    """Lines of stdin until it ends; empty ones are no turns."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
