"""``v4surgery inspect``: what is in a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from v4surgery.cli._groups import Reading, grouped
from v4surgery.cli._options import AsJson, Verbose


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
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="KV cache and FLOPs a token at so many tokens, beside V3.2's."
        ),
    ] = None,
    compat: Annotated[
        bool,
        typer.Option("--compat", help="Known limits of other programs that it meets or breaks."),
    ] = False,
    reading: Reading,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say what is in a checkpoint.

    Its variant, dimensions, tensors by group, parameters and bytes; with --context what serving it
    costs, with --compat what other programs make of it. Only config and headers are read.
    """
    from v4surgery.cli._output import count, print_json, print_table, say, set_verbosity, size
    from v4surgery.compat import check_limits
    from v4surgery.cost import cost_of
    from v4surgery.summary import summarize

    set_verbosity(verbose)
    with reading.open(model) as checkpoint:
        summary = summarize(checkpoint)
        if context is not None:
            summary["cost"] = cost_of(checkpoint.catalogue, context).to_json()
        if compat:
            summary["compat"] = check_limits(checkpoint)
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
    if context is not None:
        show_cost(summary["cost"], summary["name"])
    if compat:
        show_limits(summary["compat"])


def show_cost(cost: dict[str, Any], name: str) -> None:
    """Print what a context costs, beside V3.2."""
    from v4surgery.cli._output import count, print_table, say, size

    v32 = cost["v32"]
    typer.echo()
    print_table(
        f"at {cost['context']:,} tokens",
        ("", name, "V3.2", "share"),
        [
            (
                "KV cache",
                size(cost["kv_bytes"]),
                size(v32["kv_bytes"]),
                f"{100 * cost['kv_share']:.1f} %",
            ),
            (
                "FLOPs of the next token",
                count(cost["flops_per_token"]),
                count(v32["flops_per_token"]),
                f"{100 * cost['flops_share']:.1f} %",
            ),
        ],
        right=(name, "V3.2", "share"),
    )
    say(
        f"sliding windows take {size(cost['window_bytes'])} beside that, at any context; FLOPs are "
        "FP8 ones: BF16 counts double, FP4 half"
    )


def show_limits(limits: list[dict[str, Any]]) -> None:
    """Print which limits are met, and what breaks the others."""
    from v4surgery.cli._output import print_table, say

    typer.echo()
    print_table(
        None,
        ("program", "limit", "this checkpoint"),
        [(item["program"], item["rule"], item["broken"] or "meets it") for item in limits],
    )
    broken = [item for item in limits if item["broken"]]
    for source in dict.fromkeys(item["source"] for item in broken):
        say(f"source: {source}")
    say(
        f"{len(broken)} of {len(limits)} known limits broken; other releases than the ones read "
        "may differ"
    )
