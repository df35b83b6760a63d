"""Texts for the generation metrics: preparation, checks, and sums over images for bootstrapping.

The metrics split at blanks, so what counts as a word is decided here. The ChEX evaluation puts a blank before each
full stop, turns line breaks and tabs into blanks and merges blanks; case is kept and there is no further tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation.bootstrap import Statistic, check_counts, point_estimate


def prepare_text(text: str, lowercase: bool = False) -> str:
    """`text` with " ." for ".", every run of white space as one blank, none at the ends; case kept by default.

    `lowercase` lower-cases it too: the official ChEX evaluation does not, many others do (scores rise).
    """
    text = " ".join(text.replace(".", " .").split())
    return text.lower() if lowercase else text


@dataclass(frozen=True)
class TextPairs:
    """Candidates with their references; pairs without a reference are gone.

    Attributes:
        candidates: P texts.
        references: P lists of one or more non-empty texts.
        units: (P,) int64, the image of each pair.
        num_units: number of images, those without any pair included.
        kept: (P,) int64, index of each pair in the input.
        dropped: number of pairs left out because their reference is empty.
    """

    candidates: list[str]
    references: list[list[str]]
    units: np.ndarray
    num_units: int
    kept: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.candidates)

    def members(self) -> list[np.ndarray]:
        """The pair indices of each image: `num_units` arrays, empty ones for images without a pair."""
        order = np.argsort(self.units, kind="stable")
        bounds = np.searchsorted(self.units[order], np.arange(self.num_units + 1))
        return [order[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

    def distinct(self) -> tuple[list[str], list[list[str]], np.ndarray]:
        """The different pairs (candidates, references) and the index (P,) of each pair in them.

        Descriptions of regions repeat themselves, and what is computed from a pair needs computing once.
        """
        numbers: dict[tuple[str, ...], int] = {}
        inverse = np.array(
            [
                numbers.setdefault((candidate, *references), len(numbers))
                for candidate, references in zip(self.candidates, self.references, strict=True)
            ],
            dtype=np.int64,
        )
        return [key[0] for key in numbers], [list(key[1:]) for key in numbers], inverse

    def numbered_per_batch(self, batch_size: int | None) -> "TextPairs":
        """The images numbered from 0 in each batch, as the official code does: images of one number become one.

        Raises:
            ValueError: without a positive batch size.
        """
        if not batch_size or batch_size < 1:
            raise ValueError(
                "The official numbering of images depends on the batch size of the evaluation: pass `batch_size`, "
                f"a positive number (came: {batch_size})."
            )
        return replace(self, units=self.units % batch_size, num_units=min(batch_size, self.num_units))


def prepare_pairs(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    units: Sequence[int] | None = None,
    num_units: int | None = None,
    prepare: bool = True,
    lowercase: bool = False,
) -> TextPairs:
    """Checks and prepares candidates and references.

    Args:
        candidates: P generated texts, empty ones allowed.
        references: P references, each a text or a list of texts. Empty ones are left out, and with its last reference
            the pair.
        units: the image of each pair, integers from 0; left out: each pair is an image of its own.
        num_units: number of images, if some have no pair at all.
        prepare: apply `prepare_text`; off for texts that are prepared already.
        lowercase: see `prepare_text`; needs `prepare`.

    Raises:
        ValueError: for lists of different length, entries that are not texts, or unit numbers out of range.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} references: give one of each per pair.")
    if lowercase and not prepare:
        raise ValueError("`lowercase` is part of the preparation: lower-case the texts yourself or pass prepare=True.")
    unit_array = _check_units(units, len(candidates))
    if num_units is None:
        num_units = int(unit_array.max(initial=-1)) + 1
    elif len(unit_array) and unit_array.max() >= num_units:
        raise ValueError(
            f"`units[{int(unit_array.argmax())}]` is {int(unit_array.max())}, but num_units is {num_units}: "
            "units are numbered from 0."
        )
    kept: list[int] = []
    kept_candidates: list[str] = []
    kept_references: list[list[str]] = []
    for index, (candidate, given) in enumerate(zip(candidates, references, strict=True)):
        if not isinstance(candidate, str):
            raise ValueError(f"`candidates[{index}]` is a {type(candidate).__name__}, not a text.")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, Sequence | np.ndarray) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`references[{index}]` is neither a text nor a list of texts: {given!r}.")
        if prepare:
            candidate = prepare_text(candidate, lowercase)
            texts = [prepare_text(text, lowercase) for text in texts]
        texts = [text for text in texts if text.strip()]
        if texts:
            kept.append(index)
            kept_candidates.append(candidate)
            kept_references.append(texts)
    kept_array = np.array(kept, dtype=np.int64)
    return TextPairs(
        kept_candidates, kept_references, unit_array[kept_array], num_units, kept_array, len(candidates) - len(kept)
    )


def _check_units(units: Sequence[int] | None, num_pairs: int) -> np.ndarray:
    if units is None:
        return np.arange(num_pairs, dtype=np.int64)
    array = np.asarray(units)
    if array.shape != (num_pairs,):
        raise ValueError(f"`units` has the shape {array.shape} for {num_pairs} pairs: give one image number per pair.")
    if num_pairs and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`units` holds {array.dtype} values: image numbers are integers from 0.")
    if num_pairs and array.min() < 0:
        raise ValueError(f"`units[{int(array.argmin())}]` is {int(array.min())}: image numbers start at 0.")
    return array.astype(np.int64)


def unit_sums(values: np.ndarray, units: np.ndarray, num_units: int) -> np.ndarray:
    """Sum of `values` (P, K) over the pairs of each image: (num_units, K) float64."""
    columns = [np.bincount(units, weights=column, minlength=num_units) for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((num_units, 0))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, NaN where the denominator is 0."""
    numerator = np.asarray(numerator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=np.asarray(denominator) != 0)


class MeanStatistic:
    """Resampled means of scores that belong to pairs, and of scores that belong to images.

    Args:
        names: the names of the mean over pairs and of the mean over images.
        pairs: the pairs.
        pair_scores: (P,) float64.
        unit_scores: (N,) float64, ignored for images without a pair; left out: the mean of the image's pairs.
    """

    def __init__(
        self, names: tuple[str, str], pairs: TextPairs, pair_scores: np.ndarray, unit_scores: np.ndarray | None = None
    ):
        self.names: tuple[str, ...] = names
        self.num_units = pairs.num_units
        self.pairs = pairs
        columns = np.stack([pair_scores, np.ones(len(pairs))], axis=1)
        sums, numbers = unit_sums(columns, pairs.units, pairs.num_units).T
        present = numbers > 0
        if unit_scores is None:
            unit_scores = ratio(sums, numbers)
        self._columns = np.stack([sums, numbers, np.where(present, unit_scores, 0.0), present], axis=1)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, 2); NaN where no image with a pair was drawn."""
        counts = check_counts(counts, self.num_units).astype(np.float64)
        pair_sum, pair_number, unit_sum, unit_number = (counts @ self._columns).T
        return np.stack([ratio(pair_sum, pair_number), ratio(unit_sum, unit_number)], axis=1)


def named_values(statistic: Statistic) -> dict[str, float | None]:
    """{name: value} of the data themselves; None where it is undefined."""
    values = point_estimate(statistic)
    return {
        name: None if np.isnan(value) else float(value) for name, value in zip(statistic.names, values, strict=True)
    }
