"""Anatomy localisation: the name of a region as prompt, its enclosing box against the annotated box."""

import numpy as np

from evaluation.metrics.box_iou.box_iou import box_iou
from processing_chex.vocabulary import ANATOMY_NAMES

from .base import Batch, EvaluationContext, Task, corners


class AnatomyLocalization(Task):
    """Mean IoU over all annotated regions of all images.

    The question is where a region lies, not whether it is there, so the enclosing box of all R region boxes counts
    even where every region score is below the presence threshold. `miou_if_reported` instead counts 0 there, and
    `recall` tells how often an annotated region is reported as present.
    """

    name = "anatomy_localization"
    headline = "anatomy_miou"

    def __init__(self, context: EvaluationContext):
        super().__init__(context)
        self._prompts = context.anatomy_features()
        self._boxes: list[np.ndarray] = []
        self._reported: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._present: list[np.ndarray] = []

    def update(self, batch: Batch) -> None:
        output = self.context.model(
            image_features=batch.image_features, prompt_features=self._prompts, use_post_decoder=False
        )
        regions = corners(output.region_boxes)
        self._boxes.append(np.concatenate([regions[..., :2].min(2), regions[..., 2:].max(2)], axis=-1))
        self._reported.append(output.present.cpu().numpy())
        self._targets.append(np.stack([target.anatomy_boxes for target in batch.targets]))
        self._present.append(np.stack([target.anatomy_present for target in batch.targets]))

    def compute(self) -> dict:
        present = np.concatenate(self._present)
        labels = np.broadcast_to(np.arange(present.shape[1]), present.shape)[present]
        boxes = np.concatenate(self._boxes)[present]
        targets = np.concatenate(self._targets)[present]
        reported = np.concatenate(self._reported)[present]
        scores = box_iou(boxes, targets, labels)
        return {
            "value": scores["miou"],
            "macro_miou": scores["macro_miou"],
            "miou_if_reported": box_iou(boxes * reported[:, None], targets)["miou"],
            "recall": float(reported.mean()) if len(reported) else None,
            "count": scores["count"],
            "per_region": {ANATOMY_NAMES[label]: entry["miou"] for label, entry in scores["per_label"].items()},
        }
