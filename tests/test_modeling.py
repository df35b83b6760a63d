"""`ChexModel` on tiny random configurations: what a `PreTrainedModel` promises, masks, empty inputs, errors."""

import copy
import json
import logging
import math
import pickle
from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPTextConfig, CLIPVisionConfig, GPT2Config

from modeling_chex import (
    ChexConfig,
    ChexDetectorConfig,
    ChexGeneratorConfig,
    ChexImageFeatures,
    ChexModel,
    ChexPostDecoderConfig,
)
from modeling_chex.conversion import convert_official_state_dict
from modeling_chex.post_decoder import ChexPostDecoder
from modeling_chex.prompt_detector import (
    ChexAttention,
    ChexDecoderLayer,
    ChexLayerScale,
    ChexMLP,
    ChexPatchProjection,
    ChexPromptDetector,
)
from modeling_chex.sentence_generator import ChexPrefixProjection


END_OF_TEXT = 59
QUERY_FIELDS = (
    "boxes",
    "region_boxes",
    "region_scores",
    "query_scores",
    "query_features",
    "region_features",
    "present",
    "region_present",
)


def tiny_config(stage: int = 3, dropout: float | None = None, **overrides) -> ChexConfig:
    """A model of some 60 k parameters with 4x4 patches; `dropout` replaces every random rate."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": END_OF_TEXT - 1,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
    }
    block = {"num_attention_heads": 4, "intermediate_size": 32}
    detector = block | {"num_layers": 2}
    post_decoder = block | {"num_layers": 1}
    generator = {
        "vocab_size": 40,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 39,
        "eos_token_id": 39,
        "prefix_length": 3,
        "prefix_hidden_size": 24,
        "max_generation_length": 12,
    }
    if dropout is not None:
        rates = {"dropout": dropout, "attention_dropout": dropout, "drop_path": dropout}
        detector |= rates | {"roi_skip_dropout": dropout}
        post_decoder |= rates | {"region_drop": dropout}
        generator |= dict.fromkeys(("prefix_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    parts = {
        "vision_config": vision,
        "text_config": text,
        "detector_config": detector,
        "post_decoder_config": post_decoder if stage >= 2 else None,
        "generator_config": generator if stage >= 3 else None,
        "projection_dim": 16,
    }
    return ChexConfig(**parts | overrides)


def lively_model(config: ChexConfig, seed: int = 0) -> ChexModel:
    """
    A random model in which everything acts on the result: the initial weights alone have a closed gate, zero biases
    and branches that LayerScale makes small.
    """
    torch.manual_seed(seed)
    model = ChexModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, ChexLayerScale):
                module.lambda1.fill_(1.0)
        if model.post_decoder is not None:
            model.post_decoder.gate.fill_(0.7)
    return model


@pytest.fixture(scope="module")
def model() -> ChexModel:
    return lively_model(tiny_config())


@pytest.fixture(scope="module")
def legacy_model(model) -> ChexModel:
    legacy = ChexModel(tiny_config(attention_mode="legacy")).eval()
    legacy.load_state_dict(model.state_dict())
    return legacy


@pytest.fixture
def either_model(request, model, legacy_model) -> ChexModel:
    return {"grouped": model, "legacy": legacy_model}[request.param]


both_modes = pytest.mark.parametrize("either_model", ["grouped", "legacy"], indirect=True)


@pytest.fixture
def transformers_log(caplog):
    """The records of the transformers logger, which does not propagate to the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def random_inputs(num_images: int = 2, num_queries: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(num_images, 3, 32, 32, generator=generator),
        "prompt_features": torch.randn(num_images, num_queries, 16, generator=generator),
    }


def random_boxes(num_images: int = 2, num_boxes: int = 3, seed: int = 2) -> torch.Tensor:
    draws = torch.rand(num_images, num_boxes, 4, generator=torch.Generator().manual_seed(seed))
    return torch.cat([0.25 + 0.5 * draws[..., :2], 0.1 + 0.4 * draws[..., 2:]], dim=-1)


def prompt_ids(num_prompts: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.arange(num_prompts) % 4 + 3
    ids = torch.randint(0, 50, (num_prompts, 8), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = END_OF_TEXT - 1
    mask = torch.arange(8) < lengths[:, None]
    ids[torch.arange(8) >= lengths[:, None] - 1] = END_OF_TEXT
    return ids, mask.long()


def assert_same(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5):
    assert actual.shape == expected.shape
    if expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=atol, atol=atol)
    else:
        assert torch.equal(actual, expected)


def assert_same_state(actual: nn.Module, expected: nn.Module):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# --- numbers ---------------------------------------------------------------------------------------------------------


def golden_shapes(width: int = 16, blocks: int = 2, regions: int = 3) -> dict[str, tuple[int, ...]]:
    """Shapes of the official detector and post decoder."""

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name: str, outputs: int, inputs: int = width) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = {"detector.multiregion_tokens": (regions, width), "post_decoder.gate": (1,)}
    shapes |= norm("detector.bbox_predictor.0") | linear("detector.bbox_predictor.1.layers.0", width)
    shapes |= linear("detector.bbox_predictor.1.layers.3", 4)
    shapes |= norm("detector.patch_projector.0") | linear("detector.patch_projector.1.layers.0", width)
    shapes |= norm("detector.out_projector.0") | linear("detector.out_projector.1.layers.0", 4 * width)
    shapes |= linear("detector.out_projector.1.layers.3", width, 4 * width)
    shapes |= linear("detector.multiregion_weight_mlp.layers.0", width)
    shapes |= linear("detector.multiregion_weight_mlp.layers.3", 1)
    shapes |= norm("post_decoder.ln_gate")
    for stem in ("detector.decoder.decoder_layers", "post_decoder.post_decoder_layers"):
        for block in (f"{stem}.{index}" for index in range(blocks)):
            for name in ("norm_sa", "norm_mha", "norm_encoder", "norm_ff"):
                shapes |= norm(f"{block}.{name}")
            for attention in ("sa_block.sa", "mha_block.mha"):
                shapes |= {f"{block}.{attention}.in_proj_weight": (3 * width, width)}
                shapes |= {f"{block}.{attention}.in_proj_bias": (3 * width,)}
                shapes |= linear(f"{block}.{attention}.out_proj", width)
            for name in ("ls_sa", "ls_mha", "ls_ff"):
                shapes |= {f"{block}.{name}.gamma": (width,)}
            shapes |= linear(f"{block}.ff_block.layers.0", 4 * width)
            shapes |= linear(f"{block}.ff_block.layers.3", width, 4 * width)
    return shapes


def golden_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = 0.5 * torch.cos(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + len(key))
    if len(shape) == 1 and key.endswith("weight"):
        values += 1
    return values.float().view(shape)


def sines(shape: tuple[int, ...], phase: float) -> torch.Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.1 * index**1.1 + phase).float().view(shape)


def golden_parts(attention_mode: str) -> tuple[ChexPromptDetector, ChexPostDecoder]:
    block = {"num_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ChexConfig(
        detector_config=block,
        post_decoder_config=block,
        generator_config=None,
        projection_dim=16,
        attention_mode=attention_mode,
    )
    weights = convert_official_state_dict({key: golden_weight(key, shape) for key, shape in golden_shapes().items()})
    parts = ChexPromptDetector(config).eval(), ChexPostDecoder(config).eval()
    for name, part in zip(("detector.", "post_decoder."), parts, strict=True):
        part.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}, strict=True)
    return parts


def assert_golden(tensor: torch.Tensor, total: float, absolute: float | None, *first: float):
    assert float(tensor.double().sum()) == pytest.approx(total, abs=5e-4)
    assert float(tensor.double().abs().sum()) == pytest.approx(total if absolute is None else absolute, abs=5e-4)
    assert tensor.flatten()[: len(first)].tolist() == pytest.approx(first, abs=1e-5)


IMAGE = (sines((2, 7, 7, 16), 0), 0.3 * sines((7, 7, 16), 1)[None])
PROMPTS = sines((2, 3, 16), 3)


@pytest.mark.parametrize("mode", ["grouped", "legacy"])
@torch.no_grad()
def test_golden_detector_without_mask(mode):
    detector, _ = golden_parts(mode)
    output = detector(*IMAGE, PROMPTS, roi_skip=True)
    assert_golden(output["query_features"], -15.92958, 338.14562, -3.365751, -5.775257, -4.489961)
    assert_golden(output["boxes"], 10.33236, None, 0.900758, 0.342619, 0.110709)
    assert_golden(output["region_boxes"], 28.37780, None, 0.938871, 0.288631, 0.034483)
    assert_golden(output["region_scores"], 17.24905, None, 0.974549, 0.962492, 0.974145)
    assert_golden(output["query_scores"], 5.76402, None, 0.970427, 0.906195, 0.967775)
    output = detector(*IMAGE, PROMPTS, roi_skip=False)
    assert_golden(output["query_features"], -14.85164, 305.59907, -2.965110, -5.278367, -4.210956)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.6, 0.2, 0.5], [0.7, 0.2, 0.1, 0.1]]).expand(2, -1, -1)
    features = detector.pool(IMAGE[0], boxes)
    assert_golden(features, -14.71745, 310.77761, -2.973211, -5.276967, -4.200940)


@torch.no_grad()
def test_golden_detector_with_mask():
    detector, _ = golden_parts("legacy")
    output = detector(*IMAGE, PROMPTS, torch.tensor([[True, True, True], [True, True, False]]))
    assert_golden(output["query_features"], -13.20541, 278.60867, -3.312492, -5.651437, -4.373858)
    assert_golden(output["region_boxes"], 23.70036, None, 0.940990, 0.291487, 0.033436)


@torch.no_grad()
def test_golden_post_decoder():
    source = torch.cat([(IMAGE[0] + IMAGE[1]).flatten(1, 2), sines((2, 16), 2)[:, None]], dim=1)
    queries = sines((2, 3, 16), 4)[:, :, None]
    tokens = torch.cat([queries, sines((2, 3, 3, 16), 5)], dim=2)
    _, legacy = golden_parts("legacy")
    _, grouped = golden_parts("grouped")
    assert_golden(legacy(tokens, source)[:, :, 0], 13.48214, 71.55995, 0.678560, -0.636563, -0.587098)
    assert_golden(grouped(tokens, source)[:, :, 0], 13.49959, 71.02575, 0.681311, -0.635133, -0.590560)
    for post_decoder in (legacy, grouped):
        assert_golden(post_decoder(queries, source), 13.93132, 69.02371, 0.686681, -0.650737, -0.592882)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert_golden(legacy(queries, source, everything), 13.49662, 71.39458, 0.663000, -0.643064, -0.570510)


def test_full_size_parameters():
    with torch.device("meta"):
        model = ChexModel(ChexConfig())

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert count(model.vision_model, model.visual_projection) == 87_849_216
    assert count(model.text_model, model.text_projection) == 63_428_096
    assert count(model.detector) == 28_134_405
    assert count(model.post_decoder) == 12_620_801
    assert count(model.sentence_generator) == 859_436_032
    assert count(model.sentence_generator.language_model) == 354_823_168
    assert count(model) == 1_051_468_550
    assert not any("logit_scale" in name for name, _ in model.named_parameters())


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_config_round_trips(tmp_path, stage):
    config = tiny_config(stage, attention_mode="legacy")
    config.save_pretrained(tmp_path)
    for other in (
        ChexConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        ChexConfig.from_dict(config.to_dict()),
        ChexConfig(**json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ):
        assert isinstance(other, ChexConfig)
        assert (other.post_decoder_config is None) == (stage < 2)
        assert (other.generator_config is None) == (stage < 3)
        assert other.attention_mode == "legacy"
        assert other.detector_config.num_layers == 2
        ours, theirs = config.to_dict(), other.to_dict()
        for name in ("vision_config", "text_config", "detector_config", "post_decoder_config", "generator_config"):
            assert ours[name] == theirs[name]


def test_config_parts_may_be_dicts_or_configs():
    plain = tiny_config()
    built = ChexConfig(
        vision_config=CLIPVisionConfig(**plain.vision_config.to_dict()),
        text_config=CLIPTextConfig(**plain.text_config.to_dict()),
        detector_config=ChexDetectorConfig(**plain.detector_config.to_dict()),
        post_decoder_config=ChexPostDecoderConfig(**plain.post_decoder_config.to_dict()),
        generator_config=ChexGeneratorConfig(**plain.generator_config.to_dict()),
        projection_dim=16,
    )
    assert built.to_dict() == plain.to_dict()

    language_model = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, bos_token_id=39, eos_token_id=39)
    generator = ChexConfig(generator_config=language_model, projection_dim=64).generator_config
    assert isinstance(generator, ChexGeneratorConfig)
    assert generator.model_type == "chex_sentence_generator"
    assert (generator.n_embd, generator.vocab_size, generator.eos_token_id) == (32, 40, 39)
    assert (generator.feature_size, generator.prefix_length, generator.pad_token_id) == (64, 5, 39)


def test_stage_can_be_changed_while_loading_the_config(tmp_path):
    tiny_config(1).save_pretrained(tmp_path)
    config = ChexConfig.from_pretrained(tmp_path, post_decoder_config={"num_layers": 1, "num_attention_heads": 4})
    assert isinstance(config.post_decoder_config, ChexPostDecoderConfig)
    assert config.post_decoder_config.num_layers == 1
    assert config.generator_config is None
    tiny_config(3).save_pretrained(tmp_path)
    config = ChexConfig.from_pretrained(tmp_path, post_decoder_config={"num_layers": 5}, generator_config=None)
    assert config.post_decoder_config.num_layers == 5
    assert config.post_decoder_config.num_attention_heads == 4  # what is there is updated
    assert config.generator_config is None


def test_config_tells_the_generator_from_the_prompt_encoder():
    config = tiny_config()
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(encoder=True) is config.text_config
    assert config.get_text_config(decoder=True) is config.generator_config
    assert tiny_config(1).get_text_config(decoder=True).model_type == "clip_text_model"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_mode": "global"}, "`attention_mode` must be 'grouped' or 'legacy', got 'global'"),
        ({"projection_dim": 18}, "`projection_dim` .18. must be a multiple of the 4 attention heads"),
        ({"post_decoder_config": {"num_attention_heads": 3}}, "3 attention heads of `post_decoder_config`"),
        ({"generator_config": {"feature_size": 8}}, "`generator_config.feature_size` .8. must be"),
        ({"projection_dim": "wide"}, "projection_dim"),
        ({"detector_config": {"num_layers": 1.5}}, "num_layers"),
    ],
)
def test_config_rejects(overrides, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**overrides)


# --- weights ---------------------------------------------------------------------------------------------------------


def assert_initialised(part: nn.Module):
    """The initialisation of the official implementation."""
    for name, module in part.named_modules():
        if isinstance(module, ChexAttention):
            bound = (6 / (4 * module.q_proj.in_features)) ** 0.5
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                assert 0.8 * bound < projection.weight.abs().max() <= bound, name
                assert (projection.bias == 0).all(), name
            assert 0.8 < module.out_proj.weight.abs().max() * module.out_proj.in_features**0.5 <= 1, name
            assert (module.out_proj.bias == 0).all(), name
        elif isinstance(module, ChexLayerScale):
            assert torch.equal(module.lambda1, torch.full_like(module.lambda1, 0.1)), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, ChexMLP | ChexDecoderLayer | ChexPrefixProjection | ChexPatchProjection):
            for linear in (child for child in module.children() if isinstance(child, nn.Linear)):
                bound = linear.in_features**-0.5
                assert 0.5 * bound < linear.weight.abs().max() <= bound * 1.0001, name
                assert 0 < linear.bias.abs().max() <= bound * 1.0001, name
        elif isinstance(module, ChexPromptDetector):
            deviation = module.region_tokens.std().item()
            assert deviation == pytest.approx(module.region_tokens.shape[-1] ** -0.5, rel=0.4)
        elif isinstance(module, ChexPostDecoder):
            assert module.gate.tolist() == [0.0]


def assert_language_model_initialised(model: ChexModel):
    blocks = model.sentence_generator.language_model.transformer
    assert blocks.wte.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert blocks.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert blocks.h[0].attn.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.15)  # two layers


def test_initialisation():
    torch.manual_seed(0)
    model = ChexModel(tiny_config())
    for part in (model.detector, model.post_decoder, model.sentence_generator.prefix_projection):
        assert_initialised(part)
    for projection in (model.visual_projection, model.text_projection):
        assert projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.15)
    assert_language_model_initialised(model)


def test_save_and_load_in_shards(tmp_path, model, transformers_log):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    stored = set()
    for file in files:
        with safe_open(file, "pt") as shard:
            stored |= set(shard.keys())
    assert stored == model.state_dict().keys() - {"sentence_generator.language_model.lm_head.weight"}

    loaded, info = ChexModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(loaded, model)
    assert not loaded.training
    language_model = loaded.sentence_generator.language_model
    assert language_model.lm_head.weight is language_model.transformer.wte.weight
    inputs = random_inputs()
    assert torch.equal(loaded(**inputs).region_boxes, model(**inputs).region_boxes)
    assert not [record.message for record in transformers_log.records if record.levelno >= logging.WARNING]

    automatic = AutoModel.from_pretrained(tmp_path)
    assert isinstance(automatic, ChexModel)
    assert_same_state(automatic, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_half_precision(tmp_path, model, dtype):
    model.save_pretrained(tmp_path)
    loaded = ChexModel.from_pretrained(tmp_path, dtype=dtype)
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, expected[name].to(dtype)), name
    loaded.save_pretrained(tmp_path / "half")
    assert_same_state(ChexModel.from_pretrained(tmp_path / "half", dtype="auto"), loaded)


def test_each_stage_initialises_only_its_new_parts(tmp_path):
    model = lively_model(tiny_config(1))
    for stage, new in ((2, "post_decoder."), (3, "sentence_generator.")):
        folder = tmp_path / str(stage)
        model.save_pretrained(folder)
        torch.manual_seed(stage)
        larger, info = ChexModel.from_pretrained(folder, config=tiny_config(stage), output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert info["missing_keys"]
        assert all(key.startswith(new) for key in info["missing_keys"])
        old = model.state_dict()
        for name, tensor in larger.state_dict().items():
            assert name.startswith(new) == (name not in old)
            if name in old:
                assert torch.equal(tensor, old[name]), name
        assert_initialised(larger.post_decoder if stage == 2 else larger.sentence_generator.prefix_projection)
        model = larger
    language_model = model.sentence_generator.language_model
    assert language_model.lm_head.weight is language_model.transformer.wte.weight
    assert_language_model_initialised(model)


def test_deep_copy_and_pickled_output(model):
    twin = copy.deepcopy(model)
    assert_same_state(twin, model)
    assert twin.detector.region_tokens is not model.detector.region_tokens
    language_model = twin.sentence_generator.language_model
    assert language_model.lm_head.weight is language_model.transformer.wte.weight
    with torch.no_grad():
        output = twin(**random_inputs(), query_boxes=random_boxes())
    restored = pickle.loads(pickle.dumps(output))
    assert restored.keys() == output.keys()
    for name in QUERY_FIELDS:
        assert torch.equal(restored[name], output[name])
    assert isinstance(restored.image_features, ChexImageFeatures)
    assert torch.equal(restored.image_features.patch_features, output.image_features.patch_features)


# --- queries, masks, batches -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_shapes(model):
    ids, mask = prompt_ids(4)
    output = model(
        pixel_values=random_inputs()["pixel_values"], input_ids=ids, attention_mask=mask, query_boxes=random_boxes()
    )
    shapes = {name: tuple(output[name].shape) for name in (*QUERY_FIELDS, "query_mask")}
    assert shapes == {
        "boxes": (2, 7, 4),
        "region_boxes": (2, 7, 3, 4),
        "region_scores": (2, 7, 3),
        "query_scores": (2, 7),
        "query_features": (2, 7, 16),
        "region_features": (2, 7, 3, 16),
        "present": (2, 7),
        "region_present": (2, 7, 3),
        "query_mask": (2, 7),
    }
    assert output.query_mask.all()
    features = output.image_features
    assert features.patch_features.shape == (2, 4, 4, 16)
    assert features.position_embeddings.shape == (1, 4, 4, 16)
    assert features.pooler_output.shape == (2, 16)
    assert features.last_hidden_state.shape == (2, 17, 32)
    as_tuple = model(**random_inputs(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].shape == (2, 4, 4)


@torch.no_grad()
def test_grouped_answers_depend_on_nothing_else_in_the_batch(model):
    inputs = random_inputs(3, 5)
    together = model(**inputs)
    for image in range(3):
        for query in (0, 4):
            alone = model(
                pixel_values=inputs["pixel_values"][image : image + 1],
                prompt_features=inputs["prompt_features"][image : image + 1, query : query + 1],
            )
            for name in QUERY_FIELDS:
                assert_same(alone[name][0, 0], together[name][image, query])


@torch.no_grad()
def test_legacy_answers_depend_on_the_other_queries(legacy_model):
    inputs = random_inputs(1, 5)
    everything = torch.ones(1, 5, dtype=torch.bool)
    together = legacy_model(**inputs, query_mask=everything, use_post_decoder=False)
    inputs["prompt_features"] = inputs["prompt_features"][:, :1]
    alone = legacy_model(**inputs, query_mask=everything[:, :1], use_post_decoder=False)
    assert (alone.region_boxes[0, 0] - together.region_boxes[0, 0]).abs().max() > 1e-4
    # without a mask the detector groups also in this mode, and the post decoder does not
    unmasked = legacy_model(**random_inputs(1, 5), use_post_decoder=False)
    assert_same(legacy_model(**inputs, use_post_decoder=False).query_features[0, 0], unmasked.query_features[0, 0])
    unmasked, alone = legacy_model(**random_inputs(1, 5)), legacy_model(**inputs)
    assert (alone.query_features[0, 0] - unmasked.query_features[0, 0]).abs().max() > 1e-4


@torch.no_grad()
def test_padding_changes_nothing_for_valid_queries(model):
    inputs, boxes = random_inputs(2, 3), random_boxes()
    ragged = torch.tensor([[True, True, True], [True, False, False]])
    plain = model(**inputs, query_boxes=boxes)
    inputs["prompt_features"] = torch.cat([inputs["prompt_features"], 5 * torch.randn(2, 2, 16)], dim=1)
    query_mask = torch.cat([ragged, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    padded = model(**inputs, query_mask=query_mask, query_boxes=boxes, box_mask=ragged)
    mask = torch.cat([query_mask, ragged], dim=1)
    assert torch.equal(padded.query_mask, mask)
    kept = torch.tensor([0, 1, 2, 5, 6, 7])
    both_valid = mask[:, kept]
    for name in QUERY_FIELDS:
        assert_same(padded[name][:, kept][both_valid], plain[name][both_valid])
        assert (padded[name][~mask] == 0).all(), name


@both_modes
@torch.no_grad()
def test_one_mask_for_all_images_and_integer_masks(either_model):
    inputs, boxes = random_inputs(2, 3), random_boxes()
    mask = torch.tensor([True, False, True])
    expected = either_model(**inputs, query_mask=mask.expand(2, -1), query_boxes=boxes, box_mask=mask.expand(2, -1))
    shared = either_model(**inputs, query_mask=mask, query_boxes=boxes, box_mask=mask.expand(2, -1))
    numbers = mask.long().expand(2, -1)
    integer = either_model(**inputs, query_mask=numbers, query_boxes=boxes, box_mask=numbers)
    for name in (*QUERY_FIELDS, "query_mask"):
        assert torch.equal(shared[name], expected[name]), name
        assert torch.equal(integer[name], expected[name]), name
    features = expected.image_features
    assert torch.equal(
        either_model.encode_boxes(features, boxes, numbers), either_model.encode_boxes(features, boxes, numbers.bool())
    )


@both_modes
def test_any_number_of_queries(either_model):
    images = {"pixel_values": random_inputs()["pixel_values"]}
    ids, _ = prompt_ids(2)
    none, boxes = ids[:0], random_boxes()
    some = torch.zeros(2, 0, dtype=torch.bool)
    for queries, count in (
        ({"input_ids": none}, 0),
        ({"input_ids": none[None].expand(2, -1, -1)}, 0),
        ({"prompt_features": torch.zeros(2, 0, 16), "query_mask": some}, 0),
        ({"query_boxes": boxes[:, :0]}, 0),
        ({"query_boxes": boxes[:, :0], "box_mask": some}, 0),
        ({"query_boxes": boxes}, 3),
        ({"input_ids": none, "query_boxes": boxes}, 3),
        ({"input_ids": ids, "query_boxes": boxes[:, :0]}, 2),
        ({"input_ids": ids, "query_boxes": boxes}, 5),
        ({"input_ids": ids[:1], "query_mask": torch.tensor([[True], [False]])}, 1),
        ({"query_boxes": boxes[:, :1], "box_mask": torch.tensor([[True], [False]])}, 1),
    ):
        for post in (False, True):
            output = either_model(**images, **queries, use_post_decoder=post, clip_boxes=True)
            for name in QUERY_FIELDS:
                assert output[name].shape[:2] == (2, count)
                assert torch.isfinite(output[name].float()).all(), name
    features = output.image_features
    assert either_model.encode_boxes(features, boxes[:, :0], prompt_features=torch.zeros(2, 0, 16)).shape == (2, 0, 16)


@both_modes
def test_no_images(either_model):
    ids, _ = prompt_ids(2)
    for queries, count in (({"input_ids": ids}, 2), ({"query_boxes": torch.zeros(0, 3, 4)}, 3)):
        output = either_model(pixel_values=torch.zeros(0, 3, 32, 32), **queries)
        for name in QUERY_FIELDS:
            assert output[name].shape[:2] == (0, count)
        assert output.image_features.patch_features.shape == (0, 4, 4, 16)
        assert either_model.generate(image_features=output.image_features, **queries).shape == (0, count, 0)


@torch.no_grad()
def test_text_and_box_queries_share_the_query_axis(model):
    inputs, boxes = random_inputs(2, 4), random_boxes()
    both, texts = model(**inputs, query_boxes=boxes), model(**inputs)
    only_boxes = model(pixel_values=inputs["pixel_values"], query_boxes=boxes)
    for name in QUERY_FIELDS:
        assert_same(both[name][:, :4], texts[name])
        assert_same(both[name][:, 4:], only_boxes[name])
    assert torch.equal(only_boxes.boxes, boxes)
    assert torch.equal(only_boxes.region_boxes, boxes[:, :, None].expand(-1, -1, 3, -1))
    assert (only_boxes.region_scores == 1).all()
    assert (only_boxes.query_scores == 1).all()
    assert only_boxes.region_present.all()
    assert_same(only_boxes.query_features, model.encode_boxes(only_boxes.image_features, boxes))


@torch.no_grad()
def test_image_features_instead_of_pixels(model):
    inputs = random_inputs()
    expected = model(**inputs, query_boxes=random_boxes())
    features = model.get_image_features(inputs.pop("pixel_values"))
    output = model(image_features=features, **inputs, query_boxes=random_boxes())
    assert output.image_features is features
    for name in QUERY_FIELDS:
        assert torch.equal(output[name], expected[name])


@torch.no_grad()
def test_shared_prompts_and_token_ids(model):
    ids, mask = prompt_ids(3)
    features = model.get_prompt_features(ids, mask)
    assert features.shape == (3, 16)
    per_image = model.get_prompt_features(torch.stack([ids, ids.flip(0)]))
    assert_same(per_image[0], features)
    assert_same(per_image[1], features.flip(0))
    trimmed = model.get_prompt_features(ids[:1, : int(mask[0].sum())])
    assert_same(trimmed, features[:1])
    pixel_values = random_inputs()["pixel_values"]
    shared = model(pixel_values=pixel_values, prompt_features=features)
    repeated = model(pixel_values=pixel_values, prompt_features=features.expand(2, -1, -1))
    from_ids = model(pixel_values=pixel_values, input_ids=ids, attention_mask=mask)
    for name in QUERY_FIELDS:
        assert torch.equal(shared[name], repeated[name])
        assert_same(from_ids[name], shared[name])


@torch.no_grad()
def test_encode_boxes_with_a_prompt_for_each_box(model):
    inputs, boxes = random_inputs(2, 3), random_boxes()
    features, prompts = model.get_image_features(inputs["pixel_values"]), inputs["prompt_features"]
    plain = model.encode_boxes(features, boxes)
    prompted = model.encode_boxes(features, boxes, prompt_features=prompts)
    assert prompted.shape == plain.shape == (2, 3, 16)
    assert (prompted - plain).abs().amax(-1).min() > 1e-4
    mask = torch.tensor([[True, True, True], [True, False, False]])
    masked = model.encode_boxes(features, boxes, mask, prompt_features=prompts)
    assert_same(masked[mask], prompted[mask])
    assert (masked[~mask] == 0).all()
    alone = model.encode_boxes(features, boxes[:, 1:2], prompt_features=prompts[:, 1:2])
    assert_same(alone, prompted[:, 1:2])
    # by hand: the mean of the decoded region tokens takes the place of the decoder token
    tokens = model.detector.decode(features.patch_features, features.position_embeddings, prompts)
    by_hand = model.detector.pool(features.patch_features, boxes, tokens.view(2, 3, 3, 16).mean(2))
    assert_same(model.encode_boxes(features, boxes, prompt_features=prompts, use_post_decoder=False), by_hand)


@torch.no_grad()
def test_roi_skip(model):
    inputs = random_inputs() | {"use_post_decoder": False}
    always, never = model(**inputs, roi_skip=True), model(**inputs, roi_skip=False)
    assert (always.region_features - never.region_features).abs().max() > 1e-3
    assert torch.equal(always.region_boxes, never.region_boxes)
    assert torch.equal(model(**inputs, roi_skip=None).region_features, always.region_features)
    chosen = torch.arange(24).view(2, 12) % 3 == 0
    mixed = model(**inputs, roi_skip=chosen).region_features.flatten(1, 2)
    assert_same(mixed[chosen], always.region_features.flatten(1, 2)[chosen])
    assert_same(mixed[~chosen], never.region_features.flatten(1, 2)[~chosen])


@torch.no_grad()
def test_random_in_training_only(model):
    inputs = random_inputs() | {"roi_skip": None}
    assert torch.equal(model(**inputs).query_features, model(**inputs).query_features)
    trained = copy.deepcopy(model).train()
    assert not torch.equal(trained(**inputs).query_features, trained(**inputs).query_features)
    # with every other rate at zero, what is left is the random RoI skip and the hidden regions of the post decoder
    calm = ChexModel(tiny_config(dropout=0.0)).train()
    calm.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    first, second = calm(**inputs, use_post_decoder=False), calm(**inputs, use_post_decoder=False)
    assert torch.equal(first.region_boxes, second.region_boxes)
    assert not torch.equal(first.region_features, second.region_features)
    inputs["roi_skip"] = True
    assert torch.equal(calm(**inputs).query_features, calm(**inputs).query_features)
    calm.post_decoder.config.region_drop = 0.5
    assert not torch.equal(calm(**inputs).query_features, calm(**inputs).query_features)
    keep = torch.ones(2, 4, 3, dtype=torch.bool)
    assert_same(calm(**inputs, region_keep_mask=keep).query_features, model(**inputs).query_features)


@torch.no_grad()
def test_clipped_boxes(model):
    inputs, model = random_inputs(), copy.deepcopy(model)
    model.detector.box_head.fc2.bias.add_(1.0)
    free, clipped = model(**inputs), model(**inputs, clip_boxes=True)
    centers, sizes = free.region_boxes[..., :2], free.region_boxes[..., 2:]
    assert ((centers - sizes / 2 < 0) | (centers + sizes / 2 > 1)).any()  # or the test would show nothing
    for boxes in (clipped.boxes, clipped.region_boxes):
        assert (boxes[..., :2] - boxes[..., 2:] / 2 > -1e-6).all()
        assert (boxes[..., :2] + boxes[..., 2:] / 2 < 1 + 1e-6).all()
    assert torch.equal(free.region_features, clipped.region_features)


@torch.no_grad()
def test_nothing_present_gives_zero_boxes(model):
    timid = copy.deepcopy(model)
    timid.detector.region_weight_head.fc2.weight.zero_()
    timid.detector.region_weight_head.fc2.bias.fill_(-1)
    output = timid(**random_inputs())
    assert not output.present.any()
    assert not output.region_present.any()
    assert (output.boxes == 0).all()
    assert (output.region_boxes > 0).all()
    timid.detector.region_weight_head.fc2.bias.fill_(1)
    output = timid(**random_inputs())
    assert output.present.all()
    corners = [output.region_boxes[..., :2] + sign * output.region_boxes[..., 2:] / 2 for sign in (-1, 1)]
    assert_same(output.boxes[..., :2] - output.boxes[..., 2:] / 2, corners[0].amin(2))
    assert_same(output.boxes[..., :2] + output.boxes[..., 2:] / 2, corners[1].amax(2))


# --- attention, precision, gradients ---------------------------------------------------------------------------------


@both_modes
@torch.no_grad()
def test_eager_equals_sdpa(either_model):
    assert either_model.config._attn_implementation == "sdpa"
    eager = copy.deepcopy(either_model)
    eager.set_attn_implementation("eager")
    assert eager.detector.layers[0].self_attn.config._attn_implementation == "eager"
    assert eager.vision_model.config._attn_implementation == "eager"
    assert eager.sentence_generator.config._attn_implementation == "eager"
    ids, _ = prompt_ids(3)
    inputs = {"pixel_values": random_inputs()["pixel_values"], "input_ids": ids, "query_boxes": random_boxes()}
    masks = {"query_mask": torch.tensor([True, True, False]), "box_mask": torch.tensor([[True] * 3, [False] * 3])}
    for arguments in (inputs, inputs | masks):
        expected, actual = either_model(**arguments), eager(**arguments)
        for name in QUERY_FIELDS:
            assert_same(actual[name], expected[name])


@both_modes
@torch.no_grad()
def test_recorded_attentions_and_hidden_states(either_model, transformers_log):
    eager = copy.deepcopy(either_model)
    eager.set_attn_implementation("eager")
    transformers_log.clear()
    inputs, mask = random_inputs(2, 4), torch.ones(2, 4, dtype=torch.bool)
    output = eager(**inputs, query_mask=mask, output_attentions=True, output_hidden_states=True)
    if eager.config.attention_mode == "grouped":
        expected = [(8, 4, 3, 3), (8, 4, 3, 3), (8, 4, 4, 4)]
    else:
        expected = [(2, 4, 12, 12), (2, 4, 12, 12), (2, 4, 16, 16)]
    assert [tuple(weights.shape) for weights in output.attentions] == expected
    assert [tuple(w.shape) for w in output.cross_attentions] == [(2, 4, 12, 16), (2, 4, 12, 16), (2, 4, 16, 17)]
    assert [tuple(tokens.shape) for tokens in output.hidden_states] == [(2, 12, 16)] * 3 + [(2, 16, 16)]
    for weights in (*output.attentions, *output.cross_attentions):
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not any(torch.equal(before, after) for before, after in pairwise(output.hidden_states[:3]))
    plain = eager(**inputs, query_mask=mask)
    assert plain.attentions is None
    assert plain.hidden_states is None
    assert torch.equal(plain.region_boxes, output.region_boxes)
    detector_only = eager(**inputs, use_post_decoder=False, output_attentions=True)
    assert len(detector_only.attentions) == len(detector_only.cross_attentions) == 2
    image = eager.get_image_features(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    assert len(image.hidden_states) == 3
    assert [tuple(weights.shape) for weights in image.attentions] == [(2, 2, 17, 17)] * 2
    assert not transformers_log.records


def total_loss(model: ChexModel, use_generator: bool = True) -> torch.Tensor:
    """Depends on every part and on every output."""
    ids, mask = prompt_ids(3)
    output = model(
        pixel_values=random_inputs()["pixel_values"], input_ids=ids, attention_mask=mask, query_boxes=random_boxes()
    )
    loss = sum(output[name].square().sum() for name in QUERY_FIELDS if output[name].is_floating_point())
    if use_generator:
        sentences = torch.randint(0, 38, (4, 6), generator=torch.Generator().manual_seed(4))
        features = output.query_features[:, :2].flatten(0, 1)
        loss = loss + model.sentence_generator(input_ids=sentences, features=features, labels=sentences).loss
    return loss


def test_every_parameter_gets_a_gradient(model):
    trained = copy.deepcopy(model)
    total_loss(trained).backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # a constant on all keys cancels in the softmax
        assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 0, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its new name is younger than our range
def test_gradient_checkpointing_changes_nothing(model, transformers_log):
    plain = ChexModel(tiny_config(dropout=0.0)).train()
    plain.load_state_dict(model.state_dict())
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.detector.layers[0].gradient_checkpointing
    assert checkpointed.post_decoder.layers[0].gradient_checkpointing
    assert checkpointed.vision_model.encoder.layers[0].gradient_checkpointing
    assert checkpointed.sentence_generator.language_model.transformer.h[0].gradient_checkpointing
    for network in (plain, checkpointed):
        torch.manual_seed(0)
        total_loss(network).backward()
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert_same(other.grad, parameter.grad, atol=1e-4), name
    assert not transformers_log.records
    checkpointed.gradient_checkpointing_disable()
    assert not checkpointed.detector.layers[0].gradient_checkpointing


@torch.no_grad()
def test_half_precision_is_close(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs, boxes = random_inputs(), random_boxes()  # float32, as they come from a processor or a cache
    expected, actual = model(**inputs, query_boxes=boxes), half(**inputs, query_boxes=boxes)
    for name in QUERY_FIELDS:
        assert torch.isfinite(actual[name].float()).all(), name
    assert actual.boxes.dtype == torch.float32
    assert actual.query_features.dtype == torch.bfloat16
    assert (actual.region_boxes - expected.region_boxes).abs().max() < 0.05
    cosine = nn.functional.cosine_similarity(actual.query_features.float(), expected.query_features, dim=-1)
    assert cosine.min() > 0.98
    ids, _ = prompt_ids(2)
    assert half(pixel_values=inputs["pixel_values"], input_ids=ids).boxes.shape == (2, 2, 4)
    assert half.generate(query_features=actual.query_features, max_length=5).shape == (2, 7, 5)


def test_input_embeddings(model):
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    twin = copy.deepcopy(model)
    new = nn.Embedding(60, 32)
    twin.set_input_embeddings(new)
    assert twin.text_model.embeddings.token_embedding is new


# --- errors ----------------------------------------------------------------------------------------------------------


def test_user_errors(model):
    inputs = random_inputs()
    pixel_values, prompts = inputs["pixel_values"], inputs["prompt_features"]
    with pytest.raises(ValueError, match="needs queries: `input_ids`, `prompt_features` or `query_boxes`"):
        model(pixel_values=pixel_values)
    with pytest.raises(ValueError, match="Text queries are given twice"):
        model(pixel_values=pixel_values, prompt_features=prompts, input_ids=prompt_ids(4)[0])
    with pytest.raises(ValueError, match="needs `pixel_values`, or `image_features`"):
        model(prompt_features=prompts)


@both_modes
def test_boxes_in_a_list(either_model):
    image_features = either_model.get_image_features(torch.randn(3, 3, 32, 32))
    boxes = torch.rand(3, 4, 4)
    mask = torch.tensor([[True, True, True, True], [False] * 4, [True, False, False, False]])
    listed = [own[valid] for own, valid in zip(boxes, mask, strict=True)]
    expected = either_model.encode_boxes(image_features, boxes * mask[..., None], mask)
    assert torch.equal(either_model.encode_boxes(image_features, listed), expected)
    with pytest.raises(ValueError, match="2 tensors for 3 images"):
        either_model.encode_boxes(image_features, listed[:2])


def test_a_stage_1_model_has_no_post_decoder():
    model = ChexModel(tiny_config(1)).eval()
    inputs = random_inputs()
    output = model(**inputs)
    assert output.boxes.shape == (2, 4, 4)
    with pytest.raises(ValueError, match="no post decoder.*`use_post_decoder=False`.*stage 2 or 3"):
        model(**inputs, use_post_decoder=True)
    with pytest.raises(ValueError, match="no post decoder"):
        model.encode_boxes(output.image_features, random_boxes(), use_post_decoder=True)
