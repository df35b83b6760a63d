"""Region classification: the annotated box of a region as query, every finding class as a pair of prompts."""

import numpy as np
import torch

from evaluation.metrics.region_auroc.region_auroc import region_auroc

from .base import Batch, EvaluationContext, Task, centre_boxes


class RegionClassification(Task):
    """wAUROC over (region, class) cells; p = sigmoid(cos(f, q+) - cos(f, q-)) with each class's own negative."""

    name = "region_classification"
    headline = "region_auroc"

    def __init__(self, context: EvaluationContext):
        super().__init__(context)
        self._positive = context.class_features("positive")
        self._negative = context.class_features("negative")
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._present: list[np.ndarray] = []

    def update(self, batch: Batch) -> None:
        context = self.context
        boxes = np.stack([target.anatomy_boxes for target in batch.targets])
        present = np.stack([target.anatomy_present for target in batch.targets])
        features = context.model.encode_boxes(
            batch.image_features,
            centre_boxes(boxes, context.device),
            box_mask=torch.from_numpy(present).to(context.device),
            use_post_decoder=context.has_post_decoder,
        )
        scores = context.model.classify(features, self._positive, self._negative)
        self._scores.append(scores.double().cpu().numpy())
        self._labels.append(np.stack([target.anatomy_labels for target in batch.targets]))
        self._present.append(present)

    def compute(self) -> dict:
        scores, labels, present = map(np.concatenate, (self._scores, self._labels, self._present))
        result = region_auroc(scores, labels, present)
        names = self.context.prompts.names
        positives = np.asarray(result["positives"]).sum(0)
        return {
            "value": result["weighted"],
            "macro": result["macro"],
            "official_weighted": region_auroc(scores, labels, present, official=True)["weighted"],
            "per_class": dict(zip(names, result["per_class"], strict=True)),
            "positives": {name: int(count) for name, count in zip(names, positives, strict=True)},
            "count": int(present.sum()),
        }
