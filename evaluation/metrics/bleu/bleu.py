"""BLEU-1 to BLEU-4 as the captioning evaluation of COCO (pycocoevalcap) and with it the ChEX paper count it.

Over all pairs: clipped n-gram matches m_n and candidate n-grams g_n are summed, and so are the candidate lengths c and
the lengths r of the references closest in length (the shorter one of two equally close). With the constants that avoid
a division by zero, eps = 1e-15 and delta = 1e-9,

    BLEU-k = (prod over n = 1..k of (m_n + eps) / (g_n + delta)) ** (1/k) * min(1, exp(1 - 1/q)),
    q = (c + eps) / (r + delta).

The sums are all that the score needs, so a resample is a weighted sum of the images' sums.

Usable directly and through `evaluate.load("evaluation/metrics/bleu")`, without a network; the `evaluation` package
must be importable.
"""

from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.text_preparation import (
    TextPairs,
    named_values,
    prepare_pairs,
    ratio,
    unit_sums,
)


MAX_ORDER = 4
_TINY, _SMALL = 1e-15, 1e-9

_DESCRIPTION = "Corpus BLEU-1..4 with pycocoevalcap's constants, over all pairs and as a mean over images."
_CITATION = ""
_KWARGS = """
Args:
    predictions: generated texts.
    references: one reference text, or a list of them, per prediction; pairs with an empty reference are left out.
    units: the image of each pair (integers from 0); left out: one pair per image.
    prepare: " ." for ".", white space merged (default); off for prepared texts.
    lowercase: lower-case the texts too.
    official: number the images from 0 in each batch of `batch_size`, as the official code does: changes bleuN_ex.
Returns:
    bleu1 .. bleu4: over all pairs; bleu1_ex .. bleu4_ex: BLEU of each image's pairs, then the mean over images;
    count: pairs; dropped: pairs with an empty reference. None where there is no pair.
"""


def ngram_counts(words: Sequence[str], order: int) -> Counter:
    """How often each `order`-gram occurs in `words`."""
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def bleu_statistics(candidate: str, references: Sequence[str]) -> list[int]:
    """The ten sums of one pair: m_1..m_4, g_1..g_4, candidate length, closest reference length (in words)."""
    words = candidate.split()
    reference_words = [reference.split() for reference in references]
    matches: list[int] = []
    for order in range(1, MAX_ORDER + 1):
        allowed = ngram_counts(reference_words[0], order)
        for other in reference_words[1:]:
            allowed |= ngram_counts(other, order)
        matches.append((ngram_counts(words, order) & allowed).total())
    guesses = [max(0, len(words) - order + 1) for order in range(1, MAX_ORDER + 1)]
    closest = min((abs(len(other) - len(words)), len(other)) for other in reference_words)[1]
    return [*matches, *guesses, len(words), closest]


def bleu_score(statistics: np.ndarray) -> np.ndarray:
    """BLEU-1..4 (..., 4) from summed statistics (..., 10); NaN where nothing was summed (reference length 0)."""
    matches, guesses = statistics[..., :MAX_ORDER], statistics[..., MAX_ORDER : 2 * MAX_ORDER]
    length, reference_length = statistics[..., -2], statistics[..., -1]
    precisions = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=-1)
    scores = precisions ** (1 / np.arange(1, MAX_ORDER + 1))
    quotient = (length + _TINY) / (reference_length + _SMALL)
    scores *= np.exp(np.minimum(0.0, 1 - 1 / quotient))[..., None]
    return np.where((reference_length > 0)[..., None], scores, np.nan)


class BleuStatistic:
    """BLEU for bootstrapping. `names`: bleu1 .. bleu4 (over all pairs) and bleu1_ex .. bleu4_ex (mean over images).

    Args:
        pairs: prepared texts (`prepare_pairs`); `num_units` is their number of images.
    """

    def __init__(self, pairs: TextPairs):
        orders = range(1, MAX_ORDER + 1)
        self.names = (*(f"bleu{order}" for order in orders), *(f"bleu{order}_ex" for order in orders))
        self.num_units = pairs.num_units
        candidates, references, inverse = pairs.distinct()
        rows = [bleu_statistics(*pair) for pair in zip(candidates, references, strict=True)]
        values = np.array(rows, dtype=np.float64).reshape(-1, 2 * MAX_ORDER + 2)[inverse]
        self._sums = unit_sums(values, pairs.units, pairs.num_units)
        present = self._sums[:, -1] > 0
        unit_scores = np.where(present[:, None], bleu_score(self._sums), 0.0)
        self._unit_columns = np.column_stack([unit_scores, present])

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, 8); NaN where no image with a pair was drawn."""
        counts = check_counts(counts, self.num_units).astype(np.float64)
        means = counts @ self._unit_columns
        return np.concatenate([bleu_score(counts @ self._sums), ratio(means[:, :-1], means[:, -1:])], axis=1)


def bleu(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    units: Sequence[int] | None = None,
    prepare: bool = True,
    lowercase: bool = False,
    official: bool = False,
    batch_size: int | None = None,
) -> dict:
    """BLEU-1..4; see the module's `_KWARGS` for arguments and result, and the module for the formula.

    Raises:
        ValueError: as `prepare_pairs`, or for `official` without `batch_size`.
    """
    pairs = prepare_pairs(candidates, references, units, None, prepare, lowercase)
    statistic = BleuStatistic(pairs.numbered_per_batch(batch_size) if official else pairs)
    return {**named_values(statistic), "count": len(pairs), "dropped": pairs.dropped}


class Bleu(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `bleu`."""

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
        return bleu(predictions, references, **kwargs)
