"""Multi-label classification of regions: area under the ROC curve per (region, class) cell and its weighted mean.

A cell (a, c) looks at class c over the images in which region a is present, so knowing the region is no help: a score
that is constant per cell has AUROC 0.5. The weighted mean (wAUROC of the ChEX paper, arXiv 2404.15770) weights cells
by their number of positives.

Usable directly and through `evaluate.load("evaluation/metrics/region_auroc")`, without a network.
"""

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata


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
    cells (regions, classes) nested list of AUROC or None; positives: the counts; samples: number of images.
"""


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Exact area under the ROC curve (probability of ranking a positive first, ties count half); None if undefined."""
    labels = np.asarray(labels).astype(bool)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(np.asarray(scores, dtype=np.float64))
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def region_auroc(predictions: np.ndarray, references: np.ndarray, present: np.ndarray, official: bool = False) -> dict:
    """Cell-wise AUROC; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: if the shapes are not (N, A, C), (N, A, C) and (N, A), or a score of a present region is NaN.
    """
    scores = np.asarray(predictions, dtype=np.float64)
    labels = np.asarray(references)
    mask = np.asarray(present, dtype=bool)
    if scores.ndim != 3 or labels.shape != scores.shape or mask.shape != scores.shape[:2]:
        raise ValueError(
            f"Scores {scores.shape}, labels {labels.shape} and presence {mask.shape} do not fit together; they must "
            "be (images, regions, classes), the same, and (images, regions)."
        )
    if np.isnan(scores[mask]).any():
        raise ValueError("A score of a present region is NaN; give a number for every class of every present region.")
    _, regions, classes = scores.shape
    cells: list[list[float | None]] = [[None] * classes for _ in range(regions)]
    weights = np.zeros((regions, classes))
    positives = np.zeros((regions, classes), dtype=np.int64)
    for region in range(regions):
        for label in range(classes):
            known = mask[:, region] & (labels[:, region, label] >= 0)
            truth = labels[known, region, label] > 0
            positives[region, label] = truth.sum()
            value = auroc(scores[known, region, label], truth)
            if value is None and official and truth.any():
                value = 0.0
            cells[region][label] = value
            weights[region, label] = positives[region, label] if value is not None else 0
    values = np.array([[0.0 if v is None else v for v in row] for row in cells]).reshape(regions, classes)
    per_class = [
        float((values[:, c] * weights[:, c]).sum() / weights[:, c].sum()) if weights[:, c].any() else None
        for c in range(classes)
    ]
    counted = [0.0 if v is None else v for v in per_class if v is not None or official]
    return {
        "weighted": float((values * weights).sum() / weights.sum()) if weights.any() else None,
        "macro": float(np.mean(counted)) if counted else None,
        "per_class": per_class,
        "cells": cells,
        "positives": positives.tolist(),
        "samples": len(scores),
    }


class RegionAuroc(evaluate.Metric):
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
