"""Mean average precision of class-wise boxes by the rules of COCO, for comparison with other detectors.

Differs from the paper's mAP (`detection_map`): IoU thresholds 0.50, 0.55, ..., 0.95, an IoU equal to the threshold is
a match, of targets with equal IoU the last one is taken, and only the 100 highest-scored predictions per image and
class count. Values are those of pycocotools for the area range "all" without crowd regions. Classes without targets
are left out of the means, as COCO does.

Usable directly and through `evaluate.load("evaluation/metrics/coco_map")`, without a network; the `evaluation`
package must be importable.
"""

from collections.abc import Mapping, Sequence

import datasets
import evaluate
import numpy as np

from evaluation.metrics.average_precision import PooledDetections, read_detections
from evaluation.metrics.boxes import check_units
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.detection_map.detection_map import nanmean


# As pycocotools makes them, so that an overlap or recall equal to a threshold is treated alike.
COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
COCO_RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100

_DESCRIPTION = "COCO average precision and recall over IoU .50:.05:.95, at most 100 boxes per image and class."
_CITATION = ""
_KWARGS = """
Args:
    predictions: one dict per image: boxes (n, 4) xyxy in any unit, scores (n), labels (n) class indices.
    references: one dict per image: boxes (m, 4) of the same unit, labels (m).
    num_classes: number of classes; left out: the largest label seen, plus one.
    official: count a class without any target as 0, as the ChEX evaluation does (COCO leaves it out).
Returns:
    map: AP, mean over IoU thresholds and classes; map50, map75: at one threshold; mar100: mean recall of the 100
    best boxes per image and class (None where no class is defined); per_class: list of {"ap", "ap50", "ap75",
    "ground_truths", "predictions"} in class order with None for undefined values, classes_defined.
"""


class CocoMapStatistic:
    """COCO's AP for bootstrapping. `names`: map, map50, map75, mar100, and ap_class_0, ap_class_1, ...

    A class without targets in a resample is left out of the means there, or counts 0 if `official`.

    Args:
        predictions, references, num_classes, official: as `coco_map`.
        images: the unit of the bootstrap of each entry of the lists; left out: each entry is one.
        num_images: number of units; left out: as large as `images` needs.

    Raises:
        ValueError: as `coco_map`.
    """

    def __init__(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        num_classes: int | None = None,
        official: bool = False,
        images: Sequence[int] | None = None,
        num_images: int | None = None,
    ):
        found, targets, num_classes = read_detections(predictions, references, num_classes)
        units, self.num_units = check_units(images, num_images, len(predictions))
        self.detections = PooledDetections(
            found,
            targets,
            num_classes,
            COCO_THRESHOLDS,
            units,
            self.num_units,
            inclusive=True,
            max_detections=MAX_DETECTIONS,
            recall_levels=COCO_RECALL_LEVELS,
        )
        self.official = official
        self.names = ("map", "map50", "map75", "mar100", *(f"ap_class_{label}" for label in range(num_classes)))

    def table(self, counts: np.ndarray) -> np.ndarray:
        """Per class (B, classes, 4): AP over all thresholds, at 0.5, at 0.75, and recall."""
        precision, recall = self.detections(counts)
        columns = [precision.mean(-1), precision[..., 0], precision[..., 5], recall.mean(-1)]
        table = np.stack(columns, axis=-1)
        return np.nan_to_num(table, nan=0.0) if self.official else table

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N) -> values (B, len(names)); see `evaluation.bootstrap.Statistic`."""
        table = self.table(counts)
        return np.concatenate([nanmean(table, axis=1), table[..., 0]], axis=1)


def coco_map(
    predictions: Sequence[Mapping],
    references: Sequence[Mapping],
    num_classes: int | None = None,
    official: bool = False,
) -> dict:
    """COCO's average precision; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: if the two lists differ in length, a dict's arrays differ in length, a box is not finite or has a
            negative size, a score is NaN, or a label is out of range; the entry is named.
    """
    statistic = CocoMapStatistic(predictions, references, num_classes, official)
    counts = np.ones((1, statistic.num_units))
    values = statistic(counts)[0].tolist()
    table = statistic.table(counts)[0]
    num_targets, num_predictions = statistic.detections.num_targets, statistic.detections.num_predictions
    per_class = [
        {
            **{
                name: float(table[label, column]) if num_targets[label] else None
                for column, name in enumerate(("ap", "ap50", "ap75"))
            },
            "ground_truths": int(num_targets[label]),
            "predictions": int(num_predictions[label]),
        }
        for label in range(len(num_targets))
    ]
    means = {
        name: None if np.isnan(value) else value for name, value in zip(statistic.names[:4], values, strict=False)
    }
    return {**means, "per_class": per_class, "classes_defined": int((num_targets > 0).sum())}


class CocoMap(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `coco_map`."""

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
        return coco_map(predictions, references, **kwargs)
