"""The published prompt format: against texts written out by hand, and Python against Jinja."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import v4surgery as v4
from tests.replicas.support import cut, recipe
from tests.support.parents import copy_checkpoint, write_small_parent
from v4surgery.errors import UsageError
from v4surgery.text import chat
from v4surgery.text.chat import format_chat, needs_template, split_reply, template_text
from v4surgery.text.tokenizer import Tokenizer

Say = Callable[..., str]

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."}
SUM = {"role": "user", "content": "1+1=?"}
TWO = {"role": "assistant", "content": "2", "reasoning_content": "Add."}

# As the published script writes them: encoding_dsv4.py, thinking_mode chat and thinking.
WRITTEN = [
    (
        [HELLO],
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>",
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜><think>",
    ),
    (
        [SYSTEM, HELLO],
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hello<｜Assistant｜></think>",
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hello<｜Assistant｜><think>",
    ),
    (
        [SYSTEM, HELLO, ANSWER, SUM],
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hello<｜Assistant｜></think>Hello!"
        "<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜></think>",
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hello<｜Assistant｜></think>Hello!"
        "<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜><think>",
    ),
    (
        [HELLO, ANSWER, SUM, TWO],
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello!"
        "<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜></think>2<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello!"
        "<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜><think>Add.</think>2"
        "<｜end▁of▁sentence｜>",
    ),
    (
        [HELLO, SUM],
        "<｜begin▁of▁sentence｜><｜User｜>hello\n\n1+1=?<｜Assistant｜></think>",
        "<｜begin▁of▁sentence｜><｜User｜>hello\n\n1+1=?<｜Assistant｜><think>",
    ),
]


@pytest.fixture(scope="module")
def replica(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a parent with the published tokenizer, which has no chat template."""
    folder = tmp_path_factory.mktemp("chat")
    parent = write_small_parent(folder / "parent", vocab_size=129280, hidden_size=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(published / name, parent / name)
    keep = {"layers": 2, "experts": {"keep": 2, "per_token": 1}, "hidden_size": 16, "mtp": "drop"}
    out = cut(parent, recipe(keep), folder / "replica")
    assert v4.verify(out, parent).passed
    # Right here: a change of the companion alone must be seen, against the same parent.
    spoilt = copy_checkpoint(out, folder / "spoilt")
    (spoilt / "chat_template.jinja").write_text("{{ messages }}")
    problems = v4.verify(spoilt, parent, sample=1).problems
    assert problems == ("chat_template.jinja: not what the plan makes of the parent's",)
    return out


@pytest.fixture(scope="module")
def theirs(replica: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(replica)
    return loaded


@pytest.fixture(scope="module")
def say(theirs: PreTrainedTokenizerBase) -> Say:
    """The text that transformers writes with the replica's chat template."""

    def apply(messages: list[dict[str, Any]], add: bool = True, **options: Any) -> str:
        text = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add, **options
        )
        assert isinstance(text, str)
        return text

    return apply


@pytest.mark.parametrize(("messages", "plain", "thinking"), WRITTEN)
def test_turns_are_written_as_published(
    messages: list[dict[str, Any]], plain: str, thinking: str, say: Say
) -> None:
    assert format_chat(messages) == say(messages) == plain
    assert format_chat(messages, thinking=True) == say(messages, thinking=True) == thinking
    assert say(messages, enable_thinking=True) == thinking


def test_every_order_of_roles_is_the_same_in_python_and_jinja(say: Say) -> None:
    texts = {
        "system": ["", " \n sys \n"],
        "user": ["{{ 7 * 7 }}\n", "<b>&</b>'\""],
        "assistant": ["\n done. ", ""],
    }
    tried = 0
    for length in (1, 2, 3, 4):
        for roles in itertools.product(texts, repeat=length):
            messages: list[dict[str, Any]] = [
                {"role": role, "content": texts[role][i % 2]} for i, role in enumerate(roles)
            ]
            for i, message in enumerate(messages):
                if message["role"] == "assistant" and i % 2:
                    message["reasoning_content"] = " hm\n"
            for thinking, add in itertools.product((False, True), repeat=2):
                ours = format_chat(messages, thinking=thinking, add_generation_prompt=add)
                assert ours == say(messages, add, thinking=thinking), messages
                tried += 1
    assert tried == 4 * (3 + 9 + 27 + 81)


def test_reasoning_goes_by_both_of_its_names(say: Say) -> None:
    renamed = [HELLO, {"role": "assistant", "content": "Hello!", "reasoning": "A greeting."}]
    expected = format_chat([HELLO, ANSWER], thinking=True)
    assert format_chat(renamed, thinking=True) == say(renamed, thinking=True) == expected
    assert "A greeting.</think>Hello!" in expected


def test_a_replica_tokenizes_a_conversation_as_we_do(
    theirs: PreTrainedTokenizerBase, tokenizer: Tokenizer
) -> None:
    messages = [SYSTEM, HELLO, ANSWER, SUM]
    for thinking, last in ((False, 128822), (True, 128821)):
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=True, thinking=thinking, return_dict=False
        )
        assert ids == tokenizer.encode(format_chat(messages, thinking=thinking))
        assert ids[0] == 0 and ids[-2:] == [128804, last] and ids.count(128803) == 2


def test_transformers_can_continue_the_last_answer(theirs: PreTrainedTokenizerBase) -> None:
    text = theirs.apply_chat_template(
        [HELLO, {"role": "assistant", "content": "Well,"}],
        tokenize=False,
        continue_final_message=True,
    )
    assert text == "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Well,"


def test_marks_are_single_tokens_of_the_published_tokenizer(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(mark) for mark in chat.MARKS]
    assert ids == [[0], [1], [128803], [128804], [128821], [128822]]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "tool", "content": "x"}], "unknown role"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "is not text"),
        ([HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "tool"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(
    messages: list[dict[str, Any]], text: str, say: Say
) -> None:
    with pytest.raises(UsageError, match=text):
        format_chat(messages)
    with pytest.raises(TemplateError, match=text):
        say(messages)


def test_an_empty_conversation_is_refused(say: Say) -> None:
    with pytest.raises(UsageError, match="there are no messages"):
        format_chat([])
    with pytest.raises(ValueError, match="empty conversation"):  # transformers' own
        say([])


def test_tools_are_refused_not_dropped(say: Say) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(TemplateError, match="no tools"):
        say([HELLO], tools=[tool])


def test_an_error_says_which_message_and_key() -> None:
    with pytest.raises(UsageError) as raised:
        format_chat([HELLO, {"role": "assistant", "text": "x"}], where="p.jsonl:3: messages")
    assert str(raised.value) == (
        "a message has keys that the prompt format has no place for\n"
        "  where: p.jsonl:3: messages[1]\n"
        "  value: text\n"
        "  rule: only role, content, reasoning_content, reasoning"
    )


def test_a_reply_is_taken_apart_at_the_end_of_the_reasoning() -> None:
    assert split_reply("2", thinking=False) == ("", "2")
    assert split_reply("Add.</think>2", thinking=True) == ("Add.", "2")
    assert split_reply("Add, and", thinking=True) == ("Add, and", "")


def test_a_replica_carries_the_template(replica: Path) -> None:
    assert (replica / "chat_template.jinja").read_text(encoding="utf-8") == template_text()


def test_a_parents_own_template_is_kept() -> None:
    companions = {
        "tokenizer.json": json.dumps(
            {"added_tokens": [{"content": mark} for mark in chat.MARKS]}
        ).encode()
    }
    assert needs_template(companions)
    assert not needs_template({**companions, "chat_template.jinja": b""})
    assert not needs_template({**companions, "tokenizer_config.json": b'{"chat_template": "x"}'})
    assert needs_template({**companions, "tokenizer_config.json": b'{"chat_template": null}'})


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{}", b'{"added_tokens": [1, {"content": "<think>"}]}'),
        b'{"added_tokens": [{"content": []}, {"content": {}}]}',
    ],
)
def test_another_tokenizer_gets_no_template(content: bytes) -> None:
    assert not needs_template({"tokenizer.json": content})
    assert not needs_template({"LICENSE": content})
