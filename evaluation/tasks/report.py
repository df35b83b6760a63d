"""Report generation: finding and region prompts, a sentence for each, filtered and de-duplicated.

Follows the official inference of ChEX (arXiv 2404.15770, report generation), with one correction: each kept sentence
carries the boxes and the name of its own prompt, also after regions were dropped.
"""

from dataclasses import dataclass

import numpy as np
import torch

from evaluation.metrics.finding_f1.finding_f1 import finding_f1
from processing_chex.report import ReportQueries, deduplicate, sentence_similarity

from .base import Batch, EvaluationContext, Task, corners


@dataclass
class ReportSentence:
    """A sentence of a generated report with the prompt it answers and where it looks.

    Attributes:
        text: the sentence.
        prompt: name of the class or region.
        is_finding: whether the prompt is a finding class (else a region).
        boxes: (R, 4) xyxy in the network square.
        scores: (R,) region scores.
        probability: sign of the query, above 0.5 = abnormal.
    """

    text: str
    prompt: str
    is_finding: bool
    boxes: np.ndarray
    scores: np.ndarray
    probability: float


class ReportGeneration(Task):
    """Micro-F1 of the positive findings of whole reports, against those stated in the reference reports.

    Queries: the finding classes, then the 15 report regions, post decoder on. Regions whose feature is closer to the
    mean negative than to the mean positive class prompt are dropped before generation. Of the finding queries those
    stay that found something; `all_findings` keeps all, as the paper does. (Training never asks for
    a description of a finding that is absent, so a small model answers such a query at random.)
    """

    name = "report_generation"
    headline = "report_f1"
    needs_text = True

    def __init__(self, context: EvaluationContext, max_sentences: int = 10, all_findings: bool = False):
        super().__init__(context)
        self.all_findings = all_findings
        self.max_sentences = max_sentences
        self._queries = ReportQueries.encode(context.prompts, context.text_features)
        self._features: list[torch.Tensor] = []
        self._drafts: list[list[tuple[ReportSentence, float]]] = []
        self._references: list[str] = []

    def update(self, batch: Batch) -> None:
        model, queries = self.context.model, self._queries
        output = model(image_features=batch.image_features, prompt_features=queries.features, clip_boxes=True)
        probability = model.classify(output.query_features, queries.positive, queries.negative).squeeze(-1)
        kept = queries.select(probability, output.present, self.all_findings)
        self._features.append(output.query_features[kept])
        boxes = corners(output.region_boxes)
        weights = output.region_scores.double().cpu().numpy()
        preference = output.query_scores.double().cpu().numpy()
        chances = probability.double().cpu().numpy()
        for image, selected in enumerate(kept.cpu().numpy()):
            self._drafts.append(
                [
                    (
                        ReportSentence(
                            text="",
                            prompt=queries.names[query],
                            is_finding=bool(query < queries.num_findings),
                            boxes=boxes[image, query],
                            scores=weights[image, query],
                            probability=float(chances[image, query]),
                        ),
                        float(preference[image, query]),
                    )
                    for query in np.flatnonzero(selected)
                ]
            )
        self._references += [target.report for target in batch.targets]

    def reports(self) -> list[list[ReportSentence]]:
        """Generate, de-duplicate and order: the sentences of every report."""
        texts = iter(self.context.generate(torch.cat(self._features), "write reports"))
        reports = []
        for draft in self._drafts:
            written = []
            for sentence, preference in draft:
                sentence.text = next(texts)
                if sentence.text:
                    written.append((sentence, preference))
            similarity = sentence_similarity(self.context.text_features([sentence.text for sentence, _ in written]))
            kept = deduplicate(similarity, [preference for _, preference in written], self.max_sentences)
            reports.append([written[index][0] for index in kept])
        return reports

    def compute(self) -> dict:
        context = self.context
        names = context.prompts.names
        if not self._drafts:
            return {"value": None, "count": 0}
        reports = self.reports()
        texts = [" ".join(sentence.text for sentence in report) for report in reports]
        predicted = [context.label(text) for text in texts]
        reference = [context.label(text) for text in self._references]
        scores = finding_f1(predicted, reference, classes=names)
        return {
            "value": scores["micro_f1"],
            **{key: scores[key] for key in ("micro_precision", "micro_recall", "macro_f1", "example_f1", "count")},
            "official_example_f1": finding_f1(predicted, reference, classes=names, official=True)["example_f1"],
            "per_class": scores["per_class"],
            "sentences_per_report": float(np.mean([len(report) for report in reports])),
            "sentences_generated": int(sum(map(len, self._drafts))),
            "examples": [
                {"generated": text, "reference": target}
                for text, target in list(zip(texts, self._references, strict=True))[:5]
            ],
        }
