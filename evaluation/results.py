"""Results of an evaluation as files: one per task, which a rerun takes over, and all together as JSON and CSV."""

import csv
import functools
import hashlib
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import write_text


logger = logging.getLogger(__name__)

SCHEMA = 1
SCORING_CODE = ("scoring.py", "bootstrap.py", "curves.py", "tasks/*.py", "metrics/**/*.py", "labelers/**/*.py")
RESULTS = "results.json"
CSV_COLUMNS = (
    *("task", "metric", "value", "low", "high", "mean", "std", "undefined"),
    *("official_value", "official_mean", "official_std", "data", "split", "twin", "images", "units", "unit"),
)


def without_nan(value: Any) -> Any:
    """Plain values for JSON: NaN and infinities become None, arrays lists, NumPy numbers Python's."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, np.ndarray):
        return without_nan(value.tolist())
    if isinstance(value, np.generic):
        return without_nan(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """Of the code that scores, so that results of an older version are not taken over."""
    folder = Path(__file__).parent
    content = hashlib.sha256()
    for path in sorted(path for part in SCORING_CODE for path in folder.rglob(part)):
        content.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:16]


def task_path(folder: Path, name: str) -> Path:
    return folder / "tasks" / f"{name}.json"


def write_task(folder: Path, name: str, key: Mapping[str, Any], result: Mapping[str, Any], data: Mapping) -> None:
    """
    Store the result of one task.

    Args:
        folder: Output folder.
        name: Of the task.
        key: Everything that the result depends on.
        result: Plain values.
        data: Description of its data set: {name: {"folder", "split", "images", "fingerprint"}}.
    """
    content = {"result": without_nan(result), "data": without_nan(data)}
    stored = {"schema": SCHEMA, "key": key, "digest": _digest(content), **content}
    write_text(task_path(folder, name), json.dumps(stored, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_task(folder: Path, name: str) -> dict[str, Any] | None:
    """A stored result with its key; None where there is none or where it is damaged (a warning says so)."""
    path = task_path(folder, name)
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["schema"] != SCHEMA:
            return None
        if stored["digest"] != _digest({"result": stored["result"], "data": stored["data"]}):
            raise ValueError("its content does not fit its digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s: %s). The task is scored again.", path, type(error).__name__, error)
        return None
    return stored


def write_bootstrap(folder: Path, name: str, metrics: Sequence[str], values: np.ndarray) -> Path:
    """Raw values of all resamples as CSV: a column for each metric, a row for each resample; empty = undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["resample", *metrics])
    for number, row in enumerate(values.tolist()):
        writer.writerow([number, *("" if math.isnan(value) else repr(value) for value in row)])
    return write_text(folder / "bootstrap" / f"{name}.csv", text.getvalue())


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """`results.json` and `results.csv`; returns the path of the first."""
    path = write_text(
        folder / RESULTS, json.dumps(without_nan(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, task in results["tasks"].items():
        for metric, entry in task["metrics"].items():
            row = {"task": name, "metric": metric, **{c: task[c] for c in CSV_COLUMNS if c in task}}
            row |= {column: entry[column] for column in CSV_COLUMNS if column in entry}
            official = entry.get("official") or {}
            row |= {f"official_{column}": value for column, value in official.items()}
            writer.writerow({c: "" if row.get(c) is None else row[c] for c in CSV_COLUMNS})
    write_text(folder / "results.csv", text.getvalue())
    return path


__all__ = [
    "RESULTS",
    "SCHEMA",
    "code_digest",
    "read_task",
    "task_path",
    "without_nan",
    "write_bootstrap",
    "write_results",
    "write_task",
]
