"""Phrase grounding as the ChEX paper scores it (arXiv 2404.15770, sentence grounding): mIoU and mAP; and hit rates.

For a score threshold tau the union of the kept predicted boxes is compared with the union of the target boxes of a
phrase; intersections and unions are summed over all phrases before dividing (micro over the set), and mIoU is the mean
over tau = 0.1, 0.2, ..., 0.5. mAP pools the boxes of all phrases, each (image, phrase) being its own picture. Hit
rates, which the paper does not have, look at the box with the highest score alone.

Usable directly and through `evaluate.load("evaluation/metrics/grounding_iou")`, without a network; the `evaluation`
package must be importable.
"""

from collections.abc import Iterator, Mapping, Sequence

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.metrics.average_precision import PooledDetections, read_detections
from evaluation.metrics.boxes import BoxTable, check_units, overlap
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.detection_map.detection_map import IOU_THRESHOLDS, REPORTED


SCORE_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
HIT_THRESHOLDS = (0.3, 0.5)
OFFICIAL_GRID = 1024
_CHUNK_CELLS = 4_000_000

_DESCRIPTION = (
    "IoU of unions of boxes, micro over the set, averaged over score thresholds; mAP and hit rates of phrases."
)
_CITATION = ""
_KWARGS = """
Args:
    predictions: one dict per (image, phrase): boxes (n, 4) xyxy, scores (n).
    references: one dict per (image, phrase): boxes (m, 4) of the same unit.
    score_thresholds: a box is kept if its score is strictly above.
    grid: None computes areas exactly in any unit; an integer G takes boxes normalised to [0, 1] and truncates their
        corners to a G x G grid, end exclusive (G = 1024 is the official definition).
    iou_thresholds: thresholds of the mAP.
    official: grid 1024 unless another is given, and a set without any target has mAP 0 instead of none.
Returns:
    miou: mean over score thresholds; best_iou: the highest of them; iou_at: {threshold: IoU};
    macro_iou: mean over phrases of their own mean over score thresholds, so that small boxes count as much as large;
    hit_rate: {"0.3", "0.5": share of phrases whose highest-scored box has at least that IoU with one of the targets};
    pointing_game: share of phrases with the centre of that box inside a target; a phrase without a box is a miss;
    map, map10, map30, map50: average precision of the pooled phrases; count: number of phrases. None if undefined.
"""


def union_overlap(
    boxes: np.ndarray, scores: np.ndarray, targets: np.ndarray, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Area of the intersection and of the union of two unions of boxes, exactly, by coordinate compression.

    Args:
        boxes: (P, n, 4) xyxy predicted boxes of P phrases.
        scores: (P, n) their scores.
        targets: (P, m, 4) xyxy.
        thresholds: K values; for each the predictions with a score strictly above it are united.
    Returns:
        Intersection and union, both (P, K) float64, in squared units of the boxes.
    """
    every = np.concatenate([boxes, targets], axis=1)
    phrases = len(every)
    if not every.shape[1]:
        return np.zeros((phrases, len(thresholds))), np.zeros((phrases, len(thresholds)))
    # Lines that coincide only add cells without area.
    xs = np.sort(every[:, :, [0, 2]].reshape(phrases, -1), axis=1)
    ys = np.sort(every[:, :, [1, 3]].reshape(phrases, -1), axis=1)
    area = np.diff(xs)[:, :, None] * np.diff(ys)[:, None, :]  # (P, X, Y)

    def cells(rectangles: np.ndarray) -> np.ndarray:
        """(P, k, X, Y) bool: which cells each rectangle covers."""
        x0, y0, x1, y1 = np.moveaxis(rectangles, -1, 0)[..., None]
        inside_x = (xs[:, None, :-1] >= x0) & (xs[:, None, 1:] <= x1)
        inside_y = (ys[:, None, :-1] >= y0) & (ys[:, None, 1:] <= y1)
        return inside_x[:, :, :, None] & inside_y[:, :, None, :]

    target = cells(targets).any(1)
    highest = np.where(cells(boxes), scores[:, :, None, None], -np.inf).max(1, initial=-np.inf)  # (P, X, Y)
    parts = []
    for threshold in thresholds:
        predicted = highest > threshold
        parts.append([(area * (predicted & target)).sum((1, 2)), (area * (predicted | target)).sum((1, 2))])
    intersection, union = np.moveaxis(np.array(parts).reshape(len(thresholds), 2, phrases), 0, -1)
    return intersection, union


class GroundingIouStatistic:
    """Grounding scores for bootstrapping.

    `names`: miou, best_iou, iou_at_10 ... iou_at_50 (one per score threshold, in per cent), macro_iou, hit_rate_30,
    hit_rate_50, pointing_game, and unless `with_map` is off map, map10, map30, map50. All phrases of an image are
    drawn together.

    Args:
        predictions, references, score_thresholds, grid, iou_thresholds, official: as `grounding_iou`.
        images: the image of each phrase; left out: each phrase is a unit.
        num_images: number of images; left out: as large as `images` needs.
        with_map: off leaves average precision out.

    Raises:
        ValueError: as `grounding_iou`.
    """

    def __init__(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        score_thresholds: Sequence[float] = SCORE_THRESHOLDS,
        grid: int | None = None,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
        with_map: bool = True,
        official: bool = False,
        images: Sequence[int] | None = None,
        num_images: int | None = None,
    ):
        if not len(score_thresholds) or not len(iou_thresholds):
            raise ValueError("`score_thresholds` and `iou_thresholds` need at least one entry each.")
        found, targets, _ = read_detections(predictions, references, 1, labelled=False)
        self.num_phrases = len(predictions)
        self.thresholds = tuple(float(t) for t in score_thresholds)
        units, self.num_units = check_units(images, num_images, self.num_phrases)
        self.official = official
        if grid is None and official:
            grid = OFFICIAL_GRID
        intersection, union = _areas(found, targets, self.thresholds, grid)
        own = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0).mean(1)
        columns = [intersection, union, own[:, None], *_hits(found, targets), np.ones((self.num_phrases, 1))]
        self._sums = np.zeros((self.num_units, sum(part.shape[1] for part in columns)))
        np.add.at(self._sums, units, np.concatenate(columns, axis=1))
        self.names = (
            "miou",
            "best_iou",
            *(f"iou_at_{100 * t:g}" for t in self.thresholds),
            "macro_iou",
            *(f"hit_rate_{100 * t:g}" for t in HIT_THRESHOLDS),
            "pointing_game",
        )
        self.detections = None
        if with_map:
            levels = sorted({*iou_thresholds, *REPORTED.values()})
            self.detections = PooledDetections(found, targets, 1, levels, units, self.num_units)
            self._averaged = [levels.index(t) for t in iou_thresholds]
            self._reported = [levels.index(t) for t in REPORTED.values()]
            self.names += ("map", *REPORTED)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N) -> values (B, len(names)); see `evaluation.bootstrap.Statistic`."""
        sums = check_counts(counts, self.num_units) @ self._sums
        number = len(self.thresholds)
        intersection, union, means, phrases = np.split(sums, [number, 2 * number, sums.shape[1] - 1], axis=1)
        iou = np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)
        means = np.divide(means, phrases, out=np.full(means.shape, np.nan), where=phrases > 0)
        columns = [iou.mean(1), iou.max(1), iou, means]
        if self.detections is not None:
            precision = self.detections(counts)[0][:, 0]
            if self.official:
                precision = np.nan_to_num(precision, nan=0.0)
            columns += [precision[:, self._averaged].mean(1), precision[:, self._reported]]
        return np.column_stack(columns)


def _areas(
    found: BoxTable, targets: BoxTable, thresholds: Sequence[float], grid: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union (phrases, thresholds)."""
    boxes, wanted = found.boxes, targets.boxes
    if grid is not None:
        boxes, wanted = (np.clip(np.trunc(part * grid), 0, grid) for part in (boxes, wanted))
    intersection, union = np.zeros((2, found.num_entries, len(thresholds)))
    for phrases, left, right in _alike(found, targets):
        intersection[phrases], union[phrases] = union_overlap(
            boxes[left], found.scores[left], wanted[right], thresholds
        )
    return intersection, union


def _alike(found: BoxTable, targets: BoxTable) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Phrases with the same numbers n of predictions and m of targets: (P,), their rows (P, n) and (P, m)."""
    first, second = found.counts, targets.counts
    starts = np.cumsum(first) - first, np.cumsum(second) - second
    for n, m in np.unique(np.stack([first, second], axis=1), axis=0):
        every = np.flatnonzero((first == n) & (second == m))
        step = max(1, int(_CHUNK_CELLS // max((n + m) * 4 * (n + m) ** 2, 1)))
        for start in range(0, len(every), step):
            phrases = every[start : start + step]
            yield phrases, starts[0][phrases, None] + np.arange(n), starts[1][phrases, None] + np.arange(m)


def _hits(found: BoxTable, targets: BoxTable) -> tuple[np.ndarray, np.ndarray]:
    """Of each phrase: IoU of its best box at least each of HIT_THRESHOLDS (P, 2), its centre in a target (P, 1)."""
    overlaps, pointed = np.zeros(found.num_entries), np.zeros((found.num_entries, 1))
    for phrases, left, right in _alike(found, targets):
        if left.shape[1] and right.shape[1]:
            best = np.take_along_axis(left, found.scores[left].argmax(1)[:, None], axis=1)
            boxes, wanted = found.boxes[best], targets.boxes[right]  # (P, 1, 4), (P, m, 4)
            overlaps[phrases] = overlap(boxes, wanted).max(1)
            centre = (boxes[..., :2] + boxes[..., 2:]) / 2
            inside = (centre >= wanted[..., :2]) & (centre <= wanted[..., 2:])
            pointed[phrases, 0] = inside.all(-1).any(-1)
    return overlaps[:, None] >= np.array(HIT_THRESHOLDS), pointed


def grounding_iou(
    predictions: Sequence[Mapping],
    references: Sequence[Mapping],
    score_thresholds: Sequence[float] = SCORE_THRESHOLDS,
    grid: int | None = None,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    with_map: bool = True,
    official: bool = False,
) -> dict:
    """Grounding scores; see the module's `_KWARGS`. `with_map=False` leaves the average precision out (for tuning).

    Raises:
        ValueError: if the lists differ in length, a prediction has not one score per box, a box is not finite or has a
            negative size, or a score is NaN; the entry is named.
    """
    statistic = GroundingIouStatistic(
        predictions, references, score_thresholds, grid, iou_thresholds, with_map, official
    )
    found = statistic(np.ones((1, statistic.num_units)))[0].tolist()
    values = {name: None if np.isnan(v) else v for name, v in zip(statistic.names, found, strict=True)}
    result = {
        "miou": values["miou"],
        "best_iou": values["best_iou"],
        "iou_at": {f"{t:g}": values[f"iou_at_{100 * t:g}"] for t in statistic.thresholds},
        "macro_iou": values["macro_iou"],
        "hit_rate": {f"{t:g}": values[f"hit_rate_{100 * t:g}"] for t in HIT_THRESHOLDS},
        "pointing_game": values["pointing_game"],
        "count": statistic.num_phrases,
    }
    return result | ({name: values[name] for name in ("map", *REPORTED)} if with_map else {})


class GroundingIou(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `grounding_iou`."""

    def _info(self) -> evaluate.MetricInfo:
        boxes = datasets.List(datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": {"boxes": boxes, "scores": datasets.List(datasets.Value("float64"))},
                    "references": {"boxes": boxes},
                }
            ),
        )

    def _compute(self, predictions: list, references: list, **kwargs) -> dict:
        return grounding_iou(predictions, references, **kwargs)
