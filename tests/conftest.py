"""Shared fixtures: the golden recordings and the model that holds their weights."""

import json
import os
from pathlib import Path

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

GOLDEN_DIR = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Weights (`state_dict/<official key>`), inputs and outputs recorded from the official implementation."""
    from safetensors.torch import load_file

    return load_file(GOLDEN_DIR / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_info() -> dict:
    return json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_model(golden, golden_info):
    """`ChexModel` with the recorded weights, float32, eval mode, `attention_mode="legacy"`."""
    from modeling_chex import ChexModel
    from modeling_chex.conversion import config_from_official, convert_official_state_dict

    prefix = "state_dict/"
    official = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    config = config_from_official(golden_info["config"], official, generator_heads=golden_info["sizes"]["lm_head"])
    model = ChexModel(config)
    model.load_state_dict(convert_official_state_dict(official), strict=True)
    return model.eval()
