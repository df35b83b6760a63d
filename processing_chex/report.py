"""Reports: what is asked for them, which answers become sentences, in which order, and where each sentence points.

Follows the official inference of ChEX (arXiv 2404.15770, report generation): finding and region prompts, a sentence
for each, filtered by sign and without repetitions. `ChexModel.report`, the pipeline and the command line all end here.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .prompt_sets import PromptSet, anatomy_prompts, class_prompts
from .vocabulary import ANATOMY_NAMES, REPORT_ANATOMY_INDICES


ALWAYS_SAME = 0.95
SAME_IF_LONG = 0.90
NMS_THRESHOLD = 0.25
REPORT_REGIONS = tuple(ANATOMY_NAMES[index] for index in REPORT_ANATOMY_INDICES)

_CHOICES = {
    "select_findings": ("all", "found", "positive", "none"),
    "select_regions": ("all", "positive", "none"),
    "sign": ("mean", "any"),
    "negatives": ("keep", "drop"),
    "prefer": ("weight", "probability"),
    "order": ("prompt", "anatomy", "score"),
}


@dataclass(frozen=True)
class ReportOptions:
    """
    The steps of a report.

    Attributes:
        findings: Name of the classes that are asked for, as for `class_prompts`.
        regions: "report" (the 15 of the paper), "all" (29), or names of regions.
        select_findings: Which finding prompts get a sentence: "all" (as in the paper), "found" (a region scores above
            the threshold), "positive" (abnormal by the sign) or "none".
        select_regions: "positive" (as in the paper), "all" or "none".
        sign: How a query is found abnormal: against the "mean" of the classes' prompts, or if "any" class is.
        threshold: Regions with a score above it are found and reported.
        negatives: "drop" leaves out sentences that only deny findings or call something normal; see `is_negative`.
        prefer: Which of two similar sentences stays: of the higher query "weight" or "probability" to be abnormal.
        max_sentences, always_same, same_if_long: When repetitions stop being removed, see `deduplicate`.
        order: "prompt" (findings, then regions), "anatomy" (a finding before the region that it lies in) or "score".
        official: Index boxes, scores and prompts as the official code does, which shifts them after each prompt that
            got no sentence: wrong, but part of the published choice between similar sentences.
        max_length: Longest sentence in tokens, less where the generator has fewer positions; None: as the model was
            saved.
        greedy: Take the most probable token always; otherwise as the model was saved.

    Raises:
        ValueError: A value that is none of the choices, or out of range.
    """

    findings: str = "phantom"
    regions: str | tuple[str, ...] = "report"
    select_findings: str = "found"
    select_regions: str = "positive"
    sign: str = "mean"
    threshold: float = 0.5
    negatives: str = "keep"
    prefer: str = "weight"
    max_sentences: int = 10
    always_same: float = ALWAYS_SAME
    same_if_long: float = SAME_IF_LONG
    order: str = "prompt"
    official: bool = False
    max_length: int | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}.")
        for name in ("threshold", "always_same", "same_if_long"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie between 0 and 1.")
        if self.max_sentences < 1:
            raise ValueError(f"max_sentences is {self.max_sentences}, but must be at least 1.")
        object.__setattr__(self, "regions", self.regions if isinstance(self.regions, str) else tuple(self.regions))
        unknown = [name for name in self.region_names if name not in ANATOMY_NAMES]
        if unknown:
            raise ValueError(
                f"regions has no region {unknown[0]!r}: take 'report', 'all' or names such as 'left lung'."
            )

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions that are asked for."""
        known = {"report": REPORT_REGIONS, "all": tuple(ANATOMY_NAMES)}
        return known.get(self.regions, (self.regions,)) if isinstance(self.regions, str) else self.regions


OPTION_NAMES = tuple(option.name for option in fields(ReportOptions))
REPORT_PRESETS: dict[str, ReportOptions] = {
    # Training never asks for a description of a finding that is absent: a small model answers such a query at random.
    "found": ReportOptions(),
    "paper": ReportOptions(findings="chexpert", select_findings="all", max_length=128, greedy=True),
}


def report_options(preset: str | ReportOptions = "found", **changes: Any) -> ReportOptions:
    """
    The options of a preset, with changes.

    Raises:
        ValueError: An unknown preset or option, or a value that is not allowed.
    """
    if isinstance(preset, str):
        if preset not in REPORT_PRESETS:
            near = difflib.get_close_matches(preset, REPORT_PRESETS, 1, 0.5)
            raise ValueError(
                f"There is no preset {preset!r} for reports{f' (did you mean {near[0]!r}?)' if near else ''}: choose "
                f"one of {', '.join(REPORT_PRESETS)}."
            )
        preset = REPORT_PRESETS[preset]
    for name in changes:
        if name not in OPTION_NAMES:
            near = difflib.get_close_matches(name, OPTION_NAMES, 1, 0.6)
            raise ValueError(
                f"Reports have no option {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}: there are "
                f"{', '.join(OPTION_NAMES)}."
            )
    return replace(preset, **changes)


@dataclass(frozen=True)
class ReportQueries:
    """The queries of a report: Q = the finding classes, then the regions.

    Attributes:
        names: names of the Q classes and regions.
        num_findings: how many of them, from the start, are finding classes.
        features: (Q, D) prompt features.
        positive, negative: (1, D) mean feature of the prompts that assert and that deny the findings, to tell from a
            feature of a query whether it is abnormal.
        prompts: the Q texts.
        class_positive, class_negative: (C, D) the same for each class.
    """

    names: tuple[str, ...]
    num_findings: int
    features: Tensor
    positive: Tensor
    negative: Tensor
    prompts: tuple[str, ...] = ()
    class_positive: Tensor | None = field(default=None, repr=False)
    class_negative: Tensor | None = field(default=None, repr=False)

    @classmethod
    def encode(
        cls,
        prompts: PromptSet,
        encode_texts: Callable[[Sequence[str]], Tensor],
        regions: Sequence[str] = REPORT_REGIONS,
    ) -> "ReportQueries":
        """Encode the prompts of the findings and regions.

        Args:
            prompts: of the finding classes.
            encode_texts: n texts -> (n, D) prompt features, not normalised.
            regions: names of the regions.
        """

        def ensembles(table: Mapping[str, Sequence[str]], names: Sequence[str]) -> Tensor:
            if not names:
                return encode_texts(["none"])[:0]
            return torch.stack([encode_texts(table[name]).mean(0) for name in names])

        anatomy = anatomy_prompts()
        positive, negative = (ensembles(table, prompts.names) for table in (prompts.positive, prompts.negative))
        return cls(
            names=(*prompts.names, *regions),
            num_findings=len(prompts.names),
            features=torch.cat([ensembles(prompts.box, prompts.names), ensembles(anatomy, regions)]),
            positive=positive.mean(0, keepdim=True),
            negative=negative.mean(0, keepdim=True),
            prompts=(*(prompts.box[name][0] for name in prompts.names), *(anatomy[name][0] for name in regions)),
            class_positive=positive,
            class_negative=negative,
        )

    def abnormality(self, features: Tensor, classify: Callable[..., Tensor], sign: str = "mean") -> Tensor:
        """Probability that a query is abnormal, (N, Q).

        Args:
            features: (N, Q, D) of the queries.
            classify: `ChexModel.classify`.
            sign: "mean" compares with the mean of the classes' prompts; "any" takes the most probable class.
        """
        if sign == "mean":
            return classify(features, self.positive, self.negative).squeeze(-1)
        return classify(features, self.class_positive, self.class_negative).amax(-1)

    def select(
        self,
        probability: Tensor,
        present: Tensor,
        all_findings: bool = False,
        findings: str | None = None,
        regions: str = "positive",
    ) -> Tensor:
        """Which queries are worth a sentence, bool (N, Q).

        Regions that are rather normal are dropped, and findings that were not found. (Training never asks for a
        description of a finding that is absent, so a small model answers such a query at random.)

        Args:
            probability: (N, Q) that the query is abnormal.
            present: (N, Q) whether the detector found anything.
            all_findings: keep the finding queries whatever was found, as the paper does.
            findings: "all", "found", "positive" or "none", instead of `all_findings`.
            regions: "positive", "all" or "none".
        """
        positive = probability > 0.5
        rules = {
            "all": torch.ones_like(positive),
            "found": present.bool(),
            "positive": positive,
            "none": torch.zeros_like(positive),
        }
        selected = rules[regions].clone()
        rule = rules[findings or ("all" if all_findings else "found")]
        selected[:, : self.num_findings] = rule[:, : self.num_findings]
        return selected


def sentence_similarity(features: Tensor) -> np.ndarray:
    """(n, D) prompt features of sentences -> (n, n) similarities (cos + 1) / 2."""
    features = torch.nn.functional.normalize(features.float(), dim=-1)
    return ((features @ features.T + 1) / 2).cpu().numpy()


def deduplicate(
    similarity: np.ndarray,
    preference: Sequence[float],
    max_sentences: int = 10,
    always_same: float = ALWAYS_SAME,
    same_if_long: float = SAME_IF_LONG,
) -> list[int]:
    """Indices of the sentences to keep, in order.

    The most similar remaining pair loses its less preferred member (on ties the later one) while its similarity is at
    least 0.95, or at least 0.90 with more than `max_sentences` left. `max_sentences` is soft: unlike sentences stay.

    Args:
        similarity: (n, n) symmetric, as from `sentence_similarity`.
        preference: n values, higher is kept.
        max_sentences: number from which on sentences that resemble others a little less may stay.
        always_same, same_if_long: the two similarities.
    """
    similarity = np.array(similarity, dtype=np.float64)
    np.fill_diagonal(similarity, 0.0)
    kept = list(range(len(similarity)))
    while len(kept) > 1:
        part = similarity[np.ix_(kept, kept)]
        first, second = divmod(int(part.argmax()), len(kept))
        first, second = sorted((first, second))
        highest = part[first, second]
        if highest < always_same and (highest < same_if_long or len(kept) <= max_sentences):
            break
        loser = first if preference[kept[first]] < preference[kept[second]] else second
        del kept[loser]
    return kept


_CLAUSES = re.compile(
    r"[;.]|\b(?:but|however|although|though|except|while|whereas|with|and (?:there|the|a|an)|suggesting)\b"
)
_NO_DENIAL = re.compile(
    r"\bno (?:longer|(?:significant |interval |definite |relevant )*change)\b|\bnot (?:clear|normal|excluded)\b"
)
_DENIAL = re.compile(
    r"\b(?:no|not|without|never|neither|nor|absent|resolved|negative for|free of|clear|sharp|normal|unremarkable|"
    r"intact|patent)\b"
)


def is_negative(sentence: str) -> bool:
    """Whether a sentence of a report only denies findings or calls something normal, by its words.

    Each clause must hold a denial ("no", "without", ...) or a normal statement ("clear", "unremarkable", ...); a
    change or the lack of one denies nothing. These rules are for leaving such sentences out of a report, not for
    labelling.
    """
    clauses = [clause for clause in _CLAUSES.split(sentence.lower()) if re.search(r"[a-z]", clause)]
    return bool(clauses) and all(_DENIAL.search(clause) and not _NO_DENIAL.search(clause) for clause in clauses)


@torch.no_grad()
def write_reports(
    model: Any,
    processor: Any,
    image_features: Any,
    original_sizes: Any = None,
    image_frames: Any = None,
    options: ReportOptions | None = None,
    queries: ReportQueries | None = None,
    generation: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A report about each of N images: see `ChexModel.report`, which calls this.

    Args:
        model: a `ChexModel`.
        processor: the `ChexProcessor` that belongs to it.
        image_features: of N images, as from `ChexModel.get_image_features`.
        original_sizes, image_frames: (N, 2) and (N, 4), as from the processor.
        options: default: the preset "found".
        queries: of these options, encoded before.
        generation: arguments of `ChexModel.generate`; they override what the options say of generation.
    """
    options = options or ReportOptions()
    if queries is None:
        queries = report_queries(model, processor, options.findings, options.region_names)
    outputs = model(image_features=image_features, prompt_features=queries.features, clip_boxes=True)
    abnormality = queries.abnormality(outputs.query_features, model.classify, options.sign)
    found = (outputs.region_scores > options.threshold).any(-1)
    selected = queries.select(abnormality, found, findings=options.select_findings, regions=options.select_regions)
    arguments = {"query_features": outputs.query_features, "query_mask": selected}
    token_ids = model.generate(**arguments, **_generation(model, options), **(generation or {}))
    sentences = processor.decode_sentences(getattr(token_ids, "sequences", token_ids))

    geometry = {"target_sizes": original_sizes, "image_frames": image_frames}
    found_boxes = processor.post_process_explanation(outputs, threshold=options.threshold, **geometry)
    candidates = processor.post_process_explanation(outputs, threshold=-1.0, **geometry)
    detected = processor.post_process_object_detection(
        outputs, threshold=options.threshold, nms_threshold=NMS_THRESHOLD, **geometry
    )
    reports = []
    for image, texts in enumerate(sentences):
        answers = [
            {
                "name": name,
                "prompt": queries.prompts[query] if queries.prompts else name,
                "kind": "finding" if query < queries.num_findings else "region",
                "score": float(outputs.query_scores[image, query]),
                "abnormality": float(abnormality[image, query]),
                "box": found_boxes[image]["boxes"][query].tolist() if found[image, query] else None,
                "regions": _regions(detected[image], query),
                "candidates": [
                    {"box": box, "score": score}
                    for box, score in zip(
                        candidates[image]["region_boxes"][query].tolist(),
                        candidates[image]["region_scores"][query].tolist(),
                        strict=True,
                    )
                ],
            }
            for query, name in enumerate(queries.names)
        ]
        asked = selected[image].nonzero()[:, 0].tolist()
        # The official code shortens the list of sentences, but not the lists of what belongs to them.
        sources = range(len(asked)) if options.official else asked
        written = [
            {"text": texts[query], **answers[source]}
            for query, source in zip(asked, sources, strict=True)
            if texts[query]
        ]
        written = _without_repetitions(written, options, lambda texts: encode_texts(model, processor, texts))
        written = _in_order(written, answers, options.order)
        reports.append({"text": " ".join(sentence["text"] for sentence in written), "sentences": written})
    return reports


def _without_repetitions(
    sentences: list[dict[str, Any]], options: ReportOptions, encode: Callable[[Sequence[str]], Tensor]
) -> list[dict[str, Any]]:
    if options.negatives == "drop":
        sentences = [sentence for sentence in sentences if not is_negative(sentence["text"])]
    if not sentences:
        return []
    similarity = sentence_similarity(encode([sentence["text"] for sentence in sentences]))
    key = "score" if options.prefer == "weight" else "abnormality"
    preference = [sentence[key] for sentence in sentences]
    kept = deduplicate(similarity, preference, options.max_sentences, options.always_same, options.same_if_long)
    return [sentences[index] for index in kept]


def _in_order(sentences: list[dict[str, Any]], answers: list[dict[str, Any]], order: str) -> list[dict[str, Any]]:
    if order == "score":
        return sorted(sentences, key=lambda sentence: -sentence["score"])  # stable: ties in the order of the prompts
    if order == "prompt":
        return sentences
    regions = [answer for answer in answers if answer["kind"] == "region"]
    places = {answer["name"]: place for place, answer in enumerate(regions)}
    boxes = torch.tensor([_best_box(answer) for answer in regions]).reshape(-1, 4)

    def place(sentence: dict[str, Any]) -> tuple[int, int]:
        """Findings go before the region that covers the most of them, of equals the smaller one."""
        if sentence["kind"] == "region":
            return places[sentence["name"]], 1
        if not regions:
            return 0, 0
        x0, y0, x1, y1 = _best_box(sentence)
        width = boxes[:, 2].clamp(max=x1) - boxes[:, 0].clamp(min=x0)
        height = boxes[:, 3].clamp(max=y1) - boxes[:, 1].clamp(min=y0)
        covered = width.clamp(min=0) * height.clamp(min=0)
        areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
        best = max(range(len(regions)), key=lambda index: (round(float(covered[index]), 3), -float(areas[index])))
        return best, 0

    return sorted(sentences, key=place)


def _best_box(answer: Mapping[str, Any]) -> list[float]:
    return answer["candidates"][0]["box"]


def _regions(detected: Mapping[str, Any], query: int) -> list[dict[str, Any]]:
    own = detected["labels"] == query
    boxes, scores = detected["boxes"][own].tolist(), detected["scores"][own].tolist()
    return [{"box": box, "score": score} for box, score in zip(boxes, scores, strict=True)]


def _generation(model: Any, options: ReportOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {"do_sample": False, "num_beams": 1} if options.greedy else {}
    generator = model.config.generator_config
    if options.max_length is not None and generator is not None:
        arguments["max_length"] = min(options.max_length, generator.n_positions)
    return arguments


def report_queries(
    model: Any, processor: Any, findings: str = "phantom", regions: Sequence[str] = REPORT_REGIONS
) -> ReportQueries:
    """Encode the queries of a report, to be used for many images.

    Args:
        model, processor: as for `write_reports`.
        findings: name of the finding classes.
        regions: names of the regions.

    Raises:
        ValueError: unknown classes; the message lists the known ones.
    """
    return ReportQueries.encode(class_prompts(findings), lambda texts: encode_texts(model, processor, texts), regions)


def encode_texts(model: Any, processor: Any, texts: Sequence[str]) -> Tensor:
    """n texts -> (n, D) prompt features, not normalised."""
    # A generated sentence may exceed what is accepted of a user; the encoder reads only its beginning anyway.
    encoded = processor(text=[text[:1000] for text in texts], return_tensors="pt")
    return model.get_prompt_features(encoded["input_ids"].to(model.device))


__all__ = [
    "OPTION_NAMES",
    "REPORT_PRESETS",
    "REPORT_REGIONS",
    "ReportOptions",
    "ReportQueries",
    "deduplicate",
    "encode_texts",
    "is_negative",
    "report_options",
    "report_queries",
    "sentence_similarity",
    "write_reports",
]
