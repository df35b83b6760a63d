"""The HTML report: self-contained, well-formed, complete, and safe against whatever the texts contain."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from evaluation.figures import (
    bullet,
    format_duration,
    horizontal_bars,
    line_chart,
    nice_ticks,
    png_data_uri,
    radiograph,
    smooth,
)
from evaluation.html_report import METRICS, write_report


VOID = {"meta", "br", "link", "img", "input", "hr"}


def picture(seed=0, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


def inputs():
    values = dict(zip(METRICS, (0.84, 0.21, 0.45, 0.9, 0.5, None), strict=True))
    metrics = values | {
        "baselines": dict.fromkeys(METRICS, 0.4),
        "details": {
            "images": 12,
            "split": "test",
            "skipped": {"report_generation": "the model has no sentence generator"},
            "seconds": {"images": 0.5, "total": 3.0},
            "versions": {"torch": "2.13.0"},
            "finding_detection": {
                "per_class": {
                    "Mass": {"ap50": 0.25, "ground_truths": 7},
                    "Nodule": {"ap50": None, "ground_truths": 0},
                },
                "settings": {"score": "product"},
            },
            "anatomy_localization": {"per_region": {"trachea": 0.8}},
        },
    }
    history = [
        {
            "stage": "stage1",
            "split": "train",
            "step": n,
            "seconds": n / 10,
            "lr": 0.1,
            "loss": 9 / n,
            "box": 4 / n,
        }
        for n in range(1, 60)
    ]
    history += [{"stage": "stage1", "split": "validation", "step": 50, "seconds": 5.1, "loss": 0.3}]
    history += [{"stage": "stage1", "step": 50, "seconds": 5.1, "val_anatomy_miou": 0.7}]
    explanations = [
        {
            "image": picture(),
            "title": "First",
            "sentences": [
                {"text": "Small <b>mass</b> & nodule.", "prompt": "Mass", "boxes": [[1, 2, 20, 30]], "scores": [0.9]},
                {"text": "The heart is normal.", "prompt": "Heart", "boxes": [[5, 5, 9, 9]], "abnormal": False},
            ],
            "targets": [
                {"box": [2, 2, 21, 28], "phrase": "A mass.", "sentence": 0},
                {"box": [0, 0, 9, 9], "phrase": "x", "sentence": None},
            ],
            "reference": [{"text": "A mass.", "sentence": 0}, {"text": "No edema.", "sentence": None}],
        }
    ]
    detections = [
        {
            "image": Image.fromarray(picture(1)),
            "title": "Second",
            "predictions": [
                {"box": [3, 3, 12, 12], "label": "Mass", "score": 0.77, "correct": True},
                {"box": [0, 0, 5, 5], "label": "Nodule", "score": 0.2, "correct": False},
            ],
            "targets": [
                {"box": [3, 3, 12, 13], "label": "Mass", "found": True},
                {"box": [30, 30, 40, 40], "label": "Edema", "found": False},
            ],
        }
    ]
    config = {
        "command": "make demo",
        "targets": {"anatomy_miou": 0.75, "detection_map50": 0.3},
        "facts": {"model": "2 M"},
    }
    return metrics, history, explanations, config, detections


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "new" / "report.html", *inputs()).read_text(
        encoding="utf-8"
    )


class Checker(HTMLParser):
    """Collects text and checks that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.references = [], [], []
        self.optional = {"th", "tr", "td", "li"}

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        while self.open[-1] != tag:
            assert self.open[-1] in self.optional, f"<{self.open[-1]}> is not closed before </{tag}>"
            self.open.pop()
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_page_is_well_formed_and_needs_nothing_from_outside(page):
    checker = parse(page)
    assert checker.references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in checker.references)
    assert not re.search(r"https?:|url\(|@import|<link|fetch\(|src=", page)


def test_page_says_what_it_is_and_shows_every_part(page):
    text = " ".join(parse(page).text)
    assert "drawn by a program" in text
    assert "Not a medical device" in text
    for task, *_ in METRICS.values():
        assert task in text
    for part in ("0.840", "baseline 0.40", "target 0.75", "reached", "below baseline", "not measured", "make demo"):
        assert part in text, part
    assert "report generation: the model has no sentence generator." in text
    assert "missed: Edema" in text
    assert "1 correct · 1 false · 1 missed" in text
    assert "Mass 0.77" in text
    assert "anatomy miou" in text


def test_texts_are_escaped(page):
    assert "Small &lt;b&gt;mass&lt;/b&gt; &amp; nodule." in page
    assert "<b>mass</b>" not in page


def test_boxes_of_sentences_and_targets(page):
    # Sentence 1 and its target share a colour, the target is dashed; the target nobody speaks of is neutral.
    article = page[page.index("<article class=explained>") : page.index("<h2>Detections")]
    boxes = re.findall(r'<rect class="box ([^"]*)"[^>]*? x="([\d.]+)" y="([\d.]+)"', article)
    assert boxes == [
        ("c0 dashed", "2.0", "2.0"),
        ("cn dashed", "0.0", "0.0"),
        ("c0", "1.0", "2.0"),
        ("cn quiet", "5.0", "5.0"),
    ]
    assert article.count('class="t0"') == 2
    assert 'data-group="0-1"' in article and 'data-show="0-1"' in article


def test_image_is_embedded_without_loss(page):
    data = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page).group(1)
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == picture()).all()


def test_empty_report_still_stands(tmp_path):
    page = write_report(tmp_path / "empty.html", {}, [], []).read_text(encoding="utf-8")
    text = " ".join(parse(page).text)
    assert text.count("not measured") == len(METRICS)
    assert "Training" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["empty.html"]


def svg(text):
    return ElementTree.fromstring(text)


def test_line_chart_places_values_and_leaves_gaps_out():
    chart = svg(line_chart({"a": [(0, 0.0), (5, 1.0), (7, float("nan")), (10, 0.5)]}, "step", "loss", description="d"))
    path = next(node for node in chart.iter("path") if node.get("class") == "line s0")
    points = [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]
    assert len(points) == 3
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] < points[2][1] < points[0][1]
    texts = [node.text for node in chart.iter("text")]
    assert {"step", "loss", "0", "10"} <= set(texts)
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)


def test_wide_ranges_get_a_logarithmic_axis():
    wide = line_chart({"a": [(step, 100 / step**2) for step in range(1, 20)]}, "step", "loss", description="d")
    assert "loss (log)" in wide
    narrow = line_chart({"a": [(step, 2 / step) for step in range(1, 10)]}, "step", "loss", description="d")
    assert "(log)" not in narrow
    assert "No values" in line_chart({"a": [(1, float("inf"))]}, "step", "loss", description="d")


def test_single_value_is_drawn():
    chart = svg(line_chart({"a": [(3, 0.7)]}, "step", "value", description="d", points=("a",)))
    circle = next(chart.iter("circle"))
    assert 0 < float(circle.get("cx")) <= 360
    assert 0 < float(circle.get("cy")) <= 225


def test_smoothing():
    assert smooth([1.0, 2.0, 6.0], 3) == pytest.approx([1, 3, 6])
    assert smooth([3.0] * 9, 5) == pytest.approx([3] * 9)
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]


@pytest.mark.parametrize("low,high", [(0, 1), (0, 0.037), (0, 12345), (-3, 4), (5, 5), (0, 0)])
def test_ticks_are_round_and_span_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low and ticks[-1] >= high
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_bullet_marks_value_baseline_and_target():
    drawing = svg(bullet(0.5, 0.25, 0.75, "label"))
    classes = {node.get("class"): node for node in drawing}
    assert float(classes["value"].get("width")) == pytest.approx(150)
    assert classes["baseline"].get("d").startswith("M75.0")
    assert classes["target"].get("d").startswith("M225.0")
    assert {node.get("class") for node in svg(bullet(None, None, None, "label"))} == {"track"}


def test_radiograph_clips_boxes_and_skips_those_outside():
    drawing = svg(
        radiograph(picture(), [{"box": [-10, 40, 20, 90], "tag": "1"}, {"box": [70, 0, 90, 10]}], "two boxes")
    )
    rectangles = [node for node in drawing.iter("rect") if node.get("class", "").startswith("box")]
    assert len(rectangles) == 1
    assert [float(rectangles[0].get(key)) for key in ("x", "y", "width", "height")] == [0, 40, 20, 8]
    assert drawing.get("aria-label") == "two boxes"


def test_images_of_any_kind_become_png():
    for image in (picture().astype(np.float32) / 255, picture()[..., None].repeat(3, 2), Image.fromarray(picture())):
        data = base64.b64decode(png_data_uri(image).split(",", 1)[1])
        assert Image.open(io.BytesIO(data)).size == (64, 48)
    large = base64.b64decode(png_data_uri(np.zeros((100, 2000), np.uint8)).split(",", 1)[1])
    assert Image.open(io.BytesIO(large)).size == (768, 38)


def test_bars_and_durations():
    bars = svg(horizontal_bars({"a <x>": 90.0, "b": 45.0}, "s", "times"))
    widths = [float(node.get("width")) for node in bars.iter("rect")]
    assert widths == [190, 95]
    assert "1 min 30 s" in [node.text for node in bars.iter("text")]
    assert [format_duration(value) for value in (0.44, 12.3, 185, 7800)] == [
        "0.4 s",
        "12 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
