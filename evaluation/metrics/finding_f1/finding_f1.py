"""F1 of the findings stated in texts: a labeller turns each text into {finding: value}, and positives are compared.

Values follow the CheXpert convention: 1 present, 0 negated, -1 uncertain; findings that a text does not mention are
missing from its dict. The labeller is an argument, so the same code serves the exact phantom labeller and CheXbert.

Usable directly and through `evaluate.load("evaluation/metrics/finding_f1")`, without a network.
"""

from collections.abc import Callable, Mapping, Sequence

import datasets
import evaluate
import numpy as np

from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.clinical_f1.clinical_f1 import CellStatistic, positive_cells
from evaluation.metrics.text_preparation import named_values


_DESCRIPTION = "Micro, macro and example-based F1 of the findings stated in generated texts."
_CITATION = ""
_KWARGS = """
Args:
    predictions: texts (with `labeler`), or the labels of each text as a list of {"finding", "value"} items
        (`as_items` makes it from a dict).
    references: the same kind.
    classes: findings to count, in order; left out: every finding that occurs, sorted.
    labeler: function text -> {finding: 1 / 0 / -1}; needed for texts.
    uncertain_positive: count -1 as positive (the paper's F1-5 does, its F1-14 does not).
    official: as the official code: example-based F1 skips texts without a true positive instead of counting 0, and a
        finding that is positive on neither side counts 0 in macro_f1 instead of being left out.
Returns:
    micro_f1, micro_precision, micro_recall: all (text, finding) cells pooled; macro_f1: mean over the `classes` that
    are positive on either side; example_f1: mean over texts (1 where both sides are empty);
    per_class: {finding: {"f1", "precision", "recall", "support"}}; count: number of texts. None where undefined.
"""


def as_items(labels: Mapping[str, int]) -> list[dict]:
    """A label dict as the list of {"finding", "value"} that `FindingF1` stores in Arrow."""
    return [{"finding": name, "value": int(value)} for name, value in labels.items()]


def finding_f1(
    predictions: Sequence[Mapping[str, int]],
    references: Sequence[Mapping[str, int]],
    classes: Sequence[str] | None = None,
    uncertain_positive: bool = False,
    official: bool = False,
) -> dict:
    """F1 of positive findings over label dicts; see the module's `_KWARGS` for the rest.

    Raises:
        ValueError: if the lists differ in length, or a value is not 1, 0 or -1.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one dict per text.")
    if classes is None:
        classes = sorted({name for labels in (*predictions, *references) for name in labels})
    tables = [
        positive_cells(labels, classes, uncertain_positive, side)
        for side, labels in (("predictions", predictions), ("references", references))
    ]
    count = len(predictions)

    statistic = CellStatistic(*tables, classes, np.arange(count), count, official=official)
    values = named_values(statistic)
    absent = 0.0 if official else None
    return {
        **{
            name: absent if values[name] is None else values[name]
            for name in ("micro_f1", "micro_precision", "micro_recall", "macro_f1")
        },
        "example_f1": values["example_f1"],
        "per_class": {
            name: {
                **{score: absent if row[score] is None else row[score] for score in ("f1", "precision", "recall")},
                "support": row["support"],
            }
            for name, row in statistic.class_rows().items()
        },
        "count": count,
    }


class FindingF1(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `finding_f1`: takes texts and a labeller, or label items."""

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

    def _compute(
        self,
        predictions: list,
        references: list,
        labeler: Callable[[str], Mapping[str, int]] | None = None,
        **kwargs,
    ) -> dict:
        return finding_f1(*(self._labels(side, labeler) for side in (predictions, references)), **kwargs)

    @staticmethod
    def _labels(side: list, labeler: Callable[[str], Mapping[str, int]] | None) -> list[Mapping[str, int]]:
        if not all(isinstance(item, str) for item in side):
            return [{entry["finding"]: entry["value"] for entry in item} for item in side]
        if labeler is None and side:
            raise ValueError(
                "Texts were given without a labeller. Pass `labeler=`, a function from a text to {finding: 1/0/-1}, "
                "or pass the labels themselves."
            )
        return [labeler(text) for text in side]
