"""Replicas load in transformers whole, hold the right weights, and compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

import v4surgery as v4
from tests.replicas import names
from tests.replicas.support import (
    assert_alive,
    cut,
    load_whole,
    load_with_drafters_reported,
    logits_of,
    recipe,
    stored_tensors,
    token_ids,
)
from tests.support.parents import write_parent
from v4surgery.parents import parent_folder
from v4surgery.recipes import builtin_names
from v4surgery.slicers.rope import cut_rope

# mini3b's shape, every width an eighth or a sixteenth of it, out of the demo's parent.
SMALL_MINI3B = {
    "layers": {
        "count": 8,
        "by": "even",
        "compress_ratios": [0, 0, {"repeat": 2, "of": [4, 112]}, 4, 0],
        "hash_layers": 2,
    },
    "hidden_size": 96,
    "experts": {"keep": 6, "by": "gate", "per_token": 4, "hash_table": "nearest"},
    "moe_intermediate_size": 48,
    "heads": {"groups": 2, "per_group": 3},
    "head_dim": {"nope": 32, "rope": 32},
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "indexer": {"heads": 2, "head_dim": 96, "topk": 24},
    "sliding_window": 16,
    "mtp": "keep",
}
# Two whole windows of ratio 112, and one begun.
PROMPT_TOKENS = 240


@pytest.fixture(scope="module")
def small_mini3b(demo_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(demo_parent, recipe(SMALL_MINI3B), tmp_path_factory.mktemp("mini3b") / "replica")


def test_scaled_mini3b_leaves_only_the_drafter_unread(small_mini3b: Path) -> None:
    loaded = load_with_drafters_reported(small_mini3b, torch.bfloat16)
    assert loaded.missing == loaded.mismatched == set()
    assert loaded.unexpected == names.DRAFTER_KEYS


def test_scaled_mini3b_loads_whole_and_computes(small_mini3b: Path) -> None:
    model = load_whole(small_mini3b, torch.float32)
    config = model.config
    assert config.layer_types.count("heavily_compressed_attention") == 2
    assert config.compress_rates["heavily_compressed_attention"] == 112
    assert config.mlp_layer_types == ["hash_moe"] * 2 + ["moe"] * 6
    assert (config.qk_rope_head_dim, config.head_dim, config.o_groups) == (32, 64, 2)
    assert_alive(logits_of(model, token_ids(1024, PROMPT_TOKENS)))


def test_scaled_mini3b_generates_with_a_cache_what_prefill_says(small_mini3b: Path) -> None:
    model = load_whole(small_mini3b, torch.float32)
    ids = token_ids(1024, PROMPT_TOKENS)
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    logits = logits_of(model, out[:, :-1])
    assert out[0, PROMPT_TOKENS:].tolist() == logits[PROMPT_TOKENS - 1 :].argmax(dim=1).tolist()


def test_every_weight_in_the_model_is_the_replicas(small_mini3b: Path) -> None:
    state = load_whole(small_mini3b, torch.bfloat16).state_dict()
    stored = stored_tensors(small_mini3b)
    config = json.loads((small_mini3b / "config.json").read_text())
    expected = {ours: stored[name] for name, ours in names.MODEL.items()}
    for i in range(config["num_hidden_layers"]):
        by_name = names.of_layer(
            config["compress_ratios"][i], is_hash=i < config["num_hash_layers"]
        )
        layer, theirs = f"layers.{i}.", f"model.layers.{i}."
        expected |= {theirs + ours: stored[layer + name] for name, ours in by_name.items()}
        w1, w2, w3 = (
            torch.stack([stored[f"{layer}ffn.experts.{e}.{w}.weight"] for e in range(6)])
            for w in ("w1", "w2", "w3")
        )
        expected[theirs + "mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        expected[theirs + "mlp.experts.down_proj"] = w2
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        # Norms are stored in bf16 and widened to float32 by transformers, which is exact.
        assert torch.equal(state[name], value.to(state[name].dtype)), name


def test_rope_frequencies_in_transformers_are_every_second_of_the_parents(
    small_mini3b: Path, demo_parent: Path
) -> None:
    parent, replica = (
        DeepseekV4RotaryEmbedding(AutoConfig.from_pretrained(path))
        for path in (demo_parent, small_mini3b)
    )
    # One float32 power on each side: a few units in the last place.
    torch.testing.assert_close(
        replica.main_inv_freq, parent.main_inv_freq[::2], rtol=1e-6, atol=0.0
    )
    wanted = parent.compress_inv_freq[::2]
    error = ((replica.compress_inv_freq - wanted).abs() / wanted).max().item()
    with v4.open(demo_parent) as checkpoint:
        promised = cut_rope(checkpoint.config, 32, allow_mismatch=False).scaled_error
    assert error == pytest.approx(promised, rel=1e-4)
    assert error < 0.4


def test_random_scaffold_has_the_same_keys_and_computes(demo_parent: Path, tmp_path: Path) -> None:
    out = cut(demo_parent, recipe(SMALL_MINI3B, init="random", seed=7), tmp_path / "scaffold")
    model = load_whole(out, torch.float32)
    assert_alive(logits_of(model, token_ids(1024, PROMPT_TOKENS)))


# What is scaled down, of the two parents and of the recipes; everything else is Flash's, and the
# recipe's. Layers 0 to 2 route by hash; ratios 0, 0, then (4, 128) repeated.
#
#     axis                   Flash   deep   wide   recipes
#     layers                    43     10      5   those of more than 10: 8, the same pattern
#     n_routed_experts         256     26     40   as they are
#     hidden_size             4096    512    512   an eighth
#     moe_intermediate_size   2048    256    256   an eighth
#     q_lora_rank             1024    128    128   an eighth
#     o_lora_rank             1024    128    128   an eighth
#     head_dim                 512    128    128   as they are
#     vocab_size            129280   1024   1024   as they are
#
# The native recipes cut the wide parent: they name no width, and 32 experts or whole layers.
FLASH_SCALED = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "head_dim": 128,
    "vocab_size": 1024,
}
PARENTS = {"deep": (10, 26), "wide": (5, 40)}
EIGHT_LAYERS = (
    "keep.layers.count=8",
    "keep.layers.compress_ratios=[0, 0, {repeat: 2, of: [4, 112]}, 4, 0]",
)


class Case(NamedTuple):
    """A built-in recipe made to fit a small parent, and what its replica's config must then say."""

    parent: str
    overrides: tuple[str, ...]
    config: dict[str, object]


def _widths(hidden: int, neurons: int, rank: int) -> tuple[str, ...]:
    return (
        f"keep.hidden_size={hidden}",
        f"keep.moe_intermediate_size={neurons}",
        f"keep.q_lora_rank={rank}",
        f"keep.o_lora_rank={rank}",
    )


BUILTIN = {
    "demo": Case("deep", (), {"num_hidden_layers": 6, "hidden_size": 128, "n_routed_experts": 4}),
    "experts32": Case("wide", (), {"n_routed_experts": 32, "expert_dtype": "fp4"}),
    "layers4": Case("wide", (), {"num_hidden_layers": 4, "expert_dtype": "fp4"}),
    "mini3b": Case(
        "deep",
        (*EIGHT_LAYERS, *_widths(192, 96, 64)),
        {"num_attention_heads": 24, "head_dim": 64, "n_routed_experts": 24, "index_head_dim": 96},
    ),
    "mini1b": Case(
        "deep",
        (*EIGHT_LAYERS, *_widths(128, 80, 48)),
        {"num_attention_heads": 16, "n_routed_experts": 16},
    ),
    "mini300m": Case(
        "deep",
        (*EIGHT_LAYERS, *_widths(64, 80, 32)),
        {"num_attention_heads": 8, "n_routed_experts": 12},
    ),
    "nano": Case("deep", _widths(128, 128, 48), {"num_hidden_layers": 7, "n_routed_experts": 8}),
    "tiny-ci": Case("deep", (), {"num_hidden_layers": 4, "hidden_size": 64}),
    "python-8m": Case("box", (), {"num_hidden_layers": 9, "n_routed_experts": 12}),
}


@pytest.fixture(scope="module")
def flash_parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, boxed = tmp_path_factory.mktemp("flash"), parent_folder("python-14m")
    assert boxed is not None
    return {"box": boxed} | {
        name: write_parent(
            folder / name,
            "flash",
            layers=layers,
            changes={**FLASH_SCALED, "n_routed_experts": experts},
        )
        for name, (layers, experts) in PARENTS.items()
    }


def test_every_built_in_recipe_is_among_the_cases() -> None:
    assert builtin_names() == sorted(BUILTIN)


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_recipe_gives_a_replica_that_loads_and_computes(
    name: str, flash_parents: dict[str, Path], tmp_path: Path
) -> None:
    case = BUILTIN[name]
    replica = cut(flash_parents[case.parent], name, tmp_path / name, case.overrides)
    config = json.loads((replica / "config.json").read_text())
    assert {key: config[key] for key in case.config} == case.config
    model = load_whole(replica, torch.bfloat16)
    num_loaded = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    about = json.loads((replica / "v4surgery.json").read_text())
    assert num_loaded == about["parameters"]["without_drafters"]
    assert_alive(logits_of(model, token_ids(1024, PROMPT_TOKENS)))


@pytest.mark.parametrize("like", ["pro", "flash-base", "flash-0731"])
def test_recipe_for_flash_cuts_the_other_models_too(like: str, tmp_path: Path) -> None:
    changes = FLASH_SCALED | {"num_attention_heads": 16, "o_groups": 4, "n_routed_experts": 8}
    parent = write_parent(tmp_path / "parent", like, layers=8, changes=changes)
    overrides = ("keep.layers.compress_ratios=null", "keep.layers.hash_layers=null")
    replica = cut(parent, "tiny-ci", tmp_path / "replica", overrides)
    assert_alive(logits_of(load_whole(replica, torch.bfloat16), token_ids(1024, PROMPT_TOKENS)))
