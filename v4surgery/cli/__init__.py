"""The command line: one verb per file, no logic.

Verbs import what they need when they run, so that ``--help`` answers at once. stdout carries the
result; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from v4surgery import __version__
from v4surgery.cli import (
    convert,
    diff,
    generate,
    inspect,
    kernels,
    plan,
    push,
    recipes,
    score,
    slice,
    synth,
    trace,
    validate,
    verify,
)
from v4surgery.distributed.session import Session, begin_session
from v4surgery.errors import V4SurgeryError
from v4surgery.redact import clean_streams

INTERRUPTED = 130

app = typer.Typer(
    name="v4surgery",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Small, faithful, loadable DeepSeek-V4 replicas cut from the real weights.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 the check ran and the replica failed, "
    "130 interrupted.",
)
app.command("inspect")(inspect.run)
app.add_typer(recipes.app, name="recipes")
app.command("synth")(synth.run)
app.command("score")(score.run)
app.command("plan")(plan.run)
app.command("slice")(slice.run)
app.command("verify")(verify.run)
app.command("convert")(convert.run)
app.command("trace")(trace.run)
app.command("validate")(validate.run)
app.command("diff")(diff.run)
app.command("generate")(generate.run)
app.add_typer(kernels.app, name="kernels")
app.command("push")(push.run)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; stands before the verb.")
    ] = False,
) -> None:
    del version, debug  # main() looks for --debug itself: an error may come before this runs


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if args is None else args
    with clean_streams(arguments):
        _run(arguments)


def _run(arguments: list[str]) -> NoReturn:
    session: Session | None = None
    try:
        session = begin_session(arguments, lambda error: _report(error, arguments))
        raise SystemExit(app(args=arguments, prog_name="v4surgery"))
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo(
                "interrupted: synth, slice, convert and push go on from here when run again",
                err=True,
            )
        if session is not None and isinstance(stop.code, int) and stop.code:
            session.leave(stop.code)
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, V4SurgeryError) else 1
        if session is not None:
            session.fail(error, code)
        _report(error, arguments)
        raise SystemExit(code) from None


def _report(error: Exception, arguments: list[str]) -> None:
    if "--debug" in arguments:
        import traceback

        text = "".join(traceback.format_exception(error)).rstrip("\n")
    elif isinstance(error, V4SurgeryError):
        text = f"error: {error}"
    else:
        text = (
            f"error: unexpected {type(error).__name__}: {error}\n"
            "  next: run it again with `v4surgery --debug ...` and report the traceback"
        )
    typer.echo(text, err=True)
