"""Hash tables, row by row, by the words of their policy.

Every row names K' distinct experts that there are. Experts that survive the cut stay, in their
order; the slots behind them follow the policy. Source: spec/slicing.md, trap 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.validation.masked.record import Kept, Record
from v4surgery.validation.masked.report import Rule

# Cosines in float32 of rows of up to 7168 channels: a few units of 2^-24.
SAME_COSINE = 1e-5

IntArray = NDArray[np.int64]


def read_table(checkpoint: Checkpoint, prefix: str) -> IntArray:
    """tid2eid of a block, int64 ``(V, K)``."""
    ref = checkpoint.tensors[prefix + "ffn.gate.tid2eid"].weight
    table: IntArray = checkpoint.read_rows(ref, slice(0, ref.shape[0])).view(np.int64)
    return table


@dataclass(frozen=True)
class Table:
    """A replica's table beside the parent's.

    Attributes:
        after: The replica's rows, int64 ``(V', K')``.
        expected: The same with -1 in slots whose expert is gone.
        lost: In these slots the parent's expert, ``(V', K')``.
        cosines: Of each parent expert's gate row with each kept one's, ``(E, E')``.
    """

    after: IntArray
    expected: IntArray
    lost: IntArray
    cosines: NDArray[np.float64]

    def taken(self) -> NDArray[np.bool_]:
        """Which experts a row's survivors hold, bool ``(V', E')``."""
        taken = np.zeros((len(self.after), self.cosines.shape[1]), dtype=bool)
        rows, slots = np.nonzero(self.expected >= 0)
        taken[rows, self.expected[rows, slots]] = True
        return taken


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a replica's table.

    Attributes:
        wrong: Tokens with a wrong row, bool ``(V',)``.
        impossible: Tokens whose row names experts that there are not: no forward can run them.
        rules: The rules broken.
    """

    wrong: NDArray[np.bool_]
    impossible: NDArray[np.bool_]
    rules: tuple[Rule, ...]


def check_table(record: Record, kept: Kept, replica: Checkpoint, parent: Checkpoint) -> Verdict:
    """Hold every row of a hash layer's table against the parent's."""
    table = _table(kept, replica, parent)
    after, num_experts = table.after, len(kept.experts)
    experts = record.recipe.keep.experts
    policy = experts.hash_table if experts else "nearest"
    follows = {"nearest": _not_nearest, "balanced": _not_balanced, "keep-all": _replaced}[policy]
    ordered = np.sort(after, axis=1)
    impossible = np.asarray(((after < 0) | (after >= num_experts)).any(axis=1))
    faults = {
        "names experts that do not exist": impossible,
        "names an expert twice": (ordered[:, 1:] == ordered[:, :-1]).any(axis=1),
        "drops an expert that is there, or moves it": (
            (table.expected >= 0) & (table.expected != after)
        ).any(axis=1),
        f"does not follow the policy {policy}": follows(table),
    }
    wrong = np.zeros(len(after), dtype=bool)
    rules = []
    for what, rows in faults.items():
        rows = rows & ~wrong  # a row is named for the first rule that it breaks
        wrong |= rows
        if rows.any():
            what = f"the row of token {int(rows.argmax())} {what} ({int(rows.sum())} such rows)"
            rules.append(Rule(f"{kept.target}ffn.gate.tid2eid", what))
    return Verdict(wrong, impossible, tuple(rules))


def _table(kept: Kept, replica: Checkpoint, parent: Checkpoint) -> Table:
    before = read_table(parent, kept.source)[list(kept.tokens)]
    after = read_table(replica, kept.target)
    new_id = np.full(parent.config.n_routed_experts, -1, dtype=np.int64)
    new_id[list(kept.experts)] = np.arange(len(kept.experts))
    survivors = new_id[before]
    order = np.argsort(survivors < 0, axis=1, kind="stable")[:, : after.shape[1]]
    stored = parent.tensors[kept.source + "ffn.gate"]
    gate = parent.read_float(stored, slice(0, stored.weight.shape[0])).astype(np.float64)
    unit = gate / np.maximum(np.sqrt((gate**2).sum(axis=1, keepdims=True)), 1e-30)
    return Table(
        after,
        np.take_along_axis(survivors, order, axis=1),
        np.take_along_axis(before, order, axis=1),
        unit @ unit[list(kept.experts)].T,
    )


def _not_nearest(table: Table) -> NDArray[np.bool_]:
    """Rows where another free expert is more like the lost one than its stand-in."""
    wrong, taken = np.zeros(len(table.after), dtype=bool), table.taken()
    for slot in range(table.after.shape[1]):
        (rows,) = np.nonzero(table.expected[:, slot] < 0)
        stand_in = table.after[rows, slot].clip(0, taken.shape[1] - 1)
        similar = table.cosines[table.lost[rows, slot]]
        best = np.where(taken[rows], -np.inf, similar).max(axis=1, initial=-np.inf)
        wrong[rows] |= similar[np.arange(len(rows)), stand_in] < best - SAME_COSINE
        taken[rows, stand_in] = True
    return wrong


def _not_balanced(table: Table) -> NDArray[np.bool_]:
    """Rows whose stand-ins are not the next free ones, in turns over tokens and slots."""
    wrong, taken = np.zeros(len(table.after), dtype=bool), table.taken()
    width, num_experts = table.after.shape[1], taken.shape[1]
    for slot in range(width):
        (rows,) = np.nonzero(table.expected[:, slot] < 0)
        turn = (rows * width + slot) % num_experts
        while (busy := taken[rows, turn]).any():
            turn = np.where(busy, (turn + 1) % num_experts, turn)
        wrong[rows] |= table.after[rows, slot] != turn
        taken[rows, turn] = True
    return wrong


def _replaced(table: Table) -> NDArray[np.bool_]:
    return np.asarray((table.expected < 0).any(axis=1))
