"""Curves of a task: precision over recall, and how often predictions of a given confidence are right."""

from collections.abc import Mapping, Sequence

import numpy as np


RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
BINS = 10
MATCH_IOU = 0.5


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of boxes (n, 4) with boxes (m, 4), xyxy -> (n, m)."""
    top_left = np.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = np.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = (bottom_right - top_left).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def match_detections(detections: Sequence[Mapping], references: Sequence[Mapping]) -> list[np.ndarray]:
    """
    For the detections (boxes, scores, labels) of each image, whether each finds a target of its class that no better
    one has found, with an IoU above 0.5.
    """
    result = []
    for found, wanted in zip(detections, references, strict=True):
        correct = np.zeros(len(found["scores"]), dtype=bool)
        free = np.ones(len(wanted["labels"]), dtype=bool)
        if len(free) and len(correct):
            overlaps = pairwise_iou(np.asarray(found["boxes"]), np.asarray(wanted["boxes"]))
            overlaps[np.asarray(found["labels"])[:, None] != np.asarray(wanted["labels"])[None]] = 0.0
            for index in np.argsort(-np.asarray(found["scores"]), kind="stable"):
                row = np.where(free, overlaps[index], 0.0)
                best = int(row.argmax())
                if row[best] > MATCH_IOU:
                    correct[index], free[best] = True, False
        result.append(correct)
    return result


def precision_recall(
    detections: Sequence[Mapping], references: Sequence[Mapping], correct: Sequence[np.ndarray], names: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """
    Class name -> recall and (interpolated) precision at IoU 0.5, as far as recall is reached; classes without targets
    are left out. `correct` is from `match_detections`.
    """
    labels = np.concatenate([np.asarray(found["labels"]) for found in detections] or [np.zeros(0, int)])
    scores = np.concatenate([np.asarray(found["scores"]) for found in detections] or [np.zeros(0)])
    hits = np.concatenate([*correct, np.zeros(0, dtype=bool)])
    targets = np.concatenate([np.asarray(wanted["labels"]) for wanted in references] or [np.zeros(0, int)])
    curves = {}
    for label, name in enumerate(names):
        positives = int((targets == label).sum())
        if not positives:
            continue
        chosen = labels == label
        order = np.argsort(-scores[chosen], kind="stable")
        found = np.cumsum(hits[chosen][order])
        recall = found / positives
        precision = found / np.arange(1, len(found) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(recall, RECALL_LEVELS, side="left")
        reached = places < len(recall)
        curves[name] = {
            "recall": RECALL_LEVELS[reached].round(4).tolist(),
            "precision": envelope[places[reached]].round(4).tolist(),
        }
    return curves


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, list]:
    """Mean confidence, share of right predictions and number, in tenths of the confidence; empty ones are left out."""
    bins = np.minimum((np.asarray(confidence) * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = counts > 0
    sums = [np.bincount(bins, weights=values, minlength=BINS)[used] for values in (confidence, correct)]
    return {
        "confidence": (sums[0] / counts[used]).round(4).tolist(),
        "accuracy": (sums[1] / counts[used]).round(4).tolist(),
        "count": counts[used].tolist(),
    }


__all__ = ["calibration", "match_detections", "pairwise_iou", "precision_recall"]
