"""V4Config: one set of names for what the published, the reference and transformers' configs say.

The published ``config.json`` is flat; the reference code's ``inference/config.json`` spells the
same fields differently (``dim``, ``n_layers``, ...); transformers wants ``layer_types``,
``mlp_layer_types`` and ``compress_rates`` beside them. :func:`V4Config.from_dict` reads the first
two, and what transformers writes back; :meth:`V4Config.to_dict` writes the published keys and
what transformers needs, so that every loader finds what it looks for.

Source: spec/checkpoint.md, "config.json (flat)"; transformers' ``DeepseekV4Config``.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from v4surgery.errors import ConfigError

CSA_RATIO = 4
"""The one compress ratio that has an indexer and overlapping windows."""

SLIDING, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
HASH_MOE, SCORE_MOE = "hash_moe", "moe"

QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

# Published name -> name in the reference code's own file; fields not listed are spelt the same.
REFERENCE_NAMES = {
    "hidden_size": "dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "num_hash_layers": "n_hash_layers",
    "num_attention_heads": "n_heads",
    "num_experts_per_tok": "n_activated_experts",
    "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale",
    "qk_rope_head_dim": "rope_head_dim",
    "sliding_window": "window_size",
    "rms_norm_eps": "norm_eps",
    "num_nextn_predict_layers": "n_mtp_layers",
}

# Upper limits keep a hostile config from allocating anything; the largest V4 is far below each.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "moe_intermediate_size": 1 << 18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 14,
    "head_dim": 1 << 14,
    "qk_rope_head_dim": 1 << 14,
    "q_lora_rank": 1 << 18,
    "o_lora_rank": 1 << 18,
    "o_groups": 1 << 12,
    "n_routed_experts": 1 << 14,
    "num_experts_per_tok": 1 << 10,
    "hc_mult": 64,
    "index_n_heads": 1 << 14,
    "index_head_dim": 1 << 14,
    "index_topk": 1 << 24,
    "sliding_window": 1 << 30,
    "max_position_embeddings": 1 << 40,
    "hc_sinkhorn_iters": 1 << 12,
}
# Far beyond any V4, and no overflow: neither in float32, nor in YaRN's powers and logarithms.
MAX_REAL = 1e12
MIN_SCALING = 1e-30
MIN_THETA = 2
MAX_DRAFTERS = 16
MAX_RATIO = 1 << 16
# Each limit alone lets pass layers x experts that would fill the memory with names; Pro has 24,192.
MAX_EXPERTS_IN_ALL = 1 << 16
MAX_NESTING = 32

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 80


@dataclass(frozen=True)
class RopeScaling:
    """YaRN constants of the compressed layers (no mscale)."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class V4Config:
    """The dimensions and constants of one V4 model, under their published names.

    ``compress_ratios`` has an entry for every layer and then one for every drafter block.
    ``extra`` carries keys that nothing here interprets.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    routed_scaling_factor: float
    n_shared_experts: int = 1
    scoring_func: str = "sqrtsoftplus"
    norm_topk_prob: bool = True
    topk_method: str = "noaux_tc"
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    expert_dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = None
    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: tuple[int, ...] | None = None
    dspark_markov_rank: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_drafters(self) -> int:
        """Drafter blocks (``mtp.*``): the entries of compress_ratios beyond the layers."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def is_dspark(self) -> bool:
        return self.dspark_target_layer_ids is not None and self.num_drafters > 0

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.o_groups

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    @property
    def index_nope_head_dim(self) -> int:
        return self.index_head_dim - self.qk_rope_head_dim

    def layer_types(self) -> list[str]:
        """Attention kind of each trunk layer, in transformers' words."""
        return [attention_kind(ratio) for ratio in self.compress_ratios[: self.num_hidden_layers]]

    def replace(self, **changes: Any) -> V4Config:
        return dataclasses.replace(self, **changes)

    def problems(self) -> list[str]:
        """Every rule that the values break, one sentence each; empty when consistent."""
        found = [
            f"{name} is {_shown.repr(value)}, and must be an integer from 1 to {limit}"
            for name, limit in LIMITS.items()
            if not _is_int(value := getattr(self, name)) or not 1 <= value <= limit
        ]
        if not _is_int(self.num_hash_layers) or self.num_hash_layers < 0:
            found.append(
                f"num_hash_layers is {_shown.repr(self.num_hash_layers)}, and must be 0 or more"
            )
        ratios = self.compress_ratios
        if not all(_is_int(r) and 0 <= r <= MAX_RATIO for r in ratios):
            found.append(f"compress_ratios must hold integers from 0 to {MAX_RATIO}")
        if found:
            return found
        if not self.num_hidden_layers <= len(ratios) <= self.num_hidden_layers + MAX_DRAFTERS:
            found.append(
                f"compress_ratios has {len(ratios)} entries for {self.num_hidden_layers} layers; "
                f"it needs one for each layer and one for each drafter block"
            )
        if len(ratios) * self.n_routed_experts > MAX_EXPERTS_IN_ALL:
            found.append(
                f"n_routed_experts {self.n_routed_experts} in each of {len(ratios)} blocks "
                f"exceeds {MAX_EXPERTS_IN_ALL} experts in all"
            )
        found += [
            f"{name} is {_shown.repr(theta)}, and must be at least {MIN_THETA}"
            for name in ("rope_theta", "compress_rope_theta")
            if not (theta := getattr(self, name)) >= MIN_THETA
        ]
        if self.num_attention_heads % self.o_groups:
            found.append(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"o_groups {self.o_groups}"
            )
        rope = self.qk_rope_head_dim
        if rope % 2 or rope > min(self.head_dim, self.index_head_dim):
            found.append(
                f"qk_rope_head_dim {rope} must be even and at most head_dim {self.head_dim} "
                f"and index_head_dim {self.index_head_dim}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            found.append(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"n_routed_experts {self.n_routed_experts}"
            )
        if self.num_hash_layers > self.num_hidden_layers:
            found.append(
                f"num_hash_layers {_shown.repr(self.num_hash_layers)} exceeds "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if self.n_shared_experts != 1:
            found.append(
                f"n_shared_experts is {_shown.repr(self.n_shared_experts)}; every V4 has 1"
            )
        return found + self._dspark_problems()

    def _dspark_problems(self) -> list[str]:
        if not self.is_dspark:
            return []
        found = []
        targets = self.dspark_target_layer_ids or ()
        if not targets or not all(_is_int(t) and 0 <= t < self.num_hidden_layers for t in targets):
            found.append(
                f"dspark_target_layer_ids {_shown.repr(list(targets))} must name layers, "
                f"0 to {self.num_hidden_layers - 1}"
            )
        rank, limit = self.dspark_markov_rank, LIMITS["q_lora_rank"]
        if not _is_int(rank) or not 1 <= (rank or 0) <= limit:
            found.append(
                f"dspark_markov_rank is {_shown.repr(rank)}, and must be an integer "
                f"from 1 to {limit}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """config.json in the published key style, with what transformers needs beside it."""
        ratios = self.compress_ratios[: self.num_hidden_layers]
        hca = next((r for r in ratios if attention_kind(r) == HCA), 128)
        data: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            **self.extra,
        }
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name not in ("extra", "rope_scaling") and value is not None:
                data[item.name] = list(value) if isinstance(value, tuple) else value
        if self.rope_scaling is not None:
            data["rope_scaling"] = {"type": "yarn", **_whole(dataclasses.asdict(self.rope_scaling))}
        data["layer_types"] = self.layer_types()
        data["mlp_layer_types"] = [
            HASH_MOE if i < self.num_hash_layers else SCORE_MOE
            for i in range(self.num_hidden_layers)
        ]
        data["compress_rates"] = {CSA: CSA_RATIO, HCA: hca}
        return {key: _whole(data[key]) for key in sorted(data)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> V4Config:
        """Read a published, a reference-code or a transformers config.

        Raises:
            ConfigError: Not a V4 (said by name), a missing field, or values that contradict.
        """
        refuse_other_families(data, where)
        values, extra = _published_values(data)
        known = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        required = {
            item.name
            for item in dataclasses.fields(cls)
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        }
        missing = sorted(name for name in required if values.get(name) is None)
        if missing:
            raise ConfigError(
                "config lacks fields that every V4 has",
                where=where,
                value=", ".join(missing),
                rule="published key style (hidden_size, ...) or the reference code's (dim, ...)",
            )
        problems = _type_problems(values)
        if not problems:
            config = cls(**{k: v for k, v in values.items() if k in known}, extra=extra)
            problems = config.problems()
        if problems:
            raise ConfigError(
                "config contradicts itself or the rules of V4",
                where=where,
                value="; ".join(problems),
            )
        return config


def attention_kind(ratio: int) -> str:
    """The attention kind that a compress ratio stands for."""
    return {0: SLIDING, CSA_RATIO: CSA}.get(ratio, HCA)


def load_config(text: bytes | str, where: str) -> V4Config:
    """Parse the text of a config.json.

    Raises:
        ConfigError: Not JSON, no object, or no V4 config.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("config is not valid JSON", where=where, value=str(error)) from None
    if not isinstance(data, dict):
        raise ConfigError("config is not a JSON object", where=where, value=type(data).__name__)
    if _nests_deeper(data, MAX_NESTING):
        raise ConfigError("config is nested too deeply", where=where, rule=f"{MAX_NESTING} levels")
    return V4Config.from_dict(data, where)


def refuse_other_families(data: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError with the family's name when the config is not DeepSeek-V4's."""
    model_type = data.get("model_type")
    block = (data.get("quantization_config") or {}) if isinstance(data, Mapping) else {}
    block_size = block.get("weight_block_size") if isinstance(block, Mapping) else None
    engram = any(key.startswith("engram_") for key in data)
    if model_type == "deepseek_v41" or engram or block_size == [32, 32]:
        family = "DeepSeek-V4.1, whose layers V4 does not have (engram, 32x32 blocks)"
    elif "vision_config" in data or "vision_tower" in data:
        family = "DeepSeek-V4-Flash-Vision-Exp, which has a vision tower"
    elif model_type in ("deepseek_v3", "deepseek_v32") or "kv_lora_rank" in data:
        family = "DeepSeek-V3 or V3.2, an earlier architecture (MLA, no hyper-connections)"
    elif model_type not in (None, "deepseek_v4"):
        family = f"a {_shown.repr(model_type)} model"
    elif model_type is None and "n_layers" not in data and "hidden_size" not in data:
        family = "no model config that v4surgery knows"
    else:
        return
    raise ConfigError(
        f"this is {family}; v4surgery cuts DeepSeek-V4 only",
        where=where,
        value=f"model_type {_shown.repr(model_type)}",
        rule="model_type deepseek_v4, or the reference code's config",
    )


def _published_values(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a config of any known style into published fields and uninterpreted extras."""
    is_reference = "n_layers" in data and "num_hidden_layers" not in data
    to_published = {v: k for k, v in REFERENCE_NAMES.items()} if is_reference else {}
    renamed = {to_published.get(key, key): value for key, value in data.items()}
    fields = {item.name for item in dataclasses.fields(V4Config)} - {"extra"}
    values = {k: v for k, v in renamed.items() if k in fields}
    # partial_rotary_factor is transformers' qk_rope_head_dim / head_dim, and wins over them there;
    # auto_map names Python files of the parent, which are neither run nor copied.
    derived = {
        *("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"),
        *("partial_rotary_factor", "auto_map"),
    }
    reference_only = {"rope_factor", "original_seq_len", "beta_fast", "beta_slow"}
    extra = {} if is_reference else {k: v for k, v in renamed.items() if k not in fields | derived}
    values["rope_scaling"] = _rope_scaling(renamed, reference_only)
    for name, kind in (("rope_theta", "main"), ("compress_rope_theta", "compress")):
        if values.get(name) is None:
            values[name] = _nested(renamed, "rope_parameters", kind).get("rope_theta")
    if values.get("compress_ratios") is None:
        values["compress_ratios"] = _ratios_of_layer_types(renamed)
    if values.get("num_hash_layers") is None and isinstance(renamed.get("mlp_layer_types"), list):
        values["num_hash_layers"] = renamed["mlp_layer_types"].count(HASH_MOE)
    if is_reference:
        values.setdefault("max_position_embeddings", V4Config.max_position_embeddings)
    for name in ("compress_ratios", "dspark_target_layer_ids"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    optional = {"rope_scaling"}
    return {k: v for k, v in values.items() if v is not None or k in optional}, extra


def _nested(data: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object at a path of keys; empty when there is none."""
    for key in keys:
        found = data.get(key)
        data = found if isinstance(found, Mapping) else {}
    return data


def _rope_scaling(data: Mapping[str, Any], reference_only: set[str]) -> RopeScaling | None:
    scaling = data.get("rope_scaling")
    if scaling is None:
        scaling = _nested(data, "rope_parameters", "compress") or data.get("rope_parameters")
    if data.get("original_seq_len") == 0:
        return None  # how the reference code says: no YaRN
    if scaling is None and any(key in data for key in reference_only):
        scaling = {
            "factor": data.get("rope_factor", 16),
            "original_max_position_embeddings": data.get("original_seq_len", 65536),
            "beta_fast": data.get("beta_fast", 32),
            "beta_slow": data.get("beta_slow", 1),
        }
    if not isinstance(scaling, Mapping) or "factor" not in scaling:
        return None
    names = [item.name for item in dataclasses.fields(RopeScaling)]
    return RopeScaling(**{name: scaling[name] for name in names if name in scaling})


def _ratios_of_layer_types(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """compress_ratios from what transformers writes; it keeps no drafters."""
    kinds, rates = data.get("layer_types"), data.get("compress_rates")
    if not isinstance(kinds, list) or not isinstance(rates, Mapping):
        return None
    ratios = {SLIDING: 0, CSA: rates.get(CSA, 4), HCA: rates.get(HCA, 128)}
    return tuple(ratios.get(kind, -1) if isinstance(kind, str) else -1 for kind in kinds)


def _type_problems(values: Mapping[str, Any]) -> list[str]:
    """Fields whose JSON type is wrong, before any arithmetic on them."""
    rules = {
        "int": (_is_int, "an integer"),
        "float": (_is_size, f"a number from 0 to {MAX_REAL:g}"),
        "bool": (lambda value: isinstance(value, bool), "true or false"),
        "str": (lambda value: isinstance(value, str), "a string"),
        "tuple[int, ...]": (lambda value: isinstance(value, tuple), "a list of integers"),
        "Mapping[str, Any]": (lambda value: isinstance(value, Mapping), "an object"),
    }
    problems = []
    for item in dataclasses.fields(V4Config):
        value = values.get(item.name)
        if value is None or item.name in ("extra", "rope_scaling"):
            continue
        is_right, rule = rules[str(item.type).removesuffix(" | None")]
        if not is_right(value):
            problems.append(f"{item.name} is {_shown.repr(value)}, and must be {rule}")
    return problems + _scaling_problems(values.get("rope_scaling"))


def _scaling_problems(scaling: RopeScaling | None) -> list[str]:
    if scaling is None:
        return []
    problems = []
    for name, value in vars(scaling).items():
        lowest = 1 if name == "original_max_position_embeddings" else MIN_SCALING
        if not _is_size(value) or value < lowest:
            problems.append(
                f"rope_scaling.{name} is {_shown.repr(value)}, and must be a number "
                f"from {lowest:g} to {MAX_REAL:g}"
            )
    return problems


def _nests_deeper(value: Any, levels: int) -> bool:
    """Whether JSON data has more levels: what is read by recursion is also written by it."""
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(_nests_deeper(child, levels - 1) for child in children)


def _is_size(value: object) -> bool:
    """Whether it is a number (NaN compares false) from 0 to MAX_REAL, and no bool."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= MAX_REAL  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(value: Any) -> Any:
    """Whole floats of constants become ints, as the published files write them."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, float) and value.is_integer() and abs(value) >= 16:
        return int(value)
    return value
