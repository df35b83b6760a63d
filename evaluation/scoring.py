"""From the predictions of a task to its result: metrics with intervals, values per class, curves, examples."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.bootstrap import Statistic, point_estimate, resample, summarise
from evaluation.curves import calibration, match_detections, pairwise_iou, precision_recall
from evaluation.examples import Example, make_examples
from evaluation.predictions import PredictionError, Predictions
from evaluation.tasks.catalog import FINDING_METRICS, OPTIONAL_METRICS, Task
from evaluation.tasks.detection import Candidates, post_process
from evaluation.tasks.grounding import post_process_grounding
from evaluation.tasks.records import Targets
from processing_chex.vocabulary import ANATOMY_NAMES, REPORT_ANATOMY_INDICES


if TYPE_CHECKING:
    from evaluation.inference import Job, SplitData
    from evaluation.metrics.meteor.meteor import MeteorProgram
    from evaluation.tuning import Settings

logger = logging.getLogger(__name__)

PRESENT = 0.5  # region score above which a box of a sentence is shown
SHOWN_SCORE = 0.3  # of grounded boxes, as for `iou_at_30`


@dataclass
class Part:
    """
    A statistic of a task.

    Attributes:
        statistic: With the right definition.
        names: Name in the statistic -> name of the metric in results.
        official: With the defects of the official code, where these matter.
    """

    statistic: Statistic
    names: Mapping[str, str]
    official: Statistic | None = None


@dataclass
class Scored:
    """
    What is known of a task before the bootstrap.

    Attributes:
        units: Number of units of the bootstrap; `unit`: what they are.
        parts: Statistics.
        per_class: Rows of the table of classes.
        notes: For people.
        not_computed: Metric -> reason.
        curves: As in results.
        image_scores: (N,) which images to show as failures; NaN for none.
        example: Number of an image -> what is shown of it.
        absent: Metric -> why these data or this labeller do not have it; told only where the metric was named.
    """

    units: int
    unit: str = "image"
    parts: list[Part] = field(default_factory=list)
    per_class: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_computed: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    image_scores: np.ndarray | None = None
    example: Callable[[int], Example] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """`result` as in results.json, and the values of all resamples `raw` (B, metrics)."""

    result: dict[str, Any]
    raw: np.ndarray | None


class Labelers:
    """
    Labellers by their names, RadGraph's annotator and METEOR's program, each loaded once for all tasks; what cannot be
    loaded keeps its reason. A context manager: the program ends with the block.

    Args:
        device: Where they run.
        radgraph: Which annotator, as for `load_annotator`.
    """

    def __init__(self, device: str = "cpu", radgraph: str = "radgraph"):
        self.device, self.radgraph = device, radgraph
        self._found: dict[str, Any] = {}
        self._meteor: MeteorProgram | None = None

    def __enter__(self) -> "Labelers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the program of METEOR, if it runs."""
        if self._meteor is not None:
            self._meteor.close()
            self._meteor = None

    def get(self, spec: str) -> tuple[Any | None, str]:
        """The labeller, or None and why."""
        from evaluation.labelers import LabelerUnavailable, load_labeler

        if spec not in self._found:
            try:
                self._found[spec] = (load_labeler(spec, device=self.device), "")
            except LabelerUnavailable as error:
                self._found[spec] = (None, str(error))
        return self._found[spec]

    def annotator(self) -> tuple[Any | None, str]:
        """RadGraph's annotator, or None and why."""
        from evaluation.metrics.radgraph_f1.radgraph_f1 import load_annotator
        from evaluation.metrics.unavailable import MetricUnavailable

        key = f"annotator {self.radgraph}"
        if key not in self._found:
            try:
                self._found[key] = (load_annotator(self.radgraph, self.device), "")
            except MetricUnavailable as error:
                self._found[key] = (None, str(error))
        return self._found[key]

    def meteor_statistics(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """
        As `MeteorProgram.statistics`, of a program that is started with the first pair and kept for the other tasks.

        Raises:
            MetricUnavailable: Java or the program is missing, or (`MeteorError`) it failed; the next call starts anew.
        """
        from evaluation.metrics.meteor.meteor import NUM_STATISTICS, MeteorError, MeteorProgram

        if not len(candidates):
            return np.zeros((0, NUM_STATISTICS))
        if self._meteor is None:
            self._meteor = MeteorProgram()
        try:
            return self._meteor.statistics(candidates, references)
        except MeteorError:
            self.close()
            raise


@dataclass
class Inputs:
    """Everything that a score is made of."""

    task: Task
    predictions: Predictions
    targets: list[Targets]
    classes: list[str]
    settings: "Settings | None"
    labeler: str | None
    labelers: Labelers
    wanted: tuple[str, ...]

    @property
    def images(self) -> int:
        return len(self.targets)

    def wants(self, *metrics: str) -> bool:
        return any(metric in self.wanted for metric in metrics)

    def check_counts(self, expected: Sequence[int]) -> None:
        """
        Raises:
            PredictionError: An image has another number of predictions than of targets.
        """
        for sample_id, found, wanted in zip(self.predictions.ids, self.predictions.counts, expected, strict=True):
            if found != wanted:
                raise PredictionError(
                    f"{self.task.name}: image {sample_id} has {found} predictions for {wanted} targets. Make the "
                    "predictions again (--overwrite)."
                )


def score_task(
    task: Task,
    predictions: Predictions,
    split: "SplitData",
    job: "Job",
    processor: Any,
    *,
    settings: "Settings | None",
    labeler: str | None,
    labelers: Labelers,
    metrics: Sequence[str] | None = None,
    left_out: Mapping[str, str] | None = None,
    resamples: int = 250,
    seed: int = 0,
    examples: int = 0,
    output: Path | None = None,
) -> Result:
    """
    Score one task.

    Args:
        task: What was asked.
        predictions: Of all images of the split, in order.
        split: The images.
        job: Procedure that has made the predictions.
        processor: Its image processor knows the frame of each image.
        settings: Post-processing.
        labeler: Which labeller reads the texts.
        labelers: All that are loaded.
        metrics: Only these.
        left_out: Metrics of these that are not computed, and why.
        resamples, seed: Of the bootstrap.
        examples: How many examples.
        output: Folder of their pictures.

    Raises:
        PredictionError: Predictions that do not fit the targets.
    """
    chosen = set(task.metrics) - set(OPTIONAL_METRICS) if metrics is None else set(metrics)
    left_out = {name: reason for name, reason in (left_out or {}).items() if name in task.metrics and name in chosen}
    wanted = tuple(name for name in task.metrics if name in chosen and name not in left_out)
    targets = split.targets(job.classes, processor.image_processor)
    inputs = Inputs(task, predictions, targets, job.classes, settings, labeler, labelers, wanted)
    scored = _SCORERS[task.kind](inputs)
    values, raw = _bootstrap(scored, wanted, resamples, seed)
    shown = []
    if examples and scored.example is not None and scored.image_scores is not None and output is not None:
        shown = make_examples(
            split, scored.image_scores, scored.example, examples, seed, output, processor.image_processor
        )
    scored.notes += _class_notes(scored.per_class)
    if metrics is not None:  # who names a metric is told why it is missing
        for name in wanted:
            if name not in values:
                reason = scored.absent.get(name, "these data have nothing to measure it on")
                scored.not_computed.setdefault(name, reason)
    result = {
        "units": scored.units,
        "unit": scored.unit,
        "metrics": values,
        "per_class": scored.per_class,
        "notes": scored.notes,
        "not_computed": {name: reason for name, reason in scored.not_computed.items() if name in wanted} | left_out,
        "curves": scored.curves,
        "examples": shown,
        **scored.extra,
    }
    return Result(result, raw)


def _bootstrap(
    scored: Scored, wanted: Sequence[str], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Any]], np.ndarray | None]:
    """Metric -> its values, in the order of the catalogue; and all resamples (B, metrics)."""
    found: dict[str, tuple[dict[str, Any], np.ndarray]] = {}

    def values_of(statistic: Statistic) -> tuple[np.ndarray, np.ndarray]:
        drawn = resample(statistic, resamples, seed) if resamples else np.zeros((0, len(statistic.names)))
        return point_estimate(statistic), drawn

    for part in scored.parts:
        chosen = {own: name for own, name in part.names.items() if name in wanted}
        if not chosen:
            continue
        points, values = values_of(part.statistic)
        official = values_of(part.official) if part.official is not None else None
        for own, name in chosen.items():
            column = part.statistic.names.index(own)
            entry: dict[str, Any] = summarise(points[column], values[:, column])
            if official is not None and own in part.official.names:
                place = part.official.names.index(own)
                full = summarise(official[0][place], official[1][:, place])
                entry["official"] = {key: full[key] for key in ("value", "mean", "std")}
            found[name] = (entry, values[:, column])
    order = [name for name in wanted if name in found]
    raw = np.stack([found[name][1] for name in order], axis=1) if order and resamples else None
    return {name: found[name][0] for name in order}, raw


def _class_notes(per_class: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes that name the classes without a value, and those that are stated but never right."""
    groups: dict[str, list[str]] = {}
    for row in per_class:
        undefined = all(value is None for key, value in row.items() if key not in ("name", "positives"))
        if undefined:
            lacking = "negatives" if row["positives"] else "positives"
            reason = f"Without {lacking} in this split, so undefined and left out of means"
        elif not row["positives"]:
            reason = "In no reference, but in generated texts, so 0 in means"
        else:
            continue
        groups.setdefault(reason, []).append(row["name"])
    return [f"{reason}: {', '.join(names)}." for reason, names in groups.items()]


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


# -- boxes ------------------------------------------------------------------------------------------------------------


def _score_detection(inputs: Inputs) -> Scored:
    from evaluation.metrics.coco_map.coco_map import CocoMapStatistic
    from evaluation.metrics.detection_map.detection_map import DetectionMapStatistic, detection_map

    candidates = Candidates.read(inputs.predictions.arrays)
    detections = post_process(candidates, inputs.settings)
    references = [target.object_references() for target in inputs.targets]
    count = len(inputs.classes)
    scored = Scored(inputs.images)
    names = {name: name for name in ("map", "map10", "map30", "map50")}
    if inputs.wants(*names):
        scored.parts.append(
            Part(
                DetectionMapStatistic(detections, references, count),
                names,
                DetectionMapStatistic(detections, references, count, official=True),
            )
        )
    if inputs.wants("coco_map"):
        scored.parts.append(Part(CocoMapStatistic(detections, references, count), {"map": "coco_map"}))
    per_class = detection_map(detections, references, count)["per_class"]
    scored.per_class = [
        {"name": name, "positives": row["ground_truths"], "map": row["ap"], "map50": row["ap50"]}
        for name, row in zip(inputs.classes, per_class, strict=True)
    ]
    correct = match_detections(detections, references)
    scores = np.concatenate([found["scores"] for found in detections] or [np.zeros(0)])
    scored.curves = {
        "precision_recall": precision_recall(detections, references, correct, inputs.classes),
        "calibration": calibration(scores, np.concatenate([*correct, np.zeros(0, dtype=bool)])),
    }
    scored.extra = {"classes_defined": sum(row["positives"] > 0 for row in scored.per_class)}
    if without := sum(not len(wanted["labels"]) for wanted in references):
        scored.notes.append(
            f"{without:,} of {inputs.images:,} images have no boxes; they can only add false positives."
        )

    best = []  # of each image, the best detection of each of its classes
    image_scores = np.full(inputs.images, np.nan)
    for image, (found, wanted) in enumerate(zip(detections, references, strict=True)):
        chosen = []
        for label in np.unique(wanted["labels"]):
            of_class = np.flatnonzero(found["labels"] == label)
            ranked = of_class[np.argsort(-found["scores"][of_class], kind="stable")]
            chosen += ranked[: int((wanted["labels"] == label).sum())].tolist()
        best.append(chosen)
        if len(wanted["labels"]):
            overlaps = pairwise_iou(found["boxes"][chosen], wanted["boxes"])
            overlaps[found["labels"][chosen][:, None] != wanted["labels"][None]] = 0.0
            image_scores[image] = overlaps.max(0, initial=0.0).mean()

    def example(image: int) -> Example:
        found, wanted = detections[image], references[image]
        shown = Example()
        for index in best[image]:
            label = int(found["labels"][index])
            shown.add_boxes(
                found["boxes"][index], inputs.classes[label], "prediction", label, found["scores"][index : index + 1]
            )
        for box, label in zip(wanted["boxes"], wanted["labels"], strict=True):
            shown.add_boxes(box, inputs.classes[int(label)], "target", int(label))
        return shown

    scored.image_scores, scored.example = image_scores, example
    return scored


def _score_grounding(inputs: Inputs) -> Scored:
    from evaluation.metrics.grounding_iou.grounding_iou import GroundingIouStatistic

    grounded = [target.grounded_phrases() for target in inputs.targets]
    inputs.check_counts([len(phrases) for phrases in grounded])
    predictions = inputs.predictions
    scored = Scored(inputs.images)
    references = [{"boxes": boxes} for phrases in grounded for boxes in phrases.values()]
    if not references:
        scored.notes.append("No phrase of this split has boxes.")
    answers = (
        post_process_grounding(
            predictions.arrays["boxes"].astype(np.float64),
            predictions.arrays["scores"].astype(np.float64),
            inputs.settings,
        )
        if references
        else []
    )
    owners = predictions.owners
    scored.parts.append(
        Part(
            GroundingIouStatistic(answers, references, images=owners, num_images=inputs.images),
            {"miou": "miou", "best_iou": "best_iou", "iou_at_30": "iou_at_30", "macro_iou": "macro_iou", "map": "map"},
            GroundingIouStatistic(answers, references, images=owners, num_images=inputs.images, official=True),
        )
    )
    scored.extra = {"phrases": len(references)}
    phrase_scores = np.array(
        [
            pairwise_iou(reference["boxes"], answer["boxes"][answer["scores"] > SHOWN_SCORE])
            .max(1, initial=0.0)
            .mean()
            for answer, reference in zip(answers, references, strict=True)
        ]
    )
    scored.image_scores = _mean_by_image(phrase_scores, owners, inputs.images)

    def example(image: int) -> Example:
        shown = Example()
        start = int(predictions.starts[image])
        for group, (phrase, boxes) in enumerate(grounded[image].items()):
            answer = answers[start + group]
            visible = answer["scores"] > SHOWN_SCORE
            shown.add_boxes(answer["boxes"][visible], phrase, "prediction", group, answer["scores"][visible])
            shown.add_boxes(boxes, phrase, "target", group)
            shown.sentences.append({"text": phrase, "prompt": phrase, "group": group})
        return shown

    scored.example = example
    return scored


def _mean_by_image(values: np.ndarray, owners: np.ndarray, images: int) -> np.ndarray:
    """Mean of the units of each image; NaN for an image without units."""
    counts = np.bincount(owners, minlength=images)
    sums = np.bincount(owners, weights=values, minlength=images) if len(values) else np.zeros(images)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _score_localization(inputs: Inputs) -> Scored:
    from evaluation.metrics.box_iou.box_iou import BoxIouStatistic, box_iou, paired_iou

    present = np.stack([target.anatomy_present for target in inputs.targets])
    owners, labels = np.nonzero(present)
    boxes = inputs.predictions.arrays["boxes"][present].astype(np.float64)
    targets = np.stack([target.anatomy_boxes for target in inputs.targets])[present]
    reported = inputs.predictions.arrays["reported"][present]
    scored = Scored(inputs.images)
    if not len(boxes):
        scored.notes.append("No region of this split has a box.")
    scored.parts.append(Part(BoxIouStatistic(boxes, targets, labels, owners, inputs.images), {"miou": "miou"}))
    by_region = box_iou(boxes, targets, labels)["per_label"] if len(boxes) else {}
    scored.per_class = [
        {
            "name": name,
            "positives": int(present[:, region].sum()),
            "miou": by_region[region]["miou"] if region in by_region else None,
        }
        for region, name in enumerate(ANATOMY_NAMES)
    ]
    scored.extra = {
        "miou_if_reported": _number(box_iou(boxes * reported[:, None], targets)["miou"]) if len(boxes) else None,
        "recall": float(reported.mean()) if len(reported) else None,
    }
    scored.image_scores = _mean_by_image(paired_iou(boxes, targets), owners, inputs.images)

    def example(image: int) -> Example:
        shown = Example()
        for region in np.flatnonzero(present[image]):
            name = ANATOMY_NAMES[region]
            shown.add_boxes(inputs.predictions.arrays["boxes"][image, region], name, "prediction", int(region))
            shown.add_boxes(inputs.targets[image].anatomy_boxes[region], name, "target", int(region))
        return shown

    scored.example = example
    return scored


# -- classification ---------------------------------------------------------------------------------------------------


def _score_box_classification(inputs: Inputs) -> Scored:
    from evaluation.metrics.box_auroc.box_auroc import BoxAurocStatistic, box_auroc

    inputs.check_counts([len(target.object_labels) for target in inputs.targets])
    labels = np.concatenate([target.object_labels for target in inputs.targets])
    known = labels >= 0
    owners = inputs.predictions.owners[known]
    margins = inputs.predictions.arrays["margins"][known].astype(np.float64)
    labels = labels[known]
    probabilities = 1 / (1 + np.exp(-margins))
    scored = Scored(inputs.images)
    names = {"auroc": "auroc", "accuracy": "accuracy", "mcc": "mcc"}
    count = len(inputs.classes)
    if not len(labels):
        scored.notes.append("No image of this split has boxes.")
    scored.parts.append(
        Part(
            BoxAurocStatistic(probabilities, labels, count, images=owners, num_images=inputs.images),
            names,
            BoxAurocStatistic(probabilities, labels, count, official=True),
        )
    )
    scored.notes.append("Official values draw single boxes for the bootstrap, the others images with all their boxes.")
    details = box_auroc(probabilities, labels, count)
    scored.per_class = [
        {"name": name, "positives": int((labels == index).sum()), "auroc": details["per_class"][index]}
        for index, name in enumerate(inputs.classes)
    ]
    scored.extra = {"boxes": len(labels)}
    predicted = margins.argmax(1) if len(labels) else labels
    shares = np.exp(margins - margins.max(1, keepdims=True)) if len(labels) else margins
    shares = shares / shares.sum(1, keepdims=True) if len(labels) else shares
    rows = np.arange(len(labels))
    scored.curves = {"calibration": calibration(shares[rows, predicted], predicted == labels)}
    scored.image_scores = _mean_by_image(shares[rows, labels], owners, inputs.images)
    starts = np.searchsorted(owners, np.arange(inputs.images + 1))

    def example(image: int) -> Example:
        shown = Example()
        target = inputs.targets[image]
        boxes = target.object_boxes[target.object_labels >= 0]
        for group, (box, row) in enumerate(zip(boxes, range(starts[image], starts[image + 1]), strict=True)):
            found, wanted = inputs.classes[int(predicted[row])], inputs.classes[int(labels[row])]
            shown.add_boxes(box, f"{found} (is {wanted})", "target", group, [shares[row, predicted[row]]])
        return shown

    scored.example = example
    return scored


def _score_region_classification(inputs: Inputs) -> Scored:
    from evaluation.metrics.region_auroc.region_auroc import RegionAurocStatistic, region_auroc

    margins = inputs.predictions.arrays["margins"].astype(np.float64)
    scores = 1 / (1 + np.exp(-margins))
    present = np.stack([target.anatomy_present for target in inputs.targets])
    labels = _region_labels(inputs)
    scored = Scored(inputs.images)
    scored.parts.append(
        Part(
            RegionAurocStatistic(scores, labels, present),
            {"weighted": "wauroc", "macro": "macro_auroc"},
            RegionAurocStatistic(scores, labels, present, official=True),
        )
    )
    details = region_auroc(scores, labels, present)
    positives = (present[..., None] & (labels > 0)).sum((0, 1))
    scored.per_class = [
        {"name": name, "positives": int(positives[index]), "wauroc": details["per_class"][index]}
        for index, name in enumerate(inputs.classes)
    ]
    known = present[..., None] & (labels >= 0)
    if not known.any():
        scored.notes.append("No region of this split has labels.")
    scored.curves = {"calibration": calibration(scores[known], labels[known] > 0)}
    scored.extra = {"regions": int(present.sum())}
    image_scores = np.full(inputs.images, np.nan)
    for image in range(inputs.images):
        truth = labels[image][known[image]] > 0
        if truth.any() and not truth.all():
            of_image = margins[image][known[image]]
            image_scores[image] = of_image[truth].mean() - of_image[~truth].mean()

    def example(image: int) -> Example:
        shown = Example()
        for region in np.flatnonzero(present[image]):
            truth = [inputs.classes[c] for c in np.flatnonzero(labels[image, region] > 0)]
            if truth:
                best = int(scores[image, region].argmax())
                label = f"{ANATOMY_NAMES[region]}: {', '.join(truth)} (highest: {inputs.classes[best]})"
                box = inputs.targets[image].anatomy_boxes[region]
                shown.add_boxes(box, label, "target", int(region), [scores[image, region, best]])
        return shown

    scored.image_scores, scored.example = image_scores, example
    return scored


def _region_labels(inputs: Inputs) -> np.ndarray:
    """(N, A, C); -1, unknown, for images without labels."""
    labels = np.full((inputs.images, len(ANATOMY_NAMES), len(inputs.classes)), -1, dtype=np.int8)
    for own, target in zip(labels, inputs.targets, strict=True):
        if target.anatomy_labels.shape[1]:
            own[:] = target.anatomy_labels
    return labels


# -- texts ------------------------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """Generated and reference texts of units (regions, reports), the image of each, and whether it is normal."""

    generated: list[str]
    references: list[str]
    owners: np.ndarray
    normal: np.ndarray | None = None


def _score_texts(inputs: Inputs, texts: Texts) -> Scored:
    scored = Scored(inputs.images)
    filled = [index for index, text in enumerate(texts.references) if text.strip()]
    if dropped := len(texts.references) - len(filled):
        scored.notes.append(f"{dropped:,} of {len(texts.references):,} references are empty and left out.")
    texts = Texts(
        [texts.generated[index] for index in filled],
        [texts.references[index] for index in filled],
        texts.owners[filled],
        texts.normal[filled] if texts.normal is not None else None,
    )
    scored.extra = {"texts": len(texts.references), "distinct_texts": len(set(texts.generated))}
    if not texts.references:
        scored.notes.append("There are no reference texts in this split.")
        scored.not_computed = dict.fromkeys(inputs.wanted, "there are no reference texts")
        return scored
    quality = _score_findings(inputs, scored, texts)
    _score_language(inputs, scored, texts)
    _score_graphs(inputs, scored, texts)
    if quality is None:
        quality = np.array([_shared_words(*pair) for pair in zip(texts.generated, texts.references, strict=True)])
    scored.image_scores = _mean_by_image(quality, texts.owners, inputs.images)
    return scored


def _shared_words(generated: str, reference: str) -> float:
    """F1 of the sets of words: tells which texts differ most where no labeller reads them."""
    first, second = set(generated.lower().split()), set(reference.lower().split())
    return 2 * len(first & second) / max(len(first) + len(second), 1)


def _score_findings(inputs: Inputs, scored: Scored, texts: Texts) -> np.ndarray | None:
    """Metrics of the findings that texts state; returns the F1 of each text, or None without a labeller."""
    from evaluation.metrics.clinical_f1.clinical_f1 import ClinicalF1Statistic

    wanted = [name for name in FINDING_METRICS if name in inputs.wanted]
    if not wanted:
        return None
    spec = inputs.labeler or ""
    labeler, reason = inputs.labelers.get(spec)
    if labeler is None:
        own = [name for name in FINDING_METRICS if name.endswith(("_14", "_5")) == spec.startswith("chexbert")]
        scored.not_computed |= {name: reason for name in wanted if name in own}
        scored.absent |= _other_classes(spec, own)
        return None
    arguments = (texts.generated, texts.references, labeler, texts.owners, inputs.images)
    statistic = ClinicalF1Statistic.from_texts(*arguments)
    scored.absent |= _other_classes(spec, [name for name in FINDING_METRICS if name in statistic.names])
    names = {name: name for name in wanted if name in statistic.names}
    scored.parts.append(Part(statistic, names, ClinicalF1Statistic.from_texts(*arguments, official=True)))
    for suffix, part in statistic.parts.items():
        if suffix != "_5":
            scored.per_class = [
                {"name": name, "positives": row["support"], **{key: row[key] for key in ("f1", "precision", "recall")}}
                for name, row in part.class_rows().items()
            ]
    return statistic.pair_f1


def _other_classes(labeler: str, own: Sequence[str]) -> dict[str, str]:
    """Finding metric that a labeller does not have -> why."""
    reason = f"the labeller {labeler} has other classes, so that its metrics are {', '.join(own)}"
    return dict.fromkeys(set(FINDING_METRICS) - set(own), reason)


def _score_language(inputs: Inputs, scored: Scored, texts: Texts) -> None:
    """Metrics of wording."""
    from evaluation.metrics.text_preparation import prepare_pairs
    from evaluation.metrics.unavailable import MetricUnavailable

    pairs = prepare_pairs(texts.generated, texts.references, texts.owners, inputs.images)

    def bleu() -> Statistic:
        from evaluation.metrics.bleu.bleu import BleuStatistic

        return BleuStatistic(pairs)

    def rouge() -> Statistic:
        from evaluation.metrics.rouge_l.rouge_l import RougeLStatistic

        return RougeLStatistic(pairs)

    def meteor() -> Statistic:
        from evaluation.metrics.meteor.meteor import MeteorStatistic

        return MeteorStatistic(
            pairs, texts.normal, inputs.wants("meteor_ratio"), segment_statistics=inputs.labelers.meteor_statistics
        )

    def cider() -> Statistic:
        from evaluation.metrics.cider.cider import CiderStatistic

        return CiderStatistic(pairs, per_image=False)

    makers = {
        ("bleu1", "bleu2", "bleu3", "bleu4"): bleu,
        ("rouge_l",): rouge,
        ("meteor", "meteor_normal", "meteor_abnormal", "meteor_ratio"): meteor,
        ("cider",): cider,
    }
    for names, maker in makers.items():
        if not inputs.wants(*names):
            continue
        try:
            statistic = maker()
            scored.parts.append(Part(statistic, {name: name for name in names if name in statistic.names}))
        except MetricUnavailable as error:
            scored.not_computed |= dict.fromkeys(names, str(error))


def _score_graphs(inputs: Inputs, scored: Scored, texts: Texts) -> None:
    """F1 of entities and relations, where a RadGraph parser is there."""
    if not inputs.wants("radgraph_f1"):
        return
    from evaluation.metrics.radgraph_f1.radgraph_f1 import RadGraphF1Statistic

    annotator, reason = inputs.labelers.annotator()
    if annotator is None:
        scored.not_computed["radgraph_f1"] = reason
        return
    arguments = (texts.generated, texts.references, annotator, texts.owners, inputs.images)
    scored.parts.append(Part(RadGraphF1Statistic.from_texts(*arguments), {"radgraph_f1": "radgraph_f1"}))


def _score_box_description(inputs: Inputs) -> Scored:
    predictions = inputs.predictions
    phrases = [[phrase for phrase in target.object_phrases if phrase] for target in inputs.targets]
    inputs.check_counts([len(of_image) for of_image in phrases])
    references = [phrase for of_image in phrases for phrase in of_image]
    generated = predictions.texts["generated"]
    scored = _score_texts(inputs, Texts(generated, references, predictions.owners))

    def example(image: int) -> Example:
        shown = Example(reference=" ".join(phrases[image]))
        target = inputs.targets[image]
        described = [index for index, phrase in enumerate(target.object_phrases) if phrase]
        start = int(predictions.starts[image])
        for group, index in enumerate(described):
            text = generated[start + group]
            shown.add_boxes(target.object_boxes[index], target.object_phrases[index], "target", group)
            shown.sentences.append({"text": text, "prompt": "box", "group": group})
        shown.generated = " ".join(sentence["text"] for sentence in shown.sentences)
        return shown

    scored.example = example
    return scored


def _score_region_description(inputs: Inputs) -> Scored:
    predictions = inputs.predictions
    described = [np.flatnonzero(target.described_regions()) for target in inputs.targets]
    inputs.check_counts([len(regions) for regions in described])
    references = [
        target.anatomy_sentences[region]
        for target, regions in zip(inputs.targets, described, strict=True)
        for region in regions
    ]
    generated = predictions.texts["generated"]
    normal = None
    if all(target.anatomy_labels.shape[1] for target in inputs.targets):
        normal = np.array(
            [
                not (target.anatomy_labels[region] > 0).any()
                for target, regions in zip(inputs.targets, described, strict=True)
                for region in regions
            ],
            dtype=bool,
        )
    scored = _score_texts(inputs, Texts(generated, references, predictions.owners, normal))

    def example(image: int) -> Example:
        shown = Example()
        target = inputs.targets[image]
        start = int(predictions.starts[image])
        for offset, region in enumerate(described[image]):
            name, group = ANATOMY_NAMES[region], int(region)
            shown.add_boxes(target.anatomy_boxes[region], name, "target", group)
            shown.sentences.append({"text": generated[start + offset], "prompt": name, "group": group})
        shown.generated = " ".join(sentence["text"] for sentence in shown.sentences)
        shown.reference = " ".join(target.anatomy_sentences[region] for region in described[image])
        return shown

    scored.example = example
    return scored


def kept_sentences(predictions: Predictions, image: int) -> np.ndarray:
    """Numbers of the sentences of the report of an image that stay, in the order of the prompts."""
    start, stop = predictions.starts[image : image + 2]
    return start + np.flatnonzero(predictions.arrays["kept"][start:stop])


def _score_reports(inputs: Inputs) -> Scored:
    predictions = inputs.predictions
    sentences = predictions.texts["generated"]
    kept = [kept_sentences(predictions, image) for image in range(inputs.images)]
    reports = [" ".join(sentences[index] for index in of_image) for of_image in kept]
    references = [target.report for target in inputs.targets]
    scored = _score_texts(inputs, Texts(reports, references, np.arange(inputs.images)))
    scored.extra |= {
        "sentences_generated": len(sentences),
        "sentences_per_report": float(np.mean([len(of_image) for of_image in kept])) if kept else None,
    }
    names = (*inputs.classes, *(ANATOMY_NAMES[index] for index in REPORT_ANATOMY_INDICES))

    def example(image: int) -> Example:
        target = inputs.targets[image]
        shown = Example(generated=reports[image], reference=references[image])
        for group, index in enumerate(kept[image]):
            prompt = names[int(predictions.arrays["query"][index])]
            weights = predictions.arrays["weights"][index]
            visible = weights > PRESENT
            shown.add_boxes(predictions.arrays["boxes"][index][visible], prompt, "prediction", group, weights[visible])
            shown.sentences.append({"text": sentences[index], "prompt": prompt, "group": group})
        for box, label, phrase in zip(target.object_boxes, target.object_labels, target.object_phrases, strict=True):
            shown.add_boxes(box, phrase or inputs.classes[int(label)], "target", -1)
        return shown

    scored.example = example
    return scored


_SCORERS: dict[str, Callable[[Inputs], Scored]] = {
    "anatomy_localization": _score_localization,
    "detection": _score_detection,
    "grounding": _score_grounding,
    "box_classification": _score_box_classification,
    "region_classification": _score_region_classification,
    "box_description": _score_box_description,
    "region_description": _score_region_description,
    "report_generation": _score_reports,
}

__all__ = ["Labelers", "Part", "Result", "Scored", "score_task"]
