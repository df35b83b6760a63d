"""Classification of boxes into one of several classes (MS-CXR of the ChEX paper, arXiv 2404.15770).

Every annotated box is a sample of one class. AUROC is one-vs-rest per class, then the unweighted mean over classes;
accuracy is the mean over classes of the share of their boxes with the highest score at the right class; MCC is the
multi-class correlation R_K of Gorodkin (2004).

Usable directly and through `evaluate.load("evaluation/metrics/box_auroc")`, without a network; the `evaluation`
package must be importable.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.metrics.boxes import check_units
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.weighted_auroc import WeightedAuroc


_DESCRIPTION = "One-vs-rest AUROC, class-wise accuracy and multi-class MCC of boxes."
_CITATION = ""
_KWARGS = """
Args:
    predictions: one list of class scores (classes) per box.
    references: the class index of each box.
    num_classes: number of classes; left out: that of the scores.
    official: a class without boxes (or all boxes of one class) counts as AUROC 0 in the mean, and an undefined MCC is
        0, as in the official code.
Returns:
    auroc: mean over classes; accuracy: mean over classes with boxes; mcc (None where undefined); per_class: list of
    AUROC or None; accuracy_per_class: list; positives: number of boxes of each class; classes_defined: number of
    classes with an AUROC; samples: number of boxes.
"""


class BoxAurocStatistic:
    """AUROC, accuracy and MCC of boxes for bootstrapping.

    `names`: auroc, accuracy, mcc, and auroc_class_0, auroc_class_1, ...

    The unit is the box unless `images` is given. Boxes of one image are alike, so that drawing boxes (as the official
    code does) makes intervals too narrow; pass `images`.

    Args:
        predictions, references, num_classes, official: as `box_auroc`.
        images: the image of each box.
        num_images: number of images; left out: as large as `images` needs.

    Raises:
        ValueError: as `box_auroc`.
    """

    def __init__(
        self,
        predictions: np.ndarray,
        references: Sequence[int],
        num_classes: int | None = None,
        official: bool = False,
        images: Sequence[int] | None = None,
        num_images: int | None = None,
    ):
        scores, given = np.asarray(predictions, dtype=np.float64), np.asarray(references).reshape(-1)
        if not scores.size:
            scores = scores.reshape(0, scores.shape[1] if scores.ndim == 2 else num_classes or 0)
        if scores.ndim != 2 or len(scores) != len(given):
            raise ValueError(
                f"Scores {scores.shape} and labels {given.shape} do not fit together; they must be (boxes, classes) "
                "and (boxes,)."
            )
        if num_classes is None:
            num_classes = scores.shape[1]
        if scores.shape[1] != num_classes:
            raise ValueError(f"Boxes have {scores.shape[1]} scores each, but num_classes is {num_classes}.")
        wrong = np.isnan(scores).any(1)
        if wrong.any():
            raise ValueError(f"`predictions[{int(wrong.argmax())}]` has a NaN score; give a number for every class.")
        labels = given.astype(np.int64)
        wrong = (labels != given) | (labels < 0) | (labels >= num_classes)
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"`references[{index}]` is {given[index]}; labels are class indices from 0 to {num_classes - 1}."
            )
        units, self.num_units = check_units(images, num_images, len(labels))
        self.official = official
        self.positives = np.bincount(labels, minlength=num_classes)
        self.names = ("auroc", "accuracy", "mcc", *(f"auroc_class_{label}" for label in range(num_classes)))
        self._areas = WeightedAuroc(self.num_units)
        for label in range(num_classes):
            self._areas.add(scores[:, label], labels == label, units)
        predicted = scores.argmax(1) if len(labels) else labels
        cells = (units * num_classes + labels) * num_classes + predicted
        self._confusion = np.bincount(cells, minlength=self.num_units * num_classes**2).astype(np.float64)
        self._confusion = self._confusion.reshape(self.num_units, num_classes**2)
        self.num_classes = num_classes

    def table(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and accuracy of each class, both (B, classes), NaN where undefined."""
        confusion = self._confusion_of(counts)
        return self._areas(counts)[0], _quotient(np.einsum("bkk->bk", confusion), confusion.sum(2))

    def _confusion_of(self, counts: np.ndarray) -> np.ndarray:
        """(B, classes, classes): true class, predicted class."""
        weighted = check_counts(counts, self.num_units) @ self._confusion
        return weighted.reshape(len(weighted), self.num_classes, self.num_classes)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N) -> values (B, len(names)); see `evaluation.bootstrap.Statistic`."""
        areas, accuracy = self.table(counts)
        correlation = matthews_correlation(self._confusion_of(counts))
        if self.official:
            areas, correlation = np.nan_to_num(areas, nan=0.0), np.nan_to_num(correlation, nan=0.0)
        return np.column_stack([_nanmean(areas), _nanmean(accuracy), correlation, areas])


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _nanmean(values: np.ndarray) -> np.ndarray:
    return _quotient(np.nan_to_num(values, nan=0.0).sum(1), (~np.isnan(values)).sum(1))


def matthews_correlation(confusion: np.ndarray) -> np.ndarray:
    """R_K of confusion matrices (B, classes, classes) -> (B,); NaN if all samples have, or are called, one class."""
    total = confusion.sum((1, 2))
    true, predicted = confusion.sum(2), confusion.sum(1)
    covariance = np.einsum("bkk->b", confusion) * total - (true * predicted).sum(1)
    spread = (total**2 - (predicted**2).sum(1)) * (total**2 - (true**2).sum(1))
    return _quotient(covariance, np.sqrt(np.maximum(spread, 0.0)))


def box_auroc(
    predictions: np.ndarray, references: Sequence[int], num_classes: int | None = None, official: bool = False
) -> dict:
    """Scores of box classification; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: if the shapes are not (boxes, classes) and (boxes,), a score is NaN, or a label is out of range.
    """
    statistic = BoxAurocStatistic(predictions, references, num_classes, official)
    counts = np.ones((1, statistic.num_units))
    values = statistic(counts)[0]
    areas, accuracy = (part[0] for part in statistic.table(counts))

    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    return {
        **{name: plain(value) for name, value in zip(statistic.names[:3], values[:3], strict=True)},
        "per_class": [plain(value) for value in areas],
        "accuracy_per_class": [plain(value) for value in accuracy],
        "positives": statistic.positives.tolist(),
        "classes_defined": int((~np.isnan(areas)).sum()),
        "samples": int(statistic.positives.sum()),
    }


class BoxAuroc(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `box_auroc`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list, **kwargs) -> dict:
        return box_auroc(predictions, references, **kwargs)
