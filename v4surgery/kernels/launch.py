"""What every launcher needs to know of where it runs, and how it refuses what it cannot do."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from v4surgery.errors import UsageError

FP8_CAPABILITY = (8, 9)

# Kernels that must not fuse say so; unset, Triton 3.9 warns that 3.10 will change the default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; of Ampere when interpreted on the CPU."""
    if device.type != "cuda":
        return (8, 0)  # the interpreter's own E4M3 conversion is wrong for subnormals
    return torch.cuda.get_device_capability(device)


def has_fp8(device: torch.device) -> bool:
    """Whether Triton has the E4M3 type there: sm_89 and later."""
    return capability(device) >= FP8_CAPABILITY


def require_same_device(operation: str, *tensors: Tensor | None) -> torch.device:
    """The device of all tensors.

    Raises:
        UsageError: They lie on several, or on a CPU while Triton is not interpreted.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise UsageError(
            "tensors on different devices",
            where=operation,
            value=", ".join(sorted(map(str, devices))),
            rule="one device",
        )
    device = devices.pop()
    if device.type != "cuda" and not is_interpreted():
        raise UsageError(
            "Triton kernels need a GPU",
            where=operation,
            value=device,
            rule="a CUDA device, or TRITON_INTERPRET=1 to interpret them",
            hint="--implementation reference runs on a CPU",
        )
    return device


def require_shape(operation: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        UsageError: What it is and what it must be.
    """
    if tuple(tensor.shape) != shape:
        raise UsageError(
            f"{name} has the wrong shape",
            where=operation,
            value=tuple(tensor.shape),
            rule=str(shape),
        )


def require_dtype(operation: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse a tensor of another dtype.

    Raises:
        UsageError: What it is and what it must be.
    """
    if tensor.dtype not in dtypes:
        raise UsageError(
            f"{name} has the wrong dtype",
            where=operation,
            value=tensor.dtype,
            rule=" or ".join(map(str, dtypes)),
        )
