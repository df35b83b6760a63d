"""Draw an explanation: the radiograph with boxes, and the answers beside it."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_chex.pipeline_chex import Answer, Explanation
from processing_chex import ChexInputError, load_image


# Bright hues that stay apart on grey (after Okabe and Ito), one for each query.
COLORS = ("#56b4e9", "#e69f00", "#2fd6a0", "#f0e442", "#ff7f6e", "#cc9be6", "#9be15d", "#ff9ecb")
BACKGROUND, TEXT, MUTED = "#14171c", "#f2f4f7", "#98a2b3"
LONG_SIDE, PANEL_WIDTH, MARGIN = 880, 470, 24
DISCLAIMER = "Research use only. Not a medical device."


def check_figure_path(path: Path | None, count: int) -> list[Path]:
    """The files to write for `count` images: `path` itself for one, else with the number of the image in its name."""
    if path is None:
        return []
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ChexInputError(f"--figure {path} has the ending '{path.suffix}': figures are written as .png or .jpg.")
    if not path.parent.is_dir():
        raise ChexInputError(f"--figure {path} cannot be written: the folder {path.parent} does not exist.")
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def save_figure(image: Any, explanation: Explanation, path: Path) -> None:
    """Draw an explanation of `image` (anything that `load_image` reads) and write it."""
    figure = draw_figure(load_image(image), explanation)
    try:
        figure.save(path)
    except OSError as error:
        raise ChexInputError(f"--figure {path} cannot be written ({error}): choose another place.") from error


def draw_figure(grey: np.ndarray, explanation: Explanation) -> Image.Image:
    """Radiograph with the regions of each query in its own colour; a panel lists queries, scores and sentences.

    Args:
        grey: (height, width) in [0, 1], at the size that the boxes refer to.
        explanation: what to draw.

    Returns:
        RGB image. Its size depends on the shape of the radiograph and the number of answers, not on the resolution.
    """
    picture, scale = _fit(grey)
    panel = _Panel(explanation)
    height = max(picture.height, panel.height)
    figure = Image.new("RGB", (picture.width + PANEL_WIDTH + 3 * MARGIN, height + 2 * MARGIN), BACKGROUND)
    _draw_boxes(picture, scale, explanation)
    figure.paste(picture, (MARGIN, MARGIN + (height - picture.height) // 2))
    panel.draw(ImageDraw.Draw(figure), picture.width + 2 * MARGIN, MARGIN)
    return figure


def _fit(grey: np.ndarray) -> tuple[Image.Image, float]:
    """Scale so that the long side has a fixed length; returns the picture and original-to-figure scale."""
    height, width = grey.shape
    scale = LONG_SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    picture = Image.fromarray((grey * 255).round().astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    return picture.convert("RGB"), scale


def _draw_boxes(picture: Image.Image, scale: float, explanation: Explanation) -> None:
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = explanation.frame
    if x0 > 0 or y0 > 0 or x1 < explanation.width or y1 < explanation.height:  # what the network did not see
        shade = Image.new("L", picture.size, 110)
        ImageDraw.Draw(shade).rectangle([round(edge * scale) for edge in (x0, y0, x1 - 1 / scale, y1 - 1 / scale)], 0)
        picture.paste(BACKGROUND, mask=shade)

    shapes = []
    for number, answer in enumerate(explanation.answers):
        for region in answer.regions:
            corners = [edge * scale for edge in region.box]
            limits = (picture.width - 1, picture.height - 1) * 2
            corners = [min(max(round(edge), 0), limit) for edge, limit in zip(corners, limits, strict=True)]
            shapes.append((corners, number, answer))
    for corners, number, _ in shapes:
        x0, y0, x1, y1 = corners
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="#000000", width=5)
        draw.rectangle(corners, outline=_color(number), width=3)
    font, taken = _font(17), []
    for corners, number, answer in shapes:
        _draw_label(draw, picture.size, corners, _label(number, answer), _color(number), font, taken)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corners: Sequence[int],
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write a label at a corner of its box, at the first place that no other label has taken."""
    x0, y0, x1, y1 = corners
    width, height = draw.textlength(text, font) + 10, 24
    if width > min(1.5 * (x1 - x0) + 20, size[0]):  # on a small box the number has to do
        text = text.split()[0]
        width = draw.textlength(text, font) + 10
    places = [(x0, y0 - height), (x0, y1 + 1), (x1 - width, y0 - height), (x1 - width, y1 + 1), (x0 + 4, y0 + 4)]
    places += [(x0 + 4, y0 + 4 + step * height) for step in range(1, 6)]
    inside = [(min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)) for x, y in places]
    areas = [(x, y, x + width, y + height) for x, y in inside]
    area = next((area for area in areas if not any(map(_overlap, [area] * len(taken), taken))), areas[0])
    taken.append(area)
    draw.rectangle(area, fill=color)
    draw.text((area[0] + 5, area[1] + height / 2), text, fill="#101318", font=font, anchor="lm")


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


class _Panel:
    """The column of text beside the picture, laid out before it is drawn so that its height is known."""

    def __init__(self, explanation: Explanation):
        self.items: list[tuple[int, int, str, ImageFont.FreeTypeFont, str]] = []  # x, y, text, font, fill
        self.chips: list[tuple[int, str, str]] = []  # y, number, fill
        self.y = 0
        self._write(Path(explanation.image).name, _font(21), TEXT, 27)
        self._write(f"{explanation.width} x {explanation.height} pixels", _font(15), MUTED, 30)
        for number, answer in enumerate(explanation.answers):
            self.chips.append((self.y, str(number + 1), _color(number) if answer.regions else MUTED))
            heading = f"{answer.query}  ·  {answer.score:.2f}" if answer.kind == "prompt" else f"Box {answer.query}"
            self._write(heading, _font(18), TEXT if answer.regions else MUTED, 24, indent=36)
            if not answer.regions:
                self._write("not found", _font(15), MUTED, 20, indent=36)
            if answer.sentence:
                sentence = answer.sentence if answer.regions else f"({answer.sentence})"  # answers nothing
                self._write(sentence, _font(16), TEXT if answer.regions else MUTED, 21, indent=36)
            self.y += 14
        self._write(DISCLAIMER, _font(14), MUTED, 18)
        self.height = self.y

    def _write(self, text: str, font: ImageFont.FreeTypeFont, fill: str, line_height: int, indent: int = 0) -> None:
        for line in _wrap(text, font, PANEL_WIDTH - indent):
            self.items.append((indent, self.y, line, font, fill))
            self.y += line_height

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        for y, number, fill in self.chips:
            draw.rounded_rectangle((left, top + y, left + 26, top + y + 22), radius=6, fill=fill)
            draw.text((left + 13, top + y + 11), number, fill="#101318", font=_font(15), anchor="mm")
        for x, y, text, font, fill in self.items:
            draw.text((left + x, top + y), text, fill=fill, font=font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text at spaces, and inside words that are too long, so that no line is wider than `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            fitting = 1
            while font.getlength(word[: fitting + 1]) <= width:
                fitting += 1
            lines.append(word[:fitting])
            word = word[fitting:]
        line = word
    return [*lines, line] if line else lines


def _label(number: int, answer: Answer) -> str:
    return f"{number + 1} {answer.query}" if answer.kind == "prompt" and len(answer.query) <= 28 else f"{number + 1}"


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
