"""Post-processing of grounded sentences, and how it is tuned (arXiv 2404.15770, sentence grounding)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .detection import NMS_THRESHOLDS, SCALES, best_candidate, check_threshold, keep_after_nms, scale_boxes


@dataclass(frozen=True)
class GroundingSettings:
    """Post-processing of grounded phrases: NMS threshold and one factor on width and height of all boxes."""

    nms_threshold: float = 0.25
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_threshold(self.nms_threshold)
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, not {self.scale!r}.")


def post_process_grounding(boxes: np.ndarray, scores: np.ndarray, settings: GroundingSettings) -> list[dict]:
    """Answers of P phrases: boxes (P, R, 4) xyxy in [0, 1], scores (P, R) -> boxes (n, 4) and scores (n,) of each."""
    if not len(boxes):
        return []
    boxes = scale_boxes(boxes, np.full((1, 1, 1), settings.scale))
    keep = keep_after_nms(boxes, scores, settings.nms_threshold)
    return [{"boxes": b[k], "scores": s[k]} for b, s, k in zip(boxes, scores, keep, strict=True)]


def tune_grounding(
    boxes: np.ndarray,
    scores: np.ndarray,
    references: Sequence[np.ndarray],
    start: GroundingSettings,
    official: bool = False,
) -> tuple[GroundingSettings, list[dict]]:
    """
    Fit box factor, then NMS threshold, to the highest mAP on a validation split.

    Args:
        boxes, scores: (P, R, 4) and (P, R), raw answers to P phrases.
        references: Boxes (k, 4) of each phrase.
        start: Settings to begin with.
        official: The official code takes the last of equal candidates, and scores all NMS thresholds with that of
            `start`, so that they are equal and 0.5 always wins.

    Returns:
        Settings, and for each stage its name, the mAP of every candidate, and what was chosen.
    """
    from evaluation.metrics.detection_map.detection_map import detection_map  # takes seconds to import

    targets = [{"boxes": b, "labels": np.zeros(len(b), dtype=np.int64)} for b in references]

    def score(settings: GroundingSettings) -> float:
        answers = post_process_grounding(boxes, scores, settings)
        found = [{**answer, "labels": np.zeros(len(answer["scores"]), dtype=np.int64)} for answer in answers]
        return detection_map(found, targets, num_classes=1)["map"] or 0.0

    chosen, log = start, []
    for name, grid in (("scale", SCALES), ("nms_threshold", NMS_THRESHOLDS)):
        options = [replace(chosen, **{name: value}) for value in grid]
        ignored = official and name == "nms_threshold"
        values = [score(chosen)] * len(options) if ignored else [score(option) for option in options]
        current = getattr(chosen, name)
        neutral = grid.index(current) if current in grid else 0
        chosen = options[best_candidate(values, neutral, official)]
        log.append(
            {
                "stage": "nms" if name == "nms_threshold" else name,
                "candidates": {f"{value:g}": found for value, found in zip(grid, values, strict=True)},
                "chosen": getattr(chosen, name),
            }
        )
    return chosen, log


__all__ = ["GroundingSettings", "post_process_grounding", "tune_grounding"]
