"""The card: what it says, that it is true, and that nobody's text becomes more than text.

Oracles: huggingface_hub's ModelCard reads the front matter, markdown-it the body.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

import v4surgery as v4
from tests.hub.conftest import COMMIT, cut_and_verify
from tests.support import parents
from v4surgery.errors import CheckpointError
from v4surgery.hub.card import card_of, is_empty, is_generated, make_card, read_validation
from v4surgery.hub.markdown import fenced, plain
from v4surgery.hub.serving import loading_notes
from v4surgery.presets import FLASH

HOSTILE = (
    "---\nlicense: evil\n---\n# Heading\n<script>alert(1)</script> <img src=x onerror=y> &lt; "
    "[link](javascript:alert(1)) ![image](http://e.example/i.png) http://e.example www.e.example "
    "a@e.example {{ 7*7 }} {% raw %} `code` ```fence``` | cell | *em* _em_ ~~gone~~ $x$ \\(y\\) "
    "<!-- hidden \u202e -->"
)
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def card(folder: Path, repo_id: str | None = "me/half") -> str:
    with v4.open(folder) as checkpoint:
        return make_card(checkpoint, repo_id)


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def tokens(text: str) -> list[Token]:
    """All tokens of a card's body, those inside of lines too."""
    found = []
    for token in MARKDOWN.parse(ModelCard(text).text):
        found += [token, *(token.children or ())]
    return found


def rows(text: str, head: str) -> dict[str, list[str]]:
    """The table whose first column is ``head``, by that column."""
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip().replace("\\", "") for cell in line.split("|")[1:-1]] for line in lines]
    return {cell[0]: cell[1:] for cell in cells}


def test_front_matter_of_a_cut_of_a_published_parent(published: Path, tmp_path: Path) -> None:
    data = ModelCard(card(cut_and_verify(published, tmp_path / "r"))).data.to_dict()
    assert data == {
        "license": "mit",
        "base_model": "deepseek-ai/DeepSeek-V4-Flash",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["v4surgery", "deepseek_v4", "mixture-of-experts", "pruned"],
    }


def test_a_synthetic_parent_is_named_as_such_and_is_no_base_model(replica: Path) -> None:
    published = {"name": "org/synthetic", "revision": COMMIT}
    edit(replica / "v4surgery.json", lambda record: record["parent"].update(published))
    text = card(replica)
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "random-weights" in data["tags"]
    assert "a **synthetic** parent: random values in the layout of demo" in text
    assert "own weights" not in text


def test_a_replica_of_a_replica_of_a_synthetic_parent_is_synthetic_too(
    replica: Path, tmp_path: Path
) -> None:
    again = cut_and_verify(replica, tmp_path / "again", keep={"experts": 2, "layers": 2})
    assert "a **synthetic** parent: random values in the layout of demo" in card(again)


def test_a_random_scaffold_claims_no_weights_of_the_parent(published: Path, tmp_path: Path) -> None:
    text = card(cut_and_verify(published, tmp_path / "r", init="random"))
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "random-weights" in data["tags"]
    assert "**none of its weights**" in text and "own weights" not in text


def test_what_was_kept_of_what_is_what_both_configs_say(small_parent: Path, replica: Path) -> None:
    kept = rows(card(replica), "dimension")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (small_parent, replica)
    )
    compared = [name for name in kept if name in before and name != "compress_ratios"]
    assert len(compared) == 19
    assert {name: kept[name] for name in compared} == {
        name: [str(before[name]), str(after[name])] for name in compared
    }
    assert kept["n_routed_experts"] == ["4", "2"] and kept["num_hidden_layers"] == ["4", "3"]
    with v4.open(small_parent) as parent, v4.open(replica) as cut:
        totals = [f"{each.catalogue.num_parameters():,}" for each in (parent, cut)]
    assert kept["parameters, all"] == totals


def test_layers_are_said_to_come_from_where_the_record_says(replica: Path) -> None:
    blocks = json.loads((replica / "v4surgery.json").read_text())["selections"]["blocks"]
    moved = [(b["target"][:-1], b["source"][:-1]) for b in blocks if b["target"] != b["source"]]
    assert moved, "this test wants a layer that moved"
    text = card(replica)
    for target, source in moved:
        assert f"{target} is {source}" in text


def test_the_recipe_and_the_provenance_are_the_replicas(published: Path, tmp_path: Path) -> None:
    folder = cut_and_verify(published, tmp_path / "r")
    text = card(folder)
    blocks = [token for token in tokens(text) if token.type == "fence"]
    assert blocks[0].content == (folder / "recipe.yaml").read_text()
    record = json.loads((folder / "v4surgery.json").read_text())
    assert rows(text, "what") == {
        "parent": ["deepseek-ai/DeepSeek-V4-Flash"],
        "parent commit": [COMMIT],
        "parent fingerprint (config and headers)": [record["parent"]["fingerprint"]],
        "recipe": ["half"],
        "plan": [record["plan_hash"]],
        "made by": [f"v4surgery {v4.__version__}"],
    }


def test_the_snippet_loads_the_repository_that_it_lies_in(replica: Path) -> None:
    code = [token.content for token in tokens(card(replica)) if token.info == "python"]
    assert len(code) == 1
    compile(code[0], "card", "exec")
    assert 'from_pretrained("me/half")' in code[0]


def test_without_a_validation_the_card_says_so_in_a_sentence(replica: Path) -> None:
    assert "Behaviour: not validated. Nobody has measured yet" in card(replica)


@pytest.mark.parametrize(("verdict", "words"), [("pass", "passed"), ("fail", "**failed**")])
def test_figures_of_a_validation_are_on_the_card(replica: Path, verdict: str, words: str) -> None:
    report = {"verdict": verdict, "grade": "behaviour", "summary": {"logit_kl": 0.012345, "x": 1}}
    (replica / "validation.json").write_text(json.dumps(report))
    text = card(replica)
    assert f"Behaviour (behaviour): validation {words}; logit_kl 0.01235, x 1." in text
    assert "not validated" not in text


@pytest.mark.parametrize(
    "report",
    ["", "[]", "{}", '{"verdict": "maybe", "grade": "", "summary": {}}',
     '{"verdict": "pass", "grade": "", "summary": {"a": "b"}}'],
)  # fmt: skip
def test_a_malformed_validation_is_an_error(replica: Path, report: str) -> None:
    (replica / "validation.json").write_text(report)
    with v4.open(replica) as checkpoint, pytest.raises(CheckpointError, match="validation report"):
        read_validation(checkpoint)


def test_the_verification_is_on_the_card_and_its_absence_too(replica: Path) -> None:
    record = json.loads((replica / "verified.json").read_text())
    assert f"All {record['tensors']:,} tensors, {record['bytes_compared']:,} bytes" in card(replica)
    (replica / "verified.json").unlink()
    assert "Bytes: not verified against the parent yet." in card(replica)


def test_requantization_is_on_the_card_as_measured(replica: Path) -> None:
    assert "Rounding" not in card(replica)
    found = {"tensors": 1092, "lossless": 80, "largest_relative_rms": 0.012345}
    edit(replica / "v4surgery.json", lambda record: record["report"]["requantized"].update(found))
    assert (
        "Rounding: 1,092 tensors were quantized again, 80 of them without loss; the largest "
        "relative error of the others is 0.0123 (rms)."
    ) in card(replica)


MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person\nobtaining a copy"


@pytest.mark.parametrize(
    ("files", "license_"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\nText"}, {"license": "apache-2.0"}),
        (
            {
                "README.md": "---\nlicense: other\nlicense_name: x\nlicense_link: https://e.x/l\n---\n"
            },
            {"license": "other", "license_name": "x", "license_link": "https://e.x/l"},
        ),
        ({"README.md": "---\nlicense: [a\n---\n", "LICENSE": MIT}, {"license": "mit"}),
        ({"README.md": "---\nlicense: 'a: b\\nc'\n---\n", "LICENSE": MIT}, {"license": "mit"}),
        ({"README.md": "no front matter", "LICENSE": MIT}, {"license": "mit"}),
        (
            {"LICENSE": "All rights reserved."},
            {"license": "other", "license_name": "parent-license", "license_link": "LICENSE"},
        ),
        ({}, {}),
    ],
    ids=["card", "own-license", "malformed", "hostile", "file", "other-file", "none"],
)
def test_the_license_is_the_parents(
    small_parent: Path, tmp_path: Path, files: dict[str, str], license_: dict[str, str]
) -> None:
    parent = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    for name, text in files.items():
        (parent / name).write_text(text)
    data = ModelCard(card(cut_and_verify(parent, tmp_path / "r"))).data.to_dict()
    assert {name: data[name] for name in data if name.startswith("license")} == license_


def test_a_hostile_description_is_only_text(small_parent: Path, tmp_path: Path) -> None:
    text = card(cut_and_verify(small_parent, tmp_path / "r", description=HOSTILE))
    assert "license" not in ModelCard(text).data.to_dict()
    kinds = {token.type for token in tokens(text)}
    assert not kinds & {"html_inline", "image", "em_open", "s_open", "hr"}
    assert [t.content.strip() for t in tokens(text) if t.type == "html_block"] == [
        text.split("\n\n")[1]
    ]
    links = {token.attrGet("href") for token in tokens(text) if token.type == "link_open"}
    assert all(str(link).startswith("https://github.com/") for link in links)
    paragraph = MARKDOWN.renderInline(text.split("\n\n")[3])
    assert re.sub(r"\s+", " ", HOSTILE.replace("\u202e", " ")) == unescape(paragraph)


def test_a_hostile_recipe_cannot_leave_its_block(small_parent: Path, tmp_path: Path) -> None:
    folder = cut_and_verify(small_parent, tmp_path / "r")
    with (folder / "recipe.yaml").open("a") as file:
        file.write("# ```\n# </details>\n#```````\n#    ~~~\n")
    text = card(folder)
    blocks = [token.content for token in tokens(text) if token.type == "fence"]
    assert blocks[0] == (folder / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["a|b", "<b>x", "[x](y)", "`x`", "x\n---", "# x", "1. x", "{{x}}"])
def test_a_hostile_parent_name_is_only_text(replica: Path, name: str) -> None:
    edit(replica / "v4surgery.json", lambda record: record["parent"].update(name=name))
    text = card(replica)
    shown_name = " ".join(name.split())
    table = MARKDOWN.render(ModelCard(text).text)
    assert unescape(table).count(f"<td>{shown_name}</td>") == 1
    assert "base_model" not in ModelCard(text).data.to_dict()


@given(st.text())
def test_plain_text_renders_as_itself(text: str) -> None:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    parsed = MARKDOWN.parse(plain(text))
    assert [t.type for t in parsed] == (
        ["paragraph_open", "inline", "paragraph_close"] if line else []
    )
    children = [child for token in parsed for child in token.children or ()]
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == line


@given(st.text(alphabet="`~a\n -#<", max_size=60))
@example("a\n```\n<b>")
@example("a\n````\n```\n# b")
def test_nothing_closes_a_block_but_its_end(text: str) -> None:
    parsed = MARKDOWN.parse(fenced(text, "yaml"))
    assert [token.type for token in parsed] == ["fence"]
    assert parsed[0].content == text.rstrip() + "\n"


def test_known_limits_of_engines_are_told_for_this_replica() -> None:
    said = " ".join(loading_notes(FLASH.replace(n_routed_experts=24, head_dim=64, hc_mult=2)))
    assert "24 experts is not among the numbers" in said
    assert "head_dim is 64 where serving kernels want 512" in said
    assert "hc_mult is 2 where they want 4" in said
    assert "not tested" in said
    whole = " ".join(loading_notes(FLASH))
    assert "Nothing known stands against it" in whole and "not tested" in whole


def test_the_same_replica_has_the_same_card_anywhere(replica: Path, tmp_path: Path) -> None:
    other = parents.copy_checkpoint(replica, tmp_path / "elsewhere")
    assert card(replica) == card(other)


def test_the_owners_readme_is_kept_and_ours_is_made_anew(replica: Path) -> None:
    with v4.open(replica) as checkpoint:
        ours = card_of(checkpoint, "me/half")
    assert is_generated(ours) and not is_empty(ours)
    (replica / "README.md").write_text(ours.replace("warm start", "chat model"))
    with v4.open(replica) as checkpoint:
        assert card_of(checkpoint, "me/half") == ours
    own = "---\nlicense: mit\n---\n\nMine.\n"
    (replica / "README.md").write_text(own)
    with v4.open(replica) as checkpoint:
        assert card_of(checkpoint, "me/half") == own
    assert not is_generated(own)


@pytest.mark.parametrize(
    "text", ["", "  \n", "---\nlicense: mit\n---\n", "---\na: b\n---\n<!-- x -->\n"]
)
def test_a_card_without_a_text_is_empty(text: str) -> None:
    assert is_empty(text)


@pytest.mark.parametrize("key", ["parent", "report", "parameters", "plan_hash", "notes", "tool"])
def test_a_malformed_record_is_an_error_not_a_crash(replica: Path, key: str) -> None:
    for value in (None, [], "x"):
        edit(replica / "v4surgery.json", lambda record, value=value: record.update({key: value}))
        try:
            with v4.open(replica) as checkpoint:
                make_card(checkpoint)
        except CheckpointError as error:
            assert "malformed" in str(error)


def test_front_matter_is_plain_yaml(replica: Path) -> None:
    head = card(replica).split("---\n")[1]
    assert yaml.safe_load(head) == ModelCard(card(replica)).data.to_dict()
