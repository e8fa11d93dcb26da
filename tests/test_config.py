"""One config, three spellings; everything that is no V4 config is refused in words, at once."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from v4surgery.catalogue import Catalogue
from v4surgery.config import LIMITS, V4Config, attention_kind, load_config
from v4surgery.errors import ConfigError
from v4surgery.presets import PRESETS

FLASH = PRESETS["flash"].config
FLASH_RATIOS = [0, 0, *[4, 128] * 20, 4, 0]

# As the published repositories have it, key by key. Source: spec/checkpoint.md.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "vocab_size": 129280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "compress_ratios": FLASH_RATIOS,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 1,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}

# inference/config.json: the same model in the reference code's spelling.
REFERENCE: dict[str, Any] = {
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "norm_eps": 1e-6,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "compress_ratios": FLASH_RATIOS,
    "compress_rope_theta": 160000.0,
    "original_seq_len": 65536,
    "rope_theta": 10000.0,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_mtp_layers": 1,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
}

SLIDING, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)

# What DeepseekV4Config.save_pretrained of transformers 5.23 makes of it: no compress_ratios, no
# num_hash_layers, nested rope parameters.
TRANSFORMERS: dict[str, Any] = {
    **{
        key: value
        for key, value in PUBLISHED.items()
        if key
        not in {
            *("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype"),
            *("rope_theta", "compress_rope_theta"),
        }
    },
    "dtype": "bfloat16",
    "layer_types": [SLIDING, SLIDING, *[CSA, HCA] * 20, CSA],
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "compress_rates": {CSA: 4, HCA: 128},
    "partial_rotary_factor": 0.125,
    "rope_parameters": {
        "main": {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 0.125},
        "compress": {
            "rope_theta": 160000,
            "rope_type": "yarn",
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1.0,
            "attention_factor": 1.0,
            "partial_rotary_factor": 0.125,
        },
    },
    "transformers_version": "5.23.0",
}


def bare(config: V4Config, **changes: Any) -> V4Config:
    """Without the keys that nothing interprets."""
    return config.replace(extra={}, **changes)


def refusal(data: Any) -> str:
    """The text of the ConfigError that a config meets, which must come at once."""
    text = data if isinstance(data, (str, bytes)) else json.dumps(data)
    begin = time.thread_time()
    with pytest.raises(ConfigError) as caught:
        load_config(text, "parent/config.json")
    assert time.thread_time() - begin < 0.5
    assert "where: parent/config.json" in str(caught.value)
    return str(caught.value)


def test_published_config_is_the_preset() -> None:
    assert bare(V4Config.from_dict(PUBLISHED)) == FLASH


def test_reference_code_config_is_the_same_model() -> None:
    same = {"expert_dtype": None, "quantization_config": None}
    assert V4Config.from_dict(REFERENCE) == FLASH.replace(**same)


def test_transformers_config_is_the_same_model_without_drafters() -> None:
    config = V4Config.from_dict(TRANSFORMERS)
    assert bare(config) == FLASH.replace(compress_ratios=tuple(FLASH_RATIOS[:-1]))
    assert config.num_drafters == 0


def test_transformers_itself_writes_what_we_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    # A deep copy: transformers completes the nested objects that it is given.
    given = json.loads(json.dumps(PUBLISHED))
    transformers.DeepseekV4Config(**given).save_pretrained(tmp_path)
    config = load_config((tmp_path / "config.json").read_bytes(), "config.json")
    expected = FLASH.replace(compress_ratios=tuple(FLASH_RATIOS[:-1]))
    assert bare(config, quantization_config=FLASH.quantization_config) == expected


def test_rope_bases_of_a_transformers_config_come_from_its_nested_parameters() -> None:
    nested = json.loads(json.dumps(TRANSFORMERS))
    nested["rope_parameters"]["main"]["rope_theta"] = 5000
    nested["rope_parameters"]["compress"]["rope_theta"] = 7000
    config = V4Config.from_dict(nested)
    assert (config.rope_theta, config.compress_rope_theta) == (5000, 7000)


def test_no_stale_rotary_factor_travels_into_a_replica() -> None:
    # transformers takes partial_rotary_factor over qk_rope_head_dim, so a cut rope would not load.
    config = V4Config.from_dict(TRANSFORMERS).replace(qk_rope_head_dim=32)
    assert "partial_rotary_factor" not in config.to_dict()


def test_code_of_the_parent_is_not_named_by_its_replica() -> None:
    config = V4Config.from_dict({**PUBLISHED, "auto_map": {"AutoModel": "modeling_evil.Model"}})
    assert "auto_map" not in config.to_dict()


def test_ratios_other_than_128_come_back_from_compress_rates() -> None:
    config = V4Config.from_dict({**TRANSFORMERS, "compress_rates": {CSA: 4, HCA: 16}})
    assert set(config.compress_ratios) == {0, 4, 16}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_own_config_json(name: str) -> None:
    config = PRESETS[name].config
    text = json.dumps(config.to_dict())
    back = load_config(text, "config.json")
    assert bare(back) == config
    assert json.dumps(back.to_dict()) == text


def test_keys_that_nothing_interprets_travel_along() -> None:
    config = V4Config.from_dict({**PUBLISHED, "my_note": {"a": [1, 2]}})
    assert config.extra["my_note"] == {"a": [1, 2]}
    assert config.to_dict()["my_note"] == {"a": [1, 2]}


def test_written_config_is_the_published_one_and_what_transformers_needs_beside_it() -> None:
    written = FLASH.to_dict()
    assert {key: written[key] for key in PUBLISHED} == PUBLISHED
    assert written["layer_types"] == TRANSFORMERS["layer_types"]
    assert written["mlp_layer_types"] == TRANSFORMERS["mlp_layer_types"]
    assert written["compress_rates"] == {CSA: 4, HCA: 128}
    assert list(written) == sorted(written)


def test_derived_dims_follow_from_the_published_ones() -> None:
    assert FLASH.heads_per_group == 8
    assert FLASH.nope_head_dim == 448
    assert FLASH.index_nope_head_dim == 64
    assert FLASH.num_drafters == 1
    assert not FLASH.is_dspark
    assert PRESETS["flash-0731"].config.num_drafters == 3
    assert PRESETS["flash-0731"].config.is_dspark
    assert [attention_kind(r) for r in (0, 4, 128, 2)] == [SLIDING, CSA, HCA, HCA]


def test_config_without_yarn_stays_without() -> None:
    config = V4Config.from_dict({**PUBLISHED, "rope_scaling": None})
    assert config.rope_scaling is None
    assert V4Config.from_dict(config.to_dict()).rope_scaling is None


def edited(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED, **changes}


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": (edited(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "a billion experts": (edited(n_routed_experts=10**9), "n_routed_experts is 1000000000"),
    "many layers of many experts": (
        edited(num_hidden_layers=1024, n_routed_experts=16384, compress_ratios=[0] * 1024),
        "n_routed_experts 16384 in each of 1024 blocks exceeds",
    ),
    "a size of four thousand digits": (
        edited(hidden_size=10**4000),
        "hidden_size is 1000",
    ),
    "a negative size": (edited(hidden_size=-4096), "hidden_size is -4096"),
    "zero": (edited(head_dim=0), "head_dim is 0, and must be an integer from 1"),
    "a fraction": (edited(hidden_size=4096.5), "hidden_size is 4096.5, and must be an integer"),
    "a whole float": (edited(o_groups=8.0), "o_groups is 8.0, and must be an integer"),
    "a bool": (edited(num_experts_per_tok=True), "num_experts_per_tok is True"),
    "a string": (edited(num_attention_heads="64"), "num_attention_heads is '64'"),
    "a list for a size": (edited(vocab_size=[129280]), "vocab_size is [129280]"),
    "a negative number of hash layers": (edited(num_hash_layers=-1), "num_hash_layers is -1"),
    "more hash layers than layers": (edited(num_hash_layers=44), "num_hash_layers 44 exceeds"),
    "too few ratios": (edited(compress_ratios=FLASH_RATIOS[:42]), "has 42 entries for 43 layers"),
    "too many ratios": (edited(compress_ratios=[0] * 60), "has 60 entries for 43 layers"),
    "a great many ratios": (edited(compress_ratios=[0] * 10**5), "has 100000 entries"),
    "a negative ratio": (edited(compress_ratios=[-4] * 44), "compress_ratios must hold integers"),
    "a huge ratio": (edited(compress_ratios=[10**9] * 44), "compress_ratios must hold integers"),
    "a bool among the ratios": (edited(compress_ratios=[True] * 44), "compress_ratios must hold"),
    "a list among the ratios": (edited(compress_ratios=[[0]] * 44), "compress_ratios must hold"),
    "a number for the ratios": (edited(compress_ratios=4), "must be a list of integers"),
    "NaN": (edited(routed_scaling_factor=float("nan")), "routed_scaling_factor is nan"),
    "infinity": (
        edited(rope_theta=float("inf")),
        "rope_theta is inf, and must be a number from 0",
    ),
    "a negative epsilon": (edited(rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    "an integer too large for a float": (edited(swiglu_limit=10**400), "swiglu_limit is 1000"),
    "NaN in yarn": (edited(rope_scaling={"factor": float("nan")}), "rope_scaling.factor is nan"),
    "a list in yarn": (edited(rope_scaling={"factor": [16]}), "rope_scaling.factor is [16]"),
    **{
        f"{name} {value}": (edited(**{name: value}), f"{name} is {value!r}, and must be {rule}")
        for name in ("rope_theta", "compress_rope_theta")
        for value, rule in (
            (0, "at least 2"),
            (0.0, "at least 2"),
            (1.9, "at least 2"),
            (1e-320, "at least 2"),
            (-1, "a number from 0"),
            (-10000.0, "a number from 0"),
            (float("nan"), "a number from 0"),
            (float("-inf"), "a number from 0"),
            (1e13, "a number from 0 to 1e+12"),
            (1e308, "a number from 0 to 1e+12"),
        )
    },
    "a clamp that no float32 holds": (edited(swiglu_limit=1e308), "swiglu_limit is 1e+308"),
    "a scale that no int64 holds": (edited(routed_scaling_factor=1e30), "routed_scaling_factor is"),
    "a huge beta": (
        edited(rope_scaling={"factor": 16, "beta_fast": 1e308}),
        "rope_scaling.beta_fast is 1e+308, and must be a number from 1e-30 to 1e+12",
    ),
    "a tiny beta": (
        edited(rope_scaling={"factor": 16, "beta_slow": 1e-320}),
        "beta_slow is 1e-320",
    ),
    "no positions to scale": (
        edited(rope_scaling={"factor": 16, "original_max_position_embeddings": 0}),
        "rope_scaling.original_max_position_embeddings is 0, and must be a number from 1",
    ),
    "heads not in groups": (edited(num_attention_heads=63), "no multiple of o_groups 8"),
    "odd rope": (edited(qk_rope_head_dim=63), "qk_rope_head_dim 63 must be even"),
    "rope larger than a head": (edited(head_dim=32), "at most head_dim 32"),
    "more experts a token than experts": (edited(n_routed_experts=4), "exceeds n_routed_experts 4"),
    "two shared experts": (edited(n_shared_experts=2), "n_shared_experts is 2"),
    "text for quantization": (edited(quantization_config="fp8"), "must be an object"),
    "a string for a bool": (edited(norm_topk_prob="yes"), "norm_topk_prob is 'yes'"),
    "a number for a name": (edited(scoring_func=1), "scoring_func is 1, and must be a string"),
    "targets that are no list": (edited(dspark_target_layer_ids=40), "dspark_target_layer_ids"),
    "targets that do not exist": (
        edited(dspark_target_layer_ids=[43], dspark_markov_rank=256),
        "dspark_target_layer_ids [43] must name layers, 0 to 42",
    ),
    "a negative Markov rank": (
        edited(dspark_target_layer_ids=[40], dspark_markov_rank=-1),
        "dspark_markov_rank is -1",
    ),
    "no Markov rank": (edited(dspark_target_layer_ids=[40]), "dspark_markov_rank is None"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_config_is_refused_for(name: str) -> None:
    data, words = BOMBS[name]
    message = refusal(data)
    assert words in message
    assert len(message) < 2000


def test_all_mistakes_of_a_kind_are_told_at_once() -> None:
    types = refusal(edited(hidden_size=0.5, vocab_size="many", rope_theta=float("nan")))
    assert all(name in types for name in ("hidden_size", "vocab_size", "rope_theta"))
    sizes = refusal(edited(hidden_size=-1, head_dim=0, num_hash_layers=-1))
    assert all(name in sizes for name in ("hidden_size", "head_dim", "num_hash_layers"))


@pytest.mark.parametrize("name", LIMITS)
def test_every_size_has_a_limit(name: str) -> None:
    assert f"{name} is " in refusal(edited(**{name: LIMITS[name] + 1}))


def test_limits_leave_room_for_the_largest_model() -> None:
    for name, limit in LIMITS.items():
        assert getattr(PRESETS["pro-0813"].config, name) * 4 <= limit, name


FOREIGN: dict[str, tuple[Any, str]] = {
    "V4.1": (
        {"model_type": "deepseek_v41", "text_config": {"hidden_size": 4096}},
        "this is DeepSeek-V4.1",
    ),
    "V4.1 under another model type": (edited(engram_hidden_size=512), "this is DeepSeek-V4.1"),
    "V4.1 by its blocks": (
        edited(quantization_config={"weight_block_size": [32, 32]}),
        "this is DeepSeek-V4.1",
    ),
    "Vision-Exp": (edited(vision_config={"depth": 24}), "DeepSeek-V4-Flash-Vision-Exp"),
    "V3.2": ({"model_type": "deepseek_v32", "hidden_size": 7168}, "DeepSeek-V3 or V3.2"),
    "V3": ({"model_type": "deepseek_v3", "hidden_size": 7168}, "DeepSeek-V3 or V3.2"),
    "V3.2 in the reference spelling": (
        {"n_layers": 61, "dim": 7168, "kv_lora_rank": 512},
        "DeepSeek-V3 or V3.2",
    ),
    "Llama": ({"model_type": "llama", "hidden_size": 4096}, "this is a 'llama' model"),
    "a tokenizer": ({"tokenizer_class": "LlamaTokenizer"}, "no model config that v4surgery knows"),
    "an empty object": ({}, "no model config that v4surgery knows"),
    "a model type that is no text": ({"model_type": ["llama"]}, "this is a ['llama'] model"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_relatives_and_strangers_are_refused_by_name(name: str) -> None:
    data, words = FOREIGN[name]
    message = refusal(data)
    assert words in message
    assert "v4surgery cuts DeepSeek-V4 only" in message


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "config is not valid JSON"),
    "half an object": ('{"model_type": "deepseek', "config is not valid JSON"),
    "bytes that are no text": (b"\xff\xfe\x00{}", "config is not valid JSON"),
    "an array": ("[1, 2]", "config is not a JSON object"),
    "a number": ("4", "config is not a JSON object"),
    "null": ("null", "config is not a JSON object"),
    "a page of the web": ("<!doctype html>", "config is not valid JSON"),
    "very deep nesting": ('{"a":' * 100_000 + "1" + "}" * 100_000, "config is not valid JSON"),
    "deep nesting": ('{"a":' + "[" * 200 + "]" * 200 + "}", "config is nested too deeply"),
    "a number of ten thousand digits": ('{"a": 1' + "0" * 10_000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_config_that_is_no_object_is_refused(name: str) -> None:
    text, words = BROKEN[name]
    assert words in refusal(text)


def test_deep_nesting_in_a_field_that_is_copied_is_refused() -> None:
    scaling = '{"factor": ' + "[" * 300 + "]" * 300 + "}"
    text = json.dumps(edited(rope_scaling=None)).replace(
        '"rope_scaling": null', f'"rope_scaling": {scaling}'
    )
    assert "nested too deeply" in refusal(text)


@pytest.mark.parametrize(
    "name", ["hidden_size", "compress_ratios", "o_groups", "index_topk", "sliding_window"]
)
def test_missing_field_is_named(name: str) -> None:
    data = {key: value for key, value in PUBLISHED.items() if key != name}
    message = refusal(data)
    assert "lacks fields" in message
    assert name in message


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([SLIDING, CSA, HCA, 0, 1, 4, 128, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["factor", "main", "compress", CSA, HCA, "x"]), inner)
    ),
    max_leaves=6,
)


def reads_or_refuses(data: dict[str, Any]) -> None:
    """Either a config whose tensors can be enumerated and written, or a ConfigError."""
    try:
        config = load_config(json.dumps(data), "config.json")
    except ConfigError as error:
        assert len(str(error)) < 10_000
        return
    assert load_config(json.dumps(config.to_dict()), "config.json").to_dict() == config.to_dict()
    blocks = Catalogue(config, optional=True).blocks
    assert len(blocks) == len(config.compress_ratios)


FIELDS = sorted(
    {item.name for item in dataclasses.fields(V4Config)} | PUBLISHED.keys() | TRANSFORMERS.keys()
)


@given(name=st.sampled_from(FIELDS), value=JSON_VALUES)
@example(name="layer_types", value=[{}])
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("style", [PUBLISHED, TRANSFORMERS], ids=["published", "transformers"])
def test_any_value_in_any_field_is_read_or_refused(
    style: dict[str, Any], name: str, value: Any
) -> None:
    reads_or_refuses({**style, name: value})


@given(name=st.sampled_from(sorted(REFERENCE)), value=JSON_VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_in_any_field_of_the_reference_spelling_is_read_or_refused(
    name: str, value: Any
) -> None:
    reads_or_refuses({**REFERENCE, name: value})


@given(data=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES))
@settings(max_examples=100, deadline=None)
def test_any_object_is_read_or_refused(data: dict[str, Any]) -> None:
    reads_or_refuses(data)


@given(text=st.binary(max_size=64) | st.text(max_size=64))
def test_any_text_is_read_or_refused(text: bytes | str) -> None:
    with pytest.raises(ConfigError):
        load_config(text, "config.json")
