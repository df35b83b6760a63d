"""Average precision of boxes, for the data and for many resamples at once.

Boxes are matched and ranked once. A resample only changes how often an image counts: with weights w, the k-th ranked
prediction stands for w copies in a row, of which the last has the highest recall and (if it is a true positive) the
highest precision. So the interpolated curve needs the weighted counts at true positives alone, and only sums of
weights between them have to be formed for every resample.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from evaluation.bootstrap import check_counts
from evaluation.metrics.boxes import BoxTable, overlap


RECALL_LEVELS = np.arange(101) / 100
_CHUNK_OVERLAPS = 2_000_000  # overlaps that are held at once, 16 MB
_CHUNK_VALUES = 4_000_000  # of resampled sums


def read_detections(
    predictions: Sequence, references: Sequence, num_classes: int | None, labelled: bool = True
) -> tuple[BoxTable, BoxTable, int]:
    """Tables of predictions and targets, and the number of classes (left out: the largest label seen, plus one).

    Raises:
        ValueError: as `BoxTable.read`, for lists of different length, or a label that is too large.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: give one dict per image in both."
        )
    found = BoxTable.read(predictions, "predictions", scored=True, labelled=labelled)
    targets = BoxTable.read(references, "references", scored=False, labelled=labelled)
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"`num_classes` is {num_classes}; a number of classes is not negative.")
    if num_classes is None:
        num_classes = int(max(table.labels.max(initial=-1) for table in (found, targets))) + 1
    for table, name in ((found, "predictions"), (targets, "references")):
        wrong = table.labels >= num_classes
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"`{name}[{table.entries[index]}]`: label {table.labels[index]} does not fit "
                f"num_classes={num_classes}; labels start at 0."
            )
    return found, targets, num_classes


class PooledDetections:
    """Ranked and matched predictions of a data set.

    Per class and IoU threshold the predictions are taken by falling score, equal ones in input order. Each takes the
    free target of its image and class with the highest IoU, if that is above the threshold.

    Args:
        predictions, targets: boxes; "image" below is an entry of these tables.
        num_classes: number C of classes.
        thresholds: T IoU thresholds.
        units: (entries,) the bootstrap unit of each image.
        num_units: number N of units.
        inclusive: an IoU equal to the threshold is a match, and of targets with equal IoU the last one is taken (both
            as in pycocotools); else it is not, and the first one is.
        max_detections: only so many predictions of highest score count per image and class.
        recall_levels: 101 levels, about k / 100.
    """

    def __init__(
        self,
        predictions: BoxTable,
        targets: BoxTable,
        num_classes: int,
        thresholds: Sequence[float],
        units: np.ndarray,
        num_units: int,
        inclusive: bool = False,
        max_detections: int | None = None,
        recall_levels: np.ndarray = RECALL_LEVELS,
    ):
        self.num_classes, self.num_units = num_classes, num_units
        self.thresholds = np.asarray(thresholds, dtype=np.float64)
        if not len(self.thresholds) or not ((self.thresholds >= 0) & (self.thresholds <= 1)).all():
            raise ValueError(f"IoU thresholds are {list(thresholds)}; give at least one, all from 0 to 1.")
        self.recall_levels = recall_levels
        self.num_predictions = np.bincount(predictions.labels, minlength=num_classes)
        self.num_targets = np.bincount(targets.labels, minlength=num_classes)
        target_table = np.bincount(
            units[targets.entries] * num_classes + targets.labels, minlength=num_units * num_classes
        )
        self._targets = target_table.reshape(num_units, num_classes).astype(np.float64)

        order = np.lexsort((-predictions.scores, predictions.labels))  # stable
        keys = predictions.entries[order] * num_classes + predictions.labels[order]
        grouped = np.argsort(keys, kind="stable")  # by image and class, in each by falling score
        if max_detections is not None:
            sorted_keys = keys[grouped]
            rank = np.arange(len(grouped)) - np.searchsorted(sorted_keys, sorted_keys)
            keep = np.ones(len(order), dtype=bool)
            keep[grouped] = rank < max_detections
            order, keys = order[keep], keys[keep]
            grouped = np.argsort(keys, kind="stable")
        matched = _match(
            predictions.boxes[order], keys, grouped, targets, num_classes, self.thresholds, inclusive
        )  # (predictions by class and score, T)
        labels = predictions.labels[order]
        owners = units[predictions.entries[order]]
        bounds = np.searchsorted(labels, np.arange(num_classes + 1))
        self._rankings = [
            _Ranking(owners[start:stop], matched[start:stop], num_units)
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        longest = max([ranking.length for ranking in self._rankings], default=0)
        self._rows = max(1, _CHUNK_VALUES // max(longest, num_units, 1))

    def __call__(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average precision and highest recall, both (B, C, T), of B resamples `counts` (B, N).

        NaN for a class without targets in a resample.
        """
        counts = check_counts(counts, self.num_units)
        shape = (len(counts), self.num_classes, len(self.thresholds))
        precision, recall = np.full(shape, np.nan), np.full(shape, np.nan)
        for start in range(0, len(counts), self._rows):
            part = slice(start, start + self._rows)
            weights = np.ascontiguousarray(np.asarray(counts[part], dtype=np.float64).T)  # (N, rows)
            totals = (weights.T @ self._targets).T  # (C, rows)
            for label, ranking in enumerate(self._rankings):
                defined = totals[label] > 0
                if not defined.any():
                    continue
                own = weights if defined.all() else np.ascontiguousarray(weights[:, defined])
                results = ranking(own, totals[label][defined], self.recall_levels)
                for table, values in zip((precision, recall), results, strict=True):
                    view = table[part, label]
                    view[defined] = values.T
        return precision, recall


class _Ranking:
    """The ranked predictions of one class: `units` (n,), `matched` (n, T)."""

    def __init__(self, units: np.ndarray, matched: np.ndarray, num_units: int):
        hits = np.flatnonzero(matched.any(1))
        self.hit_units = units[hits]
        self.columns = [np.flatnonzero(matched[hits, column]) for column in range(matched.shape[1])]
        # Row k sums the weights of the predictions after the hit k - 1 up to the hit k.
        last = hits[-1] + 1 if len(hits) else 0
        starts = np.concatenate([[0], hits + 1])
        self.steps = sparse.csr_array((np.ones(last), units[:last], starts), shape=(len(hits), num_units))
        self.length = len(hits)

    def __call__(self, weights: np.ndarray, totals: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`weights` (N, B), `totals` (B,) targets, all above 0 -> precision and recall (T, B)."""
        precision, recall = np.zeros((2, len(self.columns), len(totals)))
        if not self.length:
            return precision, recall
        seen = np.cumsum(self.steps @ weights, axis=0)  # weighted number of predictions up to each hit
        seen[seen == 0] = 1.0
        own = weights[self.hit_units]
        for column, chosen in enumerate(self.columns):
            if not len(chosen):
                continue
            hits = np.cumsum(own[chosen], axis=0)
            envelope = np.maximum.accumulate((hits / seen[chosen])[::-1], axis=0)[::-1]
            # Number of recall levels reached. The quotient is exact where it is whole; levels may be a little more
            # than k / 100, so that those met exactly are compared.
            level = np.minimum(np.floor(100 * hits / totals), 100).astype(np.int64)
            reached = level + 1 - (hits / totals < levels[level])
            precision[column] = (envelope * np.diff(reached, axis=0, prepend=0)).sum(0) / len(levels)
            recall[column] = hits[-1] / totals
        return precision, recall


def _match(
    boxes: np.ndarray,
    keys: np.ndarray,
    grouped: np.ndarray,
    targets: BoxTable,
    num_classes: int,
    thresholds: np.ndarray,
    inclusive: bool,
) -> np.ndarray:
    """Which predictions are true positives: (n, T) bool for `boxes` (n, 4) with `keys` (n,) of image and class.

    `grouped` sorts the predictions by key and, within a key, by falling score.
    """
    matched = np.zeros((len(boxes), len(thresholds)), dtype=bool)
    target_keys = targets.entries * num_classes + targets.labels
    target_order = np.argsort(target_keys, kind="stable")
    found_keys, found_starts, found_counts = np.unique(keys[grouped], return_index=True, return_counts=True)
    own_keys, own_starts, own_counts = np.unique(target_keys[target_order], return_index=True, return_counts=True)
    _, left, right = np.intersect1d(found_keys, own_keys, assume_unique=True, return_indices=True)
    found_starts, found_counts = found_starts[left], found_counts[left]
    own_starts, own_counts = own_starts[right], own_counts[right]
    for chosen in _similar_groups(found_counts, own_counts, len(thresholds)):
        rows = _padded(grouped, found_starts[chosen], found_counts[chosen])  # (G, n), -1 where there is none
        columns = _padded(target_order, own_starts[chosen], own_counts[chosen])  # (G, m)
        if inclusive:
            columns = columns[:, ::-1]  # argmax takes the first of equal ones
        overlaps = overlap(boxes[rows][:, :, None], targets.boxes[columns][:, None])  # (G, n, m)
        overlaps = np.where(columns[:, None] >= 0, overlaps, -1.0)
        free = np.ones((len(rows), len(thresholds), columns.shape[1]), dtype=bool)
        for rank in range(rows.shape[1]):
            candidates = np.where(free, overlaps[:, rank, None], -1.0)  # (G, T, m)
            best = candidates.argmax(-1)
            value = np.take_along_axis(candidates, best[..., None], -1)[..., 0]
            hit = (value >= thresholds) if inclusive else (value > thresholds)
            hit &= rows[:, rank, None] >= 0
            group, threshold = np.nonzero(hit)
            free[group, threshold, best[hit]] = False
            matched[rows[group, rank], threshold] = True
    return matched


def _similar_groups(first: np.ndarray, second: np.ndarray, num_thresholds: int) -> Iterator[np.ndarray]:
    """Indices of groups with about `first` x `second` entries, so many at a time that padded arrays stay small."""
    sizes = np.ceil(np.log2(np.stack([first, second])))
    for size in np.unique(sizes, axis=1).T:
        chosen = np.flatnonzero((sizes == size[:, None]).all(0))
        widest, deepest = first[chosen].max(), second[chosen].max()
        step = max(1, int(_CHUNK_OVERLAPS // (max(widest, num_thresholds) * deepest)))
        for start in range(0, len(chosen), step):
            yield chosen[start : start + step]


def _padded(order: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`order[start : start + count]` of each group as rows, -1 behind the end."""
    place = np.arange(counts.max())[None]
    inside = place < counts[:, None]
    return np.where(inside, order[np.where(inside, starts[:, None] + place, 0)], -1)


__all__ = ["RECALL_LEVELS", "PooledDetections", "read_detections"]
