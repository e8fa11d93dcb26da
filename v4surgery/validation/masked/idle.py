"""Experts that no token of the prompts went to: graded on some tokens all the same."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.validation.masked.block import MaskedBlock
from v4surgery.validation.masked.experts import swiglu
from v4surgery.validation.masked.grading import Grades, token_errors
from v4surgery.validation.masked.weights import decoded

IDLE_TAP, PROBE_TOKENS = "ffn.experts", 32


def grade_idle_experts(
    block: MaskedBlock,
    replica: Checkpoint,
    used: Collection[int],
    x: Tensor,
    grades: Grades,
    *,
    graded: bool,
) -> None:
    """Grade what is left of a block's experts; a wrong one is named by its number.

    Args:
        block: The masked block.
        replica: Where the replica's experts are.
        used: Parent experts that tokens went to.
        x: The replica's input of the experts, ``(S, D')``.
        grades: Where grades go.
        graded: Whether the experts can be graded.
    """
    channels, x = block.places.channels, x[:PROBE_TOKENS]
    for number, expert in enumerate(block.kept.experts):
        if expert in used:
            continue
        mine = channels.seen(block.experts.alone(expert, channels.placed(x)))
        errors = token_errors(mine, run_expert(replica, block.kept.target, number, x))
        is_right = bool((errors <= grades.tolerance).all())
        name = IDLE_TAP if is_right else f"{IDLE_TAP}.{number}"
        grades.add(block.kept.target, name, errors, 0, graded=graded)


def run_expert(replica: Checkpoint, prefix: str, number: int, x: Tensor) -> Tensor:
    """One of the replica's routed experts on tokens ``(T, D')``, without a weight."""
    w1, w2, w3 = (
        decoded(replica, f"{prefix}ffn.experts.{number}.w{i}", x.device) for i in (1, 2, 3)
    )
    y: Tensor = swiglu(x @ w1.T, x @ w3.T, replica.config.swiglu_limit) @ w2.T
    return y
