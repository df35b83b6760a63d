"""The Markdown page about an evaluation, from what `evaluation.results_view` reads."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import published
from .page_html import twin_warning
from .published import NOTE, RADAR, Published, find_published
from .results_view import (
    NINE_TASKS,
    Row,
    class_columns,
    flatten,
    format_cell,
    has_twins,
    interval,
    is_count,
    mean_std,
    metric_name,
    overview,
    percent,
    task_rows,
)


def _text(value: Any) -> str:
    """Text that Markdown and the HTML in it take literally, on one line."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", line)


def _code(value: Any) -> str:
    """A code span; longer fences where the text has backticks."""
    line = " ".join(str(value).split())
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1) -> list[str]:
    """A table; columns from `numbers` on are aligned to the right."""
    marks = ["---" if index < numbers else "---:" for index in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)] + [""]


def _published(entry: Published | None, with_model: bool = False) -> str:
    if entry is None:
        return "–"
    mark = {NOTE: " (n)", RADAR: " (r)"}.get(entry.source, "")
    model = f", {_text(entry.model)}" if with_model else ""
    return f"{entry.printed}{mark}{model}"


def _state(row: Row, reason: str = "") -> str:
    return f"{row.state}: {_text(reason or row.reason)}"


_LEGEND = (
    f"(n): {published.SOURCES[NOTE]}. (r): {published.SOURCES[RADAR]}; ×: ratio to ChEX. Others: tables of papers."
)


def render_markdown(results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """
    The whole page.

    Args:
        results: As from `evaluation.results_view.read_results`.
        figures: Figure files by name ("radar", "<task>-calibration", ...), relative to the page.
    """
    model = results["model"]
    lines = [f"# Evaluation of {_text(model['name'])}", ""]
    warning = twin_warning(results)
    if warning:
        lines += [f"**{warning}**", ""]
    lines += ["All values in percent (CIDEr × 100). Research software, not a medical device.", ""]
    parameters = "unknown" if model["parameters"] is None else f"{model['parameters']:,}"
    bootstrap = f"{results['resamples']:,} resamples, seed {results['seed']}" if results["resamples"] else "none"
    facts = [
        ("Model", f"{_text(model['name'])} ({_code(model['path'] or 'in memory')})"),
        ("SHA-256", _code(model["sha256"] or "unknown")),
        ("Parameters", parameters),
        ("Bootstrap", bootstrap),
        ("Created", _text(results["created"])),
        ("Versions", _text(", ".join(f"{key} {value}" for key, value in results["versions"].items())) or "–"),
    ]
    for name, data in results["data"].items():
        count = "?" if data["images"] is None else f"{data['images']:,}"
        facts.append(
            (f"Data: {_text(name)}", f"{count} images, {_text(data['split'])} split, {_code(data['fingerprint'])}")
        )
    lines += _table(("What", ""), facts, numbers=2)
    lines += ["```sh", *str(results["command"]).replace("```", "` ` `").splitlines(), "```", ""]
    lines += ["## Overview", "", *_overview(results), _LEGEND, ""]
    if "radar" in figures:
        lines += [f"![Radar of the nine tasks]({figures['radar']})", ""]
    lines += ["## Tasks", ""]
    order = [*(n for n in NINE_TASKS if n in results["tasks"]), *(n for n in results["tasks"] if n not in NINE_TASKS)]
    for name in order:
        lines += _task(name, results["tasks"][name], figures)
    lines += ["## Published numbers", "", _LEGEND, "", *_published_tables()]
    return "\n".join(lines).rstrip() + "\n"


def _real(results_or_twin: bool) -> str:
    return " (real data)" if results_or_twin else ""


def _overview(results: Mapping[str, Any]) -> list[str]:
    twins = has_twins(results)
    skipped = results.get("skipped") or {}
    rows = []
    for row in overview(results):
        task = results["tasks"].get(row.task)
        place = f", {_text(row.place)}" if row.place else ""
        name = f"{_text(row.title)}{place}{' (twin)' if row.twin else ''}"
        if row.state == "computed":
            value, spread = f"**{percent(row.entry['value'])}**", interval(row.entry)
        else:
            value, spread = _state(row, str(skipped.get(row.task) or "") if task is None else ""), ""
        rows.append(
            (
                name,
                metric_name(row.metric),
                "" if task is None else f"{task['images']:,}",
                value,
                spread,
                _published(row.chex),
                _published(row.baseline, True),
            )
        )
    real = _real(twins)
    return _table(
        ("Task", "Metric", "Images", "Value", "95 % interval", f"ChEX{real}", f"Best baseline{real}"), rows, numbers=2
    )


def _task(name: str, task: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
    twin = " (twin on synthetic images)" if task["twin"] else ""
    lines = [f"### {_text(task['title'])}{twin}", ""]
    units = ""
    if task["unit"] != "image" and task["units"] is not None:
        plural = task["unit"] + ("es" if task["unit"].endswith("x") else "s")
        units = f", bootstrap over {task['units']:,} {_text(plural)}"
    lines += [f"{_text(task['data'])}, {_text(task['split'])} split, {task['images']:,} images{units}.", ""]
    rows = task_rows(name, task)
    official = any((row.entry or {}).get("official") for row in rows)
    known = any(row.chex or row.baseline for row in rows)
    body = []
    for row in rows:
        if row.state == "computed":
            undefined = row.entry.get("undefined")
            rest = f" (undefined in {undefined:,} resamples)" if undefined else ""
            cells = [percent(row.entry["value"]), interval(row.entry) + rest, mean_std(row.entry)]
            entry = row.entry.get("official") or {}
            official_text = mean_std(entry) if entry.get("mean") is not None else percent(entry.get("value"), 2)
        else:
            cells, official_text = [_state(row), "", ""], ""
        cells += [official_text] * official
        if known:
            cells += [_published(row.chex), _published(row.baseline, True)]
        body.append((metric_name(row.metric), *cells))
    real = _real(task["twin"])
    head = ["Metric", "Value", "95 % interval", "Mean ± std", *["Official rules"] * official]
    head += [f"ChEX{real}", f"Best baseline{real}"] * known
    if body:
        lines += _table(head, body)
    if task["notes"]:
        lines += [*(f"- {_text(note)}" for note in task["notes"]), ""]
    classes = task["per_class"]
    if classes:
        columns = class_columns(classes)
        counts = {column: is_count(column, classes) for column in columns}
        shown = [_text(column.replace("_", " ") if counts[column] else metric_name(column)) for column in columns]
        lines += _table(
            ("Class", *shown),
            (
                (_text(row["name"]), *(_text(format_cell(row.get(column), counts[column])) for column in columns))
                for row in classes
            ),
        )
    settings = [*flatten(task["settings"], "settings")] if task["settings"] else []
    if isinstance(task["tuning"], Mapping) and isinstance(task["tuning"].get("settings"), Mapping):
        settings += flatten(task["tuning"]["settings"], "tuned")
    if settings:
        lines += ["Settings: " + "; ".join(f"{_text(key)} = {_text(value)}" for key, value in settings) + ".", ""]
    for kind, alternative in (("precision-recall", "Precision over recall"), ("calibration", "Calibration")):
        path = figures.get(f"{name}-{kind}")
        if path:
            lines += [f"![{alternative}, {_text(task['title'])}]({path})", ""]
    return lines


def _published_tables() -> list[str]:
    lines = []
    for title, tasks, metrics, remark in published.TABLES:
        columns = [(task, metric) for task in tasks for metric in metrics if find_published(task, metric)]
        models = list(dict.fromkeys(entry.model for pair in columns for entry in find_published(*pair)))
        head = [
            metric_name(metric) + (f" {NINE_TASKS[task][0]}" if len(tasks) > 1 else "") for task, metric in columns
        ]
        rows = []
        for model in models:
            found = [find_published(task, metric, model) for task, metric in columns]
            rows.append((_text(model), *(_published(entries[0] if entries else None) for entries in found)))
        lines += [f"### {title}", "", *_table(("Model", *head), rows), remark, ""]
        remarks: dict[str, list[str]] = {}
        for pair in columns:
            for entry in find_published(*pair):
                if entry.remark:
                    remarks.setdefault(entry.remark, []).append(f"{_text(entry.model)} {metric_name(entry.metric)}")
        if remarks:
            lines += [*(f"- {', '.join(where)}: {text}." for text, where in remarks.items()), ""]
    models = (published.CHEX, "RGRG", "MAIRA-1")
    labels = list(dict.fromkeys(entry.label for entry in published.PUBLISHED if entry.label is not None))
    lines += ["### Report generation, MIMIC-CXR: F1 by label", ""]
    lines += _table(
        ("Label", *models),
        ((label, *(_published(find_published("rg_mimic", "f1_14", m, label)[0]) for m in models)) for label in labels),
    )
    lines += ["### Report generation, MIMIC-CXR: prompt sets of ChEX", ""]
    lines += _table(
        ("Regions", "Pathologies", *map(metric_name, published.ABLATION_METRICS)),
        (
            (
                row.regions,
                row.findings,
                *(percent(row.values[metric], 2) for metric in published.ABLATION_METRICS),
            )
            for row in published.PROMPT_SETS
        ),
        numbers=2,
    )
    return lines


__all__ = ["render_markdown"]
