"""Tensors under the names of transformers' own modules, found by their published ones.

``save_pretrained`` writes published names again, most of them behind ``model.``, which
:func:`v4surgery.catalogue.canonical_name` reads. Saved with ``save_original_format=False``, a
checkpoint has the names of the modules, and the routed experts of a layer stacked in two tensors:
``gate_up_proj`` ``(E, 2F, D)``, w1 above w3, and ``down_proj`` ``(E, D, F)``. A piece of a stack is
a byte range like any other, so nothing is copied here.

Source: transformers 5.23, ``conversion_mapping.py``, "deepseek_v4".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from v4surgery.catalogue import Catalogue, Entry
from v4surgery.checkpoint.refs import TensorRef

SAVED_NAMES: Mapping[str, str] = {
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "head.weight": "lm_head.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.experts.{expert}.w1.weight": "mlp.experts.gate_up_proj",
    "ffn.experts.{expert}.w3.weight": "mlp.experts.gate_up_proj",
    "ffn.experts.{expert}.w2.weight": "mlp.experts.down_proj",
}
"""Published name inside its block -> transformers' one; a stack stands for each of its experts."""

_HALF = {"ffn.experts.{expert}.w1.weight": 0, "ffn.experts.{expert}.w3.weight": 1}


def published_refs(catalogue: Catalogue, found: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The headers with every name of transformers' own replaced by the published one.

    What does not have the shape that the config gives it keeps its name, and is reported with it.
    """
    refs = dict(found)
    if _saved_name("layers.0.", "input_layernorm.weight", refs) is None:
        return refs
    used: set[str] = set()
    for entry in catalogue.entries():
        for name, ref, stored in _pieces(catalogue, entry, refs):
            refs[name] = ref
            used.add(stored)
    for name in used:
        del refs[name]
    return refs


def _pieces(
    catalogue: Catalogue, entry: Entry, refs: Mapping[str, TensorRef]
) -> Iterator[tuple[str, TensorRef, str]]:
    """Published name, place, and stored name of an entry, where it is stored by another name."""
    template, block = entry.template, entry.block
    key = template.stem + template.suffix
    if (block is not None and block.is_drafter) or key not in SAVED_NAMES:
        return
    published = entry.stem + template.suffix
    stored = _saved_name(block.prefix if block else "", SAVED_NAMES[key], refs)
    if stored is None or stored == published:
        return
    ref = refs[stored]
    if entry.expert is None:
        yield published, ref, stored
        return
    rows, cols = catalogue.shape(entry)
    halves = 2 if key in _HALF else 1
    if ref.shape != (catalogue.config.n_routed_experts, halves * rows, cols):
        return
    size = (ref.end - ref.begin) // (ref.shape[0] * halves)
    begin = ref.begin + (entry.expert * halves + _HALF.get(key, 0)) * size
    yield published, ref._replace(shape=(rows, cols), begin=begin, end=begin + size), stored


def _saved_name(prefix: str, name: str, refs: Mapping[str, TensorRef]) -> str | None:
    """The name in the headers, with or without what CausalLM models put before it."""
    names = (f"model.{prefix}{name}", f"{prefix}{name}")
    return next((each for each in names if each in refs), None)


__all__ = ["SAVED_NAMES", "published_refs"]
