"""Pictures for the report: explained radiographs, and detections with their failures, as plain dicts.

The dicts are those that `evaluation.html_report.write_report` takes; boxes are xyxy pixels of the original image.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from evaluation.metrics.box_iou.box_iou import pairwise_iou
from processing_chex.prompt_sets import class_prompts, find_class_set
from training.data.record import record_classes

from .base import Batch, EvaluationContext, Labeler
from .detection import DetectionSettings, FindingDetection
from .report import ReportGeneration


PRESENT = 0.5
MATCH_IOU = 0.5


@torch.inference_mode()
def explain_examples(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    indices: Sequence[int],
    labeler: Labeler,
    settings: Mapping | None = None,
    class_set: str | None = None,
    threshold: float = 0.3,
) -> tuple[list[dict], list[dict]]:
    """Explain images with reports and detect findings in them.

    Args:
        model, processor: as for `evaluation.run.evaluate_model`.
        dataset: a split in the common record format.
        indices: rows to explain.
        labeler: text -> {finding: 1 / 0 / -1}.
        settings: post-processing of detection, `metrics["details"]["finding_detection"]["settings"]`.
        class_set: prompt set of the finding classes; left out: found by their names.
        threshold: detections below this share of the highest score in these images are not drawn.

    Returns:
        `explanations` (empty without a sentence generator) and `detections`, one dict per image each.
    """
    context = EvaluationContext(
        model,
        processor,
        class_prompts(class_set or find_class_set(record_classes(dataset.features))),
        labeler,
        progress=False,
    )
    was_training = model.training
    model.eval()
    try:
        rows = dataset.select(list(indices))
        (batch,) = context.batches(rows, max(1, len(rows)), "explain")
        images = [row["image"] for row in rows]
        # of the images that are shown, which may be smaller than the original ones
        frames = [processor.image_processor.frame(image.height, image.width) for image in images]
        detections = _detections(context, batch, images, frames, settings, threshold)
        if not context.can_generate:
            return [], detections
        return _explanations(context, batch, images, frames), detections
    finally:
        model.train(was_training)


def choose_examples(dataset: datasets.Dataset, count: int, seed: int = 0) -> list[int]:
    """Rows worth showing: drawn among those with two or more different findings, then one, then none."""
    columns = dataset.select_columns("objects")
    findings = np.array([len({item["category"] for item in row["objects"]}) for row in columns])
    order = np.random.default_rng(seed).permutation(len(findings))
    ranked = sorted(order.tolist(), key=lambda index: -min(int(findings[index]), 2))
    return ranked[:count]


def _to_pixels(boxes: np.ndarray, frame: Sequence[float]) -> list[list[float]]:
    x0, y0, x1, y1 = frame
    scaled = np.asarray(boxes).reshape(-1, 4) * [x1 - x0, y1 - y0, x1 - x0, y1 - y0] + [x0, y0, x0, y0]
    return np.round(scaled, 2).tolist()


def _positive(labels: Mapping[str, int]) -> set[str]:
    return {name for name, value in labels.items() if value == 1}


def _explanations(context: EvaluationContext, batch: Batch, images: list, frames: list) -> list[dict]:
    task = ReportGeneration(context)
    task.update(batch)
    result = []
    names = context.prompts.names
    for number, (report, target, image, frame) in enumerate(
        zip(task.reports(), batch.targets, images, frames, strict=True)
    ):
        sentences, stated = [], []
        for sentence in report:
            shown = sentence.scores > PRESENT
            findings = _positive(context.label(sentence.text))
            stated.append(findings)
            sentences.append(
                {
                    "text": sentence.text,
                    "prompt": sentence.prompt,
                    "boxes": _to_pixels(sentence.boxes[shown], frame),
                    "scores": sentence.scores[shown].round(3).tolist(),
                    "abnormal": bool(findings),
                }
            )

        def answer(findings: set[str], box: np.ndarray | None = None, report=report, stated=stated) -> int | None:
            """The sentence that states one of the findings; among several the one that overlaps the box most."""
            options = [index for index, said in enumerate(stated) if said & findings]
            if box is None or len(options) < 2:
                return options[0] if options else None
            return max(options, key=lambda index: pairwise_iou(box[None], report[index].boxes).max())

        targets = [
            {
                "box": _to_pixels(box, frame)[0],
                "phrase": phrase or names[label],
                "sentence": answer({names[label]}, box),
            }
            for box, label, phrase in zip(
                target.object_boxes, target.object_labels, target.object_phrases, strict=True
            )
        ]
        reference = [{"text": text, "sentence": answer(_positive(context.label(text)))} for text in target.sentences]
        result.append(
            {
                "image": image,
                "title": f"Radiograph {number + 1} ({target.sample_id})",
                "sentences": sentences,
                "targets": targets,
                "reference": reference,
            }
        )
    return result


def _detections(
    context: EvaluationContext, batch: Batch, images: list, frames: list, settings: Mapping | None, threshold: float
) -> list[dict]:
    task = FindingDetection(context)
    if settings is not None:
        task.settings = DetectionSettings(**settings)
    task.update(batch)
    names = context.prompts.names
    found = task.detections()
    highest = max((float(item["scores"].max()) for item in found if len(item["scores"])), default=1.0)
    result = []
    for item, target, image, frame in zip(found, batch.targets, images, frames, strict=True):
        order = np.argsort(-item["scores"], kind="stable")
        free = np.ones(len(target.object_boxes), dtype=bool)
        predictions = []
        for index in order:
            score, label = float(item["scores"][index]), int(item["labels"][index])
            if score < threshold * highest:
                break
            overlap = pairwise_iou(item["boxes"][index][None], target.object_boxes)[0]
            overlap = np.where(free & (target.object_labels == label), overlap, 0.0)
            correct = bool(len(overlap) and overlap.max() > MATCH_IOU)
            if correct:
                free[overlap.argmax()] = False
            box = _to_pixels(item["boxes"][index], frame)[0]
            predictions.append({"box": box, "label": names[label], "score": round(score, 3), "correct": correct})
        targets = [
            {"box": _to_pixels(box, frame)[0], "label": names[label], "found": bool(not left)}
            for box, label, left in zip(target.object_boxes, target.object_labels, free, strict=True)
        ]
        result.append({"image": image, "title": target.sample_id, "predictions": predictions, "targets": targets})
    return result
