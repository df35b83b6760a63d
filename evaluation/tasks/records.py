"""Targets of one image in the square that the network sees.

All scores are computed in this frame: a centre crop cuts boxes off, a letterbox only rescales them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from processing_chex.vocabulary import ANATOMY_NAMES


if TYPE_CHECKING:
    import datasets


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

    def object_references(self) -> dict[str, np.ndarray]:
        """Boxes and labels of the findings of classes that are scored, as `detection_map` takes them."""
        scored = self.object_labels >= 0
        return {"boxes": self.object_boxes[scored], "labels": self.object_labels[scored]}

    def described_regions(self) -> np.ndarray:
        """(A,) bool: regions that are present and that something is said about."""
        return self.anatomy_present & np.array([bool(text) for text in self.anatomy_sentences], dtype=bool)

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


def class_positions(own: Sequence[str], wanted: Sequence[str]) -> np.ndarray | None:
    """
    For each class of the data its place among the classes that are scored, -1 for one that is not; None where both are
    the same.

    Raises:
        ValueError: The data lack a class that is scored.
    """
    if list(own) == list(wanted):
        return None
    if missing := [name for name in wanted if name not in own]:
        raise ValueError(
            f"The data have no class {', '.join(map(repr, missing))}, but these are scored; their classes are: "
            f"{', '.join(own)}."
        )
    places = {name: place for place, name in enumerate(wanted)}
    return np.array([places.get(name, -1) for name in own], dtype=np.int64)


def read_targets(record: Mapping, frame: Sequence[float], positions: np.ndarray | None = None) -> Targets:
    """
    Targets of a record of the common format. What is not annotated is empty.

    Args:
        record: One row of the data.
        frame: xyxy pixel rectangle that the network sees.
        positions: As from `class_positions`. Objects of classes that are not scored get the label -1.
    """
    regions = len(ANATOMY_NAMES)
    if record["anatomy_boxes"] is None:
        boxes, present = np.zeros((regions, 4)), np.zeros(regions, dtype=bool)
    else:
        boxes, visible = frame_boxes(record["anatomy_boxes"], frame)
        present = np.asarray(record["anatomy_present"], dtype=bool) & visible
    labels = np.zeros((len(boxes), 0), dtype=np.int64)
    if record["anatomy_labels"] is not None:
        labels = np.asarray(record["anatomy_labels"], dtype=np.int64).reshape(len(boxes), -1)
    objects = record["objects"] or []
    categories = np.asarray([item["category"] for item in objects], dtype=np.int64)
    if positions is not None:
        categories = positions[categories]
        if labels.shape[1]:
            labels = labels[:, np.argsort(positions, kind="stable")[np.sort(positions) >= 0]]
    object_boxes, seen = frame_boxes([item["bbox"] for item in objects], frame)
    return Targets(
        sample_id=record["sample_id"],
        anatomy_boxes=boxes * present[:, None],
        anatomy_present=present,
        anatomy_labels=labels,
        anatomy_sentences=[" ".join(texts or ()) for texts in record["anatomy_sentences"] or [()] * len(boxes)],
        object_boxes=object_boxes[seen],
        object_labels=categories[seen],
        object_phrases=[item["phrase"] or "" for item, kept in zip(objects, seen, strict=True) if kept],
        sentences=list(record["sentences"] or ()),
    )


def iterate_targets(
    dataset: "datasets.Dataset", image_processor: object, positions: np.ndarray | None = None
) -> Iterator[Targets]:
    """Targets of a split without decoding its images; `image_processor` has the method `frame(height, width)`."""
    for record in dataset.remove_columns("image"):
        yield read_targets(record, image_processor.frame(record["height"], record["width"]), positions)
