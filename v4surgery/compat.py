"""Limits that other software sets to a V4 checkpoint, and which of them one checkpoint breaks.

:data:`LIMITS` is the whole of it: who sets the limit, what it is, where it is written, and how to
look. Read from public files in 2026; newer releases may have lifted one. A limit that holds says
nothing about what is not listed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from v4surgery.catalogue import EXPERT, FP8, FP8_F32, LINEAR
from v4surgery.checkpoint.official import DECODED, rank_problems
from v4surgery.checkpoint.reader import CONFIG_FILE, Checkpoint
from v4surgery.config import CSA_RATIO, HCA, V4Config, attention_kind
from v4surgery.formats import FP8_BLOCK

PUBLISHED_RATIOS = {0, 4, 128}
VLLM_EXPERTS = {1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576}
TP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Facts:
    """What the limits look at.

    Attributes:
        config: The config.
        keys: Keys of config.json as it stands.
        linears: Formats of the linears, wo_a's left out.
        experts: Formats of the routed experts.
        wo_a: Formats of wo_a.
        partial_blocks: FP8 tensors wider than a block and no multiple of it.
    """

    config: V4Config
    keys: frozenset[str]
    linears: frozenset[str]
    experts: frozenset[str]
    wo_a: frozenset[str]
    partial_blocks: int

    @property
    def ratios(self) -> set[int]:
        """Compress ratios of the trunk."""
        return set(self.config.compress_ratios[: self.config.num_hidden_layers])

    @property
    def other_ratios(self) -> list[int]:
        return sorted(self.ratios - PUBLISHED_RATIOS)


@dataclass(frozen=True)
class Limit:
    """One limit of one program.

    Attributes:
        program: Who sets it.
        rule: What holds where it is met.
        source: Public file in which it is written.
        broken: What of the checkpoint breaks it; None where it is met.
    """

    program: str
    rule: str
    source: str
    broken: Callable[[Facts], str | None]


def _sized(name: str, wanted: int) -> Callable[[Facts], str | None]:
    def broken(facts: Facts) -> str | None:
        value = getattr(facts.config, name)
        return None if value == wanted else f"{name} {value}"

    return broken


def _ratios_published(facts: Facts) -> str | None:
    return f"ratios {facts.other_ratios}" if facts.other_ratios else None


def _one_hca_ratio(facts: Facts) -> str | None:
    found = sorted(r for r in facts.ratios if attention_kind(r) == HCA)
    return f"HCA ratios {found}" if len(found) > 1 else None


def _ratios_declared(facts: Facts) -> str | None:
    declared = {"layer_types", "compress_rates"} <= facts.keys
    return None if declared or not facts.other_ratios else f"ratios {facts.other_ratios}"


def _no_drafter(facts: Facts) -> str | None:
    count = facts.config.num_drafters
    return f"{count} drafter block(s)" if count else None


def _no_dspark(facts: Facts) -> str | None:
    return "DSpark drafters" if facts.config.is_dspark else None


def _rope_survives(facts: Facts) -> str | None:
    head, rope = facts.config.head_dim, facts.config.qk_rope_head_dim
    got = int(head * (rope / head))
    return None if got == rope else f"int({head} * ({rope} / {head})) is {got}"


def _whole_blocks(facts: Facts) -> str | None:
    return f"{facts.partial_blocks} FP8 tensors" if facts.partial_blocks else None


def _vllm_experts(facts: Facts) -> str | None:
    experts = facts.config.n_routed_experts
    return None if experts in VLLM_EXPERTS else f"{experts} experts"


def _vllm_heads(facts: Facts) -> str | None:
    heads = facts.config.num_attention_heads
    return f"{heads} heads" if heads > 128 else None


def _fp8_wo_a(facts: Facts) -> str | None:
    return None if facts.wo_a <= {FP8, FP8_F32} else f"wo_a in {', '.join(sorted(facts.wo_a))}"


def _online_head_dim(facts: Facts) -> str | None:
    return _sized("head_dim", 512)(facts) if 128 in facts.ratios else None


def _index_dim(facts: Facts) -> str | None:
    return _sized("index_head_dim", 128)(facts) if CSA_RATIO in facts.ratios else None


def _index_power_of_two(facts: Facts) -> str | None:
    size = facts.config.index_head_dim
    is_met = CSA_RATIO not in facts.ratios or not size & (size - 1)
    return None if is_met else f"index_head_dim {size}"


def _e8m0_scales(facts: Facts) -> str | None:
    return "F32 scales" if FP8_F32 in facts.linears | facts.experts else None


def _tp_sizes(facts: Facts) -> str | None:
    failing = [n for n in TP_SIZES if rank_problems(facts.config, facts.linears, n)]
    return f"not on {', '.join(map(str, failing))} ranks" if failing else None


TRANSFORMERS, VLLM, SGLANG, MEGATRON, OFFICIAL = (
    "transformers",
    "vLLM",
    "SGLang",
    "Megatron-Bridge",
    "official code",
)
_TRANSFORMERS = "transformers 5.23, src/transformers/models/deepseek_v4/"
_VLLM = "github.com/vllm-project/vllm, "
_SGLANG = "github.com/sgl-project/sglang, "
_MEGATRON = (
    "github.com/NVIDIA-NeMo/Megatron-Bridge, "
    "src/megatron/bridge/models/deepseek/deepseek_v4_bridge.py"
)
_OFFICIAL = "huggingface.co/deepseek-ai/DeepSeek-V4-Flash, inference/"

LIMITS: tuple[Limit, ...] = (
    Limit(
        TRANSFORMERS,
        "one ratio for all heavily compressed layers (compress_rates has one number a kind)",
        _TRANSFORMERS + "configuration_deepseek_v4.py",
        _one_hca_ratio,
    ),
    Limit(
        TRANSFORMERS,
        "ratios other than 0, 4 and 128 stand in layer_types and compress_rates",
        _TRANSFORMERS + "configuration_deepseek_v4.py",
        _ratios_declared,
    ),
    Limit(
        TRANSFORMERS,
        "no drafter: mtp.* is not instantiated, and save_pretrained drops it",
        _TRANSFORMERS + "configuration_deepseek_v4.py",
        _no_drafter,
    ),
    Limit(
        TRANSFORMERS,
        "the rope size survives int(head_dim * partial_rotary_factor)",
        _TRANSFORMERS + "configuration_deepseek_v4.py",
        _rope_survives,
    ),
    Limit(
        TRANSFORMERS,
        f"FP8 sizes are at most {FP8_BLOCK} or a multiple of it, where it decodes them",
        "transformers 5.23, src/transformers/integrations/finegrained_fp8.py",
        _whole_blocks,
    ),
    Limit(
        VLLM,
        "n_routed_experts is 1 to 512 in powers of two, 192, 320, 384, 448 or 576",
        _VLLM + "csrc/moe/topk_softplus_sqrt_kernels.cu",
        _vllm_experts,
    ),
    Limit(
        VLLM,
        "compress ratios are 0, 4 and 128",
        _VLLM + "vllm/models/deepseek_v4/compressor.py",
        _ratios_published,
    ),
    Limit(
        VLLM,
        "head_dim is 512",
        _VLLM + "vllm/models/deepseek_v4/compressor.py",
        _sized("head_dim", 512),
    ),
    Limit(
        VLLM,
        "index_head_dim is 128",
        _VLLM + "vllm/models/deepseek_v4/compressor.py",
        _index_dim,
    ),
    Limit(
        VLLM,
        "at most 128 attention heads a GPU",
        _VLLM + "vllm/model_executor/layers/deepseek_v4_attention.py",
        _vllm_heads,
    ),
    Limit(
        VLLM,
        "wo_a is FP8 with a scale: its product runs in FP8 on CUDA",
        _VLLM + "vllm/model_executor/layers/deepseek_v4_attention.py",
        _fp8_wo_a,
    ),
    Limit(
        SGLANG,
        "compress ratios are 0, 4 and 128",
        _SGLANG + "python/sglang/srt/models/deepseek_v4.py",
        _ratios_published,
    ),
    Limit(
        SGLANG,
        "head_dim is 512 where ratio 128 is compressed online",
        _SGLANG + "python/sglang/jit_kernel/dsv4/compress.py",
        _online_head_dim,
    ),
    Limit(
        SGLANG,
        "index_head_dim is 128 for an FP4 index cache",
        _SGLANG + "python/sglang/jit_kernel/dsv4/compress.py",
        _index_dim,
    ),
    Limit(
        SGLANG,
        "hc_mult is 4 on a CPU",
        _SGLANG + "sgl-kernel/csrc/cpu/mhc.cpp",
        _sized("hc_mult", 4),
    ),
    Limit(
        MEGATRON,
        "compress ratios are 0, 4 and 128",
        _MEGATRON + ", _dsv4_hybrid_layer_pattern",
        _ratios_published,
    ),
    Limit(
        MEGATRON,
        "drafters are classic: DSpark's main_proj, Markov and confidence heads have no mapping",
        _MEGATRON + ", mapping_registry",
        _no_dspark,
    ),
    Limit(
        OFFICIAL,
        "scales are E8M0: linears have no others, and loading rounds to them",
        _OFFICIAL + "model.py, Linear",
        _e8m0_scales,
    ),
    Limit(
        OFFICIAL,
        "index_head_dim is a power of two: the Hadamard transform pads others with zeros",
        _OFFICIAL + "model.py, rotate_activation; github.com/Dao-AILab/fast-hadamard-transform",
        _index_power_of_two,
    ),
    Limit(
        OFFICIAL,
        "can be cut for 1, 2, 4 and 8 tensor-parallel ranks",
        _OFFICIAL + "convert.py and model.py",
        _tp_sizes,
    ),
)
"""Every limit, by program."""


def check_limits(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Each limit with what breaks it; ``broken`` is None where the checkpoint meets it."""
    facts = facts_of(checkpoint)
    return [
        {
            "program": limit.program,
            "rule": limit.rule,
            "broken": limit.broken(facts),
            "source": limit.source,
        }
        for limit in LIMITS
    ]


def facts_of(checkpoint: Checkpoint) -> Facts:
    """What the limits look at, of an opened checkpoint."""
    formats: dict[str, set[str]] = {LINEAR: set(), EXPERT: set(), DECODED: set()}
    partial = 0
    for stored in checkpoint.tensors.values():
        template = stored.entry.template
        kind = DECODED if template.stem == DECODED else template.storage
        if kind in formats:
            formats[kind].add(stored.fmt)
        if stored.fmt in (FP8, FP8_F32):
            shape = checkpoint.catalogue.shape(stored.entry)
            partial += any(size > FP8_BLOCK and size % FP8_BLOCK for size in shape)
    return Facts(
        config=checkpoint.config,
        keys=frozenset(json.loads(checkpoint.read_file(CONFIG_FILE))),
        linears=frozenset(formats[LINEAR]),
        experts=frozenset(formats[EXPERT]),
        wo_a=frozenset(formats[DECODED]),
        partial_blocks=partial,
    )


__all__ = ["LIMITS", "Facts", "Limit", "check_limits", "facts_of"]
