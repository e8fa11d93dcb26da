"""In which format a replica stores each tensor, and what its config.json says of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4surgery.catalogue import (
    BF16,
    EXPERT,
    F32,
    FP4,
    FP8,
    FP8_F32,
    I64,
    LINEAR,
    QUANTIZED,
    Template,
)
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import QUANTIZATION_CONFIG
from v4surgery.recipes.schema import Recipe


def target_format(template: Template, parent_format: str, dtype: str) -> str:
    """Format of a replica tensor: the parent's, or what ``store.dtype`` makes of it."""
    if dtype == "f32":
        return parent_format if template.storage == I64 else F32
    if template.storage in (LINEAR, EXPERT):
        if dtype == "bf16":
            return BF16
        if dtype == "fp8":
            return FP8_F32 if parent_format == FP8_F32 else FP8
    if dtype != "native" and parent_format in QUANTIZED:
        return BF16  # older Base revisions quantize the compressor; only linears stay quantized
    if dtype != "native" and template.storage == BF16 and parent_format == F32:
        return BF16  # transformers saves norms in F32
    return parent_format


def storage_fields(parent: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Fields of the config that follow from how the weights are stored."""
    formats: dict[str, set[str]] = {LINEAR: set(), EXPERT: set()}
    for stored in parent.tensors.values():
        template = stored.entry.template
        if template.storage in formats:
            formats[template.storage].add(target_format(template, stored.fmt, recipe.store.dtype))
    if recipe.init == "random":
        return {"expert_dtype": None, "quantization_config": None}
    if recipe.store.dtype == "f32":
        own = parent.config.extra
        extra = {**own, "torch_dtype": "float32"} | ({"dtype": "float32"} if "dtype" in own else {})
        return {"expert_dtype": None, "quantization_config": None, "extra": extra}
    if not (formats[LINEAR] | formats[EXPERT]) & QUANTIZED:
        return {"expert_dtype": None, "quantization_config": None}
    names: Mapping[str, str] = {FP4: "fp4", FP8: "fp8", FP8_F32: "fp8"}
    expert = {names.get(fmt, "bf16") for fmt in formats[EXPERT]}
    return {
        "expert_dtype": expert.pop() if len(expert) == 1 else None,
        "quantization_config": _without_expert_dtype(
            parent.config.quantization_config or QUANTIZATION_CONFIG
        ),
    }


def _without_expert_dtype(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the experts' format, which transformers writes here and a cut may change."""
    return {key: value for key, value in quantization.items() if key != "expert_dtype"}
