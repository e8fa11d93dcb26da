"""``v4surgery plan``: what slice would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from v4surgery.cli._groups import Reading, grouped
from v4surgery.cli._options import AsJson, Overrides, Parent, RecipeName, Scores, Verbose

if TYPE_CHECKING:
    from v4surgery.checkpoint.reader import Checkpoint
    from v4surgery.recipes import Recipe


@grouped
def run(
    recipe: RecipeName,
    *,
    parent: Parent = None,
    set_: Overrides = None,
    scores: Scores = None,
    reading: Reading,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say what slice would do.

    The source of each layer, dimensions, parameters, bytes to read and to write, and which steps
    round. Nothing is written. Of a parent on the Hub only config and headers are fetched; which
    experts `by: gate` keeps is then left open.
    """
    from v4surgery.cli._output import print_json, set_verbosity
    from v4surgery.cli._parent import open_parent, overrides_of
    from v4surgery.recipes import load_recipe

    set_verbosity(verbose)
    loaded = load_recipe(recipe, overrides_of(set_, scores))
    with open_parent(loaded, parent, reading) as checkpoint:
        summary = look(checkpoint, loaded)
    if as_json:
        print_json(summary)
    else:
        show(summary)


def look(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """The summary of a plan; of a parent on the Hub without fetching its gates."""
    from v4surgery.api import plan as make_plan
    from v4surgery.slicers.estimate import estimate_plan
    from v4surgery.summary import summarize_plan

    if checkpoint.source.identity()["kind"] != "hub":
        return summarize_plan(make_plan(checkpoint, recipe))
    plan, is_open = estimate_plan(checkpoint, recipe)
    summary = summarize_plan(plan)
    if is_open:
        summary["plan_hash"] = None
        summary["notes"].append(
            "which experts are kept is left open: slice reads the gates and chooses; all else is "
            "as slice does it"
        )
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print a plan for people."""
    from v4surgery.cli._output import count, print_table, say, size

    typer.echo(f"{summary['recipe']} of {summary['parent']}\n")
    before = summary["parent_dimensions"]
    print_table(
        None,
        ("dimension", "parent", "replica"),
        [
            (name, before[name], "same" if value == before[name] else value)
            for name, value in summary["dimensions"].items()
        ],
    )
    print_table(
        None,
        ("replica", "from", "compress ratio", "routing"),
        [
            (
                layer["target"],
                layer["source"],
                layer["ratio"]
                if layer["ratio"] == layer["parent_ratio"]
                else f"{layer['parent_ratio']} -> {layer['ratio']}",
                layer["routing"],
            )
            for layer in summary["layers"]
        ],
    )
    print_table(
        None,
        ("tensors", "how", "meaning"),
        [(item["tensors"], name, item["meaning"]) for name, item in summary["transforms"].items()],
        right=("tensors",),
    )
    for note in summary["notes"]:
        say(f"note: {note}")
    if summary["inexact"]:
        kinds = ", ".join(f"{number} by {name}" for name, number in summary["inexact"].items())
        say(f"rounded: {kinds}; slice measures and reports the error")
    else:
        say("rounded: nothing")
    totals = summary["parameters"]
    say(
        f"parameters: {count(totals['total'])}, {count(totals['without_drafters'])} without "
        f"drafters, {count(totals['active'])} active a token"
    )
    say(
        f"reads: {size(summary['bytes_read'])} in {summary['requests']} requests, and "
        f"{size(summary['selection_bytes'])} to choose what is kept"
    )
    say(
        f"writes: {size(summary['bytes_written'])} in {len(summary['files'])} file(s), with up to "
        f"{size(summary['bytes_of_memory_per_worker'])} of memory a worker"
    )
