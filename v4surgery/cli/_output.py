"""How verbs talk: tables on stdout, progress on stderr, units for people."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

WIDTH = 100
"""Columns where stdout is no terminal, and the most that a line of text takes."""


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Collection[str] = (),
) -> None:
    """A table on stdout, followed by an empty line; ``right`` names the right-aligned columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        title_style="bold",
    )
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        console = Console(highlight=False, width=WIDTH)
        with console.capture() as captured:
            console.print(table)
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
    typer.echo()


def say(text: str) -> None:
    """A sentence on stdout, wrapped; what follows its first line is indented."""
    width = min(shutil.get_terminal_size().columns, WIDTH) if sys.stdout.isatty() else WIDTH
    typer.echo(
        textwrap.fill(
            text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    )


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


def set_verbosity(verbose: int) -> None:
    """What of the log is shown on stderr: warnings, then tries (1), then every request (2)."""
    logger = logging.getLogger("v4surgery")
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())
        logger.propagate = False
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


def warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def size(num_bytes: float) -> str:
    """Bytes for people, decimal units as in --max-shard-size."""
    return _scaled(num_bytes, 3, (" B", " kB", " MB", " GB", " TB"))


def count(number: float) -> str:
    """A number of parameters for people."""
    return _scaled(number, 4, ("", " k", " M", " B", " T"))


def _scaled(number: float, digits: int, units: Sequence[str]) -> str:
    """A number with so many digits, in the first unit that leaves it below 1000."""
    if number < 1000:
        return f"{number:.0f}{units[0]}"
    for unit in units[1:]:
        number /= 1000
        text = f"{number:#.{digits}g}".rstrip(".")
        if float(text) < 1000:
            return text + unit
    return f"{number:.0f}{units[-1]}"


@contextmanager
def progress_bar(
    total: int, label: str, *, quiet: bool, unit: str = "B"
) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr, only on a terminal; yields what to call with bytes (or units) done."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "B", file=sys.stderr, delay=1.0
    ) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance


def parse_size(text: str, where: str) -> int:
    """Bytes from ``256MB``, ``5GB`` or a plain number, by the recipes' own rule."""
    from pydantic import TypeAdapter, ValidationError

    from v4surgery.errors import UsageError
    from v4surgery.recipes._section import ShardBytes

    try:
        return TypeAdapter(ShardBytes).validate_python(int(text) if text.isdecimal() else text)
    except ValidationError:
        raise UsageError(
            "not a size",
            where=where,
            value=text,
            rule="a number of bytes, at least 1, or a size such as 500MB, 5GB, 2GiB",
        ) from None
