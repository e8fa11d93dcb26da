"""What is kept of the replica's run: the taps, and the parts that its choices are made of.

A choice hides what it was made of: a wrong bias may never turn one. So the indexer's queries, keys
and weights and the scores of all experts are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from v4surgery.config import V4Config
from v4surgery.model.moe import Gate
from v4surgery.validation.masked.experts import affinity
from v4surgery.validation.taps import TAPS, TapRecorder

INDEXER_PARTS = ("attn.indexer.wq_b", "attn.indexer.weights_proj", "attn.indexer.compressor")


class Observer:
    """Sees the modules of a run, and keeps what they compute until it is taken.

    Attributes:
        seen: Activations under ``<prompt>/<block><tap>``, as modules gave them.
    """

    def __init__(self, config: V4Config) -> None:
        self.config = config
        self.seen: dict[str, Tensor] = {}
        self._taps = TapRecorder(("embed", *TAPS), self.seen.__setitem__)

    def __call__(self, module: nn.Module, prefix: str, prompt: int) -> Callable[[], None]:
        """Attach to a module; returns detach."""
        detach = self._taps(module, prefix, prompt)
        parts = {name for name, _ in module.named_modules()}
        handles = []
        for name in (*INDEXER_PARTS, "ffn.gate"):
            if name in parts:
                hook = self._hook(f"{prompt}/{prefix}", name)
                handles.append(module.get_submodule(name).register_forward_hook(hook))

        def detach_all() -> None:
            detach()
            for handle in handles:
                handle.remove()

        return detach_all

    def take(self, prompt: int, prefix: str) -> dict[str, Tensor]:
        """Activations of a block on a prompt by tap, ``(S, ...)``; they are forgotten."""
        start = f"{prompt}/{prefix}"
        found = [key for key in self.seen if key.startswith(start)]
        taps = {key.removeprefix(start): self.seen.pop(key) for key in found}
        # The gate sees tokens, all other modules a batch of one.
        return {tap: v if tap.startswith("gate.") else v[0] for tap, v in taps.items()}

    def _hook(self, start: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, Gate):
                self.seen[start + "gate.scores"] = self._scores(module, inputs[0])
            elif name == "attn.indexer.wq_b":
                self.seen[start + name] = output.unflatten(-1, (self.config.index_n_heads, -1))
            else:
                self.seen[start + name] = output

        return hook

    def _scores(self, gate: Gate, x: Tensor) -> Tensor:
        """Scores plus bias of all experts, ``(T, E')``; the gate itself gives those it chose."""
        scores = affinity(x.float() @ gate.weight.float().T, self.config.scoring_func)
        return scores if gate.bias is None else scores + gate.bias
