"""``v4surgery score``: importance scores for recipes."""

from __future__ import annotations

import shlex
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
    parent: Annotated[str, typer.Argument(help="A folder, or ORG/NAME[@REVISION] on the Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Scores file to write.")],
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: TokenIds = None,
    tokens: FirstTokens = None,
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
    """Score the parent's units by what they do on some prompts.

    The forward runs block by block, as trace does, and only sums are kept. Recipes choose by these
    scores with --scores; docs/scores.md says what each one is.
    """
    from dataclasses import replace

    from v4surgery.api import default_workers
    from v4surgery.checkpoint.reader import open_checkpoint
    from v4surgery.cli._model import make_numerics
    from v4surgery.cli._output import parse_size, print_json, progress_bar, set_verbosity, size
    from v4surgery.cli._ranks import computing_ranks
    from v4surgery.importance.names import AXES, MOMENTS, parse_axes
    from v4surgery.importance.score import score_parent
    from v4surgery.model.streaming import StreamOptions
    from v4surgery.text.prompts import PromptEncoder, gather_prompts
    from v4surgery.text.tokenizer import read_tokenizer

    set_verbosity(verbose)
    wanted_axes = parse_axes(axes, AXES, "--axes")
    moments = parse_axes(second_moments, tuple(MOMENTS), "--second-moments")
    options = StreamOptions(
        parse_size(weight_memory, "--weight-memory"),
        parse_size(activation_memory, "--activation-memory"),
        activations,
    )
    wanted = gather_prompts(text=prompt, file=prompts, ids=ids)
    numerics = make_numerics(mode, dtype, implementation)
    with (
        computing_ranks(device) as (team, place),
        open_checkpoint(parent, revision=revision, token=token, workers=max_workers) as checkpoint,
    ):
        encoder = PromptEncoder(checkpoint.config, read_tokenizer(checkpoint))
        encoded = [item.ids[:tokens] for item in encoder.encode_all(wanted)]
        workers = max_workers or default_workers(checkpoint)
        blocks = len(checkpoint.catalogue.blocks)
        with progress_bar(blocks, "score", quiet=quiet, unit="block") as advance:
            scoring = score_parent(
                checkpoint,
                encoded,
                out,
                axes=wanted_axes,
                second_moments=moments,
                numerics=numerics,
                device=place,
                options=replace(options, workers=workers, team=team),
                progress=(lambda _: advance(1)) if advance else None,
            )
    if as_json:
        print_json(scoring.to_json())
        return
    seconds = sum(t.seconds for t in scoring.timings)
    typer.echo(
        f"{out}: {scoring.num_scores} scores of {scoring.num_tokens} tokens in "
        f"{scoring.num_prompts} prompt(s); read {size(scoring.bytes_read)} in {seconds:.1f} s; "
        f"{implementation} operations ran"
    )
    arguments = ["--recipe", "mini3b", "--parent", parent, "--scores", str(out)]
    typer.echo(f"next: v4surgery plan {shlex.join(arguments)}")
