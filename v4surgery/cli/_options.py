"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
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
Scores = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        metavar="FILE",
        help="Scores file from `v4surgery score`. Overrides the recipe's.",
    ),
]
Parent = Annotated[
    str | None,
    typer.Option(
        "--parent",
        "-p",
        metavar="PARENT",
        help="The parent: a folder, or ORG/NAME[@REVISION] on the Hub. By default the recipe's.",
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
        help="Threads; by default 8 where the Hub is read, else one for each core, at most 8.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="NAME", help="Branch, tag or commit of the repository that is read."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        help="For the Hub; by default HF_TOKEN, or the one of `hf auth login`.",
        show_default=False,
    ),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, help="Say when the Hub is asked again; -vv: every request."
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
Memory = Annotated[
    str, typer.Option(metavar="SIZE", help="Bound on what the workers use together.")
]
DecodeDevice = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where weights are decoded: auto (a GPU if there is one), cpu or cuda. The bytes "
        "are the same.",
    ),
]
Prompt = Annotated[str | None, typer.Option(help="A text, as it stands.")]
Prompts = Annotated[Path | None, typer.Option(help="File of prompts: text, one a line; or .jsonl.")]
TokenIds = Annotated[str | None, typer.Option(help="Token ids: 0,17,42.")]
FirstTokens = Annotated[
    int | None, typer.Option(min=1, help="Only the first tokens of each prompt.")
]
WeightMemory = Annotated[str, typer.Option(metavar="SIZE", help="Weights in memory at a time.")]
ActivationMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="What the longest prompt may take.")
]
Activations = Annotated[str, typer.Option(help="Where they wait between blocks: host or disk.")]
