"""What a validation found, and the verdict that follows from it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch

from v4surgery.catalogue import Block
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.model.numerics import Numerics
from v4surgery.slicers.verify import Verification
from v4surgery.validation.behaviour import FREE, TAUGHT, Behaviour, LayerBehaviour
from v4surgery.validation.masked import MaskedReport
from v4surgery.validation.thresholds import Check, badness, error_of
from v4surgery.version import __version__

PASS, FAIL = "pass", "fail"
NUM_WORST = 3
# Taps whose error points at a sub-module, and that sub-module.
SUBMODULES: Mapping[str, str] = {
    "attn.hc": "hc_attn",
    "attn.in": "attn_norm",
    "attn.heads": "attn heads",
    "attn.out": "attn",
    "ffn.hc": "hc_ffn",
    "ffn.in": "ffn_norm",
    "ffn.out": "ffn",
}


class BrokenTensor(NamedTuple):
    """A tensor whose bytes are not the plan's: its block (or ``model``), and where inside it."""

    name: str
    layer: str
    submodule: str
    what: str


class WorstLayer(NamedTuple):
    """A layer with large errors: its own, teacher-forced, and what it has running freely."""

    layer: str
    source: str
    kind: str
    taught_error: float
    free_error: float
    submodule: str
    submodule_error: float


class Setting(NamedTuple):
    """What ran, and on what."""

    device: str
    device_name: str
    mode: str
    dtype: str
    implementation: str
    num_prompts: int
    num_tokens: int
    torch_version: str
    version: str

    @classmethod
    def of(
        cls, numerics: Numerics, device: torch.device | str, prompts: Sequence[Sequence[int]]
    ) -> Setting:
        where = torch.device(device)
        is_cuda = where.type == "cuda"
        return cls(
            str(where),
            torch.cuda.get_device_name(where) if is_cuda else platform.machine(),
            numerics.mode,
            str(numerics.dtype).removeprefix("torch."),
            numerics.ops.implementation,
            len(prompts),
            sum(map(len, prompts)),
            torch.__version__,
            __version__,
        )


@dataclass(frozen=True)
class Assignment:
    """Which layers of the parent a replica's trunk comes from.

    Attributes:
        parent: ``(compress ratio, is hash)`` of each layer of the parent.
        replica: The same of each layer of the replica.
        sources: Number of the parent's layer, for each of the replica's.
    """

    parent: tuple[tuple[int, bool], ...]
    replica: tuple[tuple[int, bool], ...]
    sources: tuple[int, ...]

    @classmethod
    def of(cls, replica: Checkpoint, parent: Checkpoint, record: Mapping[str, Any]) -> Assignment:
        sources = {item["target"]: item["source"] for item in record["selections"]["blocks"]}
        layers = [_trunk(checkpoint) for checkpoint in (parent, replica)]
        index = {block.prefix: block.index for block in layers[0]}
        kinds = [tuple((block.ratio, block.is_hash) for block in blocks) for blocks in layers]
        return cls(kinds[0], kinds[1], tuple(index[sources[block.prefix]] for block in layers[1]))

    def to_json(self) -> dict[str, Any]:
        return {
            "parent": [{"ratio": ratio, "hash": is_hash} for ratio, is_hash in self.parent],
            "replica": [
                {"ratio": ratio, "hash": is_hash, "source": source}
                for (ratio, is_hash), source in zip(self.replica, self.sources, strict=True)
            ],
        }


@dataclass(frozen=True)
class Validation:
    """All grades of a replica, and the verdict.

    Attributes:
        replica: Its name.
        parent: Its name.
        recipe: Its name.
        setting: What ran, and on what.
        verification: Grade one.
        broken: Tensors that grade one found wrong.
        masked: Grade two, where asked for.
        behaviour: Grade three; None where the models could not be run side by side.
        not_run: Why they could not.
        checks: The recipe's thresholds.
        numbers: What the report comes down to; see thresholds.MEANINGS.
        assignment: Which layers come from which.
        transforms: How many tensors came about in each way.
    """

    replica: str
    parent: str
    recipe: str
    setting: Setting
    verification: Verification
    broken: tuple[BrokenTensor, ...]
    masked: MaskedReport | None
    behaviour: Behaviour | None
    not_run: str | None
    checks: tuple[Check, ...]
    numbers: Mapping[str, float]
    assignment: Assignment
    transforms: Mapping[str, int]

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each, bytes first."""
        names = {tensor.name for tensor in self.broken}
        lines = [f"{t.layer}, {t.submodule}: {t.name}: {t.what}" for t in self.broken]
        lines += [p for p in self.verification.problems if p.partition(": ")[0] not in names]
        if self.masked is not None:
            lines += [f"masked parent: {failure}" for failure in self.masked.failures]
        if self.behaviour is not None:
            lines += _nonfinite(self.behaviour)
        lines += [
            f"{check.name} is {check.value:.4g}, and the recipe wants {check.rule}"
            for check in self.checks
            if not check.passed
        ]
        return tuple(lines)

    @property
    def verdict(self) -> str:
        """``pass`` or ``fail``."""
        return FAIL if self.failures or self.not_run else PASS

    @property
    def passed(self) -> bool:
        return self.verdict == PASS

    @property
    def grade(self) -> str:
        """What was checked."""
        bytes_ = "a sample of bytes" if self.verification.sampled else "bytes"
        has_function = self.masked is not None and self.masked.verdict != "not graded"
        done = [bytes_] + ["function"] * has_function
        if self.behaviour is not None:
            done.append("behaviour" if self.checks else "behaviour (reported: no thresholds)")
        return " and ".join(filter(None, (", ".join(done[:-1]), done[-1])))

    @property
    def worst_layers(self) -> tuple[WorstLayer, ...]:
        """The layers of largest teacher-forced error, worst first."""
        layers = self.behaviour.layers if self.behaviour else []
        worst = sorted(layers, key=lambda layer: -badness(error_of(layer, TAUGHT)))
        return tuple(map(_worst, worst[:NUM_WORST]))

    @property
    def summary(self) -> dict[str, float]:
        """The numbers that are numbers."""
        return {name: value for name, value in self.numbers.items() if isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN and infinite are null."""
        data = {
            "format": 1,
            "verdict": self.verdict,
            "grade": self.grade,
            "summary": self.summary,
            "failures": list(self.failures),
            "worst_layers": [layer._asdict() for layer in self.worst_layers],
            "checks": [check.to_json() for check in self.checks],
            "replica": self.replica,
            "parent": self.parent,
            "recipe": self.recipe,
            "setting": self.setting._asdict(),
            "verification": {
                "passed": self.verification.passed,
                "tensors": self.verification.tensors,
                "bytes_compared": self.verification.bytes_compared,
                "sampled": self.verification.sampled,
                "broken": [tensor._asdict() for tensor in self.broken],
            },
            "transforms": dict(self.transforms),
            "masked": self.masked.to_json() if self.masked else None,
            "behaviour": self.behaviour.to_json() if self.behaviour else None,
            "not_run": self.not_run,
            "assignment": self.assignment.to_json(),
        }
        return {name: finite(value) for name, value in data.items()}


def finite(data: Any) -> Any:
    """Plain data with null where a number is NaN or infinite, which JSON does not have."""
    if isinstance(data, float):
        return data if isfinite(data) else None
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data


def _trunk(checkpoint: Checkpoint) -> list[Block]:
    return [block for block in checkpoint.catalogue.blocks if not block.is_drafter]


def _worst(layer: LayerBehaviour) -> WorstLayer:
    errors = {tap: error_of(layer, TAUGHT, tap) for tap in SUBMODULES}
    tap = max(errors, key=lambda name: badness(errors[name]))
    return WorstLayer(
        layer.target.rstrip("."),
        layer.source.rstrip("."),
        layer.kind,
        error_of(layer, TAUGHT),
        error_of(layer, FREE),
        SUBMODULES[tap],
        errors[tap],
    )


def _nonfinite(behaviour: Behaviour) -> list[str]:
    """The first place of each way where an activation is NaN or infinite."""
    found = []
    for way in (TAUGHT, FREE):
        places = (
            f"{layer.target}{tap}"
            for layer in behaviour.layers
            for tap, close in layer.taps[way].items()
            if not isfinite(close.relative_error)
        )
        place = next(places, None)
        if place is not None:
            how = "teacher-forced" if way == TAUGHT else "running freely"
            found.append(f"{place}: the error is no number, {how}")
    return found
