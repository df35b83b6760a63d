"""Phrase grounding as the ChEX paper scores it (arXiv 2404.15770, sentence grounding): mIoU and mAP.

For a score threshold tau the union of the kept predicted boxes is compared with the union of the target boxes of a
phrase; intersections and unions are summed over all phrases before dividing (micro over the set), and mIoU is the mean
over tau = 0.1, 0.2, ..., 0.5. mAP pools the boxes of all phrases, each (image, phrase) being its own picture.

Usable directly and through `evaluate.load("evaluation/metrics/grounding_iou")`, without a network; the `evaluation`
package must be importable.
"""

from collections.abc import Mapping, Sequence

import datasets
import evaluate
import numpy as np

from evaluation.metrics.detection_map.detection_map import IOU_THRESHOLDS, detection_map


SCORE_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)

_DESCRIPTION = "Union-of-boxes IoU, micro over the set and averaged over score thresholds, and mAP of phrases."
_CITATION = ""
_KWARGS = """
Args:
    predictions: one dict per (image, phrase): boxes (n, 4) xyxy, scores (n).
    references: one dict per (image, phrase): boxes (m, 4) xyxy of the same unit.
    score_thresholds: a box is kept if its score is strictly above.
    grid: None computes areas exactly in any unit; an integer G takes boxes normalised to [0, 1] and truncates their
        corners to a G x G grid, end exclusive (G = 1024 is the official definition).
    iou_thresholds: thresholds of the mAP.
Returns:
    miou: mean over score thresholds; best_iou: the highest of them; iou_at: {threshold: IoU};
    macro_iou: mean over phrases of their own mean over score thresholds, so that small boxes count as much as large;
    map, map50: average precision of the pooled phrases; count: number of phrases.
"""


def union_overlap(boxes: np.ndarray, kept: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area of the intersection and of the union of two unions of boxes, exactly, by coordinate compression.

    Args:
        boxes: (n, 4) xyxy predicted boxes.
        kept: (k, n) bool, which boxes each of k selections keeps.
        targets: (m, 4) xyxy.
    Returns:
        Intersection (k,) and union (k,), float64, in squared units of the boxes.
    """
    every = np.concatenate([boxes, targets])
    if not len(every):
        return np.zeros(len(kept)), np.zeros(len(kept))
    xs = np.unique(every[:, [0, 2]])
    ys = np.unique(every[:, [1, 3]])
    area = np.diff(xs)[:, None] * np.diff(ys)[None, :]

    def cells(rectangles: np.ndarray) -> np.ndarray:
        inside_x = (xs[None, :-1] >= rectangles[:, None, 0]) & (xs[None, 1:] <= rectangles[:, None, 2])
        inside_y = (ys[None, :-1] >= rectangles[:, None, 1]) & (ys[None, 1:] <= rectangles[:, None, 3])
        return inside_x[:, :, None] & inside_y[:, None, :]

    target = cells(targets).any(0)
    predicted = (kept[:, :, None, None] & cells(boxes)[None]).any(1)
    return ((predicted & target) * area).sum((1, 2)), ((predicted | target) * area).sum((1, 2))


def _ratio(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def grounding_iou(
    predictions: Sequence[Mapping],
    references: Sequence[Mapping],
    score_thresholds: Sequence[float] = SCORE_THRESHOLDS,
    grid: int | None = None,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    with_map: bool = True,
) -> dict:
    """Grounding scores; see the module's `_KWARGS`. `with_map=False` leaves the average precision out (for tuning).

    Raises:
        ValueError: if the lists differ in length or a prediction has not one score per box.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: give one dict per phrase in both."
        )
    thresholds = np.asarray(score_thresholds, dtype=np.float64)
    intersection = np.zeros(len(thresholds))
    union = np.zeros(len(thresholds))
    per_phrase = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        boxes = np.asarray(prediction["boxes"], dtype=np.float64).reshape(-1, 4)
        scores = np.asarray(prediction["scores"], dtype=np.float64).reshape(-1)
        targets = np.asarray(reference["boxes"], dtype=np.float64).reshape(-1, 4)
        if len(boxes) != len(scores):
            raise ValueError(f"`predictions[{index}]` has {len(boxes)} boxes and {len(scores)} scores; give one each.")
        if grid is not None:
            boxes, targets = (np.clip(np.trunc(b * grid), 0, grid) for b in (boxes, targets))
        overlap = union_overlap(boxes, scores[None] > thresholds[:, None], targets)
        intersection += overlap[0]
        union += overlap[1]
        per_phrase.append(_ratio(*overlap).mean())
    iou = _ratio(intersection, union)
    result = {
        "miou": float(iou.mean()) if len(predictions) else None,
        "best_iou": float(iou.max()) if len(predictions) else None,
        "iou_at": {f"{t:g}": float(v) for t, v in zip(score_thresholds, iou, strict=True)},
        "macro_iou": float(np.mean(per_phrase)) if per_phrase else None,
        "count": len(predictions),
    }
    if with_map:
        found = detection_map(
            [{**item, "labels": np.zeros(len(item["scores"]), dtype=np.int64)} for item in predictions],
            [{**item, "labels": np.zeros(len(item["boxes"]), dtype=np.int64)} for item in references],
            num_classes=1,
            iou_thresholds=iou_thresholds,
        )
        result |= {"map": found["map"], "map50": found["map50"]}
    return result


class GroundingIou(evaluate.Metric):
    """`evaluate` wrapper of `grounding_iou`."""

    def _info(self) -> evaluate.MetricInfo:
        boxes = datasets.List(datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": {"boxes": boxes, "scores": datasets.List(datasets.Value("float64"))},
                    "references": {"boxes": boxes},
                }
            ),
        )

    def _compute(self, predictions: list, references: list, **kwargs) -> dict:
        return grounding_iou(predictions, references, **kwargs)
