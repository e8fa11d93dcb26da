"""``v4surgery score``: importance scores for recipes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from v4surgery.cli._groups import Computing, Output, Reading, Streaming, Texts, grouped


@grouped
def run(
    parent: Annotated[str, typer.Argument(help="A folder, or ORG/NAME[@REVISION] on the Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Scores file to write.")],
    *,
    texts: Texts,
    axes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Comma-separated keys of a recipe's keep: experts,layers; or all. Others cost "
            "nothing.",
        ),
    ] = "all",
    second_moments: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Second moments too, large matrices: hidden_size,q_lora_rank,o_lora_rank,heads.",
        ),
    ] = None,
    computing: Computing,
    streaming: Streaming,
    reading: Reading,
    output: Output,
) -> None:
    """Score the parent's units by what they do on some prompts.

    The forward runs block by block, as trace does, and only sums are kept. Recipes choose by these
    scores with --scores; docs/scores.md says what each one is.
    """
    from v4surgery.cli._output import print_json, progress_bar, set_verbosity, size
    from v4surgery.cli._streamed import open_streamed
    from v4surgery.importance.names import AXES, MOMENTS, parse_axes
    from v4surgery.importance.score import score_parent

    set_verbosity(output.verbose)
    wanted_axes = parse_axes(axes, AXES, "--axes")
    moments = parse_axes(second_moments, tuple(MOMENTS), "--second-moments")
    with open_streamed(parent, texts, computing, streaming, reading) as streamed:
        blocks = len(streamed.checkpoint.catalogue.blocks)
        with progress_bar(blocks, "score", quiet=output.quiet, unit="block") as advance:
            scoring = score_parent(
                streamed.checkpoint,
                streamed.prompts,
                out,
                axes=wanted_axes,
                second_moments=moments,
                numerics=streamed.numerics,
                device=streamed.device,
                options=streamed.options,
                progress=(lambda _: advance(1)) if advance else None,
            )
    if output.as_json:
        print_json(scoring.to_json())
        return
    seconds = sum(t.seconds for t in scoring.timings)
    typer.echo(
        f"{out}: {scoring.num_scores} scores of {scoring.num_tokens} tokens in "
        f"{scoring.num_prompts} prompt(s); read {size(scoring.bytes_read)} in {seconds:.1f} s; "
        f"{computing.implementation} operations ran"
    )
    arguments = ["--recipe", "mini3b", "--parent", parent, "--scores", str(out)]
    typer.echo(f"next: v4surgery plan {shlex.join(arguments)}")
