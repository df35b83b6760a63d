"""`chex convert`: official numbers through converted folders, what is refused, and where training starts."""

import argparse
import builtins
import collections
import datetime
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from typer.testing import CliRunner

from modeling_chex import ChexModel, ChexSentenceGenerator
from modeling_chex.conversion import config_from_official, generator_from_gpt2, official_key, official_shapes
from modeling_chex.official_checkpoint import find_official_checkpoint
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.clip_tokenizer import clip_tokenizer_from_merges
from space_app.cli import app

from .conftest import GOLDEN_DIR
from .image_factory import gradient, save_image

# Every comparison with the recordings runs again, with the model that comes out of `chex convert`.
from .test_golden import (  # noqa: F401
    OUTPUT_NAMES,
    POOLED_TOLERANCE,
    TOLERANCE,
    assert_close,
    image_features,
    offset,
    test_beam_search,
    test_box_queries_equal_encoded_boxes,
    test_classification,
    test_clipped_boxes_one_dimensional_mask_and_random_skip,
    test_decoder_tokens_and_projected_patches,
    test_detection,
    test_detection_from_pixels_and_token_ids_equals_precomputed_features,
    test_encode_boxes,
    test_generation_for_queries,
    test_greedy_generation,
    test_greedy_generation_from_several_features_and_without_cache,
    test_image_encoder,
    test_post_decoder,
    test_prefix,
    test_prompt_encoder,
    test_teacher_forcing,
    test_teacher_forcing_of_a_subset_and_of_several_features,
)
from .test_training import run as run_stage


REFERENCE = GOLDEN_DIR / "reference_checkpoint"
CHECKPOINT = REFERENCE / "chex_stage3/run_2024-01-01_00-00-00/checkpoints/checkpoint_000000100.pth"
# bfloat16 has eight bits of precision. Measured, with the recorded random model (features up to 1.7): boxes 0.0091,
# scores 0.0117, features 0.0130; twice that is allowed.
BF16_TOLERANCE = {"boxes": 0.02, "region_boxes": 0.02, "region_scores": 0.025, "region_features": 0.03}


@pytest.fixture(autouse=True)
def _no_grad(request):
    if "training" in request.node.name:
        yield
    else:
        with torch.no_grad():
            yield


def chex(*command):
    result = CliRunner().invoke(app, ["convert", *map(str, command)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_merges(path: Path, number: int) -> Path:
    """A list of BPE merges in CLIP's format; which merges they are does not matter here."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [f"{first} {second}" for first in letters for second in letters][:number]
    path.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return path


def write_official(folder: Path, state_dict: dict, config_dict: dict, **others) -> Path:
    """A run folder as the official training leaves it; returns the folder of the model."""
    state_dict = collections.OrderedDict(state_dict)
    embedding = "txt_decoder.language_model.transformer.wte.weight"
    if embedding in state_dict and "txt_decoder.language_model.lm_head.weight" in state_dict:
        state_dict["txt_decoder.language_model.lm_head.weight"] = state_dict[embedding]  # tied: one storage
    checkpoint = {
        "config_dict": config_dict,
        "state_dict": state_dict,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "lr_scheduler": {"last_epoch": 3},
        "amp": {},
        "step": 200,
        "results": {},
        "best_results": {},
        "experiment_config": {"name": "chex_stage3"},
    }
    path = folder / "run_2024-05-05_10-00-00/checkpoints/checkpoint_000000200.pth"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint | others, path)
    return folder


def official_golden(golden):
    return {key.removeprefix("state_dict/"): v.clone() for key, v in golden.items() if key.startswith("state_dict/")}


@pytest.fixture(scope="module")
def checkpoint():
    """Content of the small checkpoint that the official training code wrote."""
    return torch.load(CHECKPOINT, weights_only=True)


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    return write_merges(tmp_path_factory.mktemp("merges") / "bpe_simple_vocab_16e6.txt", 300)


@pytest.fixture(scope="module")
def golden_folder(golden, golden_info, merges, tmp_path_factory):
    """The golden weights, written in the official layout and converted into several shards."""
    folder = tmp_path_factory.mktemp("golden")
    source = write_official(folder / "official", official_golden(golden), golden_info["config"])
    options = ["--clip-tokenizer", merges, "--generator-tokenizer", GOLDEN_DIR / "gpt_tokenizer"]
    options += ["--max-shard-size", "2MB"]
    result = chex("official", source, folder / "model", *options)
    assert result.exit_code == 0, result.stderr
    assert f"{golden_info['sizes']['lm_head']} are assumed" in result.stdout
    return folder / "model"


@pytest.fixture(scope="module")
def golden_model(golden_folder):
    model, loading = ChexModel.from_pretrained(golden_folder, output_loading_info=True)
    assert not any(loading.values())
    return model.eval()


@pytest.fixture(scope="module")
def reference_folder(merges, tmp_path_factory):
    """The small official checkpoint, converted by the console script in a process of its own."""
    output = tmp_path_factory.mktemp("reference") / "new" / "model"
    command = [Path(sys.executable).with_name("chex"), "convert", "official", REFERENCE / "chex_stage3", output]
    command += ["--clip-tokenizer", merges, "--generator-tokenizer", REFERENCE / "gpt_tokenizer"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "315,238 parameters" in process.stdout and "2 are assumed" in process.stdout
    assert "Missing" not in process.stdout
    return output


# The numbers


def test_the_checkpoint_of_the_official_code(reference_folder):
    expected = load_file(REFERENCE / "expected_outputs.safetensors")
    info = json.loads((REFERENCE / "expected_outputs.json").read_text(encoding="utf-8"))
    model = ChexModel.from_pretrained(reference_folder).eval()
    assert model.config.attention_mode == "legacy" and model.dtype == torch.float32
    assert_close(model.get_prompt_features(expected["token_ids"]), expected["text_features"])
    output = model(pixel_values=expected["image"][:, None].expand(-1, 3, -1, -1), input_ids=expected["token_ids"])
    compared = [ours for ours, recorded in OUTPUT_NAMES.items() if recorded in expected]
    assert {"boxes", "region_boxes", "region_scores", "query_features"} <= set(compared)
    for ours in compared:
        assert_close(
            output[ours], expected[OUTPUT_NAMES[ours]], POOLED_TOLERANCE if ours.endswith("features") else TOLERANCE
        )
    tokenizer = ChexProcessor.from_pretrained(reference_folder).generator_tokenizer
    sentence = f"{tokenizer.bos_token}{info['decoder_sentence']}{tokenizer.eos_token}"
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"].expand(3, -1)
    loss = model.sentence_generator(input_ids=ids, features=output.query_features[0], labels=ids).loss
    assert_close(loss[None], expected["train_loss"])


def test_the_converted_folder_can_be_asked(reference_folder, tmp_path):
    scan = save_image(tmp_path / "scan.png", gradient(90, 120))
    command = [
        "explain",
        str(scan),
        "--model",
        str(reference_folder),
        "--prompt",
        "Heart",
        "--json",
        "--threshold",
        "0",
    ]
    result = CliRunner().invoke(app, [*command, "--max-length", "6"])
    assert result.exit_code == 0, result.stderr
    (answer,) = json.loads(result.stdout)["images"][0]["answers"]
    assert answer["regions"] and isinstance(answer["sentence"], str)


def test_bfloat16(golden, golden_info, merges, image_features, golden_model, tmp_path):  # noqa: F811
    source = write_official(tmp_path / "official", official_golden(golden), golden_info["config"])
    result = chex("official", source, tmp_path / "model", "--no-tokenizers", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    model = ChexModel.from_pretrained(tmp_path / "model").eval()
    assert {tensor.dtype for tensor in load_file(tmp_path / "model/model.safetensors").values()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    pixels = golden["img/input"][:, None].expand(-1, 3, -1, -1).bfloat16()
    output = model(pixel_values=pixels, input_ids=golden["txt/token_ids"], use_post_decoder=False)
    for name, tolerance in BF16_TOLERANCE.items():
        expected = golden[f"det/skip1_post0/{OUTPUT_NAMES[name]}"]
        if name == "boxes":  # zero where nothing is present, which is a matter of 0.5 or less
            agree = output.present == golden["det/skip1_post0/boxes_present"]
            output.boxes, expected = output.boxes[agree], expected[agree]
            assert agree.float().mean() >= 0.8
        torch.testing.assert_close(output[name].float(), expected, atol=tolerance, rtol=0)


# What is written


def test_files_of_the_folder(reference_folder):
    names = {str(path.relative_to(reference_folder)) for path in reference_folder.rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"processor_config.json", "tokenizer.json", "generator_tokenizer/tokenizer.json"} <= names
    assert not list(reference_folder.parent.glob(".*"))
    generation = GenerationConfig.from_pretrained(reference_folder)
    assert (generation.max_length, generation.num_beams, generation.do_sample) == (128, 1, False)
    assert generation.eos_token_id == generation.pad_token_id == generation.bos_token_id == 299
    card = (reference_folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for phrase in ("not a medical device", "## Licence", "@inproceedings", "ChexModel.from_pretrained", "stage 3"):
        assert phrase in card
    config = json.loads((reference_folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["ChexModel"] and config["dtype"] == "float32"
    processor = ChexProcessor.from_pretrained(reference_folder)
    assert processor.image_processor.size.height == 64 and len(processor.tokenizer) == 576


def test_shards(golden_folder, golden_model):
    index = json.loads((golden_folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = {path.name for path in golden_folder.glob("model-*.safetensors")}
    assert len(files) > 1 and set(index["weight_map"].values()) == files
    assert not (golden_folder / "model.safetensors").exists()
    tensors = {name: tensor for file in sorted(files) for name, tensor in load_file(golden_folder / file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    state_dict = golden_model.state_dict()
    assert state_dict.keys() - tensors.keys() == {"sentence_generator.language_model.lm_head.weight"}
    assert all(torch.equal(tensors[name], state_dict[name]) for name in tensors)


def test_conversion_without_tokenizers(tmp_path):
    result = chex("official", CHECKPOINT, tmp_path / "model", "--no-tokenizers")
    assert result.exit_code == 0
    assert "Missing: the CLIP tokenizer and the GPT-2 tokenizer in generator_tokenizer/" in result.stdout
    assert "chex explain" not in result.stdout
    assert not list((tmp_path / "model").glob("*token*"))
    assert ChexImageProcessor.from_pretrained(tmp_path / "model").size.height == 64
    assert ChexModel.from_pretrained(tmp_path / "model").config.generator_config.eos_token_id == 299
    assert "load_generator_tokenizer" in (tmp_path / "model/README.md").read_text(encoding="utf-8")
    (tmp_path / "scan.png").touch()
    asked = CliRunner().invoke(app, ["explain", str(tmp_path / "scan.png"), "--model", str(tmp_path / "model")])
    assert asked.exit_code == 2 and "no processor_config.json" in asked.stderr


def test_arguments_of_generation_are_kept(checkpoint, tmp_path):
    generation = {"max_length": 14, "num_beams": 3, "use_cache": True, "no_repeat_ngram_size": 2}
    decoder = checkpoint["config_dict"]["txt_decoder"] | {"generation_kwargs": generation}
    config = checkpoint["config_dict"] | {"txt_decoder": decoder}
    source = write_official(tmp_path / "official", checkpoint["state_dict"], config)
    assert chex("official", source, tmp_path / "model", "--no-tokenizers").exit_code == 0
    model = ChexModel.from_pretrained(tmp_path / "model")
    for name, value in generation.items():
        assert getattr(model.generation_config, name) == value
    assert model.generation_config.do_sample is False


def test_heads_come_from_a_language_model_of_the_same_width(tmp_path):
    """Its configuration, beside its tokenizer, is believed if it can be that of the checkpoint."""
    for width, heads, expected in ((32, 4, 4), (64, 4, 2)):
        folder = tmp_path / str(width)
        shutil.copytree(REFERENCE / "gpt_tokenizer", folder)
        GPT2Config(vocab_size=300, n_embd=width, n_layer=1, n_head=heads).save_pretrained(folder)
        options = ["--no-tokenizers", "--generator-tokenizer", folder]
        result = chex("official", CHECKPOINT, tmp_path / f"model{width}", *options)
        assert result.exit_code == 0, result.stderr
        assert ("are assumed" in result.stdout) == (heads != expected)
        config = ChexModel.from_pretrained(tmp_path / f"model{width}").config
        assert config.generator_config.n_head == expected


def test_conversion_is_repeatable_and_replaces_only_on_request(tmp_path):
    output = tmp_path / "model"
    contents = []
    for options in ([], ["--overwrite"]):
        assert chex("official", CHECKPOINT, output, "--no-tokenizers", *options).exit_code == 0
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert contents[0] == contents[1]

    refused = chex("official", CHECKPOINT, output, "--no-tokenizers")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    broken = tmp_path / "broken.pth"
    broken.write_bytes(CHECKPOINT.read_bytes()[:5000])
    assert chex("official", broken, output, "--no-tokenizers", "--overwrite").exit_code == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == contents[0]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "broken.pth"}

    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    for folder, message in ((tmp_path / "home", "no ChEX model"), (broken, "is a file")):
        result = chex("official", CHECKPOINT, folder, "--no-tokenizers", "--overwrite")
        assert result.exit_code == 2 and message in result.stderr
    inside = shutil.copy(CHECKPOINT, output / "checkpoint_000000001.pth")
    result = chex("official", inside, output, "--no-tokenizers", "--overwrite")
    assert result.exit_code == 2 and Path(inside).is_file()


@pytest.mark.parametrize("stage", [1, 2])
def test_earlier_stages(checkpoint, tmp_path, stage):
    dropped = ("txt_decoder.",) if stage == 2 else ("txt_decoder.", "post_decoder.")
    state = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith(dropped)}
    config = checkpoint["config_dict"] | {"txt_decoder": None} | ({"n_post_decoder_layers": 0} if stage == 1 else {})
    source = write_official(tmp_path / "official", state, config)
    assert chex("official", source, tmp_path / "model", "--no-tokenizers").exit_code == 0
    model, loading = ChexModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert model.sentence_generator is None and (model.post_decoder is None) == (stage == 1)
    assert not (tmp_path / "model/generation_config.json").exists()


def test_names_of_a_model_without_dropout_and_of_old_buffers(checkpoint, tmp_path):
    state = {
        key.replace("layers.3.", "layers.2.") if "decoder_layers.3." not in key else key: value
        for key, value in checkpoint["state_dict"].items()
    }
    state["txt_decoder.language_model.transformer.h.0.attn.bias"] = torch.ones(1, 1, 140, 140)
    state["txt_decoder.language_model.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    assert state.keys() ^ checkpoint["state_dict"].keys()
    source = write_official(tmp_path / "official", state, checkpoint["config_dict"] | {"dropout": 0})
    result = chex("official", source, tmp_path / "model", "--no-tokenizers")
    assert result.exit_code == 0, result.stderr
    model = ChexModel.from_pretrained(tmp_path / "model")
    for ours, tensor in model.state_dict().items():
        if "_proj." not in ours and "_projection.weight" not in ours:
            assert torch.equal(tensor, checkpoint["state_dict"][official_key(ours)]), ours


def test_the_newest_checkpoint_of_the_last_run_is_taken(tmp_path):
    for run, names in {
        "run_2023-01-01_00-00-00": ["checkpoint_000000900.pth"],
        "run_2024-01-01_00-00-00": ["checkpoint_000000020.pth", "checkpoint_000000100.pth", "checkpoint_best.pth"],
    }.items():
        for name in names:
            (tmp_path / "chex" / run / "checkpoints" / "detector").mkdir(parents=True, exist_ok=True)
            (tmp_path / "chex" / run / "checkpoints" / name).touch()
            (tmp_path / "chex" / run / "checkpoints" / "detector" / "checkpoint_000009999.pth").touch()
    last = tmp_path / "chex" / "run_2024-01-01_00-00-00"
    for source in (tmp_path / "chex", last, last / "checkpoints", tmp_path):
        assert find_official_checkpoint(source) == last / "checkpoints/checkpoint_000000100.pth"
    best = tmp_path / "other/run_1/checkpoints/checkpoint_best.pth"
    best.parent.mkdir(parents=True)
    best.touch()
    assert find_official_checkpoint(tmp_path / "other") == best


# What is refused


class Payload:
    """Runs `function(*arguments)` when it is unpickled the ordinary way."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def assert_refused(source: Path, tmp_path: Path, *phrases: str, command: str = "official") -> str:
    output = tmp_path / "parent" / "model"
    result = chex(command, source, output, "--no-tokenizers")
    assert result.exit_code == 2, result.stdout
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    for phrase in phrases:
        assert phrase in result.stderr, result.stderr
    assert not output.exists() and not list(output.parent.glob("*")), "something was left behind"
    return result.stderr


@pytest.mark.parametrize("place", ["state_dict", "config_dict", "results", "file", "protocol 4", "legacy format"])
@pytest.mark.parametrize("function", ["system", "eval", "exec", "getattr"])
def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path, place, function):
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()"
    payload = {
        "system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, code),
        "exec": Payload(exec, code),
        "getattr": Payload(getattr, Payload(__import__, "os"), "sep"),
    }[function]
    source, damaged = tmp_path / "checkpoint.pth", dict(checkpoint)
    if place in damaged:
        damaged[place] = dict(damaged[place]) | {"innocent": payload}
    else:
        damaged["optimizer"] = payload
    if place == "file":
        source.write_bytes(pickle.dumps(damaged["optimizer"]))
    else:
        protocol = {"pickle_protocol": 4} if place == "protocol 4" else {}
        torch.save(damaged, source, _use_new_zipfile_serialization=place != "legacy format", **protocol)
    message = assert_refused(source, tmp_path, "was refused", "Nothing of it was run")
    if place in checkpoint:
        assert {"system": "posix.system"}.get(function, function) in message
    assert not marker.exists()


def test_harmless_objects_in_results_are_skipped(checkpoint, tmp_path):
    extras = {
        "step": np.int64(5),
        "results": {"mAP": np.float64(0.5), "curve": np.arange(3.0), "path": Path("somewhere")},
        "best_results": collections.defaultdict(dict, a={"b": np.float32(1)}),
        "experiment_config": {
            "arguments": argparse.Namespace(seed=42, stages=frozenset({1, 2})),
            "started": datetime.datetime.now(datetime.UTC),
            "day": datetime.date(2024, 1, 1),
            "last": collections.deque([0.1, 0.2], maxlen=5),
            "steps": range(3),
        },
    }
    source = write_official(tmp_path / "official", checkpoint["state_dict"], checkpoint["config_dict"], **extras)
    result = chex("official", source, tmp_path / "model", "--no-tokenizers")
    assert result.exit_code == 0, result.stderr
    assert builtins.dict is dict and np.float64(0.5) == 0.5  # no stand-in replaced the real thing


def test_files_that_are_no_checkpoint(checkpoint, tmp_path):
    whole = CHECKPOINT.read_bytes()
    cases = {
        "empty.pth": (b"", "0 bytes"),
        "cut.pth": (whole[: len(whole) // 2], "cut off"),
        "head.pth": (whole[:3], "refused"),
        "text.pth": (b"hello, this is no checkpoint", "refused"),
        "image.pth": (save_image(tmp_path / "x.png", gradient(9, 9)).read_bytes(), "refused"),
        "scrambled.pth": (whole[:200] + bytes(range(256)) * 20 + whole[5320:], "scrambled.pth"),
    }
    for name, (content, phrase) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, tmp_path, str(tmp_path / name), phrase)
    assert_refused(tmp_path / "nowhere", tmp_path, "There is no file or folder", "nowhere")
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", tmp_path, "holds no official checkpoint")
    torch.save(checkpoint["optimizer"], tmp_path / "optimizer.pth")
    assert_refused(tmp_path / "optimizer.pth", tmp_path, "lacks state_dict and config_dict")
    torch.save([1, 2], tmp_path / "list.pth")
    assert_refused(tmp_path / "list.pth", tmp_path, "a list")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "program.pt")
    assert_refused(tmp_path / "program.pt", tmp_path, "TorchScript")


def test_damage_inside_of_a_file(checkpoint, tmp_path):
    """Tensors are read where they lie, so neither one wrong bit nor compression would be noticed by reading."""
    torch.save(checkpoint, tmp_path / "bit.pth")
    content = bytearray((tmp_path / "bit.pth").read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / "bit.pth").write_bytes(content)
    assert_refused(tmp_path / "bit.pth", tmp_path, "bit.pth is damaged", "Bad CRC-32")
    with (
        zipfile.ZipFile(CHECKPOINT) as source,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part))
    assert_refused(tmp_path / "small.pth", tmp_path, "compression")

    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert chex("official", tmp_path / "unchecked.pth", tmp_path / "model", "--no-tokenizers").exit_code == 0


def test_tensors_of_another_kind(checkpoint, tmp_path):
    state = checkpoint["state_dict"]
    key, other = "detector.multiregion_tokens", "txt_encoder.ln_final.bias"
    changes = {
        "int": ({key: state[key].int()}, [f"{key} is of type int32"]),
        "two": ({key: state[key].bool(), other: None}, [f"{key} is of type bool", f"{other} is a NoneType"]),
        "complex": ({key: state[key].to(torch.complex128)}, [f"{key} is of type complex128"]),
        "sparse": ({key: state[key].to_sparse()}, [f"{key} is sparse or without values"]),
        "meta": ({key: state[key].to("meta")}, [f"{key} is sparse or without values"]),
        "number": ({7: state[key]}, ["1 unknown: 7"]),
        "twice": ({"txt_decoder.prefix_proj.layers.2.bias": state[key]}, ["txt_decoder.prefix_proj.layers.2.bias"]),
    }
    for name, (change, phrases) in changes.items():
        path = tmp_path / f"{name}.pth"
        torch.save(dict(checkpoint) | {"state_dict": dict(state) | change}, path)
        assert_refused(path, tmp_path, *phrases)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tied = {tensor.data_ptr(): tensor.to(dtype) for tensor in state.values()}
        source = {"state_dict": {name: tied[tensor.data_ptr()] for name, tensor in state.items()}}
        torch.save(dict(checkpoint) | source, tmp_path / "other.pth")
        assert chex("official", tmp_path / "other.pth", tmp_path / str(dtype), "--no-tokenizers").exit_code == 0
        written = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert torch.equal(written["detector.region_tokens"], state[key].to(dtype).float())


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"act": "no activation"}, "no activation"),
        ({"dropout": 5.0}, "`dropout` must lie between 0 and 1"),
        ({"droppath_prob": 1.0}, "`drop_path` must be at least 0 and less than 1"),
        ({"n_head": 0}, "`num_attention_heads` must be at least 1"),
        ({"d_model": 48}, "d_model is 48, but they are 32 wide"),
        ({"detector": {"multiregions": 4}}, "detector.multiregion_tokens is (3, 32) instead of (4, 32)"),
        ({"detector": {"soft_roi_beta": -1.0}}, "`roi_beta` must be positive"),
        ({"txt_decoder": {"prefix_length_factor": -5}}, "`prefix_length` must be at least 1"),
        ({"txt_decoder": {"generation_kwargs": {"num_beams": 0}}}, "num_beams is 0"),
        ({"txt_decoder": {"generation_kwargs": {"beam": 3}}}, "beam is 3"),
    ],
)
def test_impossible_settings(checkpoint, tmp_path, changes, phrase):
    config = dict(checkpoint["config_dict"])
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    torch.save(dict(checkpoint) | {"config_dict": config}, tmp_path / "checkpoint.pth")
    assert_refused(tmp_path / "checkpoint.pth", tmp_path, phrase)


def test_all_wrong_keys_are_listed(checkpoint, tmp_path):
    state = dict(checkpoint["state_dict"])
    state["detector.surprise"] = state["img_encoder.backbone.transformer.resblocks.7.ln_1.bias"] = torch.ones(2)
    missing = [
        "img_encoder.backbone.conv1.weight",
        "detector.multiregion_tokens",
        "detector.decoder.decoder_layers.0.sa_block.sa.in_proj_weight",
        "post_decoder.gate",
        "txt_decoder.language_model.transformer.h.0.ln_1.weight",
        "txt_encoder.text_projection",
    ]
    for key in missing:
        del state[key]
    shapes = {
        "txt_encoder.ln_final.bias": (5,),
        "detector.bbox_predictor.1.layers.3.weight": (2, 2),
        "post_decoder.post_decoder_layers.0.mha_block.mha.in_proj_bias": (),
    }
    state |= {key: torch.zeros(shape) for key, shape in shapes.items()}
    source = write_official(tmp_path / "official", state, checkpoint["config_dict"])
    message = assert_refused(source, tmp_path, "2 unknown", "6 missing", "of a wrong shape")
    for key in ["detector.surprise", "resblocks.7.ln_1.bias", *missing, *shapes]:
        assert key in message
    assert "txt_encoder.ln_final.bias is (5,) instead of (64,)" in message


def test_any_missing_key_is_named(checkpoint):
    """Each key in turn, without the command line, which would only make it slower."""
    state = checkpoint["state_dict"]
    for key in state:
        without = {name: value for name, value in state.items() if name != key}
        expected = official_shapes(config_from_official(checkpoint["config_dict"], without))
        assert expected.keys() - without.keys() == {key}
        assert without.keys() <= expected.keys()


def test_one_paragraph_from_a_real_process(tmp_path):
    source, marker = tmp_path / "hostile.pth", tmp_path / "executed"
    torch.save({"state_dict": Payload(os.system, f"touch {marker}")}, source, pickle_protocol=4)
    command = [Path(sys.executable).with_name("chex"), "convert", "official", source, tmp_path / "model"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and process.stdout == "" and not marker.exists()
    assert process.stderr.startswith("Error: ") and process.stderr.count("\n") == 1, process.stderr


@pytest.mark.parametrize(
    ("prefixes", "phrase"),
    [
        (("img_encoder.", "txt_encoder.", "detector."), "missing"),
        (("txt_encoder.", "txt_decoder."), "holds no image encoder"),
        ((), "holds no image encoder"),
    ],
)
def test_parts_of_a_model(checkpoint, tmp_path, prefixes, phrase):
    """A stage-1 state dict that says it is of stage 3, a pre-trained generator, and nothing."""
    state = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefixes)}
    source = write_official(tmp_path / "official", state if prefixes else {}, checkpoint["config_dict"])
    assert_refused(source, tmp_path, phrase)


def test_values_that_are_no_numbers(checkpoint, tmp_path):
    state = {key: value.clone() for key, value in checkpoint["state_dict"].items()}
    state["detector.multiregion_tokens"][0, 0] = float("nan")
    state["txt_encoder.ln_final.bias"][3] = float("inf")
    source = write_official(tmp_path / "nan", state, checkpoint["config_dict"])
    assert_refused(source, tmp_path, "detector.multiregion_tokens", "txt_encoder.ln_final.bias", "2 tensors")

    state = {key: value.clone() for key, value in checkpoint["state_dict"].items()}
    state["detector.multiregion_tokens"][0, 0] = 1e5
    source = write_official(tmp_path / "large", state, checkpoint["config_dict"])
    result = chex("official", source, tmp_path / "half", "--no-tokenizers", "--dtype", "float16")
    assert result.exit_code == 2 and "infinite in float16" in result.stderr
    assert chex("official", source, tmp_path / "full", "--no-tokenizers").exit_code == 0


def test_contents_that_do_not_belong(checkpoint, tmp_path):
    state, config = checkpoint["state_dict"], checkpoint["config_dict"]
    head = "txt_decoder.language_model.lm_head.weight"
    cases = {
        "settings": (
            state,
            config | {"detector": config["detector"] | {"clip_pos": True}},
            {},
            "detector.clip_pos is True",
        ),
        "layers": (state, config | {"n_post_decoder_layers": 2}, {}, "post_decoder.post_decoder_layers.1."),
        "heads": (state, config | {"n_head": 5}, {}, "multiple of the 5 attention heads"),
        "strange": (state, config | {"n_head": "two"}, {}, "cannot be used"),
        "endless": (state, config | {"n_post_decoder_layers": 10**9}, {}, "1000000000 blocks"),
        "no tensor": (dict(state) | {"post_decoder.gate": [1.0]}, config, {}, "post_decoder.gate is a list"),
        "no config": (state, None, {}, "lacks config_dict"),
    }
    for name, (state_dict, config_dict, others, phrase) in cases.items():
        assert_refused(write_official(tmp_path / name, state_dict, config_dict, **others), tmp_path, phrase)
    untied = dict(state) | {head: state[head] + 1}
    path = tmp_path / "untied.pth"
    torch.save({"config_dict": config, "state_dict": untied}, path)
    assert_refused(path, tmp_path, "lm_head")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--clip-tokenizer", "{empty}"], "no CLIP tokenizer at"),
        ([], "in the Hub cache"),
        (["--clip-tokenizer", "{merges}"], "no GPT-2 tokenizer at healx/gpt-2-pubmed-medium in the Hub cache"),
        (["--clip-tokenizer", "{merges}", "--generator-tokenizer", "{golden}"], "512 tokens, but"),
        (["--clip-tokenizer", "{merges}", "--generator-tokenizer", "{empty}"], "no GPT-2 tokenizer at"),
        (["--clip-tokenizer", "{short}", "--generator-tokenizer", "{reference}"], "62 BPE merges"),
        (["--no-tokenizers", "--max-shard-size", "big"], "--max-shard-size big"),
        (["--no-tokenizers", "--generator-heads", "5"], "5 attention heads"),
    ],
)
def test_unusable_options(merges, tmp_path, monkeypatch, options, phrase):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    places = {
        "empty": tmp_path / "empty",
        "merges": merges,
        "golden": GOLDEN_DIR / "gpt_tokenizer",
        "reference": REFERENCE / "gpt_tokenizer",
        "short": write_merges(tmp_path / "short.txt", 10),
    }
    result = chex("official", CHECKPOINT, tmp_path / "model", *[option.format(**places) for option in options])
    assert result.exit_code == 2 and phrase in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "model").exists()


def test_debug_shows_the_traceback_of_a_conversion(tmp_path):
    with pytest.raises(ValueError, match="There is no file or folder"):
        chex("official", tmp_path / "nowhere", tmp_path / "model", "--debug")


# Where training starts


def clip_state_dict(golden) -> dict[str, torch.Tensor]:
    """The golden encoders under the names of OpenAI's CLIP."""
    state = {
        key.replace("img_encoder.backbone.", "visual.").removeprefix("txt_encoder."): value
        for key, value in official_golden(golden).items()
        if key.startswith(("img_encoder.", "txt_encoder."))
    }
    scalars = {"input_resolution": 96, "context_length": 77, "vocab_size": 768}
    return state | {"logit_scale": torch.tensor(4.6)} | {name: torch.tensor(v) for name, v in scalars.items()}


@pytest.fixture(scope="module")
def chexzero_folder(golden, merges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chexzero")
    torch.save(clip_state_dict(golden), folder / "best.pt")
    result = chex("chexzero", folder / "best.pt", folder / "model", "--clip-tokenizer", merges)
    assert result.exit_code == 0, result.stderr
    assert "init_from=" in result.stdout
    return folder / "model"


def test_encoders_of_chexzero(chexzero_folder, golden):
    model, loading = ChexModel.from_pretrained(chexzero_folder, output_loading_info=True)
    assert {key.split(".")[0] for key in loading["missing_keys"]} == {"detector"}
    assert not loading["unexpected_keys"] and model.config.attention_mode == "grouped"
    features = model.eval().get_image_features(golden["img/input"][:, None].expand(-1, 3, -1, -1))
    assert_close(features.patch_features, golden["img/patch_features"])
    assert_close(features.pooler_output, golden["img/global_features"])
    assert_close(model.get_prompt_features(golden["txt/token_ids"]), golden["txt/features"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_chexzero_in_half_precision(golden, tmp_path, wrapped):
    state = {key: value.half() for key, value in clip_state_dict(golden).items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "best.pt")
    result = chex("chexzero", tmp_path / "best.pt", tmp_path / "model", "--no-tokenizers")
    assert result.exit_code == 0 and "Missing: the CLIP tokenizer:" in result.stdout
    written = load_file(tmp_path / "model/model.safetensors")
    expected = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].float()
    assert torch.equal(written["vision_model.encoder.layers.0.mlp.fc1.weight"], expected)


def test_files_that_are_no_clip(golden, checkpoint, tmp_path):
    state = clip_state_dict(golden)
    torch.save(state | {"visual.attnpool.k_proj.weight": torch.ones(2)}, tmp_path / "resnet.pt")
    assert_refused(tmp_path / "resnet.pt", tmp_path, "1 unknown: visual.attnpool.k_proj.weight", command="chexzero")
    del state["ln_final.bias"], state["visual.proj"]
    torch.save(state, tmp_path / "part.pt")
    assert_refused(tmp_path / "part.pt", tmp_path, "2 missing: visual.proj, ln_final.bias", command="chexzero")
    torch.save(clip_state_dict(golden) | {"visual.ln_pre.bias": torch.full((128,), torch.inf)}, tmp_path / "inf.pt")
    assert_refused(tmp_path / "inf.pt", tmp_path, "infinite in float32: visual.ln_pre.bias", command="chexzero")
    assert_refused(CHECKPOINT, tmp_path, "no CLIP state dict", command="chexzero")
    assert_refused(tmp_path / "nowhere.pt", tmp_path, "There is no file", command="chexzero")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 with the recorded tokenizer, saved as transformers does today."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=512, n_positions=160, n_embd=32, n_layer=2, n_head=2, bos_token_id=511, eos_token_id=511
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    files = {name: str(GOLDEN_DIR / "gpt_tokenizer" / name) for name in ("vocab.json", "merges.txt")}
    GPT2Tokenizer(vocab=files["vocab.json"], merges=files["merges.txt"]).save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_in_the_old_format(gpt2, tmp_path, prefix):
    """The files of 2019: a pickle, causal masks as buffers, no output layer, names with or without prefix."""
    folder, model = gpt2
    shutil.copy(folder / "config.json", tmp_path)
    old = {prefix + key: value for key, value in model.transformer.state_dict().items()}
    for layer in range(2):
        old[f"{prefix}h.{layer}.attn.bias"] = torch.ones(160, 160).tril()[None, None]
        old[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(old, tmp_path / "pytorch_model.bin")
    generator = generator_from_gpt2(str(tmp_path), feature_size=64, prefix_length=3)
    assert generator.config.feature_size == 64 and generator.config.n_layer == 2
    for key, value in model.state_dict().items():
        assert torch.equal(generator.language_model.state_dict()[key], value), key
    assert generator.generate(torch.randn(2, 64), max_length=5).shape[0] == 2


def test_sources_that_are_no_gpt2(gpt2, chexzero_folder, tmp_path):
    with pytest.raises(ValueError, match="There is no GPT-2 at"):
        generator_from_gpt2(str(tmp_path))
    with pytest.raises(ValueError, match="'chex', not 'gpt2'"):
        generator_from_gpt2(str(chexzero_folder))
    folder, model = gpt2
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"h.0.ln_1.weight": torch.ones(32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks weights.*h.0.attn.c_attn.weight"):
        generator_from_gpt2(str(tmp_path))


def test_training_starts_from_chexzero_and_gpt2(chexzero_folder, gpt2, tmp_path):
    """One step of each stage, from converted encoders and a GPT-2 with its own tokenizer, to a model that answers."""
    folder, model = gpt2
    runs = tmp_path / "runs"
    shutil.copytree(chexzero_folder, runs / "pretrain_clip" / "model")
    common = ["optimization.max_steps=1", "optimization.learning_rate=1.0e-8"]

    def run(stage, *overrides):
        return run_stage(tmp_path, stage, runs / stage, *common, *overrides)

    run("stage1")
    trained = load_file(runs / "stage1/model/model.safetensors")
    for name, start in load_file(chexzero_folder / "model.safetensors").items():
        torch.testing.assert_close(trained[name], start, atol=1e-6, rtol=0)

    choices = "model={prefix_hidden_size: 32, max_generation_length: 48}"
    run("pretrain_generator", f"generator_init={folder}", choices)
    generator = ChexSentenceGenerator.from_pretrained(runs / "pretrain_generator/model")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(generator.language_model.state_dict()[key], value, atol=1e-6, rtol=0)

    run("stage2", "model={post_decoder_config: {num_layers: 1}}")
    assert ChexProcessor.from_pretrained(runs / "stage2/model").generator_tokenizer is None
    run("stage3")
    processor = ChexProcessor.from_pretrained(runs / "stage3/model")
    assert processor.generator_tokenizer.get_vocab() == GPT2Tokenizer.from_pretrained(folder).get_vocab()
    assert ChexModel.from_pretrained(runs / "stage3/model").config.generator_config.eos_token_id == 511


def test_training_without_a_tokenizer_for_sentences(chexzero_folder, gpt2, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(chexzero_folder, runs / "pretrain_clip" / "model")
    for overrides, message in (
        (["generator_init=null"], "set `generator_init` to a GPT-2"),
        (["generator_init=nowhere", "model={}"], "nowhere"),
        ([f"generator_init={gpt2[0]}", "model={n_layer: 3}"], "unknown key 'n_layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage(tmp_path, "pretrain_generator", tmp_path / "out", *overrides)


def test_merges_are_read_packed_or_not(merges, tmp_path):
    import gzip

    packed = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    packed.write_bytes(gzip.compress(merges.read_bytes()))
    tokenizers = [clip_tokenizer_from_merges(path, 514 + 200) for path in (merges, packed)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert len(tokenizers[0]) == 714 and tokenizers[0].eos_token_id == 713
