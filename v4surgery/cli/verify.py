"""``v4surgery verify``: grade one of faithfulness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v4surgery.cli._groups import Output, Reading, grouped
from v4surgery.cli._options import Parent

SHOWN_PROBLEMS = 10


@grouped
def run(
    replica: Annotated[
        str, typer.Argument(metavar="REPLICA", help="A folder, or ORG/NAME[@REVISION].")
    ],
    *,
    parent: Parent = None,
    sample: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Compare only so many random chunks.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the sample.")] = 0,
    reading: Reading,
    output: Output,
) -> None:
    """Compare a replica with its parent, byte for byte.

    Every tensor is computed again from the parent, by the replica's own record of what was kept;
    without --parent from the repository and commit on record, if there is one. --revision is the
    parent's.
    Exit code 3 on a difference. Where there is none, verified.json is written beside the replica,
    with the digests of its files: push asks for it.
    """
    from dataclasses import replace

    from v4surgery.cli._allocator import keep_freed_memory
    from v4surgery.cli._output import print_json, progress_bar, say, set_verbosity, size, warn
    from v4surgery.cli._parent import open_parent, recorded_parent
    from v4surgery.errors import VerificationFailed
    from v4surgery.slicers.provenance import read_recipe
    from v4surgery.slicers.verified import record_verification
    from v4surgery.slicers.verify import verify_replica

    set_verbosity(output.verbose)
    keep_freed_memory()
    with (
        replace(reading, revision=None).open(replica) as checkpoint,
        open_parent(
            read_recipe(checkpoint),
            parent or recorded_parent(checkpoint, reading.revision),
            reading,
        ) as source,
        progress_bar(checkpoint.payload_bytes, "verify", quiet=output.quiet) as progress,
    ):
        workers = reading.workers(checkpoint, source)
        verdict = verify_replica(
            checkpoint,
            source,
            sample=sample,
            seed=seed,
            workers=workers,
            progress=progress,
        )
        recorded = record_verification(checkpoint, verdict, workers=workers)
    if output.as_json:
        print_json(
            {
                "passed": verdict.passed,
                "tensors": verdict.tensors,
                "bytes_compared": verdict.bytes_compared,
                "sampled": verdict.sampled,
                "problems": list(verdict.problems),
                "rounded": list(verdict.rounded),
                "record": str(recorded) if recorded else None,
            }
        )
    if not verdict.passed:
        shown = list(verdict.problems[:SHOWN_PROBLEMS])
        if len(verdict.problems) > SHOWN_PROBLEMS:
            shown.append(f"and {len(verdict.problems) - SHOWN_PROBLEMS} more")
        raise VerificationFailed(
            f"{replica} is not what its plan makes of {source.name}: "
            f"{len(verdict.problems)} problem(s)",
            value="\n         ".join(shown),
            hint="slice it again into another folder",
        )
    if recorded is None and not verdict.sampled and Path(replica).is_dir():
        warn("verified.json could not be written beside the replica; push will ask for it")
    if not output.as_json:
        extent = "a sample of " if verdict.sampled else "all "
        say(
            f"{replica}: verified against {source.name}, {extent}{verdict.tensors} tensors, "
            f"{size(verdict.bytes_compared)} equal{_rounding(verdict.rounded)}"
        )


def _rounding(rounded: tuple[str, ...]) -> str:
    if not rounded:
        return ""
    return (
        f", {len(rounded)} of them up to one unit in the last place, where this machine adds the "
        "sums of another basis in another order"
    )
