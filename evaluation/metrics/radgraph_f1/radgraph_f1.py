"""RadGraph F1: entities and relations of generated texts, compared with those of the reference texts.

RadGraph (Jain et al. 2021) annotates a report with entities, e.g. ("effusion", "Observation::definitely present"), and
relations between them. A pair of texts scores the F1 of two sets, at three levels (Delbrouck et al. 2022):

- simple: the entities, as (tokens, label);
- partial: the same, with the mark whether an entity starts any relation: the usual "RadGraph F1" (`radgraph_f1`);
- complete: (tokens, label, relation, tokens of its end) of each relation, both tokens lower-cased, and (tokens, label)
  of the entities that start none, as they are.

Equal entities of a text count once. A pair scores 0 if either side has no entity, even if neither has, as in the
`radgraph` package.

An annotator makes the annotations: that package with its weights, or your own (`load_annotator`).

Usable directly and through `evaluate.load("evaluation/metrics/radgraph_f1")`, without a network; the `evaluation`
package must be importable.
"""

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.labelers.plugins import call_factory, import_attribute
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.text_preparation import named_values, ratio, unit_sums
from evaluation.metrics.unavailable import MetricUnavailable
from evaluation.metrics.units import check_units


LEVELS = ("simple", "partial", "complete")
NAMES = {"partial": "radgraph_f1", "simple": "radgraph_f1_simple", "complete": "radgraph_f1_complete"}

_DESCRIPTION = "F1 of RadGraph's entities and relations in texts, at the levels simple, partial and complete."
_CITATION = ""
_KWARGS = """
Args:
    predictions: generated texts (with `annotator`), or RadGraph's annotation of each as JSON text.
    references: the same kind; pairs with an empty reference text are left out.
    annotator: a function from texts to annotations, or its name as for `load_annotator`.
    units: the image of each pair (integers from 0); left out: one pair per image.
Returns:
    radgraph_f1 (level partial), radgraph_f1_simple, radgraph_f1_complete: means over pairs; the same with _ex: mean of
    each image's pairs, then over images; count: pairs; dropped: pairs with an empty reference. None without a pair.
"""

Annotation = Mapping[str, Any]
Annotator = Callable[[Sequence[str]], Sequence[Annotation]]


def check_annotation(annotation: Annotation, where: str) -> Annotation:
    """`annotation` if it has RadGraph's form: {"entities": {id: {"tokens", "label", "relations": [[name, id], ...]}}}.

    Raises:
        ValueError: otherwise; the message starts with `where`.
    """
    entities = annotation.get("entities") if isinstance(annotation, Mapping) else None
    if not isinstance(entities, Mapping):
        raise ValueError(f"{where} is no annotation of RadGraph: it has no dictionary `entities`.")
    for key, entity in entities.items():
        if not isinstance(entity, Mapping) or not all(isinstance(entity.get(x), str) for x in ("tokens", "label")):
            raise ValueError(f"{where}: the entity {key} lacks `tokens` or `label` as text.")
        relations = entity.get("relations")
        if not isinstance(relations, Sequence) or isinstance(relations, str):
            raise ValueError(f"{where}: the entity {key} lacks a list `relations` (an empty one if there is none).")
        for relation in relations:
            if isinstance(relation, str) or not isinstance(relation, Sequence) or len(relation) != 2:
                raise ValueError(f"{where}: a relation of the entity {key} is {relation!r}, not [name, entity].")
            if relation[1] not in entities:
                raise ValueError(
                    f"{where}: a relation of the entity {key} ends at {relation[1]!r}, which is no entity."
                )
    return annotation


def facts(annotation: Annotation, level: str) -> set[tuple]:
    """What an annotation states at a level; see the module."""
    entities = annotation["entities"]
    found: set[tuple] = set()
    for entity in entities.values():
        fact = (entity["tokens"], entity["label"])
        if level == "simple" or not entity["relations"]:
            found.add(fact)
        elif level == "partial":
            found.add((*fact, True))
        else:
            for name, end in entity["relations"]:
                found.add((entity["tokens"].lower(), entity["label"], name, entities[end]["tokens"].lower()))
    return found


def pair_score(prediction: Annotation, reference: Annotation, level: str) -> float:
    """F1 of a pair of annotations at the level "simple", "partial" or "complete".

    Raises:
        ValueError: for another level.
    """
    if level not in LEVELS:
        raise ValueError(f"There is no level {level!r} of RadGraph F1; there are {', '.join(LEVELS)}.")
    stated, true = facts(prediction, level), facts(reference, level)
    if not stated or not true:
        return 0.0
    return 2 * len(stated & true) / (len(stated) + len(true))


class RadGraphF1Statistic:
    """RadGraph F1 for bootstrapping over images.

    Args:
        predictions: annotations of P generated texts.
        references: annotations of the P references; None where there is no reference text: the pair is left out.
        units: (P,) the image of each pair, integers from 0; left out: each pair is an image of its own.
        num_units: number of images, if some have no pair.

    Attributes:
        names: the three of `NAMES`, means over pairs, and each with _ex, over images.
        num_units: number of images.
        scores: (P, 3) of the pairs, NaN without reference.
        count, dropped: pairs with and without reference.

    Raises:
        ValueError: for lists of different length, units out of range, or entries that are no annotations.
    """

    names = (*NAMES.values(), *(f"{name}_ex" for name in NAMES.values()))

    def __init__(
        self,
        predictions: Sequence[Annotation],
        references: Sequence[Annotation | None],
        units: Sequence[int] | None = None,
        num_units: int | None = None,
    ):
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one of each per pair."
            )
        images, self.num_units = check_units(units, num_units, len(predictions))
        self.scores = np.full((len(predictions), len(NAMES)), np.nan)
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            check_annotation(prediction, f"`predictions[{index}]`")
            if reference is not None:
                check_annotation(reference, f"`references[{index}]`")
                self.scores[index] = [pair_score(prediction, reference, level) for level in NAMES]
        kept = np.array([reference is not None for reference in references], dtype=bool)
        self.count, self.dropped = int(kept.sum()), int((~kept).sum())
        columns = np.concatenate([self.scores[kept], np.ones((self.count, 1))], axis=1)
        sums = unit_sums(columns, images[kept], self.num_units)
        means = np.nan_to_num(ratio(sums[:, :-1], sums[:, -1:]))
        self._columns = np.concatenate([sums, means, sums[:, -1:] > 0], axis=1)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, 6); NaN where no image with a pair was drawn."""
        sums = check_counts(counts, self.num_units).astype(np.float64) @ self._columns
        pairs, images = sums[:, :4], sums[:, 4:]
        return np.concatenate([ratio(part[:, :-1], part[:, -1:]) for part in (pairs, images)], axis=1)

    @classmethod
    def from_texts(
        cls,
        predictions: Sequence[str],
        references: Sequence[str],
        annotator: Annotator,
        units: Sequence[int] | None = None,
        num_units: int | None = None,
    ) -> "RadGraphF1Statistic":
        """The statistic of texts; equal texts are annotated once, empty ones state nothing.

        Raises:
            ValueError: as the class, or if the annotator gives another number of annotations than it got texts.
        """
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one of each per pair."
            )
        for side, texts in (("predictions", predictions), ("references", references)):
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"`{side}[{index}]` is a {type(text).__name__}, not a text.")
        distinct = list(dict.fromkeys(text for text in (*predictions, *references) if text.strip()))
        made = annotator(distinct) if distinct else []
        if len(made) != len(distinct):
            raise ValueError(f"The annotator returned {len(made)} annotations for {len(distinct)} texts.")
        known = dict(zip(distinct, made, strict=True))
        nothing: Annotation = {"entities": {}}
        return cls(
            [known.get(text, nothing) for text in predictions],
            [known.get(text) for text in references],
            units,
            num_units,
        )


class RadGraphAnnotator:
    """The annotator of the `radgraph` package.

    Args:
        folder: where its weights lie (`<folder>/<model_type>/weights.th`); left out: its own cache folder.
        model_type: "radgraph", with which most published numbers were made, or "radgraph-xl".
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        MetricUnavailable: the package or its weights are not here. Nothing is downloaded.
    """

    def __init__(self, folder: str | Path | None = None, model_type: str = "radgraph", device: str = "cpu"):
        if importlib.util.find_spec("radgraph") is None:
            raise MetricUnavailable(
                "needs the package radgraph (pip install radgraph) and its weights, or an annotator of your own"
            )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
                from radgraph import RadGraph
                from radgraph.radgraph import CACHE_DIR
        except Exception as error:  # its many dependencies can fail in any way
            raise MetricUnavailable(f"needs the package radgraph, which cannot be imported here: {error}") from error
        folder = Path(folder or CACHE_DIR)
        weights = folder / model_type / "weights.th"
        if not weights.is_file():
            raise MetricUnavailable(
                f"needs the weights of RadGraph in {weights}; where there is a network, get them with "
                f"python -c \"from radgraph import RadGraph; RadGraph(model_type='{model_type}')\""
            )
        kind, _, number = device.partition(":")
        cuda = int(number or 0) if kind == "cuda" else -1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._model = RadGraph(model_type=model_type, model_cache_dir=str(folder), cuda=cuda)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise MetricUnavailable(f"needs RadGraph, which cannot be loaded from {folder}: {reason}") from error

    def __call__(self, texts: Sequence[str]) -> list[Annotation]:
        """One annotation per text."""
        found = self._model(list(texts))
        return [found[str(index)] for index in range(len(texts))]


def load_annotator(spec: str = "radgraph", device: str = "cpu") -> Annotator:
    """The annotator that `spec` names.

    Args:
        spec: "radgraph", the package with the weights in its cache; "radgraph:FOLDER", with weights in a folder; or
            "package.module:attribute", a function from texts to annotations, or a class that makes one.
        device: where a model runs.

    Raises:
        MetricUnavailable: a package or weights are not here; the message says what is needed.
        ValueError: there is no such annotator.
    """
    kind, _, rest = spec.partition(":")
    if kind == "radgraph":
        return RadGraphAnnotator(rest or None, device=device)
    known = '"radgraph", "radgraph:FOLDER" or "package.module:attribute"'
    found = import_attribute(spec, "annotator", known)
    if isinstance(found, type):
        found = call_factory(spec, found, device, "annotator")
    if not callable(found):
        raise ValueError(f"{spec!r} is no annotator: it is a {type(found).__name__}, not a function of texts.")
    return found


def radgraph_f1(
    predictions: Sequence[str] | Sequence[Annotation],
    references: Sequence[str] | Sequence[Annotation | None],
    annotator: Annotator | str | None = None,
    units: Sequence[int] | None = None,
) -> dict:
    """RadGraph F1 of texts (with `annotator`) or of annotations; see the module's `_KWARGS`.

    Raises:
        ValueError: as `RadGraphF1Statistic`, or for texts without an annotator.
        MetricUnavailable: if the annotator that is named lacks its package or weights.
    """
    if isinstance(annotator, str):
        annotator = load_annotator(annotator)
    if annotator is not None:
        statistic = RadGraphF1Statistic.from_texts(predictions, references, annotator, units)
    else:
        if any(isinstance(entry, str) for entry in (*predictions, *references)):
            raise ValueError(
                "Texts were given without an annotator. Pass `annotator=`, or the annotations themselves."
            )
        statistic = RadGraphF1Statistic(predictions, references, units)
    return {**named_values(statistic), "count": statistic.count, "dropped": statistic.dropped}


class RadGraphF1(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `radgraph_f1`: takes texts and an annotator, or annotations as JSON texts."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list, references: list, annotator: Annotator | str | None = None, **options
    ) -> dict:
        if annotator is None:
            predictions, references = (
                [_parsed(text, f"`{side}[{index}]`") for index, text in enumerate(texts)]
                for side, texts in (("predictions", predictions), ("references", references))
            )
        return radgraph_f1(predictions, references, annotator, **options)


def _parsed(text: str, where: str) -> Annotation:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(
            f"{where} is not JSON: without an `annotator`, annotations are given as JSON texts (json.dumps)."
        ) from None
