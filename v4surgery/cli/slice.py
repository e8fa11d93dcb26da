"""``v4surgery slice``: cut a replica."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from v4surgery.cli._groups import Output, Reading, grouped
from v4surgery.cli._options import DecodeDevice, Memory, Overrides, Parent, RecipeName, Scores


@grouped
def run(
    recipe: RecipeName,
    *,
    parent: Parent = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="The replica; by default out/ and its name."
        ),
    ] = None,
    set_: Overrides = None,
    scores: Scores = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest file: 5GB, 500MB. Overrides the recipe's."),
    ] = None,
    reading: Reading,
    memory: Memory = "384MB",
    device: DecodeDevice = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, as plan does.")
    ] = False,
    output: Output,
) -> None:
    """Cut a replica.

    The same command again goes on where it was stopped; when all is done, it does nothing.
    """
    import time

    from v4surgery import api
    from v4surgery.cli import plan as plan_verb
    from v4surgery.cli._allocator import keep_freed_memory
    from v4surgery.cli._output import (
        parse_size,
        print_json,
        progress_bar,
        say,
        set_verbosity,
        size,
        warn,
    )
    from v4surgery.cli._parent import open_parent, overrides_of
    from v4surgery.cli._ranks import writing_ranks
    from v4surgery.recipes import load_recipe
    from v4surgery.summary import summarize_plan

    set_verbosity(output.verbose)
    keep_freed_memory()
    overrides = overrides_of(set_, scores)
    if max_shard_size is not None:
        overrides.append(f"store.max_shard_size={parse_size(max_shard_size, '--max-shard-size')}")
    memory_bytes = parse_size(memory, "--memory")
    loaded = load_recipe(recipe, overrides)
    target = out or Path("out") / loaded.name
    with open_parent(loaded, parent, reading) as checkpoint:
        if dry_run:
            summary = plan_verb.look(checkpoint, loaded)
            print_json(summary) if output.as_json else plan_verb.show(summary)
            return
        with writing_ranks(device) as (team, place):
            plan = api.plan(checkpoint, loaded, team=team)
            summary = summarize_plan(plan)
            total = sum(shard.payload_bytes for shard in plan.shards) + plan.bases.nbytes
            began = time.monotonic()
            with progress_bar(total, f"slice {loaded.name}", quiet=output.quiet) as progress:
                replica = api.slice(
                    plan,
                    target,
                    workers=reading.max_workers,
                    memory_bytes=memory_bytes,
                    device=place,
                    progress=progress,
                    team=team,
                )
            seconds = time.monotonic() - began
    written = replica.written
    if output.as_json:
        print_json(
            {
                **summary,
                "out": str(target),
                "already_complete": written.already_complete,
                "bytes_written_now": written.bytes_written,
                "bytes_reused": written.bytes_reused,
                "chunks_computed": written.chunks_computed,
                "chunks_reused": written.chunks_reused,
                "seconds": round(seconds, 3),
                "report": replica.report,
            }
        )
        return
    if loaded.store.nonfinite != "keep":
        for stem, number in replica.report["nonfinite"].items():
            warn(f"{stem}: {number} values are NaN or infinite")
    if written.already_complete:
        say(f"{target}: already complete, nothing to do")
    elif written.chunks_reused:
        say(
            f"{target}: found {size(written.bytes_reused)} done, wrote the other "
            f"{size(written.bytes_written)} of {len(written.files)} file(s) in {seconds:.1f} s"
        )
    else:
        say(
            f"{target}: read {size(summary['bytes_read'])}, wrote {size(summary['bytes_written'])} "
            f"in {len(written.files)} file(s) in {seconds:.1f} s"
        )
    show_report(replica.report)
    # A repository is on the replica's record, with its commit.
    is_folder = parent and checkpoint.source.identity()["kind"] != "hub"
    arguments = [str(target), *(["--parent", parent] if parent and is_folder else [])]
    typer.echo(f"next: v4surgery verify {shlex.join(arguments)}")


def show_report(report: Mapping[str, Any]) -> None:
    """What was measured on the way, for people."""
    from v4surgery.cli._output import print_table, say

    requantized = report["requantized"]
    if requantized["tensors"]:
        say(
            f"requantized {requantized['tensors']} tensors: {requantized['lossless']} without "
            f"loss, largest relative error {requantized['largest_relative_rms']:.2e} (rms)"
        )
    tables = report["hash_tables"]["tokens_by_lost_experts"]
    if tables:
        say("hash tables: tokens by how many of their experts were removed, and replaced")
        typer.echo()
        columns = [str(lost) for lost in range(max(map(len, tables.values())))]
        print_table(
            None,
            ("removed", *columns),
            [(stem, *numbers) for stem, numbers in tables.items()],
            right=columns,
        )
