"""Experts: the gate, the routed experts and the shared one.

Source: spec/forward.md, "Experts".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from v4surgery.config import V4Config
from v4surgery.kernels.expert_weights import ExpertWeights
from v4surgery.model.linear import Linear
from v4surgery.model.numerics import Numerics


class Gate(nn.Module):
    """Routing by score, or by the token's row of a hash table."""

    tid2eid: Tensor | None
    bias: Tensor | None

    def __init__(self, config: V4Config, numerics: Numerics, *, is_hash: bool) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        experts, per_token = config.n_routed_experts, config.num_experts_per_tok
        weight = torch.empty(experts, config.hidden_size, dtype=numerics.dtype, device="meta")
        table = torch.empty(config.vocab_size, per_token, dtype=torch.int64, device="meta")
        bias = nn.Parameter(torch.empty(experts, device="meta"))
        self.weight = nn.Parameter(weight)
        self.register_buffer("tid2eid", table if is_hash else None)
        self.register_parameter("bias", None if is_hash else bias)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 and weights float32 ``(T, K)`` of tokens ``(T, D)`` with ids ``(T,)``."""
        config = self.config
        logits = self.numerics.ops.wide_linear(x, self.weight)
        chosen = None if self.tid2eid is None else self.tid2eid[ids]
        routed: tuple[Tensor, Tensor] = self.numerics.ops.route(
            logits,
            self.bias,
            chosen,
            topk=config.num_experts_per_tok,
            scoring_func=config.scoring_func,
            normalise=config.norm_topk_prob,
            scaling=config.routed_scaling_factor,
        )
        return routed


class Expert(nn.Module):
    """w2(silu(min(w1 x, limit)) * clamp(w3 x) * weight)."""

    def __init__(self, config: V4Config, numerics: Numerics) -> None:
        super().__init__()
        self.limit, self.numerics = config.swiglu_limit, numerics
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.w1 = Linear(inner, hidden, numerics)
        self.w2 = Linear(hidden, inner, numerics)
        self.w3 = Linear(inner, hidden, numerics)

    def neurons(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """What goes into w2, ``(T, F)``; ``weight`` is float32 ``(T, 1)``."""
        hidden: Tensor = self.numerics.ops.swiglu(self.w1(x), self.w3(x), self.limit, weight)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """The shared expert, ``(T, D)`` to ``(T, D)``."""
        y: Tensor = self.w2(self.neurons(x))
        return y


class Probe(nn.Module):
    """Passes on what a routed expert computed; forward hooks see the expert and its tokens."""

    def forward(self, value: Tensor, expert: int, token: Tensor) -> Tensor:
        """``value`` ``(t, ...)`` of the tokens ``(t,)`` of one expert."""
        del expert, token
        return value


Matrices = tuple[ExpertWeights, ExpertWeights, ExpertWeights]
"""w1, w2 and w3 of some experts."""


class Experts(nn.ModuleDict):
    """Routed experts by number; those of a resident model are all in memory."""

    def __init__(self, experts: Mapping[str, Expert] | None = None) -> None:
        super().__init__(experts)
        self._matrices: Matrices | None = None

    def each(self, experts: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Some experts in order."""
        for expert in experts:
            module = self[str(expert)]
            assert isinstance(module, Expert)
            yield expert, module

    def batches(self, indices: Tensor) -> Iterator[Matrices]:
        """The matrices of all experts that tokens go to, as many at a time as are in memory.

        Addresses are looked up once, and again after the modules were moved; a weight must not be
        replaced by another tensor in between.
        """
        del indices  # all are here
        if self._matrices is None:
            self._matrices = self.matrices(len(self), range(len(self)))
        yield self._matrices

    def agree(self, routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Indices and weights that all who hold experts go by."""
        return routed

    def combine(self, slots: Tensor, indices: Tensor, shared: Tensor, numerics: Numerics) -> Tensor:
        """The sum ``(T, D)`` of slots ``(T, K, D)`` and the shared expert's ``(T, D)``."""
        total: Tensor = numerics.ops.combine_experts(slots, indices, shared)
        return total

    def matrices(self, count: int, wanted: Iterable[int]) -> Matrices:
        """The matrices of some of ``count`` experts; the others count as not in memory."""
        modules = dict(Experts.each(self, tuple(wanted)))  # those that are here: nothing is read

        def gather(name: str) -> ExpertWeights:
            linears = {number: getattr(module, name) for number, module in modules.items()}
            stored = [
                (linears[e].weight, linears[e].scale) if e in linears else None
                for e in range(count)
            ]
            return ExpertWeights(stored, next(iter(linears.values())).in_features)

        return gather("w1"), gather("w2"), gather("w3")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        self._matrices = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class MoE(nn.Module):
    """The feed-forward part of a block; ``experts`` are resident ones unless others are given."""

    def __init__(
        self,
        config: V4Config,
        numerics: Numerics,
        *,
        is_hash: bool,
        experts: Experts | None = None,
    ) -> None:
        super().__init__()
        self.numerics, self.limit = numerics, config.swiglu_limit
        self.gate = Gate(config, numerics, is_hash=is_hash)
        if experts is None:
            numbers = range(config.n_routed_experts)
            experts = Experts({str(e): Expert(config, numerics) for e in numbers})
        self.experts = experts
        self.shared_experts = Expert(config, numerics)
        self.neuron_probe, self.output_probe = Probe(), Probe()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Tokens ``(B, S, D)`` with their ids ``(B, S)``."""
        flat = x.flatten(0, 1)
        indices, weights = self.experts.agree(self.gate(flat, ids.flatten()))
        run = self._one_by_one if self._is_probed else self._together
        slots = run(flat, indices, weights)
        y = self.experts.combine(slots, indices, self.shared_experts(flat), self.numerics)
        return y.view_as(x)

    @property
    def _is_probed(self) -> bool:
        """Whether someone looks into single experts."""
        return bool(self.neuron_probe._forward_hooks or self.output_probe._forward_hooks)

    def _together(self, flat: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Every choice's output ``(T, K, D)``, all experts in one operation."""
        numerics, slots = self.numerics, None
        for w1, w2, w3 in self.experts.batches(indices):
            slots = numerics.ops.experts(
                flat,
                indices,
                weights,
                w1,
                w2,
                w3,
                limit=self.limit,
                official=numerics.is_official,
                out=slots,
            )
        return slots if slots is not None else flat.new_zeros(*indices.shape, flat.shape[1])

    def _one_by_one(self, flat: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The same, an expert at a time, through the probes."""
        slots = flat.new_zeros(*indices.shape, flat.shape[1])
        for number, expert in self.experts.each(indices.unique().tolist()):
            token, slot = (indices == number).nonzero(as_tuple=True)
            hidden = expert.neurons(flat[token], weights[token, slot, None])
            y = expert.w2(self.neuron_probe(hidden, number, token))
            slots = slots.index_put((token, slot), self.output_probe(y, number, token))
        return slots
