"""Mean average precision of class-wise boxes, as the ChEX paper counts it (arXiv 2404.15770, object detection).

Per class and IoU threshold t: the predictions of the whole set by falling score; each one takes the not yet taken
target of its image and class with the highest IoU, if that is strictly above t (true positive), else it is a false
positive; the precision is made monotone and averaged over the 101 recall levels 0, 0.01, ..., 1. There is no score
threshold and no limit on the number of boxes. `map` averages over t = 0.1, 0.2, ..., 0.7.

Usable directly and through `evaluate.load("evaluation/metrics/detection_map")`, without a network; the
`evaluation` package must be importable.
"""

from collections.abc import Mapping, Sequence

import datasets
import evaluate
import numpy as np

from evaluation.metrics.box_iou.box_iou import pairwise_iou


# Written out: 0.1 * 3 is not 0.3 in floating point, and "strictly above t" must hold at IoU = 3/10 exactly.
IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
RECALL_LEVELS = np.arange(101) / 100

_DESCRIPTION = "AP at several IoU thresholds, 101-point interpolation, strict matching, per class and averaged."
_CITATION = ""
_KWARGS = """
Args:
    predictions: one dict per image: boxes (n, 4) xyxy in any unit, scores (n), labels (n) class indices.
    references: one dict per image: boxes (m, 4) of the same unit, labels (m).
    num_classes: number of classes; left out: the largest label seen, plus one.
    iou_thresholds: thresholds of the mean; 0.5 is always reported too.
    official: count a class without any target as AP 0 (as the official code does) instead of leaving it out.
Returns:
    map, map10, map30, map50 (None where no class is defined), per_class: list of {"ap", "ap50", "ground_truths",
    "predictions"} in class order with None for undefined values, classes_defined.
"""


def match_greedily(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Targets taken by predictions of one image and class: `iou` (n, m), predictions by falling score -> (n,) int.

    -1 marks a false positive. A prediction takes the free target with the highest IoU if that is > `threshold`.
    """
    taken = np.full(len(iou), -1, dtype=np.int64)
    free = np.ones(iou.shape[1], dtype=bool)
    for row, overlaps in enumerate(iou):
        if not free.any():
            break
        best = int(np.argmax(np.where(free, overlaps, -1.0)))
        if overlaps[best] > threshold:
            taken[row] = best
            free[best] = False
    return taken


def average_precision(true_positive: np.ndarray, num_targets: int) -> float:
    """101-point AP of predictions sorted by falling score: `true_positive` (n,) bool, `num_targets` > 0."""
    if num_targets <= 0:
        raise ValueError("Average precision is undefined without targets: call it only for classes that have some.")
    hits = np.cumsum(np.asarray(true_positive, dtype=np.int64))
    if not len(hits):
        return 0.0
    recall = hits / num_targets
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, RECALL_LEVELS, side="left")
    return float(np.where(index < len(hits), envelope[np.minimum(index, len(hits) - 1)], 0.0).mean())


def detection_map(
    predictions: Sequence[Mapping],
    references: Sequence[Mapping],
    num_classes: int | None = None,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    official: bool = False,
) -> dict:
    """Mean average precision; see the module's `_KWARGS` for arguments and result.

    Equal scores keep the order of the input (images in order, boxes in order), so the result is reproducible.

    Raises:
        ValueError: if the two lists differ in length, a dict's arrays differ in length, or a label is out of range.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: give one dict per image in both."
        )
    flat = [_arrays(item, index, "predictions") for index, item in enumerate(predictions)]
    targets = [_arrays(item, index, "references") for index, item in enumerate(references)]
    seen = [labels.max() for _, labels, _ in (*flat, *targets) if len(labels)]
    if num_classes is None:
        num_classes = int(max(seen, default=-1)) + 1
    elif seen and max(seen) >= num_classes:
        raise ValueError(f"A label {int(max(seen))} does not fit num_classes={num_classes}; labels start at 0.")

    thresholds = sorted({*iou_thresholds, 0.1, 0.3, 0.5})
    table: list[dict[float, float] | None] = []
    per_class: list[dict] = []
    for label in range(num_classes):
        values, num_targets, num_predictions = _class_average_precision(flat, targets, label, thresholds)
        table.append(values)
        per_class.append(
            {
                "ap": None if values is None else float(np.mean([values[t] for t in iou_thresholds])),
                "ap50": None if values is None else values[0.5],
                "ground_truths": num_targets,
                "predictions": num_predictions,
            }
        )
    absent = dict.fromkeys(thresholds, 0.0)
    counted = [values if values is not None else absent for values in table if values is not None or official]

    def mean(chosen: Sequence[float]) -> float | None:
        return float(np.mean([[values[t] for t in chosen] for values in counted])) if counted else None

    return {
        "map": mean(iou_thresholds),
        "map10": mean((0.1,)),
        "map30": mean((0.3,)),
        "map50": mean((0.5,)),
        "per_class": per_class,
        "classes_defined": sum(values is not None for values in table),
    }


def _arrays(item: Mapping, index: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    boxes = np.asarray(item["boxes"], dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(item["labels"], dtype=np.int64).reshape(-1)
    scores = np.asarray(item["scores"] if "scores" in item else np.ones(len(boxes)), dtype=np.float64).reshape(-1)
    if not len(boxes) == len(labels) == len(scores):
        raise ValueError(
            f"`{name}[{index}]` has {len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores; "
            "it needs one label (and one score) per box."
        )
    if np.isnan(scores).any() or np.isnan(boxes).any():
        raise ValueError(f"`{name}[{index}]` contains NaN in its boxes or scores; remove these entries first.")
    return boxes, labels, scores


def _class_average_precision(
    predictions: list, targets: list, label: int, thresholds: Sequence[float]
) -> tuple[dict[float, float] | None, int, int]:
    """AP per threshold of one class (None without targets), number of targets, number of predictions."""
    scores: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    num_targets = 0
    for (boxes, labels, confidence), (target_boxes, target_labels, _) in zip(predictions, targets, strict=True):
        target_boxes = target_boxes[target_labels == label]
        num_targets += len(target_boxes)
        chosen = labels == label
        if not chosen.any():
            continue
        order = np.argsort(-confidence[chosen], kind="stable")
        scores.append(confidence[chosen][order])
        matched = np.zeros((len(order), len(thresholds)), dtype=bool)
        if len(target_boxes):
            iou = pairwise_iou(boxes[chosen][order], target_boxes)
            for column, threshold in enumerate(thresholds):
                matched[:, column] = match_greedily(iou, threshold) >= 0
        hits.append(matched)
    num_predictions = sum(len(part) for part in scores)
    if not num_targets:
        return None, 0, num_predictions
    if not num_predictions:
        return dict.fromkeys(thresholds, 0.0), num_targets, 0
    order = np.argsort(-np.concatenate(scores), kind="stable")
    ranked = np.concatenate(hits)[order]
    values = {t: average_precision(ranked[:, column], num_targets) for column, t in enumerate(thresholds)}
    return values, num_targets, num_predictions


class DetectionMap(evaluate.Metric):
    """`evaluate` wrapper of `detection_map`."""

    def _info(self) -> evaluate.MetricInfo:
        boxes = datasets.List(datasets.List(datasets.Value("float64")))
        labels = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": {
                        "boxes": boxes,
                        "scores": datasets.List(datasets.Value("float64")),
                        "labels": labels,
                    },
                    "references": {"boxes": boxes, "labels": labels},
                }
            ),
        )

    def _compute(self, predictions: list, references: list, **kwargs) -> dict:
        return detection_map(predictions, references, **kwargs)
