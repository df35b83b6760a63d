"""Ask a ChEX model about radiographs. No printing and no files: this serves command line, Space and scripts."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from modeling_chex import ChexModel
from modeling_chex.pipeline_chex import TASK, ChexPipeline, Region, describe_image
from processing_chex import ChexInputError, ChexProcessor
from processing_chex.processing_chex import MAX_PROMPT_CHARACTERS, validate_prompts
from processing_chex.prompt_sets import class_prompts
from processing_chex.report import ReportQueries, deduplicate, sentence_similarity


@dataclass(frozen=True)
class ReportSentence:
    """A sentence of a report with the query that it answers.

    Attributes:
        text: the sentence.
        prompt: name of the finding class or region.
        kind: "finding" or "region".
        score: of the query as a whole.
        abnormality: probability that the query shows something abnormal.
        box: `xyxy` pixels around everything that the model considered, None if nothing is present.
        regions: the regions above the threshold without duplicates, best first.
    """

    text: str
    prompt: str
    kind: str
    score: float
    abnormality: float
    box: tuple[float, float, float, float] | None
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Report:
    """A report about one image of `width` x `height` pixels; `frame` is the part that the network saw, `xyxy`."""

    image: str
    width: int
    height: int
    frame: tuple[float, float, float, float]
    sentences: tuple[ReportSentence, ...]

    @property
    def text(self) -> str:
        """All sentences in one paragraph; empty if nothing is worth one."""
        return " ".join(sentence.text for sentence in self.sentences)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON, the `text` included."""
        return json.loads(json.dumps(asdict(self) | {"text": self.text}))

    def to_json(self) -> str:
        """`to_dict` as an indented JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


class ChexExplainer(ChexPipeline):
    """Explains radiographs and writes reports about them: the pipeline `chest-xray-explanation` with `report`.

    Args:
        model: in evaluation mode, on the device that is to be used.
        processor: the one that belongs to the model.
    """

    def __init__(self, model: ChexModel, processor: ChexProcessor):
        super().__init__(model=model, processor=processor, task=TASK, device=model.device)
        self._queries: dict[str, ReportQueries] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ChexExplainer":
        """Load a model folder, in float32, onto the GPU if there is one.

        Raises:
            ChexInputError: naming the missing or damaged part.
        """
        return cls(*load_model(folder, sentences=False))

    @torch.no_grad()
    def report(
        self,
        image: Any,
        threshold: float = 0.5,
        geometry: str | None = None,
        findings: str = "phantom",
        max_sentences: int = 10,
        **generate_kwargs: Any,
    ) -> Report:
        """Write a report: a sentence for each finding that is found and for each region that looks abnormal.

        Args:
            image: anything that `ChexProcessor` reads, such as a path.
            threshold: a finding is found if one of its regions has a score above it.
            geometry: `"center_crop"` or `"letterbox"`; default as saved with the processor.
            findings: the data set whose classes are looked for, as `class_prompts` takes it: eight common findings by
                default; `"chexpert"` for the 14 of the published evaluation.
            max_sentences: from here on, sentences that resemble others a little less are dropped too.
            generate_kwargs: of `ChexModel.generate`.

        Raises:
            ValueError: for an unusable image, or a model without a sentence generator.
        """
        options = {"geometry": geometry} if geometry is not None else {}
        inputs = self.processor(images=[image], **options).to(self.device)
        if findings not in self._queries:
            self._queries[findings] = ReportQueries.encode(class_prompts(findings), self._encode_texts)
        queries = self._queries[findings]
        outputs = self.model(pixel_values=inputs["pixel_values"], prompt_features=queries.features)
        abnormality = self.model.classify(outputs.query_features, queries.positive, queries.negative).squeeze(-1)
        selected = queries.select(abnormality, (outputs.region_scores > threshold).any(-1))
        token_ids = self.model.generate(query_features=outputs.query_features, query_mask=selected, **generate_kwargs)
        sizes, frames = inputs["original_sizes"], inputs["image_frames"]
        answers = self.answers(outputs, token_ids, sizes, frames, queries.names, threshold=threshold)
        sentences = [
            ReportSentence(
                text=answer.sentence,
                prompt=answer.query,
                kind="finding" if index < queries.num_findings else "region",
                score=answer.score,
                abnormality=round(float(abnormality[0, index]), 4),
                box=answer.box,
                regions=answer.regions,
            )
            for index, answer in enumerate(answers)
            if selected[0, index] and answer.sentence
        ]
        similarity = sentence_similarity(self._encode_texts([sentence.text for sentence in sentences]))
        kept = deduplicate(similarity, [sentence.score for sentence in sentences], max_sentences)
        about = describe_image(image, sizes, frames)
        return Report(**about, sentences=tuple(sentences[index] for index in kept))

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """n texts -> (n, D) prompt features."""
        # A generated sentence may exceed what is accepted of a user; the encoder reads only its beginning anyway.
        encoded = self.processor(text=[text[:MAX_PROMPT_CHARACTERS] for text in texts]).to(self.device)
        return self.model.get_prompt_features(encoded["input_ids"])


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
