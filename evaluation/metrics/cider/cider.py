"""CIDEr as the captioning evaluation of COCO (pycocoevalcap) counts it.

For n = 1..4 a text is the vector of its n-gram counts times log N - log max(1, df), where df is the number of
documents that contain the n-gram and N the number of documents. A pair scores, per n, the cosine of both vectors in
whose dot product the candidate's entries are cut to the reference's, times exp(-d^2 / (2 * 6^2)) with the difference d
of the numbers of bigrams; these are averaged over n and over the references, times 10. The result is the mean over
pairs.

The documents are, as there, the references of the set itself (all references of a pair are one document). So a score
depends on the whole set: in a set of one pair it is 0, and bootstrapping keeps the frequencies of the whole set. For
scores that are comparable between sets, give the frequencies of a fixed corpus, e.g. the training reports of MIMIC.

Usable directly and through `evaluate.load("evaluation/metrics/cider")`, without a network; the `evaluation` package
must be importable.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import datasets
import evaluate
import numpy as np

from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.text_preparation import MeanStatistic, TextPairs, named_values, prepare_pairs, prepare_text


MAX_ORDER = 4
SIGMA = 6.0

_DESCRIPTION = "CIDEr of pycocoevalcap, with document frequencies of the set or of a given corpus."
_CITATION = ""
_KWARGS = """
Args:
    predictions: generated texts.
    references: one reference text, or a list of them, per prediction; pairs with an empty reference are left out.
    units: the image of each pair (integers from 0); left out: one pair per image.
    prepare: " ." for ".", white space merged (default); off for prepared texts.
    lowercase: lower-case the texts too.
    official: number the images from 0 in each batch of `batch_size`, as the official code does: changes cider_ex.
    corpus: where the document frequencies come from: a `DocumentFrequencies`, a list of texts, or a file (.txt with
        one document per line, or .jsonl with a text or a list of texts per line); left out: the references.
Returns:
    cider: mean over pairs, from 0 to 10; cider_ex: CIDEr of each image's pairs (without a corpus also its document
    frequencies, so 0 for an image with one pair), then the mean over images; count: pairs; dropped: pairs with an
    empty reference. None where there is no pair.
"""


def ngrams(text: str) -> list[Counter]:
    """The 1-grams to 4-grams of a text with their counts."""
    words = text.split()
    return [
        Counter(zip(*(words[start:] for start in range(order)), strict=False)) for order in range(1, MAX_ORDER + 1)
    ]


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many of `num_documents` documents each n-gram occurs (n = 1..4)."""

    counts: Mapping[tuple[str, ...], int]
    num_documents: int

    @classmethod
    def from_documents(
        cls, documents: Iterable[str | Sequence[str]], prepare: bool = False, lowercase: bool = False
    ) -> "DocumentFrequencies":
        """Counts a corpus; the texts of a list are one document. Prepare the corpus as the scored texts are prepared.

        Raises:
            ValueError: for a corpus without documents.
        """
        counts: Counter = Counter()
        num_documents = 0
        for document in documents:
            texts = [document] if isinstance(document, str) else document
            if prepare:
                texts = [prepare_text(text, lowercase) for text in texts]
            counts.update(set().union(*(grams for text in texts for grams in ngrams(text))))
            num_documents += 1
        if not num_documents:
            raise ValueError("The corpus for CIDEr's document frequencies has no documents.")
        return cls(counts, num_documents)

    @classmethod
    def from_file(cls, path: str | PathLike, prepare: bool = False, lowercase: bool = False) -> "DocumentFrequencies":
        """Counts a file: .jsonl with a text or a list of texts per line, else plain text with one document per line.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a .jsonl line that is something else (the line is named), or a file without documents.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no corpus file {path} for CIDEr's document frequencies.")
        return cls.from_documents(_read_documents(path), prepare, lowercase)

    def weights(self) -> dict[tuple[str, ...], float]:
        """log N - log df of each n-gram; those that are not in it weigh log N."""
        whole = math.log(self.num_documents)
        return {gram: whole - math.log(count) for gram, count in self.counts.items()}


def _read_documents(path: Path) -> Iterable[str | list[str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if path.suffix != ".jsonl":
                yield line
                continue
            try:
                document = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(document, str) and not (
                isinstance(document, list) and all(isinstance(text, str) for text in document)
            ):
                raise ValueError(f"{path}, line {number}: neither a text nor a list of texts.")
            yield document


def cider_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> np.ndarray:
    """CIDEr of each pair, (P,) float64 in [0, 10]; without `frequencies` those of the references."""
    if frequencies is None:
        if len(candidates) < 2:  # log N is 0, and so is every weight
            return np.zeros(len(candidates))
        frequencies = DocumentFrequencies.from_documents(references)
    weights, unknown = frequencies.weights(), math.log(frequencies.num_documents)
    known: dict[tuple[str, ...], float] = {}
    scores = np.empty(len(candidates))
    for index, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        key = (candidate, *texts)
        if key not in known:
            vector = _Vector(candidate, weights, unknown)
            similarities = [vector.similarity(_Vector(text, weights, unknown)) for text in texts]
            known[key] = 10 * sum(similarities) / len(texts)
        scores[index] = known[key]
    return scores


class _Vector:
    """The weighted n-gram counts of a text, their norms per n, and its number of bigrams."""

    def __init__(self, text: str, weights: Mapping[tuple[str, ...], float], unknown: float):
        counts = ngrams(text)
        self.entries = [
            {gram: count * weights.get(gram, unknown) for gram, count in grams.items()} for grams in counts
        ]
        self.norms = [math.sqrt(math.fsum(value * value for value in entries.values())) for entries in self.entries]
        self.length = counts[1].total()

    def similarity(self, reference: "_Vector") -> float:
        """Mean over n of the clipped cosine, with the penalty for a different length."""
        total = 0.0
        for own, other, norm, other_norm in zip(
            self.entries, reference.entries, self.norms, reference.norms, strict=True
        ):
            if norm and other_norm:
                common = own.keys() & other.keys()
                total += math.fsum(min(own[gram], other[gram]) * other[gram] for gram in common) / (norm * other_norm)
        return total / MAX_ORDER * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


class CiderStatistic(MeanStatistic):
    """CIDEr for bootstrapping. `names`: cider (mean over pairs) and cider_ex (mean over images).

    The document frequencies stay those of the whole set (or of the corpus) in every resample.

    Args:
        pairs: prepared texts (`prepare_pairs`); `num_units` is their number of images.
        frequencies: document frequencies of a corpus; left out: of the references, for cider_ex of each image's.
        per_image: off leaves cider_ex out, which takes several times as long as cider.
    """

    def __init__(self, pairs: TextPairs, frequencies: DocumentFrequencies | None = None, per_image: bool = True):
        scores = cider_scores(pairs.candidates, pairs.references, frequencies)
        unit_scores = None
        if frequencies is None and per_image:
            unit_scores = np.zeros(pairs.num_units)
            for unit, members in enumerate(pairs.members()):
                if len(members) > 1:
                    unit_scores[unit] = cider_scores(
                        [pairs.candidates[index] for index in members], [pairs.references[index] for index in members]
                    ).mean()
        super().__init__(("cider", "cider_ex"), pairs, scores, unit_scores)
        if not per_image:
            self.names = ("cider",)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, len(names)); NaN where undefined."""
        return super().__call__(counts)[:, : len(self.names)]


def cider(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    units: Sequence[int] | None = None,
    prepare: bool = True,
    lowercase: bool = False,
    official: bool = False,
    batch_size: int | None = None,
    corpus: DocumentFrequencies | Sequence[str | Sequence[str]] | str | PathLike | None = None,
) -> dict:
    """CIDEr; see the module's `_KWARGS` for arguments and result, and the module for the formula.

    Raises:
        ValueError: as `prepare_pairs`, for `official` without `batch_size`, or for an unusable corpus.
        FileNotFoundError: if the corpus file is not there.
    """
    pairs = prepare_pairs(candidates, references, units, None, prepare, lowercase)
    if isinstance(corpus, str | PathLike):
        corpus = DocumentFrequencies.from_file(corpus, prepare, lowercase)
    elif corpus is not None and not isinstance(corpus, DocumentFrequencies):
        corpus = DocumentFrequencies.from_documents(corpus, prepare, lowercase)
    statistic = CiderStatistic(pairs.numbered_per_batch(batch_size) if official else pairs, corpus)
    return {**named_values(statistic), "count": len(pairs), "dropped": pairs.dropped}


class Cider(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `cider`."""

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
        return cider(predictions, references, **kwargs)
