"""The HTML page about an evaluation: one file without external requests, from what `evaluation.results_view` reads."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from . import published
from .figures import NEUTRAL, NUM_COLOURS, format_duration, radiograph
from .page_style import RESULTS_SCRIPT, RESULTS_STYLE, STYLE
from .plots import Axis, Series, calibration, interval_strip, legend_mark, precision_recall, radar
from .published import NOTE, RADAR, Published, find_published
from .results_view import (
    NINE_TASKS,
    TASK_KEYS,
    ResultsError,
    Row,
    Sentence,
    box_group,
    class_columns,
    flatten,
    format_cell,
    generated_sentences,
    has_twins,
    interval,
    is_count,
    is_report,
    mean_std,
    metric_name,
    overview,
    percent,
    published_metric,
    reference_sentences,
    task_rows,
)


RADAR_BASELINES = (
    ("Faster R-CNN", "other0", "square"),
    ("BioViL", "other1", "triangle"),
    ("RGRG", "other2", "diamond"),
    ("TransVG", "other3", "cross"),
)
TWIN_WARNING = (
    "Synthetic images; not comparable with published numbers. The tasks ran on the phantom, radiographs drawn by a "
    "program; published numbers (muted) are of real radiographs."
)
MIXED_WARNING = (
    "Tasks marked as twins ran on synthetic images (the phantom, radiographs drawn by a program) and are not "
    "comparable with published numbers, which are of real radiographs."
)
# Words for a list of boxes that are not sentences.
_MAX_OPEN_CLASSES = 16
_MAX_CURVES = 15
_MAX_CARD_LINES = 6
# Tasks that are given boxes, rather than look for them.
_GIVEN_BOXES = {"box_classification", "region_classification", "box_description", "region_description"}


def twin_warning(results: Mapping[str, Any]) -> str | None:
    """What to say about synthetic images; None where there are none."""
    if not has_twins(results):
        return None
    return TWIN_WARNING if all(task["twin"] for task in results["tasks"].values()) else MIXED_WARNING


def radar_data(results: Mapping[str, Any]) -> tuple[list[Axis], list[Series], str, str]:
    """
    The radar figure over the nine tasks: axes, lines, unit ("ratio" to ChEX as published, or "percent" where twins
    were measured, which have nothing to be divided by), and a description.
    """
    rows = overview(results)[: len(NINE_TASKS)]
    absolute = any(row.twin for row in rows)
    name = str(results["model"]["name"])
    ours: list[float | None] = []
    axes = []
    for row in rows:
        value = None if row.entry is None else row.entry["value"]
        reference = None if row.chex is None else row.chex.value
        shown = row.state if value is None else f"{percent(value)} {metric_name(row.metric)}"
        if value is None and row.state == "not run":
            shown = f"{metric_name(row.metric)}, not run"
        axes.append(Axis(NINE_TASKS[row.task][0], shown))
        if absolute:
            ours.append(value)
        else:
            ours.append(None if value is None or not reference else value / reference)
    if absolute:
        series = [
            Series("ChEX, real images", [None if row.chex is None else row.chex.value for row in rows], "reference"),
            Series(name, ours, "ours"),
        ]
        unit, scale = "percent", "absolute values from 0 to 100 %"
    else:
        series = [
            Series(model, [published.ratio_to_chex(row.task, row.metric, model) for row in rows], style, marker)
            for model, style, marker in RADAR_BASELINES
        ]
        series.append(Series("ChEX, published", [1.0] * len(rows), "reference"))
        series.append(Series(name, ours, "ours"))
        unit, scale = "ratio", "divided by the published values of ChEX"
    series = [line for line in series if any(value is not None for value in line.values)]
    said = "; ".join(
        f"{axis.name} {percent(value) + ' %' if unit == 'percent' else f'×{value:.2f}'}"
        for axis, value in zip(axes, ours, strict=True)
        if value is not None
    )
    return axes, series, unit, f"Radar over the nine tasks, {scale}. {name}: {said or 'no values'}."


def render_html(results: Mapping[str, Any], folder: Path) -> str:
    """
    The whole page.

    Args:
        results: As from `evaluation.results_view.read_results`.
        folder: Where the images of the examples are.

    Raises:
        ResultsError: An image of an example is damaged.
    """
    title = f"Evaluation of {results['model']['name']}"
    sections = [
        ("overview", "Overview", _overview(results)),
        ("tasks", "Tasks", _tasks(results)),
        *_examples(results, folder),
        ("published", "Published numbers", _published(results)),
        ("run", "This run", _run(results)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{escape(name)}</h2>'
        f"{content}</section>"
        for anchor, name, content in sections
    )
    footer = "Research software. Not a medical device; not for clinical use."
    if has_twins(results):
        footer = f"Synthetic images. {footer}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}{RESULTS_STYLE}</style></head><body class=results>"
        '<a class=skip href="#overview">Skip to the results</a>'
        f"<header><div class=wrap>{_head(title, results)}</div></header>"
        f'<nav aria-label="Sections"><div class=wrap>{links}</div></nav><main class=wrap>{body}</main>'
        f"<footer class=wrap><p>{footer}</p></footer><script>{RESULTS_SCRIPT}</script></body></html>\n"
    )


# --- head ---


def _short(digest: str | None, length: int = 12) -> str:
    return "unknown" if not digest else (digest if len(digest) <= length + 4 else f"{digest[:length]}…")


def _images(count: int, what: str = "image") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _parameters(count: int | None) -> str:
    if count is None:
        return "unknown"
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if count >= size:
            return f"{count / size:.2f}".rstrip("0").rstrip(".") + unit
    return f"{count:,}"


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _head(title: str, results: Mapping[str, Any]) -> str:
    model = results["model"]
    facts = {
        "model": _short(model["sha256"]),
        "parameters": _parameters(model["parameters"]),
        "images": "; ".join(
            f"{name} {description['images'] or 0:,} ({description['split'] or 'no split'})"
            for name, description in results["data"].items()
        ),
        "bootstrap": f"{results['resamples']:,} resamples, seed {results['seed']}" if results["resamples"] else "none",
        "date": str(results["created"]).replace("T", " ").replace("+00:00", " UTC"),
    }
    chips = "".join(f"<li><span>{key}</span> {escape(str(value))}</li>" for key, value in facts.items() if value)
    warning = twin_warning(results)
    note = ""
    if warning:
        first, rest = warning.split(". ", 1) if warning == TWIN_WARNING else ("Twins on synthetic images", warning)
        note = (
            "<p class=warning role=note><b aria-hidden=true>!</b>"
            f"<span>{escape(first)}.</span></p><p class=lead>{escape(rest)}</p>"
        )
    return (
        f"<h1>{escape(title)}</h1>{note}"
        "<p class=lead>The tasks of the ChEX paper with 95 % intervals, beside published numbers. All values in "
        "percent.</p>"
        f"<ul class=facts>{chips}</ul>"
    )


# --- overview ---


def _mark(entry: Published | None) -> str:
    """A letter for numbers that are not from a table of a paper."""
    if entry is None or entry.source not in (NOTE, RADAR):
        return ""
    letter, meaning = ("n", published.SOURCES[NOTE]) if entry.source == NOTE else ("r", published.SOURCES[RADAR])
    return f'<sup title="{meaning}">{letter}</sup>'


def _printed(entry: Published, note: str = "") -> str:
    """The number as published; marks hang to its right, so that numbers stay aligned."""
    marks = _mark(entry) + note
    return f"<span class=number>{escape(entry.printed)}{f'<span class=marks>{marks}</span>' if marks else ''}</span>"


_MARKS = (
    f"<p class=muted><sup>n</sup> {published.SOURCES[NOTE]} · <sup>r</sup> {published.SOURCES[RADAR]} (×: ratio to "
    "ChEX) · all others: tables of the papers.</p>"
)


def _published_cell(entry: Published | None, with_model: bool) -> str:
    if entry is None:
        return "–"
    model = f"<small>{escape(entry.model)}</small>" if with_model else ""
    remark = f"<small>{escape(entry.remark)}</small>" if entry.remark else ""
    return f"{_printed(entry)}{model}{remark}"


def _value_cell(row: Row) -> str:
    if row.state == "computed":
        return f"<strong>{percent(row.entry['value'])}</strong>"
    return f'<span class="badge">{row.state}</span><small class=reason>{escape(row.reason)}</small>'


def _strip(row: Row) -> str:
    if row.entry is None or row.entry["value"] is None:
        return ""
    entry = row.entry
    reference = None if row.twin or row.chex is None else row.chex.value
    spoken = f"{percent(entry['value'])} %"
    if entry.get("low") is not None and entry.get("high") is not None:
        spoken += f", 95 % interval {percent(entry['low'])} to {percent(entry['high'])}"
    if reference is not None:
        spoken += f", ChEX {percent(reference)}"
    return interval_strip(entry["value"], entry.get("low"), entry.get("high"), reference, spoken)


def _overview(results: Mapping[str, Any]) -> str:
    tasks = results["tasks"]
    skipped = results.get("skipped") or {}
    body = []
    twins = has_twins(results)
    for row in overview(results):
        task = tasks.get(row.task)
        name = escape(row.title)
        linked = f'<a href="#task-{escape(row.task)}">{name}</a>' if task is not None else name
        place = escape(row.place)
        if task is not None:
            place += f" · {_images(task['images'])}"
            if row.twin:
                of = f"twin of {escape(row.place)}" if row.task in NINE_TASKS else escape(row.place)
                place = f"{of} · {_images(task['images'], 'synthetic image')}"
        value = _value_cell(row)
        if task is None:
            reason = str(skipped.get(row.task) or row.reason)
            value = f'<span class="badge">not run</span><small class=reason>{escape(reason)}</small>'
        muted = " muted" if row.twin or (task is None and twins) else ""
        span = "" if row.state == "computed" else " colspan=2"
        middle = "" if span else f'<td role=cell class="n" data-label="95 % interval">{interval(row.entry)}</td>'
        body.append(
            f"<tr role=row><th role=rowheader scope=row>{linked}<small>{place}</small></th>"
            f'<td role=cell data-label="Metric">{escape(metric_name(row.metric))}</td>'
            f'<td role=cell class="{"n value" if not span else "none"}" data-label="Value"{span}>{value}</td>{middle}'
            f'<td role=cell class=stripcell data-label="0 to 100 %">{_strip(row)}</td>'
            f'<td role=cell class="n pub{muted}" data-label="ChEX">{_published_cell(row.chex, False)}</td>'
            f'<td role=cell class="n pub{muted}" data-label="Best baseline">{_published_cell(row.baseline, True)}</td>'
            "</tr>"
        )
    real = "<small>real data</small>" if twins else "<small>published</small>"
    table = (
        "<div class=scroll><table class=overview role=table><caption class=hidden>Main metric of each task, in percent"
        "</caption><thead role=rowgroup><tr role=row><th role=columnheader scope=col>Task<th role=columnheader "
        "scope=col>Metric<th role=columnheader scope=col class=n>Value<th role=columnheader scope=col class=n>95 % "
        "interval<th role=columnheader scope=col>0 to 100 %<th role=columnheader scope=col class=n>ChEX"
        f"{real}<th role=columnheader scope=col class=n>Best baseline{real}</tr></thead><tbody role=rowgroup>"
        f"{''.join(body)}</tbody></table></div>"
    )
    key = "<p class='legend striplegend'><span><i class='key dotkey'></i>value and 95 % interval</span>"
    if not all(task["twin"] for task in tasks.values()) or not tasks:
        key += "<span><i class='key trianglekey'></i>ChEX as published</span>"
    return f"{table}{key}</p>{_MARKS}{_radar(results)}"


def _radar(results: Mapping[str, Any]) -> str:
    axes, series, unit, description = radar_data(results)
    legend = "".join(
        f"<li>{legend_mark(line.style, line.marker)}<span>{escape(line.name)}</span></li>" for line in reversed(series)
    )
    if unit == "percent":
        text = (
            "Absolute values of the main metrics: the centre is 0, the rim 100 %. The muted line shows what ChEX "
            "reached on real radiographs, which is another task: it is there for orientation, not for comparison."
        )
    else:
        text = (
            "Main metrics divided by the published values of ChEX, as on the figure of the paper: ChEX is the line at "
            "×1. Baselines as far as they are known. The value of ChEX on VinDr-CXR was not published, so that only "
            "baselines have a place on that axis."
        )
    return (
        "<figure class=radarfigure><figcaption><h3>The nine tasks</h3>"
        f"<p class=muted>{text}</p><ul class=radarlegend>{legend}</ul></figcaption>"
        f"{radar(axes, series, description=description, unit=unit)}</figure>"
    )


# --- tasks ---


def _tasks(results: Mapping[str, Any]) -> str:
    order = [*(n for n in NINE_TASKS if n in results["tasks"]), *(n for n in results["tasks"] if n not in NINE_TASKS)]
    return "".join(_task(name, results["tasks"][name]) for name in order)


def _task(name: str, task: Mapping[str, Any]) -> str:
    twin = '<span class="badge short">twin on synthetic images</span>' if task["twin"] else ""
    facts = [f"{task['data']}, {task['split']} split", _images(task["images"])]
    if task["unit"] != "image" and task["units"] is not None:
        plural = task["unit"] + ("es" if task["unit"].endswith("x") else "s")
        facts.append(f"bootstrap over {task['units']:,} {plural}")
    seconds = [
        f"{escape(str(key).replace('_', ' '))} {format_duration(value)}"
        for key, raw in task["seconds"].items()
        if (value := _seconds(raw))
    ]
    if seconds:
        facts.append(", ".join(seconds))
    classes = task["per_class"]
    blocks = [_metrics(name, task)]
    if task["notes"]:
        blocks.append(
            "<ul class=notes>" + "".join(f"<li>{escape(str(note))}</li>" for note in task["notes"]) + "</ul>"
        )
    if classes:
        is_open = " open" if len(classes) <= _MAX_OPEN_CLASSES else ""
        blocks.append(
            f"<details{is_open}><summary>By class ({len(classes)})</summary>{_classes(name, task)}</details>"
        )
    blocks.append(_curves(task))
    blocks.append(_settings(task))
    return (
        f'<article class=task id="task-{escape(name)}"><header><h3>{escape(task["title"])}</h3>{twin}</header>'
        f"<p class=muted>{escape(' · '.join(facts[:-1] if seconds else facts))}"
        f"{' · ' + facts[-1] if seconds else ''}</p>{''.join(blocks)}</article>"
    )


def _metrics(name: str, task: Mapping[str, Any]) -> str:
    rows = task_rows(name, task)
    if not rows:
        return "<p class=muted>No metric was computed.</p>"
    official = any((row.entry or {}).get("official") for row in rows)
    known = any(row.chex or row.baseline for row in rows)
    spread = any((row.entry or {}).get("mean") is not None for row in rows)
    muted = " muted" if task["twin"] else ""
    body = []
    for row in rows:
        cells = [f"<th scope=row>{escape(metric_name(row.metric))}</th>"]
        if row.state == "computed":
            undefined = row.entry.get("undefined")
            rest = f"<small>undefined in {undefined:,} resamples</small>" if undefined else ""
            cells.append(f"<td class=n><strong>{percent(row.entry['value'])}</strong></td>")
            if spread:
                cells.append(f"<td class=n>{interval(row.entry)}{rest}</td><td class=n>{mean_std(row.entry)}</td>")
            if official:
                cells.append(f"<td class=n>{_official(row.entry)}</td>")
        else:
            span = 1 + 2 * spread + official
            cells.append(
                f'<td class=none colspan={span}><span class="badge">{row.state}</span> '
                f"<small class=reason>{escape(row.reason)}</small></td>"
            )
        if known:
            cells.append(f'<td class="n pub{muted}">{_published_cell(row.chex, False)}</td>')
            cells.append(f'<td class="n pub{muted}">{_published_cell(row.baseline, True)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    real = "<small>real data</small>" if task["twin"] else "<small>published</small>"
    heads = ["<th scope=col>Metric", "<th scope=col class=n>Value"]
    if spread:
        heads += ["<th scope=col class=n>95 % interval", "<th scope=col class=n>Mean ± std<small>resamples</small>"]
    if official:
        heads.append("<th scope=col class=n>Official rules<small>mean ± std</small>")
    if known:
        heads += [f"<th scope=col class=n>ChEX{real}", f"<th scope=col class=n>Best baseline{real}"]
    return _scroll(f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table>", "Metrics")


def _official(entry: Mapping[str, Any]) -> str:
    """Mean and standard deviation by the rules of the official code; its plain value where there is no bootstrap."""
    official = entry.get("official")
    if not official:
        return "–"
    return mean_std(official) if official.get("mean") is not None else percent(official.get("value"), 2)


def _scroll(table: str, label: str) -> str:
    # reachable by keyboard, so that it can be scrolled without a mouse
    return f'<div class=scroll tabindex=0 role=region aria-label="{escape(label)}">{table}</div>'


def _classes(name: str, task: Mapping[str, Any]) -> str:
    rows = task["per_class"]
    columns = class_columns(rows)
    counts = {column: is_count(column, rows) for column in columns}
    # Published F1 per label, where the labels are those of the paper.
    models = ()
    if not task["twin"] and any(find_published(name, "f1_14", label=row["name"]) for row in rows):
        models = (published.CHEX, "RGRG", "MAIRA-1")
    head = "".join(
        f"<th scope=col class=n>{escape(column.replace('_', ' ') if counts[column] else metric_name(column))}"
        for column in columns
    )
    head += "".join(f"<th scope=col class=n>{model}<small>F1, published</small>" for model in models)
    body = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column)
            text = escape(format_cell(value, counts[column]))
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and not counts[column]
            meter = f"<meter min=0 max=1 value={min(max(value, 0), 1):.3f} aria-hidden=true></meter>" if number else ""
            cells.append(f"<td class=n>{meter}<span class=num>{text}</span></td>")
        for model in models:
            found = find_published(name, "f1_14", model, row["name"])
            cells.append(f'<td class="n pub">{_published_cell(found[0] if found else None, False)}</td>')
        body.append(f"<tr><th scope=row>{escape(row['name'])}</th>{''.join(cells)}</tr>")
    return _scroll(
        f"<table><thead><tr><th scope=col>Class{head}</tr></thead><tbody>{''.join(body)}</tbody></table>", "By class"
    )


def _curves(task: Mapping[str, Any]) -> str:
    curves = task["curves"]
    parts = []
    by_class = curves.get("precision_recall") or {}
    if by_class:
        positives = {row["name"]: row.get("positives") for row in task["per_class"]}

        def figure(label: str) -> str:
            count = positives.get(label)
            small = "" if count is None else f"<small>{count:,} positives</small>"
            drawing = precision_recall(by_class[label], f"Precision over recall of {label}")
            return f"<figure><figcaption>{escape(label)}{small}</figcaption>{drawing}</figure>"

        # Common classes first: curves of a handful of positives say little.
        names = sorted(by_class, key=lambda label: -(positives.get(label) or 0))
        first, rest = names[:_MAX_CURVES], names[_MAX_CURVES:]
        more = (
            f"<details><summary>{len(rest)} rarer classes</summary><div class=curves>"
            f"{''.join(map(figure, rest))}</div></details>"
            if rest
            else ""
        )
        parts.append(
            "<details open><summary>Precision over recall</summary><div class=curves>"
            f"{''.join(map(figure, first))}</div>{more}</details>"
        )
    bins = curves.get("calibration") or {}
    if bins.get("confidence"):
        parts.append(
            "<details open><summary>Calibration</summary><div class=calibrated>"
            f"{calibration(bins, 'Share of right predictions over their confidence')}"
            "<p class=muted>How often predictions of a given confidence are right. On the dashed line, confidence and "
            "frequency agree; below it, the model is too sure.</p></div></details>"
        )
    return "".join(parts)


def _settings(task: Mapping[str, Any]) -> str:
    parts = []
    if task["settings"]:
        parts.append(f"<h4>Settings</h4>{_facts(flatten(task['settings']))}")
    if task["tuning"]:
        tuning = task["tuning"]
        lists = (
            {key: value for key, value in tuning.items() if _is_table(value)} if isinstance(tuning, Mapping) else {}
        )
        rest = {key: value for key, value in tuning.items() if key not in lists} if lists else tuning
        parts.append(f"<h4>Tuned on the validation split</h4>{_facts(flatten(rest))}")
        parts += [_records(key, value) for key, value in lists.items()]
    other = {key: value for key, value in task.items() if key not in TASK_KEYS and _seconds(value) is not None}
    if other:
        parts.insert(
            0, f"<h4>Also counted</h4>{_facts((key.replace('_', ' '), text) for key, text in flatten(other))}"
        )
    if not parts:
        return ""
    tuned = " and tuning" if task["tuning"] else ""
    return f"<details><summary>Settings{tuned}</summary>{''.join(parts)}</details>"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _records(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for record in records for key in record))
    head = "".join(f"<th scope=col>{escape(str(column))}" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_plain(record.get(column)))}</td>" for column in columns) + "</tr>"
        for record in records
    )
    return f"<h4>{escape(title)}</h4>" + _scroll(
        f"<table class=plain><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", title
    )


def _plain(value: Any) -> str:
    return "–" if value is None else flatten(value)[0][1] if not isinstance(value, (dict, list)) else str(value)


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="narrow facts-table"><tbody>{body}</tbody></table>'


# --- examples ---


def _examples(results: Mapping[str, Any], folder: Path) -> list[tuple[str, str, str]]:
    """Sections of the qualitative figures of reports, and of the galleries of all other tasks."""
    order = [*(n for n in NINE_TASKS if n in results["tasks"]), *(n for n in results["tasks"] if n not in NINE_TASKS)]
    reports, galleries = [], []
    number = 0
    for name in order:
        task = results["tasks"][name]
        drawn: dict[str, list[str]] = {}
        explained = task["kind"] == "report_generation"
        for example in task["examples"]:
            drawn.setdefault(str(example.get("title") or ""), []).append(_example(task, example, folder, number))
            number += 1
        if not drawn:
            continue
        content = "".join(
            (f"<h4>{escape(title[:1].upper() + title[1:])}</h4>" if title else "")
            + f"<div class=gallery>{''.join(cards)}</div>"
            for title, cards in drawn.items()
        )
        count = sum(map(len, drawn.values()))
        is_open = " open" if explained or not galleries else ""
        block = (
            f"<details class=examples{is_open}><summary>{escape(task['title'])} "
            f"<small>{count} example{'' if count == 1 else 's'}{', synthetic images' if task['twin'] else ''}</small>"
            f"</summary>{content}</details>"
        )
        (reports if explained else galleries).append(block)
    hint = "<p class=muted>Select a line to see only its boxes; Escape shows all again.</p>"
    how = (
        "<p class=muted>Sentences have the colour of their boxes. Sentences of the reference have the colour of the "
        "generated sentence that speaks of the same (found by the words they share, unless one negates); grey: no "
        "such sentence.</p>"
    )
    failures = "<p class=muted>The images on which a task does worst, and others drawn at random.</p>"
    return [
        ("explained", "Explained reports", f"{how}{hint}{''.join(reports)}" if reports else ""),
        ("failures", "Failures and examples", f"{failures}{hint}{''.join(galleries)}" if galleries else ""),
    ]


def _load_image(example: Mapping[str, Any], folder: Path) -> tuple[Image.Image, bool]:
    """The image of an example, or a dark square in its place, and whether it was there."""
    if example["image"] is not None and (folder / example["image"]).is_file():
        path = folder / example["image"]
        try:
            with Image.open(path) as image:
                image.load()
                return image.copy(), True
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ResultsError(
                f"{path} is damaged ({error}): run the evaluation again, or remove it to make the pages without it."
            ) from error
    frame = example.get("frame") or [1, 1]
    try:
        aspect = min(max(float(frame[0]) / float(frame[1]), 0.25), 4.0)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        aspect = 1.0
    return Image.new("L", (448, round(448 / aspect)), 34), False


def _colours(sentences: Sequence[Sentence], boxes: Sequence[Mapping]) -> dict[int, int]:
    """Group -> place in the palette: groups with boxes, in the order of the sentences, then of the boxes."""
    with_boxes = dict.fromkeys(group for box in boxes if (group := box_group(box)) is not None)
    ordered = [sentence.group for sentence in sentences if sentence.group in with_boxes]
    return {group: rank % NUM_COLOURS for rank, group in enumerate(dict.fromkeys([*ordered, *with_boxes]))}


def _line(number: int | None, colour: Any, text: str, small: str, key: str | None) -> str:
    badge = "·" if number is None else str(number)
    content = f"<b>{badge}</b><span>{escape(text)}{f'<small>{escape(small)}</small>' if small else ''}</span>"
    if key is None:
        return f'<li class="t{colour}">{content}</li>'
    return f'<li class="t{colour}"><button type=button data-show="{key}" aria-pressed=false>{content}</button></li>'


def _example(task: Mapping[str, Any], example: Mapping[str, Any], folder: Path, number: int) -> str:
    image, found = _load_image(example, folder)
    width, height = image.size
    grounding = task["kind"] == "grounding"
    sentences = generated_sentences(example)
    # Phrases are what was asked, so they are the reference as well.
    reference = [] if grounding else reference_sentences(example)
    colours = _colours(sentences, example["boxes"])
    described = not grounding and bool(sentences or reference)
    if not sentences and not reference:
        sentences = _labels_as_lines(example["boxes"])
    numbers: dict[int, int] = {}
    for rank, sentence in enumerate(sentences):
        if sentence.group is not None:
            numbers.setdefault(sentence.group, rank + 1)
    shapes = []
    tagged: set[int | None] = set()
    predicted = {box_group(box) for box in example["boxes"] if box.get("kind") != "target"}
    given = task["kind"] in _GIVEN_BOXES
    # Targets first, so that predictions lie above them.
    for box in sorted(example["boxes"], key=lambda item: item.get("kind") != "target"):
        group = box_group(box)
        target = box.get("kind") == "target"
        x0, y0, x1, y1 = box["box"]
        label = str(box.get("label") or "")
        score = box.get("score")
        shape = {
            "box": (x0 * width, y0 * height, x1 * width, y1 * height),
            "colour": colours.get(group, NEUTRAL),
            "dashed": target and not given,
            "title": ("annotated: " if target else "") + label + ("" if score is None else f" ({score:.2f})"),
        }
        if group is not None:
            shape["group"] = f"{number}-{group}"
            if group not in tagged and (not target or group not in predicted):
                shape["tag"] = str(numbers[group]) if group in numbers else None
                tagged.add(group)
        shapes.append(shape)
    lines = [
        _sentence_line(sentence, rank, number, example, colours, given) for rank, sentence in enumerate(sentences)
    ]
    report = task["kind"] == "report_generation" or is_report(example)
    heading = ("Generated report" if report else "Generated") if described else "Asked" if grounding else "Boxes"
    parts = [f"<section><h4>{heading}</h4><ol>{''.join(lines) or _NOTHING}</ol></section>"]
    if described:
        answers = "".join(
            _line(
                numbers.get(line.group) if line.group in colours else None,
                colours.get(line.group, NEUTRAL),
                line.text,
                "",
                f"{number}-{line.group}" if line.group in colours else None,
            )
            for line in reference
        )
        title = "Reference report" if report else "Reference"
        parts.append(f"<section><h4>{title}</h4><ol>{answers or _NOTHING}</ol></section>")
    kinds = {box.get("kind") for box in example["boxes"]}
    key = []
    if "prediction" in kinds:
        key.append("<i class=solid></i>found by the model")
    if any(shape["dashed"] for shape in shapes):
        key.append("<i class=dash></i>annotated")
    if given and "target" in kinds:
        key.append("<i class=solid></i>given boxes")
    missing = "" if found else "<br>The image was not stored."
    score = _seconds(example.get("score"))
    head = f"<strong>{escape(str(example.get('sample_id', '')))}</strong>" + (
        f" <small>score {score:.2f}</small>" if score is not None else ""
    )
    spoken = (
        f"{'Synthetic radiograph' if task['twin'] else 'Radiograph'} with "
        f"{sum(box.get('kind') != 'target' for box in example['boxes'])} predicted and "
        f"{sum(box.get('kind') == 'target' for box in example['boxes'])} annotated boxes"
    )
    wide = len(lines) > _MAX_CARD_LINES or (described and report)
    return (
        f'<article class="example{" wide" if wide else ""}"><p class=examplehead>{head}</p><div class=pair><figure>'
        f"{radiograph(image, shapes, spoken, lossy=True)}<figcaption>{''.join(key)}{missing}</figcaption></figure>"
        f"<div class=reports>{''.join(parts)}</div></div></article>"
    )


_NOTHING = "<li class=tn><b>·</b><span>Nothing.</span></li>"


def _labels_as_lines(boxes: Sequence[Mapping[str, Any]]) -> list[Sentence]:
    """A line per group of boxes, in place of sentences."""
    lines: dict[int, str] = {}
    for box in boxes:
        group = box_group(box)
        if group is not None:
            lines.setdefault(group, str(box.get("label") or "box"))
    return [Sentence(text, group) for group, text in lines.items()]


def _sentence_line(
    sentence: Sentence, rank: int, number: int, example: Mapping[str, Any], colours: Mapping[int, int], given: bool
) -> str:
    own = [box for box in example["boxes"] if box_group(box) == sentence.group and sentence.group is not None]
    predicted = [box for box in own if box.get("kind") != "target"]
    targets = [box for box in own if box.get("kind") == "target"]
    # Reports have targets that belong to no sentence: of these nothing is said.
    located = any(box.get("kind") == "target" and box_group(box) is not None for box in example["boxes"])
    small = []
    if sentence.prompt and sentence.prompt not in (sentence.text, "box"):
        small.append(f"asked: {sentence.prompt}")
    if predicted:
        small.append(f"{len(predicted)} box{'' if len(predicted) == 1 else 'es'}")
    elif not own:
        small.append("no box")
    scores = [f"{box['score']:.2f}" for box in own if _seconds(box.get("score")) is not None]
    if scores:
        small.append("score " + ", ".join(scores[:4]) + (" …" if len(scores) > 4 else ""))
    if located and not given and own:
        if predicted and targets:
            small.append(f"IoU {max(_iou(a['box'], b['box']) for a in predicted for b in targets):.2f}")
        else:
            small.append("not annotated" if predicted else "missed")
    return _line(
        rank + 1,
        colours.get(sentence.group, NEUTRAL),
        sentence.text,
        " · ".join(small),
        f"{number}-{sentence.group}" if own else None,
    )


def _iou(first: Sequence[float], second: Sequence[float]) -> float:
    """IoU of two boxes xyxy."""
    sides = [min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1)]
    overlap = max(sides[0], 0.0) * max(sides[1], 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return overlap / (sum(areas) - overlap) if sum(areas) > overlap else 0.0


# --- published numbers, this run ---


def _published(results: Mapping[str, Any]) -> str:
    muted = " muted" if has_twins(results) else ""
    parts = [
        "<p class=muted>Of ChEX (arXiv 2404.15770) and the systems it was compared with, on real radiographs. Numbers "
        "of different papers use different test sets and reference texts: only what one pipeline measures is strictly "
        "comparable.</p>",
        _MARKS,
    ]
    for title, tasks, metrics, remark in published.TABLES:
        columns = [(task, metric) for task in tasks for metric in metrics if find_published(task, metric)]
        models = list(dict.fromkeys([published.CHEX, *(e.model for t, m in columns for e in find_published(t, m))]))
        footnotes = _Footnotes()
        head = "".join(
            f"<th scope=col class=n>{escape(metric_name(metric))}"
            + (f"<small>{escape(NINE_TASKS[task][0])}</small>" if len(tasks) > 1 else "")
            for task, metric in columns
        )
        body = []
        for model in models:
            cells = "".join(
                f"<td class=n>{footnotes.cell(find_published(task, metric, model))}</td>" for task, metric in columns
            )
            strong = " class=own" if model == published.CHEX else ""
            body.append(f"<tr{strong}><th scope=row>{escape(model)}</th>{cells}</tr>")
        table = f"<table><thead><tr><th scope=col>Model{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        parts.append(
            f"<details><summary>{escape(title)}</summary>{_scroll(table, title)}{footnotes.text(remark)}</details>"
        )
    parts.append(_published_labels())
    parts.append(_ablation())
    return f'<div class="publishedtables{muted}">{"".join(parts)}</div>'


class _Footnotes:
    """Remarks of a table, numbered in the order in which they appear."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def cell(self, entries: Sequence[Published]) -> str:
        if not entries:
            return "–"
        entry = entries[0]
        note = ""
        if entry.remark:
            if entry.remark not in self.remarks:
                self.remarks.append(entry.remark)
            note = f'<sup title="{escape(entry.remark)}">{self.remarks.index(entry.remark) + 1}</sup>'
        return _printed(entry, note)

    def text(self, remark: str) -> str:
        notes = [f"<sup>{number}</sup> {escape(text)}" for number, text in enumerate(self.remarks, 1)]
        return f"<p class=muted>{' · '.join(filter(None, [escape(remark), *notes]))}</p>" if remark or notes else ""


def _published_labels() -> str:
    models = (published.CHEX, "RGRG", "MAIRA-1")
    labels = list(dict.fromkeys(entry.label for entry in published.PUBLISHED if entry.label is not None))
    body = "".join(
        f"<tr><th scope=row>{escape(label)}</th>"
        + "".join(
            f"<td class=n>{_published_cell(find_published('rg_mimic', 'f1_14', model, label)[0], False)}</td>"
            for model in models
        )
        + "</tr>"
        for label in labels
    )
    head = "".join(f"<th scope=col class=n>{model}" for model in models)
    title = "Report generation, MIMIC-CXR: F1 by label"
    table = f"<table><thead><tr><th scope=col>Label{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<details><summary>{title}</summary>{_scroll(table, title)}</details>"


def _ablation() -> str:
    head = "".join(f"<th scope=col class=n>{escape(metric_name(metric))}" for metric in published.ABLATION_METRICS)
    body = "".join(
        f"<tr{' class=own' if (row.regions, row.findings) == published.PROMPT_SETS_DEFAULT else ''}>"
        f"<td>{row.regions}</td><td>{row.findings}</td>"
        + "".join(f"<td class=n>{percent(row.values[metric], 2)}</td>" for metric in published.ABLATION_METRICS)
        + "</tr>"
        for row in published.PROMPT_SETS
    )
    title = "Report generation, MIMIC-CXR: prompt sets of ChEX"
    table = (
        f"<table><thead><tr><th scope=col>Regions<th scope=col>Pathologies{head}</tr></thead><tbody>{body}</tbody>"
        "</table>"
    )
    return f"<details><summary>{title}</summary>{_scroll(table, title)}</details>"


def _run(results: Mapping[str, Any]) -> str:
    model = results["model"]
    parts = [f"<h3>Command</h3><pre><code>{escape(str(results['command']))}</code></pre>"]
    facts = [
        ("name", str(model["name"])),
        ("path", str(model["path"] or "in memory")),
        ("SHA-256", str(model["sha256"] or "unknown")),
        ("parameters", "unknown" if model["parameters"] is None else f"{model['parameters']:,}"),
        ("created", str(results["created"])),
        ("seed", str(results["seed"])),
        ("resamples", "none" if not results["resamples"] else f"{results['resamples']:,}"),
    ]
    columns = [f"<div><h3>Model and run</h3>{_facts(facts)}</div>"]
    for name, description in results["data"].items():
        rows = [
            (key, "–" if value is None else f"{value:,}" if key == "images" else str(value))
            for key, value in description.items()
        ]
        columns.append(f"<div><h3>Data: {escape(name)}</h3>{_facts(rows)}</div>")
    if results["versions"]:
        columns.append(
            f"<div><h3>Versions</h3>{_facts((str(k), str(v)) for k, v in results['versions'].items())}</div>"
        )
    seconds = [
        (str(key).replace("_", " "), format_duration(value))
        for key, raw in (results["seconds"] or {}).items()
        if (value := _seconds(raw)) is not None
    ]
    if seconds:
        columns.append(f"<div><h3>Time</h3>{_facts(seconds)}</div>")
    parts.append(f"<div class=runs>{''.join(columns)}</div>")
    return "".join(parts)


__all__ = ["MIXED_WARNING", "TWIN_WARNING", "published_metric", "radar_data", "render_html", "twin_warning"]
