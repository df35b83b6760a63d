"""From stored predictions and targets to results: hand-made cases against independent packages, METEOR's program."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from mean_average_precision import MetricBuilder
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

from evaluation.labelers import CHEXPERT_CLASSES, CHEXPERT_FIVE
from evaluation.labelers.base import CheckedLabeler
from evaluation.metrics.cider.cider import CiderStatistic
from evaluation.metrics.meteor import meteor
from evaluation.metrics.text_preparation import prepare_pairs
from evaluation.metrics.unavailable import MetricUnavailable
from evaluation.predictions import Predictions, PredictionStore
from evaluation.scoring import Labelers, score_task
from evaluation.tasks.catalog import TASKS
from evaluation.tasks.detection import DetectionSettings
from evaluation.tasks.grounding import GroundingSettings
from evaluation.tasks.records import Targets
from processing_chex.vocabulary import ANATOMY_NAMES
from tests.test_box_metrics import pycocotools_result, random_boxes


REGIONS = len(ANATOMY_NAMES)


def targets_of(number, **changes):
    """Targets of one image on which nothing is annotated but `changes`."""
    empty = {
        "sample_id": f"image {number}",
        "anatomy_boxes": np.zeros((REGIONS, 4)),
        "anatomy_present": np.zeros(REGIONS, dtype=bool),
        "anatomy_labels": np.zeros((REGIONS, 0), dtype=int),
        "anatomy_sentences": [""] * REGIONS,
        "object_boxes": np.zeros((0, 4)),
        "object_labels": np.zeros(0, dtype=int),
        "object_phrases": [],
        "sentences": [],
    }
    if "object_boxes" in changes:
        count = len(changes["object_boxes"])
        empty |= {"object_labels": np.zeros(count, dtype=int), "object_phrases": [""] * count}
    return Targets(**empty | changes)


def score(folder, task, targets, arrays=None, texts=None, ragged=(), counts=None, classes=("a", "b"), **options):
    """The result of a task whose predictions were written to files and read again."""
    ids = [target.sample_id for target in targets]
    if counts is None:
        counts = np.zeros(len(ids), dtype=int)
    store = PredictionStore(folder / task, {"model": "by hand"}, len(ids))
    store.open()
    store.write_chunk(0, Predictions(ids, arrays or {}, counts, texts or {}, ragged))
    options = {"settings": None, "labeler": None, "labelers": Labelers(), "resamples": 0} | options
    return score_task(
        TASKS[task],
        store.read(ids, task),
        SimpleNamespace(targets=lambda *_: targets),
        SimpleNamespace(classes=list(classes)),
        SimpleNamespace(image_processor=None),
        **options,
    ).result


# -- boxes and classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_detection_with_several_boxes_empty_images_and_an_absent_class(tmp_path, seed):
    rng = np.random.default_rng(seed)
    images, classes, regions = 9, 4, 3  # the last class has no box
    targets = []
    for number in range(images):
        count = [0, 1, 4][number % 3]
        boxes = random_boxes(rng, count, 8, True) / 16
        targets.append(targets_of(number, object_boxes=boxes, object_labels=rng.integers(0, 3, count)))
    boxes = np.stack([random_boxes(rng, classes * regions, 8, True) / 16 for _ in range(images)])
    for own, target in zip(boxes, targets, strict=True):
        for box, label in zip(target.object_boxes, target.object_labels, strict=True):
            own[label * regions + rng.integers(0, regions)] = box + rng.normal(0, 0.01, 4).clip(-0.02, 0.02)
    boxes = boxes.clip(0, 1).reshape(images, classes, regions, 4).astype(np.float32)
    weights = rng.permutation(images * classes * regions).reshape(images, classes, regions) / 1000
    arrays = {"boxes": boxes, "weights": weights.astype(np.float32), "margins": np.zeros_like(weights, np.float32)}
    settings = DetectionSettings(score="weights", merge="none")
    result = score(tmp_path, "od_vindr", targets, arrays, classes="abcd", settings=settings)

    package = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=classes)
    labels = np.repeat(np.arange(classes), regions)
    shift = np.array([0, 0, 1, 1])  # that package counts pixels, with both ends
    for own, weight, target in zip(boxes.astype(float), weights, targets, strict=True):
        found = np.column_stack([1000 * own.reshape(-1, 4) - shift, labels, weight.reshape(-1)])
        nothing = np.zeros((len(target.object_labels), 2))
        package.add(found, np.column_stack([1000 * target.object_boxes - shift, target.object_labels, nothing]))
    levels, thresholds = np.arange(101) / 100, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    expected = package.value(iou_thresholds=thresholds, recall_thresholds=levels, mpolicy="soft")
    metrics = result["metrics"]
    assert metrics["map"]["official"]["value"] == pytest.approx(float(expected["mAP"]), abs=1e-5)
    present = [np.mean([expected[threshold][label]["ap"] for threshold in thresholds]) for label in range(3)]
    assert [row["map"] for row in result["per_class"][:3]] == pytest.approx(present, abs=1e-5)
    assert result["per_class"][3] == {"name": "d", "positives": 0, "map": None, "map50": None}
    assert metrics["map"]["value"] == pytest.approx(np.mean(present), abs=1e-5)
    for name, threshold in (("map10", 0.1), ("map30", 0.3), ("map50", 0.5)):
        own = [expected[threshold][label]["ap"] for label in range(3)]
        assert metrics[name]["value"] == pytest.approx(np.mean(own), abs=1e-5)
        assert metrics[name]["official"]["value"] == pytest.approx(np.sum(own) / 4, abs=1e-5)
    assert any(note.startswith("Without positives") and "d" in note for note in result["notes"])
    assert any("3 of 9 images have no boxes" in note for note in result["notes"])

    found = [
        {"boxes": own.reshape(-1, 4).astype(float), "labels": labels, "scores": weight.reshape(-1)}
        for own, weight in zip(boxes, weights, strict=True)
    ]
    stats, _ = pycocotools_result(found, [target.object_references() for target in targets], classes)
    assert metrics["coco_map"]["value"] == pytest.approx(stats[0], abs=1e-6)


def test_close_margins_stay_apart_at_a_low_temperature(tmp_path):
    """In single precision both probabilities are 1, and the order of the images decides."""
    box = np.array([[0.1, 0.1, 0.5, 0.5]])
    targets = [targets_of(0), targets_of(1, object_boxes=box)]
    margins = np.array([1.80, 1.81], dtype=np.float32).reshape(2, 1, 1)
    arrays = {"boxes": np.broadcast_to(box, (2, 1, 1, 4)), "weights": np.ones_like(margins), "margins": margins}
    settings = DetectionSettings(score="prompts", temperature=0.1, merge="none")
    result = score(tmp_path, "od_vindr", targets, arrays, classes="a", settings=settings)
    assert result["metrics"]["map"]["value"] == 1.0


def test_grounding_with_several_phrases_and_boxes(tmp_path):
    """Corners on the grid of 1024, so that painted masks, the exact areas and the official grid agree."""
    rng = np.random.default_rng(5)

    def boxes_on_grid(count):
        return random_boxes(rng, count, 1000, True) / 1024

    phrases = [["opacity", "effusion", "opacity"], [], ["mass"], ["b", "a", "a", "b"]]
    targets = [
        targets_of(number, object_boxes=boxes_on_grid(len(of_image)), object_phrases=of_image)
        for number, of_image in enumerate(phrases)
    ]
    counts = np.array([len(target.grounded_phrases()) for target in targets])
    assert counts.tolist() == [2, 0, 1, 2]
    wanted = [boxes for target in targets for boxes in target.grounded_phrases().values()]
    boxes = np.stack([np.concatenate([own[:1], boxes_on_grid(2)]) for own in wanted])
    scores = rng.permutation(15).reshape(5, 3) / 24
    arrays = {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32)}
    result = score(
        *(tmp_path, "sg_mscxr", targets, arrays),
        texts={"phrases": [phrase for target in targets for phrase in target.grounded_phrases()]},
        ragged=("boxes", "scores"),
        counts=counts,
        settings=GroundingSettings(nms_threshold=1.0),
    )

    def paint(boxes):
        mask = np.zeros((1024, 1024), dtype=bool)
        for x0, y0, x1, y1 in np.rint(boxes * 1024).astype(int):
            mask[y0:y1, x0:x1] = True
        return mask

    common, union = np.zeros((2, 5, 5))
    for column, threshold in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        for row in range(5):
            predicted, actual = paint(boxes[row][scores[row] > threshold]), paint(wanted[row])
            common[row, column], union[row, column] = (predicted & actual).sum(), (predicted | actual).sum()
    micro = common.sum(0) / union.sum(0)
    metrics = result["metrics"]
    for column in (metrics, {name: entry["official"] for name, entry in metrics.items()}):
        assert column["miou"]["value"] == pytest.approx(micro.mean())
        assert column["best_iou"]["value"] == pytest.approx(micro.max())
        assert column["iou_at_30"]["value"] == pytest.approx(micro[2])
    assert metrics["macro_iou"]["value"] == pytest.approx((common / union).mean())
    package = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=1)
    shift = np.array([0, 0, 1, 1])
    for own, weight, actual in zip(boxes, scores, wanted, strict=True):
        package.add(
            np.column_stack([1000 * own - shift, np.zeros(3), weight]),
            np.column_stack([1000 * actual - shift, np.zeros((len(actual), 3))]),
        )
    thresholds = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    expected = package.value(iou_thresholds=thresholds, recall_thresholds=np.arange(101) / 100, mpolicy="soft")
    assert metrics["map"]["value"] == pytest.approx(float(expected["mAP"]), abs=1e-5)
    assert result["phrases"] == 5


@pytest.mark.parametrize("seed", range(3))
def test_regions_with_unknown_labels(tmp_path, seed):
    rng = np.random.default_rng(seed)
    images, classes = 40, 3
    labels = rng.choice([1, 0, -1], (images, REGIONS, classes), p=(0.3, 0.5, 0.2))
    present = rng.random((images, REGIONS)) < 0.7
    labels[:, 4, 0] = np.where(labels[:, 4, 0] == 0, -1, labels[:, 4, 0])  # a cell of positives alone
    labels[:, :, 2] = np.where(labels[:, :, 2] == 1, -1, labels[:, :, 2])  # a class without positives
    margins = np.round(rng.uniform(-1, 1, labels.shape), 1).astype(np.float32)  # with ties
    margins[~present] = 0
    targets = [
        targets_of(number, anatomy_present=present[number], anatomy_labels=labels[number]) for number in range(images)
    ]
    result = score(tmp_path, "rc_cig", targets, {"margins": margins}, classes="abc")

    areas, weights = np.full((2, REGIONS, classes), np.nan)
    for region, label in np.ndindex(REGIONS, classes):
        own = present[:, region] & (labels[:, region, label] >= 0)
        truth = labels[own, region, label]
        weights[region, label] = truth.sum()
        if 0 < truth.sum() < len(truth):
            areas[region, label] = roc_auc_score(truth, margins[own, region, label])
    defined = np.where(np.isnan(areas), 0, weights)
    products = np.nan_to_num(areas) * defined
    metrics = result["metrics"]
    assert metrics["wauroc"]["value"] == pytest.approx(products.sum() / defined.sum())
    assert metrics["macro_auroc"]["value"] == pytest.approx((products.sum(0) / defined.sum(0).clip(1))[:2].mean())
    # Officially a cell of positives alone counts as 0, and the absent class stays in the mean.
    official = {name: entry["official"]["value"] for name, entry in metrics.items()}
    assert official["wauroc"] == pytest.approx(products.sum() / weights.sum())
    assert official["macro_auroc"] == pytest.approx((products.sum(0) / weights.sum(0).clip(1)).mean())
    assert official["wauroc"] < metrics["wauroc"]["value"]
    assert result["per_class"][2] == {"name": "c", "positives": 0, "wauroc": None}


def test_boxes_of_classes(tmp_path):
    rng = np.random.default_rng(1)
    counts = np.array([0, 3, 1, 4, 2, 5])
    labels = np.array([0, 1, 2, -1, 0, 1, 2, 1, 0, 0, 1, 2, 2, 1, 0])  # -1: of a class that is not scored
    margins = rng.normal(0, 0.3, (15, 4)).astype(np.float32)
    margins[np.arange(15), labels.clip(0)] += 0.2
    owners = np.repeat(np.arange(6), counts)
    targets = [
        targets_of(
            number, object_boxes=np.tile([0.1, 0.1, 0.5, 0.5], (count, 1)), object_labels=labels[owners == number]
        )
        for number, count in enumerate(counts)
    ]
    result = score(
        tmp_path, "rc_mscxr", targets, {"margins": margins}, ragged=("margins",), counts=counts, classes="abcd"
    )
    own, truth = margins[labels >= 0], labels[labels >= 0]
    areas = [roc_auc_score(truth == label, own[:, label]) for label in range(3)]
    metrics = result["metrics"]
    assert metrics["auroc"]["value"] == pytest.approx(np.mean(areas))
    assert metrics["auroc"]["official"]["value"] == pytest.approx(np.sum(areas) / 4)
    assert metrics["accuracy"]["value"] == pytest.approx(balanced_accuracy_score(truth, own.argmax(1)))
    assert metrics["mcc"]["value"] == pytest.approx(matthews_corrcoef(truth, own.argmax(1)))
    assert result["boxes"] == 14


# -- texts ------------------------------------------------------------------------------------------------------------


class ReadsNames:
    """Answers like CheXbert: every class that is named, "no X" negated, "maybe X" uncertain; "" has No Finding."""

    name, classes = "names", CHEXPERT_CLASSES

    def __call__(self, texts):
        found = []
        for text in texts:
            labels = {}
            for words in (sentence.strip() for sentence in text.split(".") if sentence.strip()):
                value = {"No": 0, "Maybe": -1}.get(words.split()[0], 1)
                labels |= {name: value for name in CHEXPERT_CLASSES if name.lower() in words.lower()}
            found.append(labels if text.strip() else {"No Finding": 1})
        return found


@pytest.fixture
def labelers(monkeypatch):
    """Labellers with `ReadsNames` as "names"."""
    monkeypatch.setattr("evaluation.labelers.load_labeler", lambda spec, device: CheckedLabeler(ReadsNames()))
    return Labelers()


WORDING = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")
FINDINGS = ("micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5", "example_f1_14")


def expected_wording(generated, references):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (`make test` installs it)")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    def prepared(texts):
        return {number: [" ".join(text.replace(".", " .").split())] for number, text in enumerate(texts)}

    pairs = prepared(references), prepared(generated)
    values = [*Bleu(4).compute_score(*pairs, verbose=0)[0], Rouge().compute_score(*pairs)[0]]
    return dict(zip(WORDING, [*values, Cider().compute_score(*pairs)[0]], strict=True))


def expected_findings(generated, references, owners):
    """Micro, macro and example-based F1 by scikit-learn; official: classes and images without a hit."""
    labels = [ReadsNames()(texts) for texts in (references, generated)]
    values, official = {}, {}
    for suffix, names, positive in (("_14", CHEXPERT_CLASSES, {1}), ("_5", CHEXPERT_FIVE, {1, -1})):
        actual, predicted = (np.array([[row.get(n) in positive for n in names] for row in side]) for side in labels)
        for result, empty in ((values, np.nan), (official, 0.0)):
            result[f"micro_f1{suffix}"] = f1_score(actual, predicted, average="micro")
            result[f"macro_f1{suffix}"] = f1_score(actual, predicted, average="macro", zero_division=empty)
        if suffix == "_14":
            own = []
            for image in np.unique(owners):
                true, found = actual[owners == image].ravel(), predicted[owners == image].ravel()
                own.append(f1_score(true, found, zero_division=1.0))
            hits = np.array(
                [
                    value > 0 and (actual[owners == image].any())
                    for image, value in zip(np.unique(owners), own, strict=True)
                ]
            )
            values["example_f1_14"], official["example_f1_14"] = np.mean(own), np.mean(np.array(own)[hits])
    return values, official


REPORTS = [  # generated, reference
    ("Cardiomegaly. No edema.", "Cardiomegaly. Maybe edema."),
    ("Pneumothorax. Fracture.", "Pleural effusion."),  # without a hit
    ("", "Atelectasis. Edema. Consolidation."),
    ("Edema.", ""),  # a reference that is missing, which CheXbert would call No Finding
    ("The heart is normal.", "The lungs are clear."),  # nothing on either side
    ("Edema. Pleural effusion.", "Edema.\nMaybe pleural effusion. Pneumonia."),
    ("", "  "),
]


def test_reports_without_a_reference_do_not_count(tmp_path, labelers):
    generated, references = zip(*REPORTS, strict=True)
    targets = [
        targets_of(number, sentences=[sentence for sentence in text.splitlines() if sentence])
        for number, text in enumerate(references)
    ]
    sentences = [[f"{part.strip()}." for part in text.split(".") if part.strip()] for text in generated]
    # Every report once more says something that was dropped as a repetition.
    flat = [sentence for of_image in sentences for sentence in [*of_image, "Lung lesion."]]
    kept = np.array([index < len(of_image) for of_image in sentences for index in range(len(of_image) + 1)])
    units = len(flat)
    arrays = {
        "query": np.zeros(units, int),
        "kept": kept,
        "boxes": np.zeros((units, 1, 4)),
        "weights": np.zeros((units, 1)),
    }
    result = score(
        *(tmp_path, "rg_mimic", targets, arrays),
        texts={"generated": flat},
        ragged=tuple(arrays),
        counts=np.array([len(of_image) + 1 for of_image in sentences]),
        labelers=labelers,
        labeler="names",
        metrics=(*FINDINGS, *WORDING),
    )
    assert result["texts"] == 5
    assert "2 of 7 references are empty and left out." in result["notes"]
    used = [0, 1, 2, 4, 5]
    generated, references = (
        [side[index] for index in used] for side in (generated, [" ".join(t.split()) for t in references])
    )
    check_texts(result, generated, references, np.array(used))
    assert result["per_class"][CHEXPERT_CLASSES.index("No Finding")]["positives"] == 0


def written(tmp_path, generated, references, **options):
    """The result of reports of one sentence each."""
    count = len(generated)
    arrays = {"query": np.zeros(count, int), "kept": np.ones(count, bool)}
    arrays |= {"boxes": np.zeros((count, 1, 4)), "weights": np.zeros((count, 1))}
    targets = [targets_of(number, sentences=[text] if text else []) for number, text in enumerate(references)]
    return score(
        *(tmp_path, "rg_mimic", targets, arrays),
        texts={"generated": list(generated)},
        ragged=tuple(arrays),
        counts=np.ones(count, int),
        labeler="names",
        **options,
    )


def test_no_reference_at_all_is_no_error(tmp_path, labelers):
    result = written(tmp_path, ["Edema."], [""], labelers=labelers, examples=2, output=tmp_path)
    assert result["metrics"] == {} and result["examples"] == []
    assert result["not_computed"]["bleu1"] == result["not_computed"]["micro_f1_14"] == "there are no reference texts"


def test_metrics_of_another_labeller_say_so_where_they_are_named(tmp_path, labelers):
    result = written(tmp_path, ["Edema."], ["Edema."], labelers=labelers, metrics=("micro_f1", "micro_f1_14"))
    assert set(result["metrics"]) == {"micro_f1_14"}
    assert re.match("the labeller names has other classes, so .* micro_f1_14,", result["not_computed"]["micro_f1"])
    assert "micro_f1" not in written(tmp_path / "all", ["Edema."], ["Edema."], labelers=labelers)["not_computed"]


def test_notes_tell_undefined_classes_from_wrong_ones(tmp_path, labelers):
    result = written(tmp_path, ["Edema. Fracture."], ["Edema."], labelers=labelers, metrics=("macro_f1_14",))
    wrong, undefined = sorted(note for note in result["notes"] if ":" in note)
    assert wrong == "In no reference, but in generated texts, so 0 in means: Fracture."
    assert undefined.startswith("Without positives in this split, so undefined and left out of means: Enlarged")
    assert "Edema" not in undefined and "Fracture" not in undefined
    assert result["metrics"]["macro_f1_14"]["value"] == 0.5
    # Every box is of the class "a", which so has nothing to be told apart from.
    targets = [targets_of(0, object_boxes=np.array([[0, 0, 0.5, 0.5]]))]
    options = {"counts": np.array([1]), "ragged": ("margins",)}
    result = score(tmp_path, "rc_mscxr", targets, {"margins": np.zeros((1, 2))}, **options)
    assert "Without negatives in this split, so undefined and left out of means: a." in result["notes"]
    assert "Without positives in this split, so undefined and left out of means: b." in result["notes"]


def check_texts(result, generated, references, owners):
    values, official = expected_findings(generated, references, owners)
    metrics = result["metrics"]
    for name in FINDINGS:
        assert metrics[name]["value"] == pytest.approx(values[name]), name
        assert metrics[name]["official"]["value"] == pytest.approx(official[name]), name
    for name, value in expected_wording(generated, references).items():
        assert metrics[name]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_regions_with_references_of_several_sentences(tmp_path, labelers):
    said = {  # image -> region -> generated, reference
        0: {3: ("Lung opacity.", "Lung opacity. No pneumothorax."), 5: ("No edema.", "Edema. Cardiomegaly is seen.")},
        2: {0: ("Fracture.", "Fracture of a rib."), 7: ("Maybe consolidation.", "Consolidation. Maybe pneumonia.")},
        3: {1: ("Clear.", "Support devices. Lung opacity.")},
    }
    targets, generated, references, owners = [], [], [], []
    for number in range(4):
        sentences, present = [""] * REGIONS, np.zeros(REGIONS, dtype=bool)
        for region, (text, reference) in said.get(number, {}).items():
            sentences[region], present[region] = reference, True
            generated.append(text), references.append(reference), owners.append(number)
        present[9] = True  # a region about which nothing is said
        targets.append(targets_of(number, anatomy_present=present, anatomy_sentences=sentences))
    counts = np.bincount(owners, minlength=4)
    regions = np.concatenate([target.described_regions().nonzero()[0] for target in targets])
    result = score(
        *(tmp_path, "re_cig", targets, {"regions": regions}),
        texts={"generated": generated, "references": references},
        ragged=("regions",),
        counts=counts,
        labelers=labelers,
        labeler="names",
        metrics=(*FINDINGS, *WORDING),
    )
    assert result["texts"] == 5
    check_texts(result, generated, references, np.array(owners))
    json.dumps(result["metrics"])


def test_cider_without_the_mean_over_images():
    pairs = prepare_pairs(["a b c", "c d", "a d"], ["a b d", "c d", "b b a"], [0, 0, 2], 3)
    counts = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    whole, part = CiderStatistic(pairs), CiderStatistic(pairs, per_image=False)
    assert (whole.names, part.names) == (("cider", "cider_ex"), ("cider",))
    np.testing.assert_array_equal(part(counts), whole(counts)[:, :1])


# -- programs ---------------------------------------------------------------------------------------------------------


class CountingProgram:
    """In place of METEOR's: counts starts and ends; fails while `broken`."""

    started, ended, broken = 0, 0, False

    def __init__(self):
        type(self).started += 1

    def statistics(self, candidates, references):
        if self.broken:
            raise meteor.MeteorError("METEOR's Java process ended with code 1")
        statistics = np.zeros((len(candidates), meteor.NUM_STATISTICS))
        statistics[:, :2] = 3
        return statistics

    def close(self):
        type(self).ended += 1


@pytest.fixture
def program(monkeypatch):
    class Program(CountingProgram):
        pass

    monkeypatch.setattr(meteor, "MeteorProgram", Program)
    return Program


def meteor_of(folder, labelers, metrics=("meteor",), **options):
    targets = [targets_of(0, object_boxes=np.array([[0, 0, 1, 1]]), object_phrases=["Edema."])]
    arguments = {"texts": {"generated": ["No edema."]}, "counts": np.array([1])}
    return score(folder, "re_mscxr", targets, **arguments, labelers=labelers, metrics=metrics, **options)


def test_tasks_share_one_meteor_program(tmp_path, program):
    with Labelers() as labelers:
        assert program.started == 0  # no task has asked for it
        for number in range(3):
            result = meteor_of(tmp_path / str(number), labelers)
            assert result["metrics"]["meteor"]["value"] == 0.0
        assert (program.started, program.ended) == (1, 0)
    assert (program.started, program.ended) == (1, 1)
    labelers.close()
    assert program.ended == 1


def test_a_meteor_program_that_failed_is_started_anew(tmp_path, program):
    with Labelers() as labelers:
        program.broken = True
        result = meteor_of(tmp_path / "first", labelers)
        assert result["not_computed"] == {"meteor": "METEOR's Java process ended with code 1"}
        program.broken = False
        assert "meteor" in meteor_of(tmp_path / "second", labelers)["metrics"]
    assert (program.started, program.ended) == (2, 2)


def test_meteor_without_java_is_not_computed(tmp_path, monkeypatch):
    def missing():
        raise MetricUnavailable("METEOR needs Java 8 or newer")

    monkeypatch.setattr(meteor, "MeteorProgram", missing)
    result = meteor_of(tmp_path, Labelers())
    assert result["not_computed"] == {"meteor": "METEOR needs Java 8 or newer"}
    assert "meteor" not in result["metrics"]


def test_metrics_that_are_left_out_say_why(tmp_path, program):
    reasons = {"meteor": "left out of this run", "meteor_normal": "a task without it", "bleu1": "not asked for"}
    result = meteor_of(tmp_path, Labelers(), metrics=("meteor", "rouge_l"), left_out=reasons)
    assert result["not_computed"] == {"meteor": "left out of this run"}
    assert list(result["metrics"]) == ["rouge_l"]
    assert program.started == 0
