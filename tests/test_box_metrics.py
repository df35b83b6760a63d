"""Metrics of boxes and classes: independent implementations, resamples as repeated data, bad input, official mode."""

import contextlib
import io
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mean_average_precision import MetricBuilder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from evaluation.bootstrap import Statistic, bootstrap, draw_counts
from evaluation.metrics import average_precision, weighted_auroc
from evaluation.metrics.box_auroc.box_auroc import BoxAuroc, BoxAurocStatistic, box_auroc
from evaluation.metrics.box_iou.box_iou import BoxIouStatistic, box_iou
from evaluation.metrics.boxes import pairwise_iou
from evaluation.metrics.coco_map.coco_map import CocoMap, CocoMapStatistic, coco_map
from evaluation.metrics.detection_map.detection_map import DetectionMapStatistic, detection_map
from evaluation.metrics.grounding_iou.grounding_iou import GroundingIouStatistic, grounding_iou
from evaluation.metrics.region_auroc.region_auroc import RegionAurocStatistic, region_auroc
from evaluation.metrics.weighted_auroc import WeightedAuroc, auroc
from evaluation.tasks.detection import Candidates, DetectionSettings, post_process


METRICS = Path(__file__).parents[1] / "evaluation" / "metrics"


def random_boxes(rng, count, size, whole):
    first, second = rng.uniform(0, size, (2, count, 2))
    if whole:
        first, second = np.floor(first), np.floor(second)
    return np.concatenate([np.minimum(first, second), np.maximum(first, second) + 1], axis=1)


def random_detections(rng, images=6, classes=3, most_targets=4, most_predictions=6, size=8, whole=True, levels=0):
    """Some images and classes stay empty. `levels` > 0: equal scores between images, none inside an image."""
    predictions, references = [], []
    for _ in range(images):
        targets, found = int(rng.integers(0, most_targets + 1)), int(rng.integers(0, most_predictions + 1))
        boxes = random_boxes(rng, targets, size, whole)
        references.append({"boxes": boxes, "labels": rng.integers(0, classes, targets)})
        near = boxes[rng.integers(0, targets, found)] if targets else np.zeros((found, 4))
        moved = near + rng.integers(-1, 2, (found, 4)) * (1 if whole else rng.random((found, 4)))
        moved = np.where(rng.random((found, 1)) < 0.7, moved, random_boxes(rng, found, size, whole))
        moved = np.concatenate([moved[:, :2], np.maximum(moved[:, 2:], moved[:, :2] + 1)], axis=1)
        scores = rng.permutation(max(levels, found))[:found] / 16 if levels else rng.random(found)
        predictions.append({"boxes": moved, "labels": rng.integers(0, classes, found), "scores": scores})
    return predictions, references


# -- independent implementations --------------------------------------------------------------------------------------


def pycocotools_result(predictions, references, classes):
    truth, results = COCO(), []
    boxes = [
        {"image_id": image, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0], "area": 1.0, "iscrowd": 0}
        for image, item in enumerate(references)
        for (x0, y0, x1, y1), label in zip(item["boxes"].tolist(), item["labels"], strict=True)
    ]
    truth.dataset = {
        "images": [{"id": image} for image in range(len(references))],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": [box | {"id": number} for number, box in enumerate(boxes, start=1)],
    }
    for image, item in enumerate(predictions):
        for (x0, y0, x1, y1), label, score in zip(item["boxes"].tolist(), item["labels"], item["scores"], strict=True):
            results.append(
                {
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    curves = evaluation.eval["precision"][:, :, :, 0, 2]  # (thresholds, recalls, classes)
    per_class = [None if (curves[..., label] == -1).all() else curves[..., label].mean() for label in range(classes)]
    return evaluation.stats[[0, 1, 2, 8]], per_class


@pytest.mark.parametrize("seed", range(12))
def test_coco_map_is_that_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    predictions, references = random_detections(rng, images=9, classes=4, levels=8 if seed % 2 else 0)
    assert any(len(item["boxes"]) for item in predictions)
    stats, per_class = pycocotools_result(predictions, references, 5)  # class 4 has no boxes
    result = coco_map(predictions, references, 5)
    values = [-1 if result[name] is None else result[name] for name in ("map", "map50", "map75", "mar100")]
    assert values == pytest.approx(stats.tolist(), abs=1e-12)
    assert [row["ap"] for row in result["per_class"]] == pytest.approx(per_class, abs=1e-12)
    assert result["per_class"][4]["ap"] is None


def test_coco_map_of_crowded_images():
    """More than 100 boxes of a class in an image, and so many targets that recall levels are met exactly."""
    rng = np.random.default_rng(3)
    predictions, references = random_detections(rng, 2, 2, most_targets=100, most_predictions=400, size=30)
    assert max(np.bincount(item["labels"]).max() for item in predictions) > 100
    stats, _ = pycocotools_result(predictions, references, 2)
    result = coco_map(predictions, references, 2)
    assert [result[name] for name in ("map", "map50", "map75", "mar100")] == pytest.approx(stats.tolist(), abs=1e-12)


@pytest.mark.parametrize("count", [20, 40, 100])
def test_recall_levels_met_exactly(count):
    """One true positive after the other: recall takes the values k / count, some of which are levels."""
    rng = np.random.default_rng(count)
    boxes = np.array([[3 * k, 0, 3 * k + 2, 2] for k in range(count)], dtype=float)
    wrong = boxes + [0, 10, 0, 10]
    shown = np.where(rng.random((count, 1)) < 0.6, boxes, wrong)
    predictions = [{"boxes": shown, "labels": np.zeros(count, int), "scores": rng.random(count)}]
    references = [{"boxes": boxes, "labels": np.zeros(count, int)}]
    stats, _ = pycocotools_result(predictions, references, 1)
    assert coco_map(predictions, references)["map"] == pytest.approx(stats[0], abs=1e-12)
    # The paper's levels are k / 100, which pycocotools' own are not all.
    order = np.argsort(-predictions[0]["scores"])
    hits = np.cumsum((shown == boxes).all(1)[order])
    precision = hits / np.arange(1, count + 1)
    expected = np.mean([max(precision[100 * hits >= level * count], default=0) for level in range(101)])
    assert detection_map(predictions, references)["map"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_detection_map_is_that_of_the_official_package(seed):
    predictions, references = random_detections(np.random.default_rng(seed), images=8, whole=False)
    classes = 4  # the last one is absent and counts 0
    metric = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=classes)
    shift = np.array([0, 0, 1, 1])  # that package counts pixels, with both ends
    for found, wanted in zip(predictions, references, strict=True):
        metric.add(
            np.column_stack([1000 * found["boxes"] - shift, found["labels"], found["scores"]]),
            np.column_stack([1000 * wanted["boxes"] - shift, wanted["labels"], np.zeros((len(wanted["labels"]), 2))]),
        )
    thresholds = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    levels = np.arange(101) / 100
    expected = metric.value(iou_thresholds=thresholds, recall_thresholds=levels, mpolicy="soft")
    result = detection_map(predictions, references, classes, official=True)
    assert result["map"] == pytest.approx(float(expected["mAP"]), abs=1e-6)
    for name, threshold in (("map10", 0.1), ("map30", 0.3), ("map50", 0.5)):
        values = [expected[threshold][label]["ap"] for label in range(classes)]
        assert result[name] == pytest.approx(np.mean(values), abs=1e-6)
        if name == "map50":
            found = [row["ap50"] or 0.0 for row in result["per_class"]]
            assert found == pytest.approx(values, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 3, 20]), st.sampled_from([1.0, 0.5]))
def test_auroc_is_that_of_scikit_learn(seed, levels, factor):
    """With weights, ties, several scores of a unit; counts that are not whole take the other precision."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, 30) / 7 if levels else rng.random(30)
    positive, units = rng.random(30) < 0.4, rng.integers(0, 12, 30)
    cells = WeightedAuroc(12)
    cells.add(scores, positive, units)
    counts = draw_counts(12, 6, seed)
    area, positives, negatives = cells(counts * factor)
    for row, weights in enumerate(counts[:, units]):
        assert positives[row, 0] == weights[positive].sum() * factor
        assert negatives[row, 0] == weights[~positive].sum() * factor
        if weights[positive].any() and weights[~positive].any():
            expected = roc_auc_score(positive, scores, sample_weight=weights)
            assert area[row, 0] == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(area[row, 0])


def test_auroc_in_both_precisions():
    """5,000 scores of 5,000 images: sums are beyond what single precision counts."""
    rng = np.random.default_rng(0)
    scores, positive = np.round(rng.random(5000), 3), rng.random(5000) < 0.5
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert auroc(scores[:3000], positive[:3000]) == pytest.approx(
        roc_auc_score(positive[:3000], scores[:3000]), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_box_classification_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(4), 60)
    labels = np.append(np.arange(4), rng.integers(0, 4, 56))
    result = box_auroc(scores, labels)
    predicted = scores.argmax(1)
    assert result["auroc"] == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr", average="macro"))
    assert result["accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert result["mcc"] == pytest.approx(matthews_corrcoef(labels, predicted))
    assert result["positives"] == np.bincount(labels).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_region_auroc_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random((40, 3, 4)), 1)
    labels, present = (rng.random((40, 3, 4)) < 0.3).astype(int), rng.random((40, 3)) < 0.8
    labels[:, 1, 2] = 0
    result = region_auroc(scores, labels, present)
    weights = (labels * present[..., None]).sum(0)
    values = np.zeros((3, 4))
    for region in range(3):
        for label in range(4):
            if weights[region, label]:
                own = present[:, region]
                values[region, label] = roc_auc_score(labels[own, region, label], scores[own, region, label])
    assert result["weighted"] == pytest.approx((values * weights).sum() / weights.sum())
    assert result["macro"] == pytest.approx(((values * weights).sum(0) / weights.sum(0)).mean())
    assert result["cells"][1][2] is None


@pytest.mark.parametrize("seed", range(3))
def test_grounding_on_the_official_grid(seed):
    """Painted masks of 1024 x 1024, as the official code makes them."""
    rng = np.random.default_rng(seed)
    predictions, references = random_detections(rng, 12, classes=1, most_targets=3, most_predictions=3, whole=False)
    for item in (*predictions, *references):
        item["boxes"] = item["boxes"] / 10
    for item in predictions:
        item["boxes"] = item["boxes"].clip(0, 1)

    def paint(boxes):
        mask = np.zeros((1024, 1024), dtype=bool)
        for x0, y0, x1, y1 in (boxes * 1024).astype(int):
            mask[y0:y1, x0:x1] = True
        return mask

    expected = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        common = union = 0
        for found, wanted in zip(predictions, references, strict=True):
            predicted, actual = paint(found["boxes"][found["scores"] > threshold]), paint(wanted["boxes"])
            common, union = common + (predicted & actual).sum(), union + (predicted | actual).sum()
        expected.append(common / union)
    result = grounding_iou(predictions, references, official=True)
    assert list(result["iou_at"].values()) == pytest.approx(expected, abs=1e-12)
    assert result["miou"] == pytest.approx(np.mean(expected))
    assert result["best_iou"] == max(expected)


# -- resamples --------------------------------------------------------------------------------------------------------


def detection_case(rng, statistic, function, **options):
    predictions, references = random_detections(rng, classes=3, levels=12)

    def repeated(counts):
        chosen = np.repeat(np.arange(len(predictions)), counts)
        result = function([predictions[i] for i in chosen], [references[i] for i in chosen], 4, **options)
        return result | {
            f"ap_class_{label}": (row["ap"] or 0.0) if options.get("official") else row["ap"]
            for label, row in enumerate(result["per_class"])
        }

    return statistic(predictions, references, 4, **options), repeated


def grounding_case(rng, **options):
    phrases = 14
    images = np.sort(rng.integers(0, 6, phrases))
    predictions, references = random_detections(rng, phrases, 1, most_targets=2, most_predictions=3, levels=9)
    if options.get("grid"):
        for item in (*predictions, *references):
            item["boxes"] = item["boxes"].clip(0, 10) / 10

    def repeated(counts):
        chosen = np.repeat(np.arange(phrases), counts[images])
        result = grounding_iou([predictions[i] for i in chosen], [references[i] for i in chosen], **options)
        flat = {f"iou_at_{100 * float(t):g}": value for t, value in result["iou_at"].items()}
        return result | flat | {f"hit_rate_{100 * float(t):g}": value for t, value in result["hit_rate"].items()}

    return GroundingIouStatistic(predictions, references, images=images, num_images=6, **options), repeated


def region_case(rng, official):
    scores, present = np.round(rng.random((7, 3, 4)), 1), rng.random((7, 3)) < 0.8
    labels = rng.integers(-1, 2, (7, 3, 4))

    def repeated(counts):
        chosen = np.repeat(np.arange(7), counts)
        return region_auroc(scores[chosen], labels[chosen], present[chosen], official)

    return RegionAurocStatistic(scores, labels, present, official), repeated


def box_case(rng, official, by_image):
    scores, labels = np.round(rng.random((9, 3)), 1), rng.integers(0, 3, 9)
    images = np.sort(rng.integers(0, 5, 9)) if by_image else np.arange(9)

    def repeated(counts):
        chosen = np.repeat(np.arange(9), counts[images])
        result = box_auroc(scores[chosen], labels[chosen], 3, official)
        areas = [(v or 0.0) if official else v for v in result["per_class"]]
        return result | {f"auroc_class_{label}": value for label, value in enumerate(areas)}

    units = {"images": images, "num_images": 5} if by_image else {}
    return BoxAurocStatistic(scores, labels, 3, official, **units), repeated


def overlap_case(rng):
    boxes, targets = random_boxes(rng, 10, 6, True), random_boxes(rng, 10, 6, True)
    labels, images = rng.integers(0, 3, 10), rng.integers(0, 4, 10)

    def repeated(counts):
        chosen = np.repeat(np.arange(10), counts[images])
        return box_iou(boxes[chosen], targets[chosen], labels[chosen])

    return BoxIouStatistic(boxes, targets, labels, images, 4), repeated


CASES = {
    "detection": lambda rng: detection_case(rng, DetectionMapStatistic, detection_map),
    "detection_official": lambda rng: detection_case(rng, DetectionMapStatistic, detection_map, official=True),
    "detection_thresholds": lambda rng: detection_case(
        rng, DetectionMapStatistic, detection_map, iou_thresholds=(0.5, 0.25)
    ),
    "coco": lambda rng: detection_case(rng, CocoMapStatistic, coco_map),
    "coco_official": lambda rng: detection_case(rng, CocoMapStatistic, coco_map, official=True),
    "grounding": lambda rng: grounding_case(rng),
    "grounding_official": lambda rng: grounding_case(rng, grid=64, official=True),
    "grounding_plain": lambda rng: grounding_case(rng, with_map=False, score_thresholds=(0.05, 0.2)),
    "region": lambda rng: region_case(rng, False),
    "region_official": lambda rng: region_case(rng, True),
    "boxes": lambda rng: box_case(rng, False, True),
    "boxes_official": lambda rng: box_case(rng, True, False),
    "overlap": overlap_case,
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_resamples_are_repeated_data(name):
    for seed in range(4):
        rng = np.random.default_rng([seed, len(name)])
        statistic, repeated = CASES[name](rng)
        assert isinstance(statistic, Statistic)
        counts = draw_counts(statistic.num_units, 12, seed)
        values = statistic(counts)
        assert values.shape == (12, len(statistic.names))
        for row, weights in enumerate(counts):
            expected = repeated(weights)
            for column, key in enumerate(statistic.names):
                wanted = expected[key]
                if wanted is None:
                    assert np.isnan(values[row, column]), (seed, row, key)
                else:
                    assert values[row, column] == pytest.approx(wanted, abs=1e-12), (seed, row, key)


@pytest.mark.parametrize("name", sorted(CASES))
def test_plain_values_are_the_point_estimates_exactly(name):
    statistic, repeated = CASES[name](np.random.default_rng(11))
    ones = np.ones(statistic.num_units, dtype=int)
    plain, values = repeated(ones), statistic(ones[None])[0]
    assert values.tolist() == pytest.approx([np.nan if plain[key] is None else plain[key] for key in statistic.names],
                                            nan_ok=True, rel=1e-14)  # fmt: skip
    points = [entry["value"] for entry in bootstrap(statistic, 5).values()]
    assert points == [None if np.isnan(value) else value for value in values]


@pytest.mark.parametrize("name", sorted(CASES))
def test_counts_of_another_number_of_units_are_refused(name):
    statistic, _ = CASES[name](np.random.default_rng(0))
    with pytest.raises(ValueError, match=rf"expected \(resamples, {statistic.num_units}\)"):
        statistic(np.ones((2, statistic.num_units + 1)))


def test_values_do_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(2)
    predictions, references = random_detections(rng, images=20, most_targets=8, most_predictions=12)
    counts = draw_counts(20, 30)
    scores, labels = rng.random((20, 2, 2)), rng.integers(0, 2, (20, 2, 2))

    def compute():
        return [
            DetectionMapStatistic(predictions, references, 3)(counts),
            GroundingIouStatistic(predictions, references)(counts),
            RegionAurocStatistic(scores, labels, np.ones((20, 2)))(counts),
        ]

    whole = compute()
    monkeypatch.setattr(average_precision, "_CHUNK_OVERLAPS", 10)
    monkeypatch.setattr(average_precision, "_CHUNK_VALUES", 100)
    monkeypatch.setattr(weighted_auroc, "_CHUNK_ROWS", 7)
    for first, second in zip(whole, compute(), strict=True):
        assert first == pytest.approx(second, abs=1e-12, nan_ok=True)


def test_a_rare_class_is_undefined_in_some_resamples():
    """D10: the official code counts those as 0, so that its mean lies below the value."""
    predictions, references = [], []
    for image in range(6):
        boxes = np.array([[0, 0, 2, 2], [4, 4, 6, 6]], dtype=float)[: 2 if image == 0 else 1]
        entry = {"boxes": boxes, "labels": np.arange(len(boxes))}
        references.append(entry)
        predictions.append(entry | {"scores": np.full(len(boxes), 0.5)})
    right = bootstrap(DetectionMapStatistic(predictions, references, 2), 200)
    missing = int((draw_counts(6, 200)[:, 0] == 0).sum())
    assert right["map"] == {"value": 1.0, "mean": 1.0, "std": 0.0, "low": 1.0, "high": 1.0, "undefined": 0}
    assert right["ap_class_1"]["undefined"] == missing > 0
    official = bootstrap(DetectionMapStatistic(predictions, references, 2, official=True), 200)
    assert official["map"]["value"] == 1.0
    assert official["map"]["mean"] == pytest.approx(1 - missing / 200 / 2)


def test_drawing_boxes_narrows_the_interval():
    """D13: 8 equal boxes per image; as many images as boxes would be needed for the official interval."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(30), 8)
    labels = np.tile(np.arange(2), 120)
    quality = rng.normal(0.4, 1, 30)[images]  # all boxes of an image are classified well or badly
    right = np.stack([-quality, quality], axis=1)
    scores = np.where(labels[:, None] == 1, right, right[:, ::-1])
    by_image = bootstrap(BoxAurocStatistic(scores, labels, images=images), 300)
    by_box = bootstrap(BoxAurocStatistic(scores, labels, official=True), 300)
    assert by_box["auroc"]["value"] == by_image["auroc"]["value"]
    assert by_box["auroc"]["std"] < 0.7 * by_image["auroc"]["std"]


# -- acceptance -------------------------------------------------------------------------------------------------------


def test_perfect_predictions():
    rng = np.random.default_rng(0)
    references = [{"boxes": random_boxes(rng, 3, 20, False), "labels": np.arange(3)} for _ in range(4)]
    predictions = [item | {"scores": rng.uniform(0.6, 1, 3)} for item in references]
    assert detection_map(predictions, references)["map"] == 1.0
    assert coco_map(predictions, references)["map"] == pytest.approx(1.0)
    found = grounding_iou(predictions, references)
    assert (found["miou"], found["map"], found["hit_rate"]["0.5"], found["pointing_game"]) == (1, 1, 1, 1)


def test_an_overlap_of_the_threshold_matches_for_coco_only():
    references = [{"boxes": [[0, 0, 10, 1]], "labels": [0]}]
    predictions = [{"boxes": [[0, 0, 5, 1]], "labels": [0], "scores": [0.5]}]  # IoU 0.5
    assert detection_map(predictions, references)["map50"] == 0.0
    assert detection_map(predictions, references)["map30"] == 1.0
    assert coco_map(predictions, references)["map50"] == pytest.approx(1.0)


def test_absent_class_lowers_the_official_mean():
    references = [{"boxes": [[0, 0, 2, 2], [3, 3, 5, 5]], "labels": [0, 1]}]
    predictions = [references[0] | {"scores": [0.9, 0.8]}]
    for function in (detection_map, coco_map):
        result = function(predictions, references, 3)
        assert (result["map"], result["classes_defined"]) == (pytest.approx(1), 2)
        assert function(predictions, references, 3, official=True)["map"] == pytest.approx(2 / 3)


def test_envelope_and_class_factors():
    boxes = np.array([[[[0.2, 0.2, 0.4, 0.4], [0.6, 0.5, 0.8, 0.7]], [[0.4, 0.4, 0.6, 0.6], [0.4, 0.4, 0.6, 0.6]]]])
    candidates = Candidates(boxes, np.array([[[0.9, 0.0], [0.5, 0.2]]]), np.zeros((1, 2, 2)))
    options = DetectionSettings(score="weights", merge="envelope", scales=(1.0, 2.0))
    predictions = post_process(candidates, options)
    # One box around all, whatever their scores; class 1 doubled about its centre.
    references = [{"boxes": [[0.2, 0.2, 0.8, 0.7], [0.3, 0.3, 0.7, 0.7]], "labels": [0, 1]}]
    assert predictions[0]["boxes"] == pytest.approx(np.array(references[0]["boxes"]))
    assert predictions[0]["scores"].tolist() == [0.9, 0.5]
    assert detection_map(predictions, references)["map"] == 1.0
    assert detection_map(post_process(candidates, DetectionSettings(score="weights", merge="envelope")), references)[
        "map"
    ] == pytest.approx((1 + 2 / 7) / 2)  # class 1: IoU 0.25, above 0.1 and 0.2 of seven thresholds


def test_hits_look_at_the_best_box():
    references = [{"boxes": [[0, 0, 4, 4], [6, 6, 8, 8]]}] * 3 + [{"boxes": [[0, 0, 1, 1]]}]
    predictions = [
        {"boxes": [[0, 0, 4, 2], [6, 6, 8, 8]], "scores": [0.9, 0.8]},  # IoU 0.5; centre (2, 1) inside
        {"boxes": [[3, 3, 7, 7], [6, 6, 8, 8]], "scores": [0.9, 0.8]},  # IoU below 0.3; centre (5, 5) outside
        {"boxes": [[3, 3, 7, 7], [6, 6, 8, 8]], "scores": [0.7, 0.8]},  # the second box is exact
        {"boxes": [], "scores": []},  # a miss
    ]
    result = grounding_iou(predictions, references)
    assert result["hit_rate"] == {"0.3": 0.5, "0.5": 0.5}
    assert result["pointing_game"] == 0.5
    assert result["count"] == 4


def test_box_classes_by_hand():
    # Class 0: 0.9 and 0.4 against 0.6 and 0.1: 3 of 4 pairs. Class 1 alike. Class 2 has no boxes.
    scores = [[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0]]
    result = box_auroc(scores, [0, 0, 1, 1])
    assert result["per_class"] == [0.75, 0.75, None]
    assert (result["auroc"], result["accuracy"], result["mcc"]) == (0.75, 0.5, 0.0)
    assert (result["classes_defined"], result["positives"]) == (2, [2, 2, 0])
    official = box_auroc(scores, [0, 0, 1, 1], official=True)
    assert official["auroc"] == pytest.approx(0.5)
    alone = box_auroc([[0.9, 0.1]], [0])
    assert (alone["auroc"], alone["accuracy"], alone["mcc"]) == (None, 1.0, None)
    assert box_auroc([[0.9, 0.1]], [0], official=True)["mcc"] == 0.0


# -- bad input --------------------------------------------------------------------------------------------------------


GOOD = {"boxes": [[0.0, 0.0, 1.0, 1.0]], "labels": [0], "scores": [0.5]}


@pytest.mark.parametrize("function", [detection_map, coco_map])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[0, 0, np.nan, 1]]}, r"predictions\[1\]` has a box with NaN or infinity: \[0.0, 0.0, nan, 1.0\]"),
        ({"boxes": [[0, 0, np.inf, 1]]}, r"predictions\[1\]` has a box with NaN or infinity"),
        ({"boxes": [[0.5, 0.5, 0.2, 0.9]]}, r"predictions\[1\]` has a box of negative size: \[0.5, 0.5, 0.2, 0.9\]"),
        ({"boxes": [[0, 0, 1]]}, r"predictions\[1\]` has boxes of shape \(1, 3\)"),
        ({"scores": [np.nan]}, r"predictions\[1\]` has a NaN score"),
        ({"scores": [0.5, 0.5]}, r"predictions\[1\]` has 1 boxes, 1 labels and 2 scores"),
        ({"labels": [0.5]}, r"predictions\[1\]` has the label 0.5"),
        ({"labels": [-1]}, r"predictions\[1\]` has the label -1"),
        ({"labels": [2]}, r"predictions\[1\]`: label 2 does not fit num_classes=2"),
    ],
)
def test_a_bad_detection_is_named(function, changes, message):
    with pytest.raises(ValueError, match=message):
        function([GOOD, GOOD | changes], [GOOD, GOOD], 2)


def test_bad_lists_are_named():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        detection_map([GOOD, GOOD], [GOOD])
    with pytest.raises(ValueError, match=r"predictions\[0\]` has no 'scores'"):
        detection_map([{"boxes": [], "labels": []}], [GOOD])
    with pytest.raises(ValueError, match=r"references\[0\]` has no 'labels'"):
        coco_map([GOOD], [{"boxes": []}])
    with pytest.raises(ValueError, match=r"references\[0\]`: label 3"):
        coco_map([GOOD], [{"boxes": [[0, 0, 1, 1]], "labels": [3]}], 3)
    with pytest.raises(ValueError, match=r"references\[0\]` has a box of negative size"):
        grounding_iou([GOOD], [{"boxes": [[1, 0, 0, 1]]}])
    with pytest.raises(ValueError, match=r"predictions\[0\]` has a NaN score"):
        grounding_iou([GOOD | {"scores": [np.nan]}], [GOOD])
    with pytest.raises(ValueError, match=r"predictions\[1\]` has a box of negative size"):
        box_iou([[0, 0, 1, 1], [1, 1, 0, 0]], [[0, 0, 1, 1]] * 2)
    with pytest.raises(ValueError, match=r"references\[0\]` has a box with NaN"):
        box_iou([[0, 0, 1, 1]], [[0, 0, np.nan, 1]])
    with pytest.raises(ValueError, match="IoU thresholds are"):
        detection_map([GOOD], [GOOD], iou_thresholds=(1.5,))
    for function, name in ((detection_map, "iou_thresholds"), (grounding_iou, "score_thresholds")):
        with pytest.raises(ValueError, match=name):
            function([GOOD], [GOOD], **{name: ()})


def test_bad_images_are_named():
    with pytest.raises(ValueError, match=r"`images\[1\]` is 2; images are numbered from 0 to 1"):
        DetectionMapStatistic([GOOD, GOOD], [GOOD, GOOD], 1, images=[0, 2], num_images=2)
    with pytest.raises(ValueError, match=r"`images` has the shape \(1,\) for 2 entries"):
        GroundingIouStatistic([GOOD, GOOD], [GOOD, GOOD], images=[0])
    with pytest.raises(ValueError, match="3 images were named for 2 entries"):
        DetectionMapStatistic([GOOD, GOOD], [GOOD, GOOD], 1, num_images=3)


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match=r"`predictions\[1\]` has a NaN score"):
        box_auroc([[0.1, 0.2], [np.nan, 0.2]], [0, 1])
    with pytest.raises(ValueError, match=r"`references\[1\]` is 2; labels are class indices from 0 to 1"):
        box_auroc([[0.1, 0.2], [0.3, 0.2]], [0, 2])
    with pytest.raises(ValueError, match="do not fit together"):
        box_auroc([[0.1, 0.2]], [0, 1])
    with pytest.raises(ValueError, match="2 scores each, but num_classes is 3"):
        box_auroc([[0.1, 0.2]], [0], 3)
    scores, labels = np.zeros((2, 2, 1)), np.zeros((2, 2, 1))
    bad = scores.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"`predictions\[1\]\[0\]`, a present region, has a NaN score"):
        region_auroc(bad, labels, np.ones((2, 2)))
    absent = np.array([[1, 1], [0, 1]])
    assert region_auroc(bad, labels, absent)["samples"] == 2  # an absent region may have none
    bad = labels.copy()
    bad[0, 1] = 2
    with pytest.raises(ValueError, match=r"`references\[0\]\[1\]` has the labels \[2.0\]"):
        region_auroc(scores, bad, np.ones((2, 2)))
    with pytest.raises(ValueError, match="2 scores for 3 labels"):
        auroc([0.1, 0.2], [0, 1, 1])
    with pytest.raises(ValueError, match=r"`scores\[1\]` is NaN"):
        auroc([0.1, np.nan], [0, 1])


def test_a_class_without_positives_is_reported_and_left_out():
    scores = np.random.default_rng(0).random((6, 2, 3))
    labels = np.zeros((6, 2, 3), dtype=int)
    labels[:3, 0, 0] = labels[2:4, 1, 1] = 1
    result = region_auroc(scores, labels, np.ones((6, 2)))
    assert result["per_class"][2] is None
    assert (result["classes_defined"], result["positives"]) == (2, [[3, 0, 0], [0, 2, 0]])
    assert result["macro"] == pytest.approx(np.mean(result["per_class"][:2]))


def test_nothing_to_score():
    assert detection_map([], [], 2)["map"] is None
    assert detection_map([], [], 2, official=True)["map"] == 0.0
    assert coco_map([{"boxes": [], "labels": [], "scores": []}], [{"boxes": [], "labels": []}], 2)["map"] is None
    empty = grounding_iou([], [])
    assert (empty["miou"], empty["map"], empty["hit_rate"]["0.3"], empty["count"]) == (None, None, None, 0)
    assert box_iou([], [], [])["macro_miou"] is None
    assert region_auroc(np.zeros((0, 2, 3)), np.zeros((0, 2, 3)), np.zeros((0, 2)))["weighted"] is None
    assert box_auroc(np.zeros((0, 3)), [], 3)["auroc"] is None
    assert bootstrap(GroundingIouStatistic([], []), 3)["miou"]["undefined"] == 3
    with pytest.raises(ValueError, match="`num_classes` is -1"):
        detection_map([], [], -1)


@pytest.mark.parametrize(
    "name", ["detection_map", "coco_map", "grounding_iou", "box_auroc", "region_auroc", "box_iou"]
)
def test_nothing_to_score_through_evaluate(name, tmp_path):
    more = {"region_auroc": {"present": []}, "box_iou": {"labels": []}}.get(name, {})
    result = evaluate.load(str(METRICS / name), cache_dir=str(tmp_path)).compute(predictions=[], references=[], **more)
    headline = {"grounding_iou": "miou", "box_auroc": "auroc", "region_auroc": "weighted", "box_iou": "miou"}
    assert result[headline.get(name, "map")] is None
    with pytest.raises(ValueError, match="differ in length: 0 predictions and 1 references"):
        evaluate.load(str(METRICS / name), cache_dir=str(tmp_path)).compute(predictions=[], references=[0], **more)


# -- modules of `evaluate` --------------------------------------------------------------------------------------------


def test_coco_map_and_box_auroc_through_evaluate(tmp_path):
    rng = np.random.default_rng(4)
    predictions, references = random_detections(rng, 4, 2)
    lists = [
        [{key: np.asarray(value).tolist() for key, value in item.items()} for item in side]
        for side in (predictions, references)
    ]
    scores, labels = rng.random((8, 3)).tolist(), rng.integers(0, 3, 8).tolist()
    for name, metric_class, inputs, expected, options in (
        ("coco_map", CocoMap, lists, coco_map(predictions, references, 3, official=True), {"num_classes": 3}),
        ("box_auroc", BoxAuroc, (scores, labels), box_auroc(scores, labels, 3, official=True), {"num_classes": 3}),
    ):
        options = options | {"official": True}
        arguments = {"predictions": inputs[0], "references": inputs[1]}
        assert metric_class(cache_dir=str(tmp_path)).compute(**arguments, **options) == expected
        loaded = evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))
        assert loaded.compute(**arguments, **options) == expected


def test_pairwise_iou_broadcasts_as_pairs():
    first, second = (random_boxes(np.random.default_rng(seed), 5, 9, True) for seed in (0, 1))
    assert np.diag(pairwise_iou(first, second)) == pytest.approx(
        [pairwise_iou([a], [b])[0, 0] for a, b in zip(first, second, strict=True)]
    )


def test_examples_of_the_documentation():
    text = (METRICS.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = {}
    exec(next(block for block in blocks if "detection_map(" in block), names)
    assert names["detection_map"](names["predictions"], names["references"], num_classes=2)["map50"] == 1.0
    worse = [item | {"boxes": [[1, 1, 3, 3], [4, 4, 6, 6]]} for item in names["predictions"]]
    names["other_predictions"] = worse
    exec(next(block for block in blocks if "paired_difference(" in block), names)
    difference = names["paired_difference"](names["first"], names["second"], resamples=5)["map"]
    assert (difference["value"], difference["above_zero"]) == (pytest.approx(6 / 7), 1.0)  # IoU 1/7, above 0.1 only
