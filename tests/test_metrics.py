"""Metrics: hand-worked examples, slow reference implementations on random input, and the `evaluate` wrappers."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.box_iou.box_iou import BoxIou, box_iou
from evaluation.metrics.boxes import paired_iou, pairwise_iou
from evaluation.metrics.detection_map.detection_map import DetectionMap, detection_map
from evaluation.metrics.finding_f1.finding_f1 import FindingF1, as_items, finding_f1
from evaluation.metrics.grounding_iou.grounding_iou import GroundingIou, grounding_iou, union_overlap
from evaluation.metrics.region_auroc.region_auroc import RegionAuroc, region_auroc
from evaluation.metrics.weighted_auroc import auroc


METRICS = Path(__file__).parents[1] / "evaluation" / "metrics"
RNG = np.random.default_rng(5)


def image(boxes, labels, scores=None):
    entry = {"boxes": np.array(boxes, dtype=float).reshape(-1, 4), "labels": np.array(labels, dtype=int)}
    return entry if scores is None else entry | {"scores": np.array(scores, dtype=float)}


def random_box(rng, size=12):
    x, y = np.sort(rng.integers(0, size, 2)), np.sort(rng.integers(0, size, 2))
    return [x[0], y[0], x[1] + 1, y[1] + 1]


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_iou_by_hand():
    first = np.array([[0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 1, 5]])
    second = np.array([[2, 0, 6, 4], [3, 3, 4, 4], [1, 1, 1, 5]])
    assert paired_iou(first, second) == pytest.approx([8 / 24, 0, 0])
    assert pairwise_iou(first, second)[0] == pytest.approx([8 / 24, 1 / 16, 0])


@given(st.integers(0, 10**6))
def test_pairwise_iou_counts_pixels(seed):
    rng = np.random.default_rng(seed)
    boxes = np.array([random_box(rng) for _ in range(4)])
    grids = np.zeros((4, 13, 13), dtype=bool)
    for grid, (x0, y0, x1, y1) in zip(grids, boxes, strict=True):
        grid[y0:y1, x0:x1] = True
    expected = [[(a & b).sum() / (a | b).sum() for b in grids] for a in grids]
    assert pairwise_iou(boxes, boxes) == pytest.approx(np.array(expected))


def test_box_iou_per_label():
    result = box_iou([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 1]], [[0, 0, 1, 1], [0, 0, 1, 2], [0, 0, 1, 1]], [3, 5, 5])
    assert result["miou"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert result["per_label"] == {3: {"miou": 1.0, "count": 1}, 5: {"miou": 0.5, "count": 2}}
    assert result["macro_miou"] == pytest.approx(0.75)
    assert box_iou([], [])["miou"] is None
    with pytest.raises(ValueError, match="exactly one predicted box per target"):
        box_iou([[0, 0, 1, 1]], [])


# -- average precision ------------------------------------------------------------------------------------------------


def test_perfect_detections_reach_one():
    references = [image([[0, 0, 2, 2], [4, 4, 8, 8]], [0, 1]), image([[1, 1, 3, 3]], [0])]
    predictions = [r | {"scores": np.linspace(0.2, 0.9, len(r["labels"]))} for r in references]
    result = detection_map(predictions, references, 2)
    assert result["map"] == result["map50"] == result["map10"] == 1.0


def test_iou_equal_to_the_threshold_is_no_match():
    # Overlap 3 of 10: exactly 0.3, which 3 * 0.1 is not.
    references = [image([[0, 0, 10, 1]], [0])]
    predictions = [image([[0, 0, 3, 1]], [0], [0.9])]
    assert detection_map(predictions, references, iou_thresholds=(0.3,))["map"] == 0.0
    assert detection_map(predictions, references, iou_thresholds=(0.2,))["map"] == 1.0


def test_second_box_on_one_target_is_a_false_positive():
    # Ranking TP, FP, TP over 2 targets: precision 1 up to recall 0.5, then 2/3 (51 and 50 of 101 levels).
    references = [image([[0, 0, 4, 4], [6, 6, 9, 9]], [0, 0])]
    predictions = [image([[0, 0, 4, 4], [0, 0, 4, 4], [6, 6, 9, 9]], [0, 0, 0], [0.9, 0.8, 0.7])]
    assert detection_map(predictions, references)["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_box_takes_the_best_free_target():
    # The first box overlaps both targets above 0.1; it takes the better one, so the second box still finds its own.
    references = [image([[0, 0, 10, 1], [8, 0, 18, 1]], [0, 0])]
    predictions = [image([[6, 0, 16, 1], [0, 0, 10, 1]], [0, 0], [0.9, 0.8])]
    assert detection_map(predictions, references)["map10"] == 1.0


def test_absent_class_is_left_out_or_counts_zero():
    references = [image([[0, 0, 2, 2]], [0])]
    predictions = [image([[0, 0, 2, 2], [0, 0, 1, 1]], [0, 2], [0.5, 0.4])]
    assert detection_map(predictions, references, 4)["map50"] == 1.0
    assert detection_map(predictions, references, 4, official=True)["map50"] == pytest.approx(1 / 4)
    entry = detection_map(predictions, references, 4)["per_class"][2]
    assert entry == {"ap": None, "ap50": None, "ground_truths": 0, "predictions": 1}
    assert detection_map([image([], [], [])], [image([], [])], 3)["map"] is None


def test_false_positives_on_empty_images_count():
    references = [image([[0, 0, 2, 2]], [0]), image([], [])]
    better = [image([[0, 0, 2, 2]], [0], [0.9]), image([[0, 0, 2, 2]], [0], [0.1])]
    worse = [image([[0, 0, 2, 2]], [0], [0.1]), image([[0, 0, 2, 2]], [0], [0.9])]
    assert detection_map(better, references)["map50"] == 1.0
    assert detection_map(worse, references)["map50"] == 0.5


def slow_map(predictions, references, num_classes, threshold):
    """Straight from the definition, one box at a time."""
    values = []
    for label in range(num_classes):
        ranked = sorted(
            (
                (-score, index, rank, box)
                for index, item in enumerate(predictions)
                for rank, (box, own, score) in enumerate(
                    zip(item["boxes"], item["labels"], item["scores"], strict=True)
                )
                if own == label
            ),
            key=lambda entry: entry[:3],
        )
        targets = {
            (index, number): box
            for index, item in enumerate(references)
            for number, (box, own) in enumerate(zip(item["boxes"], item["labels"], strict=True))
            if own == label
        }
        if not targets:
            continue
        total, free, curve, hits = len(targets), dict(targets), [], 0
        for count, (_, index, _, box) in enumerate(ranked, start=1):
            options = [(pairwise_iou([box], [t])[0, 0], -key[1], key) for key, t in free.items() if key[0] == index]
            options.sort(reverse=True)
            if options and options[0][0] > threshold:
                hits += 1
                del free[options[0][2]]
            curve.append((hits / total, hits / count))
        levels = [level / 100 for level in range(101)]
        values.append(np.mean([max((p for r, p in curve if r >= level), default=0.0) for level in levels]))
    return float(np.mean(values)) if values else None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_map_equals_the_definition(seed):
    rng = np.random.default_rng(seed)

    def draw(most):
        count = int(rng.integers(0, most))
        return [random_box(rng, 6) for _ in range(count)], rng.integers(0, 2, count)

    references = [image(*draw(4)) for _ in range(3)]
    predictions = [image(*draw(6)) for _ in range(3)]
    predictions = [item | {"scores": rng.integers(0, 4, len(item["labels"])) / 4} for item in predictions]
    for threshold in (0.1, 0.5):
        expected = slow_map(predictions, references, 2, threshold)
        value = detection_map(predictions, references, 2, iou_thresholds=(threshold,))["map"]
        assert value == (None if expected is None else pytest.approx(expected))


def test_misshapen_detections_are_named():
    with pytest.raises(ValueError, match=r"predictions\[0\]` has 1 boxes, 2 labels"):
        detection_map([image([[0, 0, 1, 1]], [0, 1], [0.5])], [image([], [])])
    with pytest.raises(ValueError, match="NaN"):
        detection_map([image([[0, 0, 1, 1]], [0], [np.nan])], [image([], [])])
    with pytest.raises(ValueError, match="label 3 does not fit"):
        detection_map([image([[0, 0, 1, 1]], [3], [0.5])], [image([], [])], 2)


# -- grounding --------------------------------------------------------------------------------------------------------


def test_grounding_is_micro_over_phrases():
    # Phrase 1: intersection 4, union 4. Phrase 2: intersection 0, union 1 + 3. IoU = 4 / 8 at every threshold.
    predictions = [image([[0, 0, 2, 2]], [0], [0.9]), image([[0, 0, 1, 1]], [0], [0.8])]
    references = [image([[0, 0, 2, 2]], [0]), image([[2, 0, 5, 1]], [0])]
    result = grounding_iou(predictions, references)
    assert result["miou"] == result["best_iou"] == pytest.approx(0.5)
    assert result["macro_iou"] == pytest.approx(0.5)


def test_grounding_threshold_is_strict_and_averaged():
    # The box is kept at 0.1 and 0.2, but not at its own score 0.3: (1 + 1 + 0 + 0 + 0) / 5.
    result = grounding_iou([image([[0, 0, 2, 2]], [0], [0.3])], [image([[0, 0, 2, 2]], [0])])
    assert result["miou"] == pytest.approx(0.4)
    assert result["iou_at"] == {"0.1": 1.0, "0.2": 1.0, "0.3": 0.0, "0.4": 0.0, "0.5": 0.0}
    assert result["map50"] == 1.0


def test_overlapping_boxes_count_once():
    # Both boxes above 0.2, one above 0.5, none above 0.9.
    boxes, scores, targets = (
        np.array([[[0, 0, 4, 2], [2, 0, 6, 2]]]),
        np.array([[0.9, 0.4]]),
        np.array([[[0, 0, 6, 1]]]),
    )
    overlap, union = union_overlap(boxes, scores, targets, (0.2, 0.5, 0.9))
    assert overlap.tolist() == [[6, 4, 0]]
    assert union.tolist() == [[12, 10, 6]]


@given(st.integers(0, 10**6))
def test_union_overlap_counts_pixels(seed):
    rng = np.random.default_rng(seed)
    boxes, targets = (np.array([[random_box(rng) for _ in range(3)] for _ in range(4)]) for _ in range(2))
    scores = rng.integers(0, 4, (4, 3)) / 4

    def paint(rectangles):
        grid = np.zeros((13, 13), dtype=bool)
        for x0, y0, x1, y1 in rectangles:
            grid[y0:y1, x0:x1] = True
        return grid

    overlap, union = union_overlap(boxes, scores, targets, (0.25, 0.5))
    for phrase in range(4):
        for column, threshold in enumerate((0.25, 0.5)):
            predicted, actual = paint(boxes[phrase][scores[phrase] > threshold]), paint(targets[phrase])
            assert overlap[phrase, column] == (predicted & actual).sum()
            assert union[phrase, column] == (predicted | actual).sum()


def test_grid_truncates_to_cells():
    # On a grid of 4 the box [0.1, 0.9) covers cells 0 to 2, the target [0, 1) cells 0 to 3.
    predictions = [image([[0.1, 0.0, 0.9, 1.0]], [0], [0.9])]
    references = [image([[0.0, 0.0, 1.0, 1.0]], [0])]
    assert grounding_iou(predictions, references, grid=4)["miou"] == pytest.approx(3 / 4)
    assert grounding_iou(predictions, references)["miou"] == pytest.approx(0.8)
    fine = grounding_iou(predictions, references, grid=1024)["miou"]
    assert fine == pytest.approx(0.8, abs=2e-3)
    assert fine != pytest.approx(0.8, abs=1e-9)


# -- AUROC ------------------------------------------------------------------------------------------------------------


def test_auroc_with_ties():
    # Pairs: (0.8 > 0.5), (0.8 > 0.1), (0.5 = 0.5) counts half, (0.5 > 0.1): 3.5 / 4.
    assert auroc([0.8, 0.5, 0.5, 0.1], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    assert auroc([0.3] * 5, [1, 0, 1, 0, 0]) == 0.5
    assert auroc([0.1, 0.2], [1, 1]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(pairs):
    scores, labels = zip(*pairs, strict=True)
    positive = [s for s, y in pairs if y]
    negative = [s for s, y in pairs if not y]
    if not positive or not negative:
        assert auroc(scores, labels) is None
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auroc(scores, labels) == pytest.approx(wins / len(positive) / len(negative))


def test_weighted_region_auroc_by_hand():
    # 4 images, 2 regions, 2 classes. Cells: (0, 0) has 1 positive and AUROC 1; (0, 1) has 2 and AUROC 0.25;
    # (1, 0) has only positives among its present images and drops out (3 positives); (1, 1) has none.
    labels = np.array([[[1, 1], [1, 0]], [[0, 1], [1, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]])
    present = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], dtype=bool)
    scores = np.zeros((4, 2, 2))
    scores[:, 0, 0] = [0.9, 0.2, 0.3, 0.1]
    scores[:, 0, 1] = [0.1, 0.4, 0.2, 0.5]
    result = region_auroc(scores, labels, present)
    assert result["cells"] == [[1.0, 0.25], [None, None]]
    assert result["positives"] == [[1, 2], [3, 0]]
    assert result["weighted"] == pytest.approx((1 * 1 + 2 * 0.25) / 3)
    assert result["macro"] == pytest.approx((1 + 0.25) / 2)
    official = region_auroc(scores, labels, present, official=True)
    assert official["weighted"] == pytest.approx((1 * 1 + 2 * 0.25) / 6)
    assert official["macro"] == pytest.approx((1 / 4 + 0.25) / 2)


def test_unknown_labels_leave_their_cell():
    labels = np.array([1, 0, -1, 0]).reshape(4, 1, 1)
    scores = np.array([0.5, 0.4, 0.9, 0.6]).reshape(4, 1, 1)
    result = region_auroc(scores, labels, np.ones((4, 1)))
    assert result["weighted"] == pytest.approx(0.5)
    assert result["positives"] == [[1]]


def test_region_auroc_rejects_wrong_shapes_and_nan():
    with pytest.raises(ValueError, match="do not fit together"):
        region_auroc(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match="NaN"):
        region_auroc(np.full((1, 1, 1), np.nan), np.zeros((1, 1, 1)), np.ones((1, 1)))


# -- findings in texts ------------------------------------------------------------------------------------------------

A, B, C = "Atelectasis", "Edema", "Mass"


def test_micro_and_macro_f1_by_hand():
    predicted = [{A: 1, B: 1}, {A: 0, C: 1}]
    actual = [{A: 1}, {A: 1, C: 1}]
    result = finding_f1(predicted, actual, classes=(A, B, C))
    # Pooled: 2 true positives of 3 stated and 3 true.
    assert (result["micro_f1"], result["micro_precision"], result["micro_recall"]) == pytest.approx((2 / 3,) * 3)
    assert [result["per_class"][name]["f1"] for name in (A, B, C)] == pytest.approx([2 / 3, 0, 1])
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert result["per_class"][A] == pytest.approx({"f1": 2 / 3, "precision": 1, "recall": 0.5, "support": 2})


def test_example_f1_in_both_modes():
    # F1 of the four texts: 1, 0, 0, 2/3. The official mean skips the two zeros.
    predicted = [{A: 1}, {A: 1}, {}, {A: 1, B: 1}]
    actual = [{A: 1}, {B: 1}, {A: 1}, {A: 1}]
    assert finding_f1(predicted, actual)["example_f1"] == pytest.approx((1 + 2 / 3) / 4, abs=1e-6)
    assert finding_f1(predicted, actual, official=True)["example_f1"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert finding_f1([{}], [{A: 0}])["example_f1"] == 1.0


def test_uncertain_labels():
    predicted, actual = [{A: 1, B: -1}], [{A: -1, B: 1}]
    assert finding_f1(predicted, actual)["micro_f1"] == 0.0
    assert finding_f1(predicted, actual, uncertain_positive=True)["micro_f1"] == 1.0
    with pytest.raises(ValueError, match="Atelectasis=3"):
        finding_f1([{A: 3}], [{A: 1}])


# -- as evaluate modules ----------------------------------------------------------------------------------------------


def cases():
    boxes = [[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 4.0]]
    shifted = [[0.0, 0.0, 2.0, 1.0], [1.0, 1.0, 3.0, 4.0]]
    detections = [{"boxes": boxes, "scores": [0.9, 0.4], "labels": [0, 1]}, {"boxes": [], "scores": [], "labels": []}]
    targets = [{"boxes": shifted, "labels": [0, 1]}, {"boxes": boxes[:1], "labels": [0]}]
    phrases = [{"boxes": boxes, "scores": [0.9, 0.2]}]
    scores, labels = RNG.random((6, 2, 3)), RNG.integers(0, 2, (6, 2, 3))
    present = np.ones((6, 2), dtype=bool)
    texts = ["no edema", "edema", "mass"], ["edema", "edema", "mass"]

    def labeler(text):
        return {text.split()[-1]: int("no" not in text)}

    labelled = [[labeler(text) for text in side] for side in texts]
    return {
        "box_iou": (BoxIou, {"predictions": boxes, "references": shifted, "labels": [0, 1]}, {}),
        "detection_map": (
            DetectionMap,
            {"predictions": detections, "references": targets},
            {"num_classes": 2, "official": True},
        ),
        "grounding_iou": (
            GroundingIou,
            {"predictions": phrases, "references": [{"boxes": shifted}]},
            {"grid": None},
        ),
        "region_auroc": (RegionAuroc, {"predictions": scores, "references": labels, "present": present}, {}),
        "finding_f1": (
            FindingF1,
            {
                side: [as_items(item) for item in part]
                for side, part in zip(("predictions", "references"), labelled, strict=True)
            },
            {"classes": ["edema", "mass"]},
        ),
    }


FUNCTIONS = {
    "box_iou": box_iou,
    "detection_map": detection_map,
    "grounding_iou": grounding_iou,
    "region_auroc": region_auroc,
    "finding_f1": lambda predictions, references, **options: finding_f1(
        *([{e["finding"]: e["value"] for e in item} for item in side] for side in (predictions, references)), **options
    ),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_metric_modules_equal_their_functions(name, tmp_path):
    metric_class, inputs, options = cases()[name]
    expected = FUNCTIONS[name](**inputs, **options)
    assert metric_class(cache_dir=str(tmp_path)).compute(**inputs, **options) == expected
    loaded = evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))
    half = len(inputs["predictions"]) // 2
    for rows in (slice(None, half), slice(half, None)):
        if len(inputs["predictions"][rows]):
            loaded.add_batch(**{key: value[rows] for key, value in inputs.items()})
    assert loaded.compute(**options) == expected


def test_finding_f1_takes_texts_and_a_labeller(tmp_path):
    texts = {"predictions": ["edema", "no edema"], "references": ["edema", "edema"]}

    def labeler(text):
        return {"edema": int("no" not in text)}

    result = FindingF1(cache_dir=str(tmp_path)).compute(**texts, labeler=labeler)
    assert result["micro_f1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="without a labeller"):
        FindingF1(cache_dir=str(tmp_path)).compute(**texts)
    assert FindingF1(cache_dir=str(tmp_path)).compute(predictions=[], references=[])["micro_f1"] is None
