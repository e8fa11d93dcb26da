"""``v4surgery diff``: two models or traces, place by place, and where they part first."""

from __future__ import annotations

from typing import Annotated

import typer

from v4surgery.cli._groups import Computing, grouped
from v4surgery.cli._options import AsJson, FirstTokens, Parent, Prompts, Quiet


@grouped
def run(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a model, or a trace.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What A's errors are relative to.")],
    *,
    parent: Parent = None,
    prompts: Prompts = None,
    tokens: FirstTokens = None,
    taps: Annotated[
        str | None, typer.Option(help="Comma-separated: out,attn.in,logits; by default all.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest relative error that counts as equal.")
    ] = 1e-5,
    computing: Computing,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare the activations of two models or traces, layer by layer.

    A replica is compared with its parent, or with another replica of it, at the layers and units
    that both have. Where shapes differ otherwise, linear CKA stands for the error.
    """
    from v4surgery.cli._model import find_device
    from v4surgery.cli._output import print_json, print_table, progress_bar, say
    from v4surgery.validation.sides import DIFF_TAPS, diff_models
    from v4surgery.validation.taps import parse_taps

    computing.numerics()  # says what is wrong before anything is read
    with progress_bar(0, "diff", quiet=quiet, unit="layer") as advance:
        found = diff_models(
            a,
            b,
            parent=parent,
            prompts=prompts,
            tokens=tokens,
            taps=DIFF_TAPS if taps is None else parse_taps(taps),
            make_numerics=computing.numerics,
            device=find_device(computing.device),
            tolerance=tolerance,
            progress=(lambda _: advance(1)) if advance else None,
        )
    if as_json:
        print_json(found.to_json())
        return
    print_table(
        None,
        ("A", "B", "place", "error", "cosine", "worst token", "other measure"),
        [
            (
                row.place.block.rstrip(".") or "model",
                row.other.rstrip(".") or "model",
                row.place.tap,
                *(
                    (
                        f"{row.close.relative_error:.3g}",
                        f"{row.close.cosine:.6f}",
                        f"{row.close.worst_error:.3g}",
                    )
                    if row.close
                    else ("", "", "")
                ),
                f"CKA {row.cka:.4f}"
                if row.cka is not None
                else f"{row.overlap:.2%} of choices equal"
                if row.overlap is not None
                else "",
            )
            for row in found.rows
        ],
        right=("error", "cosine", "worst token"),
    )
    if any(found.only):
        say(f"places that only one has: {found.only[0]} of A, {found.only[1]} of B")
    first = found.first_divergence
    if first is None:
        say(f"no divergence above {tolerance:g}")
    else:
        say(f"first divergence above {tolerance:g}: {first.place.block}{first.place.tap}")
