"""What all procedures share: the model with cached prompts, images encoded once, and sentence generation."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from processing_chex.prompt_sets import PromptSet, anatomy_prompts
from processing_chex.vocabulary import ANATOMY_NAMES

from .records import Targets


PROMPT_CHUNK = 256
MAX_CACHED_TEXTS = 20_000
MAX_CHARACTERS = 1000


@dataclass
class EvaluationContext:
    """Model, processor and settings of one evaluation.

    Attributes:
        model: `ChexModel` in evaluation mode (or anything with its interface).
        processor: `ChexProcessor` that belongs to it.
        generation_batch: sentences generated together.
        seconds: time spent per part, filled while running.
    """

    model: Any
    processor: Any
    generation_batch: int = 512
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

    @property
    def independent_queries(self) -> bool:
        """Whether the feature of a box does not depend on the other boxes of its image."""
        return getattr(self.model.config, "attention_mode", "grouped") == "grouped"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Prompt features (Q, D), not normalised; each text is encoded once, as long as there is room."""
        if len(self._features) > MAX_CACHED_TEXTS:  # generated sentences without end would fill the memory
            self._features.clear()
        missing = [text for text in dict.fromkeys(texts) if text not in self._features]
        for start in range(0, len(missing), PROMPT_CHUNK):
            chunk = missing[start : start + PROMPT_CHUNK]
            # A generated sentence may exceed what is accepted of a user; the encoder reads only its beginning anyway.
            encoded = self.processor(text=[text[:MAX_CHARACTERS] for text in chunk], return_tensors="pt").to(
                self.device
            )
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

    def class_features(self, prompts: PromptSet, kind: str) -> torch.Tensor:
        """(C, D) features of the `positive`, `negative` or `box` prompts of finding classes."""
        return self.ensemble_features(getattr(prompts, kind), prompts.names)

    def generate(self, features: torch.Tensor, **generation: Any) -> list[str]:
        """One sentence for each of the features (n, D), in flat padded batches."""
        texts: list[str] = []
        for chunk in features.split(self.generation_batch):
            if not len(chunk):
                continue
            mask = torch.ones(1, len(chunk), dtype=torch.bool, device=chunk.device)
            ids = self.model.generate(query_features=chunk[None], query_mask=mask, **generation)
            texts += self.processor.decode_sentences(ids)[0]
        return texts


@dataclass
class Batch:
    """Images encoded once for all procedures: `image_features` of B images and their targets.

    Features of annotated boxes are computed when first asked for and then shared.
    """

    context: EvaluationContext
    image_features: Any
    targets: list[Targets]
    _regions: torch.Tensor | None = None
    _objects: tuple[torch.Tensor, np.ndarray] | None = None

    def encode(self, boxes: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        """Features (B, M, D), after the post decoder, of boxes (B, M, 4) xyxy where `mask` (B, M)."""
        context = self.context
        return context.model.encode_boxes(
            self.image_features,
            centre_boxes(boxes, context.device),
            box_mask=torch.from_numpy(mask).to(context.device),
            use_post_decoder=context.has_post_decoder,
        )

    def region_features(self) -> torch.Tensor:
        """(B, A, D) features of the regions that are present."""
        if self._regions is None:
            self._regions = self.encode(
                np.stack([target.anatomy_boxes for target in self.targets]),
                np.stack([target.anatomy_present for target in self.targets]),
            )
        return self._regions

    def object_features(self) -> tuple[torch.Tensor, np.ndarray]:
        """(B, M, D) features of the finding boxes, M the most in one image, and which are valid (B, M)."""
        if self._objects is None:
            counts = np.array([len(target.object_boxes) for target in self.targets])
            width = int(counts.max(initial=0))
            mask = np.arange(width)[None] < counts[:, None]
            boxes = np.zeros((*mask.shape, 4))
            for row, target in zip(boxes, self.targets, strict=True):
                row[: len(target.object_boxes)] = target.object_boxes
            dimension = self.context.model.config.projection_dim
            nothing = torch.zeros(len(counts), 0, dimension, device=self.context.device)
            features = self.encode(boxes, mask) if width else nothing
            self._objects = (features, mask)
        return self._objects


def corners(boxes: torch.Tensor) -> np.ndarray:
    """cxcywh (..., 4) -> xyxy clipped to the unit square, float64 numpy."""
    boxes = boxes.detach().cpu().double().numpy()  # not every device has double precision
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1).clip(0.0, 1.0)


def centre_boxes(boxes: np.ndarray, device: torch.device) -> torch.Tensor:
    """xyxy (..., 4) numpy -> cxcywh float32 tensor."""
    boxes = np.asarray(boxes, dtype=np.float32)
    joined = np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)
    return torch.from_numpy(joined).to(device)
