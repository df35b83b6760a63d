"""The training objectives of ChEX (Müller et al., ECCV 2024) as pure functions on tensors.

From the single loss to the whole step: `contrastive`, `detection` and `generation` hold the losses, `matching` the
assignment of regions to boxes, `sampling` the random choices, `supervisors` the terms of each group of queries,
`weights` their coefficients. `reduction` has the shared means, and what the objectives need from other processes
(`Collectives`).
"""

from .contrastive import (
    anatomy_classification_loss,
    global_contrastive_loss,
    pathology_classification_loss,
    sentence_contrastive_loss,
    sentence_mse_loss,
    statement_loss,
)
from .detection import (
    AnatomyDetectionLoss,
    DetectionOptions,
    PathologyDetectionLoss,
    anatomy_detection_loss,
    focal_loss,
    pathology_detection_loss,
    presence_loss,
    sentence_detection_loss,
)
from .generation import generation_loss, padded_length
from .matching import Matching, ObjectiveMode, giou_cost, l1_cost, match_regions, paired_iou, pairwise
from .reduction import SINGLE_PROCESS, Collectives, StepTotals
from .sampling import (
    choose_for_generation,
    choose_synonyms,
    image_draws,
    random_order,
    random_subset,
    subsample_classes,
    subsample_classes_by_frequency,
)
from .supervisors import (
    ANATOMY_TERMS,
    PATHOLOGY_TERMS,
    SENTENCE_TERMS,
    AnatomyOptions,
    PathologyOptions,
    SentenceOptions,
    anatomy_objective,
    pathology_objective,
    sentence_objective,
)
from .weights import STAGE1_WEIGHTS, STAGE2_WEIGHTS, STAGE3_WEIGHTS, ObjectiveWeights, weighted_sum


__all__ = [
    "ANATOMY_TERMS",
    "PATHOLOGY_TERMS",
    "SENTENCE_TERMS",
    "SINGLE_PROCESS",
    "STAGE1_WEIGHTS",
    "STAGE2_WEIGHTS",
    "STAGE3_WEIGHTS",
    "AnatomyDetectionLoss",
    "AnatomyOptions",
    "Collectives",
    "DetectionOptions",
    "Matching",
    "ObjectiveMode",
    "ObjectiveWeights",
    "PathologyDetectionLoss",
    "PathologyOptions",
    "SentenceOptions",
    "StepTotals",
    "anatomy_classification_loss",
    "anatomy_detection_loss",
    "anatomy_objective",
    "choose_for_generation",
    "choose_synonyms",
    "focal_loss",
    "generation_loss",
    "giou_cost",
    "global_contrastive_loss",
    "image_draws",
    "l1_cost",
    "match_regions",
    "padded_length",
    "paired_iou",
    "pairwise",
    "pathology_classification_loss",
    "pathology_detection_loss",
    "pathology_objective",
    "presence_loss",
    "random_order",
    "random_subset",
    "sentence_detection_loss",
    "sentence_contrastive_loss",
    "sentence_mse_loss",
    "sentence_objective",
    "statement_loss",
    "subsample_classes",
    "subsample_classes_by_frequency",
    "weighted_sum",
]
