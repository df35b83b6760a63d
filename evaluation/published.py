"""
Published results of ChEX and of the systems it was compared with, as data.

Three kinds of sources: `paper` (tables of ChEX, arXiv 2404.15770, or of the paper named in the remark), `note` (third
parties who quote the paper), `radar` (measured on the radar figure of the paper: ratios to ChEX, error about 0.01).
Values are fractions as in `results.json`; `printed` is the number in percent as it was published.

What is missing here was not found: the mAP of ChEX on VinDr-CXR (only ratios to it are known), the standard deviations
of detection and region classification, and the tables of their baselines.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace


PAPER, NOTE, RADAR = "paper", "note", "radar"
SOURCES = {
    PAPER: "table of the paper",
    NOTE: "third-party note on the paper",
    RADAR: "measured on the radar figure of the paper",
}
CHEX = "ChEX"


@dataclass(frozen=True)
class Published:
    """
    One published number.

    Attributes:
        task, metric: Names as in `results.json`; per class: of `label`, with the metric `f1_14`.
        model: Who reached it.
        value: Fraction; None where only the ratio to ChEX is known.
        std: Standard deviation over the resamples (fraction), None where not published.
        source: One of `SOURCES`.
        printed: In percent as published, or the ratio ("×1.29").
        ratio: To ChEX; only where it was measured on the radar figure.
        label: Class name; None for values over all classes.
        resamples: Of the bootstrap behind `std`.
        comparable: False where the definition or the test set is known to be another one.
        remark: What to know before comparing.
    """

    task: str
    metric: str
    model: str
    value: float | None
    std: float | None
    source: str
    printed: str
    ratio: float | None = None
    label: str | None = None
    resamples: int | None = None
    comparable: bool = True
    remark: str = ""


@dataclass(frozen=True)
class PromptSets:
    """A row of the ablation of prompt sets in report generation (paper): which prompts are asked, and the results."""

    regions: str
    findings: str
    values: dict[str, float]


def _number(text: str) -> tuple[float | None, float | None, float | None]:
    """(value, std, ratio) of '47.52±1.45', '46.2', '×1.29' or '×0.60 (6.7)'; percent becomes a fraction."""
    ratio = None
    if text.startswith("×"):
        first, _, absolute = text[1:].partition(" ")
        ratio, text = float(first), absolute.strip("()")
        if not text:
            return None, None, ratio
    value, _, std = text.partition("±")
    # rounding keeps 0.4752 from becoming 0.47519999999999996
    return round(float(value) / 100, 8), round(float(std) / 100, 8) if std else None, ratio


def _entry(task: str, metric: str, model: str, text: str, source: str, **more: object) -> Published:
    value, std, ratio = _number(text)
    printed = text.replace("±", " ± ") if value is None or ratio is None else text.partition("(")[2].rstrip(")")
    return Published(task, metric, model, value, std, source, printed, ratio, **more)


def _table(task: str, metrics: str, rows: str, source: str = PAPER, **more: object) -> list[Published]:
    """Entries of a table with a model per line and a metric per column; '-' is a number that was not published."""
    entries = []
    for line in filter(None, map(str.strip, rows.splitlines())):
        model, *cells = (cell.strip() for cell in line.split("|"))
        for metric, cell in zip(metrics.split(), cells, strict=True):
            if cell != "-":
                entries.append(_entry(task, metric, model, cell, source, **more))
    return entries


def _with(entries: Iterable[Published], remarks: dict[tuple[str, str | None], dict]) -> list[Published]:
    """Entries with remarks by (model, metric); metric None: all of that model."""
    result = []
    for entry in entries:
        for metric in (None, entry.metric):
            entry = replace(entry, **remarks.get((entry.model, metric), {}))
        result.append(entry)
    return result


_GROUNDING = _with(
    _table(
        "sg_mscxr",
        "miou map",
        """
        ChEX                       | 47.52±1.45 | 44.47±2.21
        BioViL (masks)             | 22.75±1.26 | -
        BioViL (boxes)             | 28.57±1.31 | 18.62±1.37
        CheXzero (masks)           | 11.94±0.59 | -
        CheXzero (boxes)           | 15.45±0.67 | 5.94±0.64
        OmniFM-DR                  | 46.2       | -
        TransVG                    | 48.81±1.45 | 37.65±2.61
        TransVG, BioViL backbone   | 52.13±1.73 | 41.24±2.73
        TransVG, CheXzero backbone | 53.51±1.53 | 44.05±2.63
        """,
        resamples=250,
    ),
    {("OmniFM-DR", None): {"resamples": None, "remark": "as its own paper reports it"}},
)

_SUPERVISED = "best supervised detector"
_DETECTION_AND_CLASSIFICATION = [
    _entry("od_nih8", "map", CHEX, "11.14", NOTE),
    _entry("od_nih8", "map", _SUPERVISED, "6.69", NOTE),
    _entry("od_mscxr", "map", CHEX, "16.60", NOTE),
    _entry("od_mscxr", "map", _SUPERVISED, "15.83", NOTE),
    _entry("rc_mscxr", "auroc", CHEX, "82.33", NOTE),
    _entry("rc_mscxr", "auroc", "Faster R-CNN + BioViL", "76.13", NOTE),
    _entry("rc_cig", "wauroc", CHEX, "70.46", NOTE),
    _entry("rc_cig", "wauroc", "BioViL", "66.96", NOTE, remark="contrastive"),
    *_table("od_vindr", "map", "Faster R-CNN | ×1.29 \n Loc-ADPD-BioViL | ×0.53 \n BioViL | ×0.20", RADAR),
    *_table(
        "od_nih8", "map", "Faster R-CNN | ×0.60 (6.7) \n Loc-ADPD-BioViL | ×1.06 (11.9) \n BioViL | ×0.24 (2.6)", RADAR
    ),
    *_table(
        "od_mscxr",
        "map",
        "Faster R-CNN | ×0.91 (15.1) \n Loc-ADPD-BioViL | ×0.99 (16.4) \n BioViL | ×0.43 (7.1)",
        RADAR,
    ),
    *_table("rc_mscxr", "auroc", "Faster R-CNN | ×0.92 \n BioViL | ×0.82 (67)", RADAR),
    *_table("rc_cig", "wauroc", "Faster R-CNN | ×0.82 (58) \n BioViL | ×0.95", RADAR),
]

_EXPLANATION_METRICS = "micro_f1_14 macro_f1_14 micro_f1_5 macro_f1_5 meteor"
_NEAREST = {("BioViL", None): {"remark": "sentence of the nearest neighbour"}}
_EXPLANATION = _with(
    _table(
        "re_mscxr",
        _EXPLANATION_METRICS,
        """
        ChEX     | 49.97±2.24 | 20.50±1.54 | 62.54±1.50 | 44.95±2.23 | 8.79±0.54
        RGRG     | 48.97±2.50 | 16.37±2.00 | 60.39±2.21 | 38.34±2.23 | 8.15±0.78
        BioViL   | 5.86±1.41  | 3.69±0.67  | 12.79±2.25 | 10.95±1.93 | 3.82±0.03
        CheXzero | 5.41±1.30  | 3.40±0.78  | 11.00±2.25 | 9.02±1.83  | 3.47±0.45
        """,
        resamples=10,
    )
    + _table(
        "re_cig",
        _EXPLANATION_METRICS,
        """
        ChEX     | 53.34±0.43 | 29.13±0.35 | 44.53±0.40 | 39.19±0.37 | 10.18±0.13
        RGRG     | 45.26±0.44 | 20.88±0.19 | 31.93±0.31 | 27.86±0.32 | 7.88±0.10
        BioViL   | 24.40±0.38 | 7.15±0.10  | 9.42±0.22  | 7.45±0.16  | 3.82±0.03
        CheXzero | 21.86±0.35 | 8.93±0.15  | 7.78±0.21  | 6.99±0.17  | 3.68±0.04
        """,
        resamples=10,
    ),
    _NEAREST,
)

_EXAMPLE_F1 = "images without any true positive are left out, which raises it"
_OWN_SPLIT = "own split and preprocessing"
_OTHER_STUDY = "another study: other reference texts; after ChEX"
_REPORTS = [
    _entry("rg_mimic", "micro_f1_14", CHEX, "52.32", NOTE, resamples=10),
    _entry("rg_mimic", "example_f1_14", CHEX, "58.76", NOTE, resamples=10, remark=_EXAMPLE_F1),
    _entry("rg_mimic", "micro_f1_14", "MAIRA-1", "55.7", NOTE),
    _entry("rg_mimic", "example_f1_14", "best earlier system", "47.6", NOTE),
    _entry("rg_mimic", "micro_f1_14", "RGRG", "×0.95 (49.6)", RADAR),
    _entry("rg_mimic", "macro_f1_14", CHEX, "32.69", PAPER, remark="from the ablation of prompt sets"),
    *_with(
        _table(
            "rg_mimic",
            "bleu1 bleu4 meteor rouge_l cider",
            """
            ChEX                     | 29.58±0.24 | 6.52±0.11 | 13.26±0.10 | 19.49±0.10 | 18.49±0.79
            RGRG                     | 37.3  | 12.6  | 16.8 | 26.4  | 49.5
            CvT-212DistilGPT2        | 39.2  | 12.4  | 15.3 | 28.5  | 36.1
            M2 Trans (NLL+BS+fCEN)   | -     | 11.4  | -    | -     | 50.9
            METransformer            | 38.6  | 12.4  | 15.2 | 29.1  | 36.2
            Med-PaLM M 12B           | 30.90 | 10.43 | -    | 26.16 | 23.43
            Med-PaLM M 84B           | 32.31 | 11.31 | -    | 27.29 | 26.17
            Med-PaLM M 562B          | 31.73 | 11.50 | -    | 27.49 | 25.27
            MAIRA-1                  | 39.2  | 14.2  | 33.3 | 28.9  | -
            Prompt-MRG               | 39.8  | 11.2  | 15.7 | 26.8  | -
            OmniFM-DR                | -     | 11.0  | 14.0 | 26.5  | -
            RaDialog-INS             | 34.0  | 9.7   | 13.6 | 27.0  | -
            RaDialog-RG              | 34.6  | 9.5   | 14.0 | 27.1  | -
            ITA                      | 39.5  | 12.1  | 14.7 | 28.4  | -
            COOMG                    | 34.6  | 10.4  | 13.7 | 27.9  | -
            COOMG-RL                 | 36.3  | 12.4  | 12.8 | 29.0  | -
            ORGAN                    | 40.7  | 12.3  | 16.2 | 29.3  | -
            BioViL-T                 | -     | 9.2   | -    | 29.6  | -
            """,
        ),
        {
            (CHEX, None): {"resamples": 10},
            ("MAIRA-1", "meteor"): {"comparable": False, "remark": "another implementation of METEOR"},
        },
    ),
    # Later and closed systems, as collected from their papers and from notes.
    *_table("rg_mimic", "macro_f1_14 micro_f1_5 macro_f1_5 radgraph_f1", "MAIRA-1 | 38.6 | 56.0 | 47.7 | 24.3", NOTE),
    *_table(
        "rg_mimic",
        "micro_f1_14 macro_f1_14 radgraph_f1",
        """
        MAIRA-2, frontal image only | 52.1 | 35.8 | 12.9
        CheXagent-2                 | 54.5 | 38.7 | 20.1
        RadVLM                      | 49.0 | 30.5 | 19.0
        RadVLM-GRPO                 | 57.0 | 33.4 | 25.8
        """,
        comparable=False,
        remark=f"{_OTHER_STUDY} (arXiv 2512.10691)",
    ),
    _entry(
        "rg_mimic",
        "rouge_l",
        "CheXagent-2",
        "22.5",
        PAPER,
        comparable=False,
        remark=f"{_OTHER_STUDY} (arXiv 2512.10691)",
    ),
]

_LABELS = """
Cardiomegaly               | 66.62±1.08 | 62.4 | 64.0
Edema                      | 54.81±1.48 | 51.4 | 44.0
Consolidation              | 15.27±2.10 | 7.8  | 20.0
Atelectasis                | 45.99±1.43 | 54.6 | 41.3
Pleural Effusion           | 69.11±1.04 | 56.0 | 68.9
Enlarged Cardiomediastinum | 6.81±1.74  | 0.3  | 11.9
Fracture                   | 0          | 0    | 24.9
Lung Lesion                | 14.24±3.05 | 0.7  | 18.8
Lung Opacity               | 52.32±1.06 | 26.8 | 49.8
Pleural Other              | 0          | 0.2  | 14.7
Pneumonia                  | 19.30±1.55 | 16.2 | 18.3
Pneumothorax               | 17.59±3.21 | 15.9 | 40.8
Support Devices            | 69.40±0.92 | 70.9 | 84.5
No Finding                 | 24.36±2.97 | 63.2 | 38.6
"""
_PER_LABEL = [
    replace(
        _entry("rg_mimic", "f1_14", model, cell.strip(), PAPER, label=label.strip()),
        resamples=10 if model == CHEX else None,
    )
    for line in _LABELS.strip().splitlines()
    for label, *cells in [line.split("|")]
    for model, cell in zip((CHEX, "RGRG", "MAIRA-1"), cells, strict=True)
]

PUBLISHED: tuple[Published, ...] = (*_GROUNDING, *_DETECTION_AND_CLASSIFICATION, *_EXPLANATION, *_REPORTS, *_PER_LABEL)

ABLATION_METRICS = ("micro_f1_14", "macro_f1_14", "example_f1_14", "micro_precision_14", "micro_recall_14", "meteor")
_ABLATION = """
all      | all      | 51.04 | 30.61 | 57.05 | 42.99 | 62.80 | 13.90
all      | positive | 50.13 | 30.67 | 56.91 | 42.46 | 61.22 | 13.60
all      | none     | 50.08 | 30.07 | 56.97 | 42.66 | 60.64 | 12.67
positive | all      | 52.37 | 32.69 | 58.78 | 45.09 | 62.44 | 13.28
positive | positive | 52.02 | 32.88 | 58.36 | 44.64 | 62.33 | 12.24
positive | none     | 51.27 | 32.18 | 58.82 | 45.16 | 59.31 | 10.77
none     | all      | 50.35 | 25.82 | 59.35 | 47.88 | 53.10 | 9.82
none     | positive | 50.39 | 26.69 | 60.14 | 49.38 | 51.44 | 8.26
"""
PROMPT_SETS: tuple[PromptSets, ...] = tuple(
    PromptSets(
        regions.strip(),
        findings.strip(),
        {name: round(float(cell) / 100, 8) for name, cell in zip(ABLATION_METRICS, cells, strict=True)},
    )
    for line in _ABLATION.strip().splitlines()
    for regions, findings, *cells in [line.split("|")]
)
PROMPT_SETS_DEFAULT = ("positive", "all")

# Published tables as they are shown: title, tasks with their metrics, remark.
TABLES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        "Object detection and region classification",
        ("od_vindr", "od_nih8", "od_mscxr", "rc_mscxr", "rc_cig"),
        ("map", "auroc", "wauroc"),
        "The mAP of ChEX on VinDr-CXR, and all standard deviations, were not found.",
    ),
    ("Sentence grounding, MS-CXR", ("sg_mscxr",), ("miou", "map"), "± over 250 resamples."),
    (
        "Region explanation, MS-CXR",
        ("re_mscxr",),
        ("micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5", "meteor"),
        "± over 10 resamples. BioViL and CheXzero: sentences found by similarity, not generated.",
    ),
    (
        "Region explanation, Chest ImaGenome",
        ("re_cig",),
        ("micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5", "meteor"),
        "± over 10 resamples.",
    ),
    (
        "Report generation, MIMIC-CXR: texts",
        ("rg_mimic",),
        ("bleu1", "bleu4", "meteor", "rouge_l", "cider"),
        "Baselines use their own splits and preprocessing: these values are not strictly comparable.",
    ),
    (
        "Report generation, MIMIC-CXR: findings",
        ("rg_mimic",),
        ("micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5", "example_f1_14", "radgraph_f1"),
        "Example-based F1 of ChEX leaves out images without any true positive, which raises it.",
    ),
)


def find_published(
    task: str | None = None, metric: str | None = None, model: str | None = None, label: str | None = None
) -> list[Published]:
    """Published numbers over all classes (or of one class), in the order of the tables; None: any."""
    return [
        entry
        for entry in PUBLISHED
        if (task is None or entry.task == task)
        and (metric is None or entry.metric == metric)
        and (model is None or entry.model == model)
        and (entry.label is None if label is None else (entry.label or "").casefold() == label.casefold())
    ]


def chex(task: str, metric: str, label: str | None = None) -> Published | None:
    """What ChEX reached, None where it was not published."""
    return next(iter(find_published(task, metric, CHEX, label)), None)


def best_baseline(task: str, metric: str) -> Published | None:
    """
    The best comparable number of the systems that ChEX was compared with; by ratio where no value is known. None where
    nothing was published.
    """
    others = [entry for entry in find_published(task, metric) if entry.model != CHEX and entry.comparable]
    known = [entry for entry in others if entry.value is not None]
    if known:
        return max(known, key=lambda entry: entry.value)
    return max(others, key=lambda entry: entry.ratio, default=None)


def family(model: str) -> str:
    """A system without its variant: 'TransVG, BioViL backbone' and 'TransVG' are one."""
    return model.split(",")[0].split(" (")[0]


def ratio_to_chex(task: str, metric: str, model_family: str) -> float | None:
    """Best result of a family of systems divided by that of ChEX, as on the radar figure; None where unknown."""
    entries = [entry for entry in find_published(task, metric) if family(entry.model) == model_family]
    reference = chex(task, metric)
    ratios = [
        entry.value / reference.value
        if entry.ratio is None and entry.value is not None and reference is not None and reference.value
        else entry.ratio
        for entry in entries
        if entry.comparable
    ]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


__all__ = [
    "ABLATION_METRICS",
    "CHEX",
    "NOTE",
    "PAPER",
    "PROMPT_SETS",
    "PROMPT_SETS_DEFAULT",
    "PUBLISHED",
    "RADAR",
    "SOURCES",
    "TABLES",
    "PromptSets",
    "Published",
    "best_baseline",
    "chex",
    "family",
    "find_published",
    "ratio_to_chex",
]
