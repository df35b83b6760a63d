"""
What the pages about an evaluation show: `results.json` read and checked, its rows beside published numbers, and the
parts of an example in their colours. Nothing here depends on Markdown or HTML.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .published import Published, best_baseline, chex


SCHEMA = 1

# task -> (short name, kind of task in words, data set, headline metric)
NINE_TASKS: dict[str, tuple[str, str, str, str]] = {
    "od_vindr": ("OD VinDr", "Object detection", "VinDr-CXR", "map"),
    "od_nih8": ("OD NIH8", "Object detection", "NIH ChestX-ray8", "map"),
    "od_mscxr": ("OD MS-CXR", "Object detection", "MS-CXR", "map"),
    "sg_mscxr": ("SG MS-CXR", "Sentence grounding", "MS-CXR", "miou"),
    "rc_mscxr": ("RC MS-CXR", "Region classification", "MS-CXR", "auroc"),
    "rc_cig": ("RC CIG", "Region classification", "Chest ImaGenome", "wauroc"),
    "re_mscxr": ("RE MS-CXR", "Region explanation", "MS-CXR", "micro_f1_14"),
    "re_cig": ("RE CIG", "Region explanation", "Chest ImaGenome", "micro_f1_14"),
    "rg_mimic": ("RG MIMIC", "Report generation", "MIMIC-CXR", "micro_f1_14"),
}
METRIC_NAMES: dict[str, str] = {
    "map": "mAP",
    "map10": "AP@0.1",
    "map30": "AP@0.3",
    "map50": "AP@0.5",
    "coco_map": "COCO mAP",
    "miou": "mIoU",
    "best_iou": "best IoU",
    "iou_at_30": "IoU@0.3",
    "macro_iou": "macro IoU",
    "auroc": "AUROC",
    "wauroc": "wAUROC",
    "macro_auroc": "macro AUROC",
    "accuracy": "accuracy",
    "mcc": "MCC",
    "micro_f1_14": "Mic-F1-14",
    "macro_f1_14": "Mac-F1-14",
    "micro_f1_5": "Mic-F1-5+",
    "macro_f1_5": "Mac-F1-5+",
    "example_f1_14": "Ex-F1-14",
    "micro_precision_14": "Mic-P-14",
    "micro_recall_14": "Mic-R-14",
    "f1_14": "F1",
    "micro_f1": "Mic-F1",
    "macro_f1": "Mac-F1",
    "example_f1": "Ex-F1",
    "meteor": "METEOR",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "radgraph_f1": "RadGraph F1",
    "ap": "AP",
    "f1": "F1",
    "iou": "IoU",
}
_COUNTS = {"positives", "negatives", "images", "boxes", "count", "support", "cells", "regions", "predictions"}


class ResultsError(ValueError):
    """A results file that cannot be shown; the message says where the problem is and what to do."""


def metric_name(metric: str) -> str:
    """For people: 'micro_f1_14' -> 'Mic-F1-14'."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def percent(value: float | None, digits: int = 1) -> str:
    """0.3412 -> '34.1'; '–' for None."""
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def interval(entry: Mapping[str, Any]) -> str:
    """'31.0 – 37.2', or '–' without a bootstrap."""
    if entry.get("low") is None or entry.get("high") is None:
        return "–"
    return f"{percent(entry['low'])} – {percent(entry['high'])}"


def mean_std(entry: Mapping[str, Any] | None) -> str:
    """'34.12 ± 1.45', the convention of the paper."""
    if not entry or entry.get("mean") is None:
        return "–"
    if entry.get("std") is None:
        return percent(entry["mean"], 2)
    return f"{percent(entry['mean'], 2)} ± {percent(entry['std'], 2)}"


# --- reading ---


def _fail(path: Path, where: str, problem: str) -> ResultsError:
    return ResultsError(f"{path}: {where} {problem}. Run the evaluation again, or restore the file.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _need(path: Path, content: Mapping, where: str, fields: Mapping[str, tuple[type, ...]]) -> None:
    missing = [key for key in fields if key not in content]
    if missing:
        raise _fail(path, where, f"lacks {', '.join(map(repr, missing))}")
    for key, kinds in fields.items():
        value = content[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(dict.fromkeys(_kind(kind()) for kind in kinds))
            raise _fail(path, where, f"has {_kind(value)} as {key!r}, expected {expected}")


_TEXT, _NUMBER, _COUNT = (str,), (int, float), (int,)
_NONE = type(None)
_TOP = {
    "schema": _COUNT,
    "created": _TEXT,
    "command": _TEXT,
    "seed": (int, _NONE),
    "resamples": (int, _NONE),
    "model": (dict,),
    "data": (dict,),
    "versions": (dict,),
    "tasks": (dict,),
}
_MODEL = {"path": (str, _NONE), "sha256": (str, _NONE), "parameters": (int, _NONE), "name": _TEXT}
_DATA = {"folder": (str, _NONE), "split": (str, _NONE), "images": (int, _NONE), "fingerprint": (str, _NONE)}
_TASK = {
    "title": _TEXT,
    "kind": _TEXT,
    "data": _TEXT,
    "split": _TEXT,
    "twin": (bool,),
    "images": _COUNT,
    "units": (int, _NONE),
    "unit": _TEXT,
    "metrics": (dict,),
}
_TASK_DEFAULTS: dict[str, Any] = {
    "per_class": [],
    "settings": {},
    "tuning": None,
    "notes": [],
    "not_computed": {},
    "curves": {},
    "examples": [],
    "seconds": {},
}
# Whatever else a task holds are counts of its own.
TASK_KEYS = frozenset((*_TASK, *_TASK_DEFAULTS, "headline"))
_METRIC = ("value", "mean", "std", "low", "high")


def _no_nan(value: Any) -> Any:
    """NaN and infinities, which other writers of JSON may leave, are undefined."""
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: str | Path) -> dict[str, Any]:
    """
    Read and check a results file.

    Args:
        path: `results.json` of an evaluation.

    Returns:
        Its content; parts of tasks that may be left out are filled with empty ones, NaN becomes None.

    Raises:
        ResultsError: There is no such file, it is damaged, of another schema, or parts are missing.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise ResultsError(f"{path} does not exist: give the results.json that evaluation/run.py has written.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResultsError(
            f"{path} is damaged ({error}). Run the evaluation again: what is complete is taken over."
        ) from error
    if not isinstance(results, dict):
        raise _fail(path, "the file", f"holds {_kind(results)}, expected an object")
    results = _no_nan(results)
    if "schema" not in results:
        raise _fail(path, "the file", "lacks 'schema', so it is no results file of an evaluation")
    if results["schema"] != SCHEMA:
        raise ResultsError(
            f"{path} has the schema {results['schema']!r}, this version reads {SCHEMA}: "
            "run the evaluation again with this version, or make the pages with the version that wrote it."
        )
    _need(path, results, "the file", _TOP)
    results.setdefault("seconds", {})
    _need(path, results["model"], "'model'", _MODEL)
    for name, description in results["data"].items():
        _need(path, {name: description}, "'data'", {name: (dict,)})
        _need(path, description, f"the data set {name!r}", _DATA)
    for name, task in results["tasks"].items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise _fail(path, "'tasks'", f"has the name {name!r}, expected letters, digits, '_' and '-'")
        _need(path, {name: task}, "'tasks'", {name: (dict,)})
        _check_task(path, f"the task {name!r}", task)
    return results


def _check_task(path: Path, where: str, task: dict[str, Any]) -> None:
    _need(path, task, where, _TASK)
    for key, default in _TASK_DEFAULTS.items():
        if task.get(key) is None:
            task[key] = default
        elif default is not None:
            _need(path, task, where, {key: (type(default),)})
    for metric, entry in task["metrics"].items():
        label = f"{where}, metric {metric!r},"
        _need(path, {metric: entry}, where, {metric: (dict,)})
        _need(path, entry, label, {"value": (int, float, _NONE)})
        for part in (entry, entry.get("official") or {}):
            _need(path, part, label, {key: (int, float, _NONE) for key in _METRIC if key in part})
    for number, row in enumerate(task["per_class"]):
        label = f"{where}, class {number + 1},"
        _need(path, {"per_class": row}, where, {"per_class": (dict,)})
        _need(path, row, label, {"name": _TEXT})
    for number, example in enumerate(task["examples"]):
        _check_example(path, f"{where}, example {number + 1},", example)
    _check_curves(path, where, task["curves"])


def _check_example(path: Path, where: str, example: Any) -> None:
    _need(path, {"examples": example}, where, {"examples": (dict,)})
    example.setdefault("image", None)
    for key in ("boxes", "sentences", "reference_sentences"):
        example[key] = example.get(key) or []
        _need(path, example, where, {key: (list,)})
        for item in example[key]:
            _need(path, {key: item}, where, {key: (dict,)})
    _need(path, example, where, {"image": (str, _NONE)})
    for box in example["boxes"]:
        corners = box.get("box")
        if not isinstance(corners, list) or len(corners) != 4 or not all(isinstance(v, _NUMBER) for v in corners):
            raise _fail(path, where, f"has the box {corners!r}, expected four numbers (x0, y0, x1, y1)")
    for sentence in (*example["sentences"], *example["reference_sentences"]):
        _need(path, sentence, where, {"text": _TEXT})
    image = example["image"]
    if image is not None and (Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image):
        raise _fail(path, where, f"names the image {image!r}, which is not beside the file")


def _check_curves(path: Path, where: str, curves: Mapping[str, Any]) -> None:
    pairs = {"precision_recall": ("recall", "precision"), "calibration": ("confidence", "accuracy")}
    for kind, (x, y) in pairs.items():
        content = curves.get(kind)
        if not content:
            continue
        _need(path, {kind: content}, where, {kind: (dict,)})
        lines = content if kind == "precision_recall" else {"calibration": content}
        for name, line in lines.items():
            label = f"{where}, curve {kind} of {name!r},"
            _need(path, {name: line}, label, {name: (dict,)})
            _need(path, line, label, {x: (list,), y: (list,)})
            if len(line[x]) != len(line[y]):
                raise _fail(path, label, f"has {len(line[x])} values of {x} but {len(line[y])} of {y}")


# --- rows beside published numbers ---


@dataclass(frozen=True)
class Row:
    """
    A metric of a task as it is shown.

    Attributes:
        task: Its name.
        title, place: What is asked, and of which data.
        metric: Its name.
        entry: Value and bootstrap; None where there is none.
        state: "computed", "undefined", "not computed" or "not run".
        reason: Why there is no number.
        chex: Published number of ChEX.
        baseline: Best published number of another system.
        twin: Whether it was measured on the phantom, so that published numbers are of other data.
    """

    task: str
    title: str
    place: str
    metric: str
    entry: Mapping[str, Any] | None
    state: str
    reason: str
    chex: Published | None
    baseline: Published | None
    twin: bool


def headline(name: str, task: Mapping[str, Any]) -> str:
    """The main metric of a task among those that it has."""
    known = [*task["metrics"], *task["not_computed"]]
    wanted = task.get("headline") or (NINE_TASKS[name][3] if name in NINE_TASKS else None)
    if wanted is not None and (wanted in known or not known):
        return wanted
    # twins have labellers of other classes than CheXpert's
    if wanted is not None and wanted.removesuffix("_14") in known:
        return wanted.removesuffix("_14")
    return known[0] if known else "value"


def published_metric(name: str, metric: str) -> str:
    """The metric of the paper that one of a twin stands for: finding F1 is published over CheXpert's 14 classes."""
    return f"{metric}_14" if metric in ("micro_f1", "macro_f1", "example_f1") and name in NINE_TASKS else metric


def metric_row(name: str, task: Mapping[str, Any] | None, metric: str) -> Row:
    """One metric of a task; `task` None: it was not run."""
    short, title, place, _ = NINE_TASKS.get(name, (name, name.replace("_", " ").capitalize(), "", ""))
    entry, state, reason = None, "not run", "not among the tasks of this run"
    twin = False
    if task is not None:
        twin = task["twin"]
        if name not in NINE_TASKS:
            title, place = task["title"], task["data"]
        if metric in task["metrics"]:
            entry = task["metrics"][metric]
            state, reason = ("computed", "") if entry["value"] is not None else ("undefined", _why(task, metric))
        elif metric in task["not_computed"]:
            state, reason = "not computed", str(task["not_computed"][metric])
        else:
            state, reason = "not computed", "not among the metrics of this run"
    shown = published_metric(name, metric)
    return Row(name, title, place, metric, entry, state, reason, chex(name, shown), best_baseline(name, shown), twin)


def _why(task: Mapping[str, Any], metric: str) -> str:
    for note in task["notes"]:
        if metric in str(note) or metric_name(metric) in str(note):
            return str(note)
    positives = [row["positives"] for row in task["per_class"] if row.get("positives") is not None]
    if positives and not any(positives):
        return "no class has positives"
    return "these data have nothing to measure it on"


def overview(results: Mapping[str, Any]) -> list[Row]:
    """A row per task of the paper, in its order, then the other tasks of the run; each with its main metric."""
    tasks = results["tasks"]
    rows = []
    for name in (*NINE_TASKS, *(name for name in tasks if name not in NINE_TASKS)):
        task = tasks.get(name)
        rows.append(metric_row(name, task, NINE_TASKS[name][3] if task is None else headline(name, task)))
    return rows


def task_rows(name: str, task: Mapping[str, Any]) -> list[Row]:
    """A row per metric of a task, those that were not computed last."""
    metrics = [*task["metrics"], *(metric for metric in task["not_computed"] if metric not in task["metrics"])]
    return [metric_row(name, task, metric) for metric in metrics]


def has_twins(results: Mapping[str, Any]) -> bool:
    return any(task["twin"] for task in results["tasks"].values())


def class_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of a per-class table besides the name, in the order in which they appear."""
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key != "name"]


def is_count(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column holds counts rather than fractions."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return column in _COUNTS or (
        any(isinstance(value, int) and value > 1 for value in values)
        and all(isinstance(value, int) for value in values)
    )


def format_cell(value: Any, count: bool) -> str:
    """A cell of a per-class table as text."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, _NUMBER):
        return str(value)
    return f"{value:,}" if count else percent(value)


def flatten(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) rows; lists as JSON."""
    if isinstance(settings, Mapping) and settings:
        return [
            row
            for key, value in settings.items()
            for row in flatten(value, f"{prefix} › {key}" if prefix else str(key))
        ]
    if isinstance(settings, float):
        return [(prefix, f"{settings:.6g}")]
    if isinstance(settings, str):
        return [(prefix, settings)]
    return [(prefix, json.dumps(settings, ensure_ascii=False))]


# --- examples ---


@dataclass(frozen=True)
class Sentence:
    """A sentence of a generated or reference report; `group`: the boxes it belongs to (None: none)."""

    text: str
    group: int | None
    prompt: str = ""


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
_NEGATION = {"no", "not", "without", "nor", "neither", "free", "absent", "clear", "unremarkable", "normal"}


def split_sentences(text: str) -> list[str]:
    """Sentences of a report; for showing only."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def generated_sentences(example: Mapping[str, Any]) -> list[Sentence]:
    """Sentences of the model with their boxes; a text without a list of sentences has no boxes of its own."""
    if example["sentences"]:
        return [Sentence(item["text"], _group(item), str(item.get("prompt") or "")) for item in example["sentences"]]
    groups = {_group(box) for box in example["boxes"]}
    only = next(iter(groups)) if len(groups) == 1 else None
    return [Sentence(text, only) for text in split_sentences(str(example.get("generated") or ""))]


def reference_sentences(example: Mapping[str, Any]) -> list[Sentence]:
    """
    Sentences of the reference, each with the boxes of the sentence that answers it.

    Where the example does not say (`reference_sentences`: [{"text", "group"}]), a sentence belongs to the annotated
    box with that text, or else to the generated sentence with which it shares at least half of the words, unless
    exactly one of them negates. All others belong to nothing.
    """
    if example["reference_sentences"]:
        return [Sentence(item["text"], _group(item)) for item in example["reference_sentences"]]
    labels = {
        tuple(sorted(_words(str(box.get("label") or "")))): _group(box)
        for box in example["boxes"]
        if box.get("kind") == "target"
    }
    generated = generated_sentences(example)
    result = []
    for text in split_sentences(str(example.get("reference") or "")):
        words = _words(text)
        group = labels.get(tuple(sorted(words)))
        if group is None:
            best = max(
                (
                    (len(words & other) / len(words | other), -rank, sentence.group)
                    for rank, sentence in enumerate(generated)
                    if (other := _words(sentence.text)) and bool(words & _NEGATION) == bool(other & _NEGATION)
                ),
                default=(0.0, 0, None),
            )
            group = best[2] if best[0] >= 0.5 else None
        result.append(Sentence(text, group))
    return result


def _group(item: Mapping[str, Any]) -> int | None:
    group = item.get("group")
    return group if isinstance(group, int) and not isinstance(group, bool) and group >= 0 else None


def box_group(box: Mapping[str, Any]) -> int | None:
    """The group of a box, None where it belongs to nothing."""
    return _group(box)


def is_report(example: Mapping[str, Any]) -> bool:
    """Whether an example shows a text of several sentences, rather than boxes or one sentence."""
    return len(example["sentences"]) > 1 or len(split_sentences(str(example.get("generated") or ""))) > 1


__all__ = [
    "METRIC_NAMES",
    "NINE_TASKS",
    "SCHEMA",
    "TASK_KEYS",
    "ResultsError",
    "Row",
    "Sentence",
    "box_group",
    "class_columns",
    "flatten",
    "format_cell",
    "generated_sentences",
    "has_twins",
    "headline",
    "interval",
    "is_count",
    "is_report",
    "mean_std",
    "metric_name",
    "metric_row",
    "overview",
    "percent",
    "published_metric",
    "read_results",
    "reference_sentences",
    "split_sentences",
    "task_rows",
]
