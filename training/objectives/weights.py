"""Coefficients of the terms of the step loss, as published with ChEX."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class ObjectiveWeights:
    """Coefficient of each term of the step loss; a term with coefficient 0 is off and need not be computed.

    `STAGE1_WEIGHTS`, `STAGE2_WEIGHTS`, `STAGE3_WEIGHTS` hold the paper's. Three terms are not the paper's and off by
    default: `sentence_detection` learns from boxes that are annotated for a phrase, `anatomy_presence` teaches the
    region scores of anatomy queries, which nothing else supervises, and `anatomy_statement` is a classification of
    regions in which rare findings weigh as much as their absence.
    """

    global_contrastive: float = 0.0
    sentence_contrastive: float = 0.0
    sentence_mse: float = 0.0
    sentence_generation: float = 0.0
    sentence_detection: float = 0.0
    pathology_detection: float = 0.0
    pathology_classification: float = 0.0
    anatomy_detection: float = 0.0
    anatomy_classification: float = 0.0
    anatomy_mse: float = 0.0
    anatomy_presence: float = 0.0
    anatomy_statement: float = 0.0
    anatomy_generation: float = 0.0

    def active(self) -> frozenset[str]:
        """Names of the terms with a coefficient other than 0."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) != 0)


STAGE1_WEIGHTS = ObjectiveWeights(
    global_contrastive=1.0,
    sentence_contrastive=0.005,
    pathology_detection=10.0,
    pathology_classification=1.0,
    anatomy_detection=0.1,
    anatomy_classification=0.005,
)
STAGE2_WEIGHTS = ObjectiveWeights(
    sentence_contrastive=0.005, sentence_mse=0.02, anatomy_classification=0.01, anatomy_mse=0.04
)
STAGE3_WEIGHTS = ObjectiveWeights(sentence_mse=0.02, sentence_generation=0.5, anatomy_mse=0.04, anatomy_generation=1.0)


def weighted_sum(terms: Mapping[str, Tensor], weights: ObjectiveWeights) -> Tensor:
    """The step loss: sum of coefficient * term.

    Args:
        terms: unweighted scalar terms by name. Parts of a term, named "term/part", are for the log and not added.
        weights: the coefficients. Terms with coefficient 0 are not added.

    Returns:
        A scalar.

    Raises:
        ValueError: if a term has no coefficient of its name, or no term is left to add.
    """
    known = {field.name for field in fields(weights)}
    terms = {name: term for name, term in terms.items() if "/" not in name}
    if unknown := sorted(terms.keys() - known):
        raise ValueError(f"No coefficient for the loss terms {unknown}: the known terms are {sorted(known)}.")
    weighted = [getattr(weights, name) * terms[name] for name in terms if name in weights.active()]
    if not weighted:
        raise ValueError(
            f"Nothing to optimise: none of the computed terms {sorted(terms)} has a coefficient other than 0. "
            f"Active coefficients: {sorted(weights.active())}."
        )
    return sum(weighted[1:], start=weighted[0])
