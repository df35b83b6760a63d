"""
Post-processing of detections, and how it is tuned.

Each of the R boxes of a class prompt is a candidate of that class. Its score is its region score, the probability of
the class read from its feature, or their product; boxes may be rescaled per class, and duplicates are merged
(arXiv 2404.15770, object detection). No score threshold is applied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


SCALES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0)
TEMPERATURES = tuple(round(0.05 * step, 2) for step in range(1, 10))
NMS_THRESHOLDS = (0.05, 0.1, 0.25, 0.5)
SCORES = ("weights", "prompts", "product")
MERGES = ("nms", "top1", "envelope", "none")


@dataclass(frozen=True)
class DetectionSettings:
    """Post-processing of detections.

    Attributes:
        score: "weights" (region score), "prompts" (class probability) or "product".
        temperature: of the class probability.
        merge: "nms" (per class), "top1" (best box per class), "envelope" (one box around all R boxes with the highest
            score, the official `top1_boxfusion`) or "none".
        nms_threshold: IoU above which a worse box of the same class is dropped.
        scales: factor on width and height per class, centre fixed; None leaves the boxes alone.
    """

    score: str = "product"
    temperature: float = 0.5
    merge: str = "nms"
    nms_threshold: float = 0.25
    scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in (("score", SCORES), ("merge", MERGES)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature!r}.")
        check_threshold(self.nms_threshold)
        if not all(scale > 0 for scale in self.scales or ()):
            raise ValueError(f"scales must be positive, not {self.scales!r}.")


def check_threshold(nms_threshold: float) -> None:
    """
    Raises:
        ValueError: It is no IoU.
    """
    if not 0 <= nms_threshold <= 1:
        raise ValueError(f"nms_threshold must be an IoU from 0 to 1, not {nms_threshold!r}.")


@dataclass
class Candidates:
    """Raw detections of N images: boxes (N, C, R, 4) xyxy in [0, 1], region scores and class margins (N, C, R).

    The margin is cos(f, q+) - cos(f, q-) of the candidate's feature f and the prompts q of its class.
    """

    boxes: np.ndarray
    weights: np.ndarray
    margins: np.ndarray

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray]) -> "Candidates":
        """From stored predictions; in double precision, as a low temperature makes different margins equal else."""
        return cls(*(arrays[name].astype(np.float64) for name in ("boxes", "weights", "margins")))


def scale_boxes(boxes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Scale boxes xyxy (..., 4) about their centres by `factors` (broadcastable to (..., 1)), clipped to [0, 1]."""
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = (boxes[..., 2:] - boxes[..., :2]) / 2 * factors
    return np.concatenate([centre - half, centre + half], axis=-1).clip(0.0, 1.0)


def keep_after_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression inside groups of R boxes: (G, R, 4), (G, R) -> (G, R) bool, one group = one class."""
    top_left = np.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    bottom_right = np.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    intersection = (bottom_right - top_left).clip(0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1)
    union = area[:, :, None] + area[:, None] - intersection
    overlaps = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0) > threshold
    order = np.argsort(-scores, axis=1, kind="stable")
    keep = np.ones(scores.shape, dtype=bool)
    groups = np.arange(len(boxes))
    for rank in range(boxes.shape[1]):
        current = order[:, rank]
        worse = np.ones_like(keep)
        for earlier in range(rank + 1):
            worse[groups, order[:, earlier]] = False
        keep &= ~(overlaps[groups, current] & worse & keep[groups, current][:, None])
    return keep


def post_process(candidates: Candidates, settings: DetectionSettings) -> list[dict]:
    """Detections per image: boxes (n, 4), scores (n,), labels (n,)."""
    _, classes, regions, _ = candidates.boxes.shape
    if settings.scales is not None and len(settings.scales) != classes:
        raise ValueError(f"These are {len(settings.scales)} scales, but the detections are of {classes} classes.")
    probability = 1 / (1 + np.exp(-candidates.margins / settings.temperature))
    scores = {
        "weights": candidates.weights,
        "prompts": probability,
        "product": candidates.weights * probability,
    }[settings.score]
    boxes = candidates.boxes
    if settings.scales is not None:
        boxes = scale_boxes(boxes, np.asarray(settings.scales)[None, :, None, None])
    if settings.merge == "envelope":
        boxes = np.concatenate([boxes[..., :2].min(2), boxes[..., 2:].max(2)], axis=-1)[:, :, None]
        scores = scores.max(2, keepdims=True)
    elif settings.merge == "top1":
        best = scores.argmax(2)[..., None]
        boxes = np.take_along_axis(boxes, best[..., None], axis=2)
        scores = np.take_along_axis(scores, best, axis=2)
    keep = np.ones(scores.shape, dtype=bool)
    if settings.merge == "nms":
        flat = keep_after_nms(boxes.reshape(-1, regions, 4), scores.reshape(-1, regions), settings.nms_threshold)
        keep = flat.reshape(scores.shape)
    labels = np.broadcast_to(np.arange(classes)[:, None], scores.shape[1:])
    return [
        {"boxes": boxes[i][keep[i]], "scores": scores[i][keep[i]], "labels": labels[keep[i]]}
        for i in range(len(boxes))
    ]


def best_candidate(values: Sequence[float], neutral: int, official: bool) -> int:
    """
    The candidate with the highest value. Of equal ones the `neutral` candidate is taken, or else the first; the
    official code takes the last, which for a class that is never found doubles the boxes (its factors end with 2.0).
    """
    best = max(values)
    tied = [index for index, value in enumerate(values) if value == best]
    if official:
        return tied[-1]
    return neutral if neutral in tied else tied[0]


def tune_detection(
    candidates: Candidates,
    references: Sequence[dict],
    num_classes: int,
    start: DetectionSettings,
    official: bool = False,
) -> tuple[DetectionSettings, list[dict]]:
    """
    The greedy stages of the paper's `optimize_inference` on a validation split, each for the highest mAP: box factor
    of each class, kind of score and its temperature, NMS threshold (where boxes are merged by NMS).

    Args:
        candidates: Raw detections of the validation split.
        references: Its targets, as for `detection_map`.
        num_classes: Number of classes.
        start: Settings to begin with, which also count as candidates.
        official: Leave `start` out of the candidates and take the last of equal ones, as the official code does.

    Returns:
        Settings, and for each stage its name, the mAP of every candidate, and what was chosen.
    """

    from evaluation.metrics.detection_map.detection_map import detection_map  # takes seconds to import

    def score(settings: DetectionSettings) -> dict:
        return detection_map(post_process(candidates, settings), references, num_classes, official=official)

    # Classes do not interact, so that one evaluation per factor tells the best factor of every class.
    results = [score(replace(start, scales=(factor,) * num_classes)) for factor in SCALES]
    table = np.array([[entry["ap"] or 0.0 for entry in result["per_class"]] for result in results])
    neutral = SCALES.index(1.0)
    scales = tuple(SCALES[best_candidate(column, neutral, official)] for column in table.T)
    chosen = replace(start, scales=scales)
    log = [
        {
            "stage": "scales",
            "candidates": {f"{factor:g}": result["map"] for factor, result in zip(SCALES, results, strict=True)},
            "chosen": list(scales),
        }
    ]

    def stage(name: str, options: dict[str, DetectionSettings], current: str) -> None:
        nonlocal chosen
        values = {label: score(option)["map"] for label, option in options.items()}
        labels = list(options)
        index = labels.index(current) if current in labels else 0
        label = labels[best_candidate([value or 0.0 for value in values.values()], index, official)]
        chosen = options[label]
        log.append({"stage": name, "candidates": values, "chosen": label})

    def label_of(settings: DetectionSettings) -> str:
        return "weights" if settings.score == "weights" else f"{settings.score} T={settings.temperature:g}"

    kinds = [replace(chosen, score="weights"), replace(chosen, score="prompts", temperature=1.0)]
    kinds += [replace(chosen, score="product", temperature=temperature) for temperature in TEMPERATURES]
    if not official:
        kinds = [chosen, *kinds]
    stage("score", {label_of(option): option for option in kinds}, label_of(chosen))
    if chosen.merge == "nms":
        options = {f"{threshold:g}": replace(chosen, nms_threshold=threshold) for threshold in NMS_THRESHOLDS}
        stage("nms", options, f"{chosen.nms_threshold:g}")
    return chosen, log


__all__ = [
    "Candidates",
    "DetectionSettings",
    "best_candidate",
    "keep_after_nms",
    "post_process",
    "scale_boxes",
    "tune_detection",
]
