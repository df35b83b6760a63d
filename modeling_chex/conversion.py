"""Weights of the official ChEX, of CLIP and of GPT-2 for [`ChexModel`]: key maps, shapes, configuration."""

import re
from collections import Counter
from collections.abc import Mapping
from statistics import mode
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from .configuration_chex import ChexConfig, ChexGeneratorConfig
from .modeling_chex import ChexModel
from .sentence_generator import ChexSentenceGenerator


# Official name -> ours. One that ends with a dot, or with `in_proj_`, is the start of a key. `{}` stands for q, k and
# v: queries, keys and values are one stacked matrix there and three here.
_CLIP_BLOCK = {
    "attn.in_proj_": "self_attn.{}_proj.",
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_DECODER_BLOCK = {
    "norm_sa.": "self_attn_layer_norm.",
    "norm_mha.": "cross_attn_layer_norm.",
    "norm_encoder.": "source_layer_norm.",
    "norm_ff.": "ff_layer_norm.",
    "sa_block.sa.in_proj_": "self_attn.{}_proj.",
    "sa_block.sa.out_proj.": "self_attn.out_proj.",
    "mha_block.mha.in_proj_": "cross_attn.{}_proj.",
    "mha_block.mha.out_proj.": "cross_attn.out_proj.",
    "ls_sa.gamma": "self_attn_layer_scale.lambda1",
    "ls_mha.gamma": "cross_attn_layer_scale.lambda1",
    "ls_ff.gamma": "ff_layer_scale.lambda1",
    "ff_block.layers.0.": "fc1.",
    "ff_block.layers.3.": "fc2.",
}
_STEMS = {
    "img_encoder.backbone.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "img_encoder.backbone.class_embedding": "vision_model.embeddings.class_embedding",
    "img_encoder.backbone.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "img_encoder.backbone.ln_pre.": "vision_model.pre_layrnorm.",
    "img_encoder.backbone.ln_post.": "vision_model.post_layernorm.",
    "img_encoder.backbone.proj": "visual_projection.weight",
    "txt_encoder.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "txt_encoder.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "txt_encoder.ln_final.": "text_model.final_layer_norm.",
    "txt_encoder.text_projection": "text_projection.weight",
    "detector.multiregion_tokens": "detector.region_tokens",
    "detector.bbox_predictor.0.": "detector.box_head.layer_norm.",
    "detector.bbox_predictor.1.layers.0.": "detector.box_head.fc1.",
    "detector.bbox_predictor.1.layers.3.": "detector.box_head.fc2.",
    "detector.patch_projector.0.": "detector.patch_projection.layer_norm.",
    "detector.patch_projector.1.layers.0.": "detector.patch_projection.dense.",
    "detector.out_projector.0.": "detector.output_projection.layer_norm.",
    "detector.out_projector.1.layers.0.": "detector.output_projection.fc1.",
    "detector.out_projector.1.layers.3.": "detector.output_projection.fc2.",
    "detector.multiregion_weight_mlp.layers.0.": "detector.region_weight_head.fc1.",
    "detector.multiregion_weight_mlp.layers.3.": "detector.region_weight_head.fc2.",
    "post_decoder.gate": "post_decoder.gate",
    "post_decoder.ln_gate.": "post_decoder.layer_norm.",
    "txt_decoder.prefix_proj.layers.0.": "sentence_generator.prefix_projection.fc1.",
    "txt_decoder.prefix_proj.layers.3.": "sentence_generator.prefix_projection.fc2.",
    "txt_decoder.language_model.": "sentence_generator.language_model.",
}
_BLOCKS = (  # start of the official block, of ours, names inside of it
    ("img_encoder.backbone.transformer.resblocks.", "vision_model.encoder.layers.", _CLIP_BLOCK),
    ("txt_encoder.transformer.resblocks.", "text_model.encoder.layers.", _CLIP_BLOCK),
    ("detector.decoder.decoder_layers.", "detector.layers.", _DECODER_BLOCK),
    ("post_decoder.post_decoder_layers.", "post_decoder.layers.", _DECODER_BLOCK),
)
_TRANSPOSED = ("img_encoder.backbone.proj", "txt_encoder.text_projection")
# GPT-2's causal mask was stored as a buffer by old versions of transformers.
_IGNORED = re.compile(r"txt_decoder\.language_model\.transformer\.h\.\d+\.attn\.(masked_)?bias$")
# The official networks count their dropout layers, which are left out where the dropout is exactly 0.
_WITHOUT_DROPOUT = re.compile(
    r"(bbox_predictor\.1|out_projector\.1|multiregion_weight_mlp|ff_block|prefix_proj)\.layers\.2\."
)

# What the official configuration can vary and this architecture cannot: the only value here, which is the published.
_FIXED_SETTINGS = {
    "layer_scale": True,
    "img_encoder.add_cls_features": False,
    "img_encoder.use_pretrained_projection": True,
    "img_encoder.additional_projection_layers": 0,
    "img_encoder.normalize_projected": False,
    "txt_encoder.n_projection_layers": 0,
    "txt_encoder.normalize_projected": False,
    "detector.multiregion_sa": True,
    "detector.decoder_sa": False,
    "detector.decoder_ff": True,
    "detector.shortcut_tokens": False,
    "detector.use_pos_embeddings": True,
    "detector.shortcut_pos_embeddings": False,
    "detector.clip_pos": False,
    "detector.predictor_hidden_layers": 1,
    "detector.patch_project_layers": 1,
    "detector.out_project_layers": 2,
    "detector.skip_con_roi_pool": True,
    "post_decoder_patches": True,
    "post_decoder_cls": True,
    "post_decoder_gate": True,
    "txt_decoder.n_projection_layers": 2,
    "txt_decoder.shared_projection": False,
}
SMALLEST_GPT2 = 768  # width of the smallest published one


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted. The message says what is wrong with it and what to do."""


def convert_official_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames an official state dict (of any stage) to the keys of [`ChexModel`]; stacked attention projections are split
    and the two CLIP projections transposed. The results are views: nothing is copied.

    Raises:
        CheckpointError: Keys that no part of ChEX has; all of them are listed.
    """
    converted, unknown = {}, []
    for key, tensor in normalize_official_keys(state_dict).items():
        entries = _convert_entry(key, tensor)
        if entries is None:
            unknown.append(key)
        else:
            converted.update(entries)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} keys of the state dict do not belong to an official ChEX model: "
            f"{', '.join(sorted(unknown))}."
        )
    return converted


def normalize_official_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The state dict with the keys of a model that has dropout, and without the buffers of old GPT-2 code.

    Raises:
        CheckpointError: It holds a layer under both names, with and without dropout.
    """
    kept = {key: value for key, value in state_dict.items() if not _IGNORED.match(key)}
    names = {key: _WITHOUT_DROPOUT.sub(r"\1.layers.3.", key) for key in kept}
    twice = sorted(key for key, name in names.items() if name != key and name in kept)
    if twice:
        raise CheckpointError(
            f"{len(twice)} keys are there twice, as layers.2 of a model without dropout and as layers.3 of one with: "
            f"{', '.join(twice)}."
        )
    return {names[key]: value for key, value in kept.items()}


def _convert_entry(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    prefix, name, names = "", key, _STEMS
    for block, ours, block_names in _BLOCKS:
        if match := re.match(re.escape(block) + r"(\d+)\.", key):
            prefix, name, names = f"{ours}{match.group(1)}.", key[match.end() :], block_names
    for official, ours in names.items():
        if name == official or (official.endswith((".", "_")) and name.startswith(official)):
            target = prefix + ours + name.removeprefix(official)
            if "{}" not in target:
                return {target: tensor.T if key in _TRANSPOSED else tensor}
            return {target.format(kind): part for kind, part in zip("qkv", tensor.chunk(3), strict=True)}
    return None


def official_key(key: str) -> str:
    """The official name of a parameter of [`ChexModel`]; the inverse of `convert_official_state_dict`."""
    prefix, name, names = "", key, _STEMS
    for official, ours, block_names in _BLOCKS:
        if match := re.match(re.escape(ours) + r"(\d+)\.", key):
            prefix, name, names = f"{official}{match.group(1)}.", key[match.end() :], block_names
    for official, ours in names.items():
        for start in {ours.format(kind) for kind in "qkv"}:
            if name == start or (start.endswith(".") and name.startswith(start)):
                return prefix + official + name.removeprefix(start)
    raise KeyError(key)


def official_shapes(config: ChexConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the official state dict of a model of this configuration; no memory is allocated for it."""
    with torch.device("meta"):
        state_dict = ChexModel(config).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for key, tensor in state_dict.items():
        official, shape = official_key(key), tuple(tensor.shape)
        if "in_proj_" in official:
            shape = (3 * shape[0], *shape[1:])
        shapes[official] = shape[::-1] if official in _TRANSPOSED else shape
    return shapes


def config_from_official(
    config_dict: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    generator_heads: int | None = None,
    bos_token_id: int | None = None,
) -> ChexConfig:
    """
    [`ChexConfig`] of an official model of any size: sizes from the tensors, the rest from its configuration. A size
    that several tensors show is the one that most of them agree on, so that a damaged tensor is found by comparing
    with `official_shapes` rather than believed.

    Args:
        config_dict: The official `config_dict` (plain values).
        state_dict: The official state dict, of any stage.
        generator_heads (`int`, *optional*): Attention heads of the language model, which neither tensors nor
            configuration show; by default heads of width 64, as in every published GPT-2, and two heads in models
            smaller than those.
        bos_token_id (`int`, *optional*): Its only special token; by default the last of the vocabulary, or GPT-2's
            if that was extended.

    Raises:
        CheckpointError: A setting that this architecture does not have, or values that contradict each other.
    """
    try:
        return _config_from_official(config_dict, state_dict, generator_heads, bos_token_id)
    except CheckpointError:
        raise
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"The configuration in the checkpoint cannot be used: {error.__cause__ or error}"
        ) from error


def _config_from_official(
    config_dict: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    generator_heads: int | None,
    bos_token_id: int | None,
) -> ChexConfig:
    _check_settings(config_dict)
    shapes = {key: tuple(tensor.shape) for key, tensor in normalize_official_keys(state_dict).items()}
    detector, decoder = (config_dict.get(name) or {} for name in ("detector", "txt_decoder"))
    projection_dim = _size(
        shapes,
        ("img_encoder.backbone.proj", 1),
        ("txt_encoder.text_projection", 1),
        ("detector.multiregion_tokens", 1),
        default=config_dict.get("d_model"),
    )
    if config_dict.get("d_model") not in (None, projection_dim):
        raise CheckpointError(
            f"The configuration in the checkpoint contradicts its tensors: d_model is {config_dict['d_model']!r}, but "
            f"they are {projection_dim} wide."
        )
    decoder_block = {
        "num_attention_heads": config_dict.get("n_head", 8),
        "hidden_act": config_dict.get("act", "gelu"),
        "dropout": config_dict.get("dropout", 0.3),
        "attention_dropout": config_dict.get("attention_dropout", 0.1),
        "drop_path": config_dict.get("droppath_prob", 0.2),
        "layer_scale_init": config_dict.get("layer_scale_init", 0.1),
    }
    detector_config = decoder_block | {
        "num_layers": _count_blocks(shapes, _BLOCKS[2][0], detector.get("n_decoder_layers")),
        "intermediate_size": _hidden_size(shapes, f"{_BLOCKS[2][0]}0.ff_block.layers.", 4 * projection_dim),
        "num_regions": _size(shapes, ("detector.multiregion_tokens", 0), default=detector.get("multiregions", 3)),
        "roi_beta": detector.get("soft_roi_beta", 2.0),
        "roi_skip_probability": detector.get("skip_roi_pool_prob", 0.25),
        "roi_skip_dropout": detector.get("dropout_skip_roi_pool", 0.3),
    }
    post_decoder_config = generator_config = None
    if config_dict.get("n_post_decoder_layers") or any(key.startswith("post_decoder.") for key in shapes):
        post_decoder_config = decoder_block | {
            "num_layers": _count_blocks(shapes, _BLOCKS[3][0], config_dict.get("n_post_decoder_layers")),
            "intermediate_size": _hidden_size(shapes, f"{_BLOCKS[3][0]}0.ff_block.layers.", 4 * projection_dim),
            "region_drop": config_dict.get("post_decoder_multibox_drop", 0.0),
        }
    if decoder or any(key.startswith("txt_decoder.") for key in shapes):
        generator_config = _generator_config(config_dict, decoder, shapes, generator_heads, bos_token_id)
        generator_config["feature_size"] = projection_dim
    return _build_config(
        **_clip_configs(shapes, projection_dim),
        detector_config=detector_config,
        post_decoder_config=post_decoder_config,
        generator_config=generator_config,
        projection_dim=projection_dim,
        attention_mode="legacy",
    )


def _check_settings(config_dict: Mapping[str, Any]) -> None:
    wrong = []
    for name, expected in _FIXED_SETTINGS.items():
        *section, key = name.split(".")
        values = (config_dict.get(section[0]) or {}) if section else config_dict
        if values.get(key, expected) != expected:
            wrong.append(f"{name} is {values[key]!r} (only {expected!r} is supported)")
    if wrong:
        raise CheckpointError(
            f"The model was trained in a variant that ChEX as published does not have: {'; '.join(wrong)}."
        )


def _size(shapes: Mapping[str, tuple[int, ...]], *dimensions: tuple[str, int], default: int | None = None) -> int:
    """
    The size that most of the given dimensions, (key, axis), agree on; the default, if there is one, votes too and
    decides a tie.
    """
    votes = [default] if isinstance(default, int) else []
    votes += [shapes[key][axis] for key, axis in dimensions if axis < len(shapes.get(key, ()))]
    return mode(votes) if votes else 1  # without any of the tensors, the comparison of keys will list them as missing


def _hidden_size(shapes: Mapping[str, tuple[int, ...]], mlp: str, default: int) -> int:
    dimensions = ((f"{mlp}0.weight", 0), (f"{mlp}0.bias", 0), (f"{mlp}3.weight", 1))
    return _size(shapes, *dimensions) if any(key in shapes for key, _ in dimensions) else default


def _count_blocks(shapes: Mapping[str, tuple[int, ...]], start: str, configured: int | None = None) -> int:
    """Blocks whose keys begin with `start`, or as many as configured."""
    found = Counter(match.group(1) for key in shapes if (match := re.match(re.escape(start) + r"(\d+)\.", key)))
    number = configured or max(1, sum(keys > 1 for keys in found.values()))  # a single stray key is no block
    if number > 1000:  # a model of that many would not fit anywhere, not even its description
        raise CheckpointError(f"The checkpoint asks for {number} blocks {start}*.")
    return number


def _clip_configs(shapes: Mapping[str, tuple[int, ...]], projection_dim: int) -> dict[str, dict[str, Any]]:
    vision, text = "img_encoder.backbone.", "txt_encoder."
    vision_width = _size(
        shapes, (f"{vision}class_embedding", 0), (f"{vision}ln_pre.weight", 0), (f"{vision}ln_post.weight", 0)
    )
    patch_size = _size(shapes, (f"{vision}conv1.weight", 2), (f"{vision}conv1.weight", 3))
    grid = round(max(0, _size(shapes, (f"{vision}positional_embedding", 0)) - 1) ** 0.5)
    text_width = _size(
        shapes, (f"{text}ln_final.weight", 0), (f"{text}ln_final.bias", 0), (f"{text}text_projection", 0)
    )
    vocab_size = _size(shapes, (f"{text}token_embedding.weight", 0))
    blocks = {}
    for name, start, width in (("vision", _BLOCKS[0][0], vision_width), ("text", _BLOCKS[1][0], text_width)):
        mlp = f"{start}0.mlp."
        blocks[name] = {
            "hidden_size": width,
            "intermediate_size": _size(
                shapes, (f"{mlp}c_fc.weight", 0), (f"{mlp}c_fc.bias", 0), (f"{mlp}c_proj.weight", 1)
            ),
            "num_hidden_layers": _count_blocks(shapes, start),
            "num_attention_heads": max(1, width // 64),  # CLIP's heads are 64 wide in every size
            "projection_dim": projection_dim,
        }
    return {
        "vision_config": blocks["vision"] | {"image_size": max(1, grid) * patch_size, "patch_size": patch_size},
        "text_config": blocks["text"]
        | {
            "vocab_size": vocab_size,
            "max_position_embeddings": _size(shapes, (f"{text}positional_embedding", 0)),
            # start and end of text are the last two entries of CLIP's vocabulary
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
    }


def _generator_config(
    config_dict: Mapping[str, Any],
    decoder: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    heads: int | None,
    bos_token_id: int | None,
) -> dict[str, Any]:
    model, prefix = "txt_decoder.language_model.transformer.", "txt_decoder.prefix_proj.layers."
    width = _size(shapes, (f"{model}ln_f.weight", 0), (f"{model}ln_f.bias", 0), (f"{model}wte.weight", 1))
    vocab_size = _size(shapes, (f"{model}wte.weight", 0), ("txt_decoder.language_model.lm_head.weight", 0))
    mlp = f"{model}h.0.mlp."
    inner = _size(
        shapes, (f"{mlp}c_fc.weight", 1), (f"{mlp}c_fc.bias", 0), (f"{mlp}c_proj.weight", 0), default=4 * width
    )
    num_layers = _count_blocks(shapes, f"{model}h.")
    rows = _size(shapes, (f"{prefix}3.weight", 0), (f"{prefix}3.bias", 0))
    prefix_length = decoder.get("prefix_length_factor") or max(1, rows // (2 * num_layers * width))
    if width == 1:
        heads = 1  # the language model is not there, which the comparison of keys will tell
    elif heads is None:
        # Below the smallest published width there is no rule. Such models are made for tests, mostly with two.
        heads = max(1, width // 64) if width >= SMALLEST_GPT2 else 2 - width % 2
    offsets = {None: 0, "one": 1, "prefix": prefix_length}
    if decoder.get("position_offset") not in offsets:
        raise CheckpointError(
            f"txt_decoder.position_offset is {decoder['position_offset']!r}, not null, one or prefix."
        )
    special = bos_token_id if bos_token_id is not None else min(vocab_size, GPT2Config.vocab_size) - 1
    generation = decoder.get("generation_kwargs") or {}
    return {
        "vocab_size": vocab_size,
        "n_positions": _size(shapes, (f"{model}wpe.weight", 0)),
        "n_embd": width,
        "n_layer": num_layers,
        "n_head": heads,
        "n_inner": None if inner == 4 * width else inner,
        "bos_token_id": special,
        "eos_token_id": special,
        "prefix_length": prefix_length,
        "prefix_hidden_size": _hidden_size(shapes, prefix, 4 * width),
        "prefix_act": config_dict.get("act", "gelu"),
        "prefix_dropout": config_dict.get("dropout", 0.3),
        "position_offset": offsets[decoder.get("position_offset")],
        "max_generation_length": generation.get("max_length", decoder.get("max_length", 128)),
    }


def _build_config(**values: Any) -> ChexConfig:
    config = ChexConfig(**values)
    generator = config.generator_config
    if generator is not None and (generator.n_head < 1 or generator.n_embd % generator.n_head != 0):
        raise CheckpointError(
            f"The language model is {generator.n_embd} wide, which {generator.n_head} attention heads do not divide: "
            "say how many heads it has."
        )
    return config


def official_from_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Keys of OpenAI's CLIP, which CheXzero has too, as those of the encoders of an official ChEX. Temperature and
    scalars that describe the architecture are left out.
    """
    scalars = ("logit_scale", "input_resolution", "context_length", "vocab_size")
    kept = {key: value for key, value in state_dict.items() if key not in scalars}
    return {
        f"img_encoder.backbone.{key.removeprefix('visual.')}" if key.startswith("visual.") else f"txt_encoder.{key}": v
        for key, v in kept.items()
    }


def clip_names(message: str) -> str:
    """A message with the keys of an official ChEX, with those of CLIP instead."""
    return message.replace("img_encoder.backbone.", "visual.").replace("txt_encoder.", "")


def config_from_clip(state_dict: Mapping[str, torch.Tensor]) -> ChexConfig:
    """[`ChexConfig`] of a stage-1 model, with a detector as published, for encoders from `official_from_clip`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    projection_dim = _size(shapes, ("img_encoder.backbone.proj", 1), ("txt_encoder.text_projection", 1))
    try:
        return _build_config(
            **_clip_configs(shapes, projection_dim),
            detector_config={"intermediate_size": 4 * projection_dim},
            post_decoder_config=None,
            generator_config=None,
            projection_dim=projection_dim,
        )
    except StrictDataclassError as error:
        raise CheckpointError(
            f"The sizes of the encoders do not go with the detector of ChEX: {error.__cause__ or error}"
        ) from error


def generator_from_gpt2(source: str, **config_overrides: Any) -> ChexSentenceGenerator:
    """
    A sentence generator that starts from a GPT-2, with a new prefix projection.

    Args:
        source (`str`): Folder or Hub id of any model of the GPT-2 family, in any format that transformers reads.
        config_overrides: Fields of [`ChexGeneratorConfig`], such as `feature_size`; the sizes of GPT-2 are its own.

    Raises:
        ValueError: There is no such model, it is not a GPT-2, or weights are missing.
    """
    try:
        gpt2_config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no GPT-2 at {source!r}: give a folder with config.json and weights, or the id of a Hub model. "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    if not isinstance(gpt2_config, GPT2Config) or isinstance(gpt2_config, ChexGeneratorConfig):
        raise ValueError(f"{source!r} holds a model of type {gpt2_config.model_type!r}, not 'gpt2'.")
    try:
        gpt2, loading = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The weights of the GPT-2 {source!r} cannot be loaded: {reason}") from error
    if loading["missing_keys"]:
        raise ValueError(f"The GPT-2 {source!r} lacks weights: {', '.join(sorted(loading['missing_keys']))}.")
    names = ("model_type", "architectures", "dtype", "transformers_version", "torch_dtype")
    values = {key: value for key, value in gpt2_config.to_dict().items() if key not in names}
    generator = ChexSentenceGenerator(ChexGeneratorConfig(**values | config_overrides))
    generator.language_model.load_state_dict(gpt2.state_dict())
    return generator


__all__ = [
    "CheckpointError",
    "clip_names",
    "config_from_clip",
    "config_from_official",
    "convert_official_state_dict",
    "generator_from_gpt2",
    "normalize_official_keys",
    "official_from_clip",
    "official_key",
    "official_shapes",
]
