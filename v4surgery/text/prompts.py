"""Prompts: where they come from, and the ids that a model is given for them.

A prompt is a text, token ids, or the messages of a conversation. A text is tokenized as it
stands: no BOS is added and no turn is written around it, unless the prompt format is asked for.

A file of prompts is, by its name:

* ``.jsonl``, ``.ndjson`` or ``.json``: one object a line, ``{"prompt": "text"}``,
  ``{"ids": [0, 17]}`` or ``{"messages": [{"role": "user", "content": "text"}]}``;
* anything else: UTF-8 text, one prompt a line. Empty lines are skipped; a prompt of several lines
  goes into JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from v4surgery.config import V4Config
from v4surgery.errors import UsageError
from v4surgery.parents import HELD_OUT_FILE, boxed_file
from v4surgery.text.chat import SYSTEM, USER, Message, format_chat
from v4surgery.text.tokenizer import Tokenizer

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
KINDS = ("prompt", "ids", "messages")


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue: exactly one of text, ids and messages.

    Attributes:
        where: Its origin, named in errors: ``--prompt``, ``prompts.jsonl:3``.
        text: Or None.
        ids: Token ids, or None.
        messages: Of a conversation, or None.
    """

    where: str
    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None

    def __post_init__(self) -> None:
        given = [part for part in (self.text, self.ids, self.messages) if part is not None]
        assert len(given) == 1, self
        if not given[0]:
            raise UsageError("the prompt is empty", where=self.where, rule="at least one token")


@dataclass(frozen=True)
class PromptFormat:
    """How texts and messages are written for the model.

    Attributes:
        chat: Texts are questions in the published prompt format.
        system: System text of those, or None.
        thinking: Ask for reasoning before the answer, there and in messages.
    """

    chat: bool = False
    system: str | None = None
    thinking: bool = False

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise UsageError(
                "a system text belongs to the prompt format", where="--system", rule="with --chat"
            )

    def write(self, prompt: Prompt) -> str:
        """The whole text of a prompt that is not ids."""
        if prompt.messages is not None:
            return format_chat(
                prompt.messages, thinking=self.thinking, where=f"{prompt.where}: messages"
            )
        assert prompt.text is not None, prompt
        if not self.chat:
            return prompt.text
        messages = (*self.opening(), {"role": USER, "content": prompt.text})
        return format_chat(messages, thinking=self.thinking, where=prompt.where)

    def opening(self) -> tuple[Message, ...]:
        """The messages before the first question."""
        return () if self.system is None else ({"role": SYSTEM, "content": self.system},)

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether a prompt is written in the prompt format."""
        return prompt.messages is not None or (self.chat and prompt.text is not None)


class EncodedPrompt(NamedTuple):
    """Ids that a model takes, and where they come from."""

    where: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptEncoder:
    """Prompts to ids that a model takes.

    Attributes:
        config: Of the model.
        tokenizer: Its tokenizer, or None; then only ids are taken.
        style: How texts and messages are written.
        max_new_tokens: Positions to leave free after a prompt.
    """

    config: V4Config
    tokenizer: Tokenizer | None
    style: PromptFormat = PromptFormat()
    max_new_tokens: int = 0

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Checked ids of a prompt.

        Raises:
            UsageError: There is no tokenizer for a text, or the model does not take the ids.
        """
        ids = prompt.ids
        if ids is None:
            tokenizer = self.require_tokenizer(prompt.where, prompt.text)
            ids = tuple(tokenizer.encode(self.style.write(prompt), prompt.where))
        check_ids(ids, self.config, prompt.where, self.max_new_tokens)
        return EncodedPrompt(prompt.where, ids)

    def encode_all(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Checked ids of each prompt; none for a conversation, which needs a tokenizer too.

        Raises:
            UsageError: A prompt is wrong, or thinking is asked for where it has no place.
        """
        if self.style.chat and not prompts:
            self.require_tokenizer("--chat")
        elif self.style.thinking and not any(map(self.style.applies_to, prompts)):
            raise UsageError(
                "thinking belongs to the prompt format",
                where="--thinking",
                rule="with --chat, or with messages",
            )
        return [self.encode(prompt) for prompt in prompts]

    def require_tokenizer(self, where: str, value: str | None = None) -> Tokenizer:
        """The tokenizer.

        Raises:
            UsageError: The model has none.
        """
        if self.tokenizer is None:
            raise UsageError(
                "the model has no tokenizer, and takes token ids only",
                where=where,
                value=None if value is None else shortened(value),
                rule="a tokenizer.json beside the weights",
                hint='give ids: --ids 0,17,42, or {"ids": [0, 17, 42]} in a file of --prompts',
            )
        return self.tokenizer


def check_ids(ids: Sequence[int], config: V4Config, where: str, max_new_tokens: int = 0) -> None:
    """Raise UsageError unless a model takes these ids and has room for new ones."""
    if not ids:
        raise UsageError("the prompt is empty", where=where, rule="at least one token")
    for position, token in enumerate(ids):
        if not 0 <= token < config.vocab_size:
            raise UsageError(
                "a token id is out of the vocabulary",
                where=where,
                value=f"{token} at position {position}",
                rule=f"0 to {config.vocab_size - 1} (vocab_size {config.vocab_size})",
            )
    limit = config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        raise UsageError(
            "the sequence is longer than the model's positions",
            where=where,
            value=f"{len(ids)} tokens and {max_new_tokens} new ones",
            rule=f"at most {limit} together (max_position_embeddings)",
            hint="shorten the prompt, or ask for fewer with --max-new-tokens",
        )


def parse_ids(text: str, where: str = "--ids") -> tuple[int, ...]:
    """Ids of ``1,2,3``; spaces may stand between them too.

    Raises:
        UsageError: Something else than whole numbers.
    """
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            "not token ids", where=where, value=shortened(text), rule="numbers as in 0,17,42"
        ) from None


def gather_prompts(
    *, text: str | None, file: Path | None, ids: str | None, chat: bool | None = None
) -> list[Prompt]:
    """The prompts that a command names.

    Args:
        text: Of ``--prompt``.
        file: Of ``--prompts``.
        ids: Of ``--ids``.
        chat: Whether ``--chat`` is given, which needs no prompt; None for a verb without it.

    Raises:
        UsageError: None or several are named, or one is wrong.
    """
    options = {"--prompt": text, "--prompts": file, "--ids": ids}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1 or not (given or chat):
        raise UsageError(
            "more than one kind of prompt" if given else "there is no prompt",
            value=", ".join(given) or None,
            rule="one of --prompt, --prompts and --ids"
            + ("" if chat is None else "; or --chat to talk on stdin"),
        )
    if text is not None:
        return [Prompt("--prompt", text=text)]
    if ids is not None:
        return [Prompt("--ids", ids=parse_ids(ids))]
    return [] if file is None else read_prompts(file)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, or of the text held out of a parent in the box; at least one.

    Raises:
        UsageError: The file cannot be read, holds none, or one that is wrong.
    """
    path = boxed_file(path, HELD_OUT_FILE)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the prompts cannot be read", where=path, value=error, rule="a file of UTF-8 text"
        ) from error
    is_json = path.suffix.lower() in JSON_SUFFIXES
    # Not splitlines: form feeds and U+2028 belong to a prompt.
    lines = [
        (f"{path.name}:{number}", line.rstrip("\r"))
        for number, line in enumerate(content.split("\n"), start=1)
        if line.strip()
    ]
    prompts = [
        _from_json(line, where) if is_json else Prompt(where, text=line) for where, line in lines
    ]
    if not prompts:
        raise UsageError("the file holds no prompts", where=path, rule="at least one line")
    return prompts


def shortened(text: str, limit: int = 60) -> str:
    """A value for an error message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _from_json(line: str, where: str) -> Prompt:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            "not a line of JSON", where=where, value=shortened(line), rule=_RULE
        ) from error
    if not isinstance(data, dict) or len(data) != 1 or (kind := next(iter(data))) not in KINDS:
        raise UsageError("not a prompt", where=where, value=shortened(line), rule=_RULE)
    value = data[kind]
    if kind == "prompt" and isinstance(value, str):
        return Prompt(where, text=value)
    if kind == "ids" and _is_list_of(int, value):
        return Prompt(where, ids=tuple(value))
    if kind == "messages" and _is_list_of(dict, value):
        return Prompt(where, messages=tuple(value))
    raise UsageError(f"wrong {kind}", where=where, value=shortened(line), rule=_RULE)


def _is_list_of(kind: type, value: Any) -> bool:
    # Not isinstance: true and false are no ids.
    return isinstance(value, list) and all(type(item) is kind for item in value)


_RULE = 'one of {"prompt": "text"}, {"ids": [0, 17]} and {"messages": [...]}'
