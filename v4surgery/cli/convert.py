"""``v4surgery convert``: a checkpoint in another format or layout."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from v4surgery.cli._groups import Output, Reading, grouped
from v4surgery.cli._options import DecodeDevice, Memory


@grouped
def run(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A folder, or ORG/NAME[@REVISION]: published, saved by transformers, or shards "
            "of the official code.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="bf16, fp8, official or published.")
    ],
    *,
    tp: Annotated[
        int | None,
        typer.Option("--tp", metavar="N", min=1, help="Ranks of official shards; by default 1."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest file: 5GB, 500MB; by default one a block."),
    ] = None,
    nonfinite: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where a decoded weight is NaN or infinite: error, warn or keep.",
        ),
    ] = "error",
    reading: Reading,
    memory: Memory = "384MB",
    device: DecodeDevice = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    output: Output,
) -> None:
    """Write a checkpoint in another format or layout.

    To bf16; FP4 experts to FP8; to the tensor-parallel shards of the official code, and back;
    from what transformers saved to the published layout. What the source's layout has lost is
    named, what rounds is counted. The same command again goes on where it was stopped.
    """
    import time

    from v4surgery.cli._allocator import keep_freed_memory
    from v4surgery.cli._output import parse_size, print_json, progress_bar, set_verbosity
    from v4surgery.cli._ranks import writing_ranks
    from v4surgery.conversion.run import plan_conversion, run_conversion
    from v4surgery.slicers.apply import WriteOptions

    set_verbosity(output.verbose)
    keep_freed_memory()
    limit = parse_size(max_shard_size, "--max-shard-size") if max_shard_size else None
    memory_bytes = parse_size(memory, "--memory")
    with reading.open(checkpoint) as source:
        conversion = plan_conversion(
            source, to, ranks=tp, max_shard_size=limit, nonfinite=_policy(nonfinite)
        )
        summary = conversion.summary()
        if dry_run:
            print_json(summary) if output.as_json else show(summary)
            return
        began = time.monotonic()
        total = sum(shard.payload_bytes for shard in conversion.plan.shards)
        with (
            writing_ranks(device) as (team, place),
            progress_bar(total, f"convert to {to}", quiet=output.quiet) as progress,
        ):
            workers = reading.workers(source)
            options = WriteOptions(workers, memory_bytes, place, progress, team)
            done = run_conversion(conversion, out, options)
    written = done.written
    result = {
        **summary,
        "out": str(out),
        "already_complete": written.already_complete,
        "bytes_written_now": written.bytes_written,
        "bytes_reused": written.bytes_reused,
        "chunks_computed": written.chunks_computed,
        "chunks_reused": written.chunks_reused,
        "seconds": round(time.monotonic() - began, 3),
        "report": done.report,
    }
    if output.as_json:
        print_json(result)
    else:
        show_done(result, checkpoint, warns=nonfinite != "keep")


def _policy(name: str) -> str:
    from v4surgery.errors import UsageError

    if name not in ("error", "warn", "keep"):
        raise UsageError(
            "unknown policy", where="--nonfinite", value=name, rule="error, warn or keep"
        )
    return name


def show(summary: dict[str, Any]) -> None:
    """Print a plan for people."""
    from v4surgery.cli._output import print_table, say, size
    from v4surgery.slicers.edit import TRANSFORMS

    layout = f" ({summary['layout']})" if summary["layout"] else ""
    typer.echo(f"{summary['from']}{layout} to {summary['to']}\n")
    print_table(
        None,
        ("tensors", "how", "meaning"),
        [(number, name, TRANSFORMS[name]) for name, number in summary["transforms"].items()],
        right=("tensors",),
    )
    for note in summary["notes"]:
        if note not in summary["lost"]:
            say(f"note: {note}")
    for line in summary["lost"]:
        say(f"lost: {line}")
    if summary["inexact"]:
        kinds = ", ".join(f"{number} by {name}" for name, number in summary["inexact"].items())
        say(f"may round: {kinds}; convert counts and reports what does")
    else:
        say("rounded: nothing")
    say(f"writes: {size(summary['bytes_written'])} in {len(summary['files'])} file(s)")


def show_done(result: dict[str, Any], checkpoint: str, *, warns: bool) -> None:
    """Print what was done, lost and rounded; with ``warns`` each weight that is not finite."""
    from v4surgery.cli._output import say, size, warn

    out, report = result["out"], result["report"]
    for stem, number in report["nonfinite"].items() if warns else ():
        warn(f"{stem}: {number} values are NaN or infinite")
    if result["already_complete"]:
        say(f"{out}: already complete, nothing to do")
    elif result["chunks_reused"]:
        say(
            f"{out}: found {size(result['bytes_reused'])} done, wrote the other "
            f"{size(result['bytes_written_now'])} in {result['seconds']:.1f} s"
        )
    else:
        say(
            f"{out}: wrote {size(result['bytes_written'])} in {len(result['files'])} file(s) in "
            f"{result['seconds']:.1f} s"
        )
    for line in result["lost"]:
        say(f"lost: {line}")
    requantized = report.get("requantized", {})
    if requantized.get("tensors"):
        say(
            f"requantized {requantized['tensors']} tensors: {requantized['lossless']} without "
            f"loss; in the others {requantized['blocks_changed']} of {requantized['blocks']} "
            f"blocks of 128x128 have values that changed, largest relative error "
            f"{requantized['largest_relative_rms']:.2e} (rms)"
        )
    rounded = report.get("rounded", {})
    if rounded:
        say(
            f"rounded to bf16: {sum(rounded.values())} values of {len(rounded)} tensors that were "
            "saved in F32"
        )
    if result["to"] != "official":
        typer.echo(f"next: v4surgery verify {shlex.join([out, '--parent', checkpoint])}")
