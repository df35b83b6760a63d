"""Figures as strings of SVG: line charts, bullet bars, and radiographs with boxes. No plotting library, no JavaScript.

Colours are CSS classes defined by the page (`evaluation.html_report`), so figures follow its light or dark theme.
"""

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image


NUM_COLOURS = 8
NEUTRAL = "n"


def image_data_uri(image: np.ndarray | Image.Image, max_side: int = 768, lossy: bool = False) -> str:
    """An image as `data:` URI of a PNG, or of a much smaller JPEG; larger ones are reduced to `max_side` pixels.

    Args:
        image: PIL image, or (H, W) or (H, W, 3) array: uint8, or anything else, which is stretched to its own range.
        max_side: greatest side in pixels.
        lossy: JPEG instead of PNG.
    """
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            array = array.astype(np.float64)
            low, high = float(array.min()), float(array.max())
            array = ((array - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
        image = Image.fromarray(array)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB" if image.mode in ("RGBA", "P", "CMYK", "YCbCr") else "L")
    if max(image.size) > max_side:
        factor = max_side / max(image.size)
        size = tuple(max(1, round(side * factor)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, format="JPEG", quality=88, optimize=True)
    else:
        image.save(buffer, format="PNG", optimize=True)
    kind = "jpeg" if lossy else "png"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def png_data_uri(image: np.ndarray | Image.Image, max_side: int = 768) -> str:
    """See `image_data_uri`."""
    return image_data_uri(image, max_side)


def image_size(image: np.ndarray | Image.Image) -> tuple[int, int]:
    """(width, height) in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def radiograph(
    image: np.ndarray | Image.Image, boxes: Sequence[Mapping], description: str, lossy: bool = False
) -> str:
    """A radiograph with crisp boxes on top.

    Args:
        image: see `png_data_uri`.
        boxes: dicts with `box` (x0, y0, x1, y1) in pixels of `image`; optional: `colour` (index of the page's palette
            or "n" for neutral), `dashed`, `tag` (short text at the corner), `title` (shown on hover), `group` (a box
            of a group stays hidden until the page asks for it), `quiet` (thin and hidden until asked for).
        description: text for screen readers.
        lossy: embed a JPEG, for pages with many pictures.
    """
    width, height = image_size(image)
    # Tags scale with the drawing, the outlines do not.
    unit = max(width, height) / 100
    shapes = []
    tags = []
    # Occupied corners, so that the tags of boxes that share one do not hide each other.
    taken: list[tuple[float, float, float]] = []
    for item in boxes:
        x0, y0, x1, y1 = (float(value) for value in item["box"])
        x0, x1 = (min(max(value, 0.0), float(width)) for value in (x0, x1))
        y0, y1 = (min(max(value, 0.0), float(height)) for value in (y0, y1))
        if x1 <= x0 or y1 <= y0:
            continue
        classes = f"box c{item.get('colour', NEUTRAL)}" + (" dashed" if item.get("dashed") else "")
        group = f' data-group="{item["group"]}"' if "group" in item else ""
        quiet = " quiet" if item.get("quiet") else ""
        title = f"<title>{escape(str(item['title']))}</title>" if item.get("title") else ""
        shapes.append(
            f'<rect class="{classes}{quiet}"{group} x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" '
            f'height="{y1 - y0:.1f}" rx="{unit * 0.6:.1f}">{title}</rect>'
        )
        if item.get("tag"):
            text = str(item["tag"])
            tag_width = (1.6 + 2.3 * len(text)) * unit
            left = min(x0, width - tag_width)
            top = y0 - 4.6 * unit if y0 >= 4.8 * unit else y0 + 0.4 * unit
            while any(abs(left - a) < max(tag_width, w) and abs(top - b) < 4.4 * unit for a, b, w in taken):
                top += 4.6 * unit
            if not quiet:
                taken.append((left, top, tag_width))
            tags.append(
                f'<g class="tag c{item.get("colour", NEUTRAL)}{quiet}"{group}><rect x="{left:.1f}" y="{top:.1f}" '
                f'width="{tag_width:.1f}" height="{4.2 * unit:.1f}" rx="{unit:.1f}"/><text '
                f'x="{left + tag_width / 2:.1f}" y="{top + 3.2 * unit:.1f}" font-size="{3.4 * unit:.2f}" '
                f'text-anchor="middle">{escape(text)}</text></g>'
            )
    return (
        f'<svg class="film" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
        f'<image href="{image_data_uri(image, lossy=lossy)}" width="{width}" height="{height}"/>'
        f"{''.join(shapes)}{''.join(tags)}</svg>"
    )


def bullet(value: float | None, baseline: float | None, target: float | None, label: str) -> str:
    """A bar from 0 to 1 with a tick for the baseline (open) and one for the target (filled)."""
    parts = ['<rect class="track" x="0" y="14" width="300" height="12" rx="6"/>']
    if value is not None:
        parts.append(
            f'<rect class="value" x="0" y="14" width="{300 * min(max(value, 0.02), 1):.1f}" height="12" rx="6"/>'
        )
    if baseline is not None:
        x = 300 * min(max(baseline, 0), 1)
        parts.append(f'<path class="baseline" d="M{x:.1f} 9V31"/>')
    if target is not None:
        x = 300 * min(max(target, 0), 1)
        parts.append(f'<path class="target" d="M{x:.1f} 13l-5 -9h10z"/>')
    return f'<svg class="bullet" viewBox="-6 0 312 34" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average whose window shrinks towards both ends, so the curve keeps its length."""
    array = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(array)])
    result = []
    for index in range(len(array)):
        half = min(window // 2, index, len(array) - 1 - index)
        result.append(float((sums[index + half + 1] - sums[index - half]) / (2 * half + 1)))
    return result


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(count - 1, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """A short tick label: 12k instead of 12000, 0.25 instead of 0.250."""
    if value and abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    description: str,
    points: Collection[str] = (),
    smoothed: Collection[str] = (),
    unit_interval: bool = False,
    colours: Mapping[str, int] | None = None,
) -> str:
    """A line chart in a 360 x 225 drawing; the legend belongs to the page.

    Args:
        series: name -> (x, y) pairs; values that are not finite are left out.
        x_label, y_label: axis titles.
        description: text for screen readers.
        points: names of series whose values are marked one by one.
        smoothed: names of series drawn as moving average (over 1/20 of their length) above the faint raw curve.
        unit_interval: let the vertical axis run from 0 to 1 at most.
        colours: name -> palette index; left out: in order.

    The vertical axis is logarithmic where positive values span more than a factor of 40.
    """
    left, right, top, bottom, width, height = 50, 18, 10, 44, 360, 225
    clean = {name: [(float(x), float(y)) for x, y in values if np.isfinite(y)] for name, values in series.items()}
    clean = {name: values for name, values in clean.items() if values}
    if not clean:
        return '<p class="muted">No values were recorded.</p>'
    curves = {name: [y for _, y in values] for name, values in clean.items()}
    curves |= {name: smooth(curves[name], len(curves[name]) // 20) for name in clean if name in smoothed}
    every_x = [x for values in clean.values() for x, _ in values]
    every_y = [y for values in curves.values() for y in values]
    logarithmic = min(every_y) > 0 and max(every_y) / min(every_y) > 40 and not unit_interval
    if logarithmic:
        decades = range(math.floor(math.log10(min(every_y))), math.ceil(math.log10(max(every_y))) + 1)
        y_ticks = [10.0**decade for decade in decades]
    else:
        y_ticks = nice_ticks(min(0.0, min(every_y)), max(every_y), 5)
    x_ticks = nice_ticks(min(0.0, min(every_x)), max(every_x), 5)
    x_low, x_high = x_ticks[0], max(max(every_x), x_ticks[-2] if len(x_ticks) > 1 else x_ticks[-1])
    x_ticks = [tick for tick in x_ticks if tick <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]
    if unit_interval:
        y_high = min(1.0, y_high)
    elif not logarithmic:
        y_high = min(y_high, y_low + 1.05 * (max(every_y) - y_low)) if max(every_y) > y_low else y_high
    y_ticks = [tick for tick in y_ticks if tick <= y_high * (1 + 1e-9)]

    def place_x(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (width - left - right)

    def place_y(y: float) -> float:
        if logarithmic:
            y, low, high = (math.log10(max(v, y_low)) for v in (y, y_low, y_high))
        else:
            low, high = y_low, y_high
        share = min(max((y - low) / ((high - low) or 1), -0.02), 1.02)
        return height - bottom - share * (height - top - bottom)

    parts = []
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<path class="tick" d="M{x:.1f} {height - bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{format_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{left} {height - bottom}H{width - right}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    shown_label = f"{y_label} (log)" if logarithmic else y_label
    parts.append(
        f'<text class="label" transform="translate(13 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(shown_label)}</text>'
    )
    for index, (name, values) in enumerate(clean.items()):
        colour = (colours or {}).get(name, index) % NUM_COLOURS

        def path(heights: Sequence[float], values=values) -> str:
            corners = (f"{place_x(x):.1f} {place_y(y):.1f}" for (x, _), y in zip(values, heights, strict=True))
            return "M" + "L".join(corners)

        if name in smoothed:
            parts.append(f'<path class="line raw s{colour}" d="{path([y for _, y in values])}"/>')
        parts.append(f'<path class="line s{colour}" d="{path(curves[name])}"><title>{escape(name)}</title></path>')
        if name in points:
            for x, y in values:
                parts.append(
                    f'<circle class="s{colour}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.2">'
                    f"<title>{escape(name)}: {y:.3f} at {format_number(x)}</title></circle>"
                )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def horizontal_bars(values: Mapping[str, float], unit: str, description: str) -> str:
    """Labelled bars, one row per entry, scaled to the largest value."""
    highest = max(values.values(), default=0.0) or 1.0
    rows = []
    for index, (name, value) in enumerate(values.items()):
        y = index * 30
        rows.append(
            f'<text x="0" y="{y + 19}">{escape(name)}</text>'
            f'<rect class="bar" x="190" y="{y + 7}" width="{max(2.0, 190 * value / highest):.1f}" height="16" rx="4"/>'
            f'<text class="number" x="{196 + max(2.0, 190 * value / highest):.1f}" y="{y + 19}">'
            f"{escape(format_duration(value) if unit == 's' else format_number(value) + unit)}</text>"
        )
    return (
        f'<svg class="bars" viewBox="0 0 460 {max(30, 30 * len(values))}" role="img" '
        f'aria-label="{escape(description)}">{"".join(rows)}</svg>'
    )


def format_duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
