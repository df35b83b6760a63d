"""The evaluation of the tasks: catalogue, stored predictions, tuning, resuming, several processes, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation.predictions import DamagedChunk, PredictionError, Predictions, PredictionStore, StalePredictions, join
from evaluation.tasks.catalog import (
    DATA_SETS,
    FREE_TASKS,
    GROUPS,
    METRICS,
    PAPER_TASKS,
    PRESETS,
    TASKS,
    check_metrics,
    find_tasks,
    twin_of,
)
from evaluation.tasks.detection import Candidates, DetectionSettings, best_candidate, post_process, tune_detection
from evaluation.tasks.grounding import GroundingSettings, tune_grounding
from evaluation.tasks.records import class_positions, read_targets
from processing_chex.prompt_sets import anatomy_prompts, class_prompts
from processing_chex.report import REPORT_PRESETS
from processing_chex.vocabulary import ANATOMY_NAMES, REPORT_ANATOMY_INDICES


ROOT = Path(__file__).parents[1]

# -- catalogue --------------------------------------------------------------------------------------------------------


def test_nine_tasks_in_their_groups():
    assert (
        *("od_vindr", "od_nih8", "od_mscxr", "sg_mscxr", "rc_mscxr", "rc_cig", "re_mscxr", "re_cig", "rg_mimic"),
    ) == PAPER_TASKS
    assert GROUPS["all"] == PAPER_TASKS
    assert GROUPS["re"] == ("re_mscxr", "re_cig")
    assert [task.name for task in find_tasks(["sg", "od_vindr", "od"])] == [
        *("sg_mscxr", "od_vindr", "od_nih8", "od_mscxr"),
    ]
    for name in (*PAPER_TASKS, *FREE_TASKS):
        assert TASKS[name].headline in METRICS[TASKS[name].kind]
        assert TASKS[name].data is None or TASKS[name].data in DATA_SETS


def test_settings_are_those_of_the_official_configuration():
    vindr, nih, mscxr = (TASKS[name].detection for name in GROUPS["od"])
    assert vindr == DetectionSettings("product", 0.5, "nms", 0.25)
    assert (nih.score, nih.temperature, nih.merge) == ("prompts", 0.1, "envelope")
    assert mscxr == DetectionSettings("prompts", 0.1, "nms", 0.25)
    assert TASKS["sg_mscxr"].grounding == GroundingSettings(0.25, 1.0)
    assert [TASKS[name].negatives for name in GROUPS["rc"]] == ["pos_centroid", "neg"]
    assert PRESETS["paper"].max_length == 128
    report = REPORT_PRESETS[PRESETS["paper"].report]
    assert (report.select_findings, report.select_regions, report.max_sentences) == ("all", "positive", 10)


def test_prompts_are_those_of_the_paper():
    vindr = class_prompts("vindr15")
    assert [vindr.positive[name][0] for name in vindr.names] == [
        *("Aortic enlargement", "Atelectasis", "Cardiomegaly", "Calcification", "Consolidation"),
        *("Interstitial lung disease (ILD)", "Infiltration", "Lung opacity", "Mediastinal shift", "Mass or nodule"),
        *("Pulmonary fibrosis", "Pneumothorax", "Pleural thickening", "Pleural effusion", "Other lesion"),
    ]
    assert [vindr.box[name] for name in vindr.names] == [vindr.positive[name] for name in vindr.names]
    assert vindr.negative["ILD"] == ["No interstitial lung disease (ILD)"]
    nih = class_prompts("nih8")
    assert [nih.positive[name][0] for name in nih.names] == [
        *("Atelectasis", "Cardiomegaly", "Effusion (pleural or other)", "Infiltration"),
        *("Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    ]
    assert {name: nih.box[name][0] for name in nih.names if nih.box[name] != nih.positive[name]} == {
        "Cardiomegaly": "Cardiac silhouette",
        "Effusion": "Pleural effusion",
        "Nodule": "Lung nodule",
    }
    mscxr = class_prompts("mscxr")
    assert [mscxr.box[name][0] for name in mscxr.names] == [
        *("Atelectasis", "Cardiac silhouette", "Consolidation", "Edema", "Lung opacity"),
        *("Pleural effusion", "Pneumonia", "Pneumothorax"),
    ]
    chexpert = class_prompts("chexpert")
    assert [chexpert.positive[name][0] for name in chexpert.names] == [
        *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged cardiomediastinum", "Fracture"),
        *("Lung lesion", "Lung opacity", "Normal", "Pleural effusion", "Pleural pathology", "Pneumonia"),
        *("Pneumothorax", "Support devices"),
    ]
    assert chexpert.negative["No Finding"] == ["Abnormal"]
    cig = class_prompts("cig")
    assert len(cig.names) == 53
    assert cig.positive["pulmonary edema/hazy opacity"] == ["Pulmonary edema or hazy opacity"]
    assert cig.negative["mass/nodule (not otherwise specified)"] == ["No mass or nodule"]
    assert [cig.names[index] for index in (0, 42, 43, 52)] == [
        *("atelectasis", "clavicle fracture", "pneumonia", "interstitial lung disease"),
    ]
    assert [anatomy_prompts()[ANATOMY_NAMES[index]][0] for index in REPORT_ANATOMY_INDICES] == [
        *("Right upper lung zone", "Right mid lung zone", "Right lower lung zone", "Right hilar structures"),
        *("Right apical zone", "Left upper lung zone", "Left mid lung zone", "Left lower lung zone"),
        *("Left hilar structures", "Left apical zone", "Right clavicle", "Left clavicle", "Mediastinum"),
        *("Cardiac silhouette", "Abdomen"),
    ]
    # As said in the paper's protocol: every prompt of the nine tasks has exactly one text.
    for prompts in (vindr, nih, mscxr, chexpert, cig):
        kinds = (prompts.positive, prompts.negative, prompts.box)
        assert all(len(kind[name]) == 1 for kind in kinds for name in prompts.names)


def test_twins_keep_kind_and_settings():
    for name in PAPER_TASKS:
        twin = twin_of(TASKS[name])
        assert (twin.name, twin.kind, twin.detection) == (name, TASKS[name].kind, TASKS[name].detection)
        assert (twin.data, twin.class_set, twin.twin) == ("phantom", "phantom", True)
    assert twin_of(TASKS["rg_mimic"]).headline == "micro_f1"
    assert twin_of(TASKS["rg_mimic"]).labeler == "phantom"


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown task 'od_vindir'. Did you mean 'od_vindr'\?"):
        find_tasks(["od_vindir"])
    with pytest.raises(ValueError, match="Known tasks and groups: all, od, sg"):
        find_tasks(["qqq"])
    with pytest.raises(ValueError, match=r"Unknown metric 'map5'. Did you mean 'map50'\?"):
        check_metrics(["map5"], find_tasks(["od"]))
    with pytest.raises(ValueError, match="None of the chosen tasks has the metric 'bleu1'"):
        check_metrics(["bleu1"], find_tasks(["od"]))
    check_metrics(["bleu1", "map"], find_tasks(["all"]))


def test_classes_of_the_data_are_mapped_to_those_that_are_scored():
    positions = class_positions(["Mass", "Rib", "Nodule"], ["Nodule", "Mass"])
    assert positions.tolist() == [1, -1, 0]
    assert class_positions(["A", "B"], ["A", "B"]) is None
    with pytest.raises(ValueError, match="no class 'Edema'.*Mass, Rib"):
        class_positions(["Mass", "Rib"], ["Edema", "Mass"])
    record = dict.fromkeys(("anatomy_present", "anatomy_sentences", "sentences")) | {
        "sample_id": "a",
        "anatomy_boxes": None,
        "anatomy_labels": [[1, 2, 3]] * 29,
        "objects": [{"bbox": [0, 0, 8, 8], "category": label, "phrase": None} for label in (0, 1, 2)],
    }
    targets = read_targets(record, (0, 0, 16, 16), positions)
    assert targets.object_labels.tolist() == [1, -1, 0]
    assert targets.object_references()["labels"].tolist() == [1, 0]
    assert targets.anatomy_labels[0].tolist() == [3, 1]
    assert not targets.anatomy_present.any()
    assert targets.report == ""
    assert not targets.described_regions().any()


# -- stored predictions -----------------------------------------------------------------------------------------------


def some_predictions(first, count):
    rng = np.random.default_rng(first)
    counts = np.arange(first, first + count) % 3
    return Predictions(
        [f"image {index}" for index in range(first, first + count)],
        {"whole": rng.random((count, 2)).astype(np.float32), "parts": rng.random((counts.sum(), 4))},
        counts,
        {"texts": [f"Text ä {index}." for index in range(counts.sum())]},
        ("parts",),
    )


@pytest.fixture
def store(tmp_path):
    made = PredictionStore(tmp_path / "kind", {"model": "m", "settings": {"a": 1}}, chunk_size=4)
    made.open()
    for number, first in enumerate((0, 4, 8)):
        made.write_chunk(number, some_predictions(first, 4 if first < 8 else 2))
    return made


IDS = [f"image {index}" for index in range(10)]


def test_chunks_read_back_in_order(store):
    assert list(store.missing(IDS)) == []
    read = store.read(IDS, "task")
    whole = join([some_predictions(0, 4), some_predictions(4, 4), some_predictions(8, 2)])
    assert read.ids == IDS
    assert read.counts.tolist() == whole.counts.tolist()
    assert read.texts == whole.texts
    for name in ("whole", "parts"):
        np.testing.assert_array_equal(read.arrays[name], whole.arrays[name])
    assert read.owners.tolist() == np.repeat(np.arange(10), whole.counts).tolist()
    assert [path.name for path in sorted(store.folder.iterdir())] == [
        *(f"chunk-0000{number}.npz" for number in range(3)),
        "manifest.json",
    ]


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "text"])
def test_damaged_chunks_are_found(store, damage):
    path = store.chunk_path(1)
    content = bytearray(path.read_bytes())
    middle = content.index(some_predictions(4, 4).arrays["whole"].tobytes())
    if damage == "byte":
        content[middle] ^= 1
    path.write_bytes({"cut": content[:middle], "byte": content, "empty": b"", "text": b"not an archive"}[damage])
    with pytest.raises(DamagedChunk, match="chunk-00001.npz is damaged"):
        store.read_chunk(1)
    ((number, problem),) = store.missing(IDS)
    assert number == 1
    assert "damaged" in problem
    with pytest.raises(PredictionError, match="task: .*chunk-00001.npz is damaged"):
        store.read(IDS, "task")


def test_predictions_of_another_model_are_refused_and_never_mixed_in(store):
    other = PredictionStore(store.folder, {"model": "another", "settings": {"a": 1}}, chunk_size=4)
    with pytest.raises(StalePredictions, match="differ in: model.*--overwrite"):
        other.open()
    assert store.chunk_path(0).is_file()
    # Not even where the manifest is lost.
    (store.folder / "manifest.json").unlink()
    other.open()
    assert [number for number, _ in other.missing(IDS)] == [0, 1, 2]
    with pytest.raises(DamagedChunk, match="made by another model"):
        other.read_chunk(0)
    (store.folder / "manifest.json").unlink()
    store.open()
    other.open(overwrite=True)
    assert not store.chunk_path(0).exists()


def test_unknown_second_and_missing_images_are_errors_that_name_them(store):
    with pytest.raises(PredictionError, match=r"sg: .*chunk-00002.npz has a prediction for 'image 9', which is no"):
        store.read(IDS[:9], "sg")
    store.write_chunk(1, some_predictions(0, 4))
    with pytest.raises(PredictionError, match="sg: .*chunk-00001.npz has a second prediction for image 'image 0'"):
        store.read(IDS, "sg")
    store.chunk_path(1).unlink()
    with pytest.raises(PredictionError, match="chunk-00001.npz has not been made.*without --score-only"):
        store.read(IDS, "sg")


@pytest.mark.parametrize(("name", "row", "image"), [("whole", 2, "image 6"), ("parts", 1, "image 5")])
def test_predictions_that_are_not_numbers_name_task_and_image(store, name, row, image):
    bad = some_predictions(4, 4)
    bad.arrays[name][row, 1] = np.nan
    store.write_chunk(1, bad)
    with pytest.raises(PredictionError, match=f"od_vindr: the prediction for image {image} has a value in '{name}'"):
        store.read(IDS, "od_vindr")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(PredictionError, match="'whole' has 1 rows where 2 belong"):
        Predictions(["a", "b"], {"whole": np.zeros(1)}, np.zeros(2, int))
    with pytest.raises(PredictionError, match="2 texts 'texts' for 3 units"):
        Predictions(["a", "b"], {}, np.array([1, 2]), {"texts": ["x", "y"]})


# -- tuning -----------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_neutral_candidate_or_officially_to_the_last():
    assert best_candidate([0.1, 0.3, 0.3, 0.2], neutral=2, official=False) == 2
    assert best_candidate([0.1, 0.3, 0.3, 0.2], neutral=0, official=False) == 1
    assert best_candidate([0.1, 0.3, 0.3, 0.2], neutral=1, official=True) == 2


def tuning_example():
    """30 images, 3 classes, 2 boxes each: class 0 is half as large as it should be, class 2 never there."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0.1, 0.5, (30, 2))
    boxes = np.zeros((30, 3, 2, 4))
    boxes[..., :2] = corner[:, None, None]
    boxes[..., 2:] = corner[:, None, None] + 0.4
    boxes[:, :, 1] = [0.0, 0.0, 0.05, 0.05]
    boxes[:, 0, 0] += [0.1, 0.1, -0.1, -0.1]
    margins = np.stack([np.full((30, 3), 0.5), np.full((30, 3), -0.5)], axis=-1)
    # Region scores are noise: only margins tell which region is right.
    candidates = Candidates(boxes, rng.random((30, 3, 2)) * 1e-3, margins)
    references = [{"boxes": np.array([[*c, *(c + 0.4)]] * 2), "labels": np.array([0, 1])} for c in corner]
    return candidates, references


def test_tuning_finds_score_and_scale_and_leaves_hopeless_classes_alone():
    candidates, references = tuning_example()
    start = DetectionSettings(score="weights")
    settings, log = tune_detection(candidates, references, 3, start)
    assert settings.scales == (2.0, 1.0, 1.0)
    assert settings.score in ("prompts", "product")
    assert [stage["stage"] for stage in log] == ["scales", "score", "nms"]
    values = [max(value for value in stage["candidates"].values() if value is not None) for stage in log]
    assert values == sorted(values)
    assert settings.nms_threshold == 0.25  # all thresholds do as well, so nothing changes
    from evaluation.metrics.detection_map.detection_map import detection_map

    tuned, untuned = (
        detection_map(post_process(candidates, option), references, 3)["map"] for option in (settings, start)
    )
    assert tuned > untuned


def test_official_tuning_doubles_boxes_of_absent_classes():
    candidates, references = tuning_example()
    settings, _ = tune_detection(candidates, references, 3, DetectionSettings(), official=True)
    assert settings.scales[2] == 2.0
    assert settings.nms_threshold == 0.5


def test_grounding_really_varies_the_nms_threshold():
    # Two boxes on one target with IoU 0.6: the second is a false positive unless NMS drops it.
    rng = np.random.default_rng(1)
    corner = rng.uniform(0.1, 0.4, (20, 2))
    first = np.concatenate([corner, corner + 0.4], axis=1)
    second = first + [0.1, 0.0, 0.1, 0.0]
    boxes, scores = np.stack([first, second], axis=1), np.tile([0.9, 0.8], (20, 1))
    scores[::2] = scores[::2, ::-1] - 0.3
    references = [box[None] for box in first]
    start = GroundingSettings(nms_threshold=0.7)
    settings, log = tune_grounding(boxes, scores, references, start)
    assert len(set(log[1]["candidates"].values())) == 1  # 0.05 to 0.5 all drop it
    assert settings.nms_threshold == 0.05  # the first, as the start is not among them
    close = np.stack([first, first + [0.25, 0.0, 0.25, 0.0]], axis=1)  # IoU 0.23
    settings, log = tune_grounding(close, np.tile([0.9, 0.95], (20, 1)), references, GroundingSettings(0.25))
    assert len(set(log[1]["candidates"].values())) > 1
    official, log = tune_grounding(close, np.tile([0.9, 0.95], (20, 1)), references, GroundingSettings(), True)
    assert official.nms_threshold == 0.5
    assert len(set(log[1]["candidates"].values())) == 1


# -- the command line, on a tiny model and a few phantom images -------------------------------------------------------

TASKS_ON_BOXES = ["od_vindr", "od_nih8", "sg_mscxr", "rc_mscxr", "rc_cig"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Folders `model`, `stage1` (without a generator) and `phantom`: 10 test images make chunks of 4, 4 and 2."""
    from tests.evaluation_doubles import phantom_splits, small_image_processor, tiny_model

    folder = tmp_path_factory.mktemp("workspace")
    data = phantom_splits(train=20, validation=6, test=10)
    data.save_to_disk(folder / "phantom")
    for name, generator in (("model", True), ("stage1", False)):
        model, processor = tiny_model(data, small_image_processor(), generator)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def arguments_of(workspace, output, *more, model="model", tasks=TASKS_ON_BOXES):
    fixed = ["--model", str(workspace / model), "--output", str(output), "--twins", "--tasks", *tasks]
    fixed += ["--data", f"phantom={workspace / 'phantom'}", "--chunk-images", "4", "--bootstrap", "20"]
    return [*fixed, "--no-progress", *more]


def run_main(*arguments):
    from evaluation.run import main

    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(workspace):
    """A run from beginning to end, with tuning."""
    output = workspace / "finished"
    assert run_main(*arguments_of(workspace, output, "--optimize-inference")) == 0
    return output


def read_results(output):
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def without_times(results):
    """What must be the same in every run."""
    return {
        name: {key: value for key, value in task.items() if key != "seconds"}
        for name, task in results["tasks"].items()
    }


def test_results_are_complete_and_agree_in_all_files(finished, workspace):
    results = read_results(finished)
    assert results["schema"] == 1
    assert set(results["tasks"]) == set(TASKS_ON_BOXES)
    assert results["data"]["phantom"]["images"] == 10
    assert len(results["model"]["sha256"]) == 64
    from modeling_chex import ChexModel

    model = ChexModel.from_pretrained(workspace / "model")
    assert results["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name, task in results["tasks"].items():
        assert task["headline"] in task["metrics"]
        assert len(task["examples"]) == 6
        for example in task["examples"]:
            assert (finished / example["image"]).is_file()
            assert example["boxes"]
        raw = (finished / "bootstrap" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        assert raw[0].split(",") == ["resample", *task["metrics"]]
        assert len(raw) == 21
    table = (finished / "results.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 1 + sum(len(task["metrics"]) for task in results["tasks"].values())
    metric = results["tasks"]["od_vindr"]["metrics"]["map"]
    assert next(line for line in table if line.startswith("od_vindr,map,")).split(",")[2] == str(metric["value"])
    assert (finished / "index.html").is_file()
    assert (finished / "results.md").is_file()
    assert not list(finished.rglob("*.partial"))
    # Bootstrap values say what the summary says.
    rows = [line.split(",") for line in (finished / "bootstrap" / "rc_cig.csv").read_text().splitlines()]
    column = [float(row[1]) for row in rows[1:]]
    summary = results["tasks"]["rc_cig"]["metrics"]["wauroc"]
    assert summary["mean"] == pytest.approx(np.mean(column))
    assert summary["std"] == pytest.approx(np.std(column))


def test_tuning_is_stored_used_again_and_refused_for_another_model(finished, workspace, capsys, caplog, tmp_path):
    stored = json.loads((finished / "tuning" / "od_vindr.json").read_text(encoding="utf-8"))
    task = read_results(finished)["tasks"]["od_vindr"]
    assert task["settings"]["post_processing"] == stored["settings"]
    assert task["tuning"] == stored
    output = tmp_path / "copy"
    shutil.copytree(finished / "tuning", output / "tuning")
    stored["settings"]["nms_threshold"] = 0.4  # as no grid has it: only reading it can give it
    (output / "tuning" / "od_vindr.json").write_text(json.dumps(stored), encoding="utf-8")
    arguments = arguments_of(workspace, output, "--optimize-inference", tasks=["od_vindr"])
    assert run_main(*arguments) == 0
    assert read_results(output)["tasks"]["od_vindr"]["settings"]["post_processing"]["nms_threshold"] == 0.4
    assert not list((output / "predictions").glob("phantom-validation"))
    capsys.readouterr()
    other = arguments_of(workspace, output, "--optimize-inference", model="stage1", tasks=["od_vindr"])
    assert run_main(*other) == 2
    assert "od_vindr.json was tuned with another model" in capsys.readouterr().err
    assert run_main(*arguments, "--official") == 2
    assert "the other rule for ties" in capsys.readouterr().err
    stored["settings"]["score"] = "weight"
    for content, problem in (('{"format": 1, "task', "JSONDecodeError"), (json.dumps(stored), "score must be one of")):
        (output / "tuning" / "od_vindr.json").write_text(content, encoding="utf-8")
        caplog.clear()
        assert run_main(*arguments) == 0
        assert "od_vindr.json is damaged" in caplog.text and problem in caplog.text
    again = read_results(output)["tasks"]["od_vindr"]
    assert again["settings"]["post_processing"]["nms_threshold"] != 0.4


def test_a_second_run_predicts_and_scores_nothing(finished, workspace, monkeypatch, capsys):
    from evaluation import engine
    from evaluation.inference import ModelSource

    def fail(*arguments, **options):
        raise AssertionError("it was done before")

    monkeypatch.setattr(ModelSource, "load", fail)
    monkeypatch.setattr(engine, "score_task", fail)
    before = without_times(read_results(finished))
    assert run_main(*arguments_of(workspace, finished, "--optimize-inference")) == 0
    assert without_times(read_results(finished)) == before
    assert "od_vindr: as scored before" in capsys.readouterr().out
    # Another bootstrap is scored again, from the same predictions.
    with pytest.raises(AssertionError, match="done before"):
        run_main(*arguments_of(workspace, finished, "--optimize-inference", "--seed", "1"))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_results_of_a_task_are_scored_again(finished, workspace, tmp_path, damage, caplog):
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    path = output / "tasks" / "rc_cig.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2] if damage == "cut" else text.replace('"units": 10', '"units": 99'))
    (output / "results.json").write_text('{"schema": 1, "tas', encoding="utf-8")
    assert run_main(*arguments_of(workspace, output, "--optimize-inference")) == 0
    assert "rc_cig.json is damaged" in caplog.text
    assert without_times(read_results(output)) == without_times(read_results(finished))


def test_a_killed_run_goes_on_and_gives_the_same(finished, workspace, tmp_path, monkeypatch):
    from evaluation.predictions import PredictionStore
    from evaluation.tasks.procedures import Detector

    output, write, predict = tmp_path / "killed", PredictionStore.write_chunk, Detector.predict
    written, predicted = [], []

    def dies(self, number, predictions):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append((self.folder.name, number))
        write(self, number, predictions)

    def counts(self, batch):
        predicted.append(len(batch.targets))
        return predict(self, batch)

    monkeypatch.setattr(PredictionStore, "write_chunk", dies)
    monkeypatch.setattr(Detector, "predict", counts)
    with pytest.raises(KeyboardInterrupt):
        run_main(*arguments_of(workspace, output, "--optimize-inference"))
    assert not (output / "results.json").exists()
    monkeypatch.setattr(PredictionStore, "write_chunk", write)
    detection = next((output / "predictions" / "phantom-test").glob("detection-*"))
    chunk = detection / "chunk-00000.npz"
    chunk.write_bytes(chunk.read_bytes()[:-100])  # and one that was only half on the disk
    predicted.clear()
    # Another batch size, as after running out of memory, goes on with the same chunks.
    assert run_main(*arguments_of(workspace, output, "--optimize-inference", "--batch-size", "3")) == 0
    chunks_of_detection = sum(name == detection.name for name, _ in written)
    assert sum(predicted) == 16 - 4 * chunks_of_detection + 4  # 10 test and 6 validation images
    expected, found = read_results(finished)["tasks"], read_results(output)["tasks"]
    for name, task in expected.items():
        for metric, entry in task["metrics"].items():
            assert found[name]["metrics"][metric]["value"] == pytest.approx(entry["value"], abs=1e-6), (name, metric)


def test_predictions_only_then_score_only(workspace, tmp_path, monkeypatch, capsys):
    from evaluation.inference import ModelSource

    arguments = arguments_of(workspace, tmp_path / "parts", tasks=["rc_cig"])
    assert run_main(*arguments, "--score-only") == 2
    assert "rc_cig: " in (error := capsys.readouterr().err)
    assert "has not been made. Run the evaluation without --score-only" in error
    assert run_main(*arguments, "--predictions-only") == 0
    assert not (tmp_path / "parts" / "results.json").exists()
    monkeypatch.setattr(ModelSource, "load", lambda self: pytest.fail("no model is needed"))
    assert run_main(*arguments, "--score-only") == 0
    assert set(read_results(tmp_path / "parts")["tasks"]) == {"rc_cig"}
    assert run_main(*arguments, "--predictions-only", "--score-only") == 2


def test_another_model_never_meets_old_predictions(finished, workspace, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(finished / "predictions", output / "predictions")
    arguments = arguments_of(workspace, output, model="stage1", tasks=["rc_cig"])
    assert run_main(*arguments) == 2
    assert "differ in: model" in capsys.readouterr().err
    assert run_main(*arguments, "--overwrite") == 0
    first, second = (read_results(folder)["model"]["sha256"] for folder in (finished, output))
    assert first != second


def test_predictions_for_unknown_images_name_image_and_task(finished, workspace, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(finished / "predictions", output / "predictions")
    folder = next((output / "predictions" / "phantom-test").glob("region_classification-*"))
    store = PredictionStore(folder, {}, 4)
    key = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["key"]
    type(store).key, saved = key, type(store).key
    try:
        chunk = store.read_chunk(1)
        chunk.ids[2] = "somebody-else"
        store.write_chunk(1, chunk)
    finally:
        type(store).key = saved
    arguments = arguments_of(workspace, output, "--score-only", tasks=["rc_cig"])
    assert run_main(*arguments) == 2
    assert re.search(r"rc_cig: .*has a prediction for 'somebody-else', which is no image", capsys.readouterr().err)


def test_model_that_predicts_nan_is_named_with_the_image(workspace, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(workspace / "model", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "visual_projection" in name)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = arguments_of(workspace, tmp_path / "out", tasks=["od_vindr"])
    assert run_main(*arguments, "--model", folder) == 2
    error = capsys.readouterr().err
    assert re.search(r"od_vindr: the prediction for image phantom-3-00002000 has a value in '\w+' that is not", error)


def test_what_cannot_be_run_is_said(workspace, tmp_path, capsys):
    arguments = arguments_of(workspace, tmp_path / "out", model="stage1", tasks=["all"])
    assert run_main(*arguments) == 0
    results = read_results(tmp_path / "out")
    assert set(results["skipped"]) == {"re_mscxr", "re_cig", "rg_mimic"}
    assert "rg_mimic: not run: the model has no sentence generator" in capsys.readouterr().out
    assert run_main(*arguments_of(workspace, tmp_path / "none", model="stage1", tasks=["rg"])) == 2
    assert "None of the tasks can be run: rg_mimic: the model has no" in capsys.readouterr().err


def test_tasks_without_their_data_are_left_out_with_what_they_need(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--model", workspace / "model", "--output", tmp_path / "out", "--no-progress"]
    assert run_main(*base, "--tasks", "sg", "od_vindr") == 2
    text = capsys.readouterr()
    assert "None of the tasks can be run" in text.err
    assert "sg_mscxr: needs prepared/ms-cxr: chex data prepare ms-cxr --raw DIR" in text.err
    assert "od_vindr: needs prepared/vindr-cxr: chex data prepare vindr-cxr --raw DIR" in text.err
    assert (text.out + text.err).count("needs prepared/ms-cxr") == 1  # said once


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "od_vindir"], r"Unknown task 'od_vindir'. Did you mean 'od_vindr'\?"),
        (["--metrics", "wauroc1"], r"Unknown metric 'wauroc1'. Did you mean 'wauroc'\?"),
        (["--split", "holdout"], "The split 'holdout' of phantom is not there; it has the splits: train"),
        (["--limit", "0"], "`limit` is 0"),
        (["--seed", "-3"], "The seed is -3, but must not be negative"),
        (["--bootstrap", "-1"], "The number of resamples is -1, but must not be negative"),
        (["--examples", "-1"], "The number of examples is -1, but must not be negative"),
        (["--device", "gpu"], "There is no device 'gpu' here, such as cpu, cuda or cuda:1: "),
        (["--device", "cuda:99"], "There is no device 'cuda:99' here"),
        (["--batch-size", "0"], "`batch_size` is 0"),
        (["--data", "phantm=."], r"unknown data set 'phantm'. Did you mean 'phantom'\?"),
        (["--data", "ms-cxr=nowhere"], "nowhere is not a folder. 'chex data prepare ms-cxr' makes one"),
        (["--data", "ms-cxr"], "write NAME=DIR"),
        (["--model", "nowhere"], "nowhere is not a folder: give the folder of a saved ChEX model"),
        (["--model", "."], "has no config.json: give the folder"),
    ],
)
def test_bad_input_ends_with_code_2(workspace, tmp_path, capsys, more, message):
    assert run_main(*arguments_of(workspace, tmp_path / "out"), *more) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--labeler", "phantm"], "--labeler phantm: There is no labeller 'phantm'; known are"),
        (["--labeler", "chexbert:nowhere"], "--labeler chexbert:nowhere: the folder nowhere does not exist"),
        (["--labeler", "no_such_module:Mine"], "there is no module 'no_such_module'"),
        (["--labeler", "json:Mine"], "--labeler json:Mine: .* json has no attribute 'Mine'"),
        (["--radgraph", "radgraf"], "--radgraph radgraf: There is no annotator 'radgraf'; known are"),
        (
            ["--radgraph", "radgraph:nowhere"],
            "--radgraph radgraph:nowhere: needs the (weights of RadGraph in|package)",
        ),
        (["--radgraph", "json:Mine"], "--radgraph json:Mine: .* json has no attribute 'Mine'"),
    ],
)
def test_what_reads_texts_is_checked_before_any_prediction(workspace, tmp_path, capsys, monkeypatch, more, message):
    from evaluation.inference import ModelSource

    def fail(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ModelSource, "load", fail)
    assert run_main(*arguments_of(workspace, tmp_path / "out", *more, tasks=["sg_mscxr", "rg_mimic"])) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_classes_of_other_data_are_noticed_before_any_prediction(workspace, tmp_path, capsys):
    arguments = ["--model", workspace / "model", "--output", tmp_path / "out", "--tasks", "od_mscxr", "--no-progress"]
    assert run_main(*arguments, "--data", f"ms-cxr={workspace / 'phantom'}") == 2
    assert "od_mscxr on ms-cxr: The data have no class 'Lung Opacity', " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_computed_is_said_with_its_reason(workspace, tmp_path, capsys):
    arguments = arguments_of(workspace, tmp_path, "--metrics", "micro_f1_14", "bleu1", tasks=["re_mscxr"])
    assert run_main(*arguments, "--limit", "2") == 0
    text = capsys.readouterr().out
    assert re.search(r"re_mscxr \(twin\) +bleu1 +0\.\d+ ", text)  # not the headline, which was not asked for
    assert run_main(*arguments, "--limit", "2", "--metrics", "micro_f1_14") == 0
    assert "re_mscxr: micro_f1_14 not computed: the labeller phantom has other classes" in capsys.readouterr().out


def test_other_splits_are_not_mixed_in(workspace, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    arguments = arguments_of(workspace, tmp_path / "out", "--split", "validation", tasks=["rc_mscxr"])
    assert run_main(*arguments) == 0
    assert list(read_results(tmp_path / "out")["tasks"]) == ["rc_mscxr"]


def test_folders_of_other_models_are_none(workspace, tmp_path, capsys):
    for content, message in (
        ('{"model_type": "bert"}', "holds a model of the type 'bert', not a ChEX model"),
        ('{"model_type": ', "config.json is damaged"),
    ):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        assert run_main(*arguments_of(workspace, tmp_path / "out"), "--model", tmp_path) == 2
        assert message in capsys.readouterr().err


def test_class_without_positives_is_undefined_and_named(workspace, tmp_path):
    arguments = arguments_of(workspace, tmp_path / "out", "--limit", "3", tasks=["od_vindr", "rc_cig"])
    assert run_main(*arguments) == 0
    for name, metric in (("od_vindr", "map"), ("rc_cig", "wauroc")):
        task = read_results(tmp_path / "out")["tasks"][name]
        absent = [row for row in task["per_class"] if row["positives"] == 0]
        assert absent
        assert all(row[metric] is None for row in absent)
        (note,) = (note for note in task["notes"] if "Without positives" in note)
        assert all(row["name"] in note for row in absent)
    defined = [
        row["map"] for row in read_results(tmp_path / "out")["tasks"]["od_vindr"]["per_class"] if row["positives"]
    ]
    assert read_results(tmp_path / "out")["tasks"]["od_vindr"]["metrics"]["map"]["value"] == pytest.approx(
        np.mean(defined)
    )
    # More images go on with what is there.
    assert run_main(*arguments_of(workspace, tmp_path / "out", tasks=["od_vindr"])) == 0
    assert read_results(tmp_path / "out")["tasks"]["od_vindr"]["images"] == 10


def test_two_processes_give_what_one_gives(workspace, finished, tmp_path):
    """10 images in chunks of 4, 4 and 2, for two processes."""
    output = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "evaluation" / "run.py", *arguments_of(workspace, output, "--optimize-inference")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    expected, found = read_results(finished)["tasks"], read_results(output)["tasks"]
    assert list(found) == list(expected)
    for name, task in expected.items():
        assert (found[name]["images"], found[name]["units"]) == (task["images"], task["units"])
        for metric, entry in task["metrics"].items():
            # Up to rounding: a process that the launcher starts may add in another order.
            own = found[name]["metrics"][metric]
            for part, other in ((entry, own), (entry.get("official", {}), own.get("official", {}))):
                numbers = {key: value for key, value in part.items() if key != "official"}
                assert {key: other[key] for key in numbers} == pytest.approx(numbers, abs=1e-5), (name, metric)
    assert done.stdout.count("od_vindr: map") == 1
    chunks = sorted(path.name for path in (output / "predictions" / "phantom-test").glob("detection-*/chunk-*"))
    assert chunks == [f"chunk-0000{number}.npz" for number in range(3)]
    # A mistake ends both with one message.
    broken = [*command[:-1], "--no-progress", "--split", "holdout"]
    done = subprocess.run(broken, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode != 0
    assert "The split 'holdout' of phantom is not there" in done.stderr


# -- the nine tasks on their own data, in the exact formats -----------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """`prepared/NAME` for the five data sets, each made from a small raw tree."""
    from tests.raw_trees.mimic import write_all
    from tests.raw_trees.nih import write_nih
    from tests.raw_trees.vindr import write_vindr
    from training.data.preparation import prepare

    folder = tmp_path_factory.mktemp("own")
    writers = {"vindr-cxr": write_vindr, "nih-cxr14": write_nih}
    for name in ("vindr-cxr", "nih-cxr14", "ms-cxr", "chest-imagenome", "mimic-cxr"):
        raw = folder / "raw" / name
        writers.get(name, write_all)(raw)
        options = {"reports": False} if name == "chest-imagenome" else {}
        prepare(
            name, folder / "prepared" / name, data_dir=raw, num_proc=1, size=64, options={"missing": "skip"} | options
        )
    return folder


def test_nine_tasks_on_small_trees_of_the_real_formats(workspace, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    output = tmp_path / "nine"
    arguments = ["--model", workspace / "model", "--output", output, "--bootstrap", "5", "--no-progress"]
    metrics = ["map", "map50", "miou", "auroc", "wauroc", "micro_f1_14", "bleu1", "rouge_l"]
    run = [*arguments, "--optimize-inference", "--metrics", *metrics]
    # The smallest 128 tokens, for two sentences of a random model, would take most of the time.
    assert run_main(*run, "--preset", "phantom") == 0
    results = read_results(output)
    assert set(results["tasks"]) == set(PAPER_TASKS)
    assert results["skipped"] == {}
    assert set(results["data"]) == {"vindr-cxr", "nih-cxr14", "ms-cxr", "chest-imagenome", "mimic-cxr"}
    names = {name: [row["name"] for row in task["per_class"]] for name, task in results["tasks"].items()}
    for name, class_set in (("od_vindr", "vindr15"), ("od_nih8", "nih8"), ("od_mscxr", "mscxr"), ("rc_cig", "cig")):
        assert names[name] == list(class_prompts(class_set).names)
    # Two MS-CXR test images: d and e of MIMIC's validation split have boxes (d one valid), f of its test split two.
    assert results["tasks"]["sg_mscxr"]["images"] == 2
    assert results["tasks"]["sg_mscxr"]["phrases"] == 3
    assert results["tasks"]["re_mscxr"]["texts"] == 3
    assert results["tasks"]["re_cig"]["texts"] == 1  # the only valid region of f with a phrase
    assert results["tasks"]["rg_mimic"]["texts"] == 1  # g has no report, so it is not among the data
    for name in ("re_mscxr", "re_cig", "rg_mimic"):
        task = results["tasks"][name]
        assert "chexbert" in task["not_computed"]["micro_f1_14"].lower()
        assert "micro_f1_14" not in task["metrics"]
        assert task["metrics"]["bleu1"]["value"] is not None
    assert "micro_f1_14 not computed" in capsys.readouterr().out
    tuned = results["tasks"]["od_nih8"]["tuning"]
    assert tuned["settings"]["merge"] == "envelope"
    assert [stage["stage"] for stage in tuned["stages"]] == ["scales", "score"]


def test_own_data_with_classes_of_its_own(workspace, tmp_path):
    import datasets

    from tests.evaluation_doubles import SIZE
    from training.data.phantom import phantom_record
    from training.data.record import record_features

    rows = [phantom_record(5, index, SIZE) for index in range(3)]
    for row in rows:
        row |= {"sentences": None, "anatomy_boxes": None, "anatomy_present": None}
        row |= {"anatomy_labels": None, "anatomy_sentences": None, "class_labels": None}
        row["objects"] = [{"bbox": [4, 4, 30, 30], "category": "Heart valve", "phrase": "Heart valve in place."}]
    features = record_features(["Heart valve", "Port"])
    own = datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features=features))
    own.save_to_disk(tmp_path / "own")
    tasks = ["finding_detection", "sentence_grounding", "region_classification", "anatomy_localization"]
    output = tmp_path / "out"
    arguments = ["--model", workspace / "model", "--output", output, "--data", f"own={tmp_path / 'own'}"]
    assert run_main(*arguments, "--tasks", *tasks, "--bootstrap", "5", "--no-progress") == 0
    results = read_results(output)["tasks"]
    assert [row["positives"] for row in results["finding_detection"]["per_class"]] == [3, 0]
    assert results["sentence_grounding"]["phrases"] == 3
    for name, metric in (("region_classification", "wauroc"), ("anatomy_localization", "miou")):
        assert results[name]["metrics"][metric]["value"] is None
        assert any("No region" in note for note in results[name]["notes"])


def test_chex_evaluate_is_the_same_program(workspace, tmp_path):
    from typer.testing import CliRunner

    from space_app.cli import app

    shown = CliRunner().invoke(app, ["evaluate", "--help"])
    assert shown.exit_code == 0
    assert "--optimize-inference" in shown.output
    assert "od_vindr" in shown.output
    wrong = CliRunner().invoke(app, ["evaluate", *arguments_of(workspace, tmp_path, "--tasks", "sgg")])
    assert wrong.exit_code == 2
    assert CliRunner().invoke(app, ["evaluate", "--model", "x"]).exit_code == 2
