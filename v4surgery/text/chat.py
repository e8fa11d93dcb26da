"""The published prompt format: turns of a conversation as one text, and a reply taken apart.

::

    <BOS>system text<｜User｜>question<｜Assistant｜></think>answer<EOS><｜User｜>...
    <BOS>system text<｜User｜>question<｜Assistant｜><think>reasoning</think>answer<EOS>

Thinking, the reasoning of turns before the last question is left out and stands as ``</think>``.
Questions without an answer between them are joined by an empty line. A tokenizer adds no BOS: the
format writes it. Tools are not covered. ``chat_template.jinja`` beside this file says the same to
transformers.

Source: spec/checkpoint.md, "Tokenizer"; encoding/encoding_dsv4.py of the published repositories
(its ``thinking_mode``, with ``drop_thinking``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from v4surgery.errors import UsageError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER_MARK = "<｜User｜>"
ASSISTANT_MARK = "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
MARKS = (BOS, EOS, USER_MARK, ASSISTANT_MARK, THINK, END_THINK)

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
REASONING = ("reasoning_content", "reasoning")
KEYS = ("role", "content", *REASONING)

TEMPLATE_FILE = "chat_template.jinja"

Message = Mapping[str, Any]


class _Turn(NamedTuple):
    role: str
    content: str
    reasoning: str


def format_chat(
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    add_generation_prompt: bool = True,
    where: str = "messages",
) -> str:
    """The text that a model is given for a conversation.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": "..."}``; an assistant's
            may have ``reasoning_content`` (or ``reasoning``).
        thinking: Ask for reasoning before the answer.
        add_generation_prompt: After a last question, open the assistant's turn.
        where: Named in errors.

    Raises:
        UsageError: No messages, or one that the format has no place for.
    """
    if not messages:
        raise UsageError("there are no messages", where=where, rule="at least one")
    turns = [_checked(message, f"{where}[{i}]") for i, message in enumerate(messages)]
    last_question = max((i for i, turn in enumerate(turns) if turn.role == USER), default=-1)
    parts = [BOS]
    for i, turn in enumerate(turns):
        before = turns[i - 1].role if i else None
        after = turns[i + 1].role if i + 1 < len(turns) else None
        if turn.role == USER:
            parts += ["\n\n" if before == USER else USER_MARK, turn.content]
            if after == ASSISTANT or (after is None and add_generation_prompt):
                parts += [ASSISTANT_MARK, THINK if thinking and i >= last_question else END_THINK]
        elif turn.role == ASSISTANT:
            if thinking and i > last_question:
                parts += [turn.reasoning, END_THINK]
            parts += [turn.content, EOS]
        else:
            parts.append(turn.content)
    return "".join(parts)


def split_reply(text: str, *, thinking: bool) -> tuple[str, str]:
    """Reasoning and answer of what a model wrote; without ``</think>`` all is still reasoning."""
    if not thinking:
        return "", text
    reasoning, _, answer = text.partition(END_THINK)
    return reasoning, answer


def template_text() -> str:
    """chat_template.jinja, as replicas carry it."""
    return (files(__package__) / TEMPLATE_FILE).read_text(encoding="utf-8")


def needs_template(companions: Mapping[str, bytes]) -> bool:
    """Whether small files have a tokenizer of this format and no chat template of their own.

    Args:
        companions: Contents by file name.
    """
    if TEMPLATE_FILE in companions or "tokenizer.json" not in companions:
        return False
    settings = _parsed(companions.get("tokenizer_config.json", b"{}"))
    added = _parsed(companions["tokenizer.json"]).get("added_tokens")
    if settings.get("chat_template") or not isinstance(added, list):
        return False
    known = [token.get("content") for token in added if isinstance(token, dict)]
    return all(mark in known for mark in MARKS)


def _checked(message: Message, where: str) -> _Turn:
    if not isinstance(message, Mapping):
        raise UsageError("not a message", where=where, value=repr(message), rule="an object")
    unknown = sorted(set(message) - set(KEYS))
    if unknown:
        raise UsageError(
            "a message has keys that the prompt format has no place for",
            where=where,
            value=", ".join(map(str, unknown)),
            rule="only " + ", ".join(KEYS),
        )
    role = message.get("role")
    if role not in ROLES:
        raise UsageError(
            "a message of an unknown role", where=where, value=role, rule=", ".join(ROLES)
        )
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    for key, value in (("content", message.get("content")), ("reasoning", reasoning)):
        if not (value is None or isinstance(value, str)):
            raise UsageError(
                f"the {key} of a message is not text", where=where, value=value, rule="a string"
            )
    return _Turn(role, message.get("content") or "", reasoning or "")


def _parsed(text: bytes) -> dict[str, Any]:
    """A JSON object; empty if it is none, for that is for those who load it to say."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
