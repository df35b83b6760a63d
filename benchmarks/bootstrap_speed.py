"""Time of the bootstrap of every metric of boxes and classes, on synthetic data of the size of the paper's test sets.

    python benchmarks/bootstrap_speed.py [--images 3000] [--region-images 3402] [--resamples 1000] [--only NAME ...]

"build" is what is done once (checks, matching, sorting), "value" one evaluation of the data, "bootstrap" all
resamples. Times are processor time, so that other programs disturb little; run it with OMP_NUM_THREADS=1.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np

from evaluation.bootstrap import Statistic, draw_counts, iterate_counts
from evaluation.metrics.box_auroc.box_auroc import BoxAurocStatistic
from evaluation.metrics.box_iou.box_iou import BoxIouStatistic
from evaluation.metrics.coco_map.coco_map import CocoMapStatistic
from evaluation.metrics.detection_map.detection_map import DetectionMapStatistic
from evaluation.metrics.grounding_iou.grounding_iou import GroundingIouStatistic
from evaluation.metrics.region_auroc.region_auroc import RegionAurocStatistic


CLASSES, BOXES = 15, 3  # VinDr-CXR: prompts and candidates of each
REGIONS, FINDINGS = 29, 53  # Chest ImaGenome


def boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random boxes (*shape, 4) xyxy in [0, 1]."""
    centre, size = rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.4, (*shape, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1).clip(0, 1)


def detections(rng: np.random.Generator, images: int) -> tuple[list[dict], list[dict]]:
    """Every class has 3 boxes in each image; a third of the classes are there, about one candidate near the target."""
    predictions, references = [], []
    for _ in range(images):
        present = np.flatnonzero(rng.random(CLASSES) < 1 / 3)
        targets = boxes(rng, len(present))
        found = boxes(rng, CLASSES, BOXES)
        found[present, 0] = (targets + rng.normal(0, 0.03, targets.shape)).clip(0, 1)
        found = np.concatenate([np.minimum(found[..., :2], found[..., 2:]), found[..., 2:]], axis=-1)
        labels = np.repeat(np.arange(CLASSES), BOXES)
        predictions.append({"boxes": found.reshape(-1, 4), "scores": rng.random(len(labels)), "labels": labels})
        references.append({"boxes": targets, "labels": present})
    return predictions, references


def phrases(rng: np.random.Generator, images: int) -> tuple[list[dict], list[dict], np.ndarray]:
    """Two phrases per image, each with 3 candidates and 1 to 3 targets."""
    predictions, references = [], []
    for _ in range(2 * images):
        targets = boxes(rng, int(rng.integers(1, 4)))
        predictions.append({"boxes": boxes(rng, BOXES), "scores": rng.random(BOXES)})
        references.append({"boxes": targets})
    return predictions, references, np.repeat(np.arange(images), 2)


def makers(rng: np.random.Generator, images: int, region_images: int) -> dict[str, Callable[[], Statistic]]:
    """Name -> what builds the statistic; the data are made when asked for."""

    def detection_map() -> Callable[[], Statistic]:
        data = detections(rng, images)
        return lambda: DetectionMapStatistic(*data, CLASSES)

    def coco_map() -> Callable[[], Statistic]:
        data = detections(rng, images)
        return lambda: CocoMapStatistic(*data, CLASSES)

    def grounding_iou() -> Callable[[], Statistic]:
        found, wanted, owners = phrases(rng, images)
        return lambda: GroundingIouStatistic(found, wanted, images=owners, num_images=images)

    def region_auroc() -> Callable[[], Statistic]:
        shape = (region_images, REGIONS, FINDINGS)
        scores, present = rng.random(shape), rng.random(shape[:2]) < 0.95
        labels = (rng.random(shape) < rng.beta(0.3, 6, shape[1:])).astype(np.int8)
        return lambda: RegionAurocStatistic(scores, labels, present)

    def box_auroc() -> Callable[[], Statistic]:
        scores, labels = rng.random((2 * images, 8)), rng.integers(0, 8, 2 * images)
        return lambda: BoxAurocStatistic(scores, labels, images=np.repeat(np.arange(images), 2))

    def box_iou() -> Callable[[], Statistic]:
        owners = np.repeat(np.arange(images), REGIONS)
        pairs = boxes(rng, len(owners)), boxes(rng, len(owners))
        return lambda: BoxIouStatistic(*pairs, np.tile(np.arange(REGIONS), images), owners)

    every = (detection_map, coco_map, grounding_iou, region_auroc, box_auroc, box_iou)
    return {maker.__name__: maker for maker in every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--region-images", type=int, default=3402)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--only", nargs="+", help="names of metrics")
    arguments = parser.parse_args()

    start = time.process_time()
    draw_counts(arguments.images, arguments.resamples)
    print(f"{'':16}{'build':>10}{'value':>10}{'bootstrap':>12}   seconds of one core")
    print(f"{'draw':16}{'':10}{'':10}{time.process_time() - start:12.2f}")
    total = 0.0
    table = makers(np.random.default_rng(0), arguments.images, arguments.region_images)
    for name, maker in table.items():
        if arguments.only and name not in arguments.only:
            continue
        build = maker()
        marks = [time.process_time()]
        statistic = build()
        marks.append(time.process_time())
        statistic(np.ones((1, statistic.num_units)))
        marks.append(time.process_time())
        for counts in iterate_counts(statistic.num_units, arguments.resamples):
            statistic(counts)
        marks.append(time.process_time())
        spent = np.diff(marks)
        total += spent.sum()
        print(f"{name:16}{spent[0]:10.2f}{spent[1]:10.2f}{spent[2]:12.2f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'all':16}{total:32.2f}   peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
