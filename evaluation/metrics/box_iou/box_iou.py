"""Mean intersection over union of matched box pairs (anatomy localisation).

Usable directly (`from evaluation.metrics.box_iou.box_iou import BoxIou`) and through
`evaluate.load("evaluation/metrics/box_iou")`, without a network.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.metrics.boxes import check_boxes, check_units, paired_iou
from evaluation.metrics.checked_batches import CheckedBatches


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


class BoxIouStatistic:
    """Mean IoU of matched pairs for bootstrapping. `names`: miou, and with labels macro_miou.

    Args:
        predictions, references, labels: as `box_iou`.
        images: the unit of the bootstrap of each pair; left out: each pair is one.
        num_images: number of units; left out: as large as `images` needs.

    Raises:
        ValueError: as `box_iou`.
    """

    def __init__(
        self,
        predictions: np.ndarray,
        references: np.ndarray,
        labels: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
        num_images: int | None = None,
    ):
        first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (predictions, references))
        check_boxes(first, "predictions")
        check_boxes(second, "references")
        iou = paired_iou(first, second)
        units, self.num_units = check_units(images, num_images, len(iou))
        inverse = np.zeros(len(iou), dtype=np.int64)
        self.labels = np.zeros(1, dtype=np.int64)
        if labels is not None:
            given = np.asarray(labels)
            if given.shape != iou.shape:
                raise ValueError(f"`labels` has shape {given.shape}, but there are {len(iou)} box pairs; one each.")
            self.labels, inverse = np.unique(given, return_inverse=True)
        self.names = ("miou",) if labels is None else ("miou", "macro_miou")
        shape = (self.num_units, len(self.labels))
        cells = units * len(self.labels) + inverse
        self._sums, self._numbers = (
            # without pairs, `bincount` gives integers whatever the weights
            np.bincount(cells, weights=weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
            for weights in (iou, np.ones(len(iou)))
        )

    def table(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the IoU and number of pairs of each label, both (B, labels)."""
        counts = check_counts(counts, self.num_units)
        return counts @ self._sums, counts @ self._numbers

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N) -> values (B, len(names)); see `evaluation.bootstrap.Statistic`."""
        sums, numbers = self.table(counts)
        total, number = sums.sum(1), numbers.sum(1)
        columns = [np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)]
        if len(self.names) > 1:
            means = np.divide(sums, numbers, out=np.zeros_like(sums), where=numbers > 0)
            defined = (numbers > 0).sum(1)
            columns.append(np.divide(means.sum(1), defined, out=np.full(len(total), np.nan), where=defined > 0))
        return np.stack(columns, axis=1)


def box_iou(predictions: np.ndarray, references: np.ndarray, labels: Sequence[int] | None = None) -> dict:
    """Mean IoU of matched pairs; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: if the numbers of predictions, references and labels differ, or a box is not finite or has a
            negative size.
    """
    statistic = BoxIouStatistic(predictions, references, labels)
    values = [None if np.isnan(value) else float(value) for value in statistic(np.ones((1, statistic.num_units)))[0]]
    result: dict = {"miou": values[0], "count": statistic.num_units}
    if labels is not None:
        sums, numbers = (part[0] for part in statistic.table(np.ones((1, statistic.num_units))))
        result["per_label"] = {
            int(label): {"miou": float(total / number), "count": int(number)}
            for label, total, number in zip(statistic.labels, sums, numbers, strict=True)
        }
        result["macro_miou"] = values[1]
    return result


class BoxIou(CheckedBatches, evaluate.Metric):
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
