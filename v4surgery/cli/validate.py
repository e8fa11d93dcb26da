"""``v4surgery validate``: bytes, function and behaviour of a replica, with a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4surgery.cli._groups import Computing, Reading, grouped
from v4surgery.cli._options import ActivationMemory, AsJson, FirstTokens, Parent, Quiet, Workers

if TYPE_CHECKING:
    from v4surgery.validation.verdict import Validation

SHOWN_FAILURES = 10


@grouped
def run(
    replica: Annotated[str, typer.Argument(metavar="REPLICA", help="Folder of a replica.")],
    *,
    parent: Parent = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts: text, one a line; or .jsonl. Else a few built-in."),
    ] = None,
    tokens: FirstTokens = None,
    masked: Annotated[
        bool, typer.Option("--masked", help="Compare with the masked parent too.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write report.html and validation.json there."),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Compare the bytes of so many random chunks only."),
    ] = None,
    computing: Computing,
    weight_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Weights in memory at a time, of each model.")
    ] = "8GB",
    activation_memory: ActivationMemory = "4GB",
    max_workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge a replica by its parent: bytes, activations and predictions.

    The parent is streamed layer by layer beside the replica. Thresholds are in the recipe's
    `validate:` section. Exit code 3 where the replica fails.
    """
    from dataclasses import replace

    from v4surgery.api import default_workers
    from v4surgery.checkpoint.reader import open_checkpoint
    from v4surgery.cli._output import parse_size, print_json, progress_bar
    from v4surgery.cli._parent import open_parent
    from v4surgery.cli._ranks import computing_ranks
    from v4surgery.distributed.team import leads
    from v4surgery.model.streaming import StreamOptions
    from v4surgery.slicers.provenance import read_recipe
    from v4surgery.validation.default_prompts import choose_prompts
    from v4surgery.validation.report import write_report
    from v4surgery.validation.validate import validate_replica

    workers = max_workers or default_workers()
    options = StreamOptions(
        parse_size(weight_memory, "--weight-memory"),
        parse_size(activation_memory, "--activation-memory"),
        workers=workers,
    )
    computing.numerics()  # says what is wrong before anything is read
    with (
        computing_ranks(computing.device) as (team, place),
        open_checkpoint(replica) as checkpoint,
        open_parent(read_recipe(checkpoint), parent, Reading()) as source,
    ):
        blocks = len(source.catalogue.blocks) + masked * len(checkpoint.catalogue.blocks)
        with progress_bar(1 + blocks, "validate", quiet=quiet, unit="step") as advance:
            found = validate_replica(
                checkpoint,
                source,
                choose_prompts(checkpoint, prompts, tokens),
                make_numerics=computing.numerics,
                device=place,
                masked=masked,
                sample=sample,
                workers=workers,
                options=replace(options, team=team),
                progress=(lambda _: advance(1)) if advance else None,
            )
        # Here the others wait: a rank that fails ends them all.
        files = write_report(found, report) if report is not None and leads(team) else []
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
        for file in files:
            typer.echo(f"wrote {file}")
    if not found.passed:
        raise _failure(found, files)


def _show(found: Validation) -> None:
    from v4surgery.cli._output import print_table, say, size
    from v4surgery.validation.thresholds import MEANINGS

    limits = {check.name: check.rule for check in found.checks}
    print_table(
        None,
        ("number", "value", "threshold", "meaning"),
        [
            (name, f"{value:.4g}", limits.get(name, ""), MEANINGS[name])
            for name, value in found.numbers.items()
        ],
        right=("value",),
    )
    print_table(
        "worst layers, teacher-forced",
        ("replica", "from", "kind", "error", "free", "worst at", "error there"),
        [
            (
                *(w.layer, w.source, w.kind),
                *(f"{w.taught_error:.3g}", f"{w.free_error:.3g}"),
                *(w.submodule, f"{w.submodule_error:.3g}"),
            )
            for w in found.worst_layers
        ],
        right=("error", "free", "error there"),
    )
    if found.not_run is not None:
        say(f"the models were not run: {found.not_run}")
    if found.masked is not None:
        whole = found.masked.verdict == "not graded" and found.masked.not_graded
        say(f"masked parent: {found.masked.verdict}" + (f"; {whole[0]}" if whole else ""))
    setting = found.setting
    say(
        f"{found.verdict}: {found.replica} against {found.parent}, {found.grade}; "
        f"{setting.num_tokens} tokens in {setting.num_prompts} prompt(s), "
        f"{size(found.verification.bytes_compared)} compared; {setting.implementation} operations "
        f"in {setting.dtype} on {setting.device}"
    )


def _failure(found: Validation, files: list[Path]) -> Exception:
    from v4surgery.errors import VerificationFailed

    lines = [*found.failures] or [str(found.not_run)]
    shown = lines[:SHOWN_FAILURES]
    if len(lines) > SHOWN_FAILURES:
        shown.append(f"and {len(lines) - SHOWN_FAILURES} more")
    if not found.verification.passed:
        hint = "slice it again into another folder"
    elif files:
        hint = f"look at {files[0]}"
    else:
        hint = "see where, with --report DIR"
    return VerificationFailed(
        f"{found.replica} fails the validation against {found.parent}",
        where=lines[0].partition(": ")[0],
        value="\n         ".join(shown),
        hint=hint,
    )
