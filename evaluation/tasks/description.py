"""Region description: the box of a region as query, a generated sentence, judged by the findings it states."""

import numpy as np
import torch

from evaluation.metrics.finding_f1.finding_f1 import finding_f1

from .base import Batch, EvaluationContext, Task, centre_boxes


class RegionDescription(Task):
    """Micro-F1 of the positive findings stated about regions, against those of the reference sentences.

    All present regions with a reference sentence count, normal and abnormal ones, so a finding invented about a normal
    region costs precision. `max_normal` limits the normal regions (reference states no finding) to a seeded draw of so
    many per abnormal one; the default keeps all.
    """

    name = "region_description"
    headline = "description_f1"
    needs_text = True

    def __init__(self, context: EvaluationContext, max_normal: float | None = None, seed: int = 0):
        super().__init__(context)
        self.max_normal = max_normal
        self._generator = np.random.default_rng(seed)
        self._features: list[torch.Tensor] = []
        self._references: list[str] = []
        self._labels: list[np.ndarray] = []
        self.examples: list[dict] = []

    def update(self, batch: Batch) -> None:
        context = self.context
        boxes = np.stack([target.anatomy_boxes for target in batch.targets])
        chosen = np.stack([self._choose(target) for target in batch.targets])
        if not chosen.any():
            return
        features = context.model.encode_boxes(
            batch.image_features,
            centre_boxes(boxes, context.device),
            box_mask=torch.from_numpy(chosen).to(context.device),
            use_post_decoder=context.has_post_decoder,
        )
        self._features.append(features[torch.from_numpy(chosen).to(context.device)])
        for image, region in np.argwhere(chosen):
            target = batch.targets[image]
            self._references.append(target.anatomy_sentences[region])
            self._labels.append(target.anatomy_labels[region])

    def _choose(self, target) -> np.ndarray:
        chosen = target.anatomy_present & np.array([bool(text) for text in target.anatomy_sentences])
        if self.max_normal is None:
            return chosen
        abnormal = np.array([1 in self.context.label(text).values() for text in target.anatomy_sentences]) & chosen
        normal = np.flatnonzero(chosen & ~abnormal)
        limit = min(len(normal), int(np.ceil(self.max_normal * max(1, abnormal.sum()))))
        abnormal[self._generator.choice(normal, size=limit, replace=False)] = True
        return abnormal

    def compute(self) -> dict:
        context = self.context
        names = context.prompts.names
        if not self._features:
            return {"value": None, "count": 0}
        texts = context.generate(torch.cat(self._features), "describe regions")
        predicted = [context.label(text) for text in texts]
        reference = [context.label(text) for text in self._references]
        scores = finding_f1(predicted, reference, classes=names)
        stored = [
            {name: int(value) for name, value in zip(names, labels, strict=True) if value in (0, 1)}
            for labels in self._labels
        ]
        abnormal = np.array([1 in labels.values() for labels in reference])
        stated = np.array([1 in labels.values() for labels in predicted])
        self.examples = [
            {"generated": text, "reference": target}
            for text, target in list(zip(texts, self._references, strict=True))[:20]
        ]
        return {
            "value": scores["micro_f1"],
            **{key: scores[key] for key in ("micro_precision", "micro_recall", "macro_f1", "example_f1", "count")},
            "per_class": scores["per_class"],
            "f1_against_stored_labels": finding_f1(predicted, stored, classes=names)["micro_f1"],
            "abnormal_regions": int(abnormal.sum()),
            "abnormality_agreement": float((abnormal == stated).mean()),
            "exact_match": float(np.mean([t == r for t, r in zip(texts, self._references, strict=True)])),
            "distinct_sentences": len(set(texts)),
            "max_normal": self.max_normal,
            "examples": self.examples,
        }
