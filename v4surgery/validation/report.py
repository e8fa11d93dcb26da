"""The report that people look at: one HTML file that needs nothing else, and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from math import nan
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from v4surgery.errors import OutputError
from v4surgery.redact import known_tokens, without_tokens
from v4surgery.slicers.edit import TRANSFORMS
from v4surgery.validation.behaviour import BLOCK_TAPS, FREE, TAUGHT, LayerBehaviour
from v4surgery.validation.charts import (
    Scale,
    Series,
    assignment_chart,
    heat_key,
    heat_map,
    kind_style,
    line_chart,
)
from v4surgery.validation.thresholds import MEANINGS, error_of
from v4surgery.validation.verdict import Validation

HTML_FILE, JSON_FILE = "report.html", "validation.json"
TEMPLATE_FILE = "report.html.jinja"
# Drawn twice, for a desk and for a telephone; the style sheet shows one.
WIDTHS = {"wide": 840, "narrow": 336}
WAYS = {FREE: "running freely", TAUGHT: "teacher-forced"}
Draw = Callable[[int], Markup]


def write_report(found: Validation, folder: Path) -> list[Path]:
    """Write ``report.html`` and ``validation.json``, over earlier ones; returns both paths.

    Raises:
        OutputError: They cannot be written.
    """
    text = json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
    contents = {HTML_FILE: render_report(found), JSON_FILE: text}
    known = known_tokens()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            part = folder / f"{name}.part"
            part.write_text(without_tokens(content, known), encoding="utf-8")
            os.replace(part, folder / name)  # noqa: PTH105 - atomic on every platform
    except OSError as error:
        raise OutputError(
            "the report cannot be written", where=folder, value=error, hint="name another --report"
        ) from error
    return [folder / name for name in contents]


def render_report(found: Validation) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["size"] = _size
    source = files("v4surgery.validation").joinpath(TEMPLATE_FILE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        found=found,
        meanings=MEANINGS,
        transforms=TRANSFORMS,
        limits={check.name: check for check in found.checks},
        pictures=_pictures(found),
        kinds=_kinds(found),
    )


def _pictures(found: Validation) -> dict[str, Markup]:
    """Each picture at both widths."""
    mapping = found.assignment
    draws: dict[str, Draw] = {
        "assignment": lambda width: assignment_chart(
            width, mapping.parent, mapping.replica, mapping.sources
        )
    }
    if found.behaviour is not None and found.behaviour.layers:
        draws |= _behaviour_draws(found, found.behaviour.layers)
    return {name: _both(draw) for name, draw in draws.items()}


def _behaviour_draws(found: Validation, layers: list[LayerBehaviour]) -> dict[str, Draw]:
    thresholds = {check.name: check.limit for check in found.checks}
    names = {"relative_error": "threshold, running freely", "taught_error": "threshold, taught"}
    scale = Scale.of(
        [error_of(layer, way, tap) for layer in layers for way in WAYS for tap in BLOCK_TAPS],
        is_log=True,
    )
    draws: dict[str, Draw] = {
        "depth": _lines(
            layers,
            lambda layer, way: error_of(layer, way),
            "error by depth",
            "relative error of a layer's output (no unit)",
            {names[name]: thresholds[name] for name in names if name in thresholds},
        ),
        "router": _lines(
            layers,
            lambda layer, way: layer.router[way].share,
            "router agreement",
            "share of the parent's choices (0 to 1)",
            {"threshold, taught": thresholds["router_agreement"]}
            if "router_agreement" in thresholds
            else {},
            is_log=False,
        ),
        "heat_key": lambda width: heat_key(min(width, 500), scale),
    }
    if any(layer.cka for layer in layers):
        draws["cka"] = _lines(
            layers,
            lambda layer, way: layer.cka.get(way, nan),
            "linear CKA",
            "linear CKA of a layer's output (0 to 1)",
            {},
            is_log=False,
        )
    for way in WAYS:
        draws[f"heat_{way}"] = _heat(layers, way, scale)
    return draws


def _lines(
    layers: list[LayerBehaviour],
    value: Callable[[LayerBehaviour, str], float],
    title: str,
    y_title: str,
    limits: Mapping[str, float],
    *,
    is_log: bool = True,
) -> Draw:
    series = [Series(WAYS[way], way, [value(layer, way) for layer in layers]) for way in WAYS]
    return lambda width: line_chart(
        width,
        series,
        title=title,
        y_title=y_title,
        x_title="layer of the replica",
        is_log=is_log,
        limits=limits,
    )


def _heat(layers: list[LayerBehaviour], way: str, scale: Scale) -> Draw:
    rows = [
        (
            f"{_index(layer.target)} ← {_index(layer.source)}",
            [error_of(layer, way, tap) for tap in BLOCK_TAPS],
        )
        for layer in layers
    ]
    return lambda width: heat_map(
        width, rows, BLOCK_TAPS, title=f"relative error, {WAYS[way]}", scale=scale
    )


def _both(draw: Draw) -> Markup:
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(name, draw(width))
        for name, width in WIDTHS.items()
    )


def _kinds(found: Validation) -> list[tuple[str, str]]:
    """Style and name of every kind of layer that is drawn."""
    mapping = found.assignment
    ratios = sorted({ratio for ratio, _ in (*mapping.parent, *mapping.replica)})
    named = {0: "no compression (ratio 0)"}
    kinds = [(kind_style(ratio), named.get(ratio, f"ratio {ratio}")) for ratio in ratios]
    if any(is_hash for _, is_hash in (*mapping.parent, *mapping.replica)):
        kinds.append(("ratio-0 hash", "outlined: routed by hash table"))
    return [*kinds, ("ratio-0 dropped", "faint: not in the replica")]


def _index(prefix: str) -> str:
    return prefix.rstrip(".").rpartition(".")[2]


def _number(value: Any) -> str:
    return "not a number" if value != value else f"{value:.4g}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
