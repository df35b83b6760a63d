"""ChexImageProcessor and ChexProcessor: geometry, batching, validation, post-processing, saving."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.Image import Resampling

from processing_chex import ChexImageProcessor, ChexInputError, ChexProcessor
from processing_chex.box_geometry import GEOMETRIES, normalized_to_pixels
from processing_chex.image_processing_chex import resize_frame
from training.build_tokenizers import build_tokenizers

from .image_factory import gradient, rectangle_image, save_dicom, save_image


ROOT = Path(__file__).parents[1]
# Makes the packages of this repository impossible to import, whether it is installed or the working directory.
HIDE_PACKAGES = """
import sys
class Hide:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("processing_chex", "modeling_chex", "training"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide)
"""
SENTENCES = ["No pleural effusion.", "The heart is enlarged.", "A nodule in the right upper lung zone."] * 3


@pytest.fixture(scope="module")
def processor():
    clip, generator = build_tokenizers(SENTENCES, 600, 300, context_length=16)
    return ChexProcessor(ChexImageProcessor(size=32), clip, generator)


# Image processor


def test_pixel_values_are_normalised_grey():
    output = ChexImageProcessor(size=8)(np.full((8, 8), 255, dtype=np.uint8), return_tensors="pt")
    assert output["pixel_values"].shape == (1, 3, 8, 8)
    assert output["pixel_values"].dtype == torch.float32
    assert torch.allclose(output["pixel_values"], torch.tensor((1 - 0.505) / 0.248))
    array = gradient(64, 64)
    values = ChexImageProcessor(size=64)(array, return_tensors="np")["pixel_values"][0]
    assert np.allclose(values, (array / 255 - 0.505) / 0.248, atol=1e-5)
    values = ChexImageProcessor(size=64, do_normalize=False)(array, return_tensors="np")["pixel_values"][0]
    assert np.allclose(values, array / 255, atol=1e-6)


def test_center_crop_equals_cropping_then_resizing():
    array = np.random.default_rng(0).random((90, 61), dtype=np.float32)
    values = ChexImageProcessor(size=32, do_normalize=False)(array, return_tensors="np")["pixel_values"][0, 0]
    expected = PIL.Image.fromarray(array[14:75]).resize((32, 32), Resampling.BILINEAR)
    assert np.abs(values - np.asarray(expected)).max() < 1e-6


@pytest.mark.parametrize("shape", [(90, 61), (61, 90), (50, 7), (7, 50), (1, 40), (33, 33)])
def test_letterbox_equals_padding_then_resizing(shape):
    array = np.random.default_rng(0).random(shape, dtype=np.float32)
    processor = ChexImageProcessor(size=32, do_normalize=False, geometry="letterbox")
    values = processor(array, return_tensors="np")["pixel_values"][0, 0]
    side = max(shape)
    padded = np.zeros((side, side), dtype=np.float32)
    top, left = -((shape[0] - side) // 2), -((shape[1] - side) // 2)
    padded[top : top + shape[0], left : left + shape[1]] = array
    expected = PIL.Image.fromarray(padded).resize((32, 32), Resampling.BILINEAR)
    assert np.abs(values - np.asarray(expected)).max() < 1e-5


@given(st.data(), st.sampled_from(GEOMETRIES))
@settings(max_examples=60, deadline=None)
def test_a_drawn_box_lands_where_the_frame_says(data, geometry):
    """The picture itself, not only the arithmetic, is in the right place: find the drawn box in the pixels."""
    height, width = data.draw(st.integers(40, 400)), data.draw(st.integers(40, 400))
    processor = ChexImageProcessor(size=128, do_normalize=False, geometry=geometry)
    frame = np.array(processor.frame(height, width))
    left, right = max(frame[0], 0), min(frame[2], width)
    top, bottom = max(frame[1], 0), min(frame[3], height)
    x0 = data.draw(st.integers(int(left), int(right) - 20))
    y0 = data.draw(st.integers(int(top), int(bottom) - 20))
    x1, y1 = data.draw(st.integers(x0 + 20, int(right))), data.draw(st.integers(y0 + 20, int(bottom)))
    output = processor(rectangle_image(height, width, (x0, y0, x1, y1)), return_tensors="np")
    assert np.array_equal(output["image_frames"][0], frame)
    square = output["pixel_values"][0, 0]
    # The centre of mass and the mass of a profile give its middle and its length, below pixel resolution.
    scale = (frame[2] - frame[0]) / 128
    for axis, start, end, origin in ((0, x0, x1, frame[0]), (1, y0, y1, frame[1])):
        profile = square.max(axis=axis)
        center = ((np.arange(128) + 0.5) * profile).sum() / profile.sum() * scale + origin
        assert abs(center - (start + end) / 2) < 0.5
        assert abs(profile.sum() * scale - (end - start)) < 1.0


def test_elongated_images_are_cheap():
    square = resize_frame(np.ones((60000, 10), dtype=np.float32), (-29995, 0, 30005, 60000), 32, Resampling.BILINEAR)
    assert square.shape == (32, 32)
    assert square.sum() * (60000 / 32) ** 2 == pytest.approx(600000, rel=1e-3)


def test_batches_equal_single_images(tmp_path):
    array = gradient(30, 50)
    images = [array, PIL.Image.fromarray(array), torch.tensor(array), save_image(tmp_path / "a.png", array)]
    images += [str(images[-1]), save_dicom(tmp_path / "a.dcm", array), gradient(80, 20)]
    processor = ChexImageProcessor(size=16)
    batch = processor(images, return_tensors="pt")
    assert batch["original_sizes"].tolist() == [[30, 50]] * 6 + [[80, 20]]
    for index, image in enumerate(images):
        single = processor(image, return_tensors="pt")
        for name, value in single.items():
            assert torch.equal(batch[name][index], value[0])
    stacked = processor(torch.tensor(np.stack([array] * 2)[:, None]), return_tensors="pt")
    assert torch.equal(stacked["pixel_values"], batch["pixel_values"][:2])
    empty = processor([], return_tensors="pt")
    assert empty["pixel_values"].shape == (0, 3, 16, 16) and empty["image_frames"].shape == (0, 4)


def test_call_arguments_override_and_unknown_ones_fail():
    processor = ChexImageProcessor(size=16)
    output = processor(gradient(30, 50), size=24, geometry="letterbox", return_tensors="pt")
    assert output["pixel_values"].shape[-1] == 24
    assert output["image_frames"].tolist() == [[0, -10, 50, 40]]
    with pytest.raises(TypeError, match="do_resize"):
        processor(gradient(30, 50), do_resize=False)
    with pytest.raises(ChexInputError, match="side of the square"):
        processor(gradient(30, 50), size={"height": 8, "width": 9})
    with pytest.raises(ChexInputError, match="letterbox"):
        ChexImageProcessor(geometry="stretch")
    with pytest.raises(ChexInputError, match="image 2 contains NaN"):
        processor([gradient(30, 50), np.full((4, 4), np.nan)])


# Processor inputs


def test_shared_prompts_and_boxes(processor):
    images = [gradient(40, 50), gradient(70, 30)]
    inputs = processor(images=images, text=["Heart", "Right upper lung zone"], boxes=[[6, 6, 20, 30]])
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["input_ids"].shape[:2] == (2, 2)
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    assert inputs["query_mask"].all() and inputs["query_mask"].dtype == torch.bool
    assert inputs["box_mask"].all() and inputs["box_mask"].dtype == torch.bool
    assert inputs["query_boxes"].dtype == torch.float32
    pixels = normalized_to_pixels(inputs["query_boxes"], inputs["image_frames"][:, None])
    assert torch.allclose(pixels, torch.tensor([6.0, 6, 20, 30]), atol=1e-3)
    assert set(inputs) == {*processor.model_input_names, "query_boxes", "box_mask"}
    one = processor(images=images[0], boxes=[6, 6, 20, 30])
    assert torch.equal(one["query_boxes"], inputs["query_boxes"][:1])


def test_ragged_prompts_and_boxes(processor):
    images = [gradient(40, 50)] * 3
    text = [["Heart", "A nodule"], [], ["Right upper lung zone"]]
    boxes = [np.array([[6, 6, 20, 30]]), torch.zeros(0, 4), [[6, 7, 8, 9], [10, 10, 40, 40]]]
    inputs = processor(images=images, text=text, boxes=boxes)
    assert inputs["query_mask"].tolist() == [[True, True], [False, False], [True, False]]
    assert inputs["box_mask"].tolist() == [[True, False], [False, False], [True, True]]
    assert (inputs["attention_mask"].sum(-1) >= 2).all()
    single = processor(images=images[2], text=text[2], boxes=boxes[2])
    length = single["input_ids"].shape[-1]
    assert torch.equal(inputs["input_ids"][2, 0, :length], single["input_ids"][0, 0])
    assert torch.equal(inputs["query_boxes"][2], single["query_boxes"][0])


def test_prompts_alone(processor):
    inputs = processor(text=["Heart", "A nodule"])
    assert inputs["input_ids"].shape[0] == 2 and inputs["input_ids"].ndim == 2
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert processor(text=[["Heart"], ["A nodule", "Heart"]])["query_mask"].tolist() == [[True, False], [True, True]]
    assert processor(text="Heart")["input_ids"].shape[0] == 1


def test_no_queries(processor):
    image = gradient(40, 40)
    assert set(processor(images=image)) == {"pixel_values", "image_frames", "original_sizes"}
    inputs = processor(images=[image, image], text=[], boxes=[])
    assert inputs["input_ids"].shape[:2] == (2, 0)
    assert inputs["query_boxes"].shape == (2, 0, 4)


def test_return_tensors(processor):
    inputs = processor(images=gradient(40, 50), text=["Heart"], boxes=[[6, 6, 20, 30]], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())
    letterbox = processor(images=gradient(40, 50), geometry="letterbox")
    assert letterbox["image_frames"].tolist() == [[0, -5, 50, 45]]


def test_long_prompts_keep_the_end_token(processor):
    inputs = processor(text=["nodule in the right lung " * 20])
    assert inputs["input_ids"].shape == (1, 16)
    assert inputs["input_ids"][0, -1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([""], "Prompt 1 is empty"),
        (["Heart", "  \n"], "Prompt 2 is empty"),
        (["x" * 5000], "5000 characters"),
        (["Heart", None], "NoneType"),
        ([["Heart"], ["Heart"], ["Heart"]], "3 images, but there are 2"),
    ],
)
def test_wrong_prompts(processor, text, message):
    with pytest.raises(ChexInputError, match=message):
        processor(images=[gradient(40, 50)] * 2, text=text)


def test_wrong_boxes_name_image_and_size(processor, tmp_path):
    path = save_image(tmp_path / "scan.png", gradient(40, 50))
    with pytest.raises(ChexInputError, match="box 2 .*scan.png.*50 x 40"):
        processor(images=[path], boxes=[[1, 1, 9, 9], [1, 1, 60, 9]])
    with pytest.raises(ChexInputError, match="image 2"):
        processor(images=[gradient(40, 50)] * 2, boxes=[[[1, 1, 9, 9]], [[9, 1, 1, 9]]])
    with pytest.raises(ChexInputError, match="3 images, but there are 1"):
        processor(images=gradient(40, 50), boxes=[[[1, 1, 9, 9]]] * 3)
    with pytest.raises(ChexInputError, match="give images"):
        processor(text=["Heart"], boxes=[[1, 1, 9, 9]])
    with pytest.raises(ChexInputError, match="Nothing"):
        processor()


def test_a_box_in_the_part_that_was_cropped_away(processor):
    image = gradient(100, 300)
    with pytest.raises(ChexInputError, match="x 100 to 200 and y 0 to 100.*letterbox"):
        processor(images=image, boxes=[[210, 10, 290, 90]])
    inputs = processor(images=image, boxes=[[210, 10, 290, 90]], geometry="letterbox")
    pixels = normalized_to_pixels(inputs["query_boxes"], inputs["image_frames"][:, None])
    assert torch.allclose(pixels, torch.tensor([210.0, 10, 290, 90]), atol=1e-3)


# Post-processing


def make_outputs(processor, regions_xyxy, scores, sizes, mask=None):
    """Outputs whose region boxes are given in normalised corners, (B, Q, R, 4)."""
    corners = torch.tensor(regions_xyxy, dtype=torch.float32)
    region_boxes = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1)
    scores = torch.tensor(scores, dtype=torch.float32)
    return SimpleNamespace(
        region_boxes=region_boxes,
        region_scores=scores,
        query_scores=scores.amax(-1),
        query_mask=None if mask is None else torch.tensor(mask),
    ), torch.tensor(sizes)


def test_explanation_in_pixels(processor):
    regions = [[[[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.6, 0.3]], [[0, 0, 1, 1], [0, 0, 1, 1]]]]
    outputs, sizes = make_outputs(processor, regions, [[[0.6, 0.9], [0.2, 0.4]]], [[100, 160]])
    (result,) = processor.post_process_explanation(
        outputs, sequences=[["Small effusion.", "Nothing."]], target_sizes=sizes, prompts=["Effusion", "Heart"]
    )
    # centre crop of 160 x 100: x from 30 to 130
    assert torch.allclose(result["boxes"], torch.tensor([[40.0, 10, 90, 40], [0, 0, 0, 0]]), atol=1e-3)
    assert torch.allclose(result["region_boxes"][0], torch.tensor([[50.0, 10, 90, 30], [40, 20, 60, 40]]), atol=1e-3)
    assert result["region_scores"][0].tolist() == pytest.approx([0.9, 0.6])
    assert result["region_boxes"][1].shape == (0, 4)
    assert result["present"].tolist() == [True, False]
    assert result["scores"].tolist() == pytest.approx([0.9, 0.4])
    assert result["prompts"] == ["Effusion", "Heart"]
    assert result["sentences"] == ["Small effusion.", "Nothing."]
    assert result["labels"].tolist() == [0, 1]
    (low,) = processor.post_process_explanation(outputs, target_sizes=sizes, threshold=0.3)
    assert low["present"].tolist() == [True, True]
    assert torch.allclose(low["boxes"][1], torch.tensor([30.0, 0, 130, 100]))
    assert low["sentences"] == [None, None] and low["prompts"] == [None, None]
    (first,) = processor.post_process_explanation(outputs, target_sizes=sizes, prompts="Effusion")
    assert first["prompts"] == ["Effusion", None]


def test_explanation_clips_the_letterbox_and_takes_frames_from_the_call(processor):
    outputs, sizes = make_outputs(processor, [[[[0, 0, 1, 1]]]], [[[0.9]]], [[100, 160]])
    frames = processor.image_processor(gradient(100, 160), geometry="letterbox", return_tensors="pt")["image_frames"]
    (result,) = processor.post_process_explanation(outputs, target_sizes=sizes, image_frames=frames)
    assert result["boxes"].tolist() == [[0, 0, 160, 100]]
    (result,) = processor.post_process_explanation(outputs)
    assert result["boxes"].tolist() == [[0, 0, 1, 1]]
    with pytest.raises(ChexInputError, match="2 target_sizes for 1 images"):
        processor.post_process_explanation(outputs, target_sizes=[(1, 1), (2, 2)])


def test_explanation_of_ragged_queries_with_boxes(processor):
    regions = np.tile(np.array([0.25, 0.25, 0.75, 0.75]), (2, 4, 1, 1))
    mask = [[True, True, True, False], [True, False, True, True]]
    outputs, sizes = make_outputs(processor, regions, np.full((2, 4, 1), 0.8), [[40, 40], [40, 40]], mask)
    text = [["Heart", "A nodule"], ["Effusion"]]
    sequences = [["a", "b", "c", ""], ["d", "", "e", "f"]]
    first, second = processor.post_process_explanation(outputs, sequences, sizes, prompts=text)
    assert first["prompts"] == ["Heart", "A nodule", None] and first["sentences"] == ["a", "b", "c"]
    assert second["prompts"] == ["Effusion", None, None] and second["sentences"] == ["d", "e", "f"]
    assert second["labels"].tolist() == [0, 2, 3]


def test_given_boxes_come_back_unchanged(processor):
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(20, 3000, 2).tolist()
        corners = np.sort(rng.random((2, 2)), axis=0) * [width, height]
        box = torch.tensor(corners.reshape(4), dtype=torch.float32)
        if (box[2:] - box[:2]).min() < 2:
            continue
        inputs = processor(
            images=np.zeros((height, width), dtype=np.uint8), boxes=[box.tolist()], geometry="letterbox"
        )
        regions = inputs["query_boxes"][:, :, None].expand(-1, -1, 3, -1)
        outputs = SimpleNamespace(
            region_boxes=regions,
            region_scores=torch.ones(1, 1, 3),
            query_scores=torch.ones(1, 1),
            query_mask=inputs["box_mask"],
        )
        (result,) = processor.post_process_explanation(
            outputs, target_sizes=inputs["original_sizes"], image_frames=inputs["image_frames"]
        )
        assert (result["boxes"][0] - box).abs().max() < 0.5


def test_object_detection(processor):
    regions = [[[[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45]], [[0, 0, 0.5, 0.5], [0.6, 0.6, 1, 1.2]]]]
    outputs, sizes = make_outputs(processor, regions, [[[0.9, 0.8], [0.3, 0.05]]], [[200, 200]])
    (result,) = processor.post_process_object_detection(
        outputs, threshold=0.1, target_sizes=sizes, text_labels=["Effusion", "Heart"]
    )
    assert result["labels"].tolist() == [0, 1]
    assert result["text_labels"] == ["Effusion", "Heart"]
    assert result["scores"].tolist() == pytest.approx([0.9, 0.3])
    assert torch.allclose(result["boxes"], torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 100]]), atol=1e-3)
    (everything,) = processor.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=sizes, nms_threshold=None
    )
    assert everything["scores"].tolist() == pytest.approx([0.9, 0.8, 0.3, 0.05])
    assert torch.allclose(everything["boxes"][3], torch.tensor([120.0, 120, 200, 200]), atol=1e-3)
    (weighted,) = processor.post_process_object_detection(
        outputs, threshold=0.1, target_sizes=sizes, class_scores=torch.tensor([[[0.1, 1.0], [1.0, 1.0]]])
    )
    assert weighted["scores"].tolist() == pytest.approx([0.8, 0.3])


def test_object_detection_skips_padded_queries_and_empty_batches(processor):
    outputs, sizes = make_outputs(
        processor, np.tile([0.1, 0.1, 0.4, 0.4], (2, 2, 1, 1)), np.ones((2, 2, 1)), [[9, 9]] * 2, [[1, 0], [0, 0]]
    )
    first, second = processor.post_process_object_detection(outputs, target_sizes=sizes)
    assert first["labels"].tolist() == [0] and second["labels"].tolist() == []
    assert second["boxes"].shape == (0, 4)


def test_decoding_skips_special_tokens_and_cleans_up(processor):
    tokenizer = processor.generator_tokenizer
    ids = tokenizer("<|endoftext|>The heart is enlarged .<|endoftext|><|endoftext|>", return_tensors="pt")["input_ids"]
    assert processor.decode_sentences(ids[0]) == "The heart is enlarged."
    assert processor.decode_sentences(ids) == ["The heart is enlarged."]
    nested = processor.decode_sentences(ids[None].repeat(2, 3, 1))
    assert nested == [["The heart is enlarged."] * 3] * 2
    assert processor.decode_sentences(ids[None].numpy()) == [["The heart is enlarged."]]
    assert processor.decode_sentences(torch.zeros(2, 0, 5, dtype=torch.long)) == [[], []]


# Saving


@pytest.mark.parametrize("with_generator", [True, False])
def test_save_and_load(processor, tmp_path, with_generator):
    original = processor
    if not with_generator:
        original = ChexProcessor(processor.image_processor, processor.tokenizer)
    original.save_pretrained(tmp_path)
    assert (tmp_path / "generator_tokenizer").is_dir() == with_generator
    loaded = ChexProcessor.from_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(original))
    inputs = {"images": gradient(40, 50), "text": ["Heart"], "boxes": [[6, 6, 20, 30]]}
    expected = original(**inputs)
    for other in (loaded, again):
        assert (other.generator_tokenizer is not None) == with_generator
        result = other(**inputs)
        assert set(result) == set(expected)
        assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert json.loads(loaded.to_json_string()) == json.loads(original.to_json_string())
    if not with_generator:
        with pytest.raises(ChexInputError, match="no generator tokenizer"):
            loaded.decode_sentences(torch.zeros(1, 2, dtype=torch.long))


def test_loading_where_the_package_is_missing(processor, tmp_path):
    """The saved folder carries its own code: a process that cannot import the package reads it too."""
    code = f"""
import json, sys
from processing_chex import ChexImageProcessor, ChexProcessor
ChexImageProcessor.register_for_auto_class()
ChexProcessor.register_for_auto_class()
ChexProcessor.from_pretrained({str(tmp_path / "plain")!r}).save_pretrained({str(tmp_path / "hub")!r})
"""
    processor.save_pretrained(tmp_path / "plain")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    code = f"""
import json
import numpy as np
from transformers import AutoProcessor
try:
    import processing_chex
    raise SystemExit("processing_chex must be hidden here")
except ModuleNotFoundError:
    pass
processor = AutoProcessor.from_pretrained({str(tmp_path / "hub")!r}, trust_remote_code=True)
inputs = processor(images=np.eye(40), text=["Heart"], boxes=[[6, 6, 20, 30]])
print(json.dumps({{name: value.flatten().tolist() for name, value in inputs.items()}}))
print(processor.decode_sentences([[1, 2, 3]]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", HIDE_PACKAGES + code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    expected = processor(images=np.eye(40), text=["Heart"], boxes=[[6, 6, 20, 30]])
    expected = {name: value.flatten().tolist() for name, value in expected.items()}
    assert json.loads(run.stdout.splitlines()[0]) == expected
