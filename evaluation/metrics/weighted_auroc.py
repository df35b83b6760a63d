"""Area under the ROC curve of many lists of scores, for the data and for many resamples at once.

The area is the share of pairs (positive, negative) that are in order, equal scores counting half. For a resample every
pair counts as often as both were drawn: for each score of a positive, the weights of the negatives below it are
summed. Scores are sorted once; what remains for a resample are sums of weights, done as one sparse product per list.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from evaluation.bootstrap import check_counts


_CHUNK_ROWS = 256  # resamples at a time, so that the weights of an image stay in the cache
_EXACT_FLOAT32 = 2**24


@dataclass(frozen=True)
class _Cell:
    """Units of positives, of negatives equal to and below them, as rows of sparse 0/1 matrices (indices, starts)."""

    positives: tuple[np.ndarray, np.ndarray]
    below: tuple[np.ndarray, np.ndarray]
    equal: tuple[np.ndarray, np.ndarray] | None


class WeightedAuroc:
    """AUROC of cells, each a list of scores with labels and units. Fill with `add`, then call with counts."""

    def __init__(self, num_units: int):
        self.num_units = num_units
        self._cells: list[_Cell | None] = []
        self._largest = 0

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, scores: np.ndarray, positive: np.ndarray, units: np.ndarray) -> None:
        """A cell: `scores` (n,) without NaN, `positive` (n,) bool, `units` (n,) the bootstrap unit of each."""
        order = np.argsort(scores, kind="stable")
        scores, positive = scores[order], positive[order]
        units = units[order].astype(np.int32)
        if not positive.any():
            self._cells.append(None)  # the data have none, so no resample has
            return
        levels, starts = np.unique(scores[positive], return_index=True)
        starts = np.append(starts, positive.sum())
        negative = scores[~positive]
        owners = units[~positive]
        above = np.searchsorted(levels, negative, side="right")
        equal = above > np.searchsorted(levels, negative, side="left")
        below = np.searchsorted(above[~equal], np.arange(len(levels) + 2))
        ties = None
        if equal.any():
            ties = owners[equal], np.searchsorted(above[equal] - 1, np.arange(len(levels) + 1))
        self._cells.append(_Cell((units[positive], starts), (owners[~equal], below), ties))
        self._largest = max(self._largest, len(scores))

    def __call__(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`counts` (B, N) -> AUROC (NaN where undefined), positives and negatives, each (B, cells) float64."""
        counts = check_counts(counts, self.num_units)
        shape = (len(counts), len(self._cells))
        area, positives, negatives = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape)
        # Whole numbers below 2^24 are exact in single precision, which takes half the time.
        whole = np.issubdtype(counts.dtype, np.integer) or bool((counts == np.floor(counts)).all())
        heaviest = float(counts.max(initial=0)) * self._largest
        most = float(counts.sum(axis=1, dtype=np.float64).max(initial=0))
        dtype = np.float32 if whole and min(heaviest, most * self._repeats()) ** 2 < _EXACT_FLOAT32 else np.float64
        ones = np.ones(self._largest, dtype=dtype)
        for start in range(0, len(counts), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            weights = np.ascontiguousarray(counts[part].T, dtype=dtype)  # (N, rows)

            def sums(rows: tuple[np.ndarray, np.ndarray], weights: np.ndarray = weights) -> np.ndarray:
                units, starts = rows
                shape = (len(starts) - 1, self.num_units)
                return sparse.csr_array((ones[: len(units)], units, starts), shape=shape) @ weights

            for index, cell in enumerate(self._cells):
                if cell is None:
                    continue
                own = sums(cell.positives)  # (levels, rows)
                below = np.cumsum(sums(cell.below), axis=0)  # (levels + 1, rows)
                total, below = below[-1].astype(np.float64), below[:-1]
                if cell.equal is not None:
                    tied = sums(cell.equal)
                    upto = np.cumsum(tied, axis=0)
                    total += upto[-1]
                    below = below + upto - tied / 2
                count = own.sum(0, dtype=np.float64)
                pairs = count * total
                ordered = (own * below).sum(0, dtype=np.float64)
                area[part, index] = np.divide(ordered, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
                positives[part, index], negatives[part, index] = count, total
        return area, positives, negatives

    def _repeats(self) -> int:
        """An upper bound for how many entries of one cell belong to one unit."""
        most = 1
        for cell in self._cells:
            if cell is not None:
                parts = [rows[0] for rows in (cell.positives, cell.below, cell.equal) if rows is not None]
                most = max(most, int(np.bincount(np.concatenate(parts)).max()))
        return most


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Exact area under the ROC curve (probability of ranking a positive first, ties count half); None if undefined.

    Raises:
        ValueError: for lists of different length or a NaN score.
    """
    scores, labels = np.asarray(scores, dtype=np.float64).reshape(-1), np.asarray(labels).reshape(-1)
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores for {len(labels)} labels; give one of each.")
    if np.isnan(scores).any():
        raise ValueError(f"`scores[{int(np.isnan(scores).argmax())}]` is NaN.")
    cell = WeightedAuroc(len(scores))
    cell.add(scores, labels.astype(bool), np.arange(len(scores)))
    value = cell(np.ones((1, len(scores))))[0][0, 0]
    return None if np.isnan(value) else float(value)


__all__ = ["WeightedAuroc", "auroc"]
