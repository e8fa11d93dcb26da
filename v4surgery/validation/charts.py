"""Pictures of the report: small inline SVG that takes its colours from the page's style sheet.

Every picture is drawn for a width in CSS pixels rather than scaled to it, so that text has the same
size on every screen. Marks have a ``<title>`` with the exact numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, floor, isfinite, isnan, log10
from typing import NamedTuple

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 32, 42
CELL_HEIGHT = 20
MAX_DECADES = 6
# Under this many pixels a cell has no room for a number of 11 pixels.
LABELLED_CELL = 22


class Series(NamedTuple):
    """A line: its name, its class in the style sheet, and a value for each layer."""

    name: str
    style: str
    values: Sequence[float]


class Scale(NamedTuple):
    """Values to the share of an axis, 0 to 1: linear 0 to 1, or decades with 0 below them."""

    is_log: bool
    low: int = 0
    high: int = 1

    @classmethod
    def of(cls, values: Iterable[float], *, is_log: bool) -> Scale:
        if not is_log:
            return cls(False)
        logs = [log10(v) for v in values if isfinite(v) and v > 0]
        low = floor(min(logs, default=-1))
        return cls(True, low, max(ceil(max(logs, default=0)), low + 1))

    def share(self, value: float) -> float:
        """Where a value lies; 0 is at the foot of a scale of decades, a decade below the lowest."""
        if isnan(value):
            return 1.0
        if not self.is_log:
            return min(max(value, 0.0), 1.0)
        level = log10(value) - self.low if 0 < value < float("inf") else -1.0
        level = self.high - self.low if value == float("inf") else level
        return (max(level, -1.0) + 1) / (self.high - self.low + 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Shares and labels."""
        if not self.is_log:
            return [(i / 4, f"{i / 4:.2f}") for i in range(5)]
        step = ceil((self.high - self.low + 1) / MAX_DECADES)
        decades = range(self.low, self.high + 1, step)
        return [(0.0, "0 (equal)"), *((self.share(10.0**d), f"{10.0**d:g}") for d in decades)]


def line_chart(
    width: int,
    series: Sequence[Series],
    *,
    title: str,
    y_title: str,
    x_title: str,
    is_log: bool,
    limits: Mapping[str, float],
) -> Markup:
    """Lines over the replica's layers; ``limits`` are drawn across."""
    height = 300 if width > 500 else 270
    values = [v for line in series for v in line.values]
    scale = Scale.of([*values, *limits.values()], is_log=is_log)
    right, bottom = width - RIGHT, height - BOTTOM
    num_layers = len(series[0].values)

    def x_of(layer: int) -> float:
        inner = right - LEFT - 16
        return LEFT + 8 + (inner * layer / (num_layers - 1) if num_layers > 1 else inner / 2)

    def y_of(value: float) -> float:
        return bottom - (bottom - TOP) * scale.share(value)

    parts = [_text(0, 14, y_title, "label")]
    for share, label in scale.ticks():
        y = bottom - (bottom - TOP) * share
        parts.append(_line(LEFT, y, right, y, "grid"))
        parts.append(_text(LEFT - 6, y + 4, label, "tick end"))
    every = ceil(num_layers / max((right - LEFT) // 30, 1))
    parts += [
        _text(x_of(layer), bottom + 16, str(layer), "tick middle")
        for layer in range(0, num_layers, every)
    ]
    parts.append(_text((LEFT + right) / 2, height - 6, x_title, "label middle"))
    for name, limit in limits.items():
        parts.append(_line(LEFT, y_of(limit), right, y_of(limit), "limit", f"{name}: {limit:g}"))
    for line in series:
        parts += _curve(line, x_of, y_of)
    return _svg(width, height, f"{title}: {y_title} by {x_title}", parts)


def _curve(line: Series, x_of: Callable[[int], float], y_of: Callable[[float], float]) -> list[str]:
    points = [(x_of(i), y_of(v)) for i, v in enumerate(line.values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline class="line {line.style}" points="{path}"/>']
    for layer, ((x, y), value) in enumerate(zip(points, line.values, strict=True)):
        what = f"layer {layer}, {line.name}: {_number(value)}"
        style = line.style if isfinite(value) else "bad"
        parts.append(
            f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(what)}</title></circle>"
        )
    return parts


def heat_map(
    width: int,
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    *,
    title: str,
    scale: Scale,
) -> Markup:
    """A row for each layer, a column for each tap; the fill says how large the error is."""
    is_wide = width > 500
    head, left = (26, 84) if is_wide else (64, 62)
    step = (width - left - 2) / max(len(columns), 1)
    parts: list[str] = []
    for number, column in enumerate(columns):
        x = left + step * (number + 0.5)
        if is_wide:
            parts.append(_text(x, head - 8, column, "tick middle"))
        else:
            turned = f'transform="rotate(-50 {x:.1f} {head - 6})"'
            parts.append(_text(x, head - 6, column, "tick", turned))
    for index, (name, values) in enumerate(rows):
        y = head + index * CELL_HEIGHT
        parts.append(_text(left - 8, y + 14, name, "tick end"))
        for number, (column, value) in enumerate(zip(columns, values, strict=True)):
            x = left + step * number
            level = 0.0 if value == 0 else 0.06 + 0.7 * scale.share(value)
            style = "cell" if isfinite(value) else "cell bad"
            parts.append(
                f'<rect class="{style}" x="{x + 1:.1f}" y="{y + 1}" width="{step - 2:.1f}" '
                f'height="{CELL_HEIGHT - 2}" fill-opacity="{level:.2f}">'
                f"<title>{escape(f'{name}, {column}: {_number(value)}')}</title></rect>"
            )
            if is_wide:
                parts.append(_text(x + step / 2, y + 14, _number(value), "value middle"))
    return _svg(width, head + len(rows) * CELL_HEIGHT + 4, title, parts)


def heat_key(width: int, scale: Scale) -> Markup:
    """The legend of a heat map: fills and their errors."""
    ticks = scale.ticks()
    step = width / len(ticks)
    parts = []
    for number, (share, label) in enumerate(ticks):
        level = 0.0 if number == 0 else 0.06 + 0.7 * share
        parts.append(
            f'<rect class="cell" x="{step * number + 1:.1f}" y="1" width="{step - 2:.1f}" '
            f'height="12" fill-opacity="{level:.2f}"/>'
        )
        parts.append(_text(step * (number + 0.5), 28, label, "tick middle"))
    return _svg(width, 34, "fill by relative error", parts)


def assignment_chart(
    width: int,
    parent: Sequence[tuple[int, bool]],
    replica: Sequence[tuple[int, bool]],
    sources: Sequence[int],
) -> Markup:
    """Both models' layers as cells in a row, joined where one comes from the other."""
    height, top, foot = 168, 22, 122
    parts: list[str] = []
    steps = [width / max(len(cells), 1) for cells in (parent, replica)]
    # Cells of the shorter row are no wider than 1.5 times the other's: it stands in the middle.
    step_parent, step_replica = steps[0], min(steps[1], steps[0] * 1.5)
    begin = (width - step_replica * len(replica)) / 2
    for target, source in enumerate(sources):
        x0, x1 = step_parent * (source + 0.5), begin + step_replica * (target + 0.5)
        what = f"replica layer {target} from parent layer {source}"
        parts.append(_line(x0, top + 24, x1, foot, "join", what))
    parts += _cells(parent, 0.0, step_parent, top, set(sources), "parent", width)
    everything = set(range(len(replica)))
    parts += _cells(replica, begin, step_replica, foot, everything, "replica", width)
    parts.append(_text(0, 14, f"parent, {len(parent)} layers", "label"))
    parts.append(_text(0, height - 4, f"replica, {len(replica)} layers", "label"))
    return _svg(width, height, "which layer of the parent each layer comes from", parts)


def _cells(
    kinds: Sequence[tuple[int, bool]],
    begin: float,
    step: float,
    y: int,
    kept: set[int],
    who: str,
    width: int,
) -> list[str]:
    """One row; where cells are too narrow for their numbers, some of them."""
    parts = []
    every = max(ceil(LABELLED_CELL / step), 1)
    for number, (ratio, is_hash) in enumerate(kinds):
        x = begin + step * number
        style = kind_style(ratio) + (" hash" if is_hash else "")
        style += "" if number in kept else " dropped"
        routing = "hash" if is_hash else "score"
        what = f"{who} layer {number}: compress ratio {ratio}, routed by {routing}"
        parts.append(
            f'<rect class="layer {style}" x="{x + 0.75:.1f}" y="{y}" width="{step - 1.5:.1f}" '
            f'height="24"><title>{escape(what)}</title></rect>'
        )
        if number % every == 0 and x + step / 2 + LABELLED_CELL / 2 <= width + 1:
            parts.append(_text(x + step / 2, y + 16, str(number), "value middle"))
    return parts


def kind_style(ratio: int) -> str:
    """The class of a layer's compress ratio."""
    return f"ratio-{ratio}" if ratio in (0, 4, 128) else "ratio-other"


def _number(value: float) -> str:
    if value == 0 or isnan(value):
        return "0" if value == 0 else "NaN"
    return f"{value:.1e}" if value < 0.01 else f"{value:.3g}"


def _line(x0: float, y0: float, x1: float, y1: float, style: str, what: str = "") -> str:
    title = f"<title>{escape(what)}</title>" if what else ""
    points = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line class="{style}" {points}>{title}</line>'


def _text(x: float, y: float, text: str, style: str, more: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _svg(width: int, height: float, title: str, parts: Iterable[str]) -> Markup:
    return Markup(
        f'<svg width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )
