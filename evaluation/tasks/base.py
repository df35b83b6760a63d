"""What all tasks share: the model with cached prompts, batches of encoded images, and sentence generation."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from processing_chex.prompt_sets import PromptSet, anatomy_prompts
from processing_chex.vocabulary import ANATOMY_NAMES

from .records import Targets, read_targets


Labeler = Callable[[str], Mapping[str, int]]
PROMPT_CHUNK = 256


@dataclass
class Batch:
    """Images encoded once for all tasks: `image_features` of B images and their targets."""

    image_features: Any
    targets: list[Targets]


@dataclass
class EvaluationContext:
    """Model, processor and settings of one evaluation.

    Attributes:
        model: `ChexModel` in evaluation mode (or anything with its interface).
        processor: `ChexProcessor` that belongs to it.
        prompts: prompts of the finding classes.
        labeler: text -> {finding: 1 / 0 / -1}; needed by the text tasks.
        generation_batch: sentences generated together.
        generation_kwargs: arguments of `model.generate`.
        progress: whether to show progress bars.
        seconds: time spent per part, filled while running.
    """

    model: Any
    processor: Any
    prompts: PromptSet
    labeler: Labeler | None = None
    generation_batch: int = 512
    generation_kwargs: dict = field(default_factory=lambda: {"max_length": 33, "do_sample": False, "num_beams": 1})
    progress: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    _features: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def can_generate(self) -> bool:
        return self.model.config.generator_config is not None

    @property
    def has_post_decoder(self) -> bool:
        return self.model.config.post_decoder_config is not None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Prompt features (Q, D), not normalised; every distinct text is encoded once per evaluation."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._features]
        for start in range(0, len(missing), PROMPT_CHUNK):
            chunk = missing[start : start + PROMPT_CHUNK]
            encoded = self.processor(text=chunk, return_tensors="pt").to(self.device)
            features = self.model.get_prompt_features(encoded["input_ids"], encoded["attention_mask"])
            self._features.update(zip(chunk, features, strict=True))
        if not texts:
            return torch.zeros(0, self.model.config.projection_dim, device=self.device)
        return torch.stack([self._features[text] for text in texts])

    def ensemble_features(self, prompts: Mapping[str, Sequence[str]], names: Sequence[str]) -> torch.Tensor:
        """(C, D): plain mean of the features of each name's prompts."""
        return torch.stack([self.text_features(prompts[name]).mean(0) for name in names])

    def anatomy_features(self, names: Sequence[str] = ANATOMY_NAMES) -> torch.Tensor:
        """(A, D) features of the anatomy prompts."""
        return self.ensemble_features(anatomy_prompts(synonyms=False), names)

    def class_features(self, kind: str) -> torch.Tensor:
        """(C, D) features of the `positive`, `negative` or `box` prompts of the finding classes."""
        return self.ensemble_features(getattr(self.prompts, kind), self.prompts.names)

    def batches(self, dataset: datasets.Dataset, batch_size: int, name: str) -> Iterator[Batch]:
        """Reads, preprocesses and encodes a split, in order."""
        bar = tqdm(total=len(dataset), desc=name, unit="image", disable=not self.progress, leave=False)
        with bar:
            for start in range(0, len(dataset), batch_size):
                with self.timed("images"):
                    records = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
                    inputs = self.processor(images=[record["image"] for record in records], return_tensors="pt")
                    # boxes are in pixels of the original image, of which the record may hold a smaller copy
                    frame = self.processor.image_processor.frame
                    frames = [frame(record["height"], record["width"]) for record in records]
                    targets = [read_targets(r, frame) for r, frame in zip(records, frames, strict=True)]
                    image_features = self.model.get_image_features(inputs["pixel_values"].to(self.device))
                yield Batch(image_features, targets)
                bar.update(len(records))

    def generate(self, features: torch.Tensor, name: str) -> list[str]:
        """One sentence for each of the features (n, D), in flat padded batches."""
        texts: list[str] = []
        bar = tqdm(total=len(features), desc=name, unit="sentence", disable=not self.progress, leave=False)
        with bar:
            for chunk in features.split(self.generation_batch):
                mask = torch.ones(1, len(chunk), dtype=torch.bool, device=chunk.device)
                ids = self.model.generate(query_features=chunk[None], query_mask=mask, **self.generation_kwargs)
                texts += self.processor.decode_sentences(ids)[0]
                bar.update(len(chunk))
        return texts

    def label(self, text: str) -> Mapping[str, int]:
        """Findings stated in a text.

        Raises:
            ValueError: if the evaluation has no labeller.
        """
        if self.labeler is None:
            raise ValueError("Text tasks need a labeller: pass `labeler`, a function text -> {finding: 1/0/-1}.")
        return self.labeler(text)


class Task:
    """One task: `update` on every batch, then `compute`.

    Attributes:
        name: key of the task in the results.
        headline: key of its main number in the top level of the results.
        needs_text: whether it needs a sentence generator and a labeller.
    """

    name: str
    headline: str
    needs_text: bool = False

    def __init__(self, context: EvaluationContext):
        self.context = context

    def update(self, batch: Batch) -> None:
        """Predicts for one batch and keeps what the score needs."""
        raise NotImplementedError

    def compute(self) -> dict:
        """Plain dict (ready for JSON) with the headline under "value" and everything else worth keeping."""
        raise NotImplementedError


def corners(boxes: torch.Tensor) -> np.ndarray:
    """cxcywh (..., 4) -> xyxy clipped to the unit square, float64 numpy."""
    boxes = boxes.detach().double().cpu().numpy()
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1).clip(0.0, 1.0)


def centre_boxes(boxes: np.ndarray, device: torch.device) -> torch.Tensor:
    """xyxy (..., 4) numpy -> cxcywh float32 tensor."""
    boxes = np.asarray(boxes, dtype=np.float32)
    joined = np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)
    return torch.from_numpy(joined).to(device)
