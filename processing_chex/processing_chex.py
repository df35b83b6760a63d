"""Processor for ChEX: images, prompts and boxes in; boxes, scores and sentences out."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .box_geometry import (
    class_wise_nms,
    clip_boxes,
    cxcywh_to_xyxy,
    enclosing_boxes,
    normalized_to_pixels,
    pixels_to_normalized,
    validate_boxes,
)
from .errors import ChexInputError
from .image_processing_chex import ChexImageProcessor
from .report import OPTION_NAMES, ReportQueries, report_options, report_queries, write_reports


MAX_PROMPT_CHARACTERS = 1000
CLIP_CONTEXT_LENGTH = 77


def validate_prompts(prompts: Sequence[str]) -> None:
    """Raise `ChexInputError` for the first prompt that is not a string, is empty, or has over 1,000 characters."""
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise ChexInputError(f"Prompt {number} is a {type(prompt).__name__}: prompts are strings.")
        if not prompt.strip():
            raise ChexInputError(f"Prompt {number} is empty: write what to look for, such as 'Pleural effusion'.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ChexInputError(
                f"Prompt {number} ('{prompt[:40]}…') has {len(prompt)} characters, but at most "
                f"{MAX_PROMPT_CHARACTERS} are allowed: ask for one finding or region at a time, in a short phrase."
            )


class ChexProcessor(ProcessorMixin):
    """Image processor, CLIP tokenizer for prompts and GPT-2 tokenizer for sentences in one object.

    Args:
        image_processor: a `ChexImageProcessor`.
        tokenizer: CLIP byte-pair tokenizer of the prompt encoder.
        generator_tokenizer: GPT-2 tokenizer of the sentence generator; `None` for models without one.
    """

    # Call-time defaults, in the way of transformers 5.
    text_kwargs = {"padding": True, "truncation": True}
    images_kwargs = {"return_tensors": "pt"}
    # What `write_reports` takes as options, for those who pass on keyword arguments.
    report_option_names = OPTION_NAMES

    def __init__(self, image_processor=None, tokenizer=None, generator_tokenizer=None):
        if generator_tokenizer is None:
            # ProcessorMixin requires, checks and saves every part that this method lists.
            self.get_attributes = partial(list, ("image_processor", "tokenizer"))
            self.generator_tokenizer = None
            super().__init__(image_processor, tokenizer)
        else:
            super().__init__(image_processor, tokenizer, generator_tokenizer)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The image processor class is known, so nothing needs to be registered; and ProcessorMixin would fall back
        # to the prompt tokenizer when the folder has no tokenizer for the generator. The classes of the tokenizers
        # are saved with them: with a configuration of no model, AutoTokenizer does not look at that of ChEX, which
        # it knows, or would have to run the code of, only where `modeling_chex` is imported.
        subfolder = kwargs.pop("subfolder", "")
        load = partial(AutoTokenizer.from_pretrained, pretrained_model_name_or_path, config=PreTrainedConfig())
        generator_folder = os.path.join(subfolder, "generator_tokenizer")
        image_processor = ChexImageProcessor.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        tokenizer = load(subfolder=subfolder, **kwargs)
        if os.path.isdir(pretrained_model_name_or_path):
            is_saved = os.path.isdir(os.path.join(pretrained_model_name_or_path, generator_folder))
            return [image_processor, tokenizer, load(subfolder=generator_folder, **kwargs) if is_saved else None]
        try:
            return [image_processor, tokenizer, load(subfolder=generator_folder, **kwargs)]
        except (OSError, ValueError):  # this Hub repository has no such folder
            return [image_processor, tokenizer, None]

    @property
    def model_input_names(self) -> list[str]:
        """What comes of images and text; boxes add `query_boxes` and `box_mask`."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask", "query_mask"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        boxes: Any = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Prepare a batch for `ChexModel`.

        Args:
            images: one image or a list: PIL, numpy, torch, or a path to PNG, JPEG or DICOM.
            text: prompts. One list of strings is shared by all images; a list of lists gives each image its own.
            boxes: query boxes as `xyxy` pixels of the original images. One box (4,) or list of boxes (M, 4) is shared
                by all images; a list of lists of boxes gives each image its own. Needs `images`.
            geometry: `"center_crop"` or `"letterbox"`, instead of the image processor's own.
            return_tensors: `"pt"` (the default) or `"np"`.

        Returns:
            `BatchFeature` with, as far as the inputs are given,

            - pixel_values (B, 3, S, S), image_frames (B, 4), original_sizes (B, 2): see `ChexImageProcessor`;
            - input_ids, attention_mask (B, Q, T), truncated to the context length with the end token kept, and
              query_mask (B, Q), False where an image has fewer prompts than others. Without images a plain list of
              prompts gives (Q, T) and no query_mask;
            - query_boxes (B, M, 4), normalised `cxcywh`, not clipped to the network square, and box_mask (B, M).

        Raises:
            ChexInputError: for an unusable image, an empty or overlong prompt, a wrong box, or lengths that differ.
        """
        if images is None and text is None:
            raise ChexInputError("Nothing to process: give images, text or both.")
        if images is None and boxes is not None:
            raise ChexInputError("boxes are in pixels of an image: give images with them.")
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = kwargs["images_kwargs"].pop("return_tensors", None)
        data: dict[str, np.ndarray] = {}
        if images is not None:
            data.update(self.image_processor(images, **kwargs["images_kwargs"], return_tensors="np"))
        if text is not None:
            batch_size = len(data["pixel_values"]) if images is not None else None
            data.update(self._encode_prompts(text, batch_size, kwargs["text_kwargs"]))
        if boxes is not None:
            names = images if isinstance(images, (list, tuple)) else [images]
            data.update(self._encode_boxes(boxes, names, data["image_frames"], data["original_sizes"]))
        return BatchFeature(data, tensor_type=return_tensors)

    def _encode_prompts(self, text: Any, batch_size: int | None, text_kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
        text = [text] if isinstance(text, str) else list(text)
        if all(isinstance(prompt, str) for prompt in text):
            encoded = self._tokenize(text, text_kwargs)
            if batch_size is None:
                return encoded
            encoded = {name: np.repeat(value[None], batch_size, axis=0) for name, value in encoded.items()}
            return encoded | {"query_mask": np.ones((batch_size, len(text)), dtype=bool)}

        per_image = [list(prompts) if isinstance(prompts, (list, tuple)) else [prompts] for prompts in text]
        if batch_size is not None and len(per_image) != batch_size:
            raise ChexInputError(
                f"text holds prompts for {len(per_image)} images, but there are {batch_size} images: give one list of "
                "prompts per image, or one list of strings for all of them."
            )
        num_queries = max(map(len, per_image), default=0)
        query_mask = np.array([[q < len(prompts) for q in range(num_queries)] for prompts in per_image], dtype=bool)
        query_mask = query_mask.reshape(len(per_image), num_queries)
        encoded = self._tokenize([prompt for prompts in per_image for prompt in prompts], text_kwargs)
        # Padded queries hold the empty prompt, so that no row of the attention mask is entirely zero.
        empty = self.tokenizer("", add_special_tokens=True)["input_ids"]
        ids = np.full((*query_mask.shape, encoded["input_ids"].shape[1]), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(ids)
        ids[..., : len(empty)], attention_mask[..., : len(empty)] = empty, 1
        ids[query_mask], attention_mask[query_mask] = encoded["input_ids"], encoded["attention_mask"]
        return {"input_ids": ids, "attention_mask": attention_mask, "query_mask": query_mask}

    def _tokenize(self, prompts: list[str], text_kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
        """Check and encode Q prompts -> input_ids and attention_mask, int64 (Q, T)."""
        validate_prompts(prompts)
        if not prompts:
            return {name: np.zeros((0, 2), dtype=np.int64) for name in ("input_ids", "attention_mask")}
        # A tokenizer that was saved without a length reports a huge number.
        context_length = min(self.tokenizer.model_max_length, CLIP_CONTEXT_LENGTH)
        text_kwargs = {"max_length": context_length, **text_kwargs, "return_tensors": "np"}
        encoded = self.tokenizer(prompts, **text_kwargs)
        return {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    def encode_boxes(
        self,
        boxes: Any,
        original_sizes: Any,
        image_frames: Any,
        images: Sequence[Any] = (),
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Query boxes for images that were processed before, as when an image is encoded once and asked about often.

        Args:
            boxes: as those of a call.
            original_sizes (B, 2), image_frames (B, 4): from that call.
            images: the images or their paths, for names in error messages.
            return_tensors: "pt", "np" or None.

        Returns:
            `query_boxes` (B, M, 4), normalised `cxcywh`, and `box_mask` (B, M).

        Raises:
            ChexInputError: for a wrong box, or lengths that differ.
        """
        frames, sizes = np.asarray(image_frames), np.asarray(original_sizes)
        return BatchFeature(self._encode_boxes(boxes, images, frames, sizes), tensor_type=return_tensors)

    def _encode_boxes(
        self, boxes: Any, images: Sequence[Any], frames: np.ndarray, sizes: np.ndarray
    ) -> dict[str, np.ndarray]:
        if len(boxes) == 4 and all(np.ndim(value) == 0 for value in boxes):
            boxes = [boxes]
        first = next((entry for entry in boxes if len(entry)), None)
        is_shared = first is not None and np.ndim(first[0]) == 0
        per_image = [boxes] * len(sizes) if is_shared else list(boxes)
        if len(boxes) and len(per_image) != len(sizes):
            raise ChexInputError(
                f"boxes holds boxes for {len(per_image)} images, but there are {len(sizes)} images: give one list of "
                "boxes per image, or one list of boxes for all of them."
            )
        per_image = per_image or [[]] * len(sizes)
        num_boxes = max(map(len, per_image), default=0)
        query_boxes = np.zeros((len(sizes), num_boxes, 4), dtype=np.float32)
        box_mask = np.zeros((len(sizes), num_boxes), dtype=bool)
        for index, image_boxes in enumerate(per_image):
            image = images[index] if index < len(images) else None
            name = str(image) if isinstance(image, (str, os.PathLike)) else f"image {index + 1}"
            height, width = sizes[index].tolist()
            checked = validate_boxes(image_boxes, height, width, image_name=name)
            normalized = pixels_to_normalized(checked, torch.from_numpy(frames[index]))
            corners = cxcywh_to_xyxy(normalized)
            unseen = (corners[:, 2:] <= 0).any(-1) | (corners[:, :2] >= 1).any(-1)
            if unseen.any():
                x0, y0, x1, y1 = frames[index].tolist()
                raise ChexInputError(
                    f"box {int(unseen.nonzero()[0]) + 1} of {name} lies entirely outside the part that the network "
                    f"sees, which is x {x0:g} to {x1:g} and y {y0:g} to {y1:g}: use the geometry 'letterbox', which "
                    "keeps the whole image."
                )
            query_boxes[index, : len(checked)] = normalized.numpy()
            box_mask[index, : len(checked)] = True
        return {"query_boxes": query_boxes, "box_mask": box_mask}

    def decode_sentences(self, token_ids: Tensor | np.ndarray | Sequence) -> list | str:
        """Token ids of any shape (..., T) -> nested lists of strings of shape (...).

        Special tokens are skipped and spaces before punctuation removed, as in the ChEX evaluation.
        """
        if self.generator_tokenizer is None:
            raise ChexInputError("This processor has no generator tokenizer, so it cannot decode sentences.")
        token_ids = torch.as_tensor(token_ids)
        if token_ids.ndim > 1:
            return [self.decode_sentences(entry) for entry in token_ids]
        text = self.generator_tokenizer.decode(token_ids, skip_special_tokens=True)
        # transformers 5 cleans up no more by itself, and the official results depend on it.
        return self.generator_tokenizer.clean_up_tokenization(text).strip()

    @torch.no_grad()
    def post_process_explanation(
        self,
        outputs: Any,
        sequences: Tensor | np.ndarray | Sequence[Sequence[str]] | None = None,
        target_sizes: Tensor | np.ndarray | Sequence[tuple[int, int]] | None = None,
        threshold: float = 0.5,
        prompts: Sequence[str] | Sequence[Sequence[str]] | None = None,
        image_frames: Tensor | np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Boxes, scores and sentences of every query, in original pixels.

        Args:
            outputs: `ChexOutput`.
            sequences: generated token ids (B, Q, T), or sentences that are already decoded.
            target_sizes: (B, 2) original (height, width), as `original_sizes` of the processor output. Without it the
                boxes stay normalised to the network square.
            threshold: a region counts as present if its score is above this; a query if any of its regions is.
            prompts: the text prompts as they were given to the processor.
            image_frames: as in the processor output; only needed when the geometry was chosen in that call.

        Returns:
            One dictionary per image. Its entries run over the Q valid queries, text first, then boxes:
            `labels` (Q,) index of the query; `prompts`, strings, or None for a box query; `scores` (Q,);
            `present` (Q,) bool; `boxes` (Q, 4), `xyxy` pixels around all regions, clipped to the image, zeros where
            nothing is present; `region_boxes` and `region_scores`, Q tensors (K, 4) and (K,) with the present
            regions, best first; `sentences`, strings, or None.
        """
        region_boxes, sizes = self._to_pixels(outputs.region_boxes, target_sizes, image_frames)
        region_scores = outputs.region_scores.float()
        present = (region_scores > threshold).any(-1)
        boxes = enclosing_boxes(region_boxes)
        if sizes is not None:
            boxes = clip_boxes(boxes, sizes[:, None])
            region_boxes = clip_boxes(region_boxes, sizes[:, None, None])
        boxes = boxes * present[..., None]
        if sequences is not None and not _is_nested_text(sequences):
            sequences = self.decode_sentences(sequences)

        results = []
        for index, valid in enumerate(self._valid_queries(outputs)):
            labels = valid.nonzero()[:, 0]
            image_prompts = _align_prompts(prompts, index, len(valid))
            order = [region_scores[index, q].argsort(descending=True, stable=True) for q in labels]
            order = [rank[region_scores[index, q, rank] > threshold] for q, rank in zip(labels, order, strict=True)]
            results.append(
                {
                    "labels": labels,
                    "prompts": [image_prompts[q] for q in labels],
                    "scores": outputs.query_scores[index, labels].float(),
                    "present": present[index, labels],
                    "boxes": boxes[index, labels],
                    "region_boxes": [region_boxes[index, q, rank] for q, rank in zip(labels, order, strict=True)],
                    "region_scores": [region_scores[index, q, rank] for q, rank in zip(labels, order, strict=True)],
                    "sentences": [None if sequences is None else sequences[index][q] for q in labels],
                }
            )
        return results

    @torch.no_grad()
    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.1,
        target_sizes: Tensor | np.ndarray | Sequence[tuple[int, int]] | None = None,
        text_labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        nms_threshold: float | None = 0.25,
        class_scores: Tensor | None = None,
        image_frames: Tensor | np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Every region of every query as a candidate detection; each query is a class of its own.

        Args:
            outputs: `ChexOutput`.
            threshold: lowest score to keep.
            target_sizes: as in `post_process_explanation`.
            text_labels: the prompts, as they were given to the processor.
            nms_threshold: IoU above which a worse box of the same query is dropped; None keeps all.
            class_scores: (B, Q, R) probabilities, such as from `ChexModel.classify`, to multiply the region scores
                with.
            image_frames: as in `post_process_explanation`.

        Returns:
            One dictionary per image, best score first: `scores` (N,), `labels` (N,) query indices, `boxes` (N, 4)
            `xyxy` pixels clipped to the image, `text_labels`, strings, or None where unknown.
        """
        region_boxes, sizes = self._to_pixels(outputs.region_boxes, target_sizes, image_frames)
        if sizes is not None:
            region_boxes = clip_boxes(region_boxes, sizes[:, None, None])
        scores = outputs.region_scores.float()
        if class_scores is not None:
            scores = scores * class_scores.to(scores)

        results = []
        for index, valid in enumerate(self._valid_queries(outputs)):
            keep = valid[:, None] & (scores[index] > threshold)
            labels = keep.nonzero()[:, 0]
            image_boxes, image_scores = region_boxes[index][keep], scores[index][keep]
            if nms_threshold is None:
                order = image_scores.argsort(descending=True, stable=True)
            else:
                order = class_wise_nms(image_boxes, image_scores, labels, nms_threshold)
            names = _align_prompts(text_labels, index, len(valid))
            results.append(
                {
                    "scores": image_scores[order],
                    "labels": labels[order],
                    "boxes": image_boxes[order],
                    "text_labels": [names[label] for label in labels[order]],
                }
            )
        return results

    def report_queries(self, model: Any, preset: str = "found", **options: Any) -> ReportQueries:
        """Encode the prompts of reports, for `ChexModel.report(queries=...)`. Options as those of `write_reports`."""
        chosen = report_options(preset, **options)
        return report_queries(model, self, chosen.findings, chosen.region_names)

    def write_reports(
        self,
        model: Any,
        image_features: Any,
        original_sizes: Tensor | np.ndarray | None = None,
        image_frames: Tensor | np.ndarray | None = None,
        preset: str = "found",
        queries: ReportQueries | None = None,
        generation: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Reports about images that are encoded: what `ChexModel.report` returns, which calls this.

        Args:
            model: the `ChexModel` that has encoded them.
            image_features, original_sizes, image_frames: of N images.
            preset: "found" or "paper", see `report.ReportOptions`.
            queries: as from `report_queries` with the same options.
            generation: of `ChexModel.generate`.
            options: of `report.ReportOptions`, in place of those of the preset.

        Raises:
            ValueError: for an unknown option or value, or a model without a sentence generator.
        """
        chosen = report_options(preset, **options)
        return write_reports(model, self, image_features, original_sizes, image_frames, chosen, queries, generation)

    def _to_pixels(self, boxes: Tensor, target_sizes: Any, image_frames: Any) -> tuple[Tensor, Tensor | None]:
        """(B, ..., 4) normalised `cxcywh` -> `xyxy` pixels, and the sizes (B, 2) to clip to, if they are known."""
        boxes = boxes.float()
        if target_sizes is None:
            return cxcywh_to_xyxy(boxes), None
        sizes = torch.as_tensor(target_sizes, device=boxes.device).reshape(-1, 2)
        if len(sizes) != len(boxes):
            raise ChexInputError(f"There are {len(sizes)} target_sizes for {len(boxes)} images: give one per image.")
        if image_frames is None:
            image_frames = [self.image_processor.frame(height, width) for height, width in sizes.tolist()]
        frames = torch.as_tensor(image_frames, dtype=torch.float32, device=boxes.device)
        return normalized_to_pixels(boxes, frames.view(-1, *[1] * (boxes.ndim - 2), 4)), sizes

    @staticmethod
    def _valid_queries(outputs: Any) -> Tensor:
        mask = outputs.query_mask
        return torch.ones_like(outputs.query_scores, dtype=torch.bool) if mask is None else mask.bool()


def _is_nested_text(sequences: Any) -> bool:
    return (
        isinstance(sequences, (list, tuple))
        and all(isinstance(entry, (list, tuple)) for entry in sequences)
        and all(isinstance(text, str) for entry in sequences for text in entry)
    )


def _align_prompts(prompts: Any, index: int, num_queries: int) -> list[str | None]:
    """The prompts of image `index` along its query axis: None for the box queries and padding behind them."""
    if prompts is None:
        return [None] * num_queries
    prompts = [prompts] if isinstance(prompts, str) else prompts
    own = prompts if all(isinstance(prompt, str) for prompt in prompts) else prompts[index]
    return [*own, *[None] * (num_queries - len(own))]


__all__ = ["ChexProcessor", "validate_prompts"]
