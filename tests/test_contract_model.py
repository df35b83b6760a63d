"""`ChexModel` as a model of Transformers: saving, devices, initialisation, attention, compilation, export, int8."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from transformers import TorchAoConfig

from modeling_chex import ChexModel, ChexSentenceGenerator

from .test_modeling import (
    QUERY_FIELDS,
    assert_same,
    assert_same_state,
    lively_model,
    prompt_ids,
    random_boxes,
    random_inputs,
    tiny_config,
    total_loss,
    transformers_log,  # noqa: F401 (a fixture)
)


QUERY_MASK = torch.tensor([[True, True, True, False], [True, False, True, True]])


@pytest.fixture(scope="module")
def model() -> ChexModel:
    return lively_model(tiny_config())


@pytest.fixture(scope="module")
def legacy_model(model) -> ChexModel:
    legacy = ChexModel(tiny_config(attention_mode="legacy")).eval()
    legacy.load_state_dict(model.state_dict())
    return legacy


@pytest.fixture(params=["grouped", "legacy"])
def either_model(request, model, legacy_model) -> ChexModel:
    return {"grouped": model, "legacy": legacy_model}[request.param]


@pytest.fixture
def unrecorded(either_model) -> ChexModel:
    """A model without the hooks that stay once hidden states were recorded, and which stop the compiler."""
    fresh = ChexModel(either_model.config).eval()
    fresh.load_state_dict(either_model.state_dict())
    yield fresh
    torch._dynamo.reset()


def text_and_box_queries(masked: bool = True) -> dict[str, torch.Tensor]:
    queries = random_inputs() | {"query_boxes": random_boxes()}
    return queries | {"query_mask": QUERY_MASK} if masked else queries


def assert_same_answers(actual, expected, atol: float = 1e-5):
    for name in QUERY_FIELDS:
        assert_same(actual[name], expected[name], atol)


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["100KB", "5GB"])
def test_save_and_load(tmp_path, model, dtype, max_shard_size):
    saved = copy.deepcopy(model).to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "100KB")
    loaded, info = ChexModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == dtype
    assert_same_state(loaded, saved)
    with torch.no_grad():
        assert_same_answers(loaded(**text_and_box_queries()), saved(**text_and_box_queries()), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_while_loading(tmp_path, model, dtype):
    model.save_pretrained(tmp_path)
    loaded = ChexModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    with torch.no_grad():
        output = loaded(**text_and_box_queries())
        assert loaded.generate(query_features=output.query_features, max_length=4).shape == (2, 7, 4)
    assert all(torch.isfinite(output[name].float()).all() for name in QUERY_FIELDS)


PARTS = ("vision_model", "visual_projection", "text_model", "text_projection")
PARTS += ("detector", "post_decoder", "sentence_generator")


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        {"": "disk"},
        dict.fromkeys(PARTS, "cpu") | {"sentence_generator": "disk"},
        dict.fromkeys(PARTS, "disk") | {"text_model": "cpu"},
    ],
    ids=["cpu", "auto", "all-cpu", "all-disk", "generator-on-disk", "most-on-disk"],
)
@torch.no_grad()
def test_device_maps(tmp_path, model, device_map):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    loaded = ChexModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", attn_implementation="sdpa"
    )
    offloaded = {
        part.split(".")[0] for part, device in getattr(loaded, "hf_device_map", {}).items() if device == "disk"
    }
    on_meta = {name.split(".")[0] for name, weight in loaded.named_parameters() if weight.device.type == "meta"}
    assert on_meta == (set(PARTS) if offloaded == {""} else offloaded)
    ids, mask = prompt_ids(3)
    inputs = {"pixel_values": random_inputs()["pixel_values"], "input_ids": ids, "attention_mask": mask}
    expected = model(**inputs, query_boxes=random_boxes())
    assert_same_answers(loaded(**inputs, query_boxes=random_boxes()), expected)
    arguments = {"query_features": expected.query_features, "max_length": 6, "eos_token_id": None}
    assert torch.equal(loaded.generate(**arguments), model.generate(**arguments))


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_tensor_is_initialised(stage):
    """Also those that come from the meta device: a sentinel that was put everywhere is gone."""
    with torch.device("meta"):
        networks = [ChexModel(tiny_config(stage))]
        if stage == 3:
            networks.append(ChexSentenceGenerator(tiny_config().generator_config))
    for network in networks:
        network.to_empty(device="cpu")
        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(77)
        network.init_weights()
        # no tiny model has position ids up to 77
        assert not [name for name, tensor in tensors.items() if (tensor == 77).any()]


def test_missing_weights_are_initialised_like_new_ones():
    torch.manual_seed(0)
    loaded = ChexModel.from_pretrained(None, config=tiny_config(), state_dict={})
    for (name, weight), (_, fresh) in zip(
        loaded.named_parameters(), ChexModel(tiny_config()).named_parameters(), strict=True
    ):
        assert torch.isfinite(weight).all(), name
        spread, expected = weight.std(correction=0), fresh.std(correction=0)
        if expected == 0 and weight.numel() > 1:
            assert torch.equal(weight, fresh), name
        elif weight.numel() >= 100:
            assert 0.5 < spread / expected < 2, name


# --- outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_is_deterministic(either_model):
    state = torch.get_rng_state()
    inputs = text_and_box_queries()
    first, second = either_model(**inputs, roi_skip=None), either_model(**inputs, roi_skip=None)
    assert_same_answers(first, second, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_tuples_equal_dictionaries(either_model):
    inputs = text_and_box_queries()
    output = either_model(**inputs, output_hidden_states=True)
    as_tuple = either_model(**inputs, output_hidden_states=True, return_dict=False)
    for name, value in zip(output.keys(), as_tuple, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, output[name]), name
        else:
            tensors = output[name].to_tuple() if name == "image_features" else output[name]
            values = value.to_tuple() if hasattr(value, "to_tuple") else value
            assert all(torch.equal(*pair) for pair in zip(values, tensors, strict=True)), name


# --- attention and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_eager_equals_sdpa_with_gradients(either_model, masked):
    gradients, outputs = [], []
    for implementation in ("eager", "sdpa"):
        network = copy.deepcopy(either_model)
        network.set_attn_implementation(implementation)
        output = network(**text_and_box_queries(masked))
        sum(output[name].square().sum() for name in QUERY_FIELDS if output[name].is_floating_point()).backward()
        outputs.append(output)
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
    assert_same_answers(*outputs)
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert_same(gradients[1][name], gradient, atol=1e-4)


def test_attention_implementation_of_each_part(model, transformers_log):  # noqa: F811
    network = copy.deepcopy(model)
    network.set_attn_implementation("eager")
    parts = [getattr(network.config, name) for name in network.config.sub_configs]
    assert {part._attn_implementation for part in [network.config, *parts]} == {"eager"}
    network.set_attn_implementation({"detector_config": "sdpa"})
    assert network.detector.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert network.post_decoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert network.config.vision_config._attn_implementation == "eager"
    assert not transformers_log.records
    with pytest.raises(ValueError, match="quick"):
        network.set_attn_implementation("quick")
    assert ChexModel(tiny_config()).detector.layers[0].self_attn.config._attn_implementation == "sdpa"
    eager = ChexModel._from_config(tiny_config(), attn_implementation="eager")
    assert eager.post_decoder.layers[0].self_attn.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("mode", ["grouped", "legacy"])
def test_gradient_checkpointing_of_every_part(model, mode):
    plain = ChexModel(tiny_config(dropout=0.0, attention_mode=mode)).train()
    plain.load_state_dict(model.state_dict())
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for name, module in checkpointed.named_modules():
        assert getattr(module, "gradient_checkpointing", True), name
    losses = []
    for network in (plain, checkpointed):
        torch.manual_seed(0)
        loss = total_loss(network)
        loss.backward()
        losses.append(loss.detach())
    assert_same(*losses)
    for parameter, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_same(other.grad, parameter.grad, atol=1e-4)


# --- compilation and export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["prompt_features", "input_ids"])
@torch.no_grad()
def test_compiled_without_graph_breaks(unrecorded, text):
    inputs = text_and_box_queries()
    if text == "input_ids":
        ids, mask = prompt_ids(3)
        inputs = {"pixel_values": inputs["pixel_values"], "input_ids": ids, "attention_mask": mask}
    compiled = torch.compile(unrecorded, backend="eager", fullgraph=True)
    assert_same_answers(compiled(**inputs), unrecorded(**inputs), atol=0)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_to_machine_code(unrecorded):
    """Needs a C++ compiler."""
    inputs = text_and_box_queries()
    compiled = torch.compile(unrecorded, fullgraph=True)
    assert_same_answers(compiled(**inputs), unrecorded(**inputs))


class Detection(nn.Module):
    """What a deployment needs: images and encoded prompts to boxes and scores."""

    def __init__(self, model: ChexModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, prompt_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values=pixel_values, prompt_features=prompt_features, use_post_decoder=False)
        return output.boxes, output.region_boxes, output.region_scores


@torch.no_grad()
def test_exported_detection_has_any_batch_and_number_of_queries(tmp_path, unrecorded):
    detection = Detection(unrecorded)
    shapes = {"pixel_values": {0: Dim.DYNAMIC}, "prompt_features": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    torch.export.save(export(detection, (), random_inputs(2, 4), dynamic_shapes=shapes), tmp_path / "detection.pt2")
    exported = torch.export.load(tmp_path / "detection.pt2").module()
    for num_images, num_queries in ((2, 4), (3, 7), (5, 2)):
        inputs = random_inputs(num_images, num_queries)
        for actual, expected in zip(exported(**inputs), detection(**inputs), strict=True):
            assert actual.shape[:2] == (num_images, num_queries)
            assert_same(actual, expected)


# --- int8 ------------------------------------------------------------------------------------------------------------


def assert_close_to_quantised(quantised: ChexModel, model: ChexModel):
    inputs = text_and_box_queries()
    expected, actual = model(**inputs), quantised(**inputs)
    assert (actual.region_boxes - expected.region_boxes).abs().max() < 0.02
    assert (actual.region_scores - expected.region_scores).abs().max() < 0.02
    cosine = nn.functional.cosine_similarity(actual.query_features, expected.query_features, dim=-1)
    assert cosine[actual.query_mask].min() > 0.99
    assert quantised.generate(query_features=actual.query_features, max_length=5).shape == (2, 7, 5)


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:.*deprecated:DeprecationWarning")
@torch.no_grad()
def test_dynamic_int8(model):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantised.detector.layers[0].fc1).__module__
    assert_close_to_quantised(quantised, model)


@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_loading_in_int8(tmp_path, model, scheme):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is the int8 backend for the CPU")
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(getattr(quantization, scheme)())
    quantised = ChexModel.from_pretrained(tmp_path, quantization_config=config)
    assert type(quantised.detector.layers[0].fc1.weight).__name__ == "Int8Tensor"
    assert_close_to_quantised(quantised, model)
