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

from evaluation.metrics.average_precision import PooledDetections, read_detections
from evaluation.metrics.boxes import check_units
from evaluation.metrics.checked_batches import CheckedBatches


# Written out: 0.1 * 3 is not 0.3 in floating point, and "strictly above t" must hold at IoU = 3/10 exactly.
IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
REPORTED = {"map10": 0.1, "map30": 0.3, "map50": 0.5}

_DESCRIPTION = "AP at several IoU thresholds, 101-point interpolation, strict matching, per class and averaged."
_CITATION = ""
_KWARGS = """
Args:
    predictions: one dict per image: boxes (n, 4) xyxy in any unit, scores (n), labels (n) class indices.
    references: one dict per image: boxes (m, 4) of the same unit, labels (m).
    num_classes: number of classes; left out: the largest label seen, plus one.
    iou_thresholds: thresholds of the mean; 0.1, 0.3 and 0.5 are always reported too.
    official: count a class without any target as AP 0 (as the official code does) instead of leaving it out.
Returns:
    map, map10, map30, map50 (None where no class is defined), per_class: list of {"ap", "ap50", "ground_truths",
    "predictions"} in class order with None for undefined values, classes_defined.
"""


def nanmean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of what is not NaN, NaN where nothing is, without a warning."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)


class DetectionMapStatistic:
    """The paper's mAP for bootstrapping.

    `names`: map, map10, map30, map50, and ap_class_0, ap_class_1, ... (mean over the IoU thresholds of each class). A
    class without targets in a resample is undefined there and left out of the means, or counts 0 if `official`.

    Args:
        predictions, references, num_classes, iou_thresholds, official: as `detection_map`.
        images: the unit of the bootstrap of each entry of the lists; left out: each entry is one.
        num_images: number of units; left out: as large as `images` needs.

    Raises:
        ValueError: as `detection_map`.
    """

    def __init__(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        num_classes: int | None = None,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
        official: bool = False,
        images: Sequence[int] | None = None,
        num_images: int | None = None,
    ):
        found, targets, num_classes = read_detections(predictions, references, num_classes)
        units, self.num_units = check_units(images, num_images, len(predictions))
        thresholds = sorted({*iou_thresholds, *REPORTED.values()})
        self.detections = PooledDetections(found, targets, num_classes, thresholds, units, self.num_units)
        self.official = official
        self._averaged = [thresholds.index(t) for t in iou_thresholds]
        self._reported = [thresholds.index(t) for t in REPORTED.values()]
        if not self._averaged:
            raise ValueError("`iou_thresholds` is empty; give at least one.")
        self.names = ("map", *REPORTED, *(f"ap_class_{label}" for label in range(num_classes)))

    def table(self, counts: np.ndarray) -> np.ndarray:
        """AP (B, classes, 1 + len(REPORTED)): mean over the IoU thresholds, and at each reported one."""
        precision, _ = self.detections(counts)
        if self.official:
            precision = np.nan_to_num(precision, nan=0.0)
        return np.concatenate(
            [precision[..., self._averaged].mean(-1, keepdims=True), precision[..., self._reported]], -1
        )

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N) -> values (B, len(names)); see `evaluation.bootstrap.Statistic`."""
        table = self.table(counts)
        return np.concatenate([nanmean(table, axis=1), table[..., 0]], axis=1)


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
        ValueError: if the two lists differ in length, a dict's arrays differ in length, a box is not finite or has a
            negative size, a score is NaN, or a label is out of range; the entry is named.
    """
    statistic = DetectionMapStatistic(predictions, references, num_classes, iou_thresholds, official)
    counts = np.ones((1, statistic.num_units))
    values = dict(zip(statistic.names, statistic(counts)[0].tolist(), strict=True))
    averaged, at50 = statistic.table(counts)[0][:, [0, 1 + list(REPORTED).index("map50")]].T
    num_targets, num_predictions = statistic.detections.num_targets, statistic.detections.num_predictions
    return {
        **{name: None if np.isnan(values[name]) else values[name] for name in ("map", *REPORTED)},
        "per_class": [
            {
                "ap": float(averaged[label]) if num_targets[label] else None,
                "ap50": float(at50[label]) if num_targets[label] else None,
                "ground_truths": int(num_targets[label]),
                "predictions": int(num_predictions[label]),
            }
            for label in range(len(num_targets))
        ],
        "classes_defined": int((num_targets > 0).sum()),
    }


class DetectionMap(CheckedBatches, evaluate.Metric):
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
