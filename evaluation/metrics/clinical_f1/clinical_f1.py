"""Clinical F1: which findings generated texts state, compared with those of the reference texts.

A labeller (`evaluation.labelers`) turns each text into {finding: 1 present, 0 negated, -1 uncertain}. With the 14
classes of CheXpert the scores are those of the ChEX paper (its section on report generation) and its peers: F1-14
counts uncertain findings as negative, F1-5 (Cardiomegaly, Edema, Consolidation, Atelectasis, Pleural Effusion) as
positive. Labellers of other classes get micro, macro and example-based F1 over these, uncertain as negative.

- micro: all cells (text, class) pooled; P = TP / (TP + FP), R = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN).
- macro: P, R and F1 per class over all texts, mean over classes. P or R without a denominator is 0. A class that is
  positive in no text of either side is undefined and left out of the mean; with `official` it counts 0.
- example: TP, FP and FN summed over the texts (regions) of an image, P, R and F1 of the image, mean over images. An
  image without any positive on either side scores 1. The official code skips undefined values instead, and as its F1
  is 2 P R / (P + R), images without a true positive do not count at all (`official`).

Usable directly and through `evaluate.load("evaluation/metrics/clinical_f1")`, without a network; the `evaluation`
package must be importable.
"""

from collections.abc import Mapping, Sequence

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.labelers.base import CHEXPERT_CLASSES, CHEXPERT_FIVE, Labeler
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.text_preparation import named_values, ratio, unit_sums
from evaluation.metrics.units import check_units


_DESCRIPTION = "Micro, macro and example-based precision, recall and F1 of the findings that texts state."
_CITATION = ""
_KWARGS = """
Args:
    predictions: generated texts (with `labeler`), or the labels of each text as a list of {"finding", "value"} items.
    references: the same kind; pairs with an empty reference text are left out.
    labeler: what reads the texts: a labeller or its name as for `evaluation.labelers.load_labeler`.
    classes: of the labels, in order; default: those of the labeller, or CheXpert's 14.
    units: the image of each pair (integers from 0); left out: one pair per image.
    uncertain_positive: True or False for all scores; left out: False for F1-14 and other classes, True for F1-5.
    official: the defects of the official code: images without a true positive are left out of the example F1 (without
        predictions out of its precision, without findings out of its recall), absent classes count 0.
    batch_size: with `official`, number the images from 0 in each batch, as the official code does without bootstrap.
Returns:
    With all 14 classes of CheXpert: micro_f1_14, micro_precision_14, micro_recall_14, the same with macro and example,
    and micro and macro with _5; else without the suffix. per_class (and per_class_5): {class: {"f1", "precision",
    "recall", "support", "predicted"}}; classes_defined (and classes_defined_5): classes that count in macro;
    count: pairs; dropped: pairs without reference. None where undefined.
"""
_SCORES = ("f1", "precision", "recall")


def positive_cells(
    labels: Sequence[Mapping[str, int]], classes: Sequence[str], uncertain_positive: bool, side: str = "labels"
) -> np.ndarray:
    """(P, K) bool, True where the label is 1, or -1 with `uncertain_positive`. Labels of other classes are ignored.

    Raises:
        ValueError: if a value is not 1, 0 or -1; the message names the entry.
    """
    columns = {name: index for index, name in enumerate(classes)}
    positive = np.zeros((len(labels), len(columns)), dtype=bool)
    for row, entry in enumerate(labels):
        for name, value in entry.items():
            if value not in (1, 0, -1):
                raise ValueError(f"`{side}[{row}]` has the label {name}={value}; only 1, 0 and -1 are labels.")
            if name in columns and (value == 1 or (value == -1 and uncertain_positive)):
                positive[row, columns[name]] = True
    return positive


def _scores(true_positive: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """F1, precision and recall along a new last axis: 0 without a denominator, NaN without positives on both sides."""
    total = predicted + actual
    scores = np.stack(
        [ratio(2 * true_positive, total), ratio(true_positive, predicted), ratio(true_positive, actual)], axis=-1
    )
    return np.where(np.isnan(scores) & (total > 0)[..., None], 0.0, scores)


class CellStatistic:
    """Precision, recall and F1 over the cells (text, class) of two boolean tables, for bootstrapping over images.

    Args:
        predicted, actual: (P, K) bool.
        classes: K names.
        units: (P,) the image of each text.
        num_units: number of images; those without a text never count.
        suffix: of the names.
        official: see the module.
        example: with the example-based scores.
        per_class: with F1 of each class.

    Attributes:
        names: micro_, macro_ and example_ with f1, precision, recall, then f1/<class>; each with the suffix.
        num_units: number of images.
        totals: (3, K) true positives, predicted and actual positives of each class.
        unit_f1: (num_units,) F1 of each image, 1 if there is nothing on either side, NaN without a text.
    """

    def __init__(
        self,
        predicted: np.ndarray,
        actual: np.ndarray,
        classes: Sequence[str],
        units: np.ndarray,
        num_units: int,
        suffix: str = "",
        official: bool = False,
        example: bool = True,
        per_class: bool = True,
    ):
        self.classes, self.num_units, self.official = tuple(classes), num_units, official
        self._example, self._per_class = example, per_class
        kinds = ("micro", "macro", "example") if example else ("micro", "macro")
        names = [f"{kind}_{score}{suffix}" for kind in kinds for score in _SCORES]
        self.names = (*names, *(f"f1{suffix}/{name}" for name in self.classes if per_class))
        cells = [
            unit_sums(table.astype(np.float64), units, num_units) for table in (predicted & actual, predicted, actual)
        ]
        self.totals = np.stack([table.sum(0) for table in cells])
        by_image = [table.sum(1) for table in cells]
        present = np.bincount(units, minlength=num_units) > 0
        scores = _scores(*by_image)
        correct = np.where(present[:, None], np.where(np.isnan(scores), 1.0, scores), np.nan)
        self.unit_f1 = correct[:, 0]
        if official:
            true_positive, stated, true = by_image
            precision, recall = ratio(true_positive, stated), ratio(true_positive, true)
            f1 = ratio(2 * precision * recall, np.nan_to_num(precision + recall))
            correct = np.stack([f1, precision, recall], axis=1)
        self._columns = np.concatenate([*cells, np.nan_to_num(correct), ~np.isnan(correct)], axis=1)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, len(names)); NaN where undefined."""
        sums = check_counts(counts, self.num_units).astype(np.float64) @ self._columns
        width = len(self.classes)
        true_positive, predicted, actual = (sums[:, part * width : (part + 1) * width] for part in range(3))
        by_class = _scores(true_positive, predicted, actual)
        if self.official:
            by_class = np.nan_to_num(by_class)
        defined = ~np.isnan(by_class)
        values = [
            _scores(true_positive.sum(1), predicted.sum(1), actual.sum(1)),
            ratio(np.nan_to_num(by_class).sum(1), defined.sum(1)),
        ]
        if self._example:
            rest = sums[:, 3 * width :]
            values.append(ratio(rest[:, :3], rest[:, 3:]))
        if self._per_class:
            values.append(by_class[:, :, 0])
        return np.concatenate(values, axis=1)

    def class_rows(self) -> dict[str, dict[str, float | int | None]]:
        """{class: {"f1", "precision", "recall", "support", "predicted"}}, None where undefined."""
        scores = _scores(*self.totals)
        rows = {}
        for name, values, (_, predicted, actual) in zip(self.classes, scores, self.totals.T, strict=True):
            row = {
                score: None if np.isnan(value) else float(value) for score, value in zip(_SCORES, values, strict=True)
            }
            rows[name] = {**row, "support": int(actual), "predicted": int(predicted)}
        return rows


class ClinicalF1Statistic:
    """Clinical F1 for bootstrapping over images; see the module for definitions.

    Args:
        predictions: labels of P generated texts.
        references: labels of the P references; None where there is no reference text: the pair is left out.
        units: (P,) the image of each pair, integers from 0; left out: each pair is an image of its own.
        num_units: number of images, if some have no pair.
        classes: all classes of the labels, in order; with all of CheXpert's 14 the scores of 14 and 5 are computed.
        uncertain_positive: see the module's `_KWARGS`.
        official: with the defects of the official code.
        batch_size: with `official`: images of one number in their batch become one.

    Attributes:
        names: see the module's `_KWARGS`; then f1_14/<class> and f1_5/<class>, or f1/<class>.
        num_units: number of images.
        parts: suffix ("_14", "_5", or "") -> its `CellStatistic`.
        count, dropped: pairs with and without reference.
        pair_f1: (P,) F1 of each pair by the first part, 1 if there is nothing on either side; NaN without reference.

    Raises:
        ValueError: for lists of different length, units out of range, unknown classes or values.
    """

    def __init__(
        self,
        predictions: Sequence[Mapping[str, int]],
        references: Sequence[Mapping[str, int] | None],
        units: Sequence[int] | None = None,
        num_units: int | None = None,
        classes: Sequence[str] = CHEXPERT_CLASSES,
        uncertain_positive: bool | None = None,
        official: bool = False,
        batch_size: int | None = None,
    ):
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one of each per pair."
            )
        classes = tuple(classes)
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"`classes` are empty, or some occur twice: {classes}.")
        for side, entries in (("predictions", predictions), ("references", references)):
            _check_labels(side, entries, classes)
        images, self.num_units = check_units(units, num_units, len(predictions))
        if batch_size is not None:
            if not official or batch_size < 1:
                raise ValueError(
                    f"`batch_size` ({batch_size}) is for the official numbering of images in batches: it must be "
                    "positive, and needs official=True."
                )
            images, self.num_units = images % batch_size, min(batch_size, self.num_units)
        kept = np.array([entry is not None for entry in references], dtype=bool)
        self.count, self.dropped = int(kept.sum()), int((~kept).sum())
        stated = [entry for entry, keep in zip(predictions, kept, strict=True) if keep]
        true = [entry for entry in references if entry is not None]
        images = images[kept]

        def part(names: Sequence[str], suffix: str, uncertain: bool, example: bool) -> CellStatistic:
            if uncertain_positive is not None:
                uncertain = uncertain_positive
            tables = [
                positive_cells(entries, names, uncertain, side)
                for side, entries in (("predictions", stated), ("references", true))
            ]
            if suffix != "_5":
                scores = _scores((tables[0] & tables[1]).sum(1), tables[0].sum(1), tables[1].sum(1))[:, 0]
                self.pair_f1 = np.full(len(kept), np.nan)
                self.pair_f1[kept] = np.where(np.isnan(scores), 1.0, scores)
            return CellStatistic(*tables, names, images, self.num_units, suffix, official, example)

        if set(CHEXPERT_CLASSES) <= set(classes):
            self.parts = {
                "_14": part(CHEXPERT_CLASSES, "_14", False, True),
                "_5": part(CHEXPERT_FIVE, "_5", True, False),
            }
        else:
            self.parts = {"": part(classes, "", False, True)}
        self.names = tuple(name for statistic in self.parts.values() for name in statistic.names)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, len(names)); NaN where undefined."""
        return np.concatenate([statistic(counts) for statistic in self.parts.values()], axis=1)

    @classmethod
    def from_texts(
        cls,
        predictions: Sequence[str],
        references: Sequence[str],
        labeler: Labeler,
        units: Sequence[int] | None = None,
        num_units: int | None = None,
        classes: Sequence[str] | None = None,
        **options,
    ) -> "ClinicalF1Statistic":
        """The statistic of texts that `labeler` reads; pairs with an empty reference are left out.

        `classes` default to those of the labeller; the other arguments and errors are those of the class.
        """
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one of each per pair."
            )
        for side, texts in (("predictions", predictions), ("references", references)):
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"`{side}[{index}]` is a {type(text).__name__}, not a text.")
        # One call, so that a model sorts all texts by length.
        labels = labeler([*predictions, *references])
        stated, true = labels[: len(predictions)], labels[len(predictions) :]
        expected = [entry if text.strip() else None for entry, text in zip(true, references, strict=True)]
        return cls(stated, expected, units, num_units, labeler.classes if classes is None else classes, **options)


def _check_labels(side: str, entries: Sequence[Mapping[str, int] | None], classes: tuple[str, ...]) -> None:
    known = set(classes)
    for index, entry in enumerate(entries):
        if entry is None and side == "references":
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"`{side}[{index}]` is a {type(entry).__name__}, not a {{finding: 1/0/-1}} of a text.")
        unknown = [name for name in entry if name not in known]
        if unknown:
            raise ValueError(
                f"`{side}[{index}]` has the label {unknown[0]!r}, which is not one of the classes: "
                f"{', '.join(classes)}. Pass the classes of the labeller as `classes`."
            )


def clinical_f1(
    predictions: Sequence[str] | Sequence[Mapping[str, int]],
    references: Sequence[str] | Sequence[Mapping[str, int] | None],
    labeler: Labeler | str | None = None,
    classes: Sequence[str] | None = None,
    units: Sequence[int] | None = None,
    uncertain_positive: bool | None = None,
    official: bool = False,
    batch_size: int | None = None,
) -> dict:
    """Clinical F1 of texts (with `labeler`) or of labels; see the module's `_KWARGS` for arguments and result.

    Raises:
        ValueError: as `ClinicalF1Statistic`, or for texts without a labeller.
        LabelerUnavailable: if the labeller that is named lacks its weights.
    """
    options = {"uncertain_positive": uncertain_positive, "official": official, "batch_size": batch_size}
    if labeler is not None:
        if isinstance(labeler, str):
            from evaluation.labelers import load_labeler

            labeler = load_labeler(labeler)
        statistic = ClinicalF1Statistic.from_texts(predictions, references, labeler, units, classes=classes, **options)
    else:
        if any(isinstance(entry, str) for entry in (*predictions, *references)):
            raise ValueError(
                "Texts were given without a labeller. Pass `labeler=`, a labeller or its name such as "
                '"chexbert:FOLDER", or pass the labels themselves.'
            )
        classes = CHEXPERT_CLASSES if classes is None else classes
        statistic = ClinicalF1Statistic(predictions, references, units, classes=classes, **options)
    values = {name: value for name, value in named_values(statistic).items() if "/" not in name}
    for suffix, part in statistic.parts.items():
        suffix = "_5" if suffix == "_5" else ""
        values[f"per_class{suffix}"] = part.class_rows()
        values[f"classes_defined{suffix}"] = int((part.totals[1:].sum(0) > 0).sum())
    return {**values, "count": statistic.count, "dropped": statistic.dropped}


class ClinicalF1(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `clinical_f1`: takes texts and a labeller, or label items."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        items = datasets.List({"finding": datasets.Value("string"), "value": datasets.Value("int8")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": items, "references": items}),
            ],
        )

    def _compute(self, predictions: list, references: list, **options) -> dict:
        return clinical_f1(*(_from_items(side) for side in (predictions, references)), **options)


def _from_items(side: list) -> list:
    return [item if isinstance(item, str) else {entry["finding"]: entry["value"] for entry in item} for item in side]
