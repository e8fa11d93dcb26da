"""Weights from a checkpoint into modules, tensor by tensor, in their stored format.

Module names are the checkpoint's, so a tensor's stem is its place. Nothing may stay unread and
nothing unloaded: both are errors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from v4surgery.catalogue import F32, QUANTIZED
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.refs import StoredTensorRef, TensorRef
from v4surgery.errors import CatalogueError
from v4surgery.model.linear import Linear
from v4surgery.model.numerics import Numerics
from v4surgery.model.transformer import Transformer

TORCH_DTYPE = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.uint8,
    "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
}


def read_tensor(checkpoint: Checkpoint, ref: TensorRef, device: torch.device | str) -> Tensor:
    """One stored tensor; FP4, FP8 and E8M0 as uint8 codes."""
    data = bytearray(ref.end - ref.begin)
    checkpoint.source.read_into(ref.file, ref.begin, memoryview(data))
    if not data:
        return torch.empty(ref.shape, dtype=TORCH_DTYPE[ref.dtype], device=device)
    flat = torch.frombuffer(data, dtype=TORCH_DTYPE[ref.dtype])
    return flat.reshape(ref.shape).to(device)


def place(
    root: nn.Module,
    name: str,
    stored: StoredTensorRef,
    weight: Tensor,
    scale: Tensor | None,
    numerics: Numerics,
    *,
    trainable: bool = False,
) -> None:
    """Put one logical tensor where its name says.

    Quantized linears keep their codes; plain weights take the dtype of the numerics; float32
    tensors stay float32. With ``trainable`` quantized weights are decoded, for gradients.

    Raises:
        CatalogueError: The modules have nothing of that name.
    """
    template = stored.entry.template
    path, _, leaf = (name, "", "weight") if template.suffix else name.rpartition(".")
    try:
        module = root.get_submodule(path)
        getattr(module, leaf)
    except AttributeError:
        raise CatalogueError("the model has no place for a tensor", where=name) from None
    if stored.fmt in QUANTIZED:
        assert isinstance(module, Linear) and scale is not None
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.scale = scale
        if trainable:
            dense = module.dense(numerics.dtype)
            module.scale, module.weight = None, nn.Parameter(dense)
    elif not weight.is_floating_point():
        module.register_buffer(leaf, weight)
    else:
        value = weight.float() if template.storage == F32 else weight.to(numerics.dtype)
        setattr(module, leaf, nn.Parameter(value, requires_grad=trainable))


def load_model(
    checkpoint: Checkpoint,
    numerics: Numerics,
    *,
    device: torch.device | str = "cpu",
    drafters: bool = False,
    trainable: bool = False,
) -> Transformer:
    """The whole model in memory.

    Args:
        checkpoint: A parent or a replica.
        numerics: Mode, dtype and operations.
        device: Where the weights go.
        drafters: Load classic drafter blocks too.
        trainable: Decode quantized weights and let parameters take gradients.

    Raises:
        CatalogueError: A parameter stayed without a tensor, or a tensor without a parameter.
        UsageError: Drafters of DSpark were asked for.
    """
    model = Transformer(checkpoint.config, numerics, drafters=drafters)
    for stem, stored in checkpoint.tensors.items():
        block = stored.entry.block
        if (block is not None and block.is_drafter and not drafters) or (
            stored.entry.template.optional
        ):
            continue
        weight = read_tensor(checkpoint, stored.weight, device)
        scale = read_tensor(checkpoint, stored.scale, device) if stored.scale else None
        place(model, stem, stored, weight, scale, numerics, trainable=trainable)
    require_loaded(model.named_parameters(), checkpoint.name)
    require_loaded(model.named_buffers(), checkpoint.name)
    return model.to(device).eval()


def require_loaded(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise CatalogueError if a parameter was never given a value."""
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise CatalogueError(
            "the model has parameters that the checkpoint does not give",
            where=where,
            value=", ".join(missing[:5]),
        )
