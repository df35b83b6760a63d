"""`pipeline("chest-xray-explanation")`: images, prompts and boxes in; boxes, scores and sentences out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines import Pipeline
from transformers.processing_utils import ProcessorMixin

from .outputs import ChexOutput


TASK = "chest-xray-explanation"
# The regions of a query often cover the same finding; the published evaluation merges them at this overlap.
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
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """`to_dict` as an indented JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class ReportSentence:
    """A sentence of a report with the query that it answers. Boxes are `xyxy` pixels of the original image.

    Attributes:
        text: the sentence.
        name: of the finding class or region.
        prompt: the text that the model was asked with.
        kind: "finding" or "region".
        score: of the query as a whole.
        abnormality: probability that the query shows something abnormal.
        box: around everything that the model considered, None if nothing is present.
        regions: the regions above the threshold without duplicates, best first.
        candidates: all regions of the query with their scores, best first.
    """

    text: str
    name: str
    prompt: str
    kind: str
    score: float
    abnormality: float
    box: tuple[float, float, float, float] | None
    regions: tuple[Region, ...]
    candidates: tuple[Region, ...]

    @classmethod
    def from_dict(cls, sentence: Mapping[str, Any]) -> "ReportSentence":
        """Of a dictionary from `ChexModel.report`, rounded."""
        rounded = {name: round(sentence[name], 4) for name in ("score", "abnormality")}
        rounded["box"] = sentence["box"] and tuple(round(edge, 2) for edge in sentence["box"])
        for name in ("regions", "candidates"):
            rounded[name] = tuple(
                Region(tuple(round(edge, 2) for edge in region["box"]), round(region["score"], 4))
                for region in sentence[name]
            )
        return cls(**{**sentence, **rounded})


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


class ChexPipeline(Pipeline):
    """Answers prompts and boxes about chest radiographs: each image is encoded once, for all of its queries.

    ```python
    >>> chex = pipeline("chest-xray-explanation", model="runs/demo/model")
    >>> chex("scan.png", prompts=["Pleural effusion"], boxes=[[40, 60, 110, 120]], threshold=0.5)
    {'image': 'scan.png', 'width': 128, ..., 'answers': [{'query': 'Pleural effusion', 'score': ..., ...}, ...]}
    ```

    An input is an image (whatever the processor reads: path to PNG, JPEG or DICOM, PIL image, array) or a dictionary
    `{"image": ..., "prompts": [...], "boxes": [...]}` with queries of its own. A list of inputs gives a list of
    results, a generator an iterator; `batch_size` images go through the model together. These arguments can be given
    here or to each call:

    Args:
        prompts (`str` or `Sequence[str]`): What to look for.
        boxes (`Sequence[Sequence[float]]`): Regions to describe, `xyxy` pixels of the original image.
        threshold (`float`, defaults to 0.5): Regions with a score above it are reported.
        geometry (`str`): `"center_crop"` or `"letterbox"`; default as saved with the processor.
        sentences (`bool`): Whether to describe; by default if the model has a sentence generator.
        generate_kwargs (`dict`): Arguments of `ChexModel.generate`, such as `{"num_beams": 3}`.

    Each result is [`Explanation.to_dict`]; `report` writes whole reports. Unusable images, prompts and boxes raise a
    `ValueError` that names them.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._report_queries: dict[tuple, Any] = {}

    def _sanitize_parameters(
        self,
        prompts: str | Sequence[str] | None = None,
        boxes: Sequence[Sequence[float]] | None = None,
        threshold: float | None = None,
        geometry: str | None = None,
        sentences: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        stages = (
            {"prompts": prompts, "boxes": boxes, "geometry": geometry},
            {"sentences": sentences, "generate_kwargs": generate_kwargs},
            {"threshold": threshold},
        )
        return tuple({name: value for name, value in stage.items() if value is not None} for stage in stages)

    def __call__(self, inputs: Any, **kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """See the class."""
        if isinstance(inputs, (list, tuple)):
            # The base class takes tuples for one input and stumbles over empty lists.
            return super().__call__(list(inputs), **kwargs) if inputs else []
        return super().__call__(inputs, **kwargs)

    def explain(
        self,
        image: Any,
        prompts: str | Sequence[str] = (),
        boxes: Sequence[Sequence[float]] = (),
        threshold: float = 0.5,
        geometry: str | None = None,
        sentences: bool | None = None,
        **generate_kwargs: Any,
    ) -> Explanation:
        """Answer prompts and boxes about one image. The arguments are those of the class.

        Raises:
            ValueError: for an unusable image, prompt or box, or if there is neither prompt nor box.
        """
        inputs = self.preprocess(image, prompts, boxes, geometry)
        (explanation,) = self.explain_read([inputs], threshold, sentences, generate_kwargs)
        return explanation

    def explain_read(
        self,
        items: Sequence[Mapping[str, Any]],
        threshold: float = 0.5,
        sentences: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> list[Explanation]:
        """Answer the prompts and boxes about images that were read one by one, in one batch.

        Args:
            items: one or more results of `preprocess`, with the same number of boxes.
            threshold, sentences, generate_kwargs: as for the class.
        """
        columns = {name: [item[name] for item in items] for name in items[0]}
        batch = {name: torch.cat(c) if isinstance(c[0], torch.Tensor) else c for name, c in columns.items()}
        outputs = self.forward(batch, sentences=sentences, generate_kwargs=generate_kwargs)

        def part(value: Any, number: int) -> Any:
            if isinstance(value, torch.Tensor):
                return value[number : number + 1]
            return None if value is None else value[number]

        return [
            self._explanation({name: part(value, number) for name, value in outputs.items()}, threshold)
            for number in range(len(items))
        ]

    @torch.no_grad()
    def report(
        self,
        image: Any,
        threshold: float | None = None,
        geometry: str | None = None,
        preset: str = "found",
        generate_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Report | list[Report]":
        """Write a report: a sentence for each finding and region that is worth one, with its boxes.

        Args:
            image: anything that the processor reads, such as a path; or a list of images, which go through the model
                together and give a list of reports.
            threshold: regions with a score above it are found; default 0.5.
            geometry: `"center_crop"` or `"letterbox"`; default as saved with the processor.
            preset: `"found"` describes those of eight common findings that are found, `"paper"` all 14 of CheXpert as
                in the published evaluation; both describe regions that look abnormal.
            generate_kwargs: arguments of `ChexModel.generate`, which may also be given by themselves.
            options: single steps in place of the preset's, such as `findings="chexpert"`, `max_sentences=5` or
                `negatives="drop"`: those of `ReportOptions` in `processing_chex/report.py`.

        Raises:
            ValueError: for an unusable image, an option that is not allowed, or a model without a sentence generator.
        """
        several = isinstance(image, (list, tuple))
        images = list(image) if several else [image]
        if not images:
            return []
        geometry = {"geometry": geometry} if geometry is not None else {}
        inputs = self.processor(images=images, return_tensors="pt", **geometry).to(self.device)
        features = self.model.get_image_features(inputs["pixel_values"])
        sizes, frames = inputs["original_sizes"].cpu(), inputs["image_frames"].cpu()
        if threshold is not None:
            options["threshold"] = threshold
        found = self._report_sentences(features, sizes, frames, preset, generate_kwargs, options)
        reports = [
            Report(
                **describe_image(name, sizes[number : number + 1], frames[number : number + 1]), sentences=sentences
            )
            for number, (name, sentences) in enumerate(zip(images, found, strict=True))
        ]
        return reports if several else reports[0]

    @torch.no_grad()
    def report_about(
        self,
        image_features: Any,
        original_sizes: torch.Tensor,
        image_frames: torch.Tensor,
        preset: str = "found",
        generate_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[ReportSentence, ...]:
        """The sentences of a report about one image that is encoded.

        Args:
            image_features: as from `ChexModel.get_image_features`.
            original_sizes, image_frames: (1, 2) and (1, 4), as from the processor.
            preset, generate_kwargs, options: as for `report`.
        """
        (sentences,) = self._report_sentences(
            image_features, original_sizes, image_frames, preset, generate_kwargs, options
        )
        return sentences

    def _report_sentences(
        self,
        image_features: Any,
        original_sizes: torch.Tensor,
        image_frames: torch.Tensor,
        preset: str,
        generate_kwargs: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> list[tuple[ReportSentence, ...]]:
        known = self.processor.report_option_names
        own = {name: value for name, value in options.items() if name in known}
        generation = {name: value for name, value in options.items() if name not in known} | dict(
            generate_kwargs or {}
        )
        if self.model.config.generator_config is None:
            raise ValueError(
                "This model has no sentence generator, as after training stages 1 and 2: load a model of stage 3 to "
                "write reports."
            )
        # The prompts are encoded once for all images that follow.
        asked = (preset, *(str(own.get(name)) for name in ("findings", "regions")))
        queries = self._report_queries.get(asked)
        if queries is None:
            queries = self._report_queries[asked] = self.processor.report_queries(self.model, preset, **own)
        reports = self.model.report(
            image_features=image_features,
            processor=self.processor,
            original_sizes=original_sizes,
            image_frames=image_frames,
            preset=preset,
            queries=queries,
            generation=generation,
            **own,
        )
        return [tuple(map(ReportSentence.from_dict, report["sentences"])) for report in reports]

    def preprocess(
        self,
        inputs: Any,
        prompts: str | Sequence[str] = (),
        boxes: Sequence[Sequence[float]] = (),
        geometry: str | None = None,
    ) -> dict[str, Any]:
        """Read one image and its boxes. Prompts are encoded later, once for all images of a batch that share them."""
        image = inputs
        if isinstance(inputs, Mapping):
            if "image" not in inputs or not set(inputs) <= {"image", "prompts", "boxes"}:
                raise ValueError(
                    "An input dictionary has the key 'image' and, if wanted, 'prompts' and 'boxes', but this one has "
                    f"{', '.join(map(repr, inputs)) or 'none'}."
                )
            image = inputs["image"]
            prompts, boxes = inputs.get("prompts", prompts), inputs.get("boxes", boxes)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts if prompts is not None else ())
        boxes = boxes if boxes is not None else ()
        if not prompts and not len(boxes):
            raise ValueError("Nothing is asked about the image: give `prompts`, `boxes` or both.")
        options = {"geometry": geometry} if geometry is not None else {}
        encoded = self.processor(images=[image], boxes=boxes, return_tensors="pt", **options)
        return {
            **encoded,
            "prompts": prompts,
            "boxes": np.reshape(boxes, (-1, 4)).tolist(),
            # Only the name: the pixels are not needed any more.
            "image": str(image) if isinstance(image, (str, PathLike)) else None,
        }

    def _forward(
        self,
        model_inputs: dict[str, Any],
        sentences: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        # Without a batch, `prompts` is the list of one image; else a list of such lists.
        prompts = model_inputs["prompts"]
        if prompts and isinstance(prompts[0], list) and all(own == prompts[0] for own in prompts):
            prompts = prompts[0]
        queries = {}
        if any(prompts):
            queries.update(self.processor(text=prompts, return_tensors="pt").to(self.device))
        if model_inputs["query_boxes"].shape[1]:
            queries.update({name: model_inputs[name] for name in ("query_boxes", "box_mask")})
        outputs = self.model(pixel_values=model_inputs["pixel_values"], **queries)
        if sentences is None:
            sentences = self.model.config.generator_config is not None
        token_ids = None
        if sentences:
            token_ids = self.model.generate(
                query_features=outputs.query_features, query_mask=outputs.query_mask, **(generate_kwargs or {})
            )
        names = ("region_boxes", "region_scores", "query_scores", "query_mask")
        kept = ("image_frames", "original_sizes", "prompts", "boxes", "image")
        return (
            {name: outputs[name] for name in names}
            | {"token_ids": getattr(token_ids, "sequences", token_ids)}
            | {name: model_inputs[name] for name in kept}
        )

    def postprocess(self, model_outputs: dict[str, Any], threshold: float = 0.5) -> dict[str, Any]:
        """The outputs of one image -> `Explanation.to_dict`."""
        return self._explanation(model_outputs, threshold).to_dict()

    def _explanation(self, model_outputs: dict[str, Any], threshold: float) -> Explanation:
        answers = self.answers(
            ChexOutput(**{name: value for name, value in model_outputs.items() if name in ChexOutput.__annotations__}),
            model_outputs["token_ids"],
            model_outputs["original_sizes"],
            model_outputs["image_frames"],
            model_outputs["prompts"],
            model_outputs["boxes"],
            threshold,
        )
        about = describe_image(*(model_outputs[name] for name in ("image", "original_sizes", "image_frames")))
        return Explanation(**about, answers=answers)

    def answers(
        self,
        outputs: ChexOutput,
        sequences: torch.Tensor | Sequence[Sequence[str]] | None,
        original_sizes: torch.Tensor,
        image_frames: torch.Tensor,
        prompts: Sequence[str],
        boxes: Sequence[Sequence[float]] = (),
        threshold: float = 0.5,
    ) -> tuple[Answer, ...]:
        """What the model found about one image, as plain values in pixels of the original image.

        Args:
            outputs: of one image.
            sequences: token ids (1, Q, T) or sentences of the queries, None without.
            original_sizes, image_frames: (1, 2) and (1, 4), from the processor.
            prompts, boxes: the queries, as they were given.
            threshold: lowest score of a region.

        Returns:
            One answer for each valid query: prompts first, then boxes.
        """
        common = {"target_sizes": original_sizes, "image_frames": image_frames, "threshold": threshold}
        (result,) = self.processor.post_process_explanation(outputs, sequences, prompts=[list(prompts)], **common)
        (detected,) = self.processor.post_process_object_detection(outputs, nms_threshold=NMS_THRESHOLD, **common)
        answers = []
        for index, (label, prompt) in enumerate(zip(result["labels"], result["prompts"], strict=True)):
            own = detected["labels"] == label
            regions = zip(detected["boxes"][own], detected["scores"][own], strict=True)
            present = bool(result["present"][index])
            answers.append(
                Answer(
                    query=prompt
                    if prompt is not None
                    else ", ".join(f"{edge:g}" for edge in boxes[index - len(prompts)]),
                    kind="box" if prompt is None else "prompt",
                    score=round(float(result["scores"][index]), 4),
                    present=present,
                    box=_rounded(result["boxes"][index]) if present else None,
                    regions=tuple(Region(_rounded(box), round(float(score), 4)) for box, score in regions),
                    sentence=result["sentences"][index],
                )
            )
        return tuple(answers)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """`save_with_code` of model and processor."""
        save_with_code(self.model, self.processor, save_directory, **kwargs)


def save_with_code(model: PreTrainedModel, processor: ProcessorMixin, folder: str | PathLike, **kwargs: Any) -> None:
    """Save model and processor into one folder that also loads where this package is not installed: see `add_code`.

    Args:
        model: a `ChexModel`.
        processor: the `ChexProcessor` that belongs to it.
        folder: created if it does not exist.
        kwargs: of `model.save_pretrained`, such as `max_shard_size`.
    """
    model.save_pretrained(folder, **kwargs)
    processor.save_pretrained(folder)
    add_code(folder, type(model), type(processor), type(processor.image_processor))


def add_code(
    folder: str | PathLike, model_class: type, processor_class: type | None, image_processor_class: type
) -> None:
    """Copy the code into a saved folder, and name it in the configurations.

    Then `AutoModel`, `AutoConfig`, `AutoProcessor`, `AutoImageProcessor` and `pipeline("chest-xray-explanation")` load
    the folder with `trust_remote_code=True`. Where the package is imported, its own classes are used and nothing has
    to be trusted. `register_for_auto_class` does the same, but for all that a process saves from then on.

    Args:
        folder: with what `save_pretrained` of the model or its configuration, and of the processor (or image
            processor alone) has written.
        model_class: `ChexModel`.
        processor_class: `ChexProcessor`, or None if only an image processor was saved.
        image_processor_class: `ChexImageProcessor`.
    """
    config_class = model_class.config_class
    for cls in (config_class, model_class, processor_class, image_processor_class, ChexPipeline):
        if cls is not None:
            custom_object_save(cls, folder)
    image_processor = {"auto_map": {"AutoImageProcessor": _reference(image_processor_class)}}
    pipelines = {TASK: {"impl": _reference(ChexPipeline), "pt": ["AutoModel"]}}
    auto_map = {"AutoConfig": _reference(config_class), "AutoModel": _reference(model_class)}
    _update_json(Path(folder) / "config.json", {"auto_map": auto_map, "custom_pipelines": pipelines})
    if processor_class is None:
        _update_json(Path(folder) / "preprocessor_config.json", image_processor)
    else:
        auto_map = {"AutoProcessor": _reference(processor_class)}
        _update_json(
            Path(folder) / "processor_config.json", {"auto_map": auto_map, "image_processor": image_processor}
        )


def _reference(cls: type) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


def _update_json(path: Path, values: Mapping[str, Any]) -> None:
    """Set entries of a JSON file; of a dictionary in it only those that are given."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        content[key] = content.get(key, {}) | value
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe_image(image: Any, original_sizes: torch.Tensor, image_frames: torch.Tensor) -> dict[str, Any]:
    """The first fields of an `Explanation`: name, size and frame of the image."""
    height, width = original_sizes[0].tolist()
    name = str(image) if isinstance(image, (str, PathLike)) else "image"
    return {"image": name, "width": width, "height": height, "frame": _rounded(image_frames[0])}


def _rounded(box: torch.Tensor) -> tuple[float, float, float, float]:
    return tuple(round(edge, 2) for edge in box.tolist())


__all__ = [
    "TASK",
    "Answer",
    "ChexPipeline",
    "Explanation",
    "Region",
    "Report",
    "ReportSentence",
    "add_code",
    "describe_image",
    "save_with_code",
]
