"""The three groups of queries and their loss terms (ChEX): sentences, pathologies, anatomy.

Each function takes outputs of the model for its queries, with the targets, and returns the requested unweighted
terms by name, to be weighted and added by `weights.weighted_sum`. The generation terms are
`generation.generation_loss` of the sentence generator's logits, for queries chosen with
`sampling.choose_for_generation`.

What is not annotated is masked, never removed, so the graph does not depend on the data: with nothing annotated a term
is 0 and its gradients are 0. Targets that a data set does not have at all may be left out.

Symbols: N images, Q queries of the kind (S sentences, C classes, A anatomies), R regions per query, T padded targets
per query, D feature size. `query_features`, `region_boxes`, ... are the fields of `ChexOutput` of that name; the
features are those after the post decoder, if there is one. Boxes are (xc, yc, w, h), relative to the network's square
input.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .contrastive import (
    AnatomyContrast,
    anatomy_classification_loss,
    global_contrastive_loss,
    pathology_classification_loss,
    sentence_contrastive_loss,
    sentence_mse_loss,
)
from .detection import DEFAULT_DETECTION, DetectionOptions, anatomy_detection_loss, pathology_detection_loss
from .matching import ObjectiveMode
from .reduction import SINGLE_PROCESS, Collectives, full_precision, keep_valid, masked_mean, mean_over_images
from .sampling import subsample_classes_by_frequency


SENTENCE_TERMS = ("global_contrastive", "sentence_contrastive", "sentence_mse")
PATHOLOGY_TERMS = ("pathology_detection", "pathology_classification")
ANATOMY_TERMS = ("anatomy_detection", "anatomy_classification", "anatomy_mse")


@dataclass(frozen=True)
class SentenceOptions:
    """Settings of the sentence terms; the defaults are the paper's. See the losses of the same names.

    `identical_negatives`: whether a sentence that occurs twice is a negative of itself, in `sentence_contrastive`.
    """

    global_temperature: float = 0.2
    temperature: float = 0.25
    lambda_region_to_sentence: float = 1.0
    lambda_sentence_to_region: float = 0.0
    cross_image_negatives: bool = True
    identical_negatives: bool = True


@dataclass(frozen=True)
class PathologyOptions:
    """Settings of the pathology terms; the defaults are the paper's. See the losses of the same names."""

    temperature: float = 0.2
    use_negatives_of_other_classes: bool = True
    ignore_other_classes_when_negative: bool = False
    detection: DetectionOptions = DEFAULT_DETECTION


@dataclass(frozen=True)
class AnatomyOptions:
    """Settings of the anatomy terms; the defaults are the paper's. See the losses of the same names.

    `subsample_negatives` is the number of classes whose absence is contrasted.
    """

    temperature: float = 0.25
    contrast: AnatomyContrast = "posneg"
    subsample_negatives: int | None = 10
    detection: DetectionOptions = DEFAULT_DETECTION


DEFAULT_SENTENCE = SentenceOptions()
DEFAULT_PATHOLOGY = PathologyOptions()
DEFAULT_ANATOMY = AnatomyOptions()


def sentence_objective(
    query_features: Tensor,
    sentence_features: Tensor,
    sentence_mask: Tensor,
    patch_features: Tensor | None = None,
    sentence_ids: Tensor | None = None,
    terms: Collection[str] = SENTENCE_TERMS,
    options: SentenceOptions = DEFAULT_SENTENCE,
    collectives: Collectives = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Terms of the sentence queries: the sentences of the image's report are the prompts.

    Args:
        query_features: (N, S, D) ROI feature of each sentence.
        sentence_features: (N, S, D) features of the sentences, the prompts of these queries, not normalised.
        sentence_mask: (N, S) bool, valid sentences.
        patch_features: (N, ..., D) of the image encoder, needed for "global_contrastive".
        sentence_ids: (N, S) equal for identical sentences, which then are no negatives of each other; by default, as
            in the paper, they are. Needed without `options.identical_negatives`.
        terms: which of `SENTENCE_TERMS` to compute; other names are left to the other functions.
        options: temperatures and the like.
        collectives: the other processes of a distributed run, whose sentences are negatives too.

    Returns:
        The requested terms, scalars.

    Raises:
        ValueError: if "global_contrastive" is requested without `patch_features`, or `sentence_ids` are needed.
    """
    losses = {}
    if "global_contrastive" in terms:
        if patch_features is None:
            raise ValueError("The term 'global_contrastive' needs patch_features, the image encoder's output.")
        images = _mean_of_patches(patch_features), _mean_of_valid(sentence_features, sentence_mask)
        *features, mask = collectives.gather_all([*images, sentence_mask.any(dim=1)])
        losses["global_contrastive"] = global_contrastive_loss(
            *features, options.global_temperature, mask, collectives.of("global_contrastive")
        )
    if "sentence_contrastive" in terms:
        if sentence_ids is None and not options.identical_negatives:
            raise ValueError("Without identical_negatives, 'sentence_contrastive' needs sentence_ids.")
        own = [sentence_features, query_features, sentence_mask, *([] if sentence_ids is None else [sentence_ids])]
        sentences, queries, mask, *ids = collectives.gather_all(own)
        losses["sentence_contrastive"] = sentence_contrastive_loss(
            sentences,
            queries,
            mask,
            options.temperature,
            options.lambda_region_to_sentence,
            options.lambda_sentence_to_region,
            options.cross_image_negatives,
            ids[0] if ids else None,
            collectives.of("sentence_contrastive"),
        )
    if "sentence_mse" in terms:
        losses["sentence_mse"] = sentence_mse_loss(
            sentence_features, query_features, sentence_mask, collectives.of("sentence_mse")
        )
    return losses


def pathology_objective(
    query_features: Tensor,
    region_boxes: Tensor,
    region_scores: Tensor,
    region_features: Tensor,
    positive: Tensor,
    negative: Tensor,
    target_boxes: Tensor | None = None,
    target_mask: Tensor | None = None,
    has_boxes: Tensor | None = None,
    labels: Tensor | None = None,
    has_labels: Tensor | None = None,
    terms: Collection[str] = PATHOLOGY_TERMS,
    options: PathologyOptions = DEFAULT_PATHOLOGY,
    objective_mode: ObjectiveMode = "corrected",
    collectives: Collectives = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Terms of the pathology queries: the positive prompts of the classes kept in this step.

    Args:
        query_features: (N, C, D) ROI feature of each class.
        region_boxes: (N, C, R, 4).
        region_scores: (N, C, R) probabilities.
        region_features: (N, C, R, D).
        positive: (C, D) positive class prompts, which are the queries.
        negative: (C, D) negative class prompts.
        target_boxes: (N, C, T, 4), padded. None: no class has annotated boxes.
        target_mask: (N, C, T) bool, valid targets.
        has_boxes: (N, C) bool, classes whose boxes are annotated in the image (absent classes have no box) and kept
            by the class sub-sampling.
        labels: (N, C) 1 or True where present. None: no class is labelled.
        has_labels: (N, C) bool, classes that are labelled in the image and kept by the class sub-sampling.
        terms: which of `PATHOLOGY_TERMS` to compute; other names are left to the other functions.
        options: temperatures, coefficients and the like.
        objective_mode: "official" rewards an arbitrary one of the regions that share a target, as the original code
            does, see `match_regions`.
        collectives: the other processes of a distributed run.

    Returns:
        The requested terms, scalars, and for the log "pathology_detection/box" and "pathology_detection/score".
    """
    images, classes = query_features.shape[:2]
    losses = {}
    if "pathology_detection" in terms:
        if target_boxes is None:
            target_boxes = region_boxes.new_zeros(images, classes, 0, 4)
            target_mask, has_boxes = _none_valid(target_boxes), _none_valid(query_features)
        detection = pathology_detection_loss(
            region_boxes,
            region_scores,
            region_features,
            positive,
            negative,
            target_boxes,
            target_mask,
            has_boxes,
            options.detection,
            objective_mode,
            collectives.of("pathology_detection"),
        )
        losses["pathology_detection"] = detection.loss
        losses["pathology_detection/box"] = detection.box_loss.detach()
        losses["pathology_detection/score"] = detection.score_loss.detach()
    if "pathology_classification" in terms:
        if labels is None:
            labels = has_labels = _none_valid(query_features)
        loss = pathology_classification_loss(
            query_features,
            positive,
            negative,
            labels,
            options.temperature,
            options.use_negatives_of_other_classes,
            options.ignore_other_classes_when_negative,
        )
        losses["pathology_classification"] = mean_over_images(
            loss, has_labels, collectives.of("pathology_classification")
        )
    return losses


def anatomy_objective(
    query_features: Tensor,
    present: Tensor,
    region_boxes: Tensor | None = None,
    target_boxes: Tensor | None = None,
    has_boxes: Tensor | None = None,
    multi_region_boxes: Tensor | None = None,
    multi_region_scores: Tensor | None = None,
    multi_target_boxes: Tensor | None = None,
    multi_target_mask: Tensor | None = None,
    positive: Tensor | None = None,
    negative: Tensor | None = None,
    labels: Tensor | None = None,
    has_labels: Tensor | None = None,
    region_positive: Tensor | None = None,
    region_negative: Tensor | None = None,
    sentence_features: Tensor | None = None,
    has_sentences: Tensor | None = None,
    kept: Tensor | None = None,
    terms: Collection[str] = ANATOMY_TERMS,
    options: AnatomyOptions = DEFAULT_ANATOMY,
    objective_mode: ObjectiveMode = "corrected",
    generator: torch.Generator | None = None,
    collectives: Collectives = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Terms of the anatomy queries: prompts that name anatomical regions, or the regions' boxes themselves.

    Args:
        query_features: (N, A, D) ROI feature of each single anatomy.
        present: (N, A) bool, anatomies whose box lies in the image.
        region_boxes: (N, A, R, 4), needed for "anatomy_detection" (which box queries do not have).
        target_boxes: (N, A, 4). None: no boxes are annotated.
        has_boxes: (N, A) bool, boxes annotated in the image.
        multi_region_boxes: (N, A_m, R, 4) of the multi-region anatomies, or None.
        multi_region_scores: (N, A_m, R).
        multi_target_boxes: (N, A_m, T, 4), padded.
        multi_target_mask: (N, A_m, T) bool, annotated and in the image.
        positive: (C, D) positive class prompts, needed for "anatomy_classification".
        negative: (C, D) negative class prompts.
        labels: (N, A, C) 1 or True where present. None: no class is labelled.
        has_labels: (N, A, C) bool, labels annotated.
        region_positive: (A, C, D) class-in-region prompts, for the contrast "all" only.
        region_negative: (A, C, D) idem.
        sentence_features: (N, A, D) mean feature of the region's sentences. None: there are none.
        has_sentences: (N, A) bool, regions with sentences.
        kept: (A,) bool, anatomies that the sub-sampling of this step keeps for detection and MSE. Default: all.
        terms: which of `ANATOMY_TERMS` to compute; other names are left to the other functions.
        options: temperatures, coefficients and the like.
        objective_mode: "official" lets regions outside the image (their boxes are all zero) take part in the MSE, and
            matches multi-region anatomies with scipy, as the original code does.
        generator: for the sub-sampling of negative classes; seeded alike in all processes.
        collectives: the other processes of a distributed run.

    Returns:
        The requested terms, scalars, and for the log "anatomy_detection/single" and "anatomy_detection/multi".

    Raises:
        ValueError: if outputs or prompts that a requested term needs are missing.
    """
    if kept is None:
        kept = torch.ones(query_features.shape[1], dtype=torch.bool, device=query_features.device)
    losses = {}
    if "anatomy_detection" in terms:
        if region_boxes is None:
            raise ValueError("The term 'anatomy_detection' needs region_boxes, so the anatomies must be text queries.")
        if target_boxes is None:
            target_boxes, has_boxes = region_boxes.new_zeros(*present.shape, 4), torch.zeros_like(present)
        detection = anatomy_detection_loss(
            region_boxes,
            target_boxes,
            present & has_boxes & kept,
            multi_region_boxes,
            multi_region_scores,
            multi_target_boxes,
            multi_target_mask,
            options.detection,
            objective_mode,
            collectives.of("anatomy_detection"),
        )
        losses["anatomy_detection"] = detection.loss
        losses["anatomy_detection/single"] = detection.single.detach()
        losses["anatomy_detection/multi"] = detection.multi.detach()
    if "anatomy_classification" in terms:
        if positive is None or negative is None:
            raise ValueError("The term 'anatomy_classification' needs the class prompts positive and negative.")
        if labels is None:
            labels = has_labels = torch.zeros(*present.shape, len(positive), dtype=torch.bool, device=present.device)
        observed = has_labels & present[..., None]
        counts = torch.stack([labels.bool() & observed, observed]).sum(dim=(1, 2))
        positives, annotated = collectives.sum(counts).unbind()
        class_subset = subsample_classes_by_frequency(positives, annotated > 0, options.subsample_negatives, generator)
        loss = anatomy_classification_loss(
            query_features,
            positive,
            negative,
            labels,
            observed,
            options.temperature,
            options.contrast,
            class_subset,
            region_positive,
            region_negative,
        )
        # Unlike the other terms, every region counts the same, whatever image it is in.
        losses["anatomy_classification"] = masked_mean(
            loss, observed.any(dim=-1), collectives.of("anatomy_classification")
        )
    if "anatomy_mse" in terms:
        if sentence_features is None:
            sentence_features, has_sentences = torch.zeros_like(query_features), torch.zeros_like(present)
        described = has_sentences & kept
        if objective_mode == "corrected":
            described = described & present
        losses["anatomy_mse"] = sentence_mse_loss(
            sentence_features, query_features, described, collectives.of("anatomy_mse")
        )
    return losses


@full_precision
def _mean_of_patches(patch_features: Tensor) -> Tensor:
    """Mean over all patches. (N, ..., D) -> (N, D)."""
    return patch_features.flatten(1, -2).mean(dim=1)


@full_precision
def _mean_of_valid(features: Tensor, mask: Tensor) -> Tensor:
    """Mean over the second axis of the valid features, 0 without any. (N, S, D), (N, S) -> (N, D)."""
    return keep_valid(features, mask).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _none_valid(tensor: Tensor) -> Tensor:
    """An all-False mask for a tensor of features or boxes. (..., D) -> (...)."""
    return torch.zeros(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
