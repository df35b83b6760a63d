"""Which loss terms a run can learn from: those that its data annotate, and that reach a part which it trains."""

from collections.abc import Collection
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from modeling_chex import ChexModel
from training.collate import MixedDataset, RecordDataset
from training.objectives import ObjectiveWeights


_COLUMNS = (
    *("sentences", "anatomy_boxes", "anatomy_present", "anatomy_labels", "anatomy_sentences"),
    *("objects", "class_labels"),
)
_ENCODER = frozenset({"vision_model", "visual_projection"})
_DETECTOR = _ENCODER | {"detector"}
_FEATURES = _DETECTOR | {"post_decoder"}
_GENERATOR = _FEATURES | {"sentence_generator"}
# What each term learns from, and the parts that it has gradients for.
TERMS: dict[str, tuple[str, frozenset[str]]] = {
    "global_contrastive": ("sentences", _ENCODER),
    "sentence_contrastive": ("sentences", _FEATURES),
    "sentence_mse": ("sentences", _FEATURES),
    "sentence_generation": ("sentences", _GENERATOR),
    "sentence_detection": ("phrases of boxes", _DETECTOR),
    "pathology_detection": ("boxes of findings", _DETECTOR),
    "pathology_classification": ("class labels", _FEATURES),
    "anatomy_detection": ("boxes of regions", _DETECTOR),
    "anatomy_classification": ("labels of regions with boxes", _FEATURES),
    "anatomy_mse": ("sentences of regions with boxes", _FEATURES),
    "anatomy_presence": ("boxes of regions", _DETECTOR),
    "anatomy_statement": ("labels of regions with boxes", _FEATURES),
    "anatomy_generation": ("sentences of regions with boxes", _GENERATOR),
}
KINDS = tuple(dict.fromkeys(kind for kind, _ in TERMS.values()))


def annotated_kinds(data: RecordDataset | MixedDataset) -> set[str]:
    """Which of `KINDS` any image of the data has."""
    found: set[str] = set()
    for part in data.parts if isinstance(data, MixedDataset) else [data]:
        for table in part.records.select_columns(list(_COLUMNS)).iter(1000):
            found |= {kind for kind in KINDS if kind not in found and _has(table, kind)}
            if len(found) == len(KINDS):
                return found
    return found


def _has(table: pa.Table, kind: str) -> bool:
    def items(name: str) -> pa.Array:
        return pc.list_flatten(table[name])

    if kind == "sentences":
        return len(items("sentences")) > 0
    if kind == "boxes of findings":
        return len(items("objects")) > 0
    if kind == "phrases of boxes":
        return len(items("objects")) > 0 and bool(
            pc.any(pc.not_equal(pc.struct_field(items("objects"), "phrase"), ""))
        )
    if kind == "class labels":
        return table["class_labels"].null_count < len(table)
    needed = ["anatomy_boxes", "anatomy_present"]
    needed += [name for name in ("anatomy_labels", "anatomy_sentences") if kind.startswith(name.split("_")[1])]
    for name in needed:
        table = table.filter(pc.is_valid(table[name]))
    if kind.startswith("sentences") and len(pc.list_flatten(items("anatomy_sentences"))) == 0:
        return False
    return bool(pc.any(items("anatomy_present")).as_py())


def usable_weights(
    weights: ObjectiveWeights, kinds: Collection[str], model: ChexModel, trained: Collection[str]
) -> tuple[ObjectiveWeights, str | None]:
    """
    Sets the coefficients of terms to 0 that nothing could be learned from.

    Args:
        kinds: What the training data have; see `annotated_kinds`.
        trained: Parts of the model with trainable parameters.

    Returns:
        The coefficients, and one line that lists what is off and why; None if nothing is.

    Raises:
        ValueError: No term is left.
    """
    reasons: dict[str, list[str]] = {}
    for term in sorted(weights.active(), key=list(TERMS).index):
        kind, parts = TERMS[term]
        if kind not in kinds:
            reason = f"the training data have no {kind}"
        elif term.endswith("generation") and model.sentence_generator is None:
            reason = "the model has no sentence generator"
        elif not parts & set(trained):
            reason = f"no influence on what is trained, {', '.join(sorted(trained)) or 'nothing'}"
        else:
            continue
        reasons.setdefault(reason, []).append(term)
    if not reasons:
        return weights, None
    off = [term for terms in reasons.values() for term in terms]
    line = "; ".join(f"{', '.join(terms)} ({reason})" for reason, terms in reasons.items())
    if len(off) == len(weights.active()):
        raise ValueError(
            f"Nothing can be learned, because every configured loss is off: {line}. Add annotations, or set "
            "`trainable` and objectives.weights to what the data teach."
        )
    return replace(weights, **dict.fromkeys(off, 0.0)), f"Losses that are off: {line}."


__all__ = ["KINDS", "TERMS", "annotated_kinds", "usable_weights"]
