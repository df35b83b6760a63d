"""Cards of models, of the phantom and of the Space: what they say, where it comes from, and their metadata."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, SpaceCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from processing_chex.errors import ChexInputError
from space_app.dataset_card import dataset_card, size_category
from space_app.hub import check_card, collect_dataset
from space_app.model_card import METRIC_NAMES, MIN_TRANSFORMERS, _without_paths, model_card, official_card
from space_app.model_facts import count_parameters, model_sha256, read_facts
from space_app.space_card import space_card

from .test_cli import save_tiny_model


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", stage=3)


@pytest.fixture
def runs(tiny, tmp_path):
    """runs/stage1 and runs/stage3 with the model, which started from it; both on the phantom."""
    shutil.copytree(tiny, tmp_path / "runs" / "stage3" / "model")
    write_run(tmp_path / "runs" / "stage1", None, steps=50)
    write_run(tmp_path / "runs" / "stage3", "runs/stage1/model", steps=70)
    return tmp_path / "runs"


def write_run(folder, init_from, steps, data=None):
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "stage": folder.name,
        "init_from": init_from,
        "generator_from": None,
        "seed": 3,
        "data": data or {"dataset": "phantom", "num_train": 1234, "subsets": []},
        "optimization": {"batch_size": 16, "learning_rate": 0.001, "ema_decay": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [
        {"split": "train", "step": steps, "seconds": 3600.0, "lr": 0.1, "loss": 9.0},
        {"split": "validation", "step": steps, "seconds": 7200.0, "loss": 0.125, "anatomy_mse": 2.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"split": "train", "st'
    (folder / "history.jsonl").write_text(text, encoding="utf-8")


def write_results(folder, model, sha256=None):
    metric = {"value": 0.5, "low": 0.4, "high": 0.625, "std": 0.01}
    detection = {"title": "Object detection", "kind": "detection", "data": "phantom", "split": "test", "twin": True}
    detection |= {"images": 20, "metrics": {"map": metric, "map50": metric | {"value": None}}, "not_computed": {}}
    again = detection | {"title": "Detection again", "metrics": {"map": metric | {"value": 0.25}}}
    report = {"title": "Report generation", "kind": "report_generation", "data": "mimic-cxr", "split": "test"}
    report |= {"twin": False, "images": 3000, "metrics": {"meteor": metric | {"value": float("nan")}, "bleu4": metric}}
    report |= {"not_computed": {"radgraph_f1": "needs /home/someone/models/radgraph.pt, which is absent"}}
    content = {
        "schema": 1,
        "resamples": 250,
        "versions": {"torch": "2.0"},
        "model": {"sha256": sha256 or model_sha256(model)},
    }
    content["model"]["path"] = "/home/someone/model"
    content["tasks"] = {"od_vindr": detection, "od_nih8": again, "rg_mimic": report}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# Models


def test_facts_come_from_the_folder_and_what_lies_beside_it(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    model = runs / "stage3" / "model"
    write_results(runs / "evaluation", model)
    facts = read_facts(model)
    assert [run.stage for run in facts.runs] == ["stage1", "stage3"] and facts.notes == ()
    assert (facts.stage, facts.data_sets, facts.free, facts.synthetic) == (3, ("phantom",), True, True)
    last = facts.runs[-1]
    assert (last.steps, last.seconds, last.images) == (70, 7200.0, 1234)
    assert last.losses == {"loss": 0.125, "anatomy_mse": 2.5}
    assert last.settings == {"batch_size": 16, "learning_rate": 0.001, "seed": 3}
    assert facts.results["tasks"]["od_vindr"]["metrics"]["map"]["value"] == 0.5


def test_runs_that_were_moved_are_found_beside_each_other(runs, monkeypatch):
    monkeypatch.chdir("/")
    assert [run.stage for run in read_facts(runs / "stage3" / "model").runs] == ["stage1", "stage3"]


def test_parameters_are_counted_as_the_model_counts_them(tiny):
    from modeling_chex import ChexModel

    parameters, dtype = count_parameters(tiny)
    assert sum(parameters.values()) == sum(value.numel() for value in ChexModel.from_pretrained(tiny).parameters())
    assert dtype == "float32" and list(parameters.values()) == sorted(parameters.values(), reverse=True)


def test_card_tells_what_was_measured(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs.parent)
    model = runs / "stage3" / "model"
    write_results(runs / "evaluation", model)
    text = model_card(read_facts(model), "lab/tiny")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    check_card(text, "model")
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert metadata["language"] == "en" and metadata["pipeline_tag"] == "zero-shot-object-detection"
    assert metadata["datasets"] == ["chex-phantom"] and "synthetic-data" in metadata["tags"]
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "tiny" and results == card.data.eval_results
    found = {(one.dataset_config, one.metric_type): (one.metric_value, one.metric_args) for one in results}
    interval = {"low": 0.4, "high": 0.625}
    # undefined values are left out; tasks on one data set stay apart
    assert found == {
        ("od_vindr", "map"): (0.5, interval),
        ("od_nih8", "map"): (0.25, interval),
        ("rg_mimic", "bleu4"): (0.5, interval),
    }
    assert "| mAP | 0.5000 | 0.4000 to 0.6250 |" in text and "| mAP at IoU 0.5 | undefined |" in text
    assert "| METEOR | undefined |" in text and "not comparable with it" in text
    assert "RadGraph F1 was not computed: needs radgraph.pt, which is absent." in text
    assert "| stage3 | the phantom (synthetic radiographs): 1,234 images | 70 | 2.00 |" in text
    assert "/home/" not in text and str(runs) not in text
    for heading in ("How to use", "Intended use", "Out of scope", "Training", "Evaluation", "Limitations", "Ethics"):
        assert f"\n## {heading}\n" in text
    assert "not a medical device" in text.lower() and "It has never seen a" in text
    assert "@inproceedings{mueller2024chex" in text and "\n## Licences\n" in text and "\n## Citation\n" in text


def test_published_numbers_stand_beside_those_of_real_tasks_alone(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    from evaluation.published import chex

    model = runs / "stage3" / "model"
    write_results(runs / "evaluation", model)
    text = model_card(read_facts(model), "lab/tiny")
    reference = chex("rg_mimic", "bleu4")
    row = next(line for line in text.splitlines() if line.startswith("| BLEU-4"))
    expected = "" if reference is None or reference.value is None else f"{reference.value:.4f}"
    assert row.split("|")[4].strip() == expected
    assert all(line.count("|") == 4 for line in text.splitlines() if line.startswith("| mAP"))


def test_results_of_other_weights_are_not_shown(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs.parent)
    model = runs / "stage3" / "model"
    write_results(runs / "evaluation", model, sha256="other")
    facts = read_facts(model)
    assert facts.results is None and any("about other weights" in note for note in facts.notes)
    assert "These weights were not evaluated" in model_card(facts, "lab/tiny")
    with pytest.raises(ChexInputError, match="about other weights"):
        read_facts(model, results=runs / "evaluation")
    for content, message in (("[]", "no JSON object"), ("{", "no valid JSON"), ('{"tasks": 3}', "no result of")):
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
        with pytest.raises(ChexInputError, match=message):
            read_facts(model, results=tmp_path)
    with pytest.raises(ChexInputError, match=r"no results\.json"):
        read_facts(model, results=tmp_path / "nowhere")


def test_numbers_of_the_demo_are_shown_without_results(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    (runs / "metrics.json").write_text(json.dumps({"anatomy_miou": 0.75, "details": {}, "report_f1": None}))
    text = model_card(read_facts(runs / "stage3" / "model", results=runs), "lab/tiny")
    assert "| anatomy_miou | 0.7500 |" in text and "report_f1" not in text and "model-index" not in text


@pytest.mark.parametrize(
    ("names", "licence", "words"),
    [
        (["nih-cxr14"], "apache-2.0", ["NIH ChestX-ray14", "wang2017chestx"]),
        (["vindr-cxr"], "other", ["PhysioNet Credentialed Health Data License 1.5.0", "Hanoi", "nguyen2022vindr"]),
        (["chest-imagenome", "vindr-cxr"], "other", ["Do not pass", "Boston", "wu2021chest"]),
        (["somewhere"], "other", ["not known", "nothing is known about whom they leave out"]),
    ],
)
def test_licence_follows_the_data(runs, monkeypatch, names, licence, words):
    monkeypatch.chdir(runs.parent)
    data = {"dataset": "prepared", "subsets": [{"folder": f"prepared/{name}"} for name in names]}
    write_run(runs / "stage3", None, 5, data)
    facts = read_facts(runs / "stage3" / "model")
    text = model_card(facts, "lab/tiny")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == licence and facts.free == (licence == "apache-2.0")
    assert facts.credentialed == ("PhysioNet" in text)
    assert ("license_name" in metadata) == (licence == "other")
    for word in words:
        assert word in text
    check_card(text, "model")


def test_manifests_tell_what_folders_hold(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    prepared = runs.parent / "prepared" / "mine"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").write_text(json.dumps({"dataset": "ms-cxr"}), encoding="utf-8")
    data = {"dataset": "prepared", "subsets": [{"folder": "prepared/mine"}]}
    write_run(runs / "stage3", "somebody/encoder", 5, data)
    facts = read_facts(runs / "stage3" / "model")
    assert facts.data_sets == ("ms-cxr", "unknown") and facts.credentialed
    assert "`somebody/encoder`" in model_card(facts, "lab/tiny")


def test_unknown_and_converted_models(tiny, tmp_path):
    from modeling_chex import ChexConfig

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    facts = read_facts(folder)
    text = model_card(facts, "lab/tiny")
    assert facts.data_sets == ("unknown",) and not facts.free and "No record of the training" in text
    assert any("--run" in note for note in facts.notes)
    config = ChexConfig.from_pretrained(folder)
    (folder / "README.md").write_text(official_card(config, "chex_stage3.pth", 10, "float32"), encoding="utf-8")
    facts = read_facts(folder)
    assert facts.converted_from == "chex_stage3.pth" and facts.credentialed
    text = model_card(facts, "lab/tiny")
    assert "converted from `chex_stage3.pth`" in text and "johnson2019mimic" in text
    # also when the new card has taken the place of the first one
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert read_facts(folder).converted_from == "chex_stage3.pth"
    assert yaml.safe_load(model_card(facts, "lab/tiny", "cc-by-4.0").split("---")[1])["license"] == "cc-by-4.0"


@pytest.mark.parametrize("stage", [1, 2])
def test_earlier_stages_promise_no_sentences(stage, tmp_path):
    text = model_card(read_facts(save_tiny_model(tmp_path / "model", stage=stage)), "lab/tiny")
    assert f"of stage {stage}" in text and "chex.report" not in text and "model.generate" not in text


def test_damaged_runs_are_named(runs):
    (runs / "stage3" / "config.yaml").write_text("stage: [", encoding="utf-8")
    with pytest.raises(ChexInputError, match=r"config\.yaml cannot be read as the configuration"):
        read_facts(runs / "stage3" / "model")
    with pytest.raises(ChexInputError, match=r"it has no config\.yaml"):
        read_facts(runs / "stage3" / "model", run=runs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("needs /home/me/a/b.pt now", "needs b.pt now"),
        ("~/models/x.bin", "x.bin"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("train/test and 3/4", "train/test and 3/4"),
    ],
)
def test_paths_of_the_machine_are_cut(text, expected):
    assert _without_paths(text) == expected


def test_metrics_have_names():
    from evaluation.tasks.catalog import METRICS

    assert {name for names in METRICS.values() for name in names} <= set(METRIC_NAMES)
    # Thresholds of grounding are scores, not overlaps, and its means are over phrases (docs/metrics.md).
    assert "score" in METRIC_NAMES["iou_at_30"] and "score" in METRIC_NAMES["best_iou"]
    assert "phrases" in METRIC_NAMES["macro_iou"]


def test_version_of_transformers_is_that_of_the_package():
    assert f"transformers>={MIN_TRANSFORMERS}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


# The phantom and the Space


def test_dataset_card_describes_what_is_loaded(tmp_path):
    import datasets

    from training.data.preparation import prepare, source_class
    from training.data.prepared import read_info

    options = {"num_train": 3, "num_validation": 0, "num_test": 2, "image_size": 64, "seed": 5}
    folder = tmp_path / "phantom"
    prepare(source_class("phantom"), folder, size=64, num_proc=1, options=options, say=lambda text: None)
    info = read_info(folder)
    text = dataset_card(folder, info, "lab/phantom")
    (folder / "README.md").write_text(text, encoding="utf-8")
    card = DatasetCard.load(folder / "README.md")
    check_card(text, "dataset")
    described = card.data.to_dict()["dataset_info"]
    assert {split["name"]: split["num_examples"] for split in described["splits"]} == {"train": 3, "test": 2}
    assert card.data.license == "apache-2.0" and card.data.size_categories == "n<1K"
    assert "No patient is in it" in text and "--option seed=5" in text and info.content in text
    # `datasets` reads card and files as the Hub would
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 3, "test": 2}
    declared = datasets.DatasetInfo._from_yaml_dict(described).features
    assert loaded["train"].features == declared
    # the command of the card makes the same data again
    again = tmp_path / "again"
    prepare(source_class("phantom"), again, size=64, num_proc=1, options=info.options, say=lambda text: None)
    assert read_info(again).content == info.content
    upload = collect_dataset(folder, "lab/phantom")
    assert upload.left_out == {"rejected.csv": "not in the manifest"} and str(tmp_path) not in text
    shard = next(iter(folder.glob("data/*.parquet")))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ChexInputError, match="damaged"):
        collect_dataset(folder, "lab/phantom")


def test_only_the_phantom_is_published(tmp_path):
    manifest = {"format": 1, "dataset": "mimic-cxr", "title": "MIMIC-CXR", "fingerprint": "", "size": 8}
    manifest |= {"image_format": "PGM", "options": {}, "classes": [], "filters": {}, "splits": {}, "made_with": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ChexInputError, match="only the phantom is published"):
        collect_dataset(tmp_path, "lab/mimic")


def test_size_categories():
    sizes = {0: "n<1K", 999: "n<1K", 1_000: "1K<n<10K", 99_999: "10K<n<100K", 10**6: "1M<n<10M"}
    assert {size: size_category(size) for size in sizes} == sizes


def test_space_card_names_model_and_limits():
    import gradio

    text = space_card("lab/tiny", "lab/page")
    check_card(text, "space")
    data = SpaceCard(text).data
    assert (data.title, data.sdk, data.app_file, data.models) == ("page", "gradio", "app.py", ["lab/tiny"])
    assert "Not a medical device" in text and len(data.short_description) <= 60
    # the version of Gradio that the page was tested with
    assert data.sdk_version == gradio.__version__
    stored = (ROOT / "space_app" / "README.md").read_text(encoding="utf-8")
    check_card(stored, "space")
