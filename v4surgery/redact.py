"""Hub tokens: kept out of what is printed and written, refused where they would be published.

A token is known by its form (``hf_`` or ``api_org_``, and at least 20 letters and digits), or
because it is this user's: of the command line, of the environment, or of ``hf auth login``.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

from v4surgery.errors import UsageError

HIDDEN = "hf_***"
_PREFIXES = ("hf_", "api_org_")
# Those of a browser's log-in are JWTs.
_FORM = re.compile(r"hf_(?:oauth|jwt)_[\w.-]{20,}|(?:hf|api_org)_[A-Za-z0-9]{20,}")
# What an error leaves of a value that it cuts short.
_HEAD = re.compile(r"(?:hf|api_org)_\w+(?=\.\.\.)")
_SHORTEST_HEAD = 12
# A shorter value stands in too many words that are no secret; the Hub's own have 37 characters.
_SHORTEST = 8
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def known_tokens(arguments: Sequence[str] = ()) -> tuple[str, ...]:
    """This user's tokens: of ``--token`` among the arguments, the environment, the log-in."""
    found = [word.removeprefix("--token=") for word in arguments if word.startswith("--token=")]
    found += [value for option, value in pairwise(arguments) if option == "--token"]
    found += [os.environ.get(name, "") for name in _VARIABLES]
    with suppress(OSError, RuntimeError, ValueError):  # none, no home, no text
        found.append(_log_in_file().read_text(encoding="utf-8"))
    stripped = {token.strip() for token in found}
    # The longest first: one may stand inside another.
    return tuple(sorted((t for t in stripped if len(t) >= _SHORTEST), key=len, reverse=True))


def _log_in_file() -> Path:
    """Where ``hf auth login`` keeps the token. Source: ``huggingface_hub.constants``."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    path = os.environ.get("HF_TOKEN_PATH", f"{home}/token")
    return Path(os.path.expandvars(path)).expanduser()


def without_tokens(text: str, known: Iterable[str] = ()) -> str:
    """The text with ``hf_***`` for these tokens, for their heads, and for what has their form."""
    for token in known:
        shortest = min(len(token), _SHORTEST_HEAD)
        if token[:shortest] in text:
            for end in range(len(token), shortest - 1, -1):
                text = text.replace(token[:end], HIDDEN)
    if not any(prefix in text for prefix in _PREFIXES):  # much faster than to search for the form
        return text
    return _HEAD.sub(HIDDEN, _FORM.sub(HIDDEN, text))


def holds_token(text: str, known: Iterable[str] = ()) -> bool:
    """Whether one of these tokens, or what has the form of one, stands in it."""
    return any(token in text for token in known) or _FORM.search(text) is not None


def refuse_token(text: object, where: object) -> None:
    """For what others will see.

    Raises:
        UsageError: A token stands in it.
    """
    if holds_token(str(text), known_tokens()):
        raise UsageError(
            "a Hub token stands where others would see it",
            where=where,
            rule="a token is given as --token or HF_TOKEN, or by `hf auth login`",
            hint="take it out; revoke it on the Hub if somebody saw it",
        )


class CleanStream:
    """A text stream that is written to without tokens."""

    buffer = None  # nothing is written past this

    def __init__(self, stream: TextIO, known: Sequence[str]) -> None:
        self.stream, self._known = stream, known
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8")

    def write(self, text: str) -> int:
        self.stream.write(without_tokens(text, self._known))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def clean_streams(arguments: Sequence[str]) -> Iterator[None]:
    """Keep tokens out of stdout and stderr, whoever writes: a verb, the parser, a log."""
    known = known_tokens(arguments)
    before = sys.stdout, sys.stderr  # None where the process was started without
    ours = [stream and cast(TextIO, CleanStream(stream, known)) for stream in before]
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        # What was put in their place meanwhile stays: a pipe that broke, a rank that is silent.
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]
