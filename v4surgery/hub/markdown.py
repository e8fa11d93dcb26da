"""Pieces of Markdown, for text that a stranger may have written.

A recipe's description or a folder's name ends up on a page that others open: it may not become a
link, an image, HTML, mathematics, a heading or a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# The rest of ASCII's punctuation gets a backslash, which CommonMark allows before any of it.
_HARMLESS = frozenset(" .,-/'\"()%;:=+?")
# A backslash itself as an entity: "\\(" would open a formula on the Hub.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;"}
# What is harmless inside a line opens a list at its head, or makes a bare address a link.
_OPENS = re.compile(r"^(?=[-+=])|^\d{1,9}(?=[.)](?: |$))|(?<=\bwww)(?=\.)|(?=://)", re.IGNORECASE)
# Between letters an underscore is one.
_INSIDE_WORD = re.compile(r"(?<=[^\W_])\\_(?=[^\W_])")
_BACKTICKS = re.compile(r"`+")


def plain(text: object) -> str:
    """One line that renders as the text itself, whatever it holds; unprintable becomes a space."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    escaped = _OPENS.sub(r"\g<0>\\", "".join(_escaped(char) for char in line))
    return _INSIDE_WORD.sub("_", escaped)


def _escaped(char: str) -> str:
    if char in _ENTITIES:
        return _ENTITIES[char]
    is_harmless = not char.isascii() or char.isalnum() or char in _HARMLESS
    return char if is_harmless else f"\\{char}"


def fenced(text: str, language: str) -> str:
    """A code block that nothing inside can close."""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()
) -> str:
    """A table of plain cells; ``right`` names the right-aligned columns."""
    marks = ["---:" if column in right else "---" for column in columns]
    lines = [[plain(cell) for cell in columns], marks]
    lines += [[plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    """A list of sentences that are Markdown already."""
    return "\n".join(f"* {item}" for item in items)
