"""Traces of a running transformers model, in the format of ours, for ``v4surgery diff``.

Only hooks are used: transformers is the caller's, and is not imported here. Places that its modules
do not show are left out: ``attn.indexer``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from v4surgery.errors import UsageError
from v4surgery.validation.taps import MODEL_TAPS, TAPS, Tap
from v4surgery.validation.trace import TraceWriter
from v4surgery.version import __version__

# Source: modules of DeepseekV4DecoderLayer, transformers 5.23.
PLACES: dict[str, Tap] = {
    "in": Tap("", "input", None, ""),
    "attn.hc": Tap("input_layernorm", "input", None, ""),
    "attn.in": Tap("input_layernorm", "output", None, ""),
    "attn.heads": Tap("self_attn.o_a_proj", "input", None, ""),
    "attn.out": Tap("self_attn", "output", 0, ""),
    "ffn.hc": Tap("post_attention_layernorm", "input", None, ""),
    "ffn.in": Tap("mlp", "input", None, ""),
    "gate.indices": Tap("mlp.gate", "output", 2, ""),
    "gate.weights": Tap("mlp.gate", "output", 1, ""),
    "ffn.out": Tap("mlp", "output", None, ""),
    "out": Tap("", "output", None, ""),
}


def record_transformers_trace(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    out: Path,
    *,
    taps: Sequence[str] = ("embed", *PLACES, "logits"),
    store_dtype: torch.dtype | None = None,
) -> Path:
    """Run a ``DeepseekV4ForCausalLM`` on some prompts and keep activations.

    Args:
        model: The model, in the dtype and on the device that it is to run with.
        prompts: Token ids of each.
        out: The trace file to write.
        taps: Names from validation.taps, less ``attn.indexer``.
        store_dtype: Floating activations are stored so; None keeps theirs.

    Raises:
        UsageError: No DeepSeek-V4 model of transformers, or a tap that it does not show.
        OutputError: The trace exists already, or cannot be written.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not all(hasattr(layer, "attn_hc") for layer in layers):
        raise UsageError(
            "not a DeepSeek-V4 model of transformers",
            value=type(model).__name__,
            rule="a DeepseekV4ForCausalLM",
        )
    unknown = [tap for tap in taps if tap not in PLACES and tap not in MODEL_TAPS]
    if unknown:
        raise UsageError(
            "transformers does not show this tap",
            value=unknown[0],
            rule="one of " + ", ".join(("embed", *PLACES, "logits")),
        )
    writer = TraceWriter(out, store_dtype)
    about = None
    try:
        for number, ids in enumerate(prompts):
            _run(model, layers, ids, number, taps, writer.record)
        about = _about(model, prompts, taps)
    finally:
        writer.close(about)
    return out


@torch.no_grad()
def _run(
    model: Any,
    layers: Sequence[nn.Module],
    ids: Sequence[int],
    number: int,
    taps: Sequence[str],
    record: Callable[[str, Tensor], None],
) -> None:
    """One prompt, its activations recorded as they come."""
    config, handles = model.config, []

    def hook(key: str, tap: Tap, shape: tuple[int, ...] | None) -> Callable[..., None]:
        def seen(_: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
            value = output
            if tap.side == "input":
                value = inputs[0] if inputs else kwargs["hidden_states"]
            value = value if tap.item is None else value[tap.item]
            record(key, value.detach().reshape(shape) if shape else value.detach())

        return seen

    heads = (1, len(ids), config.num_attention_heads, config.head_dim)
    for index, layer in enumerate(layers):
        for name in (tap for tap in PLACES if tap in taps):
            tap = PLACES[name]
            seen = hook(f"{number}/layers.{index}.{name}", tap, _shape(name, heads))
            module = layer.get_submodule(tap.module)
            handles.append(module.register_forward_hook(seen, with_kwargs=True))
    if "embed" in taps:
        seen = hook(f"{number}/embed", Tap("", "output", None, ""), None)
        handles.append(model.get_input_embeddings().register_forward_hook(seen, with_kwargs=True))
    try:
        row = torch.tensor([list(ids)], device=next(model.parameters()).device)
        logits = model(row, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if "logits" in taps:
        record(f"{number}/logits", logits.float())


def _shape(name: str, heads: tuple[int, ...]) -> tuple[int, ...] | None:
    """Heads come in groups there, and stand side by side here."""
    return heads if name == "attn.heads" else None


def _about(model: Any, prompts: Sequence[Sequence[int]], taps: Sequence[str]) -> dict[str, Any]:
    meanings = {**MODEL_TAPS, **{name: tap.meaning for name, tap in TAPS.items()}}
    return {
        "format": 1,
        "tool": {"name": "v4surgery", "version": __version__},
        "model": {"name": type(model).__name__, "fingerprint": None},
        "mode": "exact",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "implementation": "transformers",
        "names": "<prompt>/<block><tap>",
        "taps": {name: meanings[name] for name in taps},
        "prompts": [list(ids) for ids in prompts],
    }
