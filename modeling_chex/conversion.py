"""Weights of the official ChEX implementation: key map and configuration."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .configuration_chex import ChexConfig


# Official module -> ours, applied from left to right to the start of a key.
_CLIP_BLOCK = {
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
    "sa_block.sa.out_proj.": "self_attn.out_proj.",
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
_BLOCKS = (  # pattern of the official block, our block, names inside of it
    (r"img_encoder\.backbone\.transformer\.resblocks\.(\d+)\.", "vision_model.encoder.layers.{}.", _CLIP_BLOCK),
    (r"txt_encoder\.transformer\.resblocks\.(\d+)\.", "text_model.encoder.layers.{}.", _CLIP_BLOCK),
    (r"detector\.decoder\.decoder_layers\.(\d+)\.", "detector.layers.{}.", _DECODER_BLOCK),
    (r"post_decoder\.post_decoder_layers\.(\d+)\.", "post_decoder.layers.{}.", _DECODER_BLOCK),
)
# One matrix for queries, keys and values there, three here
_STACKED = {
    "attn.in_proj_": "self_attn.",
    "sa_block.sa.in_proj_": "self_attn.",
    "mha_block.mha.in_proj_": "cross_attn.",
}
_TRANSPOSED = ("img_encoder.backbone.proj", "txt_encoder.text_projection")
# GPT-2's causal mask was stored as a buffer by old versions of transformers.
_IGNORED = re.compile(r"txt_decoder\.language_model\.transformer\.h\.\d+\.attn\.(masked_)?bias$")


def convert_official_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames an official state dict (of any stage) to the keys of [`ChexModel`]; stacked attention projections are split
    and the two CLIP projections transposed.

    Raises:
        ValueError: Keys that no part of ChEX has; all of them are listed.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        if _IGNORED.match(key):
            continue
        entries = _convert_entry(key, tensor)
        if entries is None:
            unknown.append(key)
        else:
            converted.update(entries)
    if unknown:
        raise ValueError(
            f"{len(unknown)} keys of the state dict do not belong to an official ChEX model: "
            f"{', '.join(sorted(unknown))}."
        )
    return converted


def _convert_entry(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    for pattern, block, names in _BLOCKS:
        if match := re.match(pattern, key):
            prefix, name = block.format(match.group(1)), key[match.end() :]
            for stacked, attention in _STACKED.items():
                if name.startswith(stacked):
                    kind = name.removeprefix(stacked)
                    return {
                        f"{prefix}{attention}{letter}_proj.{kind}": part
                        for letter, part in zip("qkv", tensor.chunk(3), strict=True)
                    }
            return _rename(prefix, name, names, tensor)
    return _rename("", key, _STEMS, tensor.T if key in _TRANSPOSED else tensor)


def _rename(prefix: str, name: str, names: dict[str, str], tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    for official, ours in names.items():
        if name == official or (official.endswith(".") and name.startswith(official)):
            return {prefix + ours + name.removeprefix(official): tensor}
    return None


def config_from_official(
    config_dict: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    generator_heads: int | None = None,
    bos_token_id: int | None = None,
) -> ChexConfig:
    """
    [`ChexConfig`] of an official model: sizes from the tensors, the rest from its configuration dictionary.

    Args:
        config_dict: The official `config_dict` (plain values).
        state_dict: The official state dict, of any stage.
        generator_heads (`int`, *optional*): Attention heads of the language model, which no tensor shows; by default
            heads of width 64, as in every GPT-2.
        bos_token_id (`int`, *optional*): Its only special token; by default the last of the vocabulary.
    """

    def shape(key: str) -> torch.Size:
        return state_dict[key].shape

    def blocks(pattern: str) -> int:
        return len({match.group(1) for key in state_dict if (match := re.match(pattern, key))})

    vision_width, _, patch_size, _ = shape("img_encoder.backbone.conv1.weight")
    grid = round((shape("img_encoder.backbone.positional_embedding")[0] - 1) ** 0.5)
    vocab_size, text_width = shape("txt_encoder.token_embedding.weight")
    num_regions, projection_dim = shape("detector.multiregion_tokens")
    detector = config_dict["detector"]
    decoder_block = {
        "num_attention_heads": config_dict.get("n_head", 8),
        "hidden_act": config_dict.get("act", "gelu"),
        "dropout": config_dict.get("dropout", 0.3),
        "attention_dropout": config_dict.get("attention_dropout", 0.1),
        "drop_path": config_dict.get("droppath_prob", 0.2),
        "layer_scale_init": config_dict.get("layer_scale_init", 0.1),
    }
    post_decoder_config = generator_config = None
    if "post_decoder.gate" in state_dict:
        post_decoder_config = decoder_block | {
            "num_layers": blocks(_BLOCKS[3][0]),
            "intermediate_size": shape("post_decoder.post_decoder_layers.0.ff_block.layers.0.weight")[0],
            "region_drop": config_dict.get("post_decoder_multibox_drop", 0.0),
        }
    if "txt_decoder.prefix_proj.layers.0.weight" in state_dict:
        decoder = config_dict["txt_decoder"]
        lm_vocab, lm_width = shape("txt_decoder.language_model.transformer.wte.weight")
        lm_layers = blocks(r"txt_decoder\.language_model\.transformer\.h\.(\d+)\.")
        prefix_length = shape("txt_decoder.prefix_proj.layers.3.weight")[0] // (2 * lm_layers * lm_width)
        special = bos_token_id if bos_token_id is not None else lm_vocab - 1
        generator_config = {
            "vocab_size": lm_vocab,
            "n_positions": shape("txt_decoder.language_model.transformer.wpe.weight")[0],
            "n_embd": lm_width,
            "n_layer": lm_layers,
            "n_head": generator_heads or lm_width // 64,
            "bos_token_id": special,
            "eos_token_id": special,
            "feature_size": projection_dim,
            "prefix_length": prefix_length,
            "prefix_hidden_size": shape("txt_decoder.prefix_proj.layers.0.weight")[0],
            "prefix_act": config_dict.get("act", "gelu"),
            "prefix_dropout": config_dict.get("dropout", 0.3),
            "position_offset": {None: 0, "one": 1, "prefix": prefix_length}[decoder.get("position_offset")],
            "max_generation_length": decoder.get("max_length", 128),
        }
    return ChexConfig(
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": shape("img_encoder.backbone.transformer.resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": blocks(_BLOCKS[0][0]),
            "num_attention_heads": vision_width // 64,
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "projection_dim": projection_dim,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": shape("txt_encoder.transformer.resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": blocks(_BLOCKS[1][0]),
            "num_attention_heads": text_width // 64,
            "max_position_embeddings": shape("txt_encoder.positional_embedding")[0],
            "projection_dim": projection_dim,
            # start and end of text are the last two entries of CLIP's vocabulary
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        detector_config=decoder_block
        | {
            "num_layers": blocks(_BLOCKS[2][0]),
            "intermediate_size": shape("detector.decoder.decoder_layers.0.ff_block.layers.0.weight")[0],
            "num_regions": num_regions,
            "roi_beta": detector.get("soft_roi_beta", 2.0),
            "roi_skip_probability": detector.get("skip_roi_pool_prob", 0.25),
            "roi_skip_dropout": detector.get("dropout_skip_roi_pool", 0.3),
        },
        post_decoder_config=post_decoder_config,
        generator_config=generator_config,
        projection_dim=projection_dim,
        attention_mode="legacy",
    )


__all__ = ["config_from_official", "convert_official_state_dict"]
