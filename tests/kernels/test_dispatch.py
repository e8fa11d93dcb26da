"""Choosing an implementation of the operations."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch

from v4surgery.errors import UsageError
from v4surgery.kernels.dispatch import HOMES, OPERATIONS, Ops


@pytest.mark.parametrize("implementation", HOMES)
def test_every_operation_exists_in_every_implementation(implementation: str) -> None:
    ops = Ops(implementation)
    for name in OPERATIONS:
        assert callable(getattr(ops, name)), name


def test_operations_take_the_same_arguments_in_every_implementation() -> None:
    for name, file in OPERATIONS.items():
        reference, triton = (
            inspect.signature(getattr(import_module(f"{home}.{file}"), name))
            for home in HOMES.values()
        )
        assert list(reference.parameters) == list(triton.parameters), name


def test_kernels_refuse_to_drop_gradients() -> None:
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(UsageError, match="Triton kernels have no gradients"):
        Ops("triton").rms_norm(torch.ones(1, 4), weight, 1e-6)
    with torch.no_grad():
        assert Ops("triton").rms_norm(torch.ones(1, 4), weight, 1e-6).shape == (1, 4)


def test_ops_count_what_ran() -> None:
    ops = Ops()
    for _ in range(3):
        ops.rms_norm(torch.ones(1, 4), None, 1e-6)
    ops.hadamard(torch.ones(1, 4))
    assert ops.ran == {"rms_norm": 3, "hadamard": 1}
    assert not Ops().ran


def test_unknown_implementation_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        Ops("cuda-magic")
    assert str(caught.value) == (
        "unknown implementation\n  where: --implementation\n  value: cuda-magic\n"
        "  rule: one of reference, triton"
    )


def test_unknown_operation_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="act_quantize"):
        Ops().act_quantize  # noqa: B018
