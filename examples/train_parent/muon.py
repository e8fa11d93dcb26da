"""Muon for matrices: momentum, orthogonalised by a hybrid Newton-Schulz iteration.

Eight iterations with (3.4445, -4.7750, 2.0315) bring the singular values near 1 quickly, two with
(2, -1.5, 0.5) settle them there. The update then has the root mean square of 0.18 that AdamW's
typically has, so both take the same learning rates. Source: the DeepSeek-V4 report's optimizer
settings; Muon: Keller Jordan et al., 2024, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

FAST, SETTLE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = [FAST] * 8 + [SETTLE] * 2


def orthogonalise(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack ``(n, rows, cols)``, about; bf16 on a GPU."""
    x = g.bfloat16() if g.is_cuda else g.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Parameters are matrices, or stacks of them; those of one shape are updated together.

    Args:
        parameters: float32.
        lr: Learning rate.
        momentum: Of the gradients, Nesterov's.
        decay: Weight decay, decoupled.
        update_rms: Root mean square of an update before the learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.1,
        update_rms: float = 0.18,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "decay": decay, "update_rms": update_rms}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[-2:]].append(p)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)

    def _update(
        self, parameters: list[nn.Parameter], shape: torch.Size, group: dict[str, float]
    ) -> None:
        grads = torch.cat([p.grad.reshape(-1, *shape) for p in parameters if p.grad is not None])
        state = self.state[parameters[0]]
        buffer = state.setdefault("momentum", torch.zeros_like(grads))
        buffer.lerp_(grads, 1 - group["momentum"])
        update = orthogonalise(grads.lerp(buffer, group["momentum"])).float()
        # An orthogonalised matrix has a root mean square of 1 / sqrt(its longer side).
        update *= group["update_rms"] * max(shape) ** 0.5 * group["lr"]
        begin = 0
        for p in parameters:
            count = p.numel() // (shape[0] * shape[1])
            p.mul_(1 - group["lr"] * group["decay"])
            p.sub_(update[begin : begin + count].view_as(p))
            begin += count
