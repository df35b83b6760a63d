"""One self-contained HTML page about a trained ChEX: metrics, curves, explained radiographs. No external requests."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .figures import (
    NEUTRAL,
    NUM_COLOURS,
    bullet,
    format_duration,
    horizontal_bars,
    line_chart,
    radiograph,
)
from .files import write_text
from .page_style import SCRIPT, STYLE


# key -> (task, metric, what the number means, what the baseline is)
METRICS: dict[str, tuple[str, str, str, str]] = {
    "anatomy_miou": (
        "Anatomy localisation",
        "mIoU",
        "Overlap of the predicted with the true box of each of 29 named regions.",
        "the average box of each region",
    ),
    "detection_map50": (
        "Finding detection",
        "mAP@0.5",
        "Average precision of finding boxes that overlap a true box by more than half.",
        "typical boxes of each class",
    ),
    "grounding_miou": (
        "Sentence grounding",
        "mIoU",
        "Overlap of the boxes found for a sentence with the boxes it belongs to, pooled by area.",
        "typical boxes of each phrase",
    ),
    "region_auroc": (
        "Region classification",
        "AUROC",
        "Which findings a given region shows, region by region.",
        "how common a finding is",
    ),
    "description_f1": (
        "Region description",
        "micro-F1",
        "Findings stated in the sentence written about a given region.",
        "a fixed sentence per region",
    ),
    "report_f1": (
        "Report generation",
        "micro-F1",
        "Findings stated in the whole generated report.",
        "a fixed report",
    ),
}
STAGES: dict[str, tuple[str, str]] = {
    "pretrain_clip": (
        "Contrastive pre-training",
        "Image and text encoders learn which text belongs to which image.",
    ),
    "stage1": ("Stage 1", "The detector learns to find and classify what a prompt names."),
    "stage2": ("Stage 2", "The post decoder learns to let regions look at the whole image."),
    "pretrain_generator": (
        "Generator pre-training",
        "The language model learns to write sentences.",
    ),
    "stage3": ("Stage 3", "Post decoder and sentence generator learn to describe regions in sentences."),
}
_RESERVED = {"stage", "split", "step", "seconds", "lr", "epoch", "samples", "images", "update", "time"}
_VALIDATION_PREFIXES = ("val_", "val/", "validation_", "validation/", "metric_", "metric/")


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    explanations: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    detections: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page (atomically) and return its path. Every input is plain data; every part may be empty.

    Args:
        path: the HTML file.
        metrics: result of `evaluation.run.evaluate_model`: the six headline numbers (None = not measured), the same
            under `baselines`, and `details` (used where present: `images`, `split`, `seconds`, `versions`, `skipped`,
            per-class values).
        history: one dict per logged step, in order: `stage` (str), `step` (int), `seconds` (float, since the start of
            the stage), optional `split` ("train", the default, or "validation") and any numbers: `loss` is the total,
            other keys are loss terms; keys that start with `val_` or `validation/` are validation metrics. `lr`,
            `epoch` and `samples` are not drawn.
        explanations: explained radiographs, each a dict with
            `image`: PIL image or array, grey or RGB;
            `title`: str;
            `sentences`: list of dicts with `text` (str), `prompt` (str), `boxes` (list of xyxy in pixels of the
            image), optional `scores` (list of float, one per box) and `abnormal` (bool, default True; normal
            statements are listed quietly and show their boxes when pointed at);
            `targets`: list of dicts with `box` (xyxy pixels), `phrase` (str) and `sentence` (index of the sentence
            that answers it, or None);
            `reference`: list of dicts with `text` and `sentence` (index of the sentence that says the same, or None).
        config: all optional: `title` (str), `command` (str), `targets` ({metric key: value}), `timings` ({name:
            seconds}; left out: the last `seconds` of every stage), `versions` ({name: version}), `facts` ({label:
            text}, shown under the title, for example the number of parameters), `settings` (nested dict, shown as
            JSON).
        detections: pictures of detection, each a dict with `image`, `title`, `predictions` (list of dicts with `box`,
            `label`, `score`, `correct` (bool)) and `targets` (list of dicts with `box`, `label`, `found` (bool)).

    Raises:
        OSError: if the file cannot be written.
    """
    config = dict(config or {})
    title = config.get("title", "ChEX on synthetic radiographs")
    sections = [
        ("results", "Results", _results(metrics, config.get("targets") or {})),
        ("explained", "Explained radiographs", "".join(_explanation(e, i) for i, e in enumerate(explanations))),
        ("detections", "Detections and misses", _detections(detections)),
        ("training", "Training", _training(history)),
        ("details", "By class", _classes(metrics)),
        ("run", "This run", _run(metrics, history, config)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(name)}</h2>{content}</section>' for anchor, name, content in sections
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><div class=wrap>{_intro(title, metrics, config)}</div></header>"
        f"<nav><div class=wrap>{links}</div></nav><main class=wrap>{body}</main>"
        "<footer class=wrap><p>Research software on synthetic images. Not a medical device; not for clinical use.</p>"
        f"</footer><script>{SCRIPT}</script></body></html>\n"
    )
    return write_text(path, page)


def _intro(title: str, metrics: Mapping, config: Mapping) -> str:
    details = metrics.get("details") or {}
    facts = dict(config.get("facts") or {})
    if details.get("images"):
        facts.setdefault("evaluated on", f"{details['images']} images ({details.get('split', 'test')} split)")
    timings = config.get("timings") or {}
    if timings:
        facts.setdefault("time", format_duration(sum(timings.values())))
    chips = "".join(f"<li><span>{escape(str(k))}</span> {escape(str(v))}</li>" for k, v in facts.items())
    return (
        f"<h1>{escape(title)}</h1>"
        "<p class=lead>A model that answers questions about a chest radiograph: ask with a text or a box, and it "
        "returns where to look and a sentence about it. The radiographs on this page are <strong>drawn by a program, "
        "not taken from patients</strong>, and the model has learned from such drawings only.</p>"
        "<p class=warning role=note><b aria-hidden=true>!</b> Research only. Not a medical device.</p>"
        f"<ul class=facts>{chips}</ul>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _results(metrics: Mapping, targets: Mapping[str, float]) -> str:
    baselines = metrics.get("baselines") or {}
    reasons = (metrics.get("details") or {}).get("skipped") or {}
    cards = []
    rows = []
    for key, (task, metric, meaning, prior) in METRICS.items():
        value, baseline, target = metrics.get(key), baselines.get(key), targets.get(key)
        badge = _badge(value, baseline, target)
        legend = []
        if baseline is not None:
            legend.append(f'<span><i class="key baseline"></i>baseline {baseline:.2f}</span>')
        if target is not None:
            legend.append(f'<span><i class="key target"></i>target {target:.2f}</span>')
        spoken = f"{task}: {_number(value)}, baseline {_number(baseline)}, target {_number(target)}"
        cards.append(
            f"<article class=card><header><h3>{task}</h3>{badge}</header>"
            f"<p class=figure><strong>{_number(value)}</strong><small>{metric}</small></p>"
            f"{bullet(value, baseline, target, spoken)}<p class=legend>{''.join(legend)}</p>"
            f"<p class=muted>{meaning} Baseline: {prior}.</p></article>"
        )
        gain = "–" if value is None or baseline is None else f"{value - baseline:+.3f}"
        rows.append(
            f"<tr><th scope=row>{task}</th><td>{metric}</td><td class=n>{_number(value)}</td>"
            f"<td class=n>{_number(baseline)}</td><td class=n>{gain}</td><td class=n>{_number(target)}</td></tr>"
        )
    notes = [f"<p class=muted>{escape(name.replace('_', ' '))}: {escape(why)}.</p>" for name, why in reasons.items()]
    table = (
        "<details><summary>The same as a table</summary><div class=scroll><table><thead><tr><th>Task<th>Metric"
        "<th class=n>Model<th class=n>Baseline<th class=n>Gain<th class=n>Target</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
    return f"<div class=cards>{''.join(cards)}</div>{''.join(notes)}{table}"


def _badge(value: float | None, baseline: float | None, target: float | None) -> str:
    if value is None:
        return '<span class="badge">not measured</span>'
    if baseline is not None and value < baseline:
        return '<span class="badge short">below baseline</span>'
    if target is None:
        return ""
    return (
        '<span class="badge good">reached</span>'
        if value >= target
        else '<span class="badge short">below target</span>'
    )


def _explanation(item: Mapping, number: int) -> str:
    sentences = item.get("sentences") or []
    # Abnormal statements get the colours first, so that they differ as long as possible.
    abnormal = [i for i, s in enumerate(sentences) if s.get("abnormal", True)]
    colours = {index: rank % NUM_COLOURS for rank, index in enumerate(abnormal)}
    boxes = []
    for target in item.get("targets") or ():
        answered = target.get("sentence")
        boxes.append(
            {
                "box": target["box"],
                "dashed": True,
                "colour": colours.get(answered, NEUTRAL),
                "title": f"annotated: {target.get('phrase', '')}",
            }
        )
    for index, sentence in enumerate(sentences):
        scores = sentence.get("scores") or [None] * len(sentence.get("boxes") or ())
        for rank, (box, score) in enumerate(zip(sentence.get("boxes") or (), scores, strict=True)):
            shown = "" if score is None else f" ({score:.2f})"
            boxes.append(
                {
                    "box": box,
                    "colour": colours.get(index, NEUTRAL),
                    "tag": str(index + 1) if rank == 0 else None,
                    "title": f"{sentence.get('prompt', '')}{shown}: {sentence['text']}",
                    "group": f"{number}-{index}",
                    "quiet": index not in colours,
                }
            )
    lines = []
    for index, sentence in enumerate(sentences):
        colour = colours.get(index, NEUTRAL)
        count = len(sentence.get("boxes") or ())
        source = escape(str(sentence.get("prompt", "")))
        lines.append(
            f'<li class="t{colour}" data-show="{number}-{index}" tabindex=0><b>{index + 1}</b><div>'
            f"{escape(sentence['text'])}<small>asked: {source} · {count} box{'' if count == 1 else 'es'}</small>"
            "</div></li>"
        )
    reference = [
        f'<li class="t{colours.get(line.get("sentence"), NEUTRAL)}"><b>{_sentence_number(line)}</b>'
        f"<div>{escape(line['text'])}</div></li>"
        for line in item.get("reference") or ()
    ]
    findings = len(item.get("targets") or ())
    spoken = f"Synthetic radiograph with {findings} annotated boxes and {len(sentences)} generated sentences"
    return (
        f"<article class=explained><h3>{escape(str(item.get('title', f'Radiograph {number + 1}')))}</h3>"
        f"<div class=split><figure>{radiograph(item['image'], boxes, spoken)}"
        "<figcaption><i class=solid></i>found by the model<i class=dash></i>annotated</figcaption></figure>"
        f"<div class=reports><section><h4>Generated report</h4><ol>{''.join(lines) or _EMPTY}</ol></section>"
        f"<section><h4>Reference report</h4><ol>{''.join(reference) or _EMPTY}</ol></section></div></div></article>"
    )


_EMPTY = "<li class=tn><b>·</b><div>Nothing.</div></li>"


def _sentence_number(line: Mapping) -> str:
    return "·" if line.get("sentence") is None else str(line["sentence"] + 1)


def _detections(pictures: Sequence[Mapping]) -> str:
    figures = []
    for picture in pictures:
        targets = picture.get("targets") or []
        predictions = picture.get("predictions") or []
        boxes = [
            {
                "box": target["box"],
                "dashed": True,
                "colour": NEUTRAL if target.get("found") else "miss",
                "tag": None if target.get("found") else f"missed: {target['label']}",
                "title": f"annotated: {target['label']}",
            }
            for target in targets
        ]
        boxes += [
            {
                "box": found["box"],
                "colour": "hit" if found.get("correct") else "false",
                "tag": f"{found['label']} {found['score']:.2f}",
                "title": f"{found['label']}, score {found['score']:.3f}",
            }
            for found in sorted(predictions, key=lambda entry: entry["score"])
        ]
        hits = sum(bool(found.get("correct")) for found in predictions)
        missed = sum(not target.get("found") for target in targets)
        caption = f"{hits} correct · {len(predictions) - hits} false · {missed} missed"
        figures.append(
            f"<figure>{radiograph(picture['image'], boxes, f'Detections: {caption}')}"
            f"<figcaption><strong>{escape(str(picture.get('title', '')))}</strong><br>{caption}</figcaption></figure>"
        )
    if not figures:
        return ""
    legend = (
        "<p class=legend><span><i class='key hit'></i>correct (IoU above 0.5)</span><span><i class='key false'></i>"
        "false</span><span><i class='key dashkey'></i>annotated, found</span><span><i class='key misskey'></i>"
        "annotated, missed</span></p>"
    )
    return f"{legend}<div class=gallery>{''.join(figures)}</div>"


def _training(history: Sequence[Mapping]) -> str:
    stages: dict[str, list[Mapping]] = {}
    for entry in history:
        stages.setdefault(str(entry.get("stage", "training")), []).append(entry)
    parts = []
    for stage, entries in stages.items():
        charts = _stage_charts(stage, entries)
        duration = max((float(entry.get("seconds", 0.0)) for entry in entries), default=0.0)
        steps = max((int(entry.get("step", 0)) for entry in entries), default=0)
        note = f"{steps:,} steps" + (f", {format_duration(duration)}" if duration else "")
        name, purpose = STAGES.get(stage, (stage.replace("_", " ").capitalize(), ""))
        parts.append(
            f"<article class=stage><header><h3>{escape(name)}</h3><p class=muted>{escape(purpose)}</p>"
            f"<p class=muted>{note}</p></header><div class=charts>{charts}</div></article>"
        )
    return "".join(parts)


def _stage_charts(stage: str, entries: Sequence[Mapping]) -> str:
    totals: dict[str, list[tuple[float, float]]] = {}
    terms: dict[str, list[tuple[float, float]]] = {}
    checks: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        validation = entry.get("split", "train") != "train"
        for key, value in entry.items():
            if key in _RESERVED or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            point = (float(entry.get("step", 0)), float(value))
            if key == "loss":
                totals.setdefault("validation" if validation else "training", []).append(point)
            elif key.startswith(_VALIDATION_PREFIXES):
                checks.setdefault(key.split("_" if "_" in key.split("/")[0] else "/", 1)[-1], []).append(point)
            elif not validation:
                terms.setdefault(key, []).append(point)
    if not totals and len(terms) == 1:
        totals, terms = {"training": next(iter(terms.values()))}, {}
    charts = []
    if totals:
        charts.append(_chart(stage, "Loss", totals, "loss", points=("validation",), smoothed=("training",)))
    if terms:
        largest = sorted(terms, key=lambda key: -sum(abs(y) for _, y in terms[key]) / len(terms[key]))
        kept = {key: terms[key] for key in terms if key in largest[:NUM_COLOURS]}
        omitted = len(terms) - len(kept)
        note = f"<p class=muted>{omitted} smaller terms are not drawn.</p>" if omitted else ""
        charts.append(_chart(stage, "Loss terms", kept, "loss", smoothed=tuple(kept), note=note))
    if checks:
        unit = all(0 <= y <= 1 for values in checks.values() for _, y in values)
        charts.append(_chart(stage, "Validation", checks, "metric", points=tuple(checks), unit_interval=unit))
    return "".join(charts)


def _chart(stage: str, name: str, series: Mapping, y_label: str, note: str = "", **options: Any) -> str:
    drawing = line_chart(series, "step", y_label, description=f"{name} of {stage} over training steps", **options)
    legend = "".join(
        f'<span><i class="key line s{index % NUM_COLOURS}"></i>{escape(key.replace("_", " "))}</span>'
        for index, key in enumerate(series)
    )
    return f"<figure><figcaption>{name}</figcaption>{drawing}<p class=legend>{legend}</p>{note}</figure>"


def _classes(metrics: Mapping) -> str:
    details = metrics.get("details") or {}
    columns = {
        "Detection AP@0.5": {
            name: entry.get("ap50") for name, entry in _per_class(details, "finding_detection").items()
        },
        "Region AUROC": _per_class(details, "region_classification"),
        "Description F1": {name: entry.get("f1") for name, entry in _per_class(details, "region_description").items()},
        "Report F1": {name: entry.get("f1") for name, entry in _per_class(details, "report_generation").items()},
    }
    columns = {name: values for name, values in columns.items() if values}
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    if not names:
        return ""
    counts = {name: entry.get("ground_truths") for name, entry in _per_class(details, "finding_detection").items()}
    head = "".join(f"<th class=n>{escape(column)}" for column in columns)
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td class=n>{counts.get(name, '–')}</td>"
        + "".join(_meter(values.get(name)) for values in columns.values())
        + "</tr>"
        for name in names
    )
    regions = (details.get("anatomy_localization") or {}).get("per_region") or {}
    bars = ""
    if regions:
        cells = "".join(
            f"<li><span>{escape(name)}</span><meter min=0 max=1 value={value:.3f}></meter><b>{value:.2f}</b></li>"
            for name, value in sorted(regions.items(), key=lambda entry: -entry[1])
        )
        bars = f"<h3>Overlap by region (mIoU)</h3><ul class=regions>{cells}</ul>"
    return (
        f"<div class=scroll><table><thead><tr><th>Finding<th class=n>Boxes{head}</tr></thead><tbody>{rows}</tbody>"
        f"</table></div>{bars}"
    )


def _per_class(details: Mapping, task: str) -> Mapping:
    return (details.get(task) or {}).get("per_class") or {}


def _meter(value: float | None) -> str:
    if value is None:
        return "<td class=n>–</td>"
    return f"<td class=n><meter min=0 max=1 value={value:.3f}></meter>{value:.2f}</td>"


def _run(metrics: Mapping, history: Sequence[Mapping], config: Mapping) -> str:
    details = metrics.get("details") or {}
    timings = dict(config.get("timings") or {})
    if not timings:
        for entry in history:
            if entry.get("seconds") is not None:
                timings[str(entry.get("stage", "training"))] = float(entry["seconds"])
    blocks = []
    if config.get("command"):
        blocks.append(f"<h3>Command</h3><pre><code>{escape(str(config['command']))}</code></pre>")
    columns = []
    if timings:
        chart = horizontal_bars({k.replace("_", " "): v for k, v in timings.items()}, "s", "Seconds per stage")
        columns.append(f"<div><h3>Time per stage</h3>{chart}</div>")
    tasks = {k.replace("_", " "): v for k, v in (details.get("seconds") or {}).items() if k != "total"}
    if tasks:
        columns.append(f"<div><h3>Time of the evaluation</h3>{horizontal_bars(tasks, 's', 'Seconds per task')}</div>")
    versions = config.get("versions") or details.get("versions") or {}
    if versions:
        rows = "".join(
            f"<tr><th scope=row>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in versions.items()
        )
        columns.append(f"<div><h3>Versions</h3><table class=narrow><tbody>{rows}</tbody></table></div>")
    if columns:
        blocks.append(f"<div class=charts>{''.join(columns)}</div>")
    settings = dict(config.get("settings") or {})
    for task in ("finding_detection", "sentence_grounding"):
        chosen = (details.get(task) or {}).get("settings")
        if chosen:
            settings.setdefault("post-processing", {})[task] = chosen
    if settings:
        text = escape(json.dumps(settings, indent=2, default=str))
        blocks.append(f"<details><summary>Settings</summary><pre><code>{text}</code></pre></details>")
    return "".join(blocks)
