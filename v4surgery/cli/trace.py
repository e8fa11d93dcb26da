"""``v4surgery trace``: run the forward, keep activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v4surgery.cli._groups import Computing, Output, Reading, Streaming, Texts, grouped


@grouped
def run(
    model: Annotated[str, typer.Argument(help="A folder, or ORG/NAME[@REVISION] on the Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Trace file to write.")],
    *,
    texts: Texts,
    taps: Annotated[
        str | None, typer.Option(help="Comma-separated: out,attn.in,gate.indices,logits; or all.")
    ] = None,
    computing: Computing,
    streaming: Streaming,
    reading: Reading,
    output: Output,
) -> None:
    """Run the forward block by block, reading only what it needs, and keep activations."""
    from v4surgery.cli._output import print_json, print_table, progress_bar, set_verbosity, size
    from v4surgery.cli._streamed import open_streamed
    from v4surgery.validation.record import record_trace
    from v4surgery.validation.taps import parse_taps

    set_verbosity(output.verbose)
    wanted_taps = parse_taps(taps)
    with open_streamed(model, texts, computing, streaming, reading) as streamed:
        layers = streamed.checkpoint.config.num_hidden_layers
        with progress_bar(layers, "trace", quiet=output.quiet, unit="layer") as advance:
            recording = record_trace(
                streamed.checkpoint,
                streamed.prompts,
                out,
                taps=wanted_taps,
                numerics=streamed.numerics,
                device=streamed.device,
                options=streamed.options,
                progress=(lambda _: advance(1)) if advance else None,
            )
    if output.as_json:
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
        f"read {size(recording.bytes_read)} in {seconds:.1f} s; "
        f"{computing.implementation} operations ran"
    )
