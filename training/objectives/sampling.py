"""Random choices of the objectives: classes, synonyms, sentences.

Most take a `torch.Generator`, on whatever device it lives: in a distributed run, draws that must agree between
processes (class subsets, synonyms) need generators seeded alike. What is drawn for single images is a function of
their numbers (`image_draws`), and so the same whichever process they are in.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .reduction import SINGLE_PROCESS, Collectives


def image_draws(index: Tensor, shape: Sequence[int], *key: int) -> Tensor:
    """Uniform draws from [0, 1) for each image of a batch, a function of the key and of the image's number alone.

    Args:
        index: (N,) numbers of the images, -1 for a stand-in that is no image.
        shape: shape of the draws of one image; more along its first axis leave the others as they are, so that it may
            be a padded one.
        key: not negative; other keys give independent draws.

    Returns:
        (N, *shape), float64 on the CPU.
    """
    rows = [np.random.default_rng([*key, number + 1]).random(shape) for number in index.tolist()]
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, *shape)))


def random_order(mask: Tensor, draws: Tensor) -> Tensor:
    """Indices along the last axis in random order, the valid ones (bool mask) first. Two tensors of one shape."""
    return draws.to(mask.device).masked_fill(~mask, 2.0).argsort(-1)


def subsample_classes(
    available: Tensor, k: int | None, generator: torch.Generator | None = None, exact: bool = False
) -> Tensor:
    """Random subset of the classes (anatomical regions) annotated in the batch, k in expectation.

    Each available class is kept with probability min(1, k / #available); should none be kept, the first k are.

    Args:
        available: (C,) bool, annotated in at least one image of the batch.
        k: size wanted; None keeps all.
        generator: source of randomness.
        exact: keep exactly min(k, #available) classes, for constant shapes.

    Returns:
        (C,) bool, part of `available`.
    """
    if k is None:
        return available
    if exact:
        return random_subset(available, k, generator)
    draws = _uniform(available.shape, generator, available.device)
    kept = available & (draws * available.sum() < k)
    first = available & (available.cumsum(dim=0) <= k)
    return torch.where(kept.any(), kept, first)


def subsample_classes_by_frequency(
    positive_counts: Tensor, observed: Tensor, k: int | None, generator: torch.Generator | None = None
) -> Tensor:
    """Classes whose absence is contrasted in the anatomy classification loss.

    Of C > k classes, k are drawn without replacement with probability proportional to their number of positive labels
    in the batch + 1e-7; those observed in the batch remain.

    Args:
        positive_counts: (C,) number of positive labels per class in the batch (summed over processes).
        observed: (C,) bool, classes labelled anywhere in the batch.
        k: number of classes; None keeps all observed ones.
        generator: source of randomness.

    Returns:
        (C,) bool, part of `observed`.
    """
    if k is None or positive_counts.shape[0] <= k:
        return observed
    # Exponential races: the k smallest of Exp(1) / weight are a weighted draw without replacement.
    draws = -torch.log1p(-_uniform(observed.shape, generator, observed.device))
    arrival = draws / (positive_counts.to(draws.dtype) + 1e-7)
    chosen = torch.zeros_like(observed).scatter_(0, arrival.argsort()[:k], True)
    return chosen & observed


def random_subset(mask: Tensor, k: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Uniform random subset, without replacement, of at most k true entries of a mask of any shape (bool)."""
    if k is None:
        return mask
    draws = _uniform((mask.numel(),), generator, mask.device).masked_fill(~mask.flatten(), torch.inf)
    chosen = torch.zeros_like(mask).flatten().scatter_(0, draws.argsort()[:k], True)
    return chosen.view_as(mask) & mask


def choose_for_generation(
    mask: Tensor,
    limit: int | None = 32,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
    collectives: Collectives = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Which queries the sentence generator is trained on in this step.

    Args:
        mask: (N, Q) bool, queries with a target text (and, for anatomies, in the image).
        limit: at most so many of all processes together, drawn uniformly without replacement.
        generator: source of randomness in a single process.
        draws: (N, Q) from [0, 1) instead (`image_draws`): the queries with the smallest ones are chosen.
        collectives: the other processes of a distributed run; with `draws` only.

    Returns:
        Indices of the images (K,) and of their queries (K,), in reading order.
    """
    if draws is None:
        return random_subset(mask, limit, generator).nonzero(as_tuple=True)
    # Turned round, since what is gathered is padded with zeros.
    ranks = (1 - draws.to(mask.device)).masked_fill(~mask, 0)
    if limit is not None:
        everyone = collectives.gather(ranks.flatten())
        if len(everyone) > limit:
            mask = mask & (ranks >= everyone.topk(limit).values[-1])
    return mask.nonzero(as_tuple=True)


def choose_synonyms(counts: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One synonym per class, drawn uniformly, shared by the whole batch of a step.

    Args:
        counts: (C,) number of synonyms of each class, at least 1.
        generator: source of randomness.

    Returns:
        (C,) int64 index of the synonym of each class.
    """
    draws = _uniform(counts.shape, generator, counts.device)
    # Rounding may lift draw * count to count itself.
    return torch.minimum((draws * counts).long(), counts.long() - 1)


def _uniform(shape: torch.Size | tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Float32 draws from [0, 1), made on the generator's device so that a CPU seed gives the same on all devices."""
    return torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)
