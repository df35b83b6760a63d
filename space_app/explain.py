"""Ask a ChEX model about one radiograph. No printing and no files: this serves command line, Space and scripts."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from modeling_chex import ChexModel
from processing_chex import ChexInputError, ChexProcessor
from processing_chex.box_geometry import class_wise_nms
from processing_chex.processing_chex import validate_prompts
from processing_chex.prompt_sets import class_prompts


# The three regions of a query often cover the same finding; the published evaluation merges them at this overlap.
NMS_THRESHOLD = 0.25


@dataclass(frozen=True)
class Region:
    """One located region: `box` is `xyxy` pixels of the original image, `score` lies in [0, 1]."""

    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Answer:
    """The answer to one query.

    Attributes:
        query: the prompt, or the box as text.
        kind: "prompt" or "box".
        score: of the query as a whole; 1 for a box.
        present: whether any region scores above the threshold.
        box: `xyxy` pixels around everything that the model considered, None if nothing is present.
        regions: the regions above the threshold without duplicates, best first.
        sentence: the description, None if none was asked for.
    """

    query: str
    kind: str
    score: float
    present: bool
    box: tuple[float, float, float, float] | None
    regions: tuple[Region, ...]
    sentence: str | None


@dataclass(frozen=True)
class Explanation:
    """All answers about one image of `width` x `height` pixels; `frame` is the part that the network saw, `xyxy`."""

    image: str
    width: int
    height: int
    frame: tuple[float, float, float, float]
    answers: tuple[Answer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return asdict(self)


def default_prompts() -> list[str]:
    """Eight common findings, asked for when the user names nothing."""
    prompts = class_prompts("phantom")
    return [prompts.box[name][0] for name in prompts.names]


def parse_box(text: str) -> list[float]:
    """Four numbers from `x0,y0,x1,y1`; whether they fit the image is checked with the image."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ChexInputError(
            f"--box '{text}' is not a box: write four numbers x0,y0,x1,y1 in pixels, like 10,20,200,180."
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


def check_max_length(model: ChexModel, max_length: int | None) -> None:
    """Raise `ChexInputError` if sentences of `max_length` tokens exceed the positions of the generator."""
    generator = model.config.generator_config
    if max_length is not None and generator is not None and max_length > generator.n_positions:
        raise ChexInputError(
            f"--max-length {max_length} is more than this model can write: use at most {generator.n_positions}."
        )


@torch.inference_mode()
def explain_image(
    model: ChexModel,
    processor: ChexProcessor,
    image: Any,
    prompts: Sequence[str] = (),
    boxes: Sequence[Sequence[float]] = (),
    threshold: float = 0.5,
    geometry: str | None = None,
    sentences: bool = True,
    max_length: int | None = None,
) -> Explanation:
    """Answer prompts and boxes about one image; it is encoded once and all sentences are written in one batch.

    Args:
        image: anything that `ChexProcessor` reads, such as a path.
        prompts: what to look for.
        boxes: regions to describe, `xyxy` pixels of the image.
        threshold: lowest score of a region.
        geometry: `"center_crop"` or `"letterbox"`; default as saved with the processor.
        sentences: whether to describe the regions.
        max_length: longest sentence in tokens.

    Raises:
        ChexInputError: for an unusable image, prompt or box.
    """
    inputs = processor(
        images=[image],
        text=list(prompts) or None,
        boxes=list(boxes) or None,
        **({"geometry": geometry} if geometry else {}),
    ).to(model.device)
    outputs = model(**inputs)
    token_ids = None
    if sentences:
        length = {} if max_length is None else {"max_length": max_length}
        token_ids = model.generate(query_features=outputs.query_features, query_mask=outputs.query_mask, **length)
    (result,) = processor.post_process_explanation(
        outputs,
        token_ids,
        target_sizes=inputs["original_sizes"],
        threshold=threshold,
        prompts=prompts,
        image_frames=inputs["image_frames"],
    )
    answers = []
    for index, prompt in enumerate(result["prompts"]):
        region_boxes, region_scores = result["region_boxes"][index], result["region_scores"][index]
        keep = class_wise_nms(region_boxes, region_scores, torch.zeros_like(region_scores), NMS_THRESHOLD)
        present = bool(result["present"][index])
        box = _rounded(result["boxes"][index]) if present else None
        answers.append(
            Answer(
                query=prompt if prompt is not None else ", ".join(f"{edge:g}" for edge in boxes[index - len(prompts)]),
                kind="box" if prompt is None else "prompt",
                score=round(float(result["scores"][index]), 4),
                present=present,
                box=box,
                regions=tuple(Region(_rounded(region_boxes[i]), round(float(region_scores[i]), 4)) for i in keep),
                sentence=result["sentences"][index],
            )
        )
    height, width = inputs["original_sizes"][0].tolist()
    name = str(image) if isinstance(image, (str, Path)) else "image"
    return Explanation(name, width, height, _rounded(inputs["image_frames"][0]), tuple(answers))


def _rounded(box: torch.Tensor) -> tuple[float, float, float, float]:
    return tuple(round(edge, 2) for edge in box.tolist())


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
