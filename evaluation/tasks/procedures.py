"""
Inference procedures: what the model predicts for a batch of images, as plain arrays and texts.

A procedure knows nothing about metrics and post-processing, so that tasks of one kind on one data set share what it
predicts. Boxes are xyxy, normalised to the network square and clipped to it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from processing_chex.prompt_sets import PromptSet
from processing_chex.report import REPORT_PRESETS, ReportOptions, ReportQueries, deduplicate, sentence_similarity

from ..predictions import Predictions
from .base import Batch, EvaluationContext, corners
from .catalog import Preset, Task


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """Float32 on the CPU: half of the space of float64, and more digits than the model has."""
    return tensor.detach().float().cpu().numpy()


def logits(probability: torch.Tensor) -> np.ndarray:
    """Undo the sigmoid of `ChexModel.classify`: differences of cosines, float32."""
    return probability.detach().cpu().double().logit(eps=1e-9).float().numpy()  # not every device has doubles


class Procedure:
    """
    One kind of inference, for all tasks that agree on its settings.

    Args:
        context: Model and prompts.
        task: Of which kind, prompts and negatives are used.
        prompts: Prompts of the finding classes.
        preset: How sentences are generated.
    """

    def __init__(self, context: EvaluationContext, task: Task, prompts: PromptSet, preset: Preset):
        self.context, self.task, self.prompts, self.preset = context, task, prompts, preset

    @property
    def generation(self) -> dict:
        positions = getattr(self.context.model.config.generator_config, "n_positions", self.preset.max_length)
        return {"max_length": min(self.preset.max_length, positions), "do_sample": False, "num_beams": 1}

    def predict(self, batch: Batch) -> Predictions:
        """Predictions for one batch."""
        raise NotImplementedError


def _ids(batch: Batch) -> list[str]:
    return [target.sample_id for target in batch.targets]


def _no_units(batch: Batch) -> np.ndarray:
    return np.zeros(len(batch.targets), dtype=np.int64)


class AnatomyLocalizer(Procedure):
    """`boxes` (n, A, 4), the envelope of all region boxes, present or not; `reported` (n, A)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._queries = self.context.anatomy_features()

    def predict(self, batch: Batch) -> Predictions:
        output = self.context.model(
            image_features=batch.image_features, prompt_features=self._queries, use_post_decoder=False
        )
        regions = corners(output.region_boxes)
        boxes = np.concatenate([regions[..., :2].min(2), regions[..., 2:].max(2)], axis=-1)
        arrays = {"boxes": boxes.astype(np.float32), "reported": output.present.cpu().numpy()}
        return Predictions(_ids(batch), arrays, _no_units(batch))


class Detector(Procedure):
    """`boxes` (n, C, R, 4), `weights` and `margins` (n, C, R) of all candidates; the post decoder is off."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._queries, self._positive, self._negative = (
            self.context.class_features(self.prompts, kind) for kind in ("box", "positive", "negative")
        )

    def predict(self, batch: Batch) -> Predictions:
        model = self.context.model
        output = model(
            image_features=batch.image_features,
            prompt_features=self._queries,
            use_post_decoder=False,
            clip_boxes=True,
        )
        # (C, 1, 1, D) makes each class read its own candidates (B, C, R, D) only.
        probability = model.classify(
            output.region_features, self._positive[:, None, None], self._negative[:, None, None]
        ).squeeze(-1)
        arrays = {
            "boxes": corners(output.region_boxes).astype(np.float32),
            "weights": numbers(output.region_scores),
            "margins": logits(probability),
        }
        return Predictions(_ids(batch), arrays, _no_units(batch))


class Grounder(Procedure):
    """Per distinct phrase of an image, in sorted order: `boxes` (R, 4), `scores` (R); the post decoder is off."""

    def predict(self, batch: Batch) -> Predictions:
        phrases = [list(target.grounded_phrases()) for target in batch.targets]
        counts = np.array([len(of_image) for of_image in phrases])
        width = max(int(counts.max(initial=0)), 1)  # an image without phrases gets a query that is masked
        flat = [phrase for of_image in phrases for phrase in of_image]
        features = self.context.text_features(flat)
        mask = torch.from_numpy(np.arange(width)[None] < counts[:, None]).to(features.device)
        queries = features.new_zeros(*mask.shape, features.shape[-1])
        queries[mask] = features
        output = self.context.model(
            image_features=batch.image_features,
            prompt_features=queries,
            query_mask=mask,
            use_post_decoder=False,
            clip_boxes=True,
        )
        arrays = {
            "boxes": corners(output.region_boxes[mask]).astype(np.float32),
            "scores": numbers(output.region_scores[mask]),
        }
        return Predictions(_ids(batch), arrays, counts, {"phrases": flat}, tuple(arrays))


class BoxClassifier(Procedure):
    """`margins` (m, C) of every finding box against every class."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._positive = self.context.class_features(self.prompts, "positive")
        if self.task.negatives == "pos_centroid":
            self._negative = self._positive.mean(0, keepdim=True).expand_as(self._positive)
        else:
            self._negative = self.context.class_features(self.prompts, "negative")

    def predict(self, batch: Batch) -> Predictions:
        features, mask = batch.object_features()
        margins = logits(self.context.model.classify(features, self._positive, self._negative))[mask]
        return Predictions(_ids(batch), {"margins": margins}, mask.sum(1), {}, ("margins",))


class RegionClassifier(Procedure):
    """`margins` (n, A, C) of every region; zeros where it is absent."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._positive, self._negative = (
            self.context.class_features(self.prompts, kind) for kind in ("positive", "negative")
        )

    def predict(self, batch: Batch) -> Predictions:
        margins = logits(self.context.model.classify(batch.region_features(), self._positive, self._negative))
        margins[~np.stack([target.anatomy_present for target in batch.targets])] = 0.0
        return Predictions(_ids(batch), {"margins": margins}, _no_units(batch))


class BoxDescriber(Procedure):
    """A sentence in `generated` about every finding box that has a phrase, which is in `references`."""

    def predict(self, batch: Batch) -> Predictions:
        features, mask = batch.object_features()
        chosen = np.zeros_like(mask)
        for row, target in zip(chosen, batch.targets, strict=True):
            row[: len(target.object_phrases)] = [bool(phrase) for phrase in target.object_phrases]
        references = [phrase for target in batch.targets for phrase in target.object_phrases if phrase]
        texts = self.context.generate(features[torch.from_numpy(chosen).to(features.device)], **self.generation)
        return Predictions(_ids(batch), {}, chosen.sum(1), {"generated": texts, "references": references})


class RegionDescriber(Procedure):
    """A sentence in `generated` about every present region with a reference, its number in `regions`."""

    def predict(self, batch: Batch) -> Predictions:
        chosen = np.stack([target.described_regions() for target in batch.targets])
        if self.context.independent_queries:
            features = batch.region_features()
        else:  # in the official attention, regions that are described see each other and no others
            features = batch.encode(np.stack([target.anatomy_boxes for target in batch.targets]), chosen)
        texts = self.context.generate(features[torch.from_numpy(chosen).to(features.device)], **self.generation)
        images, regions = np.nonzero(chosen)
        references = [
            batch.targets[image].anatomy_sentences[region] for image, region in zip(images, regions, strict=True)
        ]
        return Predictions(
            _ids(batch),
            {"regions": regions},
            chosen.sum(1),
            {"generated": texts, "references": references},
            ("regions",),
        )


class ReportWriter(Procedure):
    """
    The sentences of reports before and after repetitions are dropped, in the order of the prompts: `generated`, and of
    each `query` (number among the prompts), `kept`, `boxes` (R, 4), `weights` (R), `probability` that it is abnormal.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._queries = ReportQueries.encode(self.prompts, self.context.text_features)
        self._options = REPORT_PRESETS[self.preset.report]

    def predict(self, batch: Batch) -> Predictions:
        context, queries, options = self.context, self._queries, self._options
        model = context.model
        output = model(image_features=batch.image_features, prompt_features=queries.features, clip_boxes=True)
        probability = queries.abnormality(output.query_features, model.classify, options.sign)
        found = (output.region_scores > options.threshold).any(-1)
        selected = queries.select(probability, found, findings=options.select_findings, regions=options.select_regions)
        texts = context.generate(output.query_features[selected], **self.generation)
        context.text_features([text for text in texts if text])  # of all reports at once; each then finds its own
        preference = numbers(output.query_scores[selected])
        counts = selected.sum(1).cpu().numpy()
        kept = [
            keep_of_report(context, texts[start:stop], preference[start:stop], options)
            for start, stop in _spans(counts)
        ]
        arrays = {
            "query": np.nonzero(selected.cpu().numpy())[1],
            "kept": np.concatenate([*kept, np.zeros(0, dtype=bool)]),
            "boxes": corners(output.region_boxes[selected]).astype(np.float32),
            "weights": numbers(output.region_scores[selected]),
            "probability": numbers(probability[selected]),
        }
        return Predictions(_ids(batch), arrays, counts, {"generated": texts}, tuple(arrays))


def _spans(counts: np.ndarray) -> list[tuple[int, int]]:
    ends = np.cumsum(counts)
    return list(zip((ends - counts).tolist(), ends.tolist(), strict=True))


def keep_of_report(
    context: EvaluationContext, texts: Sequence[str], preference: np.ndarray, options: ReportOptions
) -> np.ndarray:
    """Which sentences (n,) of one report stay: no empty ones, and of similar ones the preferred."""
    kept = np.zeros(len(texts), dtype=bool)
    written = [index for index, text in enumerate(texts) if text]
    similarity = sentence_similarity(context.text_features([texts[index] for index in written]))
    limits = (options.max_sentences, options.always_same, options.same_if_long)
    for index in deduplicate(similarity, preference[written], *limits):
        kept[written[index]] = True
    return kept


PROCEDURES: dict[str, type[Procedure]] = {
    "anatomy_localization": AnatomyLocalizer,
    "detection": Detector,
    "grounding": Grounder,
    "box_classification": BoxClassifier,
    "region_classification": RegionClassifier,
    "box_description": BoxDescriber,
    "region_description": RegionDescriber,
    "report_generation": ReportWriter,
}

__all__ = ["PROCEDURES", "Procedure", "keep_of_report", "logits", "numbers"]
