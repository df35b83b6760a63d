"""Contrastive, classification and regression losses between region features and text features.

Symbols: N images, S sentences, A anatomical regions, C classes, D feature size, tau temperature;
cos(a, b) is the cosine similarity. "Valid" means that the mask is True.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from .reduction import SINGLE_PROCESS, Collectives, full_precision, keep_valid, masked_mean, mean_over_images


AnatomyContrast = Literal["posneg", "only_pos", "all"]


@full_precision
def global_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float = 0.2,
    mask: Tensor | None = None,
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Global contrastive loss between whole images and whole reports (ChEX, sentence tokens).

    With the logits l(n, m) = cos(u_n, t_m) / tau,

        L = mean_n[-log softmax_m l(n, m)](m=n) + mean_n[-log softmax_m l(m, n)](m=n)

    The two directions are added, not averaged.

    Args:
        image_features: (N, D) u, the mean of the image's patch features.
        text_features: (N, D) t, the mean of the image's sentence features.
        temperature: tau.
        mask: (N,) bool, images that have a report; the others are neither rows nor candidates.
        collectives: of a distributed run, in which every process has gathered the same features.

    Returns:
        A scalar.
    """
    if mask is None:
        mask = torch.ones(image_features.shape[0], dtype=torch.bool, device=image_features.device)
    logits = _cosine(keep_valid(image_features, mask), keep_valid(text_features, mask)) / temperature  # (N, N)
    image_to_text = _nll_of_diagonal(logits, mask[None, :])
    text_to_image = _nll_of_diagonal(logits.T, mask[None, :])
    return masked_mean(image_to_text + text_to_image, mask, collectives)


@full_precision
def sentence_contrastive_loss(
    sentence_features: Tensor,
    region_features: Tensor,
    mask: Tensor,
    temperature: float = 0.25,
    lambda_region_to_sentence: float = 1.0,
    lambda_sentence_to_region: float = 0.0,
    cross_image_negatives: bool = True,
    sentence_ids: Tensor | None = None,
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Sentence contrastive loss between ROI features and the sentences they were queried with (ChEX, sentence tokens).

    With z_i the sentence features, r_j the ROI features and l(j, i) = cos(r_j, z_i) / tau over all valid pairs of
    the batch (of the image, without `cross_image_negatives`),

        L_j = lambda_r2s * (-log softmax_i l(j, i)) + lambda_s2r * (-log softmax_i l(i, j)), both taken at i = j

    averaged over the sentences of an image, then over the images that have sentences.

    Args:
        sentence_features: (N, S, D) z.
        region_features: (N, S, D) r.
        mask: (N, S) bool, valid sentences.
        temperature: tau.
        lambda_region_to_sentence: weight of finding the sentence of a region (1 in the paper's runs).
        lambda_sentence_to_region: weight of finding the region of a sentence (0 in the paper's runs).
        cross_image_negatives: whether sentences of other images are negatives.
        sentence_ids: (N, S) integers, equal for identical sentences. If given, identical sentences elsewhere are no
            longer negatives of each other; by default, as in the paper, they are.
        collectives: of a distributed run, in which every process has gathered the same features.

    Returns:
        A scalar.
    """
    images, sentences = mask.shape
    # One softmax group for the whole batch, or one per image.
    groups = (1, images * sentences) if cross_image_negatives else (images, sentences)
    region_features = keep_valid(region_features, mask).reshape(*groups, region_features.shape[-1])
    sentence_features = keep_valid(sentence_features, mask).reshape(*groups, sentence_features.shape[-1])
    candidates = mask.reshape(groups)[:, None, :]  # (G, 1, K)
    if sentence_ids is not None:
        ids = sentence_ids.reshape(groups)
        itself = torch.eye(groups[1], dtype=torch.bool, device=mask.device)
        candidates = candidates & ((ids[:, :, None] != ids[:, None, :]) | itself)  # (G, K, K)

    logits = _cosine(region_features, sentence_features) / temperature  # (G, K, K)
    loss = torch.zeros(groups, dtype=logits.dtype, device=logits.device)
    if lambda_region_to_sentence:
        loss = loss + lambda_region_to_sentence * _nll_of_diagonal(logits, candidates)
    if lambda_sentence_to_region:
        loss = loss + lambda_sentence_to_region * _nll_of_diagonal(logits.mT, candidates)
    return mean_over_images(loss.reshape(images, sentences), mask, collectives)


@full_precision
def sentence_mse_loss(
    sentence_features: Tensor,
    region_features: Tensor,
    mask: Tensor,
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Feature regression of ROI features to sentence features (ChEX, sentence tokens; also the anatomy MSE).

        L_j = sum_d (z_jd - r_jd)^2     summed, not averaged, over the feature axis

    averaged over the sentences (regions) of an image, then over the images that have any.

    Args:
        sentence_features: (N, S, D) z, not normalised.
        region_features: (N, S, D) r.
        mask: (N, S) bool, valid sentences.
        collectives: the other processes of a distributed run.

    Returns:
        A scalar.
    """
    difference = keep_valid(sentence_features, mask) - keep_valid(region_features, mask)
    return mean_over_images(difference.square().sum(dim=-1), mask, collectives)


@full_precision
def pathology_classification_loss(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    labels: Tensor,
    temperature: float = 0.2,
    use_negatives_of_other_classes: bool = True,
    ignore_other_classes_when_negative: bool = False,
) -> Tensor:
    """Contrastive classification of pathology ROI features against the class prompts (ChEX, pathology tokens).

    The feature f_c of class c chooses among the prompts of all classes,

        L_c = -log softmax([cos(f_c, pos_1..C), cos(f_c, neg_1..C)] / tau)   at pos_c if label 1, at neg_c if label 0

    Args:
        features: (N, C, D) f, the ROI feature of each class's query.
        positive: (C, D) positive class prompts.
        negative: (C, D) negative class prompts.
        labels: (N, C) 1 or True where present; the entries of unlabelled classes do not matter.
        temperature: tau.
        use_negatives_of_other_classes: if False, the candidates are pos_1..C and neg_c.
        ignore_other_classes_when_negative: if True, the candidates at label 0 are pos_c and neg_c only.

    Returns:
        (N, C) losses, to be averaged by the caller over what is labelled.
    """
    classes = positive.shape[0]
    logits = _cosine(features, torch.cat([positive, negative])) / temperature  # (N, C, 2C)
    present = labels.bool()
    own = torch.eye(classes, dtype=torch.bool, device=labels.device)
    own_pair = own.repeat(1, 2)  # (C, 2C): pos_c and neg_c
    candidates = torch.cat([torch.ones_like(own), own | use_negatives_of_other_classes], dim=1)
    if ignore_other_classes_when_negative:
        candidates = torch.where(present[..., None], candidates, candidates & own_pair)  # (N, C, 2C)
    target = torch.arange(classes, device=labels.device) + classes * (~present)
    logits = logits.masked_fill(~candidates, _excluded(logits))
    return cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


@full_precision
def anatomy_classification_loss(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    labels: Tensor,
    observed: Tensor,
    temperature: float = 0.25,
    contrast: AnatomyContrast = "posneg",
    class_subset: Tensor | None = None,
    region_positive: Tensor | None = None,
    region_negative: Tensor | None = None,
) -> Tensor:
    """Multi-positive contrastive classification of anatomical regions (ChEX, anatomy tokens).

    With s(p) = cos(f_a, p) / tau for a region's feature f_a and a prompt p,

        P = {pos_c : label 1} + {neg_c : label 0}      prompts that describe the region
        M = {pos_c : label 0} + {neg_c : label 1}      prompts that do not
        L_a = -mean_{p in P} s(p) + log sum_{p in P + M} exp s(p)

    over the observed classes c. Classes at label 0 outside `class_subset` take no part, those at label 1 always do.

    Args:
        features: (N, A, D) f.
        positive: (C, D) positive class prompts.
        negative: (C, D) negative class prompts.
        labels: (N, A, C) 1 or True where present.
        observed: (N, A, C) bool, labels that are annotated in a region that is in the image.
        temperature: tau.
        contrast: "posneg" as above (the paper); "only_pos" leaves neg_c at label 0 out of P (and M); "all" adds the
            prompts of class-in-region (`region_positive`, `region_negative`): the region's own by the same label
            rule, and in M both prompts of every other region b for the classes observed in a and in b.
        class_subset: (C,) bool, see `sampling.subsample_classes_by_frequency`; None for all.
        region_positive: (A, C, D) prompts naming class and region, for "all".
        region_negative: (A, C, D) idem.

    Returns:
        (N, A) losses; an empty P counts as mean 0, and a region without any candidate has loss 0.

    Raises:
        ValueError: for an unknown `contrast`, or "all" without region prompts.
    """
    if contrast not in ("posneg", "only_pos", "all"):
        raise ValueError(f"Unknown anatomy contrast {contrast!r}: choose 'posneg', 'only_pos' or 'all'.")
    if contrast == "all" and (region_positive is None or region_negative is None):
        raise ValueError("The anatomy contrast 'all' needs region_positive and region_negative, each (A, C, D).")

    labels = labels.bool()
    present, absent = observed & labels, observed & ~labels
    if class_subset is not None:
        absent = absent & class_subset
    features = keep_valid(features, observed.any(dim=-1))

    scores = [_cosine(features, torch.cat([positive, negative]))]  # (N, A, 2C)
    describing = [present, torch.zeros_like(absent) if contrast == "only_pos" else absent]
    misleading = [absent, present]
    if contrast == "all":
        regions, classes = region_positive.shape[:2]
        pairs = torch.stack([region_positive, region_negative], dim=1).flatten(0, 2)  # (A * 2 * C, D)
        scores.append(_cosine(features, pairs))
        own = torch.eye(regions, dtype=torch.bool, device=features.device)[:, :, None, None]  # (A, B, 1, 1)
        in_both = observed[:, :, None, None, :] & observed[:, None, :, None, :] & ~own  # (N, A, B, 1, C)
        both_prompts = in_both.expand(-1, -1, -1, 2, -1)
        describing.append((torch.stack([present, absent], dim=2)[:, :, None] & own).flatten(2))
        misleading.append(((torch.stack([absent, present], dim=2)[:, :, None] & own) | both_prompts).flatten(2))

    scores = torch.cat(scores, dim=-1) / temperature
    describing, misleading = torch.cat(describing, dim=-1), torch.cat(misleading, dim=-1)
    candidates = describing | misleading
    attraction = keep_valid(scores, describing).sum(dim=-1) / describing.sum(dim=-1).clamp(min=1)
    repulsion = scores.masked_fill(~candidates, _excluded(scores)).logsumexp(dim=-1)
    return keep_valid(repulsion - attraction, candidates.any(dim=-1))


@full_precision
def statement_loss(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    labels: Tensor,
    observed: Tensor,
    temperature: float | Tensor = 0.1,
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Choice between the two statements about a class, its positive and its negative prompt, for every region.

        L = (mean over present pairs of softplus(-d) + mean over absent pairs of softplus(d)) / 2
        d = (cos(f, pos_c) - cos(f, neg_c)) / tau

    Not in the paper. It is the rule by which regions are classified, and present and absent pairs weigh the same: a
    finding in one region of a hundred teaches as much as the hundred without, which a small model needs.

    Args:
        features: (N, A, D) f.
        positive: (C, D) positive class prompts.
        negative: (C, D) negative class prompts.
        labels: (N, A, C) 1 or True where present.
        observed: (N, A, C) bool, labels that are annotated in a region that is in the image.
        temperature: tau.
        collectives: the other processes of a distributed run.

    Returns:
        A scalar.
    """
    labels = labels.bool()
    features = keep_valid(features, observed.any(dim=-1))
    difference = normalize(positive, dim=-1) - normalize(negative, dim=-1)  # (C, D)
    logits = normalize(features, dim=-1) @ difference.mT / temperature
    losses = binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    masks = torch.stack([observed & labels, observed & ~labels])
    sums = keep_valid(losses.expand_as(masks), masks).flatten(1).sum(dim=1)
    return (sums / collectives.mean_count(masks.flatten(1).sum(dim=1).to(sums.dtype))).mean()


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarities of (..., K, D) and (..., M, D) -> (..., K, M)."""
    return normalize(left, dim=-1) @ normalize(right, dim=-1).mT


def _excluded(logits: Tensor) -> float:
    # Finite, unlike -inf: a row without any candidate then has a finite value and gradient, to be masked later.
    return torch.finfo(logits.dtype).min


def _nll_of_diagonal(logits: Tensor, candidates: Tensor) -> Tensor:
    """-log softmax over the candidates, at the diagonal. (..., K, K), mask broadcastable to it -> (..., K)."""
    logits = logits.masked_fill(~candidates, _excluded(logits))
    return logits.logsumexp(dim=-1) - logits.diagonal(dim1=-2, dim2=-1)
