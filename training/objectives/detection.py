"""Box and score losses of the pathology and anatomy queries, and the focal loss they use (ChEX).

Boxes are (xc, yc, w, h), relative to the network's square input. Symbols: N images, C classes, A single and A_m
multi-region anatomies, R regions per query, T padded targets per query, D feature size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .matching import Matching, MatchingMode, ObjectiveMode, match_regions, pairwise
from .reduction import SINGLE_PROCESS, Collectives, full_precision, keep_valid, masked_mean, mean_within_image


@dataclass(frozen=True)
class DetectionOptions:
    """Coefficients of matching cost and detection losses; the defaults are the paper's.

    Attributes:
        cost_l1, cost_giou, cost_class, cost_score: matching cost of L1, 1 - GIoU, 1 - class probability and
            1 - region score. The class term is used for pathologies only.
        loss_l1, loss_giou, loss_score: loss coefficients of L1, 1 - GIoU and the focal score loss. The score term is
            used for pathologies only.
        focal_alpha: weight of positives in the focal loss; None for the automatic one.
        focal_gamma: focusing exponent.
        matching: "balanced" or "ignore", see `match_regions`.
        greedy: greedy instead of optimal matching.
    """

    cost_l1: float = 5.0
    cost_giou: float = 2.0
    cost_class: float = 1.0
    cost_score: float = 3.0
    loss_l1: float = 5.0
    loss_giou: float = 2.0
    loss_score: float = 3.0
    focal_alpha: float | None = None
    focal_gamma: float = 2.0
    matching: MatchingMode = "balanced"
    greedy: bool = False


DEFAULT_DETECTION = DetectionOptions()


class PathologyDetectionLoss(NamedTuple):
    """Scalars: `loss` = `box_loss` + loss_score * `score_loss`; and the matching behind them, (N, C, R, T) and
    (N, C, R)."""

    loss: Tensor
    box_loss: Tensor
    score_loss: Tensor
    matching: Matching


class AnatomyDetectionLoss(NamedTuple):
    """Scalars: `loss` over all anatomies, `single` and `multi` over their own (for the log)."""

    loss: Tensor
    single: Tensor
    multi: Tensor


@full_precision
def focal_loss(
    probabilities: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    from_logits: bool = False,
    mask: Tensor | None = None,
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Binary focal loss (Lin et al. 2017), element by element.

        FL = -alpha   * (1 - p)^gamma * log p          where the target is 1
             -(1 - alpha) * p^gamma   * log(1 - p)     where it is 0

    with p clamped to [1e-7, 1 - 1e-7] inside the logarithms only. The automatic alpha weighs the rarer kind up,

        alpha = (n_neg + 1) / (n_pos + n_neg + 2)      counted over the whole tensor (step)

    Args:
        probabilities: (...) p, or logits with `from_logits`.
        targets: (...) bool.
        alpha: weight of positives; None for the automatic one.
        gamma: focusing exponent.
        from_logits: whether `probabilities` are logits.
        mask: (...) bool, elements that are counted; the others have loss 0. Default: all.
        collectives: the other processes of a distributed run, for the automatic alpha.

    Returns:
        (...) losses.
    """
    targets = targets.bool()
    if mask is None:
        mask = torch.ones_like(targets)
    probabilities = keep_valid(probabilities, mask)
    if from_logits:
        probabilities = probabilities.sigmoid()
    if alpha is None:
        positives, total = collectives.total(torch.stack([(targets & mask).sum(), mask.sum()])).unbind()
        alpha = (total - positives + 1).to(probabilities.dtype) / (total + 2)
    clamped = probabilities.clamp(1e-7, 1 - 1e-7)
    at_positive = -alpha * (1 - probabilities) ** gamma * clamped.log()
    at_negative = -(1 - alpha) * probabilities**gamma * (1 - clamped).log()
    return keep_valid(torch.where(targets, at_positive, at_negative), mask)


@full_precision
def pathology_detection_loss(
    region_boxes: Tensor,
    region_scores: Tensor,
    region_features: Tensor,
    positive: Tensor,
    negative: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    annotated: Tensor,
    options: DetectionOptions = DEFAULT_DETECTION,
    objective_mode: ObjectiveMode = "corrected",
    collectives: Collectives = SINGLE_PROCESS,
) -> PathologyDetectionLoss:
    """Pathology detection loss (ChEX, pathology tokens).

    The regions s of a class query are matched (balanced) to the class's target boxes t by the cost

        5 * L1 + 2 * (1 - GIoU) + 1 * (1 - p_s) + 3 * (1 - w_s)

    with w_s the region score and p_s = softmax(<f_s, pos>, <f_s, neg>)_pos of the region feature, not normalised. Then

        box_loss(n, c)   = mean over assigned pairs of 5 * L1 + 2 * (1 - GIoU), 0 for classes without boxes
        score_loss(n, c) = mean_r focal(w_r, matched_r)
        L = box_loss + 3 * score_loss

    each averaged over the annotated classes of an image (with or without boxes), then over images that have any.

    Args:
        region_boxes: (N, C, R, 4).
        region_scores: (N, C, R) w, probabilities.
        region_features: (N, C, R, D) f.
        positive: (C, D) positive class prompts.
        negative: (C, D) negative class prompts.
        target_boxes: (N, C, T, 4), padded.
        target_mask: (N, C, T) bool, valid targets.
        annotated: (N, C) bool, classes whose boxes are annotated in the image: without boxes, the class is absent.
        options: coefficients.
        objective_mode: "official" for the original code's choice of matched regions, see `match_regions`.
        collectives: the other processes of a distributed run.

    Returns:
        `PathologyDetectionLoss`; its losses are 0, connected to the outputs, if nothing is annotated.
    """
    target_mask = target_mask & annotated[..., None]
    l1, giou = pairwise(region_boxes, keep_valid(target_boxes, target_mask))  # (N, C, R, T)
    with torch.no_grad():
        prompts = torch.stack([positive, negative])  # (2, C, D)
        probability = torch.einsum("ncrd,pcd->ncrp", region_features, prompts).softmax(dim=-1)[..., :1]  # p_s
        cost = (
            options.cost_l1 * l1
            + options.cost_giou * giou
            + options.cost_class * (1 - probability)
            + options.cost_score * (1 - region_scores[..., None])
        )
    matching = match_regions(cost, target_mask, options.matching, options.greedy, objective_mode)

    box_loss = _mean_of_assigned(options.loss_l1 * l1 + options.loss_giou * giou, matching.assigned)  # (N, C)
    # Images without any annotated class are no part of the batch; other classes count as negatives in alpha.
    counted = annotated.any(dim=1)[:, None, None].expand_as(matching.matched)
    focal = focal_loss(
        region_scores,
        matching.matched,
        options.focal_alpha,
        options.focal_gamma,
        mask=counted,
        collectives=collectives,
    )
    # `mean_over_images` of both, with one count
    images = collectives.mean_count(annotated.any(dim=1).sum().to(box_loss.dtype))
    box_loss = mean_within_image(box_loss, annotated).sum() / images
    score_loss = mean_within_image(focal.mean(dim=-1), annotated).sum() / images
    return PathologyDetectionLoss(box_loss + options.loss_score * score_loss, box_loss, score_loss, matching)


@full_precision
def anatomy_detection_loss(
    region_boxes: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    multi_region_boxes: Tensor | None = None,
    multi_region_scores: Tensor | None = None,
    multi_target_boxes: Tensor | None = None,
    multi_target_mask: Tensor | None = None,
    options: DetectionOptions = DEFAULT_DETECTION,
    objective_mode: ObjectiveMode = "corrected",
    collectives: Collectives = SINGLE_PROCESS,
) -> AnatomyDetectionLoss:
    """Anatomy detection loss (ChEX, anatomy tokens).

    Single anatomies: each of the R regions is regressed to the one target, R terms per target of

        5 * L1 + 2 * (1 - GIoU)

    Multi-region anatomies (both lungs, ...): balanced matching by 5 * L1 + 2 * (1 - GIoU) + 3 * (1 - w), one term
    per anatomy, the mean of the above over its assigned pairs. L is the mean over all terms of both kinds. The region
    scores themselves are not supervised.

    Args:
        region_boxes: (N, A, R, 4).
        target_boxes: (N, A, 4).
        target_mask: (N, A) bool, annotated and in the image.
        multi_region_boxes: (N, A_m, R, 4) or None.
        multi_region_scores: (N, A_m, R) w.
        multi_target_boxes: (N, A_m, T, 4).
        multi_target_mask: (N, A_m, T) bool, annotated and in the image.
        options: coefficients.
        objective_mode: "official" for the original code's choice of matched regions, see `match_regions`.
        collectives: the other processes of a distributed run.

    Returns:
        `AnatomyDetectionLoss`; its losses are 0, connected to the outputs, if nothing is annotated.
    """
    l1, giou = pairwise(region_boxes, keep_valid(target_boxes, target_mask)[:, :, None, :])  # (N, A, R, 1)
    single = options.loss_l1 * l1.squeeze(-1) + options.loss_giou * giou.squeeze(-1)
    single_mask = target_mask[..., None].expand_as(single)
    single_sum, single_count = keep_valid(single, single_mask).sum(), single_mask.sum().to(single.dtype)

    multi_sum, multi_count = torch.zeros_like(single_sum), torch.zeros_like(single_count)
    if multi_region_boxes is not None:
        l1, giou = pairwise(multi_region_boxes, keep_valid(multi_target_boxes, multi_target_mask))  # (N, A_m, R, T)
        with torch.no_grad():
            cost = (
                options.cost_l1 * l1
                + options.cost_giou * giou
                + options.cost_score * (1 - multi_region_scores[..., None])
            )
        matching = match_regions(cost, multi_target_mask, options.matching, options.greedy, objective_mode)
        multi = _mean_of_assigned(options.loss_l1 * l1 + options.loss_giou * giou, matching.assigned)
        multi_sum, multi_count = multi.sum(), multi_target_mask.any(dim=-1).sum().to(multi.dtype)

    sums = torch.stack([single_sum + multi_sum, single_sum, multi_sum])
    counts = torch.stack([single_count + multi_count, single_count, multi_count])
    return AnatomyDetectionLoss(*(sums / collectives.mean_count(counts)).unbind())


@full_precision
def presence_loss(
    region_scores: Tensor, present: Tensor, annotated: Tensor, collectives: Collectives = SINGLE_PROCESS
) -> Tensor:
    """Cross-entropy of the region scores of anatomy queries with the presence of the anatomy in the image (and of
    phrases with their truth, see `sentence_detection_loss`).

        L = mean over annotated (n, a) and regions r of -log w_r where a is in the image, -log(1 - w_r) where not

    with the logarithms of at least 1e-7. Not in the paper, whose anatomy scores are supervised by nothing: whether an
    anatomy then counts as found is left to chance.

    Args:
        region_scores: (N, A, R) probabilities.
        present: (N, A) bool.
        annotated: (N, A) bool, anatomies whose presence is known.
        collectives: the other processes of a distributed run.

    Returns:
        A scalar, the mean over annotated anatomies and regions.
    """
    likelihood = torch.where(present[..., None], region_scores, 1 - region_scores)
    loss = -likelihood.clamp(min=1e-7).log()
    return masked_mean(loss, annotated[..., None].expand_as(loss), collectives)


@full_precision
def sentence_detection_loss(
    region_boxes: Tensor,
    region_scores: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    annotated: Tensor,
    options: DetectionOptions = DEFAULT_DETECTION,
    objective_mode: ObjectiveMode = "corrected",
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Boxes of phrases, and whether a phrase is true of the image at all.

        L = box_loss + presence

    with the box loss of `pathology_detection_loss` (without the class term of the matching cost) and `presence_loss`:
    every region of a true phrase should score 1, of a false one 0. Duplicates of a box are left to the suppression
    that follows; a score that told them apart would be low for all of them.

    Not in the paper, which has no such training data.

    Args:
        region_boxes: (N, S, R, 4).
        region_scores: (N, S, R).
        target_boxes: (N, S, T, 4), padded.
        target_mask: (N, S, T) bool, valid targets; none for a phrase that is not true of the image.
        annotated: (N, S) bool, phrases that take part.
        options: coefficients of matching and boxes.
        objective_mode: see `pathology_detection_loss`.
        collectives: the other processes of a distributed run.

    Returns:
        A scalar.
    """
    no_class = region_boxes.new_zeros(region_boxes.shape[1], 1)
    detection = pathology_detection_loss(
        region_boxes,
        region_scores,
        region_boxes.new_zeros(*region_scores.shape, 1),
        no_class,
        no_class,
        target_boxes,
        target_mask,
        annotated,
        options,
        objective_mode,
        collectives,
    )
    present = (target_mask & annotated[..., None]).any(dim=-1)
    return detection.box_loss + presence_loss(region_scores, present, annotated, collectives)


def _mean_of_assigned(values: Tensor, assigned: Tensor) -> Tensor:
    """Mean over the assigned pairs of each query, 0 without any. (..., R, T) x 2 -> (...)."""
    return keep_valid(values, assigned).sum(dim=(-2, -1)) / assigned.sum(dim=(-2, -1)).clamp(min=1)
