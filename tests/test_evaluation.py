"""Targets, post-processing, baselines, and whole evaluations in memory with an oracle and with a tiny random model."""

import json
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from evaluation.baselines import (
    constant_auroc,
    fit_prior_boxes,
    linear_probe_auroc,
    score_baselines,
    score_constant_texts,
    score_prior_boxes,
)
from evaluation.demo import HEADLINES, format_table, headline_metrics
from evaluation.engine import NothingToRun, Options, evaluate_model
from evaluation.files import write_text
from evaluation.inference import open_data
from evaluation.tasks.base import Batch
from evaluation.tasks.catalog import METRICS, PAPER_TASKS
from evaluation.tasks.detection import Candidates, DetectionSettings, keep_after_nms, post_process, scale_boxes
from evaluation.tasks.examples import choose_examples, explain_examples
from evaluation.tasks.grounding import GroundingSettings
from evaluation.tasks.records import frame_boxes, iterate_targets, read_targets
from processing_chex import ChexImageProcessor
from processing_chex.prompt_sets import find_class_set
from processing_chex.report import deduplicate
from processing_chex.vocabulary import CHEXPERT_CLASSES, PHANTOM_CLASSES
from tests.evaluation_doubles import SIZE, Oracle, OracleProcessor, phantom_splits, small_image_processor, tiny_model
from training.data.phantom import phantom_features, phantom_record
from training.data.phantom_text import label_text


ALL = ("anatomy_localization", *PAPER_TASKS)
# METEOR starts a program, and has its own tests.
QUIET = {
    "progress": False,
    "examples": 0,
    "metrics": tuple({name for names in METRICS.values() for name in names if not name.startswith("meteor")}),
}


@pytest.fixture(scope="module")
def data():
    return phantom_splits()


@pytest.fixture(scope="module")
def image_processor():
    return small_image_processor()


def value(results, task, metric):
    return results["tasks"][task]["metrics"][metric]["value"]


# -- the oracle -------------------------------------------------------------------------------------------------------


def oracle_results(data, image_processor, tasks=ALL, **options):
    processor = OracleProcessor(image_processor)
    records = [record for split in ("validation", "test") for record in data[split]]
    settings = Options(resamples=0, optimize=True, batch_size=5, **QUIET)
    return evaluate_model(Oracle(processor, records, **options), processor, data, tasks, options=settings)


@pytest.fixture(scope="module")
def perfect(data, image_processor):
    return oracle_results(data, image_processor)


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("anatomy_localization", ["miou"]),
        ("od_vindr", ["map", "map10", "map30", "map50"]),
        ("od_mscxr", ["map"]),
        ("sg_mscxr", ["miou", "best_iou", "iou_at_30", "macro_iou", "map"]),
        ("rc_mscxr", ["auroc", "accuracy", "mcc"]),
        ("rc_cig", ["wauroc", "macro_auroc"]),
        ("re_mscxr", ["micro_f1"]),
        ("re_cig", ["micro_f1", "macro_f1"]),
        ("rg_mimic", ["micro_f1", "macro_f1"]),
    ],
)
def test_oracle_is_perfect_on_every_task(perfect, task, metrics):
    for metric in metrics:
        assert value(perfect, task, metric) == pytest.approx(1.0, abs=1e-5), metric
    assert perfect["tasks"][task]["twin"]
    assert perfect["tasks"][task]["images"] == 24


def test_perfect_boxes_are_tuned_to_stay_as_they_are(perfect):
    tuning = perfect["tasks"]["od_vindr"]["tuning"]
    assert tuning["settings"]["scales"] == [1.0] * 8
    assert tuning["origin"]["images"] == 8
    assert [stage["stage"] for stage in tuning["stages"]] == ["scales", "score", "nms"]
    assert perfect["tasks"]["rc_cig"]["tuning"] is None


def test_official_fusion_for_nih_takes_all_boxes_whatever_their_score(perfect, data):
    """So it spoils an edema, which has a box on each side, and also one box beside boxes that score nothing."""
    rows = {row["name"]: row for row in perfect["tasks"]["od_nih8"]["per_class"]}
    edemas = [row for row in data["test"] if row["class_labels"][PHANTOM_CLASSES.index("Edema")]]
    assert rows["Edema"]["positives"] == 2 * len(edemas)
    assert rows["Edema"]["map"] < 0.9
    assert rows["Cardiomegaly"]["map"] < 0.9


def test_shifted_boxes_lose_the_localisation_tasks_only(data, image_processor):
    tasks = ["anatomy_localization", "od_vindr", "sg_mscxr", "rc_cig", "re_cig"]
    results = oracle_results(data, image_processor, tasks, shift=0.06)
    assert 0.2 < value(results, "anatomy_localization", "miou") < 0.8
    assert value(results, "od_vindr", "map50") < 0.9
    assert value(results, "sg_mscxr", "miou") < 0.9
    assert value(results, "rc_cig", "wauroc") == pytest.approx(1.0)
    assert value(results, "re_cig", "micro_f1") == pytest.approx(1.0)


def test_low_scores_ground_nothing_but_still_localise(data, image_processor):
    results = oracle_results(data, image_processor, ["anatomy_localization", "sg_mscxr"], blind=True)
    assert value(results, "sg_mscxr", "miou") == 0.0
    assert value(results, "anatomy_localization", "miou") == pytest.approx(1.0, abs=1e-5)
    assert results["tasks"]["anatomy_localization"]["miou_if_reported"] == 0.0


# -- frames and targets -----------------------------------------------------------------------------------------------


def test_frame_boxes_crop_scale_and_drop():
    # An image of 200 x 100 pixels seen through the centre crop x 50 to 150.
    boxes = [[60, 10, 100, 60], [0, 0, 70, 100], [0, 0, 54, 100], [0, 0, 40, 40]]
    scaled, visible = frame_boxes(boxes, (50, 0, 150, 100))
    assert scaled[0] == pytest.approx([0.1, 0.1, 0.5, 0.6])
    assert scaled[1] == pytest.approx([0.0, 0.0, 0.2, 1.0])
    assert visible.tolist() == [True, True, False, False]


def test_targets_follow_the_geometry():
    (record,) = datasets.Dataset.from_list([phantom_record(3, 1, (96, 128))], features=phantom_features())
    record["objects"] = [
        {"bbox": [20.0, 10.0, 40.0, 30.0], "category": 4, "phrase": "One."},
        {"bbox": [0.0, 10.0, 12.0, 30.0], "category": 5, "phrase": "Cut off."},
        {"bbox": [60.0, 50.0, 64.0, 58.0], "category": 4, "phrase": "One."},
    ]
    sizes = {"height": SIZE, "width": SIZE}
    crop = ChexImageProcessor(size=sizes, geometry="center_crop").frame(96, 128)
    cropped = read_targets(record, crop)
    assert cropped.object_labels.tolist() == [4, 4]
    assert cropped.object_phrases == ["One.", "One."]
    assert cropped.object_boxes[0] == pytest.approx(np.array([4, 10, 24, 30]) / 96)
    assert list(cropped.grounded_phrases()) == ["One."]
    assert len(cropped.grounded_phrases()["One."]) == 2
    boxed = read_targets(record, ChexImageProcessor(size=sizes, geometry="letterbox").frame(96, 128))
    assert boxed.object_labels.tolist() == [4, 5, 4]
    assert boxed.object_boxes[0] == pytest.approx(np.array([20, 26, 40, 46]) / 128)


def test_class_set_is_found_by_its_names():
    assert find_class_set(PHANTOM_CLASSES) == "phantom"
    assert find_class_set(CHEXPERT_CLASSES) == "chexpert"
    with pytest.raises(ValueError, match="No prompt set has the finding classes"):
        find_class_set(["Flat feet"])


# -- post-processing --------------------------------------------------------------------------------------------------


def test_scaling_keeps_the_centre_and_clips():
    boxes = np.array([[0.2, 0.2, 0.4, 0.6], [0.0, 0.0, 0.4, 0.4]])
    scaled = scale_boxes(boxes, np.array([[2.0], [1.5]]))
    assert scaled[0] == pytest.approx([0.1, 0.0, 0.5, 0.8])
    assert scaled[1] == pytest.approx([0.0, 0.0, 0.5, 0.5])


def test_nms_keeps_the_best_of_each_cluster():
    # Box 1 overlaps 0 (IoU 0.6) and falls; box 2 only overlaps the fallen box, so it stays.
    boxes = np.array([[[0, 0, 8, 1], [2, 0, 10, 1], [7.5, 0, 15.5, 1]]]) / 16
    assert keep_after_nms(boxes, np.array([[0.9, 0.8, 0.7]]), 0.15).tolist() == [[True, False, True]]
    assert keep_after_nms(boxes, np.array([[0.1, 0.8, 0.7]]), 0.15).tolist() == [[False, True, False]]
    assert keep_after_nms(boxes, np.array([[0.9, 0.8, 0.7]]), 0.7).all()


def one_candidate_set(margins=((1.0, -1.0),)):
    boxes = np.array([[[[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.7, 0.9]]]])
    return Candidates(boxes=boxes, weights=np.array([[[0.4, 0.8]]]), margins=np.array([margins]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "weight"}, "score must be one of weights, prompts, product, not 'weight'"),
        ({"merge": "all"}, "merge must be one of nms"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"nms_threshold": float("nan")}, "from 0 to 1, not nan"),
        ({"scales": (1.0, -1.0)}, "scales must be positive"),
        ({"scales": (1.0, 2.0)}, "2 scales, but the detections are of 1 classes"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        post_process(one_candidate_set(), DetectionSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"nms_threshold": 1.5}, "from 0 to 1, not 1.5"), ({"scale": float("nan")}, "scale must be positive, not nan")],
)
def test_settings_of_grounding_that_are_none(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GroundingSettings(**settings)


def test_envelope_and_top1():
    (fused,) = post_process(one_candidate_set(), DetectionSettings(score="weights", merge="envelope"))
    assert fused["boxes"].tolist() == [[0.1, 0.1, 0.7, 0.9]]
    assert fused["scores"].tolist() == [0.8]
    (best,) = post_process(one_candidate_set(), DetectionSettings(score="prompts", temperature=1.0, merge="top1"))
    assert best["boxes"].tolist() == [[0.1, 0.1, 0.3, 0.3]]
    assert best["scores"] == pytest.approx([1 / (1 + np.exp(-1))])
    (both,) = post_process(one_candidate_set(), DetectionSettings(score="product", temperature=0.5))
    assert sorted(both["scores"]) == pytest.approx(sorted([0.4 / (1 + np.exp(-2)), 0.8 / (1 + np.exp(2))]))


def test_deduplication_rules():
    def similar(size, pairs):
        matrix = np.full((size, size), 0.5)
        for (i, j), value in pairs.items():
            matrix[i, j] = matrix[j, i] = value
        return matrix

    # From 0.95 on the less preferred of a pair goes, whatever the length; on a tie the later one.
    assert deduplicate(similar(3, {(0, 2): 0.95}), [0.1, 0.5, 0.9]) == [1, 2]
    assert deduplicate(similar(3, {(0, 2): 0.95}), [0.5, 0.5, 0.5]) == [0, 1]
    assert deduplicate(similar(3, {(0, 2): 0.94}), [0.1, 0.5, 0.9]) == [0, 1, 2]
    # From 0.90 on only while there are more than 10 sentences.
    pairs = {(0, 1): 0.92, (2, 3): 0.91, (4, 5): 0.89}
    assert deduplicate(similar(12, pairs), list(range(12))) == [1, *range(3, 12)]
    assert deduplicate(similar(11, pairs), list(range(11))) == list(range(1, 11))
    # Unlike sentences stay, however many.
    assert len(deduplicate(similar(14, {}), [0.0] * 14)) == 14
    assert deduplicate(np.zeros((0, 0)), []) == []


# -- baselines --------------------------------------------------------------------------------------------------------


def test_prior_boxes_of_the_same_split(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    prior = fit_prior_boxes(train, 8)
    assert prior.anatomy.shape == (29, 4)
    scores = score_prior_boxes(prior, train, test)
    assert 0.4 < scores["anatomy_miou"] < 0.9
    assert 0.0 <= scores["detection_map50"] < 0.5
    assert 0.1 < scores["grounding_miou"] < 0.9
    # A set of identical images is described perfectly by its own average.
    twins = [test[0]] * 6
    own = score_prior_boxes(fit_prior_boxes(twins, 8), twins, twins)
    assert own["anatomy_miou"] == pytest.approx(1.0)
    assert own["grounding_miou"] == pytest.approx(1.0)


def test_constant_scores_have_auroc_one_half(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    assert constant_auroc(train, test) == pytest.approx(0.5)


def test_constant_texts(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    scores = score_constant_texts(train, test, label_text, PHANTOM_CLASSES)
    options = scores["details"]["report"]["all"]
    assert scores["report_f1"] == options[scores["details"]["report"]["kind"]]
    assert options["most frequent report"] < scores["report_f1"] == max(options.values())
    assert 0.1 < scores["report_f1"] < 0.7
    assert 0.0 < scores["description_f1"] < 0.6


def test_linear_probe_finds_what_is_linear_and_nothing_else(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    rng = np.random.default_rng(0)

    def flat(targets):
        return np.stack([(t.anatomy_labels > 0).reshape(-1) for t in targets]).astype(np.float32)

    informed, _ = linear_probe_auroc((flat(train), flat(test)), train, test)
    noise, _ = linear_probe_auroc((rng.random((len(train), 9)), rng.random((len(test), 9))), train, test)
    assert informed > 0.8
    assert 0.3 < noise < 0.7


# -- a tiny model, end to end -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(data, image_processor):
    return tiny_model(data, image_processor)


def test_random_model_runs_through_and_repeats(data, tiny):
    model, processor = tiny
    model.train()
    first, second = (
        evaluate_model(model, processor, data, ALL, options=Options(resamples=20, batch_size=size, **QUIET))
        for size in (7, 24)
    )
    assert model.training
    json.dumps(first, allow_nan=False)
    assert set(first["tasks"]) == set(ALL)
    for name, task in first["tasks"].items():
        headline = task["metrics"][task["headline"]]
        assert 0.0 <= headline["low"] <= headline["high"] <= 1.0
        assert headline["std"] >= 0
        # Images are independent of each other, so the batch size does not matter.
        other = second["tasks"][name]["metrics"][task["headline"]]
        assert headline["value"] == pytest.approx(other["value"], abs=1e-3)
    assert "official" in first["tasks"]["od_vindr"]["metrics"]["map"]
    assert first["tasks"]["re_cig"]["texts"] == second["tasks"]["re_cig"]["texts"]


def test_headline_numbers_of_the_demo(data, tiny):
    model, processor = tiny
    results = evaluate_model(model, processor, data, ALL, options=Options(resamples=0, **QUIET))
    metrics = headline_metrics(
        results, *score_baselines(data["train"], data["test"], processor.image_processor, PHANTOM_CLASSES, label_text)
    )
    json.dumps(metrics, allow_nan=False)
    for key, (task, metric) in HEADLINES.items():
        assert metrics[key] == value(results, task, metric)
        assert 0.0 <= metrics["baselines"][key] <= 1.0
    assert set(metrics["details"]["finding_detection"]["per_class"]) == set(PHANTOM_CLASSES)
    lines = format_table(metrics).splitlines()
    assert len(lines) == 7
    assert "baseline" in lines[0]


def test_images_without_boxes_are_on_the_device_of_the_model():
    context = SimpleNamespace(
        device=torch.device("meta"), model=SimpleNamespace(config=SimpleNamespace(projection_dim=5))
    )
    targets = [SimpleNamespace(object_boxes=np.zeros((0, 4)))] * 2
    features, mask = Batch(context, None, targets).object_features()
    assert (features.device.type, features.shape, mask.shape) == ("meta", (2, 0, 5), (2, 0))


def test_limit_and_free_tasks(data, tiny):
    model, processor = tiny
    options = Options(resamples=0, limit=6, **QUIET)
    results = evaluate_model(model, processor, data, ["region_description", "finding_detection"], options=options)
    assert results["tasks"]["finding_detection"]["images"] == 6
    expected = [
        targets.described_regions().sum() for targets in iterate_targets(data["test"], processor.image_processor)
    ]
    assert results["tasks"]["region_description"]["texts"] == sum(expected[:6])
    assert results["tasks"]["finding_detection"]["headline"] == "map50"


def test_model_without_generator_skips_the_text_tasks_visibly(data, image_processor):
    model, processor = tiny_model(data, image_processor, generator=False)
    results = evaluate_model(model, processor, data, options=Options(resamples=0, limit=5, **QUIET))
    assert set(results["skipped"]) == {"box_description", "region_description", "report_generation"}
    assert "no sentence generator" in results["skipped"]["report_generation"]
    assert value(results, "region_classification", "wauroc") is not None
    with pytest.raises(NothingToRun, match="report_generation: the model has no sentence generator"):
        evaluate_model(model, processor, data, ["report_generation"])
    explanations, detections = explain_examples(model, processor, data["test"], [0], label_text)
    assert explanations == []
    assert len(detections) == 1


def test_wrong_arguments_are_explained(data, tiny):
    model, processor = tiny
    with pytest.raises(ValueError, match="split 'holdout' of phantom is not there.*train .40 images., validation"):
        evaluate_model(model, processor, data, split="holdout")
    with pytest.raises(ValueError, match="Unknown task 'flying'"):
        evaluate_model(model, processor, data, tasks=["flying"])
    with pytest.raises(ValueError, match="`limit` is 0"):
        Options(limit=0)
    with pytest.raises(ValueError, match="split 'test' of phantom is empty"):
        evaluate_model(model, processor, datasets.DatasetDict(test=data["test"].select([])))
    twice = datasets.DatasetDict(test=data["test"].select([0, 1, 0]))
    with pytest.raises(ValueError, match="'phantom-3-00002000' is twice in the split 'test'"):
        evaluate_model(model, processor, twice)


def test_builder_cache_is_opened(tmp_path):
    from training.data.phantom import PhantomChestXray

    counts = {"num_train": 3, "num_validation": 0, "num_test": 2}
    builder = PhantomChestXray(cache_dir=str(tmp_path / "cache"), image_size=SIZE, **counts)
    builder.download_and_prepare()
    opened = open_data(tmp_path / "cache")
    assert {name: len(split) for name, split in opened.items()} == {"train": 3, "test": 2}
    assert opened["test"][1]["sample_id"] == builder.as_dataset(split="test")[1]["sample_id"]
    with pytest.raises(ValueError, match="holds no data set"):
        open_data(tmp_path / "cache" / "nothing")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path / "metrics.json", "old")
    with pytest.raises(TypeError):
        write_text(path, None)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_examples_of_the_oracle_have_no_failures(data, image_processor):
    processor = OracleProcessor(image_processor)
    model = Oracle(processor, list(data["test"]))
    indices = choose_examples(data["test"], 3, seed=1)
    assert indices == choose_examples(data["test"], 3, seed=1)
    explanations, detections = explain_examples(model, processor, data["test"], indices, label_text)
    for index, explained, detected in zip(indices, explanations, detections, strict=True):
        record = data["test"][index]
        assert len({item["category"] for item in record["objects"]}) >= 2
        assert all(found["correct"] for found in detected["predictions"])
        assert all(target["found"] for target in detected["targets"])
        assert len(detected["targets"]) == len(record["objects"])
        for target, item in zip(explained["targets"], record["objects"], strict=True):
            assert target["box"] == pytest.approx(item["bbox"], abs=0.02)
            sentence = explained["sentences"][target["sentence"]]
            assert PHANTOM_CLASSES[item["category"]] in sentence["text"]
            assert sentence["abnormal"]
        for line in explained["reference"]:
            states = 1 in label_text(line["text"]).values()
            assert (line["sentence"] is not None) == states
