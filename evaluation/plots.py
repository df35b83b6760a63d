"""
Plots of an evaluation as strings of SVG: the radar figure, intervals, precision-recall and calibration curves.

Like those of `evaluation.figures` they take their colours from classes of the page; `standalone` makes a file of one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .figures import nice_ticks


@dataclass(frozen=True)
class Axis:
    """A spoke of the radar: what it measures, and a second line under its name."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Series:
    """
    A line on the radar.

    Attributes:
        name: For the legend.
        values: One per axis; None where unknown.
        style: CSS class: "ours", "reference", or "other0" ... "other3".
        marker: "circle", "diamond", "square", "triangle" or "cross": systems differ by more than their colour.
    """

    name: str
    values: Sequence[float | None]
    style: str
    marker: str = "circle"


def _shape(marker: str, x: float, y: float, r: float, style: str, title: str) -> str:
    paths = {
        "diamond": f"M{x:.1f} {y - r * 1.3:.1f}l{r * 1.3:.1f} {r * 1.3:.1f}l{-r * 1.3:.1f} {r * 1.3:.1f}"
        f"l{-r * 1.3:.1f} {-r * 1.3:.1f}z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z",
        "triangle": f"M{x:.1f} {y - r * 1.2:.1f}l{r * 1.2:.1f} {r * 2.1:.1f}h{-r * 2.4:.1f}z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}",
    }
    title = f"<title>{escape(title)}</title>"
    if marker == "circle":
        return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">{title}</circle>'
    return f'<path class="mark {style}{" open" if marker == "cross" else ""}" d="{paths[marker]}">{title}</path>'


def radar(
    axes: Sequence[Axis],
    series: Sequence[Series],
    *,
    description: str,
    unit: str = "ratio",
    limit: float = 2.0,
    legend: bool = False,
) -> str:
    """
    A radar over `axes`, linear from the centre, in a 400 x 286 drawing.

    Args:
        axes: The first points up, the others follow clockwise.
        series: Drawn in this order. A line is interrupted at axes where it has no value; values outside of [0, limit]
            are drawn at the rim.
        description: Text for screen readers.
        unit: "ratio" (rings are labelled ×0.5, ×1.0 ...) or "percent" (the rim is 100 %).
        limit: Greatest value of a ratio that is drawn; the rim is nearer where no value needs it.
        legend: Write the legend into the drawing (in the page it stands beside it).
    """
    known = [value for line in series for value in line.values if value is not None]
    if unit == "percent":
        rim, rings = 1.0, [0.25, 0.5, 0.75, 1.0]
    else:
        ticks = nice_ticks(0, min(max([1.2, *known]), limit), 5)
        rim, rings = ticks[-1], ticks[1:]
    width, centre_x, centre_y, radius = 400, 200.0, 150.0, 104.0
    height = 286 + (24 * math.ceil(len(series) / 2) + 8 if legend else 0)

    def place(index: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * index / len(axes) - math.pi / 2
        distance = radius * min(max(value / rim, 0.0), 1.0)
        return centre_x + distance * math.cos(angle), centre_y + distance * math.sin(angle)

    parts = []
    for ring in rings:
        corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(i, ring) for i in range(len(axes))))
        parts.append(f'<path class="ring" d="M{corners}Z"/>')
    for index, axis in enumerate(axes):
        x, y = place(index, rim)
        parts.append(f'<path class="spoke" d="M{centre_x} {centre_y}L{x:.1f} {y:.1f}"/>')
        angle = 2 * math.pi * index / len(axes) - math.pi / 2
        x, y = centre_x + (radius + 11) * math.cos(angle), centre_y + (radius + 11) * math.sin(angle)
        anchor = "middle" if abs(math.cos(angle)) < 0.25 else ("start" if math.cos(angle) > 0 else "end")
        # two lines, above the point at the top and below it at the bottom
        y += 9 * math.sin(angle) - (9 if axis.detail else 1) + (6 if math.sin(angle) > 0 else 0)
        detail = f'<tspan class="detail" x="{x:.1f}" dy="15">{escape(axis.detail)}</tspan>' if axis.detail else ""
        parts.append(
            f'<text class="axisname" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(axis.name)}{detail}'
            "</text>"
        )
    for line in series:
        points = [None if value is None else place(i, value) for i, value in enumerate(line.values)]
        if all(point is not None for point in points):
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
            parts.append(f'<path class="radarline area {line.style}" d="{d}"/>')
        else:
            d = "".join(
                f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}"
                for a, b in zip(points, points[1:] + points[:1], strict=True)
                if a is not None and b is not None
            )
            if d:
                parts.append(f'<path class="radarline {line.style}" d="{d}"/>')
    # Labels of rings above the lines, between the last spoke and the first, and marks above all.
    half = -math.pi / len(axes) - math.pi / 2
    for ring in rings:
        reach = radius * ring / rim * math.cos(math.pi / len(axes))
        text = f"{100 * ring:.0f}" if unit == "percent" else f"×{ring:g}"
        parts.append(
            f'<text class="ringname" x="{centre_x + reach * math.cos(half):.1f}" '
            f'y="{centre_y + reach * math.sin(half) + 4:.1f}" text-anchor="middle">{text}</text>'
        )
    for line in series:
        for index, value in enumerate(line.values):
            if value is not None:
                shown = f"{100 * value:.1f} %" if unit == "percent" else f"×{value:.2f}"
                x, y = place(index, value)
                r = 4.0 if line.style == "ours" else 2.8
                parts.append(_shape(line.marker, x, y, r, line.style, f"{line.name}, {axes[index].name}: {shown}"))
    if legend:
        # in front of the others: last in the drawing, first in the legend
        for index, line in enumerate(reversed(series)):
            name = line.name if len(line.name) <= 22 else f"{line.name[:21]}…"
            x, y = 16 + 196 * (index % 2), 302 + 24 * (index // 2)
            parts.append(f'<path class="radarline {line.style}" d="M{x} {y}h26"/>')
            parts.append(_shape(line.marker, x + 13, y, 3.4, line.style, line.name))
            parts.append(f'<text class="axisname" x="{x + 34}" y="{y + 4}">{escape(name)}</text>')
    return (
        f'<svg class="radar" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def legend_mark(style: str, marker: str) -> str:
    """A short piece of a radar line for a legend in the page."""
    return (
        '<svg class="legendmark" viewBox="0 0 30 14" aria-hidden="true">'
        f'<path class="radarline {style}" d="M1 7h28"/>{_shape(marker, 15, 7, 3.6, style, "")}</svg>'
    ).replace("<title></title>", "")


def interval_strip(
    value: float | None, low: float | None, high: float | None, reference: float | None, description: str
) -> str:
    """
    A value with its interval on a line from 0 to 100 %; `reference` (a published number) is a triangle
    below it.

    Args:
        value, low, high, reference: Fractions, None where unknown.
        description: Text for screen readers.
    """

    def place(number: float) -> float:
        return 4 + 152 * min(max(number, 0.0), 1.0)

    parts = ['<path class="base" d="M4 9H156"/>']
    parts += [f'<path class="base" d="M{place(tick):.1f} 6v6"/>' for tick in (0, 0.25, 0.5, 0.75, 1)]
    if low is not None and high is not None:
        parts.append(f'<path class="span" d="M{place(low):.1f} 9H{place(high):.1f}"/>')
    if value is not None:
        parts.append(f'<circle class="dot" cx="{place(value):.1f}" cy="9" r="3.4"/>')
    if reference is not None:
        # below the line, so that neither hides the other
        parts.append(f'<path class="published" d="M{place(reference):.1f} 13.5l4.2 7.5h-8.4z"/>')
    return (
        f'<svg class="strip" viewBox="0 0 160 22" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )


def _axes(parts: list[str], left: float, top: float, side_x: float, side_y: float, x_label: str, y_label: str) -> None:
    """Frame, ticks and labels of a plot whose axes both run from 0 to 1."""
    bottom = top + side_y
    for tick in (0, 0.5, 1):
        x, y = left + side_x * tick, bottom - side_y * tick
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{side_x}M{x:.1f} {top}v{side_y}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text class="label" x="{left + side_x / 2:.1f}" y="{bottom + 29:.1f}" text-anchor="middle">{x_label}</text>'
    )
    middle = top + side_y / 2
    parts.append(
        f'<text class="label" transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">{y_label}</text>'
    )


def _pairs(xs: Sequence, ys: Sequence) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]


def _thinned(points: list[tuple[float, float]], most: int = 120) -> list[tuple[float, float]]:
    """At most so many of the points, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def precision_recall(curve: Mapping[str, Sequence[float | None]], description: str) -> str:
    """
    A small precision-recall plot, 150 x 140.

    Args:
        curve: {"recall": [...], "precision": [...]}, both in [0, 1]; pairs with None are left out.
        description: Text for screen readers.
    """
    left, top, side_x, side_y = 36.0, 8.0, 106.0, 94.0
    parts: list[str] = []
    _axes(parts, left, top, side_x, side_y, "recall", "precision")
    points = _thinned(_pairs(curve["recall"], curve["precision"]))
    if points:
        placed = [f"{left + side_x * x:.1f} {top + side_y * (1 - y):.1f}" for x, y in points]
        base = top + side_y
        first, last = (f"{left + side_x * points[index][0]:.1f} {base}" for index in (0, -1))
        area = "M" + "L".join([first, *placed, last]) + "Z"
        parts.append(f'<path class="fill" d="{area}"/><path class="line ours" d="M{"L".join(placed)}"/>')
    else:
        parts.append(f'<text x="{left + side_x / 2}" y="{top + side_y / 2 + 4}" text-anchor="middle">undefined</text>')
    return (
        f'<svg class="chart small" viewBox="0 0 150 140" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def precision_recall_grid(curves: Mapping[str, Mapping[str, Sequence[float | None]]], description: str) -> str:
    """
    Precision-recall plots of many classes in one drawing, four in a row.

    Args:
        curves: Class name -> see `precision_recall`.
        description: Text for screen readers.
    """
    columns, wide, high = min(4, max(1, len(curves))), 190, 188
    rows = math.ceil(len(curves) / columns)
    parts = []
    for index, (name, curve) in enumerate(curves.items()):
        x, y = 6 + wide * (index % columns), 6 + high * (index // columns)
        # room for about 28 letters
        shown = name if len(name) <= 28 else f"{name[:27]}…"
        drawing = precision_recall(curve, name).replace(
            "<svg ", f'<svg x="{x}" y="{y + 20}" width="172" height="160" '
        )
        parts.append(f'<text class="axisname" x="{x + 4}" y="{y + 14}" font-size="12">{escape(shown)}</text>{drawing}')
    return (
        f'<svg class="grid-of-charts" viewBox="0 0 {columns * wide + 12} {rows * high + 12}" role="img" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )


def calibration(curve: Mapping[str, Sequence[float | None]], description: str) -> str:
    """
    A reliability diagram, 260 x 290: accuracy against confidence, and below it how many predictions each bin has.

    Args:
        curve: {"confidence": [...], "accuracy": [...], "count": [...]} per bin (counts may be missing); bins with None
            are left out.
        description: Text for screen readers.
    """
    left, top, side = 40.0, 8.0, 206.0
    parts: list[str] = []
    counts = list(curve.get("count") or [])
    counts = counts if len(counts) == len(curve["confidence"]) else [None] * len(curve["confidence"])
    _axes(parts, left, top, side, 180.0, "confidence", "share that is right")
    parts.append(f'<path class="ideal" d="M{left} {top + 180}L{left + side} {top}"/>')
    bins = [
        (float(x), float(y), count)
        for x, y, count in zip(curve["confidence"], curve["accuracy"], counts, strict=True)
        if x is not None and y is not None
    ]
    placed = [(left + side * x, top + 180 * (1 - y), x, y, count) for x, y, count in sorted(bins, key=lambda b: b[0])]
    if placed:
        parts.append(f'<path class="line ours" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py, *_ in placed)}"/>')
    most = max((count for *_, count in placed if count), default=0)
    for px, py, x, y, count in placed:
        spoken = f"confidence {x:.2f}, right {y:.2f}" + ("" if count is None else f", {count:,} predictions")
        parts.append(_shape("circle", px, py, 3.4, "ours", spoken))
        if count and most:
            high = max(1.0, 32 * count / most)
            parts.append(
                f'<rect class="bar" x="{px - 4:.1f}" y="{264 - high:.1f}" width="8" height="{high:.1f}" rx="1.5">'
                f"<title>{escape(spoken)}</title></rect>"
            )
    if most:
        parts.append(f'<path class="axis" d="M{left} 264h{side}"/>')
        parts.append(
            f'<text class="label" x="{left + side / 2}" y="281" text-anchor="middle">predictions per bin '
            f"(highest: {most:,})</text>"
        )
    return (
        f'<svg class="chart calibration" viewBox="0 0 260 290" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def standalone(drawing: str, style: str) -> str:
    """
    An SVG file of a drawing made here.

    Args:
        drawing: `<svg ...>` with a viewBox.
        style: CSS that colours its classes.
    """
    start, rest = drawing.split(">", 1)
    width, height = start.split('viewBox="')[1].split('"')[0].split()[2:]
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'{start} xmlns="http://www.w3.org/2000/svg" width="{float(width) * 1.5:.0f}" '
        f'height="{float(height) * 1.5:.0f}"><style>{style}</style><rect width="100%" height="100%" class="paper"/>'
        f"{rest}\n"
    )


__all__ = [
    "Axis",
    "Series",
    "calibration",
    "interval_strip",
    "legend_mark",
    "precision_recall",
    "precision_recall_grid",
    "radar",
    "standalone",
]
