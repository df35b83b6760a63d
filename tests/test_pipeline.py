"""`pipeline("chest-xray-explanation")` and `ChexExplainer`: one implementation, results as plain values."""

import json
import re
import shutil
from pathlib import Path
from types import GeneratorType

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from modeling_chex import ChexModel, ChexPipeline
from processing_chex import ChexInputError
from space_app.explain import ChexExplainer, default_prompts

from .image_factory import gradient, save_dicom, save_image
from .test_cli import save_tiny_model


BOX = [20, 10, 70, 80]
FOUND = 0.2  # random weights score about 0.43 everywhere


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)


@pytest.fixture(scope="module")
def chex(model_folder):
    return pipeline("chest-xray-explanation", model=str(model_folder), device="cpu")


@pytest.fixture(scope="module")
def explainer(model_folder):
    return ChexExplainer.from_pretrained(model_folder)


@pytest.fixture
def png(tmp_path):
    return save_image(tmp_path / "scan.png", gradient(90, 120))


def assert_same(result: dict, expected: dict) -> None:
    """Equal up to rounding: sums in a batch may run in another order."""
    assert {key: result[key] for key in ("width", "height", "frame")} == {
        key: expected[key] for key in ("width", "height", "frame")
    }
    assert len(result["answers"]) == len(expected["answers"])
    for answer, other in zip(result["answers"], expected["answers"], strict=True):
        for key in ("query", "kind", "present", "sentence"):
            assert answer[key] == other[key]
        assert answer["score"] == pytest.approx(other["score"], abs=2e-4)
        assert answer["box"] == (other["box"] and pytest.approx(other["box"], abs=0.02))
        assert len(answer["regions"]) == len(other["regions"])
        for region, same in zip(answer["regions"], other["regions"], strict=True):
            assert region["box"] == pytest.approx(same["box"], abs=0.02)
            assert region["score"] == pytest.approx(same["score"], abs=2e-4)


# The pipeline


def test_registered_under_its_name(chex):
    assert PIPELINE_REGISTRY.check_task("chest-xray-explanation")[1]["impl"] is ChexPipeline
    assert type(chex) is ChexPipeline and type(chex.model) is ChexModel


def test_answers_are_those_of_model_and_processor(chex, png):
    result = chex(png, prompts=["Heart", "Effusion, left"], boxes=[BOX], threshold=FOUND)
    model, processor = chex.model, chex.processor
    inputs = processor(images=png, text=["Heart", "Effusion, left"], boxes=[BOX])
    with torch.no_grad():
        outputs = model(**inputs)
    sequences = model.generate(query_features=outputs.query_features, query_mask=outputs.query_mask)
    (expected,) = processor.post_process_explanation(
        outputs, sequences, inputs["original_sizes"], FOUND, prompts=["Heart", "Effusion, left"]
    )
    detections = processor.post_process_object_detection(outputs, FOUND, inputs["original_sizes"])[0]
    assert [answer["query"] for answer in result["answers"]] == ["Heart", "Effusion, left", "20, 10, 70, 80"]
    assert [answer["kind"] for answer in result["answers"]] == ["prompt", "prompt", "box"]
    for index, answer in enumerate(result["answers"]):
        assert answer["sentence"] == expected["sentences"][index] != ""
        assert answer["score"] == pytest.approx(expected["scores"][index].item(), abs=1e-4)
        assert answer["box"] == pytest.approx(expected["boxes"][index].tolist(), abs=0.01)
        own = detections["labels"] == index
        assert len(answer["regions"]) == own.sum() > 0
        for region, box in zip(answer["regions"], detections["boxes"][own], strict=True):
            assert region["box"] == pytest.approx(box.tolist(), abs=0.01)
    assert result["answers"][2]["box"] == BOX and result["answers"][2]["score"] == 1
    assert (result["image"], result["width"], result["height"], result["frame"]) == (
        str(png),
        120,
        90,
        [15, 0, 105, 90],
    )


def test_results_are_plain_json(chex, png):
    result = chex(png, prompts="Heart", boxes=[BOX], threshold=FOUND)
    assert json.loads(json.dumps(result)) == result


def test_every_kind_of_image(chex, tmp_path):
    values = gradient(90, 120)
    path = save_image(tmp_path / "scan.png", values)
    images = [path, str(path), PIL.Image.open(path), values, torch.from_numpy(values)]
    results = chex(images, prompts="Heart", threshold=FOUND)
    assert [result["image"] for result in results] == [str(path)] * 2 + ["image"] * 3
    for result in results:
        assert_same(result, results[0])
    dicom = chex(save_dicom(tmp_path / "scan.dcm", gradient(64, 80, 4095, np.uint16), bits_stored=12), prompts="Heart")
    assert (dicom["width"], dicom["height"]) == (80, 64)


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_batches_equal_single_images(chex, png, batch_size):
    """Ragged: prompts and boxes of their own, in different numbers, or neither; five images do not divide evenly."""
    inputs = [
        gradient(90, 120),
        {"image": png, "prompts": ["Right lower lung zone of the lung", "Heart", "Nodule"], "boxes": [BOX]},
        {"image": gradient(64, 64), "prompts": [], "boxes": [[5, 5, 60, 60], [1, 2, 30, 40]]},
        {"image": gradient(200, 100), "prompts": "Pneumothorax"},
        gradient(70, 70),
    ]
    common = {"prompts": ["Effusion"], "threshold": FOUND}
    batched = chex(inputs, batch_size=batch_size, **common)
    single = [chex(image, **common) for image in inputs]
    assert [len(result["answers"]) for result in single] == [1, 4, 2, 1, 1]
    for result, expected in zip(batched, single, strict=True):
        assert_same(result, expected)


def test_shared_prompts_are_encoded_once(chex, monkeypatch):
    seen = []
    encode = ChexModel.get_prompt_features
    monkeypatch.setattr(
        ChexModel,
        "get_prompt_features",
        lambda self, ids, mask=None: seen.append(ids.shape) or encode(self, ids, mask),
    )
    chex([gradient(40, 40)] * 3, prompts=["Heart", "Nodule"], batch_size=3)
    assert [shape[:-1] for shape in seen] == [(2,)]


def test_generators_are_read_as_needed(chex):
    taken = []

    def images():
        for side in (40, 50, 60):
            taken.append(side)
            yield gradient(side, side)

    results = iter(chex(images(), prompts="Heart"))
    assert not isinstance(results, (list, GeneratorType))
    assert next(results)["width"] == 40 and len(taken) < 3
    assert [result["width"] for result in results] == [50, 60]
    assert chex([]) == []


def test_options_at_construction_and_at_the_call(model_folder, png):
    model, processor = ChexModel.from_pretrained(model_folder), AutoProcessor.from_pretrained(model_folder)
    common = {"model": model, "processor": processor, "device": "cpu"}
    chex = pipeline("chest-xray-explanation", prompts="Heart", threshold=0.99, sentences=False, **common)
    (absent,) = chex(png)["answers"]
    assert (absent["query"], absent["present"], absent["box"], absent["regions"]) == ("Heart", False, None, [])
    assert absent["sentence"] is None
    result = chex(png, prompts="Nodule", threshold=FOUND, sentences=True, geometry="letterbox")
    assert result["frame"] == [0, -15, 120, 105]
    (present,) = result["answers"]
    assert present["query"] == "Nodule" and present["present"]
    short = chex(png, sentences=True, generate_kwargs={"max_length": 2})["answers"][0]["sentence"]
    long = chex(png, sentences=True, generate_kwargs={"max_length": 8})["answers"][0]["sentence"]
    assert 0 < len(short) < len(long) and long.startswith(short)
    with pytest.raises(TypeError, match="prompt_"):
        chex(png, prompt_="Heart")


def test_models_without_generator(tmp_path, png):
    chex = pipeline("chest-xray-explanation", model=str(save_tiny_model(tmp_path, stage=1)), device="cpu")
    (answer,) = chex(png, prompts="Heart", threshold=FOUND)["answers"]
    assert answer["sentence"] is None and answer["box"]
    with pytest.raises(ValueError, match="no sentence generator"):
        chex(png, prompts="Heart", sentences=True)


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (None, {}, "Nothing is asked"),
        (None, {"prompts": [], "boxes": []}, "Nothing is asked"),
        (None, {"prompts": ["Heart", " "]}, "Prompt 2 is empty"),
        (None, {"prompts": [3]}, "Prompt 1 is a int"),
        (None, {"boxes": [[50, 50, 20, 20]]}, "inverted"),
        (None, {"boxes": [[0, 0, 500, 20]]}, "outside the image"),
        (None, {"boxes": [[1, 2, 5]]}, "has 3 numbers"),
        (None, {"prompts": "Heart", "geometry": "squash"}, "squash"),
        ("missing.png", {"prompts": "Heart"}, "missing.png does not exist"),
        ({"prompts": "Heart"}, {}, "'image'"),
        ({"image": "a.png", "text": "Heart"}, {}, "'text'"),
    ],
)
def test_errors_say_what_is_wrong(chex, explainer, png, image, arguments, message):
    image = png if image is None else image
    with pytest.raises(ValueError, match=message):
        chex(image, **arguments)
    with pytest.raises(ValueError, match=message):
        explainer.explain(image, **arguments)


# Python


def test_python_and_pipeline_agree(chex, explainer, png):
    explanation = explainer.explain(png, ["Heart", "Nodule"], [BOX], threshold=FOUND, max_length=5)
    generate_kwargs = {"max_length": 5}
    result = chex(png, prompts=["Heart", "Nodule"], boxes=[BOX], threshold=FOUND, generate_kwargs=generate_kwargs)
    assert explanation.to_dict() == result == json.loads(explanation.to_json())
    assert explanation.answers[2].regions[0].box == tuple(BOX)


def test_image_is_encoded_once_for_prompts_and_boxes(explainer, png, monkeypatch):
    calls = []
    encode = ChexModel.get_image_features
    monkeypatch.setattr(
        ChexModel, "get_image_features", lambda self, *args, **kwargs: calls.append(1) or encode(self, *args, **kwargs)
    )
    explainer.explain(png, default_prompts(), [BOX, BOX])
    assert len(calls) == 1


def test_report_errors(explainer, tmp_path, png):
    with pytest.raises(ValueError, match="Choose one of"):
        explainer.report(png, findings="nothing of the kind")
    with pytest.raises(ChexInputError, match="does not exist"):
        explainer.report(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="no sentence generator"):
        ChexExplainer.from_pretrained(save_tiny_model(tmp_path, stage=1)).report(png)


# The README


def test_readme_examples(model_folder, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "runs" / "demo" / "model")
    save_image(tmp_path / "scan.png", gradient(128, 160))
    save_dicom(tmp_path / "other.dcm", gradient(128, 160, 4095, np.uint16), bits_stored=12)
    namespaces = [{}, {}, {}]
    for block, namespace in zip(blocks, namespaces, strict=True):
        exec(block, namespace)
    assert [answer.kind for answer in namespaces[0]["answers"].answers] == ["prompt", "prompt", "box"]
    assert namespaces[0]["report"].to_dict()["width"] == 160
    assert [len(result["answers"]) for result in namespaces[1]["results"]] == [1, 2]
    (answer,) = namespaces[2]["answers"]
    assert answer["prompts"] == ["Pleural effusion", "Right lower lung zone"] and len(answer["sentences"]) == 2
