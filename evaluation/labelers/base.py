"""What a labeller is: a callable that reads which findings texts state."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from evaluation.metrics.unavailable import MetricUnavailable


# The classes of CheXpert in the order of CheXbert's heads.
CHEXPERT_CLASSES = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
# The five "competition" classes of CheXpert, of F1-5.
CHEXPERT_FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

PRESENT, NEGATED, UNCERTAIN = 1, 0, -1


class LabelerUnavailable(MetricUnavailable):
    """A labeller cannot be used on this machine, for example for lack of weights.

    The message says what is needed and how to get it, so that a results table can show it in place of the value.
    """


@runtime_checkable
class Labeler(Protocol):
    """Reads the findings that texts state.

    Attributes:
        name: for tables and messages.
        classes: every finding it can report, in order.
    """

    name: str
    classes: tuple[str, ...]

    def __call__(self, texts: Sequence[str]) -> list[dict[str, int]]:
        """One dict per text, from finding to 1 (present), 0 (negated) or -1 (uncertain).

        Findings that a text does not mention are missing from its dict.
        """
        ...


class CheckedLabeler:
    """A labeller that labels equal texts once and whose answers are checked.

    Args:
        labeler: the labeller itself; it gets the texts that it has not seen yet, each once.
    """

    def __init__(self, labeler: Labeler):
        self.labeler = labeler
        self.name = str(labeler.name)
        self.classes = tuple(labeler.classes)
        self._known: dict[str, dict[str, int]] = {}

    def __call__(self, texts: Iterable[str]) -> list[dict[str, int]]:
        """Labels of `texts`, in their order; the dicts are copies.

        Raises:
            ValueError: if an entry is no text, or the labeller answers with something else than one dict per text, an
                unknown class or an unknown value; the message names the labeller and the entry.
        """
        if isinstance(texts, str):
            raise ValueError("A labeller takes a list of texts, not a single text.")
        texts = list(texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"`texts[{index}]` is a {type(text).__name__}, not a text.")
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._checked(new, self.labeler(new)), strict=True))
        return [dict(self._known[text]) for text in texts]

    def _checked(self, texts: list[str], answers: object) -> list[dict[str, int]]:
        expected = "expected a list with one {finding: 1/0/-1} per text"
        if not isinstance(answers, list | tuple):
            raise ValueError(f"The labeller {self.name!r} returned a {type(answers).__name__}; {expected}.")
        if len(answers) != len(texts):
            raise ValueError(f"The labeller {self.name!r} returned {len(answers)} results for {len(texts)} texts.")
        known = set(self.classes)
        result = []
        for text, labels in zip(texts, answers, strict=True):
            shown = text if len(text) <= 60 else text[:57] + "..."
            if not isinstance(labels, dict):
                raise ValueError(
                    f"The labeller {self.name!r} returned a {type(labels).__name__} for {shown!r}; {expected}."
                )
            for finding, value in labels.items():
                if finding not in known:
                    raise ValueError(
                        f"The labeller {self.name!r} reports {finding!r} for {shown!r}, which is not one of its "
                        f"classes: {', '.join(self.classes)}."
                    )
                if value not in (PRESENT, NEGATED, UNCERTAIN):
                    raise ValueError(
                        f"The labeller {self.name!r} gives {finding} the value {value!r} for {shown!r}; values are 1 "
                        "(present), 0 (negated) and -1 (uncertain)."
                    )
            result.append({finding: int(value) for finding, value in labels.items()})
        return result
