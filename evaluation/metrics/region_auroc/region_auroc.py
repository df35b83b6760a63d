"""Multi-label classification of regions: area under the ROC curve per (region, class) cell and its weighted mean.

A cell (a, c) looks at class c over the images in which region a is present, so knowing the region is no help: a score
that is constant per cell has AUROC 0.5. The weighted mean (wAUROC of the ChEX paper, arXiv 2404.15770) weights cells
by their number of positives.

Usable directly and through `evaluate.load("evaluation/metrics/region_auroc")`, without a network; the
`evaluation` package must be importable.
"""

import datasets
import evaluate
import numpy as np

from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.weighted_auroc import WeightedAuroc


_DESCRIPTION = "AUROC per region-class cell, weighted by positives and macro over classes."
_CITATION = ""
_KWARGS = """
Args:
    predictions: scores, one (regions, classes) array per image.
    references: labels 1 / 0 of the same shape; negative values mean unknown and are left out of their cell.
    present: one (regions) boolean list per image; absent regions are left out.
    official: a cell with positives but no negatives counts as 0 (as the official code does) instead of being left out,
        and a class without positives counts as 0 in the macro mean.
Returns:
    weighted: sum(n * auroc) / sum(n), n = positives of the cell (None if no cell is defined);
    macro: mean over classes of the same weighted mean over regions; per_class: list (None = undefined);
    classes_defined: number of classes with a value;
    cells (regions, classes) nested list of AUROC or None; positives: the counts; samples: number of images.
"""


class RegionAurocStatistic:
    """wAUROC and its macro mean for bootstrapping; the unit is the image. `names`: weighted, macro.

    A cell without both positives and negatives in a resample is left out there (or counts 0, if `official`).

    Args:
        predictions, references, present, official: as `region_auroc`.

    Raises:
        ValueError: as `region_auroc`.
    """

    names = ("weighted", "macro")

    def __init__(self, predictions: np.ndarray, references: np.ndarray, present: np.ndarray, official: bool = False):
        scores = np.asarray(predictions)
        labels = np.asarray(references)
        mask = np.asarray(present, dtype=bool)
        if not scores.size and not labels.size and not mask.size and scores.ndim == 1:  # no images, as an empty list
            scores, labels, mask = np.zeros((0, 0, 0)), np.zeros((0, 0, 0)), mask.reshape(0, 0)
        if scores.ndim != 3 or labels.shape != scores.shape or mask.shape != scores.shape[:2]:
            raise ValueError(
                f"Scores {scores.shape}, labels {labels.shape} and presence {mask.shape} do not fit together; they "
                "must be (images, regions, classes), the same, and (images, regions)."
            )
        wrong = mask & np.isnan(scores).any(2)
        if wrong.any():
            image, region = (int(index) for index in np.argwhere(wrong)[0])
            raise ValueError(
                f"`predictions[{image}][{region}]`, a present region, has a NaN score; give a number for every class "
                "of every present region."
            )
        wrong = mask & ((labels > 1) | ((labels != 0) & (labels < 1) & (labels > -1)) | (labels != labels)).any(2)
        if wrong.any():
            image, region = (int(index) for index in np.argwhere(wrong)[0])
            raise ValueError(
                f"`references[{image}][{region}]` has the labels {labels[image, region].tolist()}; labels are 1, 0 or "
                "negative for unknown."
            )
        self.num_units, self.regions, self.classes = scores.shape
        self.official = official
        self._areas = WeightedAuroc(self.num_units)
        for region in range(self.regions):
            images = np.flatnonzero(mask[:, region])
            of_region, truth = scores[images, region].T, labels[images, region].T
            for own, classes in zip(of_region, truth, strict=True):
                known = classes >= 0
                self._areas.add(own[known], classes[known] > 0, images[known])

    def cells(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC (NaN where undefined) and positives of each cell, both (B, regions, classes)."""
        area, positives, _ = self._areas(counts)
        if self.official:
            area = np.where(np.isnan(area) & (positives > 0), 0.0, area)
        shape = (len(area), self.regions, self.classes)
        return area.reshape(shape), positives.reshape(shape)

    def summary(self, area: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cells -> weighted (B,), macro (B,) and the weighted mean over regions of each class (B, classes)."""
        weights = np.where(np.isnan(area), 0.0, positives)
        products = np.where(np.isnan(area), 0.0, area) * weights
        per_class = _quotient(products.sum(1), weights.sum(1))
        counted = np.nan_to_num(per_class, nan=0.0)
        number = np.full(len(area), float(self.classes)) if self.official else (~np.isnan(per_class)).sum(1)
        return _quotient(products.sum((1, 2)), weights.sum((1, 2))), _quotient(counted.sum(1), number), per_class

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N) -> values (B, 2); see `evaluation.bootstrap.Statistic`."""
        weighted, macro, _ = self.summary(*self.cells(counts))
        return np.stack([weighted, macro], axis=1)


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def region_auroc(predictions: np.ndarray, references: np.ndarray, present: np.ndarray, official: bool = False) -> dict:
    """Cell-wise AUROC; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: if the shapes are not (N, A, C), (N, A, C) and (N, A), a score of a present region is NaN, or a
            label of a present region is neither 1, 0 nor negative; the entry is named.
    """
    statistic = RegionAurocStatistic(predictions, references, present, official)
    area, positives = statistic.cells(np.ones((1, statistic.num_units)))
    weighted, macro, per_class = statistic.summary(area, positives)

    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    return {
        "weighted": plain(weighted[0]),
        "macro": plain(macro[0]),
        "per_class": [plain(value) for value in per_class[0]],
        "classes_defined": int((~np.isnan(per_class[0])).sum()),
        "cells": [[plain(value) for value in row] for row in area[0]],
        "positives": positives[0].astype(np.int64).tolist(),
        "samples": statistic.num_units,
    }


class RegionAuroc(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `region_auroc`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(datasets.Value("float64"))),
                    "references": datasets.List(datasets.List(datasets.Value("int8"))),
                    "present": datasets.List(datasets.Value("bool")),
                }
            ),
        )

    def _compute(self, predictions: list, references: list, present: list, **kwargs) -> dict:
        return region_auroc(np.asarray(predictions), np.asarray(references), np.asarray(present), **kwargs)
