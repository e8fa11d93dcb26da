"""How much of the parent in the box survives each cut, by how its units were chosen.

    python benchmarks/fidelity.py --device cuda --out docs/fidelity.jsonl
    python benchmarks/fidelity.py --render docs/fidelity.jsonl   # docs/fidelity.md and .svg

Held-out documents are dealt in turn: those of even number are scored on, those of odd number are
measured on. Each case cuts one axis (or all of them, in a built-in shape) of python-14m, runs
parent and replica over the same windows in mode exact and float32, and prints one JSON line:
perplexity of the held-out text, and the mean KL divergence from the parent's predictions, in nats
a token. Weights are stored as float32 where nothing else is said, so that only the cut is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F

import v4surgery
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.parents import HELD_OUT_FILE, parent_folder
from v4surgery.recipes import load_recipe
from v4surgery.text.prompts import PromptEncoder, read_prompts
from v4surgery.text.tokenizer import read_tokenizer
from v4surgery.version import __version__

PARENT = "python-14m"
WINDOW = 512
ROWS = 16
SHARES = (0.75, 0.5, 0.25)
SEEDS = range(5)


@dataclass(frozen=True)
class Axis:
    """An axis to cut: key path below ``keep``, units of the parent, further ways to choose."""

    name: str
    path: tuple[str, ...]
    units: int
    ways: tuple[str, ...] = ()
    method: str | None = None


AXES = (
    Axis("layers", ("layers", "count"), 10),
    Axis("experts", ("experts", "keep"), 16, ("gate", "frequency")),
    Axis("neurons", ("moe_intermediate_size", "keep"), 128),
    Axis("groups of heads", ("heads", "groups", "keep"), 4),
    Axis("heads of a group", ("heads", "per_group", "keep"), 2),
    Axis("hidden channels", ("hidden_size", "keep"), 128, method="pca"),
    Axis("q_lora ranks", ("q_lora_rank", "keep"), 128, method="pca"),
    Axis("o_lora ranks", ("o_lora_rank", "keep"), 32, method="svd"),
    Axis("nope dims", ("head_dim", "nope", "keep"), 64),
    Axis("index heads", ("indexer", "heads", "keep"), 4),
)
SHAPES = ("python-8m",)
"""Built-in recipes of the parent in the box."""


@dataclass(frozen=True)
class Case:
    """One replica: what it keeps of which axis, and how that was chosen."""

    axis: str
    share: float
    way: str
    seed: int | None
    recipe: str


def cases(scores: str) -> Iterator[Case]:
    """Every case, as recipes in YAML."""
    for axis in AXES:
        for share in SHARES:
            keep = round(axis.units * share)
            if keep < 1 or keep == axis.units:
                continue
            for way in ("random", "even", "norm", *axis.ways, "scores"):
                for seed in SEEDS if way == "random" else (None,):
                    choice = {axis.path[-1]: keep, "by": way}
                    yield _case(axis, share, way, seed, choice, scores)
            if axis.method is not None:
                yield _case(
                    axis, share, axis.method, None, {"keep": keep, "method": axis.method}, scores
                )
                yield _case(
                    axis, share, f"{axis.method} of weights", None,
                    {"keep": keep, "method": axis.method}, None,
                )  # fmt: skip
    for name in SHAPES:
        recipe = load_recipe(name)
        data = json.loads(recipe.model_dump_json(exclude_unset=True, exclude_none=True))
        for way in ("random", "even", "norm", "scores"):
            for seed in SEEDS if way == "random" else (None,):
                changed = {**data, "keep": chosen_by(data["keep"], way), "seed": seed or 0}
                changed |= {"scores": scores, "store": {"dtype": "f32"}}
                yield Case(name, 1.0, way, seed, yaml.safe_dump(changed))
        as_shipped = {**data, "scores": scores, "store": {"dtype": "f32"}}
        yield Case(name, 1.0, "as shipped", None, yaml.safe_dump(as_shipped))


def _case(
    axis: Axis, share: float, way: str, seed: int | None, choice: object, scores: str | None
) -> Case:
    for key in reversed(axis.path[:-1]):
        choice = {key: choice}
    data = {"name": "case", "keep": choice, "seed": seed or 0, "store": {"dtype": "f32"}}
    if scores is not None:
        data["scores"] = scores
    if axis.name == "hidden channels" and way.startswith("pca"):
        data["keep"]["mtp"] = "drop"  # its norm cannot be absorbed in the shared head
    return Case(axis.name, share, way, seed, yaml.safe_dump(data))


def chosen_by(keep: object, way: str) -> object:
    """Every choice of a recipe's ``keep`` made by one way, and no method."""
    if not isinstance(keep, dict):
        return keep
    changed = {key: chosen_by(value, way) for key, value in keep.items()}
    if changed.pop("method", None) or "by" in changed:
        changed["by"] = way
    return changed


class Judge:
    """Runs models over the same windows of held-out text."""

    def __init__(self, parent: Checkpoint, device: str, tokens: int) -> None:
        self.parent, self.device = parent, device
        ids = held_out_ids(parent, measured=True)[:tokens]
        self.windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        self.expected = list(self.logits(parent))

    @torch.no_grad()
    def logits(self, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
        """Log probabilities, float32 ``(rows, WINDOW, V)``."""
        model = load_model(checkpoint, Numerics(), device=self.device, trainable=True)
        for rows in self.windows.split(ROWS):
            yield model(rows.to(self.device)).log_softmax(-1)

    def measure(self, checkpoint: Checkpoint) -> dict[str, float]:
        loss, divergence, same, count = 0.0, 0.0, 0.0, 0
        pairs = zip(self.windows.split(ROWS), self.logits(checkpoint), self.expected, strict=True)
        for rows, actual, expected in pairs:
            targets = rows[:, 1:].to(self.device)
            loss += F.nll_loss(
                actual[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
            kl = (expected.exp() * (expected - actual)).sum(-1)
            divergence += kl[:, :-1].double().sum().item()
            same += (actual.argmax(-1) == expected.argmax(-1))[:, :-1].sum().item()
            count += targets.numel()
        return {
            "loss": loss / count,
            "perplexity": float(torch.tensor(loss / count).exp()),
            "kl": divergence / count,
            "top1": same / count,
            "tokens": count,
        }


def held_out_ids(parent: Checkpoint, *, measured: bool) -> list[int]:
    """Documents of odd number (measured) or of even number, each ended by EOS."""
    folder = parent_folder(PARENT)
    assert folder is not None
    prompts = read_prompts(folder / HELD_OUT_FILE)[1 if measured else 0 :: 2]
    encoder = PromptEncoder(parent.config, read_tokenizer(parent))
    end = parent.config.eos_token_id
    return [i for prompt in encoder.encode_all(prompts) for i in (*prompt.ids, end)]


def write_scores(parent: Checkpoint, out: Path, device: str, tokens: int) -> None:
    """Scores on the documents that are not measured on."""
    ids = held_out_ids(parent, measured=False)[:tokens]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    moments = ("hidden_size", "q_lora_rank", "o_lora_rank")
    v4surgery.score(parent, windows, out, second_moments=moments, device=device)


_judge: Judge | None = None


def _prepare(device: str, tokens: int) -> None:
    global _judge
    torch.set_num_threads(1)
    _judge = Judge(v4surgery.open(PARENT), device, tokens)


def _run(case: Case) -> dict[str, object]:
    assert _judge is not None
    began = time.perf_counter()
    result: dict[str, object] = {k: v for k, v in asdict(case).items() if k != "recipe"}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(case.recipe)
        try:
            plan = v4surgery.plan(_judge.parent, str(recipe))
            replica = v4surgery.slice(plan, Path(folder) / "replica", workers=1, device="cpu")
        except v4surgery.V4SurgeryError as error:
            return {**result, "error": str(error).splitlines()[0]}
        with v4surgery.open(replica.path) as checkpoint:
            result |= _judge.measure(checkpoint)
            result["parameters"] = checkpoint.catalogue.num_parameters(drafters=False)
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 2, 12))
    parser.add_argument("--tokens", type=int, default=1 << 20, help="at most, of each half")
    parser.add_argument("--axis", action="append", help="only these")
    parser.add_argument("--way", action="append", help="only these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-scores", type=Path, help="only score the parent, into this file")
    parser.add_argument("--render", type=Path, help="make a table and a plot of a file of lines")
    options = parser.parse_args()
    if options.render:
        from fidelity_report import render

        render(options.render)
        return
    if options.write_scores:
        with v4surgery.open(PARENT) as parent:
            write_scores(parent, options.write_scores, options.device, options.tokens)
        return
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    about = {
        "device": device_name,
        "torch": torch.__version__,
        "v4surgery": __version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    lines = options.out.open("w") if options.out else None
    with tempfile.TemporaryDirectory() as folder, v4surgery.open(PARENT) as parent:
        scores = Path(folder) / "scores.safetensors"
        write_scores(parent, scores, options.device, options.tokens)
        wanted = [
            case
            for case in cases(str(scores))
            if (not options.axis or case.axis in options.axis)
            and (not options.way or case.way in options.way)
        ]
        context = multiprocessing.get_context("spawn")
        arguments = (options.device, options.tokens)
        with context.Pool(options.processes, _prepare, arguments) as pool:
            _prepare(*arguments)
            assert _judge is not None
            first = {"axis": "parent", "share": 1.0, "way": "whole", "seed": None}
            results: Iterator[dict[str, object]] = iter(
                [{**first, **_judge.measure(parent)}, *pool.imap(_run, wanted)]
            )
            for result in results:
                line = json.dumps({**result, **about})
                print(line, flush=True)
                if lines is not None:
                    lines.write(line + "\n")
    if lines is not None:
        lines.close()


if __name__ == "__main__":
    main()
