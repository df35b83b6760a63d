"""Pictures for the report: explained radiographs, and detections with their failures, as plain dicts.

The dicts are those that `evaluation.html_report.write_report` takes; boxes are xyxy pixels of the original image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from evaluation.curves import match_detections, pairwise_iou
from evaluation.predictions import Predictions
from processing_chex.prompt_sets import class_prompts, find_class_set
from processing_chex.vocabulary import ANATOMY_NAMES, REPORT_ANATOMY_INDICES
from training.data.record import record_classes

from .base import Batch, EvaluationContext
from .catalog import PRESETS, TASKS
from .detection import Candidates, DetectionSettings, post_process
from .procedures import Detector, ReportWriter
from .records import Targets, read_targets


PRESENT = 0.5


@torch.inference_mode()
def explain_examples(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    indices: Sequence[int],
    labeler: Callable[[str], Mapping[str, int]],
    settings: Mapping | None = None,
    class_set: str | None = None,
    threshold: float = 0.3,
) -> tuple[list[dict], list[dict]]:
    """Explain images with reports and detect findings in them.

    Args:
        model, processor: as for `evaluation.engine.evaluate_model`.
        dataset: a split in the common record format.
        indices: rows to explain.
        labeler: text -> {finding: 1 / 0 / -1}.
        settings: post-processing of detection, as in the settings of a detection task; left out: the defaults.
        class_set: prompt set of the finding classes; left out: found by their names.
        threshold: detections below this share of the highest score in these images are not drawn.

    Returns:
        `explanations` (empty without a sentence generator) and `detections`, one dict per image each.
    """
    names = record_classes(dataset.features)
    prompts = class_prompts(class_set or find_class_set(names))
    context = EvaluationContext(model, processor)
    was_training = model.training
    model.eval()
    try:
        rows = [dataset[int(index)] for index in indices]
        images = [row["image"] for row in rows]
        frame = processor.image_processor.frame
        targets = [read_targets(row, frame(row["height"], row["width"])) for row in rows]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(context.device)
        batch = Batch(context, model.get_image_features(pixels), targets)
        # of the images that are shown, which may be smaller than the original ones
        frames = [frame(image.height, image.width) for image in images]
        arguments = (context, TASKS["finding_detection"], prompts, PRESETS["phantom"])
        found = Detector(*arguments).predict(batch)
        detections = _detections(found, targets, prompts.names, images, frames, settings, threshold)
        if not context.can_generate:
            return [], detections
        written = ReportWriter(*arguments).predict(batch)
        return _explanations(written, targets, prompts.names, labeler, images, frames), detections
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


def _explanations(
    written: Predictions,
    targets: Sequence[Targets],
    names: Sequence[str],
    labeler: Callable[[str], Mapping[str, int]],
    images: list,
    frames: list,
) -> list[dict]:
    result = []
    prompts = (*names, *(ANATOMY_NAMES[index] for index in REPORT_ANATOMY_INDICES))
    texts, arrays, starts = written.texts["generated"], written.arrays, written.starts
    for number, (target, image, frame) in enumerate(zip(targets, images, frames, strict=True)):
        report = starts[number] + np.flatnonzero(arrays["kept"][starts[number] : starts[number + 1]])
        sentences, stated = [], []
        for index in report:
            boxes, scores = arrays["boxes"][index], arrays["weights"][index]
            shown = scores > PRESENT
            findings = _positive(labeler(texts[index]))
            stated.append(findings)
            sentences.append(
                {
                    "text": texts[index],
                    "prompt": prompts[int(arrays["query"][index])],
                    "boxes": _to_pixels(boxes[shown], frame),
                    "scores": scores[shown].astype(float).round(3).tolist(),
                    "abnormal": bool(findings),
                }
            )

        def answer(findings: set[str], box: np.ndarray | None = None, report=report, stated=stated) -> int | None:
            """The sentence that states one of the findings; among several the one that overlaps the box most."""
            options = [index for index, said in enumerate(stated) if said & findings]
            if box is None or len(options) < 2:
                return options[0] if options else None
            return max(options, key=lambda index: pairwise_iou(box[None], arrays["boxes"][report[index]]).max())

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
        reference = [{"text": text, "sentence": answer(_positive(labeler(text)))} for text in target.sentences]
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
    predictions: Predictions,
    targets: Sequence[Targets],
    names: Sequence[str],
    images: list,
    frames: list,
    settings: Mapping | None,
    threshold: float,
) -> list[dict]:
    found = post_process(Candidates(**predictions.arrays), DetectionSettings(**(settings or {})))
    highest = max((float(item["scores"].max()) for item in found if len(item["scores"])), default=1.0)
    result = []
    for item, target, image, frame in zip(found, targets, images, frames, strict=True):
        order = np.argsort(-item["scores"], kind="stable")
        shown = order[item["scores"][order] >= threshold * highest]
        item = {name: values[shown] for name, values in item.items()}
        references = target.object_references()
        (correct,) = match_detections([item], [references])
        taken = _found(item, references, correct)
        predictions_shown = [
            {"box": box, "label": names[label], "score": round(float(score), 3), "correct": bool(right)}
            for box, label, score, right in zip(
                _to_pixels(item["boxes"], frame), item["labels"], item["scores"], correct, strict=True
            )
        ]
        targets_shown = [
            {"box": box, "label": names[label], "found": bool(was_found)}
            for box, label, was_found in zip(
                _to_pixels(references["boxes"], frame), references["labels"], taken, strict=True
            )
        ]
        result.append(
            {"image": image, "title": target.sample_id, "predictions": predictions_shown, "targets": targets_shown}
        )
    return result


def _found(item: Mapping, references: Mapping, correct: np.ndarray) -> np.ndarray:
    """(m,) which targets a right detection belongs to, each to the free one that it overlaps most."""
    taken = np.zeros(len(references["labels"]), dtype=bool)
    if not len(taken):
        return taken
    overlaps = pairwise_iou(item["boxes"], references["boxes"])
    overlaps[item["labels"][:, None] != references["labels"][None]] = 0.0
    for index in np.flatnonzero(correct):
        taken[np.where(taken, -1.0, overlaps[index]).argmax()] = True
    return taken
