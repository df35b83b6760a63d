"""
How a ChEX model behaves as a partner in a dialogue: other wordings, left and right, boxes that are drawn a little off,
a region as text and as box, and a region added to a prompt. docs/interactivity.md defines every measure.

    python evaluation/interactivity.py --model runs/demo/model --data phantom=prepared/phantom --split test \
        --limit 200 --output runs/interactivity
"""

import argparse
import csv
import io
import json
import logging
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bootstrap import bootstrap
from evaluation.command_line import add_option
from evaluation.files import write_text


logger = logging.getLogger(__name__)

JITTER_SIZES = (0.05, 0.1, 0.2, 0.3, 0.5)
IOU_BINS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MAX_FINDINGS, MAX_REGIONS = 4, 6  # of one image; others are left out by chance
LUNG_ZONES = ("upper lung zone", "mid lung zone", "lower lung zone", "apical zone", "hilar structures")
SECTIONS = ("wording", "sides", "jitter", "text_and_box", "added_region")

# Other words for a finding, besides the wordings that every finding gets.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "atelectasis": ("Collapse of lung tissue", "Volume loss"),
    "cardiomegaly": ("Enlarged heart", "Enlarged cardiac silhouette"),
    "consolidation": ("Airspace consolidation", "Consolidated lung"),
    "edema": ("Pulmonary edema", "Fluid in the lungs"),
    "mass": ("Lung mass", "Large focal lesion"),
    "nodule": ("Lung nodule", "Small focal lesion"),
    "pleural effusion": ("Pleural fluid", "Fluid in the pleural space"),
    "effusion": ("Pleural fluid", "Fluid in the pleural space"),
    "pneumothorax": ("Air in the pleural space", "Collapsed lung with free air"),
    "pneumonia": ("Lung infection", "Pneumonic infiltrate"),
    "lung opacity": ("Opacity in the lung", "Airspace opacity"),
    "infiltration": ("Infiltrate", "Lung infiltrate"),
}


def wordings(prompt: str) -> dict[str, str]:
    """
    Kind of wording -> text. The first, "prompt", is the one that is evaluated elsewhere.

    Args:
        prompt: Of a finding, such as "Pleural effusion".
    """
    plain = prompt[:1].lower() + prompt[1:]
    texts = {
        "prompt": prompt,
        "lower case": plain,
        "full stop": f"{prompt}.",
        "sentence": f"There is {plain}.",
        "evidence": f"Evidence of {plain}",
        "question": f"Is there {plain}?",
    }
    others = SYNONYMS.get(prompt.lower(), ())
    return texts | {f"synonym {number}": text for number, text in enumerate(others, start=1)}


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two boxes xyxy."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    common = float(np.clip(high - low, 0, None).prod())
    areas = [float(np.clip(box[2:] - box[:2], 0, None).prod()) for box in (first, second)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def jitter(box: np.ndarray, size: float, generator: np.random.Generator) -> np.ndarray:
    """
    A box as if drawn carelessly: the centre moves by up to `size` times its width and height, and each side length is
    multiplied by up to 1 + `size` or divided by it; then it is clipped to the unit square.

    Args:
        box: xyxy, normalised.
        size: 0 changes nothing.
        generator: Random numbers.
    """
    centre, lengths = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    moved = centre + generator.uniform(-size, size, 2) * lengths
    scaled = lengths * (1 + size) ** generator.uniform(-1, 1, 2)
    drawn = np.concatenate([moved - scaled / 2, moved + scaled / 2]).clip(0.0, 1.0)
    return drawn if (drawn[2:] - drawn[:2] > 1e-3).all() else box


class MeanStatistic:
    """
    Means of values that belong to images, for the bootstrap over images: all values of an image are drawn together.

    Args:
        sums, numbers: (N, M) sum and number of the values of each image and measure.
        names: Of the M measures.
    """

    def __init__(self, sums: np.ndarray, numbers: np.ndarray, names: Sequence[str]):
        self.sums, self.numbers, self.names = sums, numbers, tuple(names)
        self.num_units = len(sums)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Counts (B, N) -> means (B, M), NaN where no value is drawn."""
        counts = np.asarray(counts, dtype=np.float64)
        numbers = counts @ self.numbers
        return np.divide(counts @ self.sums, numbers, out=np.full(numbers.shape, np.nan), where=numbers > 0)


class Tally:
    """Values of measures, by image."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.images = 0

    def add(self, name: str, value: float | bool) -> None:
        """A value about the image that is open; a difference to something undefined, which is NaN, is left out."""
        if np.isfinite(value):
            self.values[name][self.images - 1].append(float(value))

    def open_image(self) -> None:
        self.images += 1

    def statistic(self) -> MeanStatistic:
        names = sorted(self.values)
        sums, numbers = np.zeros((2, self.images, len(names)))
        for column, name in enumerate(names):
            for image, values in self.values[name].items():
                sums[image, column], numbers[image, column] = sum(values), len(values)
        return MeanStatistic(sums, numbers, names)

    def summary(self, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
        """Measure -> mean over all values, bootstrap over images, and how many values and images there are."""
        if not self.values:
            return {}
        statistic = self.statistic()
        entries = bootstrap(statistic, resamples, seed)
        for column, name in enumerate(statistic.names):
            numbers = statistic.numbers[:, column]
            entries[name] |= {"units": int(numbers.sum()), "images": int((numbers > 0).sum())}
        return entries


@dataclass
class Answers:
    """
    What the model says to Q queries about an image.

    Attributes:
        boxes: (Q, 4) best box of each, xyxy, normalised and clipped.
        scores: (Q,) its score.
        features: (Q, D).
        labels: Findings that each sentence asserts and denies; None without sentences.
        sentences: The sentences.
    """

    boxes: np.ndarray
    scores: np.ndarray
    features: np.ndarray
    labels: list[dict[str, int]] | None
    sentences: list[str] | None

    def same_labels(self, first: int, second: int) -> float:
        """1 if the sentences assert the same findings, else 0; NaN without sentences."""
        if self.labels is None:
            return float("nan")
        asserted = [{name for name, value in self.labels[query].items() if value == 1} for query in (first, second)]
        return float(asserted[0] == asserted[1])

    def asserts(self, query: int, finding: str) -> float:
        """1 if the sentence asserts the finding, else 0; NaN without sentences."""
        return float("nan") if self.labels is None else float(self.labels[query].get(finding) == 1)

    def cosine(self, first: int, second: int) -> float:
        a, b = self.features[first], self.features[second]
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / norm if norm > 0 else float("nan")


class Dialogue:
    """
    Asks a model about images.

    Args:
        context: Model, processor, and cached texts.
        labeler: Reads findings in sentences; None: nothing is described.
        max_length: Longest sentence in tokens; None: as the model was saved.
    """

    def __init__(self, context: Any, labeler: Any = None, max_length: int | None = None):
        self.context, self.labeler = context, labeler
        self.generation = {"do_sample": False, "num_beams": 1}
        if max_length is not None:
            self.generation["max_length"] = max_length

    def ask(
        self, image_features: Any, texts: Sequence[str], boxes: np.ndarray | None = None, sentences: bool = True
    ) -> Answers:
        """
        Answers to texts, then boxes.

        Args:
            image_features: Of one image.
            texts: Prompts.
            boxes: (M, 4) xyxy, normalised.
            sentences: Whether to describe.
        """
        from evaluation.tasks.base import centre_boxes, corners

        context = self.context
        queries: dict[str, Any] = {}
        if texts:
            queries["prompt_features"] = context.text_features(texts)
        if boxes is not None and len(boxes):
            queries["query_boxes"] = centre_boxes(np.asarray(boxes), context.device)[None]
        output = context.model(image_features=image_features, clip_boxes=True, **queries)
        regions, scores = corners(output.region_boxes[0]), output.region_scores[0].float().cpu().numpy()
        best = scores.argmax(-1)
        rows = np.arange(len(best))
        described = labels = None
        if sentences and self.labeler is not None:
            described = context.generate(output.query_features[0], **self.generation)
            labels = self.labeler(described)
        features = output.query_features[0].float().cpu().numpy()
        return Answers(regions[rows, best], scores[rows, best], features, labels, described)


@dataclass
class FindingUnit:
    """A finding class of an image: its boxes, and the side of the patient that all of them are on, if it is one."""

    index: int
    prompt: str
    label: str
    boxes: np.ndarray
    side: str | None


class Analysis:
    """
    All measures, image by image.

    Args:
        dialogue: Asks the model.
        prompts: `PromptSet` of the finding classes of the data.
        labels: Name of each class in the labeller, None where it has none.
        sections: Which parts to measure.
        seed: Of jitter and of the choice of units.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        prompts: Any,
        labels: Sequence[str | None],
        sections: Sequence[str] = SECTIONS,
        seed: int = 0,
    ):
        from processing_chex.prompt_sets import anatomy_prompts
        from processing_chex.vocabulary import ANATOMY_NAMES

        self.dialogue, self.sections = dialogue, sections
        self.prompts = [prompts.box[name][0] for name in prompts.names]
        self.labels = list(labels)
        self.regions = list(ANATOMY_NAMES)
        self.region_prompts = {name: anatomy_prompts()[name][0] for name in self.regions}
        self.synonyms = {name: anatomy_prompts(synonyms=True)[name][1:] for name in self.regions}
        self.seed = seed
        self.tally = Tally()

    def add_image(self, target: Any, image_features: Any, mirrored: Any = None) -> None:
        """
        Measure one image.

        Args:
            target: Annotations, `evaluation.tasks.records.Targets`.
            image_features: Of the image and, if left and right are measured, of the `mirrored` image.
        """
        self.tally.open_image()
        generator = np.random.default_rng([self.seed, self.tally.images])
        findings = self.findings(target)
        if len(findings) > MAX_FINDINGS:
            kept = sorted(generator.choice(len(findings), MAX_FINDINGS, replace=False))
            findings = [findings[index] for index in kept]
        present = np.flatnonzero(target.anatomy_present)
        chosen = sorted(generator.permutation(present)[:MAX_REGIONS])
        regions = {self.regions[index]: target.anatomy_boxes[index] for index in chosen}
        if "wording" in self.sections:
            self.wording(image_features, findings, regions)
        if "sides" in self.sections:
            self.sides(image_features, mirrored, findings, target)
        if "jitter" in self.sections:
            self.jitter(image_features, findings, regions, generator)
        if "text_and_box" in self.sections:
            self.text_and_box(image_features, target)
        if "added_region" in self.sections:
            self.added_region(image_features, findings, target)

    def findings(self, target: Any) -> list[FindingUnit]:
        """Finding classes with boxes in the image."""
        middle = self.middle(target)
        units = []
        for index in sorted(set(target.object_labels[target.object_labels >= 0].tolist())):
            boxes = target.object_boxes[target.object_labels == index]
            right, left = (boxes[:, 2] <= middle).all(), (boxes[:, 0] >= middle).all()
            side = "right" if right else "left" if left else None
            units.append(FindingUnit(index, self.prompts[index], self.labels[index], boxes, side))
        return units

    def middle(self, target: Any) -> float:
        """Where the patient's middle is, 0 to 1: that of the spine, or else of the image."""
        spine = self.regions.index("spine")
        box = target.anatomy_boxes[spine]
        return float((box[0] + box[2]) / 2) if target.anatomy_present[spine] else 0.5

    def is_on(self, side: str, box: np.ndarray, middle: float) -> bool:
        """Whether the centre of a box is on a side of the patient, whose right is the left of the image."""
        return bool(((box[0] + box[2]) / 2 < middle) == (side == "right"))

    def wording(self, features: Any, findings: Sequence[FindingUnit], regions: Mapping[str, np.ndarray]) -> None:
        """Do other words for the same give the same answer?"""
        units = [("finding", unit.label, wordings(unit.prompt), unit.boxes) for unit in findings]
        for name, box in regions.items():
            texts = {"prompt": self.region_prompts[name]}
            texts |= {f"synonym {number}": text for number, text in enumerate(self.synonyms[name], start=1)}
            if len(texts) > 1:
                units.append(("region", None, texts, box[None]))
        answers = self._ask(features, [text for *_, texts, _ in units for text in texts.values()])
        start = 0
        for kind, label, texts, boxes in units:
            reference = best_overlap(answers.boxes[start], boxes)
            self.tally.add(f"wording/{kind}_iou_prompt", reference)
            for query, form in enumerate(texts, start=start):
                iou = best_overlap(answers.boxes[query], boxes)
                if kind == "finding":
                    self.tally.add(f"wording/of_form/{form}", iou)
                    if label is not None:
                        self.tally.add(f"wording/asserted/{form}", answers.asserts(query, label))
                if query == start:
                    continue
                self.tally.add(f"wording/{kind}_iou_others", iou)
                self.tally.add(f"wording/{kind}_box_agreement", overlap(answers.boxes[query], answers.boxes[start]))
                difference = abs(float(answers.scores[query] - answers.scores[start]))
                self.tally.add(f"wording/{kind}_score_difference", difference)
                self.tally.add(f"wording/{kind}_label_agreement", answers.same_labels(query, start))
                if kind == "finding":
                    agreement = overlap(answers.boxes[query], answers.boxes[start])
                    self.tally.add(f"wording/agreement_of_form/{form}", agreement)
            start += len(texts)

    def sides(self, features: Any, mirrored: Any, findings: Sequence[FindingUnit], target: Any) -> None:
        """Does the model look at the side that is asked for, and what does it say of the healthy one?"""
        middle = self.middle(target)
        units = [unit for unit in findings if unit.side is not None]
        texts = []
        for unit in units:
            plain = unit.prompt[:1].lower() + unit.prompt[1:]
            healthy = "left" if unit.side == "right" else "right"
            texts += [unit.prompt, f"{unit.side.capitalize()} {plain}", f"{healthy.capitalize()} {plain}"]
        sided = [name for name in self.regions if name.startswith(("right ", "left ")) and name != "right atrium"]
        answers = self._ask(features, texts)
        for number, unit in enumerate(units):
            plain, asked, other = range(3 * number, 3 * number + 3)
            healthy = "left" if unit.side == "right" else "right"
            add = self.tally.add
            add("sides/plain_iou", best_overlap(answers.boxes[plain], unit.boxes))
            add("sides/diseased_iou", best_overlap(answers.boxes[asked], unit.boxes))
            add("sides/diseased_on_asked_side", self.is_on(unit.side, answers.boxes[asked], middle))
            add("sides/healthy_on_asked_side", self.is_on(healthy, answers.boxes[other], middle))
            add("sides/healthy_iou_with_finding", best_overlap(answers.boxes[other], unit.boxes))
            add("sides/diseased_score", float(answers.scores[asked]))
            add("sides/healthy_score", float(answers.scores[other]))
            add("sides/healthy_scores_lower", bool(answers.scores[other] < answers.scores[asked]))
            if unit.label is not None:
                add("sides/diseased_sentence_asserts", answers.asserts(asked, unit.label))
                add("sides/healthy_sentence_asserts", answers.asserts(other, unit.label))
            if answers.sentences is not None:
                words = answers.sentences[other].lower().replace(".", " ").split()
                add("sides/healthy_sentence_names_diseased_side", unit.side in words and healthy not in words)
        # Boxes alone: what is at the mirrored place, and what has the other side's name?
        texts = [self.region_prompts[name] for name in sided]
        original = self._ask(features, texts, sentences=False)
        for number, name in enumerate(sided):
            if target.anatomy_present[self.regions.index(name)]:
                side = name.split(" ", 1)[0]
                self.tally.add("sides/regions_on_asked_side", self.is_on(side, original.boxes[number], middle))
        if mirrored is None:
            return
        flipped = self._ask(mirrored, [*texts, *(unit.prompt for unit in units)], sentences=False)
        for number, name in enumerate(sided):
            if not target.anatomy_present[self.regions.index(name)]:
                continue
            side, rest = name.split(" ", 1)
            opposite = sided.index(f"{'left' if side == 'right' else 'right'} {rest}")
            box = mirror(flipped.boxes[number])
            self.tally.add("sides/mirrored_region_iou_by_place", overlap(box, original.boxes[opposite]))
            self.tally.add("sides/mirrored_region_iou_by_name", overlap(box, original.boxes[number]))
        for number, _ in enumerate(units):
            box = mirror(flipped.boxes[len(sided) + number])
            self.tally.add("sides/mirrored_finding_iou", overlap(box, answers.boxes[3 * number]))

    def jitter(
        self,
        features: Any,
        findings: Sequence[FindingUnit],
        regions: Mapping[str, np.ndarray],
        generator: np.random.Generator,
    ) -> None:
        """How much may a drawn box be off until the answer changes?"""
        boxes = [box for unit in findings for box in unit.boxes][:MAX_FINDINGS] + list(regions.values())
        if not boxes:
            return
        drawn = np.array([[box, *(jitter(box, size, generator) for size in JITTER_SIZES)] for box in boxes])
        answers = self._ask(features, [], drawn.reshape(-1, 4))
        for number, variants in enumerate(drawn):
            start = number * len(variants)
            for offset, size in enumerate(JITTER_SIZES, start=1):
                query = start + offset
                iou = overlap(variants[offset], variants[0])
                agreement = answers.same_labels(start, query)
                cosine = answers.cosine(start, query)
                key = f"{size:g}"
                self.tally.add(f"jitter/iou/{key}", iou)
                self.tally.add(f"jitter/feature_cosine/{key}", cosine)
                self.tally.add(f"jitter/label_agreement/{key}", agreement)
                if answers.sentences is not None:
                    same = answers.sentences[start] == answers.sentences[query]
                    self.tally.add(f"jitter/same_sentence/{key}", same)
                place = min(int(np.searchsorted(IOU_BINS, iou, side="right")), len(IOU_BINS) - 1)
                key = f"{IOU_BINS[place - 1]:g}-{IOU_BINS[place]:g}"
                self.tally.add(f"jitter/feature_cosine_at_iou/{key}", cosine)
                self.tally.add(f"jitter/label_agreement_at_iou/{key}", agreement)

    def text_and_box(self, features: Any, target: Any) -> None:
        """Is a region the same to the model when it is named and when it is drawn?"""
        present = np.flatnonzero(target.anatomy_present)
        if not len(present):
            return
        texts = [self.region_prompts[self.regions[index]] for index in present]
        boxes = target.anatomy_boxes[present]
        answers = self._ask(features, texts, boxes)
        count = len(present)
        unit = answers.features / np.linalg.norm(answers.features, axis=1, keepdims=True).clip(1e-12)
        cosines = unit[:count] @ unit[count:].T
        for row in range(count):
            self.tally.add("text_and_box/feature_cosine", float(cosines[row, row]))
            if count > 1:
                others = (cosines[row].sum() - cosines[row, row]) / (count - 1)
                self.tally.add("text_and_box/feature_cosine_others", float(others))
                self.tally.add("text_and_box/own_box_is_nearest", bool(cosines[row].argmax() == row))
            self.tally.add("text_and_box/box_iou", overlap(answers.boxes[row], boxes[row]))
            self.tally.add("text_and_box/label_agreement", answers.same_labels(row, count + row))

    def added_region(self, features: Any, findings: Sequence[FindingUnit], target: Any) -> None:
        """Does it help to say where to look?"""
        units, texts = [], []
        for unit in findings:
            if unit.side is None or (zone := self.zone(unit, target)) is None:
                continue
            other = "left" if unit.side == "right" else "right"
            units.append(unit)
            texts += [
                unit.prompt,
                f"{unit.prompt} in the {unit.side} lung",
                f"{unit.prompt} in the {zone}",
                f"{unit.prompt} in the {other} lung",
            ]
        answers = self._ask(features, texts, sentences=False)
        for number, unit in enumerate(units):
            plain, coarse, fine, wrong = (
                best_overlap(answers.boxes[4 * number + offset], unit.boxes) for offset in range(4)
            )
            for name, value in (("plain", plain), ("coarse", coarse), ("fine", fine), ("wrong_side", wrong)):
                self.tally.add(f"added_region/{name}_iou", value)
            self.tally.add("added_region/coarse_gain", coarse - plain)
            self.tally.add("added_region/fine_gain", fine - plain)
            self.tally.add("added_region/wrong_side_gain", wrong - plain)

    def zone(self, unit: FindingUnit, target: Any) -> str | None:
        """The lung zone of its side that overlaps a finding the most."""
        found, most = None, 0.0
        for rest in LUNG_ZONES:
            name = f"{unit.side} {rest}"
            index = self.regions.index(name)
            if target.anatomy_present[index]:
                iou = best_overlap(target.anatomy_boxes[index], unit.boxes)
                if iou > most:
                    found, most = name, iou
        return found

    def _ask(
        self, features: Any, texts: Sequence[str], boxes: np.ndarray | None = None, sentences: bool = True
    ) -> Answers:
        if not texts and (boxes is None or not len(boxes)):
            nothing = np.zeros((0, 4))
            return Answers(nothing, np.zeros(0), nothing, [], [])
        return self.dialogue.ask(features, texts, boxes, sentences)


def best_overlap(box: np.ndarray, targets: np.ndarray) -> float:
    """Highest IoU with any of the targets (n, 4)."""
    return max(overlap(box, target) for target in targets)


def mirror(box: np.ndarray) -> np.ndarray:
    """A box xyxy, normalised, in the mirrored image."""
    return np.array([1 - box[2], box[1], 1 - box[0], box[3]])


# -- a run ------------------------------------------------------------------------------------------------------------


def analyse(
    context: Any,
    split: Any,
    labeler: Any = None,
    sections: Sequence[str] = SECTIONS,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """
    Measure the images of a split.

    Args:
        context: `EvaluationContext`.
        split: `SplitData`.
        labeler: As from `load_labeler`; None: no sentences.
        sections: Some of `SECTIONS`.
        seed: Of everything that is drawn by chance.
        progress: Show a bar.
    """
    import torch
    from tqdm.auto import tqdm

    from evaluation.tasks.records import read_targets
    from processing_chex.prompt_sets import prompts_for_classes

    prompts = prompts_for_classes(split.classes)
    known = {name.lower(): name for name in labeler.classes} if labeler is not None else {}
    labels = [known.get(name.lower()) for name in split.classes]
    positions = getattr(context.model.config.generator_config, "n_positions", None)
    dialogue = Dialogue(context, labeler, positions and min(positions, 128))
    analysis = Analysis(dialogue, prompts, labels, sections, seed)
    frame = context.processor.image_processor.frame
    with torch.inference_mode():
        bar = tqdm(split.dataset, desc="Images", unit="image", disable=None if progress else True)
        for record in bar:
            target = read_targets(record, frame(record["height"], record["width"]))
            pixels = context.processor(images=[record["image"]], return_tensors="pt")["pixel_values"]
            pixels = pixels.to(context.device)
            features = context.model.get_image_features(pixels)
            mirrored = context.model.get_image_features(pixels.flip(-1)) if "sides" in sections else None
            analysis.add_image(target, features, mirrored)
    return analysis


def sections_of(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`section/measure` -> sections of measures."""
    result: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        section, measure = name.split("/", 1)
        result.setdefault(section, {})[measure] = entry
    return result


def to_csv(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each measure."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = ("value", "low", "high", "mean", "std", "undefined", "units", "images")
    table.writerow(("section", "measure", *columns))
    for section, measures in sections.items():
        for name, entry in measures.items():
            table.writerow((section, name, *("" if entry.get(key) is None else entry[key] for key in columns)))
    return text.getvalue()


# -- page -------------------------------------------------------------------------------------------------------------

_TITLES = {
    "wording": (
        "Other words for the same",
        "Boxes, scores and sentences of other wordings of a prompt, against those of the wording that is evaluated "
        "elsewhere; and how well each wording finds the annotated box.",
    ),
    "sides": (
        "Left and right",
        "Findings on one side, asked for with their side and with the other. The right of the patient is the left of "
        "the image. In mirrored images, boxes are mirrored back.",
    ),
    "jitter": (
        "Boxes that are drawn a little off",
        "Annotated boxes, moved and scaled at random: how much of the answer stays.",
    ),
    "text_and_box": (
        "A region as text and as box",
        "The same region, named and drawn: features, sentences, and where the model sees the name.",
    ),
    "added_region": (
        "A region added to the prompt",
        "IoU with the annotated box if the lung or its zone is added to the name of a finding; and the wrong lung.",
    ),
}
_CSS = """
.bars{display:grid;gap:.3rem;max-width:56rem}
.bars div{display:grid;grid-template-columns:minmax(8rem,18rem) 1fr 11rem;gap:.7rem;align-items:center}
.bars svg{width:100%;height:18px;display:block}.bars .track{fill:var(--track)}.bars .bar{fill:var(--accent)}
.bars .range{stroke:var(--ink);stroke-width:1.6}h3{margin:1.3rem 0 .4rem}.bars .number{white-space:nowrap;
font-variant-numeric:tabular-nums;font-size:.88rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.2rem;margin:1rem 0}
.plots figure{margin:0}.plots figcaption{color:var(--soft);font-size:.9rem}
.mark{display:inline-block;margin-right:1rem}.mark i{display:inline-block;width:.8em;height:.8em;
border-radius:2px;margin-right:.35em}
@media(max-width:560px){.bars div{grid-template-columns:1fr 11rem}.bars svg{grid-column:1/-1;grid-row:2}}
"""


def shown_name(measure: str) -> str:
    """A measure for readers."""
    return " ".join("IoU" if word == "iou" else word for word in measure.split("_"))


def bars(measures: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar from 0 to 1 with its interval for each measure; gains, which may be negative, start in the middle."""
    rows = []
    for name, entry in measures.items():
        value, low, high = entry["value"], entry["low"], entry["high"]
        shown = shown_name(name)
        if value is None:
            rows.append(f"<div><span>{escape(shown)}</span><span></span><span class=number>undefined</span></div>")
            continue
        zero, scale = (100.0, 100.0) if name.endswith("gain") else (0.0, 200.0)
        start, end = sorted((zero, zero + value * scale))
        drawing = (
            f'<svg viewBox="0 0 200 18" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="200" '
            f'height="18"/><rect class="bar" x="{start:.1f}" y="3" width="{max(end - start, 0.6):.1f}" height="12"/>'
        )
        text = f"{value:.3f}"
        if low is not None:
            drawing += f'<path class="range" d="M{zero + low * scale:.1f} 9H{zero + high * scale:.1f}"/>'
            text += f" ({low:.2f} to {high:.2f})"
        title = f"{entry['units']:,} values of {entry['images']:,} images"
        rows.append(
            f'<div title="{title}"><span>{escape(shown)}</span>{drawing}</svg><span class=number>{text}</span></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _curves(measures: Mapping[str, Any], names: Iterable[str], middle: bool = False) -> dict[str, list]:
    series: dict[str, list] = {}
    for name in names:
        points = []
        for key, entry in measures.items():
            group, _, place = key.partition("/")
            if group == name and entry["value"] is not None:
                low, _, high = place.partition("-")
                points.append(((float(low) + float(high)) / 2 if middle else float(place), entry["value"]))
        if points:
            series[shown_name(name.removesuffix("_at_iou"))] = sorted(points)
    return series


def render_page(results: Mapping[str, Any]) -> str:
    """One HTML page that loads nothing."""
    from evaluation.figures import line_chart
    from evaluation.page_style import STYLE

    parts = []
    for section in SECTIONS:
        measures = results["measures"].get(section)
        if not measures:
            continue
        title, text = _TITLES[section]
        parts.append(f"<section id={section}><h2>{title}</h2><p>{text}</p>")
        parts.append(bars({name: entry for name, entry in measures.items() if "/" not in name}))
        if section == "wording":
            for group, caption in (
                ("of_form", "IoU with the annotated box, by wording"),
                ("agreement_of_form", "IoU with the box of the evaluated prompt, by wording"),
                ("asserted", "Sentences that assert the finding, by wording"),
            ):
                chosen = {name.split("/")[1]: e for name, e in measures.items() if name.split("/")[0] == group}
                if chosen:
                    parts.append(f"<h3>{caption}</h3>{bars(chosen)}")
        if section == "jitter":
            plots = []
            by_size = _curves(measures, ("iou", "feature_cosine", "label_agreement", "same_sentence"))
            by_iou = _curves(measures, ("feature_cosine_at_iou", "label_agreement_at_iou"), middle=True)
            for series, label in ((by_size, "size of the jitter"), (by_iou, "IoU with the original box")):
                chart = line_chart(
                    series, label, "", description=f"Agreement by {label}", points=list(series), unit_interval=True
                )
                legend = " ".join(
                    f'<span class="mark"><i style="background:var(--t{number})"></i>{escape(name)}</span>'
                    for number, name in enumerate(series)
                )
                plots.append(f"<figure>{chart}<figcaption>{legend}</figcaption></figure>")
            parts.append(f'<div class="plots">{"".join(plots)}</div>')
        parts.append("</section>")
    model, data = results["model"], results["data"]
    facts = (
        f"Model {escape(str(model['name']))} ({escape(str(model['sha256'])[:12])}), {results['images']:,} images of "
        f"{escape(str(data['name']))}, split {escape(str(data['split']))}; seed {results['seed']}, "
        f"{results['resamples']:,} resamples of images; bars show means, lines 95 % intervals."
    )
    notes = "".join(f"<p class=muted>{escape(note)}</p>" for note in results["notes"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Interactivity</title><style>{STYLE}{_CSS}</style></head><body><header>"
        f"<div class=wrap><h1>Interactivity</h1><p class=lead>{facts}</p></div></header><main class=wrap>{notes}"
        f"{''.join(parts)}<h2>Command</h2><pre>{escape(results['command'])}</pre></main><footer class=wrap>"
        "<p>Research software. Not a medical device; not for clinical use.</p></footer></body></html>"
    )


# -- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluation/interactivity.py",
        description="Measure how a ChEX model behaves in a dialogue: wordings, sides, drawn boxes, added regions.",
    )
    add = partial(add_option, parser)
    add("--model", required=True, metavar="DIR", help="folder of the model and its processor")
    add("--data", required=True, metavar="[NAME=]DIR", help="folder of prepared data, or of a phantom")
    add("--split", default="test", help="split that is asked about")
    add("--output", required=True, metavar="DIR", help="folder of the results")
    add("--limit", type=int, default=200, metavar="N", help="only the first N images; 0 takes all")
    add("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="what is measured")
    add("--labeler", default="phantom", metavar="SPEC", help="phantom, chexbert:DIR, package.module:attribute or none")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples of images")
    add("--seed", type=int, default=0, help="of jitter, of the choice of units, and of the bootstrap")
    add("--device", help="left out: a GPU if there is one")
    add("--no-progress", action="store_true", help="show no progress bar")
    add("--debug", action="store_true", help="show the traceback of errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for what the user can mend."""
    arguments = build_parser().parse_args(argv)
    command = shlex.join(["python", "evaluation/interactivity.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        return run(arguments, command)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace, command: str) -> int:
    """What the command line does, once it has been read."""
    import torch

    from evaluation.inference import DataSource, ModelSource
    from evaluation.labelers import LabelerUnavailable, load_labeler
    from evaluation.tasks.base import EvaluationContext

    if arguments.limit < 0 or arguments.bootstrap < 1:
        raise ValueError("--limit must be at least 0 and --bootstrap at least 1.")
    name, _, folder = arguments.data.rpartition("=")
    if not Path(folder).is_dir():
        raise ValueError(f"--data {arguments.data}: {folder} is not a folder. 'chex data prepare NAME' makes one.")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = ModelSource(arguments.model, device=device)
    split = DataSource.open(name or "own", folder).split(arguments.split, arguments.limit or None)
    notes, labeler = [], None
    if not source.can_generate:
        notes.append("The model has no sentence generator: nothing is said about sentences.")
    elif arguments.labeler != "none":
        try:
            labeler = load_labeler(arguments.labeler, device=device)
        except LabelerUnavailable as error:
            notes.append(f"Nothing is said about sentences: {error}.")
    context = EvaluationContext(source.load(), source.processor)
    if not context.independent_queries:
        notes.append("In the official attention of this model, answers depend on what else is asked with them.")
    analysis = analyse(
        context, split, labeler, tuple(arguments.sections), arguments.seed, progress=not arguments.no_progress
    )
    results = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": arguments.seed,
        "resamples": arguments.bootstrap,
        "model": {"path": str(arguments.model), "name": source.name, "sha256": source.sha256},
        "data": {"name": name or "own", "folder": folder, "split": arguments.split, "fingerprint": split.fingerprint},
        "images": analysis.tally.images,
        "labeler": labeler.name if labeler is not None else None,
        "notes": notes,
        "measures": sections_of(analysis.tally.summary(arguments.bootstrap, arguments.seed)),
    }
    output = Path(arguments.output)
    paths = [
        write_text(output / "interactivity.json", json.dumps(results, indent=2, allow_nan=False) + "\n"),
        write_text(output / "interactivity.csv", to_csv(results["measures"])),
        write_text(output / "interactivity.html", render_page(results)),
    ]
    print("\n".join(f"Written: {path}" for path in paths))
    return 0


__all__ = [
    "Analysis",
    "Answers",
    "Dialogue",
    "FindingUnit",
    "MeanStatistic",
    "Tally",
    "analyse",
    "best_overlap",
    "jitter",
    "main",
    "mirror",
    "overlap",
    "render_page",
    "wordings",
]


if __name__ == "__main__":
    sys.exit(main())
