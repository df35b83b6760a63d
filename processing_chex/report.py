"""Reports: the queries that they cover, and which of the generated sentences are kept.

Follows the official inference of ChEX (arXiv 2404.15770, report generation): finding and region prompts, a sentence
for each, filtered by sign and without repetitions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .prompt_sets import PromptSet, anatomy_prompts
from .vocabulary import ANATOMY_NAMES, REPORT_ANATOMY_INDICES


ALWAYS_SAME = 0.95
SAME_IF_LONG = 0.90


@dataclass(frozen=True)
class ReportQueries:
    """The queries of a report: Q = the finding classes, then the 15 report regions.

    Attributes:
        names: names of the Q classes and regions.
        num_findings: how many of them, from the start, are finding classes.
        features: (Q, D) prompt features.
        positive, negative: (1, D) mean feature of the prompts that assert and that deny the findings, to tell from a
            feature of a query whether it is abnormal.
    """

    names: tuple[str, ...]
    num_findings: int
    features: Tensor
    positive: Tensor
    negative: Tensor

    @classmethod
    def encode(cls, prompts: PromptSet, encode_texts: Callable[[Sequence[str]], Tensor]) -> "ReportQueries":
        """Encode the prompts of the findings and regions.

        Args:
            prompts: of the finding classes.
            encode_texts: n texts -> (n, D) prompt features, not normalised.
        """

        def ensembles(table: Mapping[str, Sequence[str]], names: Sequence[str]) -> Tensor:
            return torch.stack([encode_texts(table[name]).mean(0) for name in names])

        regions = [ANATOMY_NAMES[index] for index in REPORT_ANATOMY_INDICES]
        return cls(
            names=(*prompts.names, *regions),
            num_findings=len(prompts.names),
            features=torch.cat([ensembles(prompts.box, prompts.names), ensembles(anatomy_prompts(), regions)]),
            positive=ensembles(prompts.positive, prompts.names).mean(0, keepdim=True),
            negative=ensembles(prompts.negative, prompts.names).mean(0, keepdim=True),
        )

    def select(self, probability: Tensor, present: Tensor, all_findings: bool = False) -> Tensor:
        """Which queries are worth a sentence, bool (N, Q).

        Regions that are rather normal are dropped, and findings that were not found. (Training never asks for a
        description of a finding that is absent, so a small model answers such a query at random.)

        Args:
            probability: (N, Q) that the query is abnormal.
            present: (N, Q) whether the detector found anything.
            all_findings: keep the finding queries whatever was found, as the paper does.
        """
        selected = probability > 0.5
        selected[:, : self.num_findings] = True if all_findings else present[:, : self.num_findings]
        return selected


def sentence_similarity(features: Tensor) -> np.ndarray:
    """(n, D) prompt features of sentences -> (n, n) similarities (cos + 1) / 2."""
    features = torch.nn.functional.normalize(features.float(), dim=-1)
    return ((features @ features.T + 1) / 2).cpu().numpy()


def deduplicate(similarity: np.ndarray, preference: Sequence[float], max_sentences: int = 10) -> list[int]:
    """Indices of the sentences to keep, in order.

    The most similar remaining pair loses its less preferred member (on ties the later one) while its similarity is at
    least 0.95, or at least 0.90 with more than `max_sentences` left. `max_sentences` is soft: unlike sentences stay.

    Args:
        similarity: (n, n) symmetric, as from `sentence_similarity`.
        preference: n values, higher is kept.
    """
    similarity = np.array(similarity, dtype=np.float64)
    np.fill_diagonal(similarity, 0.0)
    kept = list(range(len(similarity)))
    while len(kept) > 1:
        part = similarity[np.ix_(kept, kept)]
        first, second = divmod(int(part.argmax()), len(kept))
        first, second = sorted((first, second))
        highest = part[first, second]
        if highest < ALWAYS_SAME and (highest < SAME_IF_LONG or len(kept) <= max_sentences):
            break
        loser = first if preference[kept[first]] < preference[kept[second]] else second
        del kept[loser]
    return kept


__all__ = ["ReportQueries", "deduplicate", "sentence_similarity"]
