"""Clinical F1 and RadGraph F1: by hand, against scikit-learn and the radgraph package, resampled, with evaluate."""

import importlib.util
import json
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from evaluation.bootstrap import Statistic, bootstrap, draw_counts, point_estimate
from evaluation.labelers import CHEXPERT_CLASSES, CHEXPERT_FIVE, LabelerUnavailable
from evaluation.metrics.clinical_f1.clinical_f1 import ClinicalF1, ClinicalF1Statistic, clinical_f1
from evaluation.metrics.finding_f1.finding_f1 import as_items, finding_f1
from evaluation.metrics.radgraph_f1.radgraph_f1 import (
    RadGraphF1,
    RadGraphF1Statistic,
    load_annotator,
    pair_score,
    radgraph_f1,
)
from evaluation.metrics.unavailable import MetricUnavailable


METRICS = Path(__file__).resolve().parents[1] / "evaluation" / "metrics"
SCORES = ("precision", "recall", "f1")
A, B, C = "Atelectasis", "Edema", "Mass"


def random_labels(rng, num_texts, classes, stated=0.3):
    values = rng.choice([1, 0, -1], (num_texts, len(classes)), p=(0.6, 0.2, 0.2))
    known = rng.random(values.shape) < stated
    return [
        {name: int(value) for name, value, keep in zip(classes, row, mask, strict=True) if keep}
        for row, mask in zip(values, known, strict=True)
    ]


def table(labels, classes, positive):
    return np.array([[entry.get(name) in positive for name in classes] for entry in labels], dtype=int)


# -- clinical F1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("official", [False, True])
def test_agreement_with_scikit_learn(seed, official):
    rng = np.random.default_rng(seed)
    classes = [*CHEXPERT_CLASSES, "Foreign Object"]  # the scores of 14 and 5 leave other classes out
    few = 3 if seed == 0 else 60  # with few texts some classes are positive nowhere
    stated, true = (random_labels(rng, few, classes) for _ in range(2))
    result = clinical_f1(stated, true, classes=classes, official=official)
    for suffix, names, positive in (("_14", CHEXPERT_CLASSES, {1}), ("_5", CHEXPERT_FIVE, {1, -1})):
        predicted, actual = (table(labels, names, positive) for labels in (stated, true))
        micro = precision_recall_fscore_support(actual, predicted, average="micro", zero_division=0)
        by_class = np.array(precision_recall_fscore_support(actual, predicted, average=None, zero_division=0)[:3])
        occurs = (predicted | actual).any(0)
        if seed == 0 and suffix == "_14":
            assert not occurs.all()
        macro = by_class.mean(1) if official else by_class[:, occurs].mean(1)
        for index, score in enumerate(SCORES):
            assert result[f"micro_{score}{suffix}"] == pytest.approx(micro[index])
            assert result[f"macro_{score}{suffix}"] == pytest.approx(macro[index])
        rows = result["per_class" if suffix == "_14" else "per_class_5"]
        for column, name in enumerate(names):
            expected = by_class[:, column] if occurs[column] else [None] * 3
            assert [rows[name][score] for score in SCORES] == pytest.approx(list(expected))
            assert rows[name]["support"] == actual[:, column].sum()
        assert result["classes_defined" if suffix == "_14" else "classes_defined_5"] == occurs.sum()
    if not official:
        predicted, actual = (table(labels, CHEXPERT_CLASSES, {1}) for labels in (stated, true))
        f1 = precision_recall_fscore_support(actual, predicted, average="samples", zero_division=1)[2]
        # F1 of scikit-learn is 1 only where both sides are empty.
        assert result["example_f1_14"] == pytest.approx(f1)


def test_an_uncertain_label_counts_in_five_but_not_in_fourteen():
    stated, true = [{"Edema": -1, "Fracture": 1}], [{"Edema": 1, "Fracture": 1}]
    result = clinical_f1(stated, true)
    assert (result["micro_f1_14"], result["micro_f1_5"]) == pytest.approx((2 / 3, 1.0))
    assert clinical_f1(stated, true, uncertain_positive=True)["micro_f1_14"] == 1.0  # as f1chexbert counts
    assert clinical_f1(stated, true, uncertain_positive=False)["micro_f1_5"] == 0.0
    assert clinical_f1(stated, true, classes=("Edema", "Fracture"))["micro_f1"] == pytest.approx(2 / 3)


def test_example_f1_in_both_modes():
    # F1 of the four texts: 1, 0, 0, 2/3.
    stated = [{A: 1}, {A: 1}, {}, {A: 1, B: 1}]
    true = [{A: 1}, {B: 1}, {A: 1}, {A: 1}]
    correct, official = (clinical_f1(stated, true, classes=(A, B, C), official=mode) for mode in (False, True))
    assert correct["example_f1"] == pytest.approx(0.417, abs=5e-4)
    assert official["example_f1"] == pytest.approx(0.833, abs=5e-4)
    # Precision is undefined only for the text that states nothing.
    assert correct["example_precision"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert official["example_precision"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert correct["example_recall"] == official["example_recall"] == pytest.approx(0.5)
    # An image without findings on both sides is right; the official code leaves it out.
    assert clinical_f1([{}], [{A: 0}], classes=(A,))["example_f1"] == 1.0
    assert clinical_f1([{}], [{A: 0}], classes=(A,), official=True)["example_f1"] is None
    # C occurs nowhere: macro over A and B, officially over three.
    assert correct["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert official["macro_f1"] == pytest.approx((2 / 3 + 0) / 3)
    assert (correct["classes_defined"], correct["per_class"][C]["f1"]) == (2, None)


def test_regions_of_an_image_are_summed():
    # Image 0: TP 1, FP 1, FN 1; image 1: TP 1. Image 2 has no text at all.
    stated, true = [{A: 1}, {B: 1}, {A: 1}], [{A: 1}, {A: 1}, {A: 1}]
    statistic = ClinicalF1Statistic(stated, true, units=[0, 0, 1], num_units=3, classes=(A, B))
    values = dict(zip(statistic.names, point_estimate(statistic), strict=True))
    assert values["example_f1"] == pytest.approx((0.5 + 1) / 2)
    assert values["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert statistic.pair_f1.tolist() == [1, 0, 1]
    only_the_empty_one = statistic(np.array([[0, 0, 3]]))
    assert np.isnan(only_the_empty_one).all()


def test_the_official_numbering_merges_images_of_different_batches():
    stated, true = [{A: 1}, {A: 1, B: 1}, {A: 1}, {}], [{A: 1}, {A: 1}, {}, {A: 1}]
    # Batches of two images: 0 and 2 become one (TP 1, FP 1), 1 and 3 another (TP 1, FP 1, FN 1).
    merged = clinical_f1(stated, true, classes=(A, B), official=True, batch_size=2)
    assert merged["example_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert clinical_f1(stated, true, classes=(A, B), official=True)["example_f1"] == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="needs official=True"):
        clinical_f1(stated, true, classes=(A, B), batch_size=2)


def reader(texts):
    return [{"Edema": int("no" not in text)} if text else {"No Finding": 1} for text in texts]


reader.name, reader.classes = "reader", CHEXPERT_CLASSES


def test_pairs_without_a_reference_text_are_left_out():
    texts = ["edema", "", "edema"], ["edema", "edema", " "]
    result = clinical_f1(*texts, labeler=reader)
    assert (result["count"], result["dropped"]) == (2, 1)
    # The empty generated text stays: it states No Finding, which is wrong here.
    assert result["per_class"]["No Finding"]["predicted"] == 1
    assert result["micro_f1_14"] == pytest.approx(2 * 1 / (2 + 2))
    assert result["per_class"]["Edema"]["support"] == 2


def test_the_phantom_labeller_by_name():
    texts = ["Mild cardiomegaly. No edema."], ["Mild cardiomegaly. Severe pulmonary edema."]
    result = clinical_f1(*texts, labeler="phantom")
    assert (result["micro_f1"], result["macro_f1"], result["classes_defined"]) == pytest.approx((2 / 3, 1 / 2, 2))
    with pytest.raises(LabelerUnavailable, match="CheXbert's weights"):
        clinical_f1(*texts, labeler="chexbert:/nowhere")


@pytest.mark.parametrize("official", [False, True])
def test_counts_stand_for_repeated_images(official):
    rng = np.random.default_rng(3)
    stated, true = (random_labels(rng, 12, CHEXPERT_CLASSES) for _ in range(2))
    true[4] = None
    units = rng.integers(0, 7, 12)
    statistic = ClinicalF1Statistic(stated, true, units, 8, official=official)
    assert isinstance(statistic, Statistic)
    counts = draw_counts(8, 5)
    resampled = statistic(counts)
    assert resampled.shape == (5, len(statistic.names))
    for row, values in zip(counts, resampled, strict=True):
        rows = [
            (pair, image)
            for image, unit in enumerate(np.repeat(np.arange(8), row))
            for pair in np.flatnonzero(units == unit)
        ]
        repeated = ClinicalF1Statistic(
            [stated[pair] for pair, _ in rows],
            [true[pair] for pair, _ in rows],
            [image for _, image in rows],
            8,
            official=official,
        )
        np.testing.assert_allclose(values, point_estimate(repeated), rtol=1e-12)


def test_names_for_both_kinds_of_labellers():
    rng = np.random.default_rng(0)
    chexpert = bootstrap(ClinicalF1Statistic(*(random_labels(rng, 9, CHEXPERT_CLASSES) for _ in range(2))), 20)
    wanted = {"micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5", "example_f1_14", "micro_precision_14"}
    assert wanted | {"f1_14/Edema", "f1_5/Edema", "f1_14/Fracture"} <= chexpert.keys()
    assert "f1_5/Fracture" not in chexpert
    other = bootstrap(ClinicalF1Statistic([{A: 1}], [{A: 1}], classes=(A, C)), 20)
    assert {"micro_f1", "macro_f1", "example_f1", "macro_recall", f"f1/{A}"} <= other.keys()
    assert other["micro_f1"]["value"] == other["micro_f1"]["low"] == 1.0
    assert (other[f"f1/{C}"]["value"], other[f"f1/{C}"]["undefined"]) == (None, 20)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([{}], []), {}, "1 predictions for 0 references"),
        (([{A: 1}, {A: 2}], [{}, {}]), {"classes": (A,)}, "`predictions[1]` has the label Atelectasis=2"),
        (([{}], [{A: float("nan")}]), {"classes": (A,)}, "`references[0]` has the label Atelectasis=nan"),
        (([{}, {C: 1}], [{}, {}]), {}, "`predictions[1]` has the label 'Mass', which is not one of the classes"),
        (([None], [{}]), {}, "`predictions[0]` is a NoneType"),
        (([{}], [{}]), {"units": [-1]}, "`units[0]` is -1"),
        (([{}], [{}]), {"units": [0.5]}, "integers from 0"),
        (([{}], [{}]), {"units": [0, 1]}, "shape (2,) for 1 pairs"),
        (([{}], [{}]), {"classes": (A, A)}, "some occur twice"),
        ((["edema"], ["edema"]), {}, "without a labeller"),
        ((["edema"], [None]), {"labeler": reader}, "`references[0]` is a NoneType, not a text"),
    ],
)
def test_bad_input_names_the_entry(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        clinical_f1(*arguments, **options)


def test_finding_f1_is_the_same():
    rng = np.random.default_rng(8)
    stated, true = (random_labels(rng, 5, (A, B)) for _ in range(2))
    for official in (False, True):
        ours = clinical_f1(stated, true, classes=(A, B, C), official=official)
        other = finding_f1(stated, true, classes=(A, B, C), official=official)
        assert other["example_f1"] == ours["example_f1"]
        assert other["micro_f1"] == ours["micro_f1"]
        assert other["per_class"][A]["f1"] == ours["per_class"][A]["f1"]
        assert other["macro_f1"] == pytest.approx(ours["macro_f1"])
        # C is in no text of either side.
        absent = 0.0 if official else None
        assert other["per_class"][C] == {"f1": absent, "precision": absent, "recall": absent, "support": 0}
        assert finding_f1([], [], classes=(A,), official=official)["micro_f1"] == absent


# -- RadGraph F1 ------------------------------------------------------------------------------------------------------

PRESENT, ANATOMY = "Observation::definitely present", "Anatomy::definitely present"


def annotation(*entities):
    """From (tokens, label, relations) with numbers of entities as ends."""
    return {
        "text": "",
        "entities": {
            str(index): {
                "tokens": tokens,
                "label": label,
                "start_ix": index,
                "end_ix": index,
                "relations": [[name, str(end)] for name, end in relations],
            }
            for index, (tokens, label, relations) in enumerate(entities)
        },
    }


def test_the_levels_by_hand():
    reference = annotation(
        ("Left", ANATOMY, [("modify", 1)]),
        ("lung", ANATOMY, []),
        ("opacity", PRESENT, [("located_at", 1), ("located_at", 0)]),
    )
    prediction = annotation(("left", ANATOMY, [("modify", 1)]), ("lung", ANATOMY, []), ("opacity", PRESENT, []))
    # simple: lung and opacity agree, Left and left do not. 2 of 3 and 3.
    assert pair_score(prediction, reference, "simple") == pytest.approx(2 * 2 / 6)
    # partial: the opacity has relations on one side alone.
    assert pair_score(prediction, reference, "partial") == pytest.approx(2 * 1 / 6)
    # complete: {left modify lung, lung, opacity} and {left modify lung, lung, opacity at lung, opacity at left}.
    assert pair_score(prediction, reference, "complete") == pytest.approx(2 * 2 / 7)
    for level in ("simple", "partial", "complete"):
        assert pair_score(reference, reference, level) == 1.0
        assert pair_score(reference, annotation(), level) == pair_score(annotation(), annotation(), level) == 0.0
    with pytest.raises(ValueError, match="no level 'all'"):
        pair_score(reference, reference, "all")


def random_annotation(rng):
    count = int(rng.integers(0, 7))
    return annotation(
        *(
            (
                str(rng.choice(["lung", "Lung", "opacity", "left"])),
                str(rng.choice([PRESENT, ANATOMY])),
                [
                    (str(rng.choice(["modify", "located_at"])), int(rng.integers(count)))
                    for _ in range(rng.integers(3))
                ],
            )
            for _ in range(count)
        )
    )


def test_agreement_with_the_radgraph_package():
    spec = importlib.util.find_spec("radgraph")
    if spec is None:
        pytest.skip("the package radgraph is not installed")
    # Its module of scores alone: the package itself wants more packages than are here.
    path = Path(spec.submodule_search_locations[0]) / "rewards.py"
    spec = importlib.util.spec_from_file_location("radgraph_rewards", path)
    rewards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards)
    rng = np.random.default_rng(0)
    pairs = [(random_annotation(rng), random_annotation(rng)) for _ in range(400)]
    expected = np.array([rewards.compute_reward(*pair, "all") for pair in pairs])
    ours = np.array([[pair_score(*pair, level) for level in ("simple", "partial", "complete")] for pair in pairs])
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert len(np.unique(expected)) > 20
    result = radgraph_f1(*zip(*pairs, strict=True))
    assert result["radgraph_f1"] == pytest.approx(expected[:, 1].mean())
    assert result["radgraph_f1_simple"] == pytest.approx(expected[:, 0].mean())


def words(texts):
    return [annotation(*((word, PRESENT, []) for word in text.split())) for text in texts]


def test_radgraph_of_texts_and_of_images():
    seen = []

    def annotator(texts):
        seen.append(texts)
        return words(texts)

    predictions, references = ["a b", "c", "", "a b", "x"], ["a b", "a b", "c", "a d", ""]
    result = radgraph_f1(predictions, references, annotator, units=[0, 0, 0, 1, 1])
    assert seen == [["a b", "c", "x", "a d"]]  # each text once, no empty ones
    assert result["radgraph_f1"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert result["radgraph_f1_ex"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert (result["count"], result["dropped"]) == (4, 1)
    with pytest.raises(ValueError, match="0 annotations for 4 texts"):
        radgraph_f1(predictions, references, lambda texts: [])
    with pytest.raises(ValueError, match="without an annotator"):
        radgraph_f1(predictions, references)


def test_radgraph_counts_stand_for_repeated_images():
    rng = np.random.default_rng(2)
    pairs = [(random_annotation(rng), random_annotation(rng)) for _ in range(9)]
    units = [0, 0, 1, 2, 2, 2, 3, 5, 5]
    statistic = RadGraphF1Statistic(*zip(*pairs, strict=True), units, 6)
    assert isinstance(statistic, Statistic)
    counts = draw_counts(6, 4)
    for row, values in zip(counts, statistic(counts), strict=True):
        rows = [
            (pair, image)
            for image, unit in enumerate(np.repeat(np.arange(6), row))
            for pair in np.flatnonzero(np.array(units) == unit)
        ]
        repeated = RadGraphF1Statistic(
            *zip(*(pairs[pair] for pair, _ in rows), strict=True), [image for _, image in rows], 6
        )
        np.testing.assert_allclose(values, point_estimate(repeated), rtol=1e-12)
    assert np.isnan(statistic(np.array([[0, 0, 0, 0, 1, 0]]))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("entities"), "`references[1]` is no annotation of RadGraph"),
        (lambda a: a["entities"]["0"].pop("label"), "`references[1]`: the entity 0 lacks `tokens` or `label`"),
        (lambda a: a["entities"]["0"].pop("relations"), "the entity 0 lacks a list `relations`"),
        (lambda a: a["entities"]["0"]["relations"].append(["modify", "7"]), "ends at '7', which is no entity"),
        (lambda a: a["entities"]["0"]["relations"].append("modify"), "is 'modify', not [name, entity]"),
    ],
)
def test_what_is_no_annotation(change, message):
    broken = annotation(("lung", ANATOMY, []))
    change(broken)
    with pytest.raises(ValueError, match=re.escape(message)):
        radgraph_f1([annotation()] * 2, [annotation(), broken])


def test_annotators_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_graphs.py").write_text(
        "def read(texts):\n    return []\nclass Make:\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_annotator("own_graphs:read")(["a"]) == []
    for spec, message in (
        ("own_graphs:Make", "a Make, not a function"),
        ("own_graphs:none", "no attribute 'none'"),
        ("other", "no annotator 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_annotator(spec)
    # With or without the package there are no weights in an empty folder, and nothing is downloaded.
    with pytest.raises(MetricUnavailable, match="needs the (package radgraph|weights of RadGraph)"):
        load_annotator(f"radgraph:{tmp_path}")


# -- as evaluate modules ----------------------------------------------------------------------------------------------


def test_clinical_f1_as_evaluate_module(tmp_path):
    rng = np.random.default_rng(1)
    stated, true = (random_labels(rng, 6, CHEXPERT_CLASSES) for _ in range(2))
    expected = clinical_f1(stated, true, official=True)
    items = {"predictions": [as_items(entry) for entry in stated], "references": [as_items(entry) for entry in true]}
    metric = evaluate.load(str(METRICS / "clinical_f1"), cache_dir=str(tmp_path))
    for rows in (slice(0, 4), slice(4, 6)):
        metric.add_batch(**{side: part[rows] for side, part in items.items()})
    assert metric.compute(official=True) == expected
    texts = {"predictions": ["edema", "no edema"], "references": ["edema", "edema"]}
    result = ClinicalF1(cache_dir=str(tmp_path)).compute(**texts, labeler=reader)
    assert result["micro_f1_14"] == pytest.approx(2 / 3)
    assert result == clinical_f1(**texts, labeler=reader)
    nothing = ClinicalF1(cache_dir=str(tmp_path)).compute(predictions=[], references=[], labeler=reader)
    assert (nothing["micro_f1_14"], nothing["count"]) == (None, 0)


def test_radgraph_f1_as_evaluate_module(tmp_path):
    rng = np.random.default_rng(1)
    stated, true = ([random_annotation(rng) for _ in range(6)] for _ in range(2))
    metric = evaluate.load(str(METRICS / "radgraph_f1"), cache_dir=str(tmp_path))
    metric.add_batch(
        predictions=[json.dumps(entry) for entry in stated], references=[json.dumps(entry) for entry in true]
    )
    assert metric.compute() == radgraph_f1(stated, true)
    texts = {"predictions": ["a b", "c"], "references": ["a", "c"]}
    metric = RadGraphF1(cache_dir=str(tmp_path))
    assert metric.compute(**texts, annotator=words) == radgraph_f1(**texts, annotator=words)
    with pytest.raises(ValueError, match="not JSON"):
        RadGraphF1(cache_dir=str(tmp_path)).compute(**texts)
