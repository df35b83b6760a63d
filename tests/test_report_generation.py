"""Reports: every step from prompts to the order of sentences; in the model, the pipeline and as code that travels."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, pipeline

from modeling_chex import ChexModel, save_with_code
from modeling_chex.pipeline_chex import Report
from processing_chex.prompt_sets import class_prompts
from processing_chex.report import (
    OPTION_NAMES,
    REPORT_PRESETS,
    REPORT_REGIONS,
    ReportQueries,
    _in_order,
    deduplicate,
    is_negative,
    report_options,
    sentence_similarity,
)
from space_app.explain import ChexExplainer
from training.data.phantom import phantom_record
from training.data.phantom_text import label_text

from .image_factory import gradient, save_image
from .test_auto_classes import HIDE_PACKAGES
from .test_cli import save_tiny_model


FOUND = 0.2  # random weights score about 0.43 everywhere


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)


@pytest.fixture(scope="module")
def explainer(model_folder):
    return ChexExplainer.from_pretrained(model_folder)


@pytest.fixture
def png(tmp_path):
    return save_image(tmp_path / "scan.png", gradient(90, 120))


def set_sign(monkeypatch, positive):
    """Lets `positive(query)` say which queries are abnormal, with a probability that falls with their number."""

    def classify(features, *_):
        values = [0.9 - query / 100 if positive(query) else 0.2 for query in range(features.shape[1])]
        return torch.tensor(values).expand(len(features), -1)[..., None]

    monkeypatch.setattr(ChexModel, "classify", staticmethod(classify))


def keep_all(monkeypatch):
    monkeypatch.setattr("processing_chex.report.deduplicate", lambda similarity, *_: list(range(len(similarity))))


# -- repetitions ------------------------------------------------------------------------------------------------------


def similar(count: int, pairs: dict[tuple[int, int], float]) -> np.ndarray:
    matrix = np.full((count, count), 0.5)
    for (first, second), value in pairs.items():
        matrix[first, second] = matrix[second, first] = value
    return matrix


def test_stop_rules():
    """Evaluation protocol, acceptance test 9: 0.95 always, 0.90 while there are more than ten."""
    assert deduplicate(similar(2, {(0, 1): 0.95}), [1, 2]) == [1]
    assert deduplicate(similar(2, {(0, 1): 0.9499}), [1, 2]) == [0, 1]
    pairs = {(0, 1): 0.94, (2, 3): 0.92, (4, 5): 0.90, (6, 7): 0.899}
    for count, kept in ((10, 10), (11, 10), (12, 10), (13, 10), (14, 11)):
        assert len(deduplicate(similar(count, pairs), range(count))) == kept
    assert deduplicate(similar(13, pairs), range(13)) == [1, 3, 5, *range(6, 13)]
    assert len(deduplicate(similar(40, {}), [0.0] * 40)) == 40  # soft: unlike sentences are never cut
    assert deduplicate(similar(2, {(0, 1): 0.95}), [1, 1]) == [0]  # of equals the first stays
    assert deduplicate(similar(3, {(0, 1): 0.8}), range(3), always_same=0.8) == [1, 2]
    assert deduplicate(similar(3, {(0, 1): 0.8}), range(3), max_sentences=2, same_if_long=0.8) == [1, 2]
    # The most similar pair goes first: 2 is lost to 1, and then 0 and 1 are not alike enough.
    assert deduplicate(similar(3, {(0, 2): 0.96, (1, 2): 0.99}), [1, 3, 2]) == [0, 1]


def test_similarity_of_sentences():
    features = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert sentence_similarity(features) == pytest.approx(
        np.array([[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 1, 0.5], [0, 0, 0.5, 1]])
    )


# -- choices ----------------------------------------------------------------------------------------------------------


def test_selection():
    queries = ReportQueries(("a", "b", "c", "d"), 2, *torch.zeros(3, 1, 2))
    probability = torch.tensor([[0.9, 0.1, 0.9, 0.5]])
    present = torch.tensor([[False, True, False, True]])
    assert queries.select(probability, present).tolist() == [[False, True, True, False]]
    assert queries.select(probability, present, all_findings=True).tolist() == [[True, True, True, False]]
    expected = {
        ("all", "positive"): [True, True, True, False],
        ("positive", "positive"): [True, False, True, False],
        ("none", "positive"): [False, False, True, False],
        ("all", "all"): [True, True, True, True],
        ("positive", "none"): [True, False, False, False],
        ("found", "none"): [False, True, False, False],
    }
    for (findings, regions), selected in expected.items():
        assert queries.select(probability, present, findings=findings, regions=regions).tolist() == [selected]
    assert present.tolist() == [[False, True, False, True]]


def test_sign_by_mean_or_by_any_class():
    queries = ReportQueries.encode(class_prompts("chexpert"), lambda texts: torch.randn(len(texts), 8))
    assert (queries.class_positive.shape, queries.positive.shape) == ((14, 8), (1, 8))
    assert torch.allclose(queries.positive[0], queries.class_positive.mean(0))
    features = torch.randn(2, 29, 8)
    mean = queries.abnormality(features, ChexModel.classify)
    by_class = ChexModel.classify(features, queries.class_positive, queries.class_negative)
    assert torch.equal(queries.abnormality(features, ChexModel.classify, "any"), by_class.max(-1).values)
    cosine = torch.nn.functional.cosine_similarity
    expected = torch.sigmoid(cosine(features, queries.positive, -1) - cosine(features, queries.negative, -1))
    assert torch.allclose(mean, expected, atol=1e-6)


def test_prompts_of_the_paper():
    paper = REPORT_PRESETS["paper"]
    assert (paper.findings, paper.select_findings, paper.select_regions) == ("chexpert", "all", "positive")
    assert (paper.sign, paper.order, paper.negatives, paper.prefer) == ("mean", "prompt", "keep", "weight")
    assert (paper.always_same, paper.same_if_long, paper.max_sentences) == (0.95, 0.90, 10)
    assert (paper.max_length, paper.greedy, paper.official) == (128, True, False)
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return torch.zeros(len(texts), 2)

    queries = ReportQueries.encode(class_prompts("chexpert"), encode, paper.region_names)
    assert len(queries.names) == 29 and queries.num_findings == 14
    assert queries.prompts[:3] == ("Atelectasis", "Cardiomegaly", "Consolidation")
    assert [queries.prompts[index] for index in (8, 10)] == ["Normal", "Pleural pathology"]
    assert queries.prompts[14:16] == ("Right upper lung zone", "Right mid lung zone")
    assert queries.prompts[-3:] == ("Mediastinum", "Cardiac silhouette", "Abdomen")
    assert {"Abnormal", "No pneumothorax", "Support devices"} <= set(encoded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"select_finding": "all"}, "did you mean 'select_findings'"),
        ({"order": "random"}, "prompt, anatomy, score"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"max_sentences": 0}, "at least 1"),
        ({"regions": ["left lung", "tail"]}, "no region 'tail'"),
        ({"findings": "nothing of the kind"}, "Choose one of"),
    ],
)
def test_wrong_options(explainer, options, message):
    preset = options.pop("preset", "found")
    with pytest.raises(ValueError, match=message):
        explainer.processor.report_queries(explainer.model, preset, **options)


def test_negative_sentences():
    negative = (
        "No pneumothorax.",
        "There is no pleural effusion, pneumothorax, or focal consolidation.",
        "The lungs are clear.",
        "The heart is not enlarged.",
        "The cardiomediastinal silhouette is within normal limits with no effusion.",
        "Pneumothorax has resolved.",
    )
    other = (
        "No pneumothorax, but a small left effusion remains.",
        "The heart size is normal with a small left effusion.",
        "The lungs are clear and there is mild cardiomegaly.",
        "No change in the large right effusion.",
        "The right base is not clear.",
        "Small right pneumothorax.",
        "Abnormal opacity in the left lung.",
        "",
        "...",
    )
    assert all(map(is_negative, negative))
    assert not any(map(is_negative, other))
    # The grammar of the phantom, whose labeller is exact.
    records = [phantom_record(3, index, 64) for index in range(40)]
    sentences = {text for record in records for texts in record["anatomy_sentences"] for text in texts}
    sentences |= {text for record in records for text in record["sentences"]}
    wrong = [text for text in sentences if label_text(text) and is_negative(text) == (1 in label_text(text).values())]
    assert len(sentences) > 100 and not wrong


# -- the whole --------------------------------------------------------------------------------------------------------


def test_each_sentence_answers_its_own_prompt(explainer, png, monkeypatch):
    """D5: regions are dropped between others, and still every sentence has the boxes and name of its own prompt."""
    set_sign(monkeypatch, lambda query: query >= 8 and query % 2 == 1)  # of the regions, each second
    keep_all(monkeypatch)
    report = explainer.report(png, threshold=FOUND)
    prompts = class_prompts("phantom")
    assert [sentence.name for sentence in report.sentences] == [*prompts.names, *REPORT_REGIONS[1::2]]
    asked = [*(prompts.box[name][0] for name in prompts.names), *(name.capitalize() for name in REPORT_REGIONS[1::2])]
    assert [sentence.prompt for sentence in report.sentences] == asked
    model, processor = explainer.model, explainer.processor
    for number, sentence in enumerate(report.sentences):
        assert sentence.kind == ("finding" if number < 8 else "region")
        inputs = processor(images=png, text=[sentence.prompt])
        with torch.no_grad():
            outputs = model(**inputs, clip_boxes=True)
        ids = model.generate(query_features=outputs.query_features)
        (own,) = processor.post_process_explanation(outputs, ids, inputs["original_sizes"], FOUND)
        assert sentence.text == own["sentences"][0]
        assert sentence.score == pytest.approx(own["scores"].item(), abs=2e-4)
        assert sentence.box == pytest.approx(own["boxes"][0].tolist(), abs=0.02)
        assert len(sentence.candidates) == model.config.detector_config.num_regions
        best = sentence.candidates[0]
        assert best.box == pytest.approx(own["region_boxes"][0][0].tolist(), abs=0.02)
        assert sentence.regions[0] == best
    assert report.text == " ".join(sentence.text for sentence in report.sentences) != ""
    assert json.loads(report.to_json()) == report.to_dict() and report.to_dict()["text"] == report.text
    assert (report.image, report.width, report.height) == (str(png), 120, 90)


def test_official_indexing_shifts_what_follows_a_dropped_region(explainer, png, monkeypatch):
    set_sign(monkeypatch, lambda query: query != 9)  # the second region is dropped
    keep_all(monkeypatch)
    right, official = (explainer.report(png, threshold=FOUND, official=value).sentences for value in (False, True))
    assert [sentence.text for sentence in right] == [sentence.text for sentence in official]
    assert [sentence.name for sentence in right[:9]] == [sentence.name for sentence in official[:9]]
    assert [sentence.name for sentence in right[9:]] == list(REPORT_REGIONS[2:])
    assert [sentence.name for sentence in official[9:]] == list(REPORT_REGIONS[1:-1])
    for own, shifted in zip(right[9:-1], official[10:], strict=True):
        assert (own.name, own.candidates) == (shifted.name, shifted.candidates)


def test_which_queries_are_described(explainer, png, monkeypatch):
    set_sign(monkeypatch, lambda query: query in (1, 10, 12))
    keep_all(monkeypatch)

    def names(threshold=FOUND, **options):
        return [sentence.name for sentence in explainer.report(png, threshold=threshold, **options).sentences]

    phantom, regions = class_prompts("phantom").names, [REPORT_REGIONS[2], REPORT_REGIONS[4]]
    assert names() == [*phantom, *regions]
    assert names(threshold=0.99) == regions
    assert names(threshold=0.99, select_findings="all") == [*phantom, *regions]
    assert names(select_findings="positive") == [phantom[1], *regions]
    assert names(select_findings="none", select_regions="all") == list(REPORT_REGIONS)
    assert names(select_regions="none", regions=["spine"]) == list(phantom)
    assert names(select_regions="all", regions=["spine", "trachea"]) == [*phantom, "spine", "trachea"]
    assert names(preset="paper", threshold=0.99)[:14] == list(class_prompts("chexpert").names)
    empty = explainer.report(png, threshold=0.99, select_regions="none")
    assert (empty.text, empty.sentences) == ("", ())
    json.dumps(empty.to_dict())


def test_repetitions_leave_the_preferred_sentence(explainer, png, monkeypatch):
    set_sign(monkeypatch, lambda query: True)
    with monkeypatch.context() as context:
        keep_all(context)
        everything = explainer.report(png, threshold=FOUND).sentences
    texts = [sentence.text for sentence in everything]
    with torch.no_grad():
        features = explainer.model.get_prompt_features(explainer.processor(text=texts)["input_ids"])
    similarity = sentence_similarity(features)
    for prefer, values in (
        ("weight", [sentence.score for sentence in everything]),
        ("probability", [sentence.abnormality for sentence in everything]),
    ):
        kept = explainer.report(png, threshold=FOUND, prefer=prefer).sentences
        assert 0 < len(kept) < len(everything) == 23  # a random generator repeats itself
        assert list(kept) == [everything[index] for index in deduplicate(similarity, values)]


def test_negatives_can_be_dropped(explainer, png, monkeypatch):
    set_sign(monkeypatch, lambda query: True)
    keep_all(monkeypatch)
    texts = ["No pneumothorax.", "Small nodule.", "", "The lungs are clear."]
    monkeypatch.setattr(
        type(explainer.processor),
        "decode_sentences",
        lambda self, ids: [[texts[query % 4] for query in range(ids.shape[1])]],
    )
    kept = explainer.report(png, threshold=FOUND).sentences
    assert {sentence.text for sentence in kept} == {texts[0], texts[1], texts[3]}  # negatives, but nothing empty
    dropped = explainer.report(png, threshold=FOUND, negatives="drop").sentences
    assert {sentence.text for sentence in dropped} == {texts[1]}
    assert [sentence for sentence in kept if sentence.text == texts[1]] == list(dropped)


def test_orders(explainer, png, monkeypatch):
    set_sign(monkeypatch, lambda query: True)
    keep_all(monkeypatch)
    prompt, score, anatomy = (
        explainer.report(png, threshold=FOUND, order=order).sentences for order in ("prompt", "score", "anatomy")
    )
    assert list(score) == sorted(prompt, key=lambda sentence: -sentence.score)
    key = repr
    assert sorted(anatomy, key=key) == sorted(prompt, key=key) == sorted(score, key=key)
    assert [sentence.name for sentence in anatomy if sentence.kind == "region"] == list(REPORT_REGIONS)

    def answer(name, kind, box):
        return {"name": name, "kind": kind, "score": 0.5, "candidates": [{"box": box, "score": 0.5}]}

    regions = [
        answer("right lung", "region", [0, 0, 40, 100]),
        answer("left lower lung zone", "region", [60, 50, 100, 100]),
        answer("left lung", "region", [60, 0, 100, 100]),
    ]
    findings = [
        answer("top", "finding", [62, 5, 90, 30]),  # only in the left lung
        answer("base", "finding", [65, 60, 90, 90]),  # in two regions: the smaller one tells more
        answer("right", "finding", [30, 10, 50, 30]),
    ]
    ordered = _in_order([*findings, *regions], [*findings, *regions], "anatomy")
    assert [item["name"] for item in ordered] == [
        *("right", "right lung", "base", "left lower lung zone", "top", "left lung"),
    ]


def test_model_and_pipeline_agree_and_batches_equal_single_images(explainer, png, tmp_path, monkeypatch):
    other = save_image(tmp_path / "other.png", gradient(200, 100))
    model, processor = explainer.model, explainer.processor
    images = [png, other, png]
    reports = explainer.report(images, threshold=FOUND, geometry="letterbox")
    assert [report.image for report in reports] == list(map(str, images))
    inputs = processor(images=images, geometry="letterbox")
    by_model = model.report(**inputs, processor=processor, threshold=FOUND)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
    queries = processor.report_queries(model)
    monkeypatch.setattr(ChexModel, "get_image_features", lambda *_: pytest.fail("the images are encoded already"))
    sizes, frames = inputs["original_sizes"], inputs["image_frames"]
    common = {"processor": processor, "threshold": FOUND, "queries": queries}
    encoded = model.report(image_features=features, original_sizes=sizes, image_frames=frames, **common)
    assert encoded == by_model
    monkeypatch.undo()
    for report, plain, image in zip(reports, by_model, images, strict=True):
        single = explainer.report(image, threshold=FOUND, geometry="letterbox")
        assert report.text == plain["text"] == single.text
        assert [sentence.name for sentence in report.sentences] == [item["name"] for item in plain["sentences"]]
        for sentence, same, item in zip(report.sentences, single.sentences, plain["sentences"], strict=True):
            assert sentence.box == pytest.approx(same.box, abs=0.02)
            assert sentence.box == pytest.approx(item["box"], abs=0.01)
            x0, y0, x1, y1 = sentence.box
            assert 0 <= x0 < x1 <= report.width and 0 <= y0 < y1 <= report.height
    # Without sizes: relative to the square that the network sees.
    for sentence in model.report(image_features=features, **common)[0]["sentences"]:
        assert all(0 <= edge <= 1 for edge in sentence["box"])
    assert explainer.report([]) == []


def test_options_reach_the_generator(explainer, png):
    paper = explainer.report(png, preset="paper", threshold=FOUND)
    assert paper.sentences  # 128 tokens are more than this generator has positions for
    short = explainer.report(png, threshold=FOUND, max_length=2)
    assert all(len(sentence.text.split()) <= 2 for sentence in short.sentences)
    beams = explainer.report(png, threshold=FOUND, num_beams=2)
    assert beams == explainer.report(png, threshold=FOUND, generate_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="tresh"):
        explainer.report(png, tresh=1)


def test_errors(explainer, tmp_path, png):
    with pytest.raises(ValueError, match="pixel_values"):
        explainer.model.report(processor=explainer.processor)
    without = ChexExplainer.from_pretrained(save_tiny_model(tmp_path, stage=1))
    with pytest.raises(ValueError, match="no sentence generator"):
        without.report(png)
    with pytest.raises(ValueError, match="no sentence generator"):
        without.model.report(**without.processor(images=png), processor=without.processor)


def test_reports_from_a_folder_with_code(model_folder, explainer, tmp_path, png):
    """As from the Hub, in a process in which the package is not installed."""
    folder = tmp_path / "with_code"
    save_with_code(AutoModel.from_pretrained(model_folder), AutoProcessor.from_pretrained(model_folder), folder)
    code = """
import json
from transformers import pipeline
image, folder = sys.argv[1:]
chex = pipeline("chest-xray-explanation", model=folder, device="cpu", trust_remote_code=True)
assert type(chex).__module__.startswith("transformers_modules."), type(chex)
report = chex.report(image, preset="paper", threshold=0.2, order="anatomy")
plain = chex.model.report(**chex.processor(images=image), processor=chex.processor, preset="paper", threshold=0.2)
assert len(plain[0]["sentences"]) == len(report.sentences)
print(report.to_json())
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", HIDE_PACKAGES + code, str(png), str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    chex = pipeline("chest-xray-explanation", model=str(model_folder), device="cpu")
    report = chex.report(png, preset="paper", threshold=FOUND, order="anatomy")
    assert type(report) is Report and report.sentences
    assert json.loads(process.stdout) == report.to_dict()
    assert report == explainer.report(png, preset="paper", threshold=FOUND, order="anatomy")


def test_docs(model_folder, tmp_path, monkeypatch):
    """The Python of docs/reports.md runs, and its table names all options."""
    text = (Path(__file__).parents[1] / "docs" / "reports.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text or f"`{name}=" in text for name in OPTION_NAMES)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "runs" / "demo" / "model")
    save_image(tmp_path / "scan.png", gradient(128, 160))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["report"].width == 160 and len(names["reports"]) == 2
    assert names["reports"][0]["text"] == names["reports"][1]["text"]  # of one image; scores differ by rounding


def test_options_of_presets_can_be_changed():
    assert report_options("paper", max_sentences=3).findings == "chexpert"
    assert report_options(report_options("paper", order="score")).order == "score"
