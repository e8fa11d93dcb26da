"""Which published names Megatron-Bridge's mapping for DeepSeek-V4 reads, as facts.

``{layer}`` stands for ``layers.N`` and ``mtp.K`` (K below num_nextn_predict_layers), ``*`` for an
expert. Scales are read along with their weights; a name that is not here is not read.

Source: github.com/NVIDIA-NeMo/Megatron-Bridge, commit 0603493,
src/megatron/bridge/models/deepseek/deepseek_v4_bridge.py, ``mapping_registry``.
"""

MODEL = (
    "embed.weight",
    "head.weight",
    "norm.weight",
    "hc_head_fn",
    "hc_head_base",
    "hc_head_scale",
)
ATTENTION = (
    *("attn_norm.weight", "attn.wq_a.weight", "attn.q_norm.weight", "attn.wq_b.weight"),
    *("attn.wkv.weight", "attn.kv_norm.weight", "attn.wo_a.weight", "attn.wo_b.weight"),
    *("attn.attn_sink", "hc_attn_fn", "hc_attn_base", "hc_attn_scale"),
    *("attn.compressor.wkv.weight", "attn.compressor.wgate.weight"),
    *("attn.compressor.ape", "attn.compressor.norm.weight"),
    *("attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight"),
    *("attn.indexer.compressor.wkv.weight", "attn.indexer.compressor.wgate.weight"),
    *("attn.indexer.compressor.ape", "attn.indexer.compressor.norm.weight"),
)
EXPERTS = (
    *("ffn_norm.weight", "ffn.gate.weight", "ffn.gate.bias", "ffn.gate.tid2eid"),
    *("ffn.experts.*.w1.weight", "ffn.experts.*.w2.weight", "ffn.experts.*.w3.weight"),
    *("ffn.shared_experts.w1.weight", "ffn.shared_experts.w2.weight"),
    *("ffn.shared_experts.w3.weight", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale"),
)
DRAFTER = (
    *("enorm.weight", "hnorm.weight", "norm.weight", "e_proj.weight", "h_proj.weight"),
    *("hc_head_fn", "hc_head_base", "hc_head_scale"),
)


def reads(name: str, num_layers: int, num_drafters: int) -> bool:
    """Whether the mapping reads a published name of a model with so many layers and drafters."""
    if name in MODEL:
        return True
    kind, _, rest = name.partition(".")
    number, _, inside = rest.partition(".")
    if kind not in ("layers", "mtp") or not number.isdecimal():
        return False
    parts = inside.split(".")
    if len(parts) > 2 and parts[:2] == ["ffn", "experts"] and parts[2].isdecimal():
        parts[2] = "*"
    known = (*ATTENTION, *EXPERTS, *(DRAFTER if kind == "mtp" else ()))
    if parts[-1] == "scale":
        parts[-1] = "weight"
    is_there = int(number) < (num_layers if kind == "layers" else num_drafters)
    return is_there and ".".join(parts) in known
