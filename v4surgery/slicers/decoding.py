"""Decoding stored weights to bf16: with numpy on the CPU, or with the kernels on a GPU.

Both give the same bytes, so a slice does not depend on where it ran; a GPU is only faster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.catalogue import FP4, QUANTIZED
from v4surgery.checkpoint.reader import NUMPY_DTYPE, Checkpoint, Rows, decode
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.errors import UsageError

if TYPE_CHECKING:
    import torch

Cols = NDArray[np.int64] | None
Decoder = Callable[[Checkpoint, StoredTensorRef, Rows, Cols], NDArray[np.uint16]]
"""Bits of bf16 ``(rows, cols)`` of some rows and columns of a stored tensor."""

_DRIVER = Path("/dev/nvidiactl")


def host_decoder(
    parent: Checkpoint, stored: StoredTensorRef, rows: Rows, cols: Cols
) -> NDArray[np.uint16]:
    """Decode with numpy."""
    codes, scales = parent.read_codes(stored, rows, cols)
    return decode(stored.fmt, codes, scales, "bf16")


def find_decoder(device: str) -> Decoder:
    """The decoder of ``--device``: ``auto`` takes a GPU where there is one.

    Raises:
        UsageError: A GPU was asked for and is not there, or the device is neither.
    """
    if device == "cpu" or (device == "auto" and not _DRIVER.exists()):
        return host_decoder
    import torch  # only where a GPU may be: it takes seconds to import

    if device == "auto" and not torch.cuda.is_available():
        return host_decoder
    name = "cuda" if device == "auto" else device
    if not name.startswith("cuda") or not torch.cuda.is_available():
        raise UsageError(
            "weights cannot be decoded there",
            where="--device",
            value=device,
            rule="auto, cpu, or cuda (cuda:1) where torch finds one",
        )
    return device_decoder(torch.device(name))


def device_decoder(device: torch.device) -> Decoder:
    """Decode with the Triton kernels."""
    import torch

    from v4surgery.kernels.dequant import dequant_fp4, dequant_fp8

    def upload(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    def decoder(
        parent: Checkpoint, stored: StoredTensorRef, rows: Rows, cols: Cols
    ) -> NDArray[np.uint16]:
        if stored.fmt not in QUANTIZED:
            return host_decoder(parent, stored, rows, cols)
        assert stored.scale is not None
        raw = parent.read_rows(stored.weight, rows)
        kept = None if cols is None else upload(cols)
        if stored.fmt == FP4:
            scale = parent.read_rows(stored.scale, rows)
            values = dequant_fp4(upload(raw), upload(scale), torch.bfloat16, cols=kept)
        else:
            # Every row is a matrix of its own, with the scales of the block that it was in.
            dtype = NUMPY_DTYPE[stored.scale.dtype]
            blocks, which = np.unique(
                np.arange(stored.weight.shape[0])[rows] // formats.FP8_BLOCK, return_inverse=True
            )
            scale = parent.read_rows(stored.scale, blocks).view(dtype)[which]
            stack = upload(raw)[:, None], upload(scale)[:, None]
            values = dequant_fp8(*stack, torch.bfloat16, cols=kept)[:, 0]
        bits: NDArray[np.uint16] = values.view(torch.uint16).cpu().numpy()
        return bits

    return decoder
