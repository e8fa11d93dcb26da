"""The replica and the masked parent, block by block, compared at every tap.

The replica runs as it always does, streamed, and its taps are kept for one block at a time. Each
masked block is fed what the replica feeds the block that was cut from it: an equal embedding, equal
blocks and an equal head make equal models, and rounding does not add up over the layers. Inside a
block the masked parent goes on with its own values; where a tap differs or cannot be graded it goes
on with the replica's, so that a mistake is named where it is made and hides nothing behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer, StreamOptions
from v4surgery.text.prompts import check_ids
from v4surgery.validation.masked.block import MaskedBlock
from v4surgery.validation.masked.drafter import grade_drafter, load_drafter, run_drafter
from v4surgery.validation.masked.ends import MaskedEnds
from v4surgery.validation.masked.grading import Grades, Settler
from v4surgery.validation.masked.hash_tables import Verdict, check_table
from v4surgery.validation.masked.idle import IDLE_TAP, grade_idle_experts
from v4surgery.validation.masked.limits import limits_of, mixed_axes, ungraded_taps
from v4surgery.validation.masked.observe import Observer
from v4surgery.validation.masked.record import Kept, read_record
from v4surgery.validation.masked.report import MaskedReport, Rule
from v4surgery.validation.masked.rules import broken_rules, size_rules
from v4surgery.validation.masked.walk import walk

# float32 rounds by 2^-24 = 6e-8. Both sides add the same numbers in another order: a sum of K
# terms is off by about log2(K) roundings, 7e-7 at K = 4096, and the longest way inside a block
# (wq_a, wq_b, head norm, scores, read, wo_a, wo_b, ...) has about ten such sums, whose errors are
# independent: 2e-6, which is also the largest that was measured, both on 600 random recipes of a
# tiny parent and on mini3b cut from Flash's widths. Five times that is allowed.
TOLERANCE = 1e-5


def check_masked(
    replica: Checkpoint,
    parent: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    tolerance: float = TOLERANCE,
    options: StreamOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> MaskedReport:
    """Grade two of faithfulness: is the replica its parent with the removed units masked out?

    Neither model is held in memory: both pass block by block, the parent's experts one at a time.

    Args:
        replica: What to check.
        parent: What it was cut from.
        prompts: Token ids of the replica's vocabulary: a few hundred, so that windows fill.
        device: Where both compute, in float32.
        tolerance: Largest relative error of a token that counts as rounding.
        options: Budgets of the replica's run.
        progress: Called with each block's prefix when it has been graded.

    Raises:
        CheckpointError: The replica has no record, or one that cannot be.
        UsageError: The parent is another one, or the prompts cannot be run.
    """
    if not prompts:
        raise UsageError("no prompts", rule="at least one")
    for number, ids in enumerate(prompts):
        check_ids(ids, replica.config, f"prompt {number}")
    check = _Check(replica, parent, prompts, torch.device(device), tolerance)
    if check.is_gradable:
        check.run(options, progress)
    return check.report()


class _Check:
    """One check: what the replica computes comes in, grades and broken rules come out."""

    def __init__(
        self,
        replica: Checkpoint,
        parent: Checkpoint,
        prompts: Sequence[Sequence[int]],
        device: torch.device,
        tolerance: float,
    ) -> None:
        self.replica, self.parent, self.device = replica, parent, device
        self.ids = [torch.tensor(list(ids), device=device) for ids in prompts]
        self.record = read_record(replica, parent)
        self.kept = {block.target: block for block in self.record.blocks}
        self.grades = Grades(tolerance)
        self.limits = list(limits_of(self.record, replica, parent, prompts))
        self.rules: list[Rule] = []
        self.tables: dict[str, Verdict] = {}
        is_cut = self.record.recipe.init == "parent" and not mixed_axes(self.record)
        self.is_gradable = is_cut and self._keeps_rules()
        self.numerics = Numerics("exact", torch.float32, Ops("reference"))
        self.ends = MaskedEnds(replica, parent, self.record, device)
        self.observer = Observer(replica.config)
        self.last: list[Tensor] = []

    @torch.no_grad()
    def run(self, options: StreamOptions | None, progress: Callable[[str], None] | None) -> None:
        """The replica's forward; each block is graded when it has run."""

        def grade(prefix: str) -> None:
            self.grade_layer(prefix)
            if progress is not None:
                progress(prefix)

        self.ends.grade_embedding(self.grades)
        with Streamer(self.replica, self.numerics, self.device, options) as streamer:
            logits = streamer.run(
                [ids.tolist() for ids in self.ids],
                observe=self.observer,
                logits="all",
                progress=lambda timing: grade(timing.prefix),
            )
        self.ends.grade_logits(self.last, logits, self.grades)
        for kept in self.record.blocks:
            if kept.target.startswith("mtp.") and not self.replica.config.is_dspark:
                self.grade_drafter(kept)

    def grade_layer(self, prefix: str) -> None:
        """Grade a layer from what was recorded of it, and forget that."""
        taps = [self.observer.take(i, prefix) for i in range(len(self.ids))]
        if not self.last:
            for i, ids in enumerate(self.ids):
                self.ends.grade_start(ids, taps[i]["in"], self.grades, prefix, i)
        self.last = [tap["out"] for tap in taps]
        kept = self.kept[prefix]
        if not self._is_impossible(prefix):
            block = MaskedBlock(self.replica, self.parent, self.record, kept, self.device)
            inputs = [block.places.streams.placed(tap["in"]) for tap in taps]
            settlers = self._settlers(kept, taps)
            _, used = walk(block, settlers, inputs, self._wrong_tokens(block))
            self._grade_idle(block, used, taps[0]["ffn.in"])

    def grade_drafter(self, kept: Kept) -> None:
        """Run a classic drafter of the replica on the trunk's streams, and grade it."""
        numbers = [i for i, ids in enumerate(self.ids) if len(ids) > 1]
        if not numbers or self._is_impossible(kept.target):
            return
        drafter = load_drafter(self.replica, kept.target, self.numerics, self.device)
        drafts = {}
        for i in numbers:
            detach = self.observer(drafter, kept.target, i)
            own = self.observer.seen[f"{i}/embed"][0]
            drafts[i] = run_drafter(drafter, self.last[i], own, self.ids[i])
            detach()
        block = MaskedBlock(self.replica, self.parent, self.record, kept, self.device)
        settlers = self._settlers(
            kept,
            [{**self.observer.take(i, kept.target), "draft": drafts[i]} for i in numbers],
            numbers,
        )
        device = self.device
        streams = [block.places.streams.placed(self.last[i].to(device)) for i in numbers]
        embedded = [self.ends.embed(self.ids[i]).to(device) for i in numbers]
        used = grade_drafter(block, settlers, streams, embedded)
        self._grade_idle(block, used, settlers[0].theirs["ffn.in"])

    def report(self) -> MaskedReport:
        """Everything found so far."""
        return MaskedReport(
            replica=self.replica.name,
            parent=self.parent.name,
            device=str(self.device),
            implementation=self.numerics.ops.implementation,
            tolerance=self.grades.tolerance,
            num_tokens=sum(map(len, self.ids)),
            taps=tuple(self.grades.taps.values()),
            broken_rules=tuple(self.rules),
            not_graded=tuple(self.limits),
        )

    def _settlers(
        self, kept: Kept, taps: Sequence[dict[str, Tensor]], numbers: Sequence[int] | None = None
    ) -> list[Settler]:
        ungraded = frozenset(ungraded_taps(self.record, kept))
        numbers = range(len(taps)) if numbers is None else numbers
        return [
            Settler(self.grades, kept.target, number, theirs, ungraded)
            for number, theirs in zip(numbers, taps, strict=True)
        ]

    def _is_impossible(self, prefix: str) -> bool:
        """Whether a block cannot come from its source: there is nothing to compare it with."""
        return any(rule.place == prefix for rule in self.rules)

    def _keeps_rules(self) -> bool:
        """Note every broken rule; whether the replica can be run and compared all the same.

        Activations of other sizes than the record's have no coordinates in the parent, and a token
        whose experts there are not cannot be run.
        """
        sizes = size_rules(self.record, self.replica.config)
        self.rules = sizes + broken_rules(self.record, self.replica.config, self.parent.config)
        if sizes:
            return False
        for kept in self.record.blocks:
            name = "ffn.gate.tid2eid"
            if kept.target + name in self.replica.tensors and (
                kept.source + name in self.parent.tensors
            ):
                table = check_table(self.record, kept, self.replica, self.parent)
                self.tables[kept.target] = table
                self.rules += table.rules
        ids = torch.cat(self.ids).cpu().numpy()
        return not any(table.impossible[ids].any() for table in self.tables.values())

    def _wrong_tokens(self, block: MaskedBlock) -> list[Tensor | None]:
        if not block.own.is_hash:
            return [None] * len(self.ids)
        wrong = torch.from_numpy(self.tables[block.kept.target].wrong).to(self.device)
        return [wrong[ids] for ids in self.ids]

    def _grade_idle(self, block: MaskedBlock, used: set[int], x: Tensor) -> None:
        graded = IDLE_TAP not in ungraded_taps(self.record, block.kept)
        grade_idle_experts(block, self.replica, used, x, self.grades, graded=graded)
