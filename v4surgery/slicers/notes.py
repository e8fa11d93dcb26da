"""What people should know of a replica before it is made."""

from __future__ import annotations

from collections.abc import Sequence

from v4surgery.catalogue import FP8, FP8_F32
from v4surgery.config import HCA, V4Config, attention_kind
from v4surgery.formats import FP8_BLOCK
from v4surgery.recipes.schema import Recipe
from v4surgery.slicers.edit import TensorEdit
from v4surgery.slicers.layers import LayerAssignment
from v4surgery.slicers.rope import RopeCut

COMPENSATE_NOTE = (
    "compensate: norm weights and mHC projections take sqrt(units before / units "
    "after), times the root of the energy kept where a basis says it; the norm of a "
    "query head and the softmax scale cancel each other; rms_norm_eps, the softmax "
    "over fewer keys and top-K routing cannot be folded into weights"
)


def layer_notes(layers: LayerAssignment, config: V4Config) -> list[str]:
    """One note for each kind of change, with the layers concerned."""
    changed: dict[str, list[str]] = {}
    for target, (source, kind) in enumerate(zip(layers.sources, layers.kinds, strict=True)):
        was, is_hash = config.compress_ratios[source], source < config.num_hash_layers
        if was != kind.ratio:
            what = f"ratio {was} becomes {kind.ratio}" if kind.ratio else "compressor dropped"
            changed.setdefault(what, []).append(str(target))
        if is_hash and not kind.is_hash:
            what = "hash routing becomes score routing, with a gate bias of zero"
            changed.setdefault(what, []).append(str(target))
    return [f"{what} in layer {', '.join(targets)}" for what, targets in changed.items()]


def config_notes(recipe: Recipe, config: V4Config, replica: V4Config, rope: RopeCut) -> list[str]:
    """What a replica's numbers mean for those who run it."""
    notes = []
    if rope.dims is not None:
        notes.append(
            f"rope frequencies: largest relative difference {rope.plain_error:.2g} in sliding "
            f"layers, {rope.scaled_error:.2g} in compressed layers (YaRN ramp, rounded to dims)"
        )
    rates = {r for r in replica.compress_ratios if attention_kind(r) == HCA}
    if len(rates) > 1:
        notes.append(
            f"HCA ratios {sorted(rates)}: transformers knows one HCA ratio for a model, and "
            "would run all at the first"
        )
    rope_dims, head_dim = replica.qk_rope_head_dim, replica.head_dim
    if int(head_dim * (rope_dims / head_dim)) != rope_dims:
        notes.append(
            f"transformers computes the rope size as int({head_dim} * ({rope_dims}/{head_dim})), "
            f"which is not {rope_dims}: choose another head_dim for it"
        )
    if replica.n_routed_experts < config.n_routed_experts:
        notes.append(
            "fewer experts: top-K of what is left is not top-K of all; gate.bias and "
            "routed_scaling_factor stay the parent's unless the recipe sets the latter"
        )
    if replica.index_head_dim & (replica.index_head_dim - 1):
        notes.append(
            f"index_head_dim {replica.index_head_dim} is no power of two: the Hadamard rotation "
            "becomes block-diagonal (scores do not change)"
        )
    if recipe.keep.mtp == "drop" and config.num_drafters:
        notes.append(f"{config.num_drafters} drafter block(s) dropped")
    return notes


def partial_block_notes(edits: Sequence[TensorEdit]) -> list[str]:
    """Name an FP8 size that transformers (seen in 5.23) decodes wrongly where it dequantizes."""
    stems = [
        edit.target.stem
        for edit in edits
        if edit.fmt in (FP8, FP8_F32)
        and any(size > FP8_BLOCK and size % FP8_BLOCK for size in edit.shape)
    ]
    if not stems:
        return []
    return [
        f"{len(stems)} FP8 tensors ({stems[0]}, ...) are wider than 128 and no multiple of it: "
        "transformers, where it dequantizes (always on a CPU), takes other block bounds and "
        "decodes them wrongly; choose multiples of 128, or store bf16"
    ]
