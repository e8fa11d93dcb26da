"""A table and a plot of fidelity.py's lines, beside them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

Line = dict[str, Any]
WAYS = (
    "random",
    "even",
    "norm",
    "gate",
    "frequency",
    "scores",
    "svd of weights",
    "svd",
    "pca of weights",
    "pca",
)
BEST = ("svd", "pca", "scores")
INTRODUCTION = """# What a cut costs, by how its units are chosen

KL divergence from the parent's predictions, in nats a token, on held-out text: the parent in the
box, python-14m, with one axis cut and everything else whole. `random` is the mean of five seeds,
with the least and the largest; `even`, `norm` and `gate` need no data; `scores` (the default score
of each axis, `reap` for experts), `frequency`, `svd` and `pca` were given activations on other
held-out documents ([scores.md](scores.md),
[methods.md](methods.md)). Nothing was trained after cutting. Weights are stored as float32, so that
only the cut is measured. The parent is small: what holds for it need not hold for V4-Flash.

Made by `python benchmarks/fidelity.py --device cuda --out docs/fidelity.jsonl` and
`python benchmarks/fidelity.py --render docs/fidelity.jsonl`.
"""


def render(path: Path) -> None:
    """Write ``<name>.md`` and ``<name>.svg`` beside a file of lines."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.with_suffix(".md").write_text(_page(lines, path.with_suffix(".svg").name))
    _plot(lines, path.with_suffix(".svg"))


def _grouped(lines: list[Line]) -> dict[str, dict[float, dict[str, list[Line]]]]:
    """Lines by axis, share and way."""
    groups: dict[str, dict[float, dict[str, list[Line]]]] = {}
    for line in lines:
        if line["axis"] != "parent" and "error" not in line:
            shares = groups.setdefault(line["axis"], {})
            shares.setdefault(line["share"], defaultdict(list))[line["way"]].append(line)
    return groups


def _page(lines: list[Line], picture: str) -> str:
    whole = next(line for line in lines if line["axis"] == "parent")
    parts = [
        INTRODUCTION,
        f"{whole['device']}, torch {whole['torch']}, {whole['date']}; {whole['tokens']:,} tokens, "
        f"on which the whole parent has a perplexity of {whole['perplexity']:.3f} "
        f"({whole['loss']:.4f} nats a token).\n",
        f"![KL by axis and share]({picture})\n",
    ]
    groups = _grouped(lines)
    axes = {axis: shares for axis, shares in groups.items() if set(shares) != {1.0}}
    parts += [*_table(axes, "kl"), "", "## Perplexity of the same", "", *_table(axes, "perplexity")]
    for name in groups.keys() - axes.keys():
        parts += ["", f"The built-in recipe `{name}`, every axis at once:", ""]
        parts += ["| way | KL | perplexity |", "|---|---|---|"]
        for way, found in groups[name][1.0].items():
            perplexity = mean(line["perplexity"] for line in found)
            parts.append(f"| {way} | {_cell(found, 'kl')} | {perplexity:.2f} |")
    failed = [line for line in lines if "error" in line]
    if failed:
        parts += ["", "Not possible:", ""]
        parts += [f"* {x['axis']}, {x['share']:.0%}, {x['way']}: {x['error']}" for x in failed]
    return "\n".join(parts) + "\n"


def _table(axes: dict[str, dict[float, dict[str, list[Line]]]], measure: str) -> list[str]:
    """A row for each axis and share, a column for each way that some axis has."""
    present = {way for shares in axes.values() for ways in shares.values() for way in ways}
    columns = [way for way in WAYS if way in present]
    rows = ["| axis | kept | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for axis, shares in axes.items():
        for share, ways in shares.items():
            cells = [_cell(ways.get(way, []), measure) for way in columns]
            rows.append(f"| {axis} | {share:.0%} | " + " | ".join(cells) + " |")
    return rows


def _cell(found: list[Line], measure: str) -> str:
    values = [line[measure] for line in found]
    if not values:
        return ""
    digits = ".3f" if measure == "kl" else ".4g"
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def _plot(lines: list[Line], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fidelity"
    from matplotlib import pyplot

    groups = {axis: s for axis, s in _grouped(lines).items() if set(s) != {1.0}}
    figure, plots = pyplot.subplots(2, -(-len(groups) // 2), figsize=(15, 6), layout="constrained")
    handles: dict[str, Any] = {}
    for plot, (axis, shares) in zip(plots.flat, groups.items(), strict=False):
        for number, way in enumerate(WAYS):
            points = [
                (share, [line["kl"] for line in ways[way]])
                for share, ways in shares.items()
                if way in ways
            ]
            if not points:
                continue
            at = [100 * share for share, _ in points]
            width = 2.4 if way in BEST else 1.2
            style = {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": width}
            (handles[way],) = plot.plot(at, [mean(v) for _, v in points], label=way, **style)
            if way == "random":
                low, high = ([f(v) for _, v in points] for f in (min, max))
                plot.fill_between(at, low, high, color=f"C{number}", alpha=0.2)
        plot.set(title=axis, yscale="log", xticks=[25, 50, 75], xlabel="% kept")
        plot.invert_xaxis()
    for plot in plots[:, 0]:
        plot.set_ylabel("KL, nats a token")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, metadata={"Date": None})
