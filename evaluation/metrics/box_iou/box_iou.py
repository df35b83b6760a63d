"""Mean intersection over union of matched box pairs (anatomy localisation).

Usable directly (`from evaluation.metrics.box_iou.box_iou import BoxIou`) and through
`evaluate.load("evaluation/metrics/box_iou")`, without a network.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "Mean IoU of one predicted box per target box, over all pairs and per query."
_CITATION = ""
_KWARGS = """
Args:
    predictions: boxes (x0, y0, x1, y1), one per pair, any unit.
    references: boxes of the same unit, one per pair.
    labels: integer of the query of each pair (for example the anatomy index).
Returns:
    miou: mean over all pairs (None without pairs); macro_miou: mean over labels of the mean of their pairs;
    per_label: {label: {"miou", "count"}}; count: number of pairs.
"""


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of every box of `first` (N, 4) with every box of `second` (M, 4), xyxy in any unit -> (N, M) float64.

    Continuous coordinates (no "+1 pixel"). Boxes without area have IoU 0 with everything, also with themselves.
    """
    first = np.asarray(first, dtype=np.float64).reshape(-1, 4)
    second = np.asarray(second, dtype=np.float64).reshape(-1, 4)
    top_left = np.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = np.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = np.clip(bottom_right - top_left, 0.0, None).prod(-1)
    union = _area(first)[:, None] + _area(second)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def paired_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of box i of `first` with box i of `second`, both (N, 4) xyxy in one unit -> (N,) float64."""
    first = np.asarray(first, dtype=np.float64).reshape(-1, 4)
    second = np.asarray(second, dtype=np.float64).reshape(-1, 4)
    if first.shape != second.shape:
        raise ValueError(
            f"Paired IoU needs as many predicted boxes as target boxes, got {len(first)} and {len(second)}. "
            "Give exactly one predicted box per target."
        )
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    intersection = np.clip(sides, 0.0, None).prod(-1)
    union = _area(first) + _area(second) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None).prod(-1)


def box_iou(predictions: np.ndarray, references: np.ndarray, labels: Sequence[int] | None = None) -> dict:
    """Mean IoU of matched pairs; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: if the numbers of predictions, references and labels differ.
    """
    iou = paired_iou(predictions, references)
    result: dict = {"miou": float(iou.mean()) if len(iou) else None, "count": len(iou)}
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != iou.shape:
            raise ValueError(f"`labels` has shape {labels.shape}, but there are {len(iou)} box pairs; one each.")
        per_label = {
            int(label): {"miou": float(iou[labels == label].mean()), "count": int((labels == label).sum())}
            for label in np.unique(labels)
        }
        result["per_label"] = per_label
        result["macro_miou"] = float(np.mean([v["miou"] for v in per_label.values()])) if per_label else None
    return result


class BoxIou(evaluate.Metric):
    """`evaluate` wrapper of `box_iou`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("float64")),
                    "labels": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list, labels: list) -> dict:
        return box_iou(np.asarray(predictions), np.asarray(references), labels)
