"""Groups of options: what typer sees of them, and what a verb gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from v4surgery.cli._groups import grouped


@dataclass(frozen=True)
class Pace:
    """Two options."""

    speed: Annotated[int, typer.Option("--speed", "-s", min=1, help="How fast.")] = 3
    quiet: Annotated[bool, typer.Option("--quiet")] = False


def run_walk(*words: str) -> tuple[int, list[object], str]:
    seen: list[object] = []

    @grouped
    def walk(
        where: str,
        *,
        first: Annotated[str, typer.Option()] = "a",
        pace: Pace,
        last: Annotated[str, typer.Option()] = "z",
    ) -> None:
        """Walk somewhere."""
        seen.extend((where, first, pace, last))

    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(walk)
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, seen, done.output


def test_a_verb_gets_the_options_of_a_group_as_one_value() -> None:
    assert run_walk("home", "-s", "9", "--last", "y") == (0, ["home", "a", Pace(9, False), "y"], "")


def test_options_of_a_group_that_are_not_given_have_its_defaults() -> None:
    assert run_walk("home")[1] == ["home", "a", Pace(), "z"]


def test_the_bounds_of_an_option_in_a_group_hold() -> None:
    code, seen, text = run_walk("home", "--speed", "0")
    assert (code, seen) == (2, [])
    assert "--speed" in text


def test_help_lists_the_options_of_a_group_in_its_place() -> None:
    code, _, text = run_walk("--help")
    assert code == 0
    assert "Walk somewhere." in text
    places = [text.index(name) for name in ("--first", "--speed", "--quiet", "--last")]
    assert places == sorted(places)
    assert "--pace" not in text
