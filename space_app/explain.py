"""Ask a ChEX model about radiographs. No printing and no files: this serves command line, Space and scripts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from modeling_chex import ChexModel
from modeling_chex.pipeline_chex import TASK, ChexPipeline, Report, ReportSentence
from processing_chex import ChexInputError, ChexProcessor
from processing_chex.processing_chex import validate_prompts
from processing_chex.prompt_sets import class_prompts
from processing_chex.report import report_options


class ChexExplainer(ChexPipeline):
    """The pipeline `chest-xray-explanation` of a model folder: explains radiographs and writes reports about them.

    Args:
        model: in evaluation mode, on the device that is to be used.
        processor: the one that belongs to the model.
    """

    def __init__(self, model: ChexModel, processor: ChexProcessor):
        super().__init__(model=model, processor=processor, task=TASK, device=model.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ChexExplainer":
        """Load a model folder, in float32, onto the GPU if there is one.

        Raises:
            ChexInputError: naming the missing or damaged part.
        """
        return cls(*load_model(folder, sentences=False))


def default_prompts() -> list[str]:
    """Eight common findings, asked for when the user names nothing."""
    prompts = class_prompts("phantom")
    return [prompts.box[name][0] for name in prompts.names]


def parse_box(text: str, option: str = "--box ") -> list[float]:
    """Four numbers from `x0,y0,x1,y1`; whether they fit the image is checked with the image. `option` begins the error
    of another text."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ChexInputError(
            f"{option}'{text}' is not a box: write four numbers x0,y0,x1,y1 in pixels, like 10,20,200,180."
        )
    return values


def load_model(
    folder: str | Path, prompts: Sequence[str] = (), sentences: bool = True
) -> tuple[ChexModel, ChexProcessor]:
    """Load model and processor from a folder, in float32, onto the GPU if there is one.

    Args:
        folder: written by `save_pretrained` of both.
        prompts: checked first, because loading a large model takes long.
        sentences: whether sentences will be asked for; a model that cannot generate them is then an error.

    Raises:
        ChexInputError: naming the missing or damaged part.
    """
    validate_prompts(prompts)
    folder = Path(folder)
    config = _check_folder(folder, sentences)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loading = ChexModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        processor = ChexProcessor.from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ChexInputError(
            f"The model in {folder} cannot be loaded ({type(error).__name__}: {reason}): train or convert it again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise ChexInputError(
            f"The weights in {folder} do not fit its config.json: {len(loading['missing_keys'])} tensors are missing "
            f"and {len(loading['mismatched_keys'])} have another shape. Train or convert the model again."
        )
    _check_tokenizers(folder, config, processor)
    model.eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def check_model_folder(
    folder: str | Path, prompts: Sequence[str] = (), sentences: bool = True, max_length: int | None = None
) -> None:
    """Check what can be checked of a model folder without loading it, the prompts, and the length of sentences.

    Raises:
        ChexInputError: as `load_model` and `check_max_length` would.
    """
    validate_prompts(prompts)
    config = _check_folder(Path(folder), sentences)
    positions = (config.get("generator_config") or {}).get("n_positions")
    if max_length is not None and positions is not None and max_length > positions:
        raise ChexInputError(f"--max-length {max_length} is more than this model can write: use at most {positions}.")


def check_report_options(options: Mapping[str, Any]) -> None:
    """Raise `ChexInputError` for options of `report` that are not allowed, the classes included."""
    try:
        class_prompts(report_options(**options).findings)
    except ValueError as error:
        raise ChexInputError(str(error)) from error


def check_max_length(model: ChexModel, max_length: int | None) -> None:
    """Raise `ChexInputError` if sentences of `max_length` tokens exceed the positions of the generator."""
    generator = model.config.generator_config
    if max_length is not None and generator is not None and max_length > generator.n_positions:
        raise ChexInputError(
            f"--max-length {max_length} is more than this model can write: use at most {generator.n_positions}."
        )


def _check_folder(folder: Path, sentences: bool) -> dict[str, Any]:
    """Check that every part of a model folder is there; returns its config."""
    if not folder.is_dir():
        raise ChexInputError(
            f"The model folder {folder} does not exist: run `make demo` to train a small model, or name a folder with "
            "--model."
        )
    remedy = "save model and processor into one folder with `save_pretrained`, or train or convert the model again"
    for part in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if not (folder / part).is_file():
            raise ChexInputError(f"The model folder {folder} has no {part}: {remedy}.")
    if not any((folder / part).is_file() for part in ("model.safetensors", "model.safetensors.index.json")):
        raise ChexInputError(f"The model folder {folder} has no model.safetensors: {remedy}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ChexInputError(f"{folder / 'config.json'} is no valid JSON object ({error}): {remedy}.") from error
    if model_type != "chex":
        raise ChexInputError(f"{folder} holds a model of type {model_type!r}, not 'chex': name another folder.")
    if sentences and config.get("generator_config") is None:
        raise ChexInputError(
            f"The model in {folder} is of training stage 1 or 2 and has no sentence generator: add --no-sentences to "
            "get boxes and scores only, or use a model of stage 3."
        )
    return config


def _check_tokenizers(folder: Path, config: dict[str, Any], processor: ChexProcessor) -> None:
    if config.get("generator_config") is not None and processor.generator_tokenizer is None:
        raise ChexInputError(
            f"The model folder {folder} has no generator_tokenizer folder: save the whole `ChexProcessor` into it."
        )


__all__ = [
    "ChexExplainer",
    "Report",
    "ReportSentence",
    "check_max_length",
    "check_model_folder",
    "check_report_options",
    "default_prompts",
    "load_model",
    "parse_box",
]
