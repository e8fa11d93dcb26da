"""``v4surgery inspect``: what is in a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from v4surgery.cli._options import AsJson, Revision, Token, Verbose, Workers


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A parent or a replica: a folder, or ORG/NAME[@REVISION] on the Hub.",
        ),
    ],
    revision: Revision = None,
    token: Token = None,
    max_workers: Workers = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say what is in a checkpoint.

    Its variant, dimensions, tensors by group, parameters and bytes. Only config and headers are
    read.
    """
    from v4surgery.checkpoint.reader import open_checkpoint
    from v4surgery.cli._output import count, print_json, print_table, say, set_verbosity, size
    from v4surgery.summary import summarize

    set_verbosity(verbose)
    with open_checkpoint(model, revision=revision, token=token, workers=max_workers) as checkpoint:
        summary = summarize(checkpoint)
    if as_json:
        print_json(summary)
        return
    typer.echo(f"{summary['name']}: {summary['variant']}")
    for line in summary["remarks"]:
        say(line)
    typer.echo()
    print_table(None, ("dimension", "value"), list(summary["dimensions"].items()))
    rows = [
        (
            group,
            ", ".join(item["formats"]),
            item["tensors"],
            count(item["parameters"]),
            size(item["bytes"]),
        )
        for group, item in summary["groups"].items()
    ]
    print_table(
        None,
        ("group", "stored as", "tensors", "parameters", "bytes"),
        rows,
        right=("tensors", "parameters", "bytes"),
    )
    totals = summary["parameters"]
    say(
        f"{count(totals['total'])} parameters ({count(totals['without_drafters'])} without "
        f"drafters, {count(totals['active'])} active a token), {summary['tensors']} tensors, "
        f"{size(summary['payload_bytes'])} in {summary['files']} file(s)"
    )
