"""A plan from headers alone: what a remote parent would cost, without fetching what decides it.

``by: gate`` reads the router weights of every layer, 90 MB of V4-Flash, to choose which experts
stay. How many stay, and how large they are, is known without: whichever they are, the same bytes
are copied. So for a look at a plan random numbers stand in for the gates.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
from numpy.typing import NDArray

from v4surgery.checkpoint.reader import Checkpoint, Rows
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.recipes import Recipe, is_score, listed_ways
from v4surgery.slicers.plan import Plan, make_plan

_GATE_AXES = ("n_routed_experts", "hidden_size")


class _WithoutGates(Checkpoint):
    """A parent whose router weights are random numbers, the same ones at each reading."""

    stood_in: bool

    @classmethod
    def of(cls, parent: Checkpoint) -> _WithoutGates:
        view = cls.__new__(cls)
        view.__dict__.update(copy.copy(parent.__dict__), stood_in=False)
        return view

    def read_float(self, stored: StoredTensorRef, rows: Rows) -> NDArray[np.float32]:
        if stored.entry.template.axes != _GATE_AXES:
            return super().read_float(stored, rows)
        self.stood_in = True
        num_rows, num_cols = stored.weight.shape
        values = np.random.default_rng(0).random((num_rows, 1), dtype=np.float32)
        return np.broadcast_to(values[rows], (len(values[rows]), num_cols))


def estimate_plan(parent: Checkpoint, recipe: Recipe) -> tuple[Plan, bool]:
    """A plan whose choice of experts may be another one than slice makes.

    Returns:
        The plan, with layers, tensors and bytes as slice has them (only router rows may take
        more or fewer requests), and whether experts were chosen at random.

    Raises:
        PlanError: The recipe cannot be applied to this parent.
    """
    neurons = recipe.keep.moe_intermediate_size
    ways = listed_ways(neurons.by) if neurons is not None else ()
    if "norm" in ways or (recipe.scores is not None and any(map(is_score, ways))):
        return make_plan(parent, recipe), False  # scored expert by expert: it matters which
    view = _WithoutGates.of(parent)
    plan = make_plan(view, recipe)
    return dataclasses.replace(plan, parent=parent), view.stood_in


__all__ = ["estimate_plan"]
