"""The model at its published size: its keys, and a checkpoint of it that is converted, loaded and run."""

import ast
import gzip
import json
import mmap
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modeling_chex import ChexConfig
from modeling_chex.conversion import official_key, official_shapes

from .conftest import GOLDEN_DIR


GIGABYTE = 1e9
# What one process may need: the model in float32 has 4.2 GB.
MEMORY_LIMIT = 12 * GIGABYTE
CONVERSION_SECONDS = 120


@pytest.fixture(scope="module")
def full_size_keys() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the official stage-3 model."""
    lines = gzip.decompress((GOLDEN_DIR / "keys_fullsize.txt.gz").read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines]
    assert {row[2] for row in rows} == {"float32"}
    return {row[0]: ast.literal_eval(row[1]) for row in rows}


def test_default_configuration_has_the_official_keys_and_shapes(full_size_keys):
    shapes = official_shapes(ChexConfig())
    assert len(full_size_keys) == 829
    assert shapes == full_size_keys
    tied = "txt_decoder.language_model.lm_head.weight"
    count = sum(torch.Size(shape).numel() for key, shape in shapes.items() if key != tied)
    assert count == 1_051_468_550


@pytest.mark.parametrize(("post", "generator", "number"), [(None, None, 460), ({}, None, 532)])
def test_keys_of_earlier_stages(full_size_keys, post, generator, number):
    shapes = official_shapes(ChexConfig(post_decoder_config=post, generator_config=generator))
    assert len(shapes) == number and shapes.items() <= full_size_keys.items()


def test_official_names_are_unique_but_for_stacked_matrices():
    with torch.device("meta"):
        from modeling_chex import ChexModel

        keys = ChexModel(ChexConfig()).state_dict()
    names = [official_key(key) for key in keys if not any(f".{kind}_proj." in key for kind in "kv")]
    assert len(names) == len(set(names)) == 829


# The stand-in for a user's own process, so that memory is measured for each step apart.
RUN_MODEL = """
import json, resource, sys
import torch
from modeling_chex import ChexModel

torch.set_num_threads(1)
model, loading = ChexModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
pixels = torch.zeros(1, 3, 224, 224)
ids = torch.tensor([[49406, 320, 1549, 49407], [49406, 1237, 49407, 49407]])
with torch.inference_mode():
    output = model.eval()(pixel_values=pixels, input_ids=ids)
    sequences = model.generate(query_features=output.query_features, max_length=6)
print(json.dumps({
    "boxes": output.boxes.shape, "finite": bool(output.region_features.isfinite().all()), "tokens": sequences.shape,
    "parameters": sum(p.numel() for p in model.parameters()),
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""
CONVERT = """
import resource, sys
from typer.testing import CliRunner
from space_app.cli import app

result = CliRunner().invoke(app, ["convert", "official", *sys.argv[1:]])
print(result.output, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(result.exit_code)
"""


def write_full_size_checkpoint(path: Path, keys: dict[str, tuple[int, ...]], config: dict) -> None:
    """Random weights in the official layout, written through a memory map: hardly any memory is needed."""
    state_dict = {key: torch.empty(shape) for key, shape in keys.items()}  # never touched, so never allocated
    tied = "txt_decoder.language_model.transformer.wte.weight"
    state_dict["txt_decoder.language_model.lm_head.weight"] = state_dict[tied]
    path.parent.mkdir(parents=True)
    with torch.serialization.skip_data():
        torch.save({"config_dict": config, "state_dict": state_dict, "step": 1}, path)
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        written = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    for key, tensor in written.items():
        flat = tensor.view(-1)
        for piece in flat.split(len(pattern)):
            piece.copy_(pattern[: len(piece)])
        if ".ln_" in key and key.endswith("weight"):
            flat.fill_(1.0)


@pytest.mark.slow
def test_full_size_checkpoint(full_size_keys, tmp_path):
    if shutil.disk_usage(tmp_path).free < 12 * GIGABYTE:
        pytest.skip("needs 12 GB of free disk")
    config = json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))["config"]
    config |= {"d_model": 512, "n_head": 8, "n_post_decoder_layers": 3}
    config["detector"] |= {"n_decoder_layers": 6}
    path = tmp_path / "chex_stage3/run_2024-01-01_00-00-00/checkpoints/checkpoint_000000001.pth"
    try:
        write_full_size_checkpoint(path, full_size_keys, config)
        size = path.stat().st_size
        assert size > 4.2 * GIGABYTE

        model = tmp_path / "model"
        command = [sys.executable, "-c", CONVERT, tmp_path / "chex_stage3", model, "--no-tokenizers"]
        start = time.perf_counter()
        conversion = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        seconds = time.perf_counter() - start
        assert conversion.returncode == 0, conversion.stderr
        converting = int(conversion.stdout.split()[-1])
        assert len(list(model.glob("model-*.safetensors"))) >= 3

        process = subprocess.run([sys.executable, "-c", RUN_MODEL, str(model)], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        answer = json.loads(process.stdout)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(
            f"checkpoint {size / GIGABYTE:.2f} GB; converted in {seconds:.1f} s with {converting / GIGABYTE:.2f} GB "
            f"({converting / size:.2f} of its size); loaded and run with {answer['memory'] / GIGABYTE:.2f} GB"
        )
        assert converting < 1.3 * size
        assert children < MEMORY_LIMIT
        assert seconds < CONVERSION_SECONDS
        assert answer["parameters"] == 1_051_468_550
        assert answer["boxes"] == [1, 2, 4] and answer["finite"] and answer["tokens"][:2] == [1, 2]
    finally:
        shutil.rmtree(tmp_path / "chex_stage3", ignore_errors=True)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
