"""ROUGE-L as the captioning evaluation of COCO (pycocoevalcap) and with it the ChEX paper count it.

With the longest common subsequence L of the words of candidate and reference, precision P = L / |candidate| and recall
R = L / |reference|, each the highest one over the references, a pair scores (1 + b^2) P R / (R + b^2 P) with b = 1.2,
and 0 without a common word. The result is the mean over pairs.

Usable directly and through `evaluate.load("evaluation/metrics/rouge_l")`, without a network; the `evaluation` package
must be importable.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.text_preparation import MeanStatistic, TextPairs, named_values, prepare_pairs


BETA = 1.2

_DESCRIPTION = "ROUGE-L (beta 1.2) of pycocoevalcap, mean over pairs and over images."
_CITATION = ""
_KWARGS = """
Args:
    predictions: generated texts.
    references: one reference text, or a list of them, per prediction; pairs with an empty reference are left out.
    units: the image of each pair (integers from 0); left out: one pair per image.
    prepare: " ." for ".", white space merged (default); off for prepared texts.
    lowercase: lower-case the texts too.
    official: number the images from 0 in each batch of `batch_size`, as the official code does: changes rouge_l_ex.
    beta: weight of the recall; 1 gives the F1 of other packages.
Returns:
    rouge_l: mean over pairs; rouge_l_ex: mean over images of the mean over the image's pairs; count: pairs;
    dropped: pairs with an empty reference. None where there is no pair.
"""


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of words.

    One bit per word of `first`, one addition per word of `second` (Hyyro 2004): a zero bit stands where the length
    grows.
    """
    masks: dict[str, int] = {}
    for position, word in enumerate(first):
        masks[word] = masks.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        common = row & masks.get(word, 0)
        row = ((row + common) | (row - common)) & full
    return len(first) - row.bit_count()


def rouge_l_score(candidate: str, references: Sequence[str], beta: float = BETA) -> float:
    """ROUGE-L of one pair. Words are split at single blanks, so merge the blanks of a text before."""
    words = candidate.split(" ")
    lengths = [(lcs_length(words, other), len(other)) for other in (text.split(" ") for text in references)]
    precision = max(common for common, _ in lengths) / len(words)
    recall = max(common / length for common, length in lengths)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


class RougeLStatistic(MeanStatistic):
    """ROUGE-L for bootstrapping. `names`: rouge_l (mean over pairs) and rouge_l_ex (mean over images).

    Args:
        pairs: prepared texts (`prepare_pairs`); `num_units` is their number of images.
        beta: weight of the recall.
    """

    def __init__(self, pairs: TextPairs, beta: float = BETA):
        candidates, references, inverse = pairs.distinct()
        scores = [rouge_l_score(*pair, beta) for pair in zip(candidates, references, strict=True)]
        super().__init__(("rouge_l", "rouge_l_ex"), pairs, np.array(scores, dtype=np.float64)[inverse])


def rouge_l(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    units: Sequence[int] | None = None,
    prepare: bool = True,
    lowercase: bool = False,
    official: bool = False,
    batch_size: int | None = None,
    beta: float = BETA,
) -> dict:
    """ROUGE-L; see the module's `_KWARGS` for arguments and result, and the module for the formula.

    Raises:
        ValueError: as `prepare_pairs`, or for `official` without `batch_size`.
    """
    pairs = prepare_pairs(candidates, references, units, None, prepare, lowercase)
    statistic = RougeLStatistic(pairs.numbered_per_batch(batch_size) if official else pairs, beta)
    return {**named_values(statistic), "count": len(pairs), "dropped": pairs.dropped}


class RougeL(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `rouge_l`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(self, predictions: list, references: list, **kwargs) -> dict:
        return rouge_l(predictions, references, **kwargs)
