"""`ChexProcessor` and `ChexImageProcessor` as processors of Transformers: arguments, saving, auto classes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from modeling_chex import save_with_code
from processing_chex import ChexImageProcessor, ChexInputError, ChexProcessor
from training.build_tokenizers import build_tokenizers

from .image_factory import gradient
from .test_modeling import lively_model, tiny_config


SENTENCES = ["No pleural effusion.", "The heart is enlarged.", "A nodule in the right upper lung zone."] * 3


@pytest.fixture
def processor() -> ChexProcessor:
    clip, generator = build_tokenizers(SENTENCES, 600, 300, context_length=16)
    return ChexProcessor(ChexImageProcessor(size=32), clip, generator)


def pixels(processor: ChexImageProcessor, image, **kwargs) -> torch.Tensor:
    return processor(image, return_tensors="pt", **kwargs)["pixel_values"]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rescaling_follows_the_conventions(dtype):
    """The usual factor, or `do_rescale=False` for an image that is scaled already, give the same values."""
    image = gradient(40, 40)
    image = image if dtype == np.uint8 else (image / 255).astype(dtype)
    processor = ChexImageProcessor(size=16, do_normalize=False)
    expected = pixels(processor, image)
    assert 0 <= expected.min() < 0.1 and 0.9 < expected.max() <= 1
    assert torch.equal(pixels(processor, image, do_rescale=True, rescale_factor=1 / 255), expected)
    assert torch.equal(pixels(processor, image, do_rescale=False), expected)
    assert torch.allclose(pixels(processor, image, rescale_factor=-2 / 255), -2 * expected)
    assert torch.allclose(pixels(processor, image, rescale_factor=1), 255 * expected)


def test_arguments_that_cannot_act_are_refused():
    processor = ChexImageProcessor(size=16)
    with pytest.raises(ChexInputError, match="three"):
        pixels(processor, gradient(20, 20), do_convert_rgb=False)
    for name in ("do_resize", "do_center_crop", "do_pad"):
        with pytest.raises(TypeError, match=name):
            pixels(processor, gradient(20, 20), **{name: True})


def test_normalisation_of_each_channel(tmp_path):
    """As lists, the way other models hold them, also in a saved folder."""
    image = gradient(20, 20)
    expected = pixels(ChexImageProcessor(size=16), image)
    listed = ChexImageProcessor(size=16, image_mean=[0.505] * 3, image_std=[0.248] * 3)
    assert torch.equal(pixels(listed, image), expected)
    listed.save_pretrained(tmp_path)
    assert torch.equal(pixels(ChexImageProcessor.from_pretrained(tmp_path), image), expected)
    shifted = pixels(listed, image, image_mean=(0.505, 0.505, 0.753))
    assert torch.equal(shifted[:, :2], expected[:, :2])
    torch.testing.assert_close(shifted[:, 2], expected[:, 2] - 1)
    with pytest.raises(ChexInputError, match="image_std has 2 values"):
        pixels(listed, image, image_std=[0.2, 0.3])


def test_constructor_arguments_are_kept(tmp_path):
    arguments = {"size": 24, "geometry": "letterbox", "do_normalize": False, "rescale_factor": 0.5}
    ChexImageProcessor(**arguments).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ChexImageProcessor
    assert dict(loaded.size) == {"height": 24, "width": 24}
    assert (loaded.geometry, loaded.do_normalize, loaded.rescale_factor) == ("letterbox", False, 0.5)
    overridden = AutoImageProcessor.from_pretrained(tmp_path, geometry="center_crop")
    assert overridden.geometry == "center_crop" and not overridden.do_normalize
    assert ChexImageProcessor().geometry == "center_crop"  # neither touched the class


def test_parts_equal_the_whole(processor):
    image = gradient(50, 40)
    together = processor(images=image, text=["No pleural effusion."])
    assert torch.equal(together["pixel_values"], pixels(processor.image_processor, image))
    alone = processor.tokenizer(["No pleural effusion."], return_tensors="pt")
    assert torch.equal(together["input_ids"][0], alone["input_ids"])
    assert torch.equal(together["attention_mask"][0], alone["attention_mask"])


def test_arguments_reach_their_part(processor):
    image, text = gradient(50, 40), ["heart", "No pleural effusion."]
    flat = processor(images=image, text=text, padding="max_length", max_length=14, rescale_factor=-1.0)
    nested = processor(
        images=image,
        text=text,
        text_kwargs={"padding": "max_length", "max_length": 14},
        images_kwargs={"rescale_factor": -1.0},
    )
    for name, value in flat.items():
        assert torch.equal(nested[name], value), name
    assert flat["input_ids"].shape == (1, 2, 14)
    assert flat["pixel_values"].mean() < 0
    truncated = processor(images=image, text=text, max_length=4)
    assert truncated["input_ids"].shape == (1, 2, 4)
    assert (truncated["input_ids"][..., -1] == processor.tokenizer.eos_token_id).all()


def test_the_auto_class_finds_everything(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))["processor_class"]
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ChexProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    image, text = gradient(50, 40), ["heart", "No pleural effusion."]
    before, after = processor(images=image, text=text), loaded(images=image, text=text)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert ChexProcessor.from_pretrained(again).to_dict() == loaded.to_dict()


def test_the_processor_needs_nothing_of_the_model(processor, tmp_path):
    """In a process that knows no model of ChEX it loads without asking to run code from the folder, or warning."""
    save_with_code(lively_model(tiny_config()), processor, tmp_path)
    code = "import sys; from processing_chex import ChexProcessor; ChexProcessor.from_pretrained(sys.argv[1])"
    process = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_outputs_move_between_types_and_devices(processor):
    inputs = processor(images=[gradient(30, 20)] * 2, text=["heart"], boxes=[1, 2, 9, 12])
    half = inputs.to(torch.bfloat16)
    assert half["pixel_values"].dtype == torch.bfloat16
    assert half["input_ids"].dtype == torch.int64 and half["query_mask"].dtype == torch.bool
    assert inputs.to("cpu")["pixel_values"].device.type == "cpu"
