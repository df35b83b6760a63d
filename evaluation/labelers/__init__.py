"""Labellers read findings in texts; `load_labeler` makes one from its name.

- `phantom`: the exact labeller of the synthetic chest.
- `chexbert:FOLDER`: CheXbert, from a folder that `chex convert chexbert` wrote.
- `package.module:attribute`: your own (docs/labelers.md).
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

from .base import (
    CHEXPERT_CLASSES,
    CHEXPERT_FIVE,
    NEGATED,
    PRESENT,
    UNCERTAIN,
    CheckedLabeler,
    Labeler,
    LabelerUnavailable,
)
from .plugins import call_factory, import_attribute


_SPECS = '"phantom", "chexbert:FOLDER" or "package.module:attribute"'
CHEXBERT_NEEDS = (
    "needs CheXbert's weights: request chexbert.pth as the CheXbert repository tells "
    "(github.com/stanfordmlgroup/CheXbert), convert it with `chex convert chexbert chexbert.pth FOLDER --tokenizer "
    "bert-base-uncased`, and give --labeler chexbert:FOLDER"
)


class PhantomLabeler:
    """The exact labeller of the phantom's sentences (`training.data.phantom_text.label_text`)."""

    name = "phantom"

    def __init__(self) -> None:
        from processing_chex.vocabulary import PHANTOM_CLASSES

        self.classes: tuple[str, ...] = tuple(PHANTOM_CLASSES)

    def __call__(self, texts: Sequence[str]) -> list[dict[str, int]]:
        from training.data.phantom_text import label_text

        return [label_text(text) for text in texts]


def load_labeler(spec: str, device: str = "cpu", batch_size: int = 32, progress: bool = False) -> CheckedLabeler:
    """The labeller that `spec` names; it labels equal texts once, and its answers are checked.

    Args:
        spec: "phantom"; "chexbert:FOLDER", a folder that `chex convert chexbert` wrote; or
            "package.module:attribute", a labeller (see `Labeler`), or a class or function without required arguments
            that makes one. It is passed `device` if it has a parameter of that name.
        device: where a model runs, such as "cuda".
        batch_size: texts that CheXbert reads at once.
        progress: show a progress bar where labelling takes long (CheXbert).

    Raises:
        LabelerUnavailable: the weights are not there; the message says what is needed.
        ValueError: there is no such labeller, or the attribute is none.
    """
    kind, _, rest = spec.partition(":")
    if spec == "phantom":
        return CheckedLabeler(PhantomLabeler())
    if kind == "chexbert":
        return CheckedLabeler(_load_chexbert(rest, device, batch_size, progress))
    return CheckedLabeler(_load_plugin(spec, device))


def _load_chexbert(folder: str, device: str, batch_size: int, progress: bool) -> Labeler:
    if not folder:
        raise LabelerUnavailable(CHEXBERT_NEEDS)
    path = Path(folder).expanduser()
    missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
    if missing:
        lack = f"has no {' and no '.join(missing)}" if path.is_dir() else "does not exist"
        raise LabelerUnavailable(f"the folder {path} {lack}; {CHEXBERT_NEEDS}")
    from .chexbert import ChexbertLabeler

    return ChexbertLabeler.from_folder(path, device=device, batch_size=batch_size, progress=progress)


def _load_plugin(spec: str, device: str) -> Labeler:
    found = import_attribute(spec, "labeller", _SPECS)
    if inspect.isclass(found) or (callable(found) and not hasattr(found, "classes")):
        found = call_factory(spec, found, device, "labeller")
    lacks = [name for name in ("name", "classes") if not hasattr(found, name)]
    if not callable(found):
        lacks.append("__call__")
    if lacks:
        raise ValueError(
            f"{spec!r} is no labeller: {type(found).__name__} lacks {', '.join(lacks)}. A labeller is a callable from "
            "a list of texts to a list of {finding: 1/0/-1}, with the attributes `name` and `classes`."
        )
    classes = found.classes
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise ValueError(f"{spec!r} is no labeller: its `classes` are {classes!r}, not a sequence of names.")
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ValueError(
            f"{spec!r} is no labeller: its `classes` are not all texts, or some occur twice: {classes!r}."
        )
    return found


__all__ = [
    "CHEXPERT_CLASSES",
    "CHEXPERT_FIVE",
    "NEGATED",
    "PRESENT",
    "UNCERTAIN",
    "CheckedLabeler",
    "Labeler",
    "LabelerUnavailable",
    "PhantomLabeler",
    "load_labeler",
]
