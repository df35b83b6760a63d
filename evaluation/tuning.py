"""Tuned post-processing on disk: what was chosen on which validation data, for which model."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.files import write_text
from evaluation.tasks.catalog import Task
from evaluation.tasks.detection import DetectionSettings
from evaluation.tasks.grounding import GroundingSettings


logger = logging.getLogger(__name__)

FORMAT = 1
Settings = DetectionSettings | GroundingSettings
_NAMED = {
    "model": "another model",
    "data": "another data set",
    "fingerprint": "other validation data",
    "images": "another number of validation images",
    "official": "the other rule for ties (--official)",
    "start": "other settings to begin with",
}


class StaleTuning(ValueError):
    """Stored settings that were tuned for another model or on other data."""


@dataclass(frozen=True)
class Tuning:
    """
    Settings tuned on a validation split.

    Attributes:
        task: Name of the task.
        settings: What was chosen.
        log: Stages with the value of each candidate.
        origin: What it was tuned with: model, data set, fingerprint and number of the validation images, rule for
            ties, settings to begin with.
    """

    task: str
    settings: Settings
    log: list[dict[str, Any]]
    origin: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file and in results."""
        return {
            "format": FORMAT,
            "task": self.task,
            "settings": plain(self.settings),
            "stages": self.log,
            "origin": dict(self.origin),
        }


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as plain values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}


def settings_of(task: Task, values: Mapping[str, Any]) -> Settings:
    """Settings from plain values."""
    if task.kind == "grounding":
        return GroundingSettings(**values)
    scales = values["scales"]
    return DetectionSettings(**{**values, "scales": tuple(scales) if scales is not None else None})


def start_of(task: Task) -> Settings:
    """Settings of the catalogue, with which a task runs where it is not tuned."""
    return task.grounding if task.kind == "grounding" else task.detection


def tuning_path(folder: Path, task: Task) -> Path:
    return folder / "tuning" / f"{task.name}.json"


def read_tuning(path: Path, task: Task, origin: Mapping[str, Any], overwrite: bool = False) -> Tuning | None:
    """
    Stored settings; None where there are none, or the file is damaged (a warning says so).

    Raises:
        StaleTuning: They were tuned for another model, on other data or by another rule, and not `overwrite`.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["task"] != task.name:
            raise ValueError("it is of another format or task")
        stored = Tuning(task.name, settings_of(task, values["settings"]), values["stages"], values["origin"])
        differing = [name for name in origin if stored.origin.get(name) != origin[name]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s: %s). The settings are tuned again.", path, type(error).__name__, error)
        return None
    if not differing:
        return stored
    if overwrite:
        return None
    raise StaleTuning(
        f"{path} was tuned with {', '.join(_NAMED.get(name, name) for name in differing)}, so that its settings are "
        "not used here: give another output folder, or --overwrite to tune again."
    )


def write_tuning(path: Path, tuning: Tuning) -> None:
    write_text(path, json.dumps(tuning.to_dict(), indent=1, allow_nan=False) + "\n")


__all__ = [
    "Settings",
    "StaleTuning",
    "Tuning",
    "plain",
    "read_tuning",
    "settings_of",
    "start_of",
    "tuning_path",
    "write_tuning",
]
