"""RoPE of the replica against the parent's: every kept pair turns as it did, or as near as can be.

Unscaled frequencies of sliding layers match exactly when every s-th pair is kept. The YaRN ramp of
the compressed layers is rounded to whole dims, so there the replica's is held against the best of
all ramps. Source: spec/slicing.md, trap 2; spec/forward.md, "Attention".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from v4surgery.config import RopeScaling, V4Config
from v4surgery.validation.masked.record import Record
from v4surgery.validation.masked.report import Rule

# float64 arithmetic on both sides: a power and a division, far below one float32 unit.
SAME = 1e-9
# The recipe's betas are written with six digits, of which only whole dims count.
AS_GOOD = 1e-6


def frequency_rules(record: Record, replica: V4Config, parent: V4Config) -> Iterator[Rule]:
    """Rules of the rotated pairs, unless the recipe allows any frequencies."""
    head_dim = record.recipe.keep.head_dim
    if head_dim is not None and head_dim.frequencies == "any":
        return
    pairs = record.model.pairs
    if 2 * len(pairs) != replica.qk_rope_head_dim:
        return  # said where sizes are compared
    wanted = plain(parent.rope_theta, parent.qk_rope_head_dim)[list(pairs)]
    error = largest_error(plain(replica.rope_theta, replica.qk_rope_head_dim), wanted)
    if error > SAME:
        yield Rule(
            "rope frequencies",
            f"pair {_worst(plain(replica.rope_theta, replica.qk_rope_head_dim), wanted)} of the "
            f"replica turns {error:.0%} off the parent's pair that it was cut from",
        )
    yield from _ramp_rules(record, replica, parent)


def _ramp_rules(record: Record, replica: V4Config, parent: V4Config) -> Iterator[Rule]:
    before, after = parent.rope_scaling, replica.rope_scaling
    if (before is None) != (after is None):
        yield Rule("config.json: rope_scaling", "only one of parent and replica has it")
    if before is None or after is None:
        return
    for name in ("factor", "original_max_position_embeddings"):
        if getattr(before, name) != getattr(after, name):
            yield Rule(f"config.json: rope_scaling.{name}", "is not the parent's")
    given = record.recipe.config
    if given.beta_fast is not None or given.beta_slow is not None:
        return
    error, best = scaled_errors(record.model.pairs, replica, parent)
    if error > best + AS_GOOD:
        yield Rule(
            "config.json: rope_scaling",
            f"with these betas a pair turns {error:.1%} off the parent's in compressed layers; "
            f"others would leave {best:.1%}",
        )


def scaled_errors(pairs: Sequence[int], replica: V4Config, parent: V4Config) -> tuple[float, float]:
    """Largest relative difference of a YaRN frequency, and the least that any ramp would leave."""
    before, after = parent.rope_scaling, replica.rope_scaling
    assert before is not None and after is not None
    dims, theta = replica.qk_rope_head_dim, replica.compress_rope_theta
    low, high = ramp(theta, parent.qk_rope_head_dim, before)
    plain_before = plain(parent.compress_rope_theta, parent.qk_rope_head_dim)
    wanted = ramped(plain_before, low, high, before.factor)[list(pairs)]
    own = plain(theta, dims)
    error = largest_error(ramped(own, *ramp(theta, dims, after), after.factor), wanted)
    if error <= AS_GOOD:
        return error, error
    ramps = combinations(range(dims), 2)
    best = min(largest_error(ramped(own, *bounds, after.factor), wanted) for bounds in ramps)
    return error, min(error, best)


def plain(theta: float, dims: int) -> NDArray[np.float64]:
    """Radians a position of each pair: theta^(-2i/dims)."""
    values: NDArray[np.float64] = np.exp(-2 * np.arange(dims // 2) / dims * math.log(theta))
    return values


def ramp(theta: float, dims: int, scaling: RopeScaling) -> tuple[int, int]:
    """The whole dims between which YaRN goes from unscaled to scaled."""
    bounds = [
        dims
        * math.log(scaling.original_max_position_embeddings / (beta * 2 * math.pi))
        / (2 * math.log(theta))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    ]
    return max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), dims - 1)


def ramped(values: NDArray[np.float64], low: int, high: int, factor: float) -> NDArray[np.float64]:
    """Frequencies under YaRN with a ramp from ``low`` to ``high``."""
    share = np.clip((np.arange(len(values)) - low) / max(high - low, 0.001), 0, 1)
    return np.asarray(values * (1 - share + share / factor))


def largest_error(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    return float(np.abs(got / wanted - 1).max(initial=0.0))


def _worst(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> int:
    return int(np.abs(got / wanted - 1).argmax())
