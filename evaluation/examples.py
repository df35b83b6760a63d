"""Examples for the results: images on which a task does worst, and others drawn at random, with boxes and texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image


if TYPE_CHECKING:
    from evaluation.inference import SplitData

FOLDER = "examples"
SIDE = 448


@dataclass
class Example:
    """
    What is shown of one image.

    Attributes:
        boxes: Each with `box` (xyxy, normalised to the shown square), `label`, `score`, `kind` ("prediction" or
            "target") and `group` (which sentence or class it belongs to).
        generated, reference: Texts.
        sentences: Each with `text`, `prompt` and `group`.
    """

    boxes: list[dict[str, Any]] = field(default_factory=list)
    generated: str = ""
    reference: str = ""
    sentences: list[dict[str, Any]] = field(default_factory=list)

    def add_boxes(
        self, boxes: np.ndarray, label: str, kind: str, group: int, scores: Sequence[float] | None = None
    ) -> None:
        for index, box in enumerate(np.asarray(boxes, dtype=np.float64).reshape(-1, 4)):
            score = None if scores is None else round(float(scores[index]), 4)
            self.boxes.append(
                {"box": box.round(4).tolist(), "label": label, "score": score, "kind": kind, "group": group}
            )


def choose(scores: np.ndarray, count: int, seed: int) -> list[tuple[int, str]]:
    """
    Images to show: the `count // 2` with the lowest score and, of the rest, as many drawn at random as are missing.
    Images without a score (NaN) are not shown.
    """
    defined = np.flatnonzero(np.isfinite(scores))
    order = defined[np.argsort(scores[defined], kind="stable")]
    worst = order[: count // 2]
    rest = np.random.default_rng(seed).permutation(order[count // 2 :])[: count - len(worst)]
    return [(int(i), "lowest scores") for i in worst] + [(int(i), "drawn at random") for i in rest]


def make_examples(
    split: "SplitData",
    scores: np.ndarray,
    build: Callable[[int], Example],
    count: int,
    seed: int,
    output: Path,
    image_processor: Any,
) -> list[dict[str, Any]]:
    """
    Examples as results hold them; their images are written beside the results.

    Args:
        split: The images.
        scores: (N,) how well the task did on each; NaN: nothing to show.
        build: Number of an image -> what is shown of it.
        count: How many.
        seed: Of the draw.
        output: Folder of the results.
        image_processor: Knows which square of an image the network sees.
    """
    result = []
    for index, title in choose(scores, count, seed):
        example = build(index)
        name, frame = write_image(split, index, output, image_processor)
        result.append(
            {
                "sample_id": split.ids[index],
                "image": name,
                "frame": frame,
                "title": title,
                "score": round(float(scores[index]), 4),
                "boxes": example.boxes,
                "generated": example.generated,
                "reference": example.reference,
                "sentences": example.sentences,
            }
        )
    return result


def write_image(split: "SplitData", index: int, output: Path, image_processor: Any) -> tuple[str, list[int]]:
    """The square that the network sees as a PNG file: its name from `output` on, and its width and height."""
    name = f"{FOLDER}/{split.source.name}-{split.split}-{index:06d}.png"
    path = output / name
    image = split.dataset[index]["image"]
    x0, y0, x1, y1 = image_processor.frame(image.height, image.width)
    # A frame of the letterbox geometry reaches beyond the image; `crop` fills with black.
    square = image.convert("L").crop(tuple(round(value) for value in (x0, y0, x1, y1)))
    if max(square.size) > SIDE:
        square = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    square.save(temporary, format="PNG")
    temporary.replace(path)
    return name, [square.width, square.height]


__all__ = ["Example", "choose", "make_examples", "write_image"]
