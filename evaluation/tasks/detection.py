"""Finding detection: one prompt per class, each of its R boxes is a candidate of that class.

The score of a candidate is its region score, the probability of the class read from its feature, or their product;
boxes may be rescaled per class, and duplicates are merged. Which of these to use is fitted on a validation split, one
choice after the other: score, merging, box scale. Unlike in the official code, ties keep the more neutral choice, so a
class that is never found keeps its boxes as they are.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from evaluation.metrics.detection_map.detection_map import detection_map

from .base import Batch, EvaluationContext, Task, corners


TEMPERATURES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
NMS_THRESHOLDS = (0.25, 0.05, 0.1, 0.5)
SCALES = (1.0, 0.9, 1.1, 0.8, 1.2, 1.3, 1.5)
MERGES = ("nms", "top1", "envelope")


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


@dataclass
class Candidates:
    """Raw detections of N images: boxes (N, C, R, 4) xyxy in [0, 1], region scores and class margins (N, C, R).

    The margin is cos(f, q+) - cos(f, q-) of the candidate's feature f and the prompts q of its class.
    """

    boxes: np.ndarray
    weights: np.ndarray
    margins: np.ndarray


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


def tune_detection(candidates: Candidates, references: list[dict], num_classes: int) -> tuple[DetectionSettings, dict]:
    """Settings with the highest mAP@0.5 on a validation split, and a log of the values reached after each stage."""

    def score(settings: DetectionSettings) -> dict:
        return detection_map(post_process(candidates, settings), references, num_classes, iou_thresholds=(0.5,))

    def best(options: list[DetectionSettings]) -> tuple[DetectionSettings, float]:
        values = [score(settings)["map50"] or 0.0 for settings in options]
        index = int(np.argmax(values))
        return options[index], values[index]

    start = DetectionSettings()
    products = [replace(start, temperature=t) for t in TEMPERATURES if t != start.temperature]
    chosen, value = best([start, *products, replace(start, score="weights"), replace(start, score="prompts")])
    log = {"score": value}
    options = [chosen, *(replace(chosen, nms_threshold=t) for t in NMS_THRESHOLDS if t != chosen.nms_threshold)]
    chosen, value = best([*options, *(replace(chosen, merge=merge) for merge in MERGES if merge != chosen.merge)])
    log["merge"] = value

    # Classes do not interact, so one evaluation per factor tells the best factor of every class.
    table = np.array(
        [
            [entry["ap50"] or 0.0 for entry in score(replace(chosen, scales=(factor,) * num_classes))["per_class"]]
            for factor in SCALES
        ]
    )
    scaled = replace(chosen, scales=tuple(SCALES[index] for index in table.argmax(0)))
    log["scales"] = score(scaled)["map50"] or 0.0
    return scaled, log


class FindingDetection(Task):
    """mAP@0.5 of the finding classes over all candidates, without a score threshold; the post decoder is off."""

    name = "finding_detection"
    headline = "detection_map50"

    def __init__(self, context: EvaluationContext):
        super().__init__(context)
        self.settings = DetectionSettings()
        self.tuning: dict | None = None
        self._prompts = context.class_features("box")
        self._positive = context.class_features("positive")
        self._negative = context.class_features("negative")
        self._candidates: list[Candidates] = []
        self.references: list[dict] = []

    def update(self, batch: Batch) -> None:
        model = self.context.model
        output = model(
            image_features=batch.image_features,
            prompt_features=self._prompts,
            use_post_decoder=False,
            clip_boxes=True,
        )
        # (C, 1, 1, D) makes each class read its own candidates (B, C, R, D) only.
        probability = model.classify(
            output.region_features, self._positive[:, None, None], self._negative[:, None, None]
        ).squeeze(-1)
        self._candidates.append(
            Candidates(
                boxes=corners(output.region_boxes),
                weights=output.region_scores.double().cpu().numpy(),
                margins=probability.double().logit(eps=1e-9).cpu().numpy(),
            )
        )
        self.references += [{"boxes": t.object_boxes, "labels": t.object_labels} for t in batch.targets]

    def candidates(self) -> Candidates:
        """All candidates collected so far."""
        return Candidates(
            *(np.concatenate([getattr(c, part) for c in self._candidates]) for part in ("boxes", "weights", "margins"))
        )

    def tune(self) -> tuple[DetectionSettings, dict]:
        """Fit the settings on what was collected (call it on a validation split)."""
        return tune_detection(self.candidates(), self.references, len(self.context.prompts.names))

    def detections(self) -> list[dict]:
        """Post-processed detections per image."""
        return post_process(self.candidates(), self.settings)

    def compute(self) -> dict:
        names = self.context.prompts.names
        scores = detection_map(self.detections(), self.references, len(names))
        official = detection_map(self.detections(), self.references, len(names), official=True)
        untuned = post_process(self.candidates(), DetectionSettings())
        return {
            "value": scores["map50"],
            "map": scores["map"],
            "map10": scores["map10"],
            "map30": scores["map30"],
            "official_map": official["map"],
            "untuned_map50": detection_map(untuned, self.references, len(names), iou_thresholds=(0.5,))["map50"],
            "per_class": dict(zip(names, scores["per_class"], strict=True)),
            "classes_defined": scores["classes_defined"],
            "settings": asdict(self.settings),
            "tuning": self.tuning,
        }
