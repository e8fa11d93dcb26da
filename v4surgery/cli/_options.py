"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", metavar="NAME", help="A built-in recipe, or the path of a YAML file."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe: keep.experts.keep=8. Repeatable.",
    ),
]
Parent = Annotated[
    str | None,
    typer.Option(
        "--parent", "-p", metavar="FOLDER", help="The parent; by default the recipe's own."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--max-workers",
        metavar="N",
        min=1,
        max=256,
        help="Threads; by default one for each core, at most 8.",
    ),
]
Mode = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="exact, or official: every rounding of the official inference code."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="float32 or bfloat16; by default float32 in exact, else bfloat16."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")]
Implementation = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Which operations run: reference (anywhere), or triton (a GPU)."
    ),
]
