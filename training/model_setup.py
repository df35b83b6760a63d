"""The model of a stage before training: where it comes from, what is trained, how it computes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers.utils import logging

from modeling_chex import ChexModel
from processing_chex import ChexProcessor
from training.configuration import StageConfig, nearest


# Compiled one by one: they are alike, so that one compilation serves many, and what chooses queries stays as it is.
# Blocks of GPT-2 are not among them: with the cache that holds the prefix, each would be compiled for itself.
COMPILED_BLOCKS = ("CLIPEncoderLayer", "ChexDecoderLayer")


# Of models of earlier stages, these may be missing.
LATER_PARTS = ("detector", "post_decoder", "sentence_generator")


def load_stage_model(folder: str | None, purpose: str, **config_overrides: object) -> tuple[ChexModel, ChexProcessor]:
    """
    The model and processor of an earlier stage; parts that it does not have yet are initialised.

    Raises:
        ValueError: There is no model in the folder, or weights of a part that it must have are missing.
    """
    if not folder or not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{purpose} starts from an earlier stage, but `init_from` is {folder!r}, which holds no model. Run the "
            "earlier stage first, or set `init_from` to a folder that its run has written."
        )
    config = ChexModel.config_class.from_pretrained(folder)
    for name, value in config_overrides.items():
        setattr(config, name, value)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the weights of new parts, which are meant to be missing
    try:
        model, loading = ChexModel.from_pretrained(
            folder, config=type(config)(**config.to_dict()), output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    if lost := sorted(name for name in loading["missing_keys"] if name.partition(".")[0] not in LATER_PARTS):
        raise ValueError(
            f"{purpose} starts from the model in {folder}, but {len(lost)} of its weights are missing, such as "
            f"{lost[0]}: the folder is damaged. Run the earlier stage again."
        )
    return model, ChexProcessor.from_pretrained(folder)


def set_trainable(
    model: ChexModel, parts: Sequence[str], frozen_vision_layers: int = 0, first_norm: bool = False
) -> None:
    """
    Freezes everything but the named parts, a function of the configuration alone.

    Args:
        parts: Names of children of the model, such as `vision_model` or `detector`.
        frozen_vision_layers: k of the image encoder's layers that stay frozen: the embeddings (with the layer norm
            behind them), then k - 1 blocks; with any of them also the final layer norm and the projection.
        first_norm: Whether that layer norm behind the embeddings is trained all the same, as officially by mistake:
            then gradients go through all frozen blocks.
    """
    children = dict(model.named_children())
    for name in parts:
        if children.get(name) is None:
            raise ValueError(f"`trainable` names {name!r}, which is not a part of this model: {', '.join(children)}.")
    for name, child in children.items():
        child.requires_grad_(name in parts)
    if frozen_vision_layers > 0:
        vision = model.vision_model
        frozen = [vision.embeddings, vision.pre_layrnorm, vision.post_layernorm, model.visual_projection]
        for part in [*frozen, *vision.encoder.layers[: frozen_vision_layers - 1]]:
            part.requires_grad_(False)
        vision.pre_layrnorm.requires_grad_(first_norm and "vision_model" in parts)


def choose_precision(mixed_precision: str) -> str:
    """
    Resolves "auto": bfloat16 where the hardware multiplies it (CPUs with AVX-512 BF16 or AMX, most GPUs).

    Raises:
        ValueError: float16 on a CPU.
    """
    if mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError(
            "mixed_precision=fp16 needs a GPU, and this run is on a CPU: set mixed_precision to bf16, no or auto."
        )
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def set_up_model(config: StageConfig, model: nn.Module) -> None:
    """
    Attention, gradient checkpointing and compilation, as configured.

    Raises:
        ValueError: An unknown backend of `torch.compile`, or a model without blocks that are compiled.
    """
    if config.attn_implementation is not None:
        model.set_attn_implementation(config.attn_implementation)
    if config.gradient_checkpointing:
        # reentrant checkpoints do not go together with unused parameters of DDP
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile is not None:
        known = torch.compiler.list_backends(exclude_tags=())
        if config.compile not in known:
            raise ValueError(f"compile: unknown backend {config.compile!r}. {nearest(config.compile, known, 'ones')}")
        blocks = [module for module in model.modules() if type(module).__name__ in COMPILED_BLOCKS]
        if not blocks:
            raise ValueError(
                f"compile: the model of {config.stage} has none of the blocks that are compiled: leave it out."
            )
        for block in blocks:
            block.compile(backend=config.compile)


__all__ = ["choose_precision", "load_stage_model", "set_trainable", "set_up_model"]
