"""What `inspect` and `plan` say, as plain data for tables and JSON."""

from __future__ import annotations

import json
from math import prod
from typing import Any

from v4surgery.catalogue import FP8_F32, I64, Catalogue
from v4surgery.checkpoint.layout import PROVENANCE_FILE
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.config import V4Config
from v4surgery.errors import CheckpointError
from v4surgery.presets import variant_name
from v4surgery.slicers.edit import TRANSFORMS
from v4surgery.slicers.plan import Plan
from v4surgery.slicers.transform import worker_bytes

DIMENSIONS = (
    "num_hidden_layers",
    "hidden_size",
    "hc_mult",
    "num_attention_heads",
    "o_groups",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_hash_layers",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "sliding_window",
    "vocab_size",
    "max_position_embeddings",
)


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is in a checkpoint."""
    groups: dict[str, dict[str, Any]] = {}
    formats = set()
    for stored in checkpoint.tensors.values():
        template = stored.entry.template
        item = groups.setdefault(
            template.group, {"tensors": 0, "formats": [], "parameters": 0, "bytes": 0}
        )
        item["tensors"] += 1 + (stored.scale is not None)
        if stored.fmt not in item["formats"]:
            item["formats"].append(stored.fmt)
        if template.storage != I64:
            item["parameters"] += prod(checkpoint.catalogue.shape(stored.entry))
        item["bytes"] += stored.nbytes
        formats.add(stored.fmt)
    catalogue = checkpoint.catalogue
    return {
        "name": checkpoint.name,
        "variant": variant_name(checkpoint.config, FP8_F32 in formats),
        "remarks": _remarks(checkpoint),
        "dimensions": dimensions(checkpoint.config),
        "groups": groups,
        "parameters": parameters(catalogue),
        "payload_bytes": checkpoint.payload_bytes,
        "files": len(checkpoint.files),
        "tensors": checkpoint.num_tensors,
        "fingerprint": checkpoint.fingerprint,
    }


def dimensions(config: V4Config) -> dict[str, Any]:
    """The sizes that people ask for, and the ratios in short."""
    data: dict[str, Any] = {name: getattr(config, name) for name in DIMENSIONS}
    layers = config.num_hidden_layers
    data["compress_ratios"] = _runs(config.compress_ratios[:layers])
    drafters = config.compress_ratios[layers:]
    kind = "DSpark" if config.is_dspark else "MTP"
    data["drafters"] = f"{len(drafters)} {kind}" if drafters else "none"
    return data


def parameters(catalogue: Catalogue) -> dict[str, int]:
    """Logical parameters: all, without drafters, and those that one token uses."""
    return {
        "total": catalogue.num_parameters(),
        "without_drafters": catalogue.num_parameters(drafters=False),
        "active": catalogue.num_active_parameters(),
    }


def summarize_plan(plan: Plan) -> dict[str, Any]:
    """What a plan would do, and what it costs."""
    cost = plan.cost
    catalogue = plan.catalogue
    ratios, num_hash = plan.config.compress_ratios, plan.config.num_hash_layers
    layers = [
        {
            "target": block.target.prefix.rstrip("."),
            "source": block.source.prefix.rstrip("."),
            "ratio": block.target.ratio,
            "parent_ratio": block.source.ratio,
            "routing": "hash" if block.target.is_hash else "score",
        }
        for block in plan.selections.blocks
    ]
    assert len(layers) == len(ratios) and num_hash <= len(layers)
    return {
        "recipe": plan.recipe.name,
        "parent": plan.parent.name,
        "plan_hash": plan.plan_hash,
        "layers": layers,
        "dimensions": dimensions(plan.config),
        "parent_dimensions": dimensions(plan.parent.config),
        "parameters": parameters(catalogue),
        "bytes_read": cost.bytes_read,
        "requests": cost.requests,
        "selection_bytes": cost.selection_bytes,
        "bytes_written": cost.bytes_written,
        "files": [shard.file for shard in plan.shards],
        "bytes_of_memory_per_worker": worker_bytes(plan),
        "transforms": {
            name: {"tensors": plan.transforms[name], "meaning": meaning}
            for name, meaning in TRANSFORMS.items()
            if plan.transforms[name]
        },
        "inexact": {name: len(stems) for name, stems in plan.inexact().items()},
        "notes": list(plan.notes),
    }


def _remarks(checkpoint: Checkpoint) -> list[str]:
    layout = checkpoint.source.identity().get("layout")
    if layout is not None:
        return [f"layout: {layout}, read as the published one"]
    if PROVENANCE_FILE not in checkpoint.source.list_files():
        return []
    try:
        record = json.loads(checkpoint.read_file(PROVENANCE_FILE))
        if record.get("synthetic"):
            return [f"synthetic: random values in the layout of {record['like']}"]
        return [f"replica: recipe {record['recipe']}, cut from {record['parent']['name']}"]
    except (ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        return ["v4surgery.json is not readable"]


def _runs(ratios: tuple[int, ...]) -> str:
    """Ratios with repeated pairs folded: ``0, 0, (4, 128) x20, 4``."""
    parts: list[str] = []
    i = 0
    while i < len(ratios):
        pair, repeats = ratios[i : i + 2], 1
        while len(pair) == 2 and ratios[i + 2 * repeats : i + 2 * repeats + 2] == pair:
            repeats += 1
        if repeats > 1 and pair[0] != pair[1]:
            parts.append(f"({pair[0]}, {pair[1]}) x{repeats}")
            i += 2 * repeats
        else:
            parts.append(str(ratios[i]))
            i += 1
    return ", ".join(parts)
