"""Targets of one image in the square that the network sees.

All scores are computed in this frame: a centre crop cuts boxes off, a letterbox only rescales them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np


# A target that keeps less of its area after the crop is dropped (evaluation protocol of the paper).
MIN_VISIBLE_SHARE = 0.1


@dataclass(slots=True)
class Targets:
    """Annotations of one image; boxes are xyxy, normalised to the network square and clipped to it.

    Attributes:
        sample_id: Identifier of the record.
        anatomy_boxes: (A, 4), zeros where absent.
        anatomy_present: (A,) bool, after the crop.
        anatomy_labels: (A, C) int, negative = unknown; C = 0 without labels.
        anatomy_sentences: one text per region, "" where nothing is said.
        object_boxes: (n, 4) boxes of findings.
        object_labels: (n,) class indices.
        object_phrases: n phrases.
        sentences: the report, one string per sentence.
    """

    sample_id: str
    anatomy_boxes: np.ndarray
    anatomy_present: np.ndarray
    anatomy_labels: np.ndarray
    anatomy_sentences: list[str]
    object_boxes: np.ndarray
    object_labels: np.ndarray
    object_phrases: list[str]
    sentences: list[str]

    @property
    def report(self) -> str:
        return " ".join(self.sentences)

    def grounded_phrases(self) -> dict[str, np.ndarray]:
        """Distinct phrases, sorted, with all their boxes (k, 4)."""
        phrases = np.array(self.object_phrases, dtype=object)
        return {phrase: self.object_boxes[phrases == phrase] for phrase in sorted(set(self.object_phrases) - {""})}


def frame_boxes(boxes: np.ndarray, frame: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel boxes xyxy (n, 4) -> boxes normalised to `frame` (xyxy pixels), clipped; and which stay visible (n,)."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    x0, y0, x1, y1 = (float(value) for value in frame)
    scaled = (boxes - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    clipped = np.clip(scaled, 0.0, 1.0)
    area, visible = ((b[:, 2:] - b[:, :2]).clip(0).prod(-1) for b in (scaled, clipped))
    return clipped, (area > 0) & (visible >= MIN_VISIBLE_SHARE * area)


def read_targets(record: Mapping, frame: Sequence[float]) -> Targets:
    """Targets of a record of the common format; `frame` is the xyxy pixel rectangle that the network sees."""
    boxes, visible = frame_boxes(record["anatomy_boxes"], frame)
    present = np.asarray(record["anatomy_present"], dtype=bool) & visible
    objects = record["objects"] or []
    object_boxes, seen = frame_boxes([item["bbox"] for item in objects], frame)
    return Targets(
        sample_id=record["sample_id"],
        anatomy_boxes=boxes * present[:, None],
        anatomy_present=present,
        anatomy_labels=np.asarray(record["anatomy_labels"], dtype=np.int64).reshape(len(boxes), -1),
        anatomy_sentences=[" ".join(texts or ()) for texts in record["anatomy_sentences"]],
        object_boxes=object_boxes[seen],
        object_labels=np.asarray([item["category"] for item in objects], dtype=np.int64)[seen],
        object_phrases=[item["phrase"] for item, kept in zip(objects, seen, strict=True) if kept],
        sentences=list(record["sentences"] or ()),
    )


def iterate_targets(dataset: datasets.Dataset, image_processor: object) -> Iterator[Targets]:
    """Targets of a split without decoding its images; `image_processor` has the method `frame(height, width)`."""
    for record in dataset.remove_columns("image"):
        yield read_targets(record, image_processor.frame(record["height"], record["width"]))
