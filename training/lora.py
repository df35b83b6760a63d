"""Low-rank adapters (LoRA) on the sentence generator, through the optional package `peft`."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modeling_chex import ChexModel, ChexSentenceGenerator


ADAPTER = "default"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class LoraOptions:
    """
    Adapters of the sentence generator: each target matrix W becomes W + alpha / rank * B A, where only A and B, of
    `rank` rows and columns, are trained.

    `targets` are names of linear layers, or their ends: by default those of GPT-2's attention and feed-forward blocks
    and of the prefix network. `save_adapter` also writes the adapters themselves, into `adapter/` of the model folder.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc", "fc1", "fc2")
    save_adapter: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank and alpha must be greater than 0, not {self.rank!r} and {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), but is {self.dropout!r}.")
        if not self.targets:
            raise ValueError("targets must name at least one layer, such as c_attn.")


def add_adapters(generator: ChexSentenceGenerator, options: LoraOptions) -> None:
    """
    Puts adapters into a generator, which computes the same until they are trained; all else in it is frozen.

    Raises:
        ValueError: `peft` is not installed, or a target is no linear layer of the generator.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "`lora` needs the package peft, which is not installed: run `pip install peft`, or leave `lora` out to "
            "train the generator itself."
        ) from error
    layers = _linear_layers(generator)
    for target in options.targets:
        if not any(_is_called(name, target) for name in layers):
            ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ValueError(
                f"lora.targets names {target!r}, which is no linear layer of the sentence generator. These are: "
                f"{', '.join(ends)}."
            )
    chosen = [name for name in layers if any(_is_called(name, target) for target in options.targets)]
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=chosen
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # set for each layer as it needs it
        peft.inject_adapter_in_model(config, generator, ADAPTER)


def _linear_layers(generator: ChexSentenceGenerator) -> list[str]:
    """Without the head, which is tied to the token embeddings and could not be after merging."""
    return [
        name
        for name, module in generator.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not generator.get_output_embeddings()
    ]


def _is_called(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def merged_state_dict(model: ChexModel) -> dict[str, Tensor]:
    """Weights of a model with adapters under the names and shapes of one without, adapters added; for saving."""
    merged = {}
    state = model.state_dict()
    for name, layer in _adapted(model):
        base = layer.get_base_layer().weight
        state[f"{name}.base_layer.weight"] = base + layer.get_delta_weight(ADAPTER).to(base.dtype)
    for name, tensor in state.items():
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def save_adapter(generator: ChexSentenceGenerator, folder: Path) -> None:
    """The adapters alone, as `generator.load_adapter(folder)` and `PeftModel.from_pretrained` read them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(generator, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    generator.peft_config[ADAPTER].save_pretrained(folder)


__all__ = ["ADAPTER_FOLDER", "LoraOptions", "add_adapters", "merged_state_dict", "save_adapter"]
