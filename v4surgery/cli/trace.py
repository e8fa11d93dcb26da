"""``v4surgery trace``: run the forward, keep activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v4surgery.cli._options import (
    ActivationMemory,
    Activations,
    AsJson,
    Device,
    Dtype,
    FirstTokens,
    Implementation,
    Mode,
    Prompt,
    Prompts,
    Quiet,
    Revision,
    Token,
    TokenIds,
    Verbose,
    WeightMemory,
    Workers,
)


def run(
    model: Annotated[str, typer.Argument(help="A folder, or ORG/NAME[@REVISION] on the Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Trace file to write.")],
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: TokenIds = None,
    tokens: FirstTokens = None,
    taps: Annotated[
        str | None, typer.Option(help="Comma-separated: out,attn.in,gate.indices,logits; or all.")
    ] = None,
    mode: Mode = "exact",
    dtype: Dtype = None,
    device: Device = "cpu",
    implementation: Implementation = "reference",
    weight_memory: WeightMemory = "8GB",
    activation_memory: ActivationMemory = "4GB",
    activations: Activations = "host",
    revision: Revision = None,
    token: Token = None,
    max_workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run the forward block by block, reading only what it needs, and keep activations."""
    from dataclasses import replace

    from v4surgery.api import default_workers
    from v4surgery.checkpoint.reader import open_checkpoint
    from v4surgery.cli._model import make_numerics
    from v4surgery.cli._output import (
        parse_size,
        print_json,
        print_table,
        progress_bar,
        set_verbosity,
        size,
    )
    from v4surgery.cli._ranks import computing_ranks
    from v4surgery.model.streaming import StreamOptions
    from v4surgery.text.prompts import PromptEncoder, gather_prompts
    from v4surgery.text.tokenizer import read_tokenizer
    from v4surgery.validation.record import record_trace
    from v4surgery.validation.taps import parse_taps

    set_verbosity(verbose)
    wanted_taps = parse_taps(taps)
    options = StreamOptions(
        parse_size(weight_memory, "--weight-memory"),
        parse_size(activation_memory, "--activation-memory"),
        activations,
    )
    wanted = gather_prompts(text=prompt, file=prompts, ids=ids)
    numerics = make_numerics(mode, dtype, implementation)
    with (
        computing_ranks(device) as (team, place),
        open_checkpoint(model, revision=revision, token=token, workers=max_workers) as checkpoint,
    ):
        encoder = PromptEncoder(checkpoint.config, read_tokenizer(checkpoint))
        encoded = [item.ids[:tokens] for item in encoder.encode_all(wanted)]
        workers = max_workers or default_workers(checkpoint)
        layers = checkpoint.config.num_hidden_layers
        with progress_bar(layers, "trace", quiet=quiet, unit="layer") as advance:
            recording = record_trace(
                checkpoint,
                encoded,
                out,
                taps=wanted_taps,
                numerics=numerics,
                device=place,
                options=replace(options, workers=workers, team=team),
                progress=(lambda _: advance(1)) if advance else None,
            )
    if as_json:
        print_json(recording.to_json())
        return
    print_table(
        None,
        ("layer", "seconds", "waiting", "read"),
        [
            (t.prefix.rstrip("."), f"{t.seconds:.2f}", f"{t.waited:.2f}", size(t.bytes_read))
            for t in recording.timings
        ],
        right=("seconds", "waiting", "read"),
    )
    seconds = sum(t.seconds for t in recording.timings)
    typer.echo(
        f"{out}: {recording.num_activations} activations of {recording.num_tokens} tokens; "
        f"read {size(recording.bytes_read)} in {seconds:.1f} s; {implementation} operations ran"
    )
