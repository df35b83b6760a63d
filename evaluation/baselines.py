"""Trivial baselines: what can be scored without looking at the image, and a linear probe that does look.

All are fitted on the training split and scored with the same metrics as the model. Where several constant answers are
possible the one that does best on the training split is taken, so that the comparison is not too easy.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from evaluation.metrics.box_iou.box_iou import box_iou
from evaluation.metrics.detection_map.detection_map import detection_map
from evaluation.metrics.finding_f1.finding_f1 import finding_f1
from evaluation.metrics.grounding_iou.grounding_iou import grounding_iou
from evaluation.metrics.region_auroc.region_auroc import region_auroc

from .tasks.records import Targets, iterate_targets


# The findings that a text states: 1 present, 0 denied, -1 uncertain.
LabelText = Callable[[str], Mapping[str, int]]

MIN_PHRASE_COUNT = 5
PROBE_SIZE = 32
PROBE_PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5)


@dataclass
class PriorBoxes:
    """Boxes that depend on the query alone, never on the image.

    Attributes:
        anatomy: (A, 4) mean or median box of each region, whichever localises the training split better.
        classes: C arrays (k, 4), the median box (or pair of boxes) of each class.
        phrases: phrase -> (k, 4) for phrases seen often enough.
    """

    anatomy: np.ndarray
    classes: list[np.ndarray]
    phrases: dict[str, np.ndarray] = field(default_factory=dict)

    def of_phrase(self, phrase: str, label: int) -> np.ndarray:
        return self.phrases.get(phrase, self.classes[label])


def _typical_boxes(groups: Sequence[np.ndarray]) -> np.ndarray:
    """The usual number of boxes per image, from left to right, each the median over the images that have so many."""
    count = Counter(map(len, groups)).most_common(1)[0][0]
    ordered = [boxes[np.argsort(boxes[:, 0], kind="stable")] for boxes in groups if len(boxes) == count]
    return np.median(ordered, axis=0)


def fit_prior_boxes(train: Sequence[Targets], num_classes: int) -> PriorBoxes:
    """Prior boxes from the training targets; a class or region that never occurs gets the whole image."""
    boxes = np.stack([target.anatomy_boxes for target in train])
    present = np.stack([target.anatomy_present for target in train])
    whole = np.array([0.0, 0.0, 1.0, 1.0])
    anatomy = np.tile(whole, (boxes.shape[1], 1))
    for region in range(boxes.shape[1]):
        seen = boxes[present[:, region], region]
        if len(seen):
            options = [seen.mean(0), np.median(seen, axis=0)]
            anatomy[region] = max(options, key=lambda box: box_iou(np.tile(box, (len(seen), 1)), seen)["miou"])

    by_class: dict[int, list[np.ndarray]] = defaultdict(list)
    by_phrase: dict[str, list[np.ndarray]] = defaultdict(list)
    for target in train:
        for label in np.unique(target.object_labels):
            by_class[int(label)].append(target.object_boxes[target.object_labels == label])
        for phrase, phrase_boxes in target.grounded_phrases().items():
            by_phrase[phrase].append(phrase_boxes)
    classes = [_typical_boxes(by_class[c]) if by_class[c] else whole[None] for c in range(num_classes)]
    phrases = {
        phrase: _typical_boxes(groups) for phrase, groups in by_phrase.items() if len(groups) >= MIN_PHRASE_COUNT
    }
    return PriorBoxes(anatomy, classes, phrases)


def _side_boxes(prior: PriorBoxes, train: Sequence[Targets]) -> list[np.ndarray]:
    """Up to two constant detections per class: the median box of its objects in the left and the right half."""
    result = []
    for label, fallback in enumerate(prior.classes):
        boxes = np.concatenate([t.object_boxes[t.object_labels == label] for t in train])
        centre = (boxes[:, 0] + boxes[:, 2]) / 2
        sides = [boxes[centre < 0.5], boxes[centre >= 0.5]]
        found = [np.median(side, axis=0) for side in sides if len(side) >= 0.1 * len(boxes) and len(side)]
        result.append(np.array(found) if found else fallback)
    return result


def score_prior_boxes(prior: PriorBoxes, train: Sequence[Targets], test: Sequence[Targets]) -> dict:
    """`anatomy_miou`, `detection_map50` and `grounding_miou` of the prior boxes, with a few details."""
    present = np.stack([target.anatomy_present for target in test])
    targets = np.stack([target.anatomy_boxes for target in test])[present]
    predicted = np.broadcast_to(prior.anatomy, (*present.shape, 4))[present]

    references = [{"boxes": t.object_boxes, "labels": t.object_labels} for t in test]
    options = {"one box per class": prior.classes, "one box per class and side": _side_boxes(prior, train)}
    train_references = [{"boxes": t.object_boxes, "labels": t.object_labels} for t in train]

    def detect(boxes: list[np.ndarray], wanted: list[dict]) -> dict:
        # Every image gets the same boxes and scores, so they are ranked in the order of the split.
        one = {
            "boxes": np.concatenate(boxes),
            "scores": np.ones(sum(map(len, boxes))),
            "labels": np.repeat(np.arange(len(boxes)), [len(b) for b in boxes]),
        }
        return detection_map([one] * len(wanted), wanted, len(boxes))

    choice = max(options, key=lambda name: detect(options[name], train_references)["map50"] or 0.0)
    detection = detect(options[choice], references)

    answers, class_answers, phrase_references, known = [], [], [], 0
    for target in test:
        for phrase, boxes in target.grounded_phrases().items():
            label = int(target.object_labels[target.object_phrases.index(phrase)])
            answer = prior.of_phrase(phrase, label)
            known += phrase in prior.phrases
            answers.append({"boxes": answer, "scores": np.ones(len(answer))})
            typical = prior.classes[label]
            class_answers.append({"boxes": typical, "scores": np.ones(len(typical))})
            phrase_references.append({"boxes": boxes})
    grounding = grounding_iou(answers, phrase_references)
    by_class = grounding_iou(class_answers, phrase_references)
    return {
        "anatomy_miou": box_iou(predicted, targets)["miou"],
        "detection_map50": detection["map50"],
        "grounding_miou": grounding["miou"],
        "details": {
            "detection": {"kind": choice, "map": detection["map"]},
            "grounding": {
                "kind": "typical boxes of the phrase, of its class where the phrase is rare",
                **{key: grounding[key] for key in ("macro_iou", "map", "map50")},
                "class_prior": {key: by_class[key] for key in ("miou", "macro_iou", "map")},
                "phrases_seen_in_training": known,
                "phrases": len(answers),
            },
        },
    }


def constant_auroc(train: Sequence[Targets], test: Sequence[Targets]) -> float | None:
    """wAUROC of the training prevalence of each (region, class) cell as score: 0.5 wherever it is defined."""
    labels = np.stack([target.anatomy_labels for target in train])
    present = np.stack([target.anatomy_present for target in train])
    positives = ((labels > 0) & present[..., None]).sum(0)
    prevalence = positives / np.maximum(((labels >= 0) & present[..., None]).sum(0), 1)
    test_labels = np.stack([target.anatomy_labels for target in test])
    scores = np.broadcast_to(prevalence, test_labels.shape)
    return region_auroc(scores, test_labels, np.stack([target.anatomy_present for target in test]))["weighted"]


def _most_frequent(texts: Iterable[str]) -> str:
    """The most frequent text; among equals the first in alphabetical order."""
    counts = Counter(text for text in texts if text)
    return min(counts, key=lambda text: (-counts[text], text)) if counts else ""


def region_sentence_baselines(train: Sequence[Targets], labeler: LabelText) -> dict[str, list[str]]:
    """Constant sentences per region: the most frequent one, and the most frequent one that states a finding."""
    regions = len(train[0].anatomy_sentences)
    spoken = [[target.anatomy_sentences[region] for target in train] for region in range(regions)]
    abnormal = [[text for text in texts if 1 in labeler(text).values()] for texts in spoken]
    everywhere = _most_frequent(text for texts in abnormal for text in texts)
    return {
        "most frequent sentence of the region": [_most_frequent(texts) for texts in spoken],
        "most frequent abnormal sentence of the region": [_most_frequent(texts) or everywhere for texts in abnormal],
    }


def _score_region_sentences(sentences: list[str], test: Sequence[Targets], labeler: LabelText, names: Sequence[str]):
    predicted, actual = [], []
    for target in test:
        for region in np.flatnonzero(target.anatomy_present):
            if target.anatomy_sentences[region]:
                predicted.append(labeler(sentences[region]))
                actual.append(labeler(target.anatomy_sentences[region]))
    return finding_f1(predicted, actual, classes=names)


def score_constant_texts(
    train: Sequence[Targets], test: Sequence[Targets], labeler: LabelText, names: Sequence[str]
) -> dict:
    """`description_f1` and `report_f1` of constant texts.

    For each task the most frequent text and the most frequent text that states a finding are candidates; the better on
    the training split counts. For reports the fixed set of findings with the highest training F1 is a third one.
    """
    cache: dict[str, Mapping[str, int]] = {}

    def label(text: str) -> Mapping[str, int]:
        if text not in cache:
            cache[text] = labeler(text)
        return cache[text]

    regions = region_sentence_baselines(train, label)
    region_scores = {name: _score_region_sentences(texts, test, label, names) for name, texts in regions.items()}
    region_choice = max(
        regions, key=lambda name: _score_region_sentences(regions[name], train, label, names)["micro_f1"] or 0.0
    )

    reports = [target.report for target in train]
    frequent = _most_frequent(reports)
    abnormal = _most_frequent(text for text in reports if 1 in label(text).values())
    truth = [label(target.report) for target in train]
    prevalence = {name: np.mean([labels.get(name) == 1 for labels in truth]) for name in names}
    ranked = sorted(names, key=lambda name: -prevalence[name])
    fixed_sets = [dict.fromkeys(ranked[:size], 1) for size in range(1, len(ranked) + 1)]
    best_set = max(fixed_sets, key=lambda s: finding_f1([s] * len(truth), truth, classes=names)["micro_f1"] or 0.0)
    constants = {
        "most frequent report": label(frequent),
        "most frequent abnormal report": label(abnormal),
        "best fixed set of findings": best_set,
    }
    test_truth = [label(target.report) for target in test]

    def report_f1(labels: Mapping[str, int], actual: list[Mapping[str, int]]) -> float | None:
        return finding_f1([labels] * len(actual), actual, classes=names)["micro_f1"]

    report_choice = max(constants, key=lambda name: report_f1(constants[name], truth) or 0.0)
    return {
        "description_f1": region_scores[region_choice]["micro_f1"],
        "report_f1": report_f1(constants[report_choice], test_truth),
        "details": {
            "description": {
                "kind": region_choice,
                "all": {name: scores["micro_f1"] for name, scores in region_scores.items()},
            },
            "report": {
                "kind": report_choice,
                "all": {name: report_f1(labels, test_truth) for name, labels in constants.items()},
                "most_frequent_report": frequent,
                "best_fixed_set": list(best_set),
            },
        },
    }


def pixel_features(dataset: datasets.Dataset, image_processor: object, size: int = PROBE_SIZE) -> np.ndarray:
    """(N, size * size) float32: the network square of every image in grey, downsampled."""
    features = np.empty((len(dataset), size * size), dtype=np.float32)
    for index, record in enumerate(dataset.select_columns("image")):
        image = record["image"].convert("F")
        frame = tuple(int(round(value)) for value in image_processor.frame(image.height, image.width))
        small = image.crop(frame).resize((size, size), Image.Resampling.BOX)
        features[index] = np.asarray(small, dtype=np.float32).reshape(-1)
    return features


def linear_probe_auroc(
    pixels: tuple[np.ndarray, np.ndarray], train: Sequence[Targets], test: Sequence[Targets]
) -> tuple[float | None, float]:
    """wAUROC of a ridge regression from pixels to every (region, class) label, and the penalty it used.

    Args:
        pixels: features of the training (N, F) and the test images (M, F).
        train, test: targets of the same images.

    A fifth of the training images (every fifth one) chooses the penalty; all of them fit the final weights.
    """
    features, test_features = (torch.from_numpy(part).double() for part in pixels)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features, test_features = (features - mean) / deviation, (test_features - mean) / deviation
    labels = np.stack([target.anatomy_labels for target in train])
    present = np.stack([target.anatomy_present for target in train])
    shape = labels.shape[1:]
    outcome = torch.from_numpy(((labels > 0) & present[..., None]).reshape(len(labels), -1).astype(np.float64))

    def fit(rows: np.ndarray, penalty: float) -> torch.Tensor:
        x, y = features[rows], outcome[rows]
        gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
        return torch.linalg.solve(gram, x.T @ (y - y.mean(0)))

    held_out = np.arange(len(features)) % 5 == 4
    best_penalty, best_value = PROBE_PENALTIES[0], -1.0
    for penalty in PROBE_PENALTIES:
        scores = (features[held_out] @ fit(~held_out, penalty)).reshape(-1, *shape).numpy()
        value = region_auroc(scores, labels[held_out], present[held_out])["weighted"] or 0.0
        if value > best_value:
            best_penalty, best_value = penalty, value
    scores = (test_features @ fit(np.ones(len(features), dtype=bool), best_penalty)).reshape(-1, *shape).numpy()
    test_labels = np.stack([target.anatomy_labels for target in test])
    test_present = np.stack([target.anatomy_present for target in test])
    return region_auroc(scores, test_labels, test_present)["weighted"], best_penalty


def score_baselines(
    train_data: datasets.Dataset,
    test_data: datasets.Dataset,
    image_processor: object,
    names: Sequence[str],
    labeler: LabelText | None = None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """
    All baselines: fitted on one split, scored on another.

    Args:
        train_data, test_data: In the common record.
        image_processor: That of the model: scores are computed in its frame.
        names: The finding classes.
        labeler: Reads texts; without one those baselines are left out.

    Returns:
        `anatomy_miou, detection_map50, grounding_miou, region_auroc, description_f1, report_f1`, and details.
    """
    train, test = (list(iterate_targets(part, image_processor)) for part in (train_data, test_data))
    boxes = score_prior_boxes(fit_prior_boxes(train, len(names)), train, test)
    values = {key: boxes[key] for key in ("anatomy_miou", "detection_map50", "grounding_miou")}
    values["region_auroc"] = constant_auroc(train, test)
    pixels = (pixel_features(train_data, image_processor), pixel_features(test_data, image_processor))
    probe, penalty = linear_probe_auroc(pixels, train, test)
    details = {
        **boxes["details"],
        "region_auroc_linear_probe": {"weighted": probe, "penalty": penalty, "pixels": pixels[0].shape[1]},
        "training_images": len(train),
    }
    values |= {"description_f1": None, "report_f1": None}
    if labeler is not None:
        texts = score_constant_texts(train, test, labeler, names)
        values |= {key: texts[key] for key in ("description_f1", "report_f1")}
        details |= texts["details"]
    return values, details
