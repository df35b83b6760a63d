"""Choice of the best models of a run by validation metrics, and early stopping."""

import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from training.checkpoints import writing
from training.configuration import SelectionConfig, nearest


logger = logging.getLogger(__name__)


def score(config: SelectionConfig, entry: Mapping[str, object]) -> float | None:
    """
    The chosen metric of a validation entry, of several their harmonic mean (0 if one is not positive); losses are
    negated, so that greater is better. None where a metric is missing (it is undefined for these images) or NaN.
    """
    values = [entry.get(name) for name in config.names]
    if any(not isinstance(value, int | float) or math.isnan(value) for value in values):
        return None
    if len(values) == 1:
        return values[0] if config.greater_is_better else -values[0]
    mean = statistics.harmonic_mean([max(value, 0.0) for value in values])
    return mean if config.greater_is_better else -mean


def check_names(config: SelectionConfig, available: Collection[str]) -> None:
    """
    Raises:
        ValueError: Validation does not measure what the selection names.
    """
    tasks = [name.split("/") for name in available if name.startswith("task/")]  # perhaps on one of several data sets
    for name in config.names:
        if name not in available and name.split("/")[:2] not in tasks:
            raise ValueError(
                f"selection.metric names {name!r}, which validation does not measure. "
                f"{nearest(name, sorted(available), 'metrics')}"
            )


@dataclass
class Selection:
    """
    The best models so far, best first as (score, update), and how many validations brought no better one.

    Models lie in `folder/update-<number>`. One that is no longer among the best is deleted only when no checkpoint
    refers to it any more, so that a run that goes on from a checkpoint finds what that checkpoint has chosen.
    """

    config: SelectionConfig
    folder: Path
    best: list[tuple[float, int]] = field(default_factory=list)
    stale: int = 0

    @property
    def exhausted(self) -> bool:
        """Whether the run is to stop early."""
        return self.config.patience is not None and self.stale >= self.config.patience

    @property
    def updates(self) -> list[int]:
        """Updates of the kept models, best first."""
        return [update for _, update in self.best]

    def add(self, update: int, entry: Mapping[str, object]) -> bool:
        """Takes up a validation; whether its model is one of the best."""
        value = score(self.config, entry)
        if value is None:
            logger.warning("Validation at update %d did not measure %s.", update, self.config.metric)
        better = value is not None and (not self.best or value > self.best[0][0] + self.config.min_delta)
        self.stale = 0 if better else self.stale + 1
        if value is None:
            return False
        # of equal ones the earlier stays
        self.best = sorted([*self.best, (value, update)], key=lambda pair: (-pair[0], pair[1]))
        self.best = self.best[: max(self.config.keep_best, 1)]  # the best score is needed in any case
        return self.config.keep_best > 0 and update in self.updates

    def save(self, update: int, save: Callable[[Path], None]) -> None:
        """Writes the model of an update; nothing is left of it under its name if that is interrupted."""
        temporary, final = self.folder / f"update-{update:08d}.partial", self.folder / f"update-{update:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(f"The model of update {update}", temporary):
            save(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)

    def prune(self, needed: Collection[int] = ()) -> None:
        """Deletes models that are neither among the best nor needed by a checkpoint; lists the best and scores."""
        if not self.folder.is_dir():
            return
        kept = {f"update-{update:08d}" for update in {*self.updates, *needed}}
        for path in self.folder.glob("update-*"):
            if path.name not in kept:
                shutil.rmtree(path)
        sign = 1 if self.config.greater_is_better else -1
        rows = [{"folder": f"update-{u:08d}", "update": u, self.config.metric: sign * value} for value, u in self.best]
        temporary = self.folder / "best.partial"
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / "best.json")

    def state_dict(self) -> dict[str, object]:
        return {"best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.stale = [tuple(pair) for pair in state["best"]], state["stale"]


__all__ = ["Selection", "check_names", "score"]
