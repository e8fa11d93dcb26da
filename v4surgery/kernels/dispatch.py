"""Which implementation of an operation runs: chosen explicitly, never silently replaced.

A model is built with one :class:`Ops`; every operation that it calls is counted there, so that a
report can say what ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from v4surgery.errors import UsageError

# Operation -> file that holds it, the same in every implementation.
OPERATIONS = {
    "act_quant": "act_quant",
    "act_quant_simulate": "act_quant",
    "combine_experts": "experts",
    "compressor_pool": "compressor_pool",
    "dequant_fp4": "dequant",
    "dequant_fp8": "dequant",
    "experts": "experts",
    "fp4_linear": "fp4_linear",
    "fp4_quant_simulate": "fp4_quant",
    "fp4_to_fp8": "quant",
    "fp8_linear": "fp8_linear",
    "hadamard": "hadamard",
    "hadamard_fp4": "hadamard",
    "hc_head": "hyper_connections",
    "hc_post": "hyper_connections",
    "hc_pre": "hyper_connections",
    "indexer_topk": "indexer",
    "norm_rope": "norm_rope",
    "quant_fp4": "quant",
    "quant_fp8": "quant",
    "rms_norm": "rms_norm",
    "rope": "rope",
    "route": "routing",
    "sparse_attention": "sparse_attention",
    "swiglu": "experts",
    "wide_linear": "wide_linear",
}
HOMES = {"reference": "v4surgery.kernels.reference", "triton": "v4surgery.kernels"}


class Ops:
    """The operations of one implementation, as attributes.

    Attributes:
        implementation: ``reference`` (plain torch, anywhere) or ``triton`` (a GPU).
        ran: How often each operation was called.

    Raises:
        UsageError: No such implementation.
    """

    def __init__(self, implementation: str = "reference") -> None:
        if implementation not in HOMES:
            raise UsageError(
                "unknown implementation",
                where="--implementation",
                value=implementation,
                rule="one of " + ", ".join(HOMES),
            )
        self.implementation = implementation
        self.ran: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPERATIONS:
            raise AttributeError(name)
        module = import_module(f"{HOMES[self.implementation]}.{OPERATIONS[name]}")
        function = getattr(module, name)
        has_gradients = self.implementation == "reference"

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.ran[name] += 1
            if not has_gradients and torch.is_grad_enabled():
                _refuse_gradients(name, args)
            return function(*args, **kwargs)

        setattr(self, name, counted)
        return counted


def _refuse_gradients(name: str, args: tuple[Any, ...]) -> None:
    """Kernels compute no gradients; going on would train nothing without a word."""
    if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        raise UsageError(
            "Triton kernels have no gradients",
            where=name,
            value="an argument that requires one",
            rule="torch.no_grad(), or weights that need no gradient",
            hint="the reference implementation has gradients",
        )
