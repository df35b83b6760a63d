"""How a model behaves in a dialogue: measures on partners whose behaviour is known, and a whole run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation.bootstrap import point_estimate
from evaluation.interactivity import (
    JITTER_SIZES,
    Analysis,
    Answers,
    Tally,
    best_overlap,
    jitter,
    main,
    mirror,
    overlap,
    render_page,
    sections_of,
    wordings,
)
from evaluation.tasks.records import read_targets
from processing_chex.prompt_sets import prompts_for_classes
from processing_chex.vocabulary import ANATOMY_NAMES, PHANTOM_CLASSES
from training.data.phantom import phantom_datasets, phantom_record
from training.data.phantom_text import label_text

from .test_cli import save_tiny_model


ROOT = Path(__file__).parents[1]
ALL = (*("wording", "sides", "jitter", "text_and_box"), "added_region")


@pytest.fixture(scope="module")
def targets():
    records = [phantom_record(5, index, 64) for index in range(24)]
    for record in records:
        for item in record["objects"]:
            item["category"] = PHANTOM_CLASSES.index(item["category"])
    return [read_targets(record, (0, 0, 64, 64)) for record in records]


class Oracle:
    """Knows the annotations. `features` is (target, mirrored): mirrored, everything is on the other side."""

    def __init__(self, side_matters: bool = True, words_matter: bool = False):
        self.side_matters, self.words_matter = side_matters, words_matter

    def ask(self, features, texts, boxes=None, sentences=True):
        target, mirrored = features
        found = [self.find(target, text, mirrored) for text in texts]
        found += [(box, 1.0, "At this place.", box) for box in (boxes if boxes is not None else ())]
        boxes, scores, spoken, vectors = zip(*found, strict=True)
        texts = list(spoken) if sentences else None
        labels = [label_text(text) for text in spoken] if sentences else None
        return Answers(np.array(boxes), np.array(scores), np.array(vectors), labels, texts)

    def find(self, target, text, mirrored):
        words = text.lower()
        side = "right" if "right" in words else "left" if "left" in words else None
        name = next((name for name in ANATOMY_NAMES if name == words), None)
        nothing = (np.array([0.45, 0.45, 0.55, 0.55]), 0.1, "", np.zeros(4))
        if name is not None:
            if mirrored and side is not None:
                name = name.replace(side, "left" if side == "right" else "right")
            box = target.anatomy_boxes[ANATOMY_NAMES.index(name)]
            return (mirror(box) if mirrored else box), 0.9, "", box
        for index, finding in enumerate(PHANTOM_CLASSES):
            own = target.object_boxes[target.object_labels == index]
            if finding.lower() not in words or not len(own):
                continue
            if self.words_matter and text != finding:
                return nothing
            box = own[0]
            if self.side_matters and side is not None:
                on_right = (box[0] + box[2]) / 2 < 0.5
                if on_right != (side == "right"):
                    return mirror(box), 0.2, f"No {finding.lower()} on the {side}.", box
            return (mirror(box) if mirrored else box), 0.9, f"Small {finding.lower()}.", box
        return nothing


def measure(targets, oracle, sections=ALL):
    labels = list(PHANTOM_CLASSES)
    analysis = Analysis(oracle, prompts_for_classes(PHANTOM_CLASSES), labels, sections, seed=3)
    for target in targets:
        analysis.add_image(target, (target, False), (target, True))
    entries = analysis.tally.summary(50, 1)
    return {name: entry["value"] for name, entry in entries.items()}, entries


# -- parts ------------------------------------------------------------------------------------------------------------


def test_boxes():
    box = np.array([0.1, 0.2, 0.5, 0.6])
    assert overlap(box, box) == 1 and overlap(box, mirror(box)) == 0
    assert overlap(box, np.array([0.3, 0.2, 0.7, 0.6])) == pytest.approx(1 / 3)
    assert overlap(np.zeros(4), np.zeros(4)) == 0
    assert mirror(box) == pytest.approx([0.5, 0.2, 0.9, 0.6]) and mirror(mirror(box)) == pytest.approx(box)
    assert best_overlap(box, np.array([[0, 0, 0.1, 0.1], box])) == 1


def test_jitter_is_bounded_and_repeatable():
    box = np.array([0.3, 0.4, 0.5, 0.7])
    for size in (0.0, 0.1, 0.5):
        drawn = np.array([jitter(box, size, np.random.default_rng(seed)) for seed in range(200)])
        centres, lengths = (drawn[:, :2] + drawn[:, 2:]) / 2, drawn[:, 2:] - drawn[:, :2]
        assert (abs(centres - [0.4, 0.55]) <= size * np.array([0.2, 0.3]) + 1e-9).all()
        assert (lengths <= np.array([0.2, 0.3]) * (1 + size) + 1e-9).all()
        assert (lengths >= np.array([0.2, 0.3]) / (1 + size) - 1e-9).all()
        again = jitter(box, size, np.random.default_rng(7))
        assert (again == drawn[7]).all()
    assert jitter(box, 0.0, np.random.default_rng(0)) == pytest.approx(box)
    edge = jitter(np.array([0.9, 0.9, 1.0, 1.0]), 0.5, np.random.default_rng(1))
    assert (edge >= 0).all() and (edge <= 1).all() and (edge[2:] > edge[:2]).all()


def test_wordings():
    texts = wordings("Pleural effusion")
    assert next(iter(texts.items())) == ("prompt", "Pleural effusion")
    assert texts["sentence"] == "There is pleural effusion." and texts["synonym 1"] == "Pleural fluid"
    assert len(set(texts.values())) == len(texts)
    assert len(wordings("Something else")) == 6


def test_means_over_images():
    tally = Tally()
    for values in ([1.0, 0.0, 1.0], [], [0.0], [float("nan")]):
        tally.open_image()
        for value in values:
            tally.add("a/b", value)
    statistic = tally.statistic()
    assert statistic.num_units == 4 and point_estimate(statistic) == pytest.approx([0.5])
    assert statistic(np.array([[0, 1, 2, 0], [2, 0, 1, 0]])) == pytest.approx(np.array([[0.0], [4 / 7]]))
    assert np.isnan(statistic(np.array([[0, 3, 0, 1]]))).all()
    entry = tally.summary(200, 0)["a/b"]
    assert (entry["value"], entry["units"], entry["images"]) == (0.5, 4, 2)
    assert 0 <= entry["low"] <= 0.5 <= entry["high"] <= 1
    assert Tally().summary(10, 0) == {}


# -- partners whose behaviour is known --------------------------------------------------------------------------------


def test_a_perfect_partner(targets):
    values, entries = measure(targets, Oracle())
    assert values["wording/finding_iou_prompt"] == pytest.approx(1)
    ones = ("diseased_on_asked_side", "healthy_on_asked_side", "healthy_scores_lower", "diseased_sentence_asserts")
    ones += ("regions_on_asked_side", "mirrored_region_iou_by_place", "mirrored_finding_iou", "diseased_iou")
    for name in ones:
        assert values[f"sides/{name}"] == pytest.approx(1), name
    assert values["sides/healthy_sentence_asserts"] == 0
    assert values["sides/healthy_sentence_names_diseased_side"] == 0
    assert values["sides/mirrored_region_iou_by_name"] < 0.1
    assert values["text_and_box/feature_cosine"] == pytest.approx(1)
    assert values["text_and_box/box_iou"] == pytest.approx(1)
    assert values["text_and_box/feature_cosine_others"] < 0.99
    assert values["added_region/plain_iou"] == values["added_region/coarse_iou"] == pytest.approx(1)
    assert values["added_region/wrong_side_gain"] < -0.9
    # Other words that contain the name change nothing; those that do not, the oracle does not know.
    for form in ("lower case", "full stop", "sentence", "evidence", "question"):
        assert values[f"wording/agreement_of_form/{form}"] == 1
    assert values["wording/of_form/prompt"] == 1 == values["wording/asserted/prompt"]
    sizes = [values[f"jitter/iou/{size:g}"] for size in JITTER_SIZES]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.85 and sizes[-1] < 0.6
    assert values["jitter/label_agreement/0.5"] == 1
    assert entries["sides/regions_on_asked_side"]["images"] == len(targets)


def test_a_partner_that_does_not_hear_sides(targets):
    values, _ = measure(targets, Oracle(side_matters=False), ("sides", "added_region"))
    assert values["sides/diseased_on_asked_side"] == 1
    assert values["sides/healthy_on_asked_side"] == 0
    assert values["sides/healthy_iou_with_finding"] == 1
    assert values["sides/healthy_scores_lower"] == 0
    assert values["sides/healthy_sentence_asserts"] == 1
    assert values["added_region/wrong_side_gain"] == 0
    assert not any(name.startswith(("wording", "jitter")) for name in values)


def test_a_partner_that_knows_one_wording(targets):
    values, _ = measure(targets, Oracle(words_matter=True), ("wording",))
    assert values["wording/finding_iou_prompt"] == 1
    assert values["wording/finding_iou_others"] < 0.2 and values["wording/finding_box_agreement"] < 0.2
    assert values["wording/finding_score_difference"] == pytest.approx(0.8)
    assert values["wording/finding_label_agreement"] == 0
    assert values["wording/asserted/prompt"] == 1 and values["wording/asserted/sentence"] == 0


def test_which_side_a_finding_is_on(targets):
    analysis = Analysis(Oracle(), prompts_for_classes(PHANTOM_CLASSES), PHANTOM_CLASSES)
    sides = {"right": 0, "left": 0, None: 0}
    for target in targets:
        for unit in analysis.findings(target):
            middle = (unit.boxes[:, 0] + unit.boxes[:, 2]) / 2
            if unit.side == "right":  # of the patient: the left of the image
                assert (middle < 0.5).all()
            elif unit.side == "left":
                assert (middle > 0.5).all()
            if unit.side:
                assert analysis.zone(unit, target).startswith(unit.side)
            sides[unit.side] += 1
    assert min(sides.values()) > 0


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    data = phantom_datasets(folder.parent / "cache", num_train=0, num_validation=0, num_test=4, image_size=64)
    data.save_to_disk(str(folder))
    return folder


def test_run(data_folder, tmp_path):
    model = save_tiny_model(tmp_path / "model", stage=3)
    output = tmp_path / "results"
    arguments = [
        "--model",
        model,
        "--data",
        f"phantom={data_folder}",
        "--limit",
        3,
        "--bootstrap",
        20,
        "--no-progress",
    ]
    process = subprocess.run(
        [sys.executable, "evaluation/interactivity.py", *map(str, arguments), "--output", str(output)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((output / "interactivity.json").read_text(encoding="utf-8"))
    assert (results["images"], results["seed"], results["labeler"]) == (3, 0, "phantom")
    assert set(results["measures"]) == set(ALL)
    for measures in results["measures"].values():
        for name, entry in measures.items():
            assert -1 <= entry["value"] <= 1 and entry["units"] >= entry["images"] > 0, name
    assert "label_agreement" in results["measures"]["text_and_box"]
    with (output / "interactivity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, results["measures"].values()))
    page = (output / "interactivity.html").read_text(encoding="utf-8")
    assert page.count("<section") == 5 and page.count('class="chart"') == 2
    assert "http" not in page.split("</style>")[1]
    # Once more in this process: the same numbers.
    again = tmp_path / "again"
    assert main([*map(str, arguments), "--output", str(again)]) == 0
    assert json.loads((again / "interactivity.json").read_text(encoding="utf-8"))["measures"] == results["measures"]


def test_models_without_sentences(data_folder, tmp_path):
    model = save_tiny_model(tmp_path / "model", stage=1)
    sections = ["--sections", "jitter", "text_and_box", "--limit", "2", "--bootstrap", "10", "--no-progress"]
    arguments = ["--model", str(model), "--data", str(data_folder), "--output", str(tmp_path / "out"), *sections]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "out" / "interactivity.json").read_text(encoding="utf-8"))
    assert set(results["measures"]) == {"jitter", "text_and_box"} and "no sentence generator" in results["notes"][0]
    assert not any("label" in name for measures in results["measures"].values() for name in measures)


def test_bad_input(data_folder, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", stage=1)
    common = ["--output", str(tmp_path / "out"), "--no-progress"]
    for arguments, message in (
        (["--model", str(tmp_path), "--data", str(data_folder)], "no config.json"),
        (["--model", str(model), "--data", "phantom=nowhere"], "nowhere is not a folder"),
        (["--model", str(model), "--data", str(data_folder), "--split", "dev"], "'dev'"),
        (["--model", str(model), "--data", str(data_folder), "--bootstrap", "0"], "--bootstrap"),
    ):
        assert main([*arguments, *common]) == 2
        assert message in capsys.readouterr().err


def test_page_of_undefined_values_and_markup():
    entry = {"value": None, "low": None, "high": None, "units": 0, "images": 0}
    page = render_page(
        {
            "measures": sections_of({"sides/a": entry, "added_region/fine_gain": entry | {"value": -0.2}}),
            "model": {"name": "<b>", "sha256": "0"},
            "data": {"name": "own", "split": "test"},
            "images": 0,
            "seed": 0,
            "resamples": 1,
            "notes": ["<script>"],
            "command": "a & b",
        }
    )
    assert "undefined" in page and "<b>" not in page and "<script>" not in page and "a &amp; b" in page
