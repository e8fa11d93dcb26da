"""The official code's conversion in plain torch, whole state dicts in memory: the tests' oracle.

Shares nothing with the package: names are taken apart here, weights are torch's dtypes, and files
are written by safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SPLIT = {
    **dict.fromkeys(("embed", "head", "wq_b", "wo_a", "attn_sink", "weights_proj"), 0),
    **dict.fromkeys(("markov_w1", "markov_w2"), 0),
    "wo_b": 1,
}
LAST_PART = ("hc_", "attn_sink", "tid2eid", "ape")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a published folder."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return state


def shard(
    state: dict[str, torch.Tensor], ranks: int, experts: int
) -> list[dict[str, torch.Tensor]]:
    """What each rank's file holds."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "mtp" and ("emb" in parts or parts[-2:] == ["head", "weight"]):
            continue
        key = parts[-1] if any(word in name for word in LAST_PART) else parts[-2]
        for rank in range(ranks):
            if "experts" in parts:
                if int(parts[-3]) * ranks // experts == rank:
                    shards[rank][name] = tensor
            elif key in SPLIT:
                shards[rank][name] = tensor.chunk(ranks, SPLIT[key])[rank].contiguous()
            else:
                shards[rank][name] = tensor
    for held in shards:
        for name in [name for name in held if name.endswith("wo_a.weight")]:
            weight, scale = held[name], held.pop(name[: -len("weight")] + "scale")
            spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            held[name] = (weight.float() * spread[: len(weight), : weight.shape[1]]).bfloat16()
        for name, tensor in held.items():
            if tensor.dtype == torch.int8:
                held[name] = tensor.view(torch.float4_e2m1fn_x2)
    return shards


def write(folder: Path, out: Path, ranks: int, experts: int) -> None:
    """The rank files of a published folder."""
    out.mkdir(parents=True, exist_ok=True)
    for rank, held in enumerate(shard(load(folder), ranks, experts)):
        save_file(held, out / f"model{rank}-mp{ranks}.safetensors")
