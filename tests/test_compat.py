"""Limits of other programs: each can hold and can break, and names a public source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import v4surgery
from tests.cli.conftest import Run, _plain_terminal, v4  # noqa: F401 - the command line, as a fixture
from v4surgery.compat import LIMITS, Facts, check_limits
from v4surgery.presets import FLASH, PRESETS, PRO

NATIVE = Facts(
    config=FLASH.replace(compress_ratios=FLASH.compress_ratios[:-1]),
    keys=frozenset({"compress_ratios"}),
    linears=frozenset({"FP8"}),
    experts=frozenset({"FP4"}),
    wo_a=frozenset({"FP8"}),
    partial_blocks=0,
)
MINI = {"compress_ratios": (0, 0, 4, 112), "num_hidden_layers": 4}

# What breaks each limit, in the order of the table, and how the finding begins.
BREAKING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"compress_ratios": (112, 128), "num_hidden_layers": 2}, {}, "HCA ratios [112, 128]"),
    (MINI, {}, "ratios [112]"),
    ({"compress_ratios": FLASH.compress_ratios}, {}, "1 drafter block(s)"),
    ({"head_dim": 44, "qk_rope_head_dim": 30}, {}, "int(44 * (30 / 44)) is 29"),
    ({}, {"partial_blocks": 3}, "3 FP8 tensors"),
    ({"n_routed_experts": 24}, {}, "24 experts"),
    (MINI, {}, "ratios [112]"),
    ({"head_dim": 64}, {}, "head_dim 64"),
    ({"index_head_dim": 96}, {}, "index_head_dim 96"),
    ({"num_attention_heads": 256}, {}, "256 heads"),
    ({}, {"wo_a": frozenset({"BF16"})}, "wo_a in BF16"),
    (MINI, {}, "ratios [112]"),
    ({"head_dim": 64}, {}, "head_dim 64"),
    ({"index_head_dim": 96}, {}, "index_head_dim 96"),
    ({"hc_mult": 2}, {}, "hc_mult 2"),
    (MINI, {}, "ratios [112]"),
    (
        {"compress_ratios": FLASH.compress_ratios, "dspark_target_layer_ids": (1,)},
        {},
        "DSpark drafters",
    ),
    ({}, {"experts": frozenset({"FP8_F32"})}, "F32 scales"),
    ({"index_head_dim": 96}, {}, "index_head_dim 96"),
    ({"o_groups": 4}, {}, "not on 8 ranks"),
]


def test_published_flash_without_its_drafter_meets_every_limit() -> None:
    assert [limit.rule for limit in LIMITS if limit.broken(NATIVE) is not None] == []


@pytest.mark.parametrize("number", range(len(LIMITS)), ids=lambda n: f"{LIMITS[n].program}-{n}")
def test_each_limit_is_broken_by_what_breaks_it(number: int) -> None:
    changes, facts, text = BREAKING[number]
    broken = dataclasses.replace(NATIVE, config=NATIVE.config.replace(**changes), **facts)
    found = LIMITS[number].broken(broken)
    assert found is not None and found.startswith(text)


def test_every_case_is_there_and_every_program() -> None:
    assert len(BREAKING) == len(LIMITS)
    programs = list(dict.fromkeys(limit.program for limit in LIMITS))
    assert programs == ["transformers", "vLLM", "SGLang", "Megatron-Bridge", "official code"]


def test_sources_are_files_in_public_repositories() -> None:
    hosts = ("github.com/", "huggingface.co/deepseek-ai/", "transformers 5.23, src/transformers/")
    for limit in LIMITS:
        assert limit.source.startswith(hosts)
        assert any(ending in limit.source for ending in (".py", ".cu", ".cpp"))


def test_transformers_files_that_are_named_exist() -> None:
    import transformers

    root = Path(transformers.__file__).parent
    named = [limit.source for limit in LIMITS if limit.source.startswith("transformers")]
    for source in named:
        assert (root / source.split("src/transformers/")[1]).is_file()


def test_pro_and_the_variants_break_only_what_they_break() -> None:
    pro = dataclasses.replace(NATIVE, config=PRO)
    assert [limit.broken(pro) for limit in LIMITS if limit.broken(pro)] == ["1 drafter block(s)"]
    dspark = dataclasses.replace(NATIVE, config=PRESETS["flash-0731"].config)
    assert {limit.broken(dspark) for limit in LIMITS} == {
        None,
        "3 drafter block(s)",
        "DSpark drafters",
    }


def test_inspect_compat_says_what_a_checkpoint_breaks(
    demo_parent: Path,
    v4: Run,  # noqa: F811
) -> None:
    done = v4("inspect", demo_parent, "--compat")
    assert (done.code, done.err) == (0, "")
    assert "head_dim 128" in done.out and "1 drafter block(s)" in done.out
    assert "4 of 20 known limits broken" in done.out
    data = json.loads(v4("inspect", demo_parent, "--compat", "--json").out)["compat"]
    with v4surgery.open(demo_parent) as checkpoint:
        assert data == check_limits(checkpoint)
    assert {"program", "rule", "broken", "source"} == data[0].keys()
