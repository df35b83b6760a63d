"""Data sets in one common record: builders for the raw downloads, the phantom, own data, and their preparation."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from training.data.raw import RawBuilder

# Name on the command line -> module and class. Imported when asked for: a mistake in one keeps no other from loading.
BUILDERS: dict[str, tuple[str, str]] = {
    "mimic-cxr": ("mimic_cxr", "MimicCxr"),
    "chest-imagenome": ("chest_imagenome", "ChestImagenome"),
    "ms-cxr": ("ms_cxr", "MsCxr"),
    "vindr-cxr": ("vindr_cxr", "VindrCxr"),
    "nih-cxr14": ("nih_cxr14", "NihCxr14"),
    "own": ("own_data", "OwnData"),
}


def builder_class(name: str) -> "type[RawBuilder]":
    """The builder of a data set by its name on the command line, in which _ may stand for -.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    key = name.lower().replace("_", "-")
    if key not in BUILDERS:
        raise ValueError(f"There is no data set {name!r}. Known: {', '.join(BUILDERS)}.")
    module, attribute = BUILDERS[key]
    return getattr(importlib.import_module(f"training.data.{module}"), attribute)


__all__ = ["BUILDERS", "builder_class"]
