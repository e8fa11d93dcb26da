"""The matrices of a layer's experts where they lie: addresses for kernels, nothing is stacked.

Both implementations take these; an expert that is not in memory has the address 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.formats import FP4_GROUP, FP8_BLOCK

Stored = tuple[Tensor, "Tensor | None"]
ALIGNMENT_BYTES = 16
_DENSE = {torch.bfloat16: "bf16", torch.float32: "float32"}


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One of the three matrices (w1, w2 or w3) of every expert of a layer.

    Attributes:
        matrices: By expert number: the weight and its scale (None where the format has none), or
            None for an expert that is not in memory. Formats: packed E2M1 codes, uint8
            ``(out, in/2)``, with E8M0 bytes ``(out, in/32)``; E4M3 codes, uint8 ``(out, in)``,
            with E8M0 bytes or float32 ``(ceil(out/128), ceil(in/128))``; bf16; float32.
        in_features: Inputs, which tell FP4 from FP8.

    Raises:
        UsageError: Matrices of several formats, shapes or devices, or not contiguous.
    """

    matrices: Sequence[Stored | None]
    in_features: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", tuple(map(_aligned, self.matrices)))
        kinds = {_kind(weight, scale) for weight, scale in self.present}
        if len(kinds) > 1:
            _refuse("differ", sorted(map(str, kinds)), "one shape, dtype and device")
        format_ = self.format
        for weight, scale in self.present[:1]:
            expected = _scale_shape(format_, weight.shape[0], self.in_features)
            if scale is not None and tuple(scale.shape) != expected:
                _refuse("have scales of the wrong shape", tuple(scale.shape), str(expected))

    @cached_property
    def present(self) -> list[Stored]:
        """What is in memory, in order."""
        return [matrix for matrix in self.matrices if matrix is not None]

    @cached_property
    def is_present(self) -> list[bool]:
        """Which experts are in memory."""
        return [matrix is not None for matrix in self.matrices]

    @property
    def out_features(self) -> int:
        """Outputs; 0 if no expert is in memory."""
        return self.present[0][0].shape[0] if self.present else 0

    @cached_property
    def format(self) -> str:
        """fp4, fp8, bf16 or float32; empty if no expert is in memory."""
        if not self.present:
            return ""
        weight, scale = self.present[0]
        width = weight.shape[1]
        if scale is None and weight.dtype in _DENSE and width == self.in_features:
            return _DENSE[weight.dtype]
        if scale is not None and weight.dtype == torch.uint8:
            if 2 * width == self.in_features and self.in_features % FP4_GROUP == 0:
                return "fp4"
            if width == self.in_features:
                return "fp8"
        found = f"{weight.dtype} {tuple(weight.shape)} for {self.in_features} inputs"
        raise UsageError(
            "the matrices of experts have no known format",
            value=found + ("" if scale is not None else ", no scale"),
            rule="FP4 or FP8 codes as uint8 with scales, bf16 or float32",
        )

    @cached_property
    def addresses(self) -> Tensor:
        """Where the weights and the scales of the experts lie, int64 ``(2, E)`` on their device."""
        pairs = [(0, 0) if m is None else tuple(map(_address, m)) for m in self.matrices]
        device = self.present[0][0].device if self.present else None
        return torch.tensor(pairs, dtype=torch.int64, device=device).T.contiguous()


def _aligned(matrix: Stored | None) -> Stored | None:
    """The matrix; copied where it does not begin at a multiple of 16 bytes, as few files do."""
    if matrix is None:
        return None
    weight, scale = (
        tensor if tensor is None or tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()
        for tensor in matrix
    )
    assert weight is not None
    return weight, scale


def _kind(weight: Tensor, scale: Tensor | None) -> tuple[object, ...]:
    for tensor in (weight, scale):
        if tensor is not None and not tensor.is_contiguous():
            _refuse("lie scattered", f"strides {tensor.stride()}", "contiguous")
    dtypes = weight.dtype, None if scale is None else scale.dtype
    return tuple(weight.shape), *dtypes, str(weight.device)


def _scale_shape(format_: str, out: int, inputs: int) -> tuple[int, int]:
    if format_ == "fp4":
        return out, inputs // FP4_GROUP
    return -(-out // FP8_BLOCK), -(-inputs // FP8_BLOCK)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _refuse(what: str, value: object, rule: str) -> None:
    raise UsageError(f"the matrices of experts {what}", value=value, rule=rule)
