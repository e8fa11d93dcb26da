"""Every tensor of a DeepSeek-V4 checkpoint as data.

One :class:`Template` for each kind of tensor: its name, its axes in named dims
(:mod:`v4surgery.axes`), how the published checkpoints store it, and which blocks have it.
Reading, counting, slicing, synthetic parents and docs/tensors.md all follow from this table;
no other place looks inside a tensor's name.

Source: spec/checkpoint.md, "Tensors"; a test expands the table for the published models and
compares key counts, payload bytes and file sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from v4surgery.axes import axis_size, parse_axis
from v4surgery.config import CSA_RATIO, V4Config

LINEAR, EXPERT, BF16, F32, I64 = "linear", "expert", "BF16", "F32", "I64"
"""How a template is stored: a quantized linear, an expert's linear, or one plain dtype."""

# What a stored tensor can be. FP4 and FP8 mean a weight and its scale; the others one tensor.
FP4, FP8, FP8_F32, F16 = "FP4", "FP8", "FP8_F32", "F16"
QUANTIZED = frozenset({FP4, FP8, FP8_F32})
SCALE_DTYPE = {FP4: "F8_E8M0", FP8: "F8_E8M0", FP8_F32: "F32"}


@dataclass(frozen=True)
class Template:
    """One kind of tensor.

    Attributes:
        stem: Name inside its block; ``{expert}`` stands for the expert's number.
        suffix: What follows the stem: ``.weight``, or nothing.
        axes: Axis expressions, outermost first.
        storage: LINEAR, EXPERT, BF16, F32 or I64.
        group: What the tensor belongs to, for summaries.
        needs: Traits a block must have for the tensor to exist.
        optional: Known, but absent in most checkpoints.
        normalises: The axis whose mean square its block's RMS norm takes: a cut of it changes
            the scale of what this weight multiplies.
    """

    stem: str
    suffix: str
    axes: tuple[str, ...]
    storage: str
    group: str
    needs: frozenset[str] = frozenset()
    optional: bool = False
    normalises: str | None = None

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.stem

    @property
    def is_block_diagonal(self) -> bool:
        """Whether the columns kept depend on the row's group (wo_a alone)."""
        return self.axes[-1].startswith("group_heads")


def _weight(
    stem: str, axes: str, storage: str, group: str, needs: str = "", **more: object
) -> Template:
    return _template(stem, ".weight", axes, storage, group, needs, **more)


def _plain(
    stem: str, axes: str, storage: str, group: str, needs: str = "", **more: object
) -> Template:
    return _template(stem, "", axes, storage, group, needs, **more)


def _template(
    stem: str, suffix: str, axes: str, storage: str, group: str, needs: str, **more: object
) -> Template:
    names = tuple(part.strip() for part in axes.split(","))
    return Template(stem, suffix, names, storage, group, frozenset(needs.split()), **more)  # type: ignore[arg-type]


_HC_HEAD = (
    _plain(
        "hc_head_fn", "streams, streams*hidden_size", F32, "hc", normalises="streams*hidden_size"
    ),
    _plain("hc_head_base", "streams", F32, "hc"),
    _plain("hc_head_scale", "one", F32, "hc"),
)

MODEL_TEMPLATES: tuple[Template, ...] = (
    _weight("embed", "vocab_size, hidden_size", BF16, "embed"),
    _weight("norm", "hidden_size", BF16, "head", normalises="hidden_size"),
    _weight("head", "vocab_size, hidden_size", BF16, "head"),
    *_HC_HEAD,
)
"""Tensors outside any block."""


def _in_drafter(template: Template, needs: str) -> Template:
    from dataclasses import replace

    return replace(template, group="drafter", needs=frozenset(needs.split()))


BLOCK_TEMPLATES: tuple[Template, ...] = (
    _weight("attn_norm", "hidden_size", BF16, "norm", normalises="hidden_size"),
    _weight("ffn_norm", "hidden_size", BF16, "norm", normalises="hidden_size"),
    _weight("attn.wq_a", "q_lora_rank, hidden_size", LINEAR, "attention"),
    _weight("attn.q_norm", "q_lora_rank", BF16, "attention", normalises="q_lora_rank"),
    _weight("attn.wq_b", "num_attention_heads*head_dim, q_lora_rank", LINEAR, "attention"),
    _weight("attn.wkv", "head_dim, hidden_size", LINEAR, "attention"),
    _weight("attn.kv_norm", "head_dim", BF16, "attention", normalises="head_dim"),
    _plain("attn.attn_sink", "num_attention_heads", F32, "attention"),
    _weight("attn.wo_a", "o_groups*o_lora_rank, group_heads*head_dim", LINEAR, "attention"),
    _weight("attn.wo_b", "hidden_size, o_groups*o_lora_rank", LINEAR, "attention"),
    *(
        template
        for part in ("attn", "ffn")
        for template in (
            _plain(
                f"hc_{part}_fn",
                "mixes, streams*hidden_size",
                F32,
                "hc",
                normalises="streams*hidden_size",
            ),
            _plain(f"hc_{part}_base", "mixes", F32, "hc"),
            _plain(f"hc_{part}_scale", "three", F32, "hc"),
        )
    ),
    _weight(
        "attn.compressor.wkv", "overlap*head_dim, hidden_size", BF16, "compressor", "compressed"
    ),
    _weight(
        "attn.compressor.wgate", "overlap*head_dim, hidden_size", BF16, "compressor", "compressed"
    ),
    _weight(
        "attn.compressor.norm", "head_dim", BF16, "compressor", "compressed", normalises="head_dim"
    ),
    _plain(
        "attn.compressor.ape", "compress_ratio, overlap*head_dim", F32, "compressor", "compressed"
    ),
    _weight(
        "attn.indexer.wq_b", "index_n_heads*index_head_dim, q_lora_rank", LINEAR, "indexer", "csa"
    ),
    _weight("attn.indexer.weights_proj", "index_n_heads, hidden_size", BF16, "indexer", "csa"),
    _weight(
        "attn.indexer.compressor.wkv", "overlap*index_head_dim, hidden_size", BF16, "indexer", "csa"
    ),
    _weight(
        "attn.indexer.compressor.wgate",
        "overlap*index_head_dim, hidden_size",
        BF16,
        "indexer",
        "csa",
    ),
    _weight("attn.indexer.compressor.norm", "index_head_dim", BF16, "indexer", "csa"),
    _plain(
        "attn.indexer.compressor.ape",
        "compress_ratio, overlap*index_head_dim",
        F32,
        "indexer",
        "csa",
    ),
    _weight("ffn.gate", "n_routed_experts, hidden_size", BF16, "router"),
    _plain("ffn.gate.tid2eid", "vocab_size, num_experts_per_tok", I64, "router", "hash"),
    _plain("ffn.gate.bias", "n_routed_experts", F32, "router", "score"),
    _weight("ffn.shared_experts.w1", "moe_intermediate_size, hidden_size", LINEAR, "shared expert"),
    _weight("ffn.shared_experts.w2", "hidden_size, moe_intermediate_size", LINEAR, "shared expert"),
    _weight("ffn.shared_experts.w3", "moe_intermediate_size, hidden_size", LINEAR, "shared expert"),
    _weight("ffn.experts.{expert}.w1", "moe_intermediate_size, hidden_size", EXPERT, "experts"),
    _weight("ffn.experts.{expert}.w2", "hidden_size, moe_intermediate_size", EXPERT, "experts"),
    _weight("ffn.experts.{expert}.w3", "moe_intermediate_size, hidden_size", EXPERT, "experts"),
    # Drafters. Classic mtp.0 has its own projections and head; DSpark shares them out over three.
    _weight("e_proj", "hidden_size, hidden_size", LINEAR, "drafter", "classic"),
    _weight("h_proj", "hidden_size, hidden_size", LINEAR, "drafter", "classic"),
    _weight("enorm", "hidden_size", BF16, "drafter", "classic", normalises="hidden_size"),
    _weight("hnorm", "hidden_size", BF16, "drafter", "classic", normalises="hidden_size"),
    _weight("norm", "hidden_size", BF16, "drafter", "drafter-head", normalises="hidden_size"),
    *(_in_drafter(template, "drafter-head") for template in _HC_HEAD),
    _weight("emb.tok_emb", "vocab_size, hidden_size", BF16, "drafter", "classic", optional=True),
    _weight("head", "vocab_size, hidden_size", BF16, "drafter", "classic", optional=True),
    _weight("main_proj", "hidden_size, targets*hidden_size", LINEAR, "drafter", "dspark-first"),
    _weight("main_norm", "hidden_size", BF16, "drafter", "dspark-first", normalises="hidden_size"),
    _weight("markov_head.markov_w1", "vocab_size, markov_rank", BF16, "drafter", "dspark-last"),
    _weight("markov_head.markov_w2", "vocab_size, markov_rank", BF16, "drafter", "dspark-last"),
    _weight("confidence_head.proj", "one, hidden_size+markov_rank", BF16, "drafter", "dspark-last"),
)
"""Tensors of a layer or a drafter block, named inside it."""

NORM_INPUTS: Mapping[str, tuple[str, ...]] = {
    "norm": ("head",),
    "attn_norm": (
        *("attn.wq_a", "attn.wkv", "attn.compressor.wkv", "attn.compressor.wgate"),
        *("attn.indexer.weights_proj", "attn.indexer.compressor.wkv"),
        "attn.indexer.compressor.wgate",
    ),
    "ffn_norm": (
        *("ffn.gate", "ffn.shared_experts.w1", "ffn.shared_experts.w3"),
        *("ffn.experts.{expert}.w1", "ffn.experts.{expert}.w3"),
    ),
    "attn.q_norm": ("attn.wq_b", "attn.indexer.wq_b"),
    "enorm": ("e_proj",),
    "hnorm": ("h_proj",),
}
"""Norms, each with all linears of its block that read what it gives and nothing else.

Source: spec/forward.md.
"""
_NORM_OF = {stem: norm for norm, stems in NORM_INPUTS.items() for stem in stems}


def norm_before(template: Template) -> str | None:
    """Stem, in the same block, of the norm whose weight multiplies every input of a linear."""
    return _NORM_OF.get(template.stem)


@dataclass(frozen=True)
class Block:
    """One layer of the trunk, or one drafter.

    Attributes:
        prefix: ``layers.3.`` or ``mtp.0.``.
        index: Its number in the trunk, or among the drafters.
        ratio: Its compress ratio.
        traits: What its templates ask for.
    """

    prefix: str
    index: int
    ratio: int
    traits: frozenset[str]

    @property
    def is_drafter(self) -> bool:
        return "drafter" in self.traits

    @property
    def is_hash(self) -> bool:
        return "hash" in self.traits


class Entry(NamedTuple):
    """One logical tensor of one checkpoint: a template, its block and its expert."""

    template: Template
    block: Block | None
    expert: int | None

    @property
    def stem(self) -> str:
        name = self.template.stem
        if self.expert is not None:
            name = name.format(expert=self.expert)
        return self.block.prefix + name if self.block else name


class StoredTensor(NamedTuple):
    """A tensor as a safetensors header names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Catalogue:
    """The table, expanded for one config.

    Args:
        config: The model.
        optional: Whether the optional tensors are there (the Base models have them).
    """

    def __init__(self, config: V4Config, *, optional: bool = False) -> None:
        self.config = config
        self.optional = optional
        self._shapes: dict[tuple[str, int], tuple[int, ...]] = {}

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every layer, then every drafter."""
        config = self.config
        layers = [
            Block(
                f"layers.{i}.",
                i,
                config.compress_ratios[i],
                _ratio_traits(config.compress_ratios[i])
                | {"hash" if i < config.num_hash_layers else "score"},
            )
            for i in range(config.num_hidden_layers)
        ]
        last = config.num_drafters - 1
        ratios = config.compress_ratios[config.num_hidden_layers :]
        for i, ratio in enumerate(ratios):
            traits = {"drafter", "score"} | _ratio_traits(ratio)
            if not config.is_dspark:
                traits |= {"classic", "drafter-head"}
            else:
                traits |= {"dspark-first"} if i == 0 else set()
                traits |= {"dspark-last", "drafter-head"} if i == last else set()
            layers.append(Block(f"mtp.{i}.", i, ratio, frozenset(traits)))
        return tuple(layers)

    def entries(self) -> Iterator[Entry]:
        """Every logical tensor, in the order of the published files."""
        before, after = MODEL_TEMPLATES[:1], MODEL_TEMPLATES[1:]
        yield from (Entry(template, None, None) for template in before)
        for block in self.blocks:
            if block.is_drafter:
                break
            yield from self.block_entries(block)
        yield from (Entry(template, None, None) for template in after)
        for block in self.blocks[self.config.num_hidden_layers :]:
            yield from self.block_entries(block)

    def block_entries(self, block: Block) -> Iterator[Entry]:
        """Every logical tensor of one block."""
        for template in BLOCK_TEMPLATES:
            if not template.needs <= block.traits or (template.optional and not self.optional):
                continue
            if template.per_expert:
                yield from (Entry(template, block, e) for e in range(self.config.n_routed_experts))
            else:
                yield Entry(template, block, None)

    def sizes(self, block: Block | None) -> Mapping[str, int]:
        """Size of every dim, for a block (its ratio decides two of them)."""
        config, ratio = self.config, block.ratio if block else 0
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "streams": config.hc_mult,
            "nope": config.nope_head_dim,
            "rope": config.qk_rope_head_dim,
            "q_lora_rank": config.q_lora_rank,
            "o_groups": config.o_groups,
            "group_heads": config.heads_per_group,
            "o_lora_rank": config.o_lora_rank,
            "n_routed_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "index_n_heads": config.index_n_heads,
            "index_nope": config.index_nope_head_dim,
            "compress_ratio": ratio,
            "overlap": 2 if ratio == CSA_RATIO else 1,
            "markov_rank": config.dspark_markov_rank or 0,
            "targets": len(config.dspark_target_layer_ids or ()),
            "one": 1,
            "three": 3,
        }

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """Logical shape (FP4 unpacked) of a tensor."""
        template, block = entry.template, entry.block
        key = (template.stem + template.suffix, block.ratio if block else -1)
        if key not in self._shapes:
            sizes = self.sizes(block)
            self._shapes[key] = tuple(axis_size(parse_axis(a), sizes) for a in template.axes)
        return self._shapes[key]

    def num_parameters(self, *, drafters: bool = True) -> int:
        """Logical parameters: FP4 unpacked, scales and hash tables left out."""
        return sum(
            _product(self.shape(entry))
            for entry in self.entries()
            if entry.template.storage != I64
            and (drafters or entry.block is None or not entry.block.is_drafter)
        )

    def num_active_parameters(self, *, drafters: bool = False) -> int:
        """Parameters that one token meets: K of E experts, everything else; see num_parameters."""
        config, total = self.config, 0
        for entry in self.entries():
            if entry.template.storage == I64 or (
                entry.block and entry.block.is_drafter and not drafters
            ):
                continue
            if entry.expert is None or entry.expert < config.num_experts_per_tok:
                total += _product(self.shape(entry))
        return total


def _ratio_traits(ratio: int) -> frozenset[str]:
    traits = {"compressed"} if ratio else set()
    return frozenset(traits | ({"csa"} if ratio == CSA_RATIO else set()))


def published_format(template: Template, expert_format: str, scale_dtype: str) -> str:
    """Format in which a published checkpoint stores a template."""
    fp8 = FP8_F32 if scale_dtype == "F32" else FP8
    if template.storage == LINEAR:
        return fp8
    if template.storage == EXPERT:
        return FP4 if expert_format == FP4 else fp8
    return template.storage


def stored_tensors(entry: Entry, shape: tuple[int, ...], fmt: str) -> tuple[StoredTensor, ...]:
    """The tensors of a header that store one logical tensor: the weight, then its scale.

    Source: spec/checkpoint.md, "Tensors" and "Number formats".
    """
    stem, name = entry.stem, entry.stem + entry.template.suffix
    if fmt not in QUANTIZED:
        return (StoredTensor(name, fmt, shape),)
    rows, cols = shape
    if fmt == FP4:
        assert cols % 32 == 0, (name, shape)
        weight = StoredTensor(name, "I8", (rows, cols // 2))
        return weight, StoredTensor(stem + ".scale", "F8_E8M0", (rows, cols // 32))
    scale_shape = (-(-rows // 128), -(-cols // 128))
    weight = StoredTensor(name, "F8_E4M3", shape)
    return weight, StoredTensor(stem + ".scale", SCALE_DTYPE[fmt], scale_shape)


def file_group(entry: Entry) -> str:
    """Which published file a tensor is in: the embedding's, its block's, or the head's."""
    if entry.block is not None:
        return entry.block.prefix
    return "embed" if entry.template.group == "embed" else "head"


_RENAMED_PARTS = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "self_attn": "attn",
    "mlp": "ffn",
    "weight_scale": "scale",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}
_RENAMED_PAIRS = {
    ("hc_head", "hc_fn"): "hc_head_fn",
    ("hc_head", "hc_base"): "hc_head_base",
    ("hc_head", "hc_scale"): "hc_head_scale",
    ("attn_hc", "fn"): "hc_attn_fn",
    ("attn_hc", "base"): "hc_attn_base",
    ("attn_hc", "scale"): "hc_attn_scale",
    ("ffn_hc", "fn"): "hc_ffn_fn",
    ("ffn_hc", "base"): "hc_ffn_base",
    ("ffn_hc", "scale"): "hc_ffn_scale",
}


def canonical_name(name: str) -> str:
    """The published name of a tensor, from a name seen in re-saved copies.

    Names that are already published, and names that nobody knows, come back as they are.
    Source: spec/checkpoint.md, the aliases after the table.
    """
    parts = name.split(".")
    if parts[0] == "model" and len(parts) > 1:
        parts = parts[1:]
    parts = [_RENAMED_PARTS.get(part, part) for part in parts]
    for i in range(len(parts) - 1):
        merged = _RENAMED_PAIRS.get((parts[i], parts[i + 1]))
        if merged is not None:
            parts[i : i + 2] = [merged]
            break
    if parts[-3:] == ["attn", "norm", "weight"]:
        parts[-2] = "kv_norm"
    return ".".join(parts)


_FOREIGN_PARTS = {
    "bias_vl": "DeepSeek-V4-Flash-Vision-Exp, which has a vision tower",
    "vision": "DeepSeek-V4-Flash-Vision-Exp, which has a vision tower",
    "engram": "DeepSeek-V4.1, which has engram layers",
}


def foreign_family(name: str) -> str | None:
    """The relative of V4 that an unknown tensor name gives away."""
    return next((_FOREIGN_PARTS[part] for part in name.split(".") if part in _FOREIGN_PARTS), None)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
