"""What is known about loading a replica elsewhere: facts with a source, and what is not tested."""

from __future__ import annotations

from collections.abc import Iterator

from v4surgery.config import V4Config

# vLLM's routing kernel takes these numbers of experts.
# Source: spec/checkpoint.md, "Traps met by others when loading, converting or pruning V4".
_VLLM_EXPERTS = frozenset((1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576))
# What the serving kernels of others are written for. Source: as above.
_SERVED_HEAD_DIM, _SERVED_STREAMS = 512, 4


def loading_notes(config: V4Config) -> Iterator[str]:
    """Sentences of Markdown about transformers, vLLM and SGLang."""
    yield (
        "transformers: versions that know `deepseek_v4`; 5.23 is what v4surgery is tested with. "
        "It ignores drafter blocks (`mtp.*`), and its `save_pretrained` drops them together with "
        "`compress_ratios` and `num_hash_layers`: keep a copy of this repository's files."
    )
    yield f"vLLM and SGLang: not tested with this replica. {_engine_limits(config)}"
    yield (
        "vLLM and SGLang read `compress_ratios`, transformers `layer_types` and `compress_rates`; "
        "config.json has both. Releases of both engines have failed on V4 configs that "
        "transformers 4.57 or later had parsed first ([vLLM 42741]"
        "(https://github.com/vllm-project/vllm/issues/42741), [SGLang 34092]"
        "(https://github.com/sgl-project/sglang/issues/34092))."
    )


def _engine_limits(config: V4Config) -> str:
    against = []
    if config.n_routed_experts not in _VLLM_EXPERTS:
        against.append(
            f"{config.n_routed_experts} experts is not among the numbers that vLLM's routing "
            "kernel takes"
        )
    if config.head_dim != _SERVED_HEAD_DIM:
        against.append(
            f"head_dim is {config.head_dim} where serving kernels want {_SERVED_HEAD_DIM}"
        )
    if config.hc_mult != _SERVED_STREAMS:
        against.append(f"hc_mult is {config.hc_mult} where they want {_SERVED_STREAMS}")
    if not against:
        return (
            "Nothing known stands against it: the number of experts, head_dim and hc_mult are "
            "ones that their kernels take."
        )
    return f"Known to stand against it: {'; '.join(against)}."
