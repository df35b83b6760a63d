"""`chex explain`: what it prints, what it draws, and what it says when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from modeling_chex import ChexConfig, ChexModel
from modeling_chex.pipeline_chex import Answer, Explanation, Region
from processing_chex import ChexImageProcessor, ChexProcessor
from space_app.cli import app
from space_app.explain import ChexExplainer, default_prompts, load_model
from space_app.figure import _Panel, draw_figure
from training.build_tokenizers import build_tokenizers

from .image_factory import gradient, pydicom_sample, save_dicom, save_image


ROOT = Path(__file__).parents[1]
SENTENCES = ["There is a small pleural effusion.", "No pneumothorax.", "The heart is enlarged."] * 4
# Random weights score about 0.43 everywhere: low enough for regions to appear.
FOUND = ["--threshold", "0.2"]


def save_tiny_model(folder: Path, stage: int) -> Path:
    torch.manual_seed(0)
    clip, generator = build_tokenizers(SENTENCES, 600, 300, context_length=32)
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: getattr(clip, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder = {"num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ChexConfig(
        vision_config={**encoder, "image_size": 64, "patch_size": 16},
        text_config={**encoder, **special, "vocab_size": len(clip), "max_position_embeddings": 32},
        detector_config=decoder,
        post_decoder_config=decoder if stage > 1 else None,
        generator_config={
            "vocab_size": len(generator),
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 48,
            "prefix_hidden_size": 32,
            "max_generation_length": 8,
            "bos_token_id": generator.bos_token_id,
            "eos_token_id": generator.eos_token_id,
        }
        if stage == 3
        else None,
        projection_dim=16,
    )
    model = ChexModel(config)
    if stage == 3:  # keeps an untrained generator from ending at once
        with torch.no_grad():
            model.sentence_generator.get_input_embeddings().weight[generator.eos_token_id] = 0
    model.save_pretrained(folder)
    ChexProcessor(ChexImageProcessor(size=64), clip, generator if stage == 3 else None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)


@pytest.fixture(scope="module")
def stage1_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("stage1"), stage=1)


@pytest.fixture
def png(tmp_path):
    return save_image(tmp_path / "scan.png", gradient(90, 120))


def run(*arguments):
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_is_one_paragraph(stderr: str) -> None:
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1 and "Traceback" not in stderr


# What it prints


def test_json_is_all_that_is_printed(model_folder, png):
    result = run(png, "--model", model_folder, "--prompt", "Effusion, left", "--box", "20,10,70,80", "--json", *FOUND)
    assert result.exit_code == 0 and result.stderr == ""
    document = json.loads(result.stdout)
    (image,) = document["images"]
    assert document["errors"] == []
    assert (image["image"], image["width"], image["height"]) == (str(png), 120, 90)
    prompt, box = image["answers"]
    assert (prompt["query"], prompt["kind"], prompt["present"]) == ("Effusion, left", "prompt", True)
    assert (box["kind"], box["score"], box["box"]) == ("box", 1.0, [20, 10, 70, 80])
    assert [region["box"] for region in box["regions"]] == [[20, 10, 70, 80]]
    for answer in (prompt, box):
        assert isinstance(answer["sentence"], str) and answer["sentence"]
        for x0, y0, x1, y1 in [answer["box"], *(region["box"] for region in answer["regions"])]:
            assert 0 <= x0 < x1 <= 120 and 0 <= y0 < y1 <= 90


def test_python_and_command_line_agree(model_folder, png):
    model, processor = load_model(model_folder)
    explainer = ChexExplainer(model, processor)
    explanation = explainer.explain(png, ["Heart", "Nodule"], [[30, 10, 70, 80]], threshold=0.2)
    result = run(png, "-m", model_folder, "-p", "Heart", "-p", "Nodule", "-b", "30,10,70,80", "--json", *FOUND)
    assert json.loads(result.stdout)["images"] == [explanation.to_dict()]
    # The boxes are those that the model computes without the post decoder.
    inputs = processor(images=png, text=["Heart", "Nodule"])
    with torch.no_grad():
        outputs = model(**inputs, use_post_decoder=False)
    (expected,) = processor.post_process_explanation(outputs, target_sizes=inputs["original_sizes"], threshold=0.2)
    for answer, box in zip(explanation.answers, expected["boxes"], strict=False):
        assert answer.box == pytest.approx(box.tolist(), abs=0.01)


def test_table_of_many_formats(model_folder, tmp_path):
    images = [
        save_image(tmp_path / "a.png", gradient(90, 120)),
        save_image(tmp_path / "b.jpg", gradient(30, 20)),
        save_image(tmp_path / "deep.png", gradient(50, 300, 65535, np.uint16)),
        save_dicom(tmp_path / "c", gradient(64, 64, 4095, np.uint16), bits_stored=12),
        pydicom_sample("RG1_UNCR.dcm"),
    ]
    result = run(*images, "--model", model_folder, "--prompt", "[bold]Heart[/bold]", *FOUND)
    assert result.exit_code == 0 and result.stderr == ""
    for path, size in zip(images, ("120 x 90", "20 x 30", "300 x 50", "64 x 64", "1841 x 1955"), strict=True):
        assert f"{path} ({size} pixels)" in result.stdout
    assert result.stdout.count("[bold]Heart[/bold]") == len(images)


def test_default_prompts(model_folder, png):
    answers = json.loads(run(png, "--model", model_folder, "--json").stdout)["images"][0]["answers"]
    assert [answer["query"] for answer in answers] == default_prompts()
    assert len(answers) == 8
    boxes_only = json.loads(run(png, "--model", model_folder, "--json", "--box", "20,10,70,80").stdout)
    assert [answer["kind"] for answer in boxes_only["images"][0]["answers"]] == ["box"]


def test_threshold_geometry_and_length(model_folder, png):
    common = (png, "--model", model_folder, "--prompt", "Heart")
    nothing = run(*common, "--threshold", 0.99)
    assert "not found" in nothing.stdout
    letterbox = json.loads(run(*common, "--geometry", "letterbox", "--json").stdout)["images"][0]
    assert letterbox["frame"] == [0, -15, 120, 105]
    crop = json.loads(run(*common, "--json").stdout)["images"][0]
    assert crop["frame"] == [15, 0, 105, 90]
    short = json.loads(run(*common, "--max-length", 2, "--json").stdout)["images"][0]
    assert len(short["answers"][0]["sentence"]) < len(crop["answers"][0]["sentence"])
    too_long = run(*common, "--max-length", 500)
    assert too_long.exit_code == 2 and "at most 48" in too_long.stderr


# What it draws


def test_figures(model_folder, tmp_path):
    images = [save_image(tmp_path / f"{index}.png", gradient(90, 60 + index)) for index in range(2)]
    common = ("--model", model_folder, "--prompt", "Heart", *FOUND)
    assert run(images[0], *common, "--figure", tmp_path / "one.png").exit_code == 0
    assert PIL.Image.open(tmp_path / "one.png").mode == "RGB"
    result = run(*images, *common, "--figure", tmp_path / "many.png")
    assert result.exit_code == 0
    assert {path.name for path in tmp_path.glob("many*")} == {"many-1.png", "many-2.png"}
    for name in ("one.pdf", "missing/one.png"):
        refused = run(images[0], *common, "--figure", tmp_path / name)
        assert refused.exit_code == 2 and name in refused.stderr
        assert_is_one_paragraph(refused.stderr)


@pytest.mark.parametrize("shape", [(1955, 1841), (128, 128), (40, 2000), (2000, 40), (1, 1)])
def test_boxes_are_drawn_in_place_at_any_size(shape):
    height, width = shape
    box = (0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height)
    present = Answer("Heart", "prompt", 0.9, True, box, (Region(box, 0.9),), "The heart is enlarged. " * 10)
    absent = Answer("x" * 300, "prompt", 0.1, False, None, (), None)
    explanation = Explanation("scan.png", width, height, (0, 0, width, height), (present, absent) * 6)
    figure = draw_figure(np.zeros(shape, dtype=np.float32), explanation)
    assert figure.width < 1600 and figure.height < 2500
    empty = draw_figure(np.zeros(shape, dtype=np.float32), Explanation("scan.png", width, height, box, ()))
    scale = 880 / max(shape)
    drawn = np.asarray(figure)[..., :3].astype(int)
    top = 24 + (figure.height - 48 - max(round(height * scale), 1)) // 2
    left, right, bottom = (round(edge) for edge in (24 + box[0] * scale, 24 + box[2] * scale, top + box[3] * scale))
    if min(shape) > 100:  # the bottom line of the box, away from its labels
        assert np.ptp(drawn[bottom - 2 : bottom + 1, (left + right) // 2 : right - 5], axis=-1).max() > 60
    assert np.asarray(empty).std() > 0


# What it says when something is wrong


def test_bad_files_are_named_and_the_others_are_processed(model_folder, png, tmp_path):
    jpeg = save_image(tmp_path / "whole.jpg", gradient(100, 100))
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    bad = {
        tmp_path / "missing.png": "does not exist",
        truncated: "truncated",
        save_dicom(tmp_path / "ct.dcm", gradient(9, 9, 99, np.uint16), Modality="CT"): "computed tomography",
        save_dicom(tmp_path / "report.dcm", None): "without pixel data",
    }
    for name, content in {"empty.png": b"", "empty.dcm": b"", "notes.txt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        bad[tmp_path / name] = "not an image" if content else "0 bytes"
    result = run(*bad, png, "--model", model_folder, "--prompt", "Heart", "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert [image["image"] for image in document["images"]] == [str(png)]
    assert [error["image"] for error in document["errors"]] == list(map(str, bad))
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for line, (path, message) in zip(lines, bad.items(), strict=True):
        assert line.startswith("Error: ") and str(path) in line and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1,2,3"], "--box '1,2,3'"),
        (["--box", "1,2,3,four"], "--box '1,2,3,four'"),
        (["--box", "1,2,3,nan"], "--box '1,2,3,nan'"),
        (["--box", "10,10,500,20"], "outside the image"),
        (["--box", "50,50,20,20"], "inverted"),
        (["--box", "1,2,5,9"], "letterbox"),
        (["--prompt", ""], "Prompt 1 is empty"),
        (["--prompt", "Heart", "--prompt", "  "], "Prompt 2 is empty"),
        (["--prompt", "x" * 5000], "5000 characters"),
    ],
)
def test_bad_queries(model_folder, png, arguments, message):
    result = run(png, "--model", model_folder, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert_is_one_paragraph(result.stderr)


def test_a_box_that_fits_only_some_images(model_folder, png, tmp_path):
    small = save_image(tmp_path / "small.png", gradient(20, 20))
    result = run(small, png, "--model", model_folder, "--box", "20,10,70,80")
    assert result.exit_code == 2
    assert str(small) in result.stderr and "20 x 20" in result.stderr and str(png) in result.stdout


@pytest.mark.parametrize(
    "part",
    ["config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json", "generator_tokenizer"],
)
def test_model_folders_that_miss_a_part(model_folder, png, tmp_path, part):
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    target = folder / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    result = run(png, "--model", folder)
    assert result.exit_code == 2 and part in result.stderr and str(folder) in result.stderr
    assert_is_one_paragraph(result.stderr)


def test_model_folders_that_are_damaged(model_folder, stage1_folder, png, tmp_path):
    def damaged(name: str, part: str, content: bytes) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / name)
        (folder / part).write_bytes(content)
        return folder

    weights = (model_folder / "model.safetensors").read_bytes()
    cases = {
        tmp_path / "nowhere": "does not exist",
        damaged("cut", "model.safetensors", weights[: len(weights) // 2]): "cannot be loaded",
        damaged("json", "config.json", b"{"): "no valid JSON",
        damaged("type", "config.json", b'{"model_type": "bert"}'): "'bert'",
        damaged("tokenizer", "tokenizer.json", b"{}"): "cannot be loaded",
        damaged(
            "parts", "model.safetensors", (stage1_folder / "model.safetensors").read_bytes()
        ): "tensors are missing",
    }
    for folder, message in cases.items():
        result = run(png, "--model", folder)
        assert result.exit_code == 2 and message in result.stderr and str(folder) in result.stderr
        assert_is_one_paragraph(result.stderr)


def test_models_without_generator(stage1_folder, png):
    result = run(png, "--model", stage1_folder, "--prompt", "Heart")
    assert result.exit_code == 2 and "--no-sentences" in result.stderr
    assert_is_one_paragraph(result.stderr)
    result = run(png, "--model", stage1_folder, "--prompt", "Heart", "--no-sentences", "--json", *FOUND)
    (answer,) = json.loads(result.stdout)["images"][0]["answers"]
    assert result.exit_code == 0 and answer["sentence"] is None and answer["box"]
    assert "Sentence" not in run(png, "--model", stage1_folder, "--no-sentences").stdout


def test_debug_shows_the_traceback(model_folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "missing.png", "--model", model_folder, "--debug")


def test_errors_of_the_program_do_not_stop_it(model_folder, png, monkeypatch):
    def explode(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(ChexExplainer, "explain", explode)
    result = run(png, "--model", model_folder)
    assert result.exit_code == 1
    assert "RuntimeError: out of luck" in result.stderr and "--debug" in result.stderr
    assert_is_one_paragraph(result.stderr)


# As a real process


def test_process_with_good_and_bad_files(model_folder, png, tmp_path):
    command = [
        sys.executable,
        "-m",
        "space_app.cli",
        "explain",
        png,
        tmp_path / "missing.png",
        "--model",
        model_folder,
    ]
    process = subprocess.run(
        list(map(str, [*command, "--prompt", "Heart", "--json"])),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert process.returncode == 2
    assert len(json.loads(process.stdout)["images"]) == 1
    assert_is_one_paragraph(process.stderr)


def test_a_sentence_of_what_was_not_found_stands_in_brackets():
    absent = Answer("Edema", "prompt", 0.1, False, None, (), "Mild edema.")
    texts = [text for _, _, text, *_ in _Panel(Explanation("scan.png", 9, 9, (0, 0, 9, 9), (absent,))).items]
    assert "(Mild edema.)" in texts and "Mild edema." not in texts


@pytest.mark.parametrize("command", [[], ["data"], ["convert"]])
def test_lists_of_commands_are_not_cut(command):
    shown = CliRunner().invoke(app, [*command, "--help"]).stdout
    assert "..." not in shown.split("Commands:")[1]


def test_help_is_quick():
    code = (
        "import sys; from typer.testing import CliRunner; from space_app.cli import app;"
        "result = CliRunner().invoke(app, ['explain', '--help']);"
        "assert result.exit_code == 0 and '--prompt' in result.stdout;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
