"""Sentence grounding: a phrase of the report as prompt, the boxes whose region score passes a threshold as answer."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from evaluation.metrics.grounding_iou.grounding_iou import grounding_iou

from .base import Batch, EvaluationContext, Task, corners
from .detection import keep_after_nms, scale_boxes


SCALES = (1.0, 0.9, 1.1, 0.8, 1.2, 1.3)
NMS_THRESHOLDS = (0.25, 0.05, 0.1, 0.5)


@dataclass(frozen=True)
class GroundingSettings:
    """Post-processing of grounded phrases: NMS threshold and one factor on width and height of all boxes."""

    nms_threshold: float = 0.25
    scale: float = 1.0


def post_process(boxes: np.ndarray, scores: np.ndarray, settings: GroundingSettings) -> list[dict]:
    """Answers of P phrases: boxes (P, R, 4), scores (P, R) -> boxes (n, 4) and scores (n,) of each."""
    if not len(boxes):
        return []
    boxes = scale_boxes(boxes, np.full((1, 1, 1), settings.scale))
    keep = keep_after_nms(boxes, scores, settings.nms_threshold)
    return [{"boxes": b[k], "scores": s[k]} for b, s, k in zip(boxes, scores, keep, strict=True)]


class SentenceGrounding(Task):
    """mIoU of unions of boxes (micro over the phrases, mean over score thresholds 0.1 to 0.5), and mAP.

    Prompts are the distinct phrases annotated with boxes, in sorted order per image; the post decoder is off.
    """

    name = "sentence_grounding"
    headline = "grounding_miou"

    def __init__(self, context: EvaluationContext):
        super().__init__(context)
        self.settings = GroundingSettings()
        self.tuning: dict | None = None
        self._boxes: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self.references: list[dict] = []
        self.phrases: list[tuple[str, str]] = []

    def update(self, batch: Batch) -> None:
        grounded = [target.grounded_phrases() for target in batch.targets]
        width = max(map(len, grounded), default=0)
        if not width:
            return
        features = self.context.text_features([phrase for phrases in grounded for phrase in phrases])
        mask = torch.tensor([[q < len(phrases) for q in range(width)] for phrases in grounded], device=features.device)
        prompts = features.new_zeros(*mask.shape, features.shape[-1])
        prompts[mask] = features
        output = self.context.model(
            image_features=batch.image_features,
            prompt_features=prompts,
            query_mask=mask,
            use_post_decoder=False,
            clip_boxes=True,
        )
        self._boxes.append(corners(output.region_boxes[mask]))
        self._scores.append(output.region_scores[mask].double().cpu().numpy())
        for target, phrases in zip(batch.targets, grounded, strict=True):
            self.references += [{"boxes": boxes} for boxes in phrases.values()]
            self.phrases += [(target.sample_id, phrase) for phrase in phrases]

    def _answers(self, settings: GroundingSettings) -> list[dict]:
        if not self._boxes:
            return []
        return post_process(np.concatenate(self._boxes), np.concatenate(self._scores), settings)

    def tune(self) -> tuple[GroundingSettings, dict]:
        """Fit scale, then NMS, to the highest mIoU on what was collected (call it on a validation split)."""

        def best(options: list[GroundingSettings]) -> tuple[GroundingSettings, float]:
            values = [
                grounding_iou(self._answers(option), self.references, with_map=False)["miou"] or 0.0
                for option in options
            ]
            index = int(np.argmax(values))
            return options[index], values[index]

        chosen, scale_value = best([GroundingSettings(scale=scale) for scale in SCALES])
        chosen, value = best([GroundingSettings(threshold, chosen.scale) for threshold in NMS_THRESHOLDS])
        return chosen, {"scale": scale_value, "nms": value}

    def compute(self) -> dict:
        answers = self._answers(self.settings)
        scores = grounding_iou(answers, self.references)
        untuned = grounding_iou(self._answers(GroundingSettings()), self.references, with_map=False)
        return {
            "value": scores["miou"],
            **{key: scores[key] for key in ("best_iou", "macro_iou", "iou_at", "map", "map50", "count")},
            "miou_grid_1024": grounding_iou(answers, self.references, grid=1024, with_map=False)["miou"],
            "untuned_miou": untuned["miou"],
            "settings": asdict(self.settings),
            "tuning": self.tuning,
        }
