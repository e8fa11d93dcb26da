"""How the official inference code lays a checkpoint out for tensor parallelism.

Its ``convert.py`` writes ``model{rank}-mp{ranks}.safetensors``, a whole state dict for each rank:

* the tensors of :data:`SHARDED` are cut in equal runs along one axis, their scales alike;
* expert e of E lies in rank ``e // (E / ranks)``, whole;
* every other tensor is in every file, whole;
* wo_a is decoded to BF16 and loses its scale; FP4 weights get the dtype F4;
* a drafter's own ``emb`` and ``head`` are left out: its model code uses the trunk's.

Its ``config.json`` is read by ``ModelArgs(**json)``: a key unknown to this class is an error.

Certain: read in copies of the published files (names, axes, experts, wo_a, what is left out; the
fields of ModelArgs, with DSpark's). Inferred: the values that it writes for ``dtype`` and
``expert_dtype`` of checkpoints that DeepSeek did not publish in this layout (bf16, Base).

Source: deepseek-ai/DeepSeek-V4-Flash (and -0731) on the Hub, ``inference/convert.py`` and
``inference/model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from v4surgery.catalogue import FP4, FP8, FP8_F32, QUANTIZED, Entry
from v4surgery.config import CSA_RATIO, REFERENCE_NAMES, V4Config
from v4surgery.errors import CheckpointError
from v4surgery.formats import FP8_BLOCK

SHARDED: Mapping[str, int] = {
    "embed": 0,
    "head": 0,
    "attn.wq_b": 0,
    "attn.attn_sink": 0,
    "attn.wo_a": 0,
    "attn.wo_b": 1,
    "attn.indexer.wq_b": 0,
    "attn.indexer.weights_proj": 0,
    "markov_head.markov_w1": 0,
    "markov_head.markov_w2": 0,
}
"""The axis along which a template is cut."""
DECODED = "attn.wo_a"
"""The one linear that is stored in BF16 whatever it was."""
SCALES_FILE = "wo_a-scales.safetensors"
"""What v4surgery writes beside the shards: the scales that wo_a had, which make it exact again."""

_SHARD = re.compile(r"model(\d{1,4})-mp(\d{1,4})\.safetensors")
_SAME_NAME = (
    *("vocab_size", "n_routed_experts", "n_shared_experts", "swiglu_limit", "q_lora_rank"),
    *("head_dim", "o_groups", "o_lora_rank", "compress_ratios", "compress_rope_theta"),
    *("rope_theta", "index_n_heads", "index_head_dim", "index_topk"),
    *("hc_mult", "hc_sinkhorn_iters", "hc_eps"),
)
_DSPARK = ("block_size", "noise_token_id", "target_layer_ids", "markov_rank")


def shard_name(rank: int, ranks: int) -> str:
    """File of one rank."""
    return f"model{rank}-mp{ranks}.safetensors"


def find_ranks(files: Iterable[str], where: str) -> int | None:
    """How many ranks the shards among some files are for; None if there are none.

    Raises:
        CheckpointError: Some are missing, or they are for different numbers of ranks.
    """
    found = [match for file in files if (match := _SHARD.fullmatch(file))]
    if not found:
        return None
    counts = sorted({int(match[2]) for match in found})
    missing = set(range(counts[0])) - {int(match[1]) for match in found}
    if len(counts) > 1 or missing:
        raise CheckpointError(
            "the shards of the official code are not one whole set",
            where=where,
            value=", ".join(sorted(match[0] for match in found)[:8]),
            rule=f"{shard_name(0, counts[0])} to {shard_name(counts[0] - 1, counts[0])}",
            hint="complete the folder, and keep one set of shards in it",
        )
    return counts[0]


def shard_axis(entry: Entry) -> int | None:
    """The axis along which an entry is cut; None where a rank has all of it or nothing."""
    return None if is_left_out(entry) else SHARDED.get(entry.template.stem)


def is_left_out(entry: Entry) -> bool:
    """Whether the layout has no place for an entry: a drafter's own embedding and head."""
    return entry.template.optional


def owners(entry: Entry, experts: int, ranks: int) -> range:
    """The ranks whose files have (a part of) an entry."""
    if entry.expert is None:
        return range(ranks)
    rank = entry.expert // (experts // ranks)
    return range(rank, rank + 1)


def rank_problems(config: V4Config, formats: Collection[str], ranks: int) -> list[str]:
    """Every reason why a checkpoint cannot be cut for so many ranks; empty if it can.

    Args:
        config: Its config.
        formats: Formats of its linears.
        ranks: Tensor-parallel ranks.
    """
    has_csa = CSA_RATIO in config.compress_ratios
    fields = ["vocab_size", "num_attention_heads", "o_groups", "n_routed_experts"]
    fields += ["index_n_heads"] if has_csa else []
    found = [
        f"{name} {getattr(config, name)} is no multiple of {ranks}"
        for name in fields
        if getattr(config, name) % ranks
    ]
    if ranks == 1 or found or not {FP8, FP8_F32} & set(formats):
        return found
    parts = {
        "rows of wq_b": config.num_attention_heads * config.head_dim // ranks,
        "columns of wo_b": config.o_groups * config.o_lora_rank // ranks,
    }
    if has_csa:
        parts["rows of indexer.wq_b"] = config.index_n_heads * config.index_head_dim // ranks
    return [
        f"a rank's {size} {what} are not whole blocks of {FP8_BLOCK}"
        for what, size in parts.items()
        if size % FP8_BLOCK
    ]


def reference_config(config: V4Config, linear: str, expert: str) -> dict[str, Any]:
    """The config.json that the official code reads.

    Args:
        config: The model.
        linear: Format of its linears.
        expert: Format of its routed experts.
    """
    scaling = config.rope_scaling
    data = {name: getattr(config, name) for name in _SAME_NAME}
    data |= {theirs: getattr(config, ours) for ours, theirs in REFERENCE_NAMES.items()}
    data |= {
        "compress_ratios": list(config.compress_ratios),
        "n_mtp_layers": config.num_drafters,
        "dtype": "fp8" if linear in QUANTIZED else "bf16",
        "scale_fmt": "ue8m0" if linear in QUANTIZED else None,
        "expert_dtype": "fp4" if expert == FP4 else None,
        "original_seq_len": scaling.original_max_position_embeddings if scaling else 0,
        "rope_factor": scaling.factor if scaling else 1,
        "beta_fast": scaling.beta_fast if scaling else 32,
        "beta_slow": scaling.beta_slow if scaling else 1,
    }
    if config.is_dspark:
        named = {f"dspark_{name}": getattr(config, f"dspark_{name}") for name in _DSPARK}
        data |= {**named, "dspark_target_layer_ids": list(config.dspark_target_layer_ids or ())}
    return dict(sorted(data.items()))


__all__ = [
    "DECODED",
    "SCALES_FILE",
    "SHARDED",
    "find_ranks",
    "is_left_out",
    "owners",
    "rank_problems",
    "reference_config",
    "shard_axis",
    "shard_name",
]
