"""Boxes of the metrics: overlap, and one flat table from one dict per image, with checks that name the entry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of boxes xyxy (..., 4) with boxes (..., 4) of the same unit, broadcast -> (...) float64.

    Continuous coordinates (no "+1 pixel"). Boxes without area have IoU 0 with everything, also with themselves.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    intersection = np.clip(sides, 0.0, None).prod(-1)
    union = box_area(first) + box_area(second) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Area of boxes xyxy (..., 4) -> (...)."""
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0.0, None).prod(-1)


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of every box of `first` (N, 4) with every box of `second` (M, 4), xyxy in any unit -> (N, M) float64."""
    first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (first, second))
    return overlap(first[:, None], second[None])


def paired_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of box i of `first` with box i of `second`, both (N, 4) xyxy in one unit -> (N,) float64."""
    first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (first, second))
    if first.shape != second.shape:
        raise ValueError(
            f"Paired IoU needs as many predicted boxes as target boxes, got {len(first)} and {len(second)}. "
            "Give exactly one predicted box per target."
        )
    return overlap(first, second)


def check_boxes(boxes: np.ndarray, name_of: "str | Sequence[str]") -> None:
    """Checks (N, 4) xyxy boxes; `name_of` is the name of the whole list or one name per box.

    Raises:
        ValueError: that names the first box that is not finite or has a negative size.
    """

    def where(index: int) -> str:
        return f"{name_of}[{index}]" if isinstance(name_of, str) else name_of[index]

    wrong = ~np.isfinite(boxes).all(1)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"`{where(index)}` has a box with NaN or infinity: {boxes[index].tolist()}. Remove or repair it."
        )
    wrong = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"`{where(index)}` has a box of negative size: {boxes[index].tolist()}. Boxes are (x0, y0, x1, y1) with "
            "x0 <= x1 and y0 <= y1; convert centre or width/height formats first."
        )


@dataclass(frozen=True)
class BoxTable:
    """All boxes of a list of images.

    Attributes:
        boxes: (n, 4) float64 xyxy.
        labels: (n,) int64, all 0 for unlabelled boxes.
        scores: (n,) float64, all 1 for targets.
        entries: (n,) int64, index of the image in the list.
        num_entries: length of the list.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    entries: np.ndarray
    num_entries: int

    @property
    def counts(self) -> np.ndarray:
        """Number of boxes of each image."""
        return np.bincount(self.entries, minlength=self.num_entries)

    @classmethod
    def read(cls, items: Sequence[Mapping], name: str, scored: bool, labelled: bool = True) -> "BoxTable":
        """From one dict per image with "boxes" (n, 4), "labels" (n) if `labelled`, "scores" (n) if `scored`.

        Raises:
            ValueError: for a missing key, arrays of different length, boxes that are not finite or have a negative
                size, NaN scores, or labels that are not integers from 0; `name[index]` tells which.
        """
        wanted = ["boxes", *(["labels"] if labelled else []), *(["scores"] if scored else [])]
        columns: dict[str, list[np.ndarray]] = {key: [] for key in wanted}
        lengths = np.zeros(len(items), dtype=np.int64)
        for index, item in enumerate(items):
            missing = [key for key in wanted if key not in item]
            if missing:
                raise ValueError(f"`{name}[{index}]` has no {missing[0]!r}; it needs {', '.join(wanted)}.")
            boxes = np.asarray(item["boxes"], dtype=np.float64)
            if boxes.size == 0:
                boxes = boxes.reshape(0, 4)
            if boxes.ndim != 2 or boxes.shape[1] != 4:
                raise ValueError(f"`{name}[{index}]` has boxes of shape {boxes.shape}; expected (n, 4), xyxy.")
            columns["boxes"].append(boxes)
            lengths[index] = len(boxes)
            for key in wanted[1:]:
                columns[key].append(np.asarray(item[key]).reshape(-1))
            if any(len(columns[key][-1]) != len(boxes) for key in wanted[1:]):
                found = " and ".join(f"{len(columns[key][-1])} {key}" for key in wanted[1:])
                raise ValueError(f"`{name}[{index}]` has {len(boxes)} boxes, {found}; it needs one of each per box.")

        entries = np.repeat(np.arange(len(items)), lengths)

        def join(key: str) -> np.ndarray:
            return np.concatenate(columns[key]) if columns[key] else np.zeros(0)

        boxes = join("boxes").reshape(-1, 4)
        scores = join("scores").astype(np.float64) if scored else np.ones(len(boxes))
        labels = join("labels") if labelled else np.zeros(len(boxes))
        check_boxes(boxes, _EntryNames(name, entries))
        if np.isnan(scores).any():
            index = entries[np.isnan(scores).argmax()]
            raise ValueError(f"`{name}[{index}]` has a NaN score. Remove that box or repair the model's output.")
        whole = labels.astype(np.int64)
        wrong = (whole != labels) | (whole < 0)
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"`{name}[{entries[index]}]` has the label {labels[index]}; labels are class indices, integers from 0."
            )
        return cls(boxes, whole, scores, entries, len(items))


class _EntryNames(Sequence):
    """The name of the image of each box, made when asked for."""

    def __init__(self, name: str, entries: np.ndarray):
        self.name, self.entries = name, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> str:
        return f"{self.name}[{self.entries[index]}]"


def check_units(units: Sequence[int] | None, num_units: int | None, num_entries: int) -> tuple[np.ndarray, int]:
    """The bootstrap unit (image) of each entry, (num_entries,) int64, and the number of units.

    Args:
        units: the unit of each entry, integers from 0; left out: every entry is a unit of its own.
        num_units: left out: the largest of `units` plus one.
        num_entries: number of entries.

    Raises:
        ValueError: for a wrong length, or numbers that are not integers from 0 below `num_units`.
    """
    if units is None:
        if num_units not in (None, num_entries):
            raise ValueError(f"{num_units} images were named for {num_entries} entries: pass the image of each entry.")
        return np.arange(num_entries), num_entries
    array = np.asarray(units)
    if array.shape != (num_entries,):
        raise ValueError(f"`images` has the shape {array.shape} for {num_entries} entries; give one number per entry.")
    if not num_entries:
        return np.zeros(0, dtype=np.int64), num_units or 0
    whole = array.astype(np.int64)
    limit = int(whole.max()) + 1 if num_units is None else num_units
    wrong = (whole != array) | (whole < 0) | (whole >= limit)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"`images[{index}]` is {array[index]}; images are numbered from 0 to {limit - 1}.")
    return whole, limit


__all__ = ["BoxTable", "box_area", "check_boxes", "check_units", "overlap", "paired_iou", "pairwise_iou"]
