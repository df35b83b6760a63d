"""
The catalogue of tasks: the nine of the ChEX paper (arXiv 2404.15770, section 4) with the settings of its official
code, anatomy localisation, and tasks that are not bound to one data set.

Every task of the paper has a twin on the phantom: the same kind and post-processing, with the classes and boxes of the
phantom and its exact labeller.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from .detection import DetectionSettings
from .grounding import GroundingSettings


KINDS = (
    "anatomy_localization",
    "detection",
    "grounding",
    "box_classification",
    "region_classification",
    "box_description",
    "region_description",
    "report_generation",
)
TEXT_KINDS = ("box_description", "region_description", "report_generation")

DETECTION_METRICS = ("map", "map10", "map30", "map50", "coco_map")
FINDING_METRICS = (
    # labellers of CheXpert's classes
    *("micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5", "example_f1_14"),
    *("micro_precision_14", "micro_recall_14"),
    # labellers of other classes
    *("micro_f1", "macro_f1", "example_f1", "micro_precision", "micro_recall"),
)
# Of normal and abnormal regions; and how much better the text of its own region fits than those of others.
REGION_METRICS = ("meteor_normal", "meteor_abnormal", "meteor_ratio")
OPTIONAL_METRICS = ("meteor_ratio",)  # only where it is named: it compares all pairs of regions of an image
NLG_METRICS = ("meteor", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")
METRICS: dict[str, tuple[str, ...]] = {
    "anatomy_localization": ("miou",),
    "detection": DETECTION_METRICS,
    "grounding": ("miou", "best_iou", "iou_at_30", "macro_iou", "map"),
    "box_classification": ("auroc", "accuracy", "mcc"),
    "region_classification": ("wauroc", "macro_auroc"),
    **dict.fromkeys(TEXT_KINDS, (*FINDING_METRICS, *NLG_METRICS, "radgraph_f1")),
    "region_description": (*FINDING_METRICS, *NLG_METRICS, *REGION_METRICS, "radgraph_f1"),
}


@dataclass(frozen=True)
class DataSetInfo:
    """A data set: the prompt set of its classes (None: found by their names), and how to get it."""

    name: str
    title: str
    class_set: str | None = None

    @property
    def folder(self) -> str:
        """Where it is looked for by default."""
        return f"prepared/{self.name}"

    @property
    def remedy(self) -> str:
        return (
            f"needs {self.folder}: chex data prepare {self.name} --raw DIR --out {self.folder}, or "
            f"--data {self.name}=FOLDER"
        )


DATA_SETS: dict[str, DataSetInfo] = {
    data_set.name: data_set
    for data_set in (
        DataSetInfo("vindr-cxr", "VinDr-CXR", "vindr15"),
        DataSetInfo("nih-cxr14", "NIH ChestX-ray14", "nih8"),
        DataSetInfo("ms-cxr", "MS-CXR", "mscxr"),
        DataSetInfo("chest-imagenome", "Chest ImaGenome", "cig"),
        DataSetInfo("mimic-cxr", "MIMIC-CXR", "chexpert"),
        DataSetInfo("phantom", "phantom", "phantom"),
        DataSetInfo("own", "own data"),
    )
}


@dataclass(frozen=True)
class Task:
    """
    One task: what is asked, about which data, with which settings.

    Attributes:
        name: On the command line and in results.
        kind: Which procedure and metrics; one of `KINDS`.
        title: For people.
        data: Name of its data set; None: any, given as `own`.
        class_set: Prompt set of the finding classes; None: that of the classes of the data.
        headline: Its main metric.
        detection, grounding: Post-processing that is used where it is not tuned.
        negatives: What stands against the prompt of a class: "neg" (its own negative prompt) or "pos_centroid" (the
            mean of the prompts of all classes).
        labeler: That reads findings in texts, as for `evaluation.labelers.load_labeler`.
        twin: Whether it runs on the phantom in place of its own data.
    """

    name: str
    kind: str
    title: str
    data: str | None
    class_set: str | None
    headline: str
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    grounding: GroundingSettings = field(default_factory=GroundingSettings)
    negatives: str = "neg"
    labeler: str | None = None
    twin: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        return METRICS[self.kind]

    @property
    def needs_text(self) -> bool:
        """Whether it reads generated sentences."""
        return self.kind in TEXT_KINDS

    @property
    def tunable(self) -> bool:
        """Whether it has post-processing to tune."""
        return self.kind in ("detection", "grounding")


@dataclass(frozen=True)
class Preset:
    """
    How sentences are generated and reports are composed.

    Attributes:
        name: On the command line.
        max_length: Tokens of a sentence, the start token included; greedy.
        report: Preset of `processing_chex.report` for reports: "paper" describes every finding that is asked for,
            "found" those that the detector found. (Training never asks for a description of a finding that is absent,
            so that a small model answers at random.)
    """

    name: str
    max_length: int
    report: str


PRESETS: dict[str, Preset] = {
    "paper": Preset("paper", max_length=128, report="paper"),
    "phantom": Preset("phantom", max_length=33, report="found"),
}

_PROMPTS_ONLY = {"score": "prompts", "temperature": 0.1}
_PAPER_TASKS = (
    Task(
        "od_vindr",
        "detection",
        "Object detection, VinDr-CXR",
        "vindr-cxr",
        "vindr15",
        "map",
        detection=DetectionSettings(score="product", temperature=0.5, merge="nms", nms_threshold=0.25),
    ),
    Task(
        "od_nih8",
        "detection",
        "Object detection, NIH ChestX-ray8",
        "nih-cxr14",
        "nih8",
        "map",
        detection=DetectionSettings(**_PROMPTS_ONLY, merge="envelope"),
    ),
    Task(
        "od_mscxr",
        "detection",
        "Object detection, MS-CXR",
        "ms-cxr",
        "mscxr",
        "map",
        detection=DetectionSettings(**_PROMPTS_ONLY, merge="nms", nms_threshold=0.25),
    ),
    Task("sg_mscxr", "grounding", "Sentence grounding, MS-CXR", "ms-cxr", "mscxr", "miou"),
    Task(
        "rc_mscxr",
        "box_classification",
        "Region classification, MS-CXR",
        "ms-cxr",
        "mscxr",
        "auroc",
        negatives="pos_centroid",
    ),
    Task(
        "rc_cig", "region_classification", "Region classification, Chest ImaGenome", "chest-imagenome", "cig", "wauroc"
    ),
    Task(
        "re_mscxr",
        "box_description",
        "Region explanation, MS-CXR",
        "ms-cxr",
        "mscxr",
        "micro_f1_14",
        labeler="chexbert",
    ),
    Task(
        "re_cig",
        "region_description",
        "Region explanation, Chest ImaGenome",
        "chest-imagenome",
        "cig",
        "micro_f1_14",
        labeler="chexbert",
    ),
    Task(
        "rg_mimic",
        "report_generation",
        "Report generation, MIMIC-CXR",
        "mimic-cxr",
        "chexpert",
        "micro_f1_14",
        labeler="chexbert",
    ),
)
_LOCALIZATION = Task(
    "anatomy_localization", "anatomy_localization", "Anatomy localisation", "chest-imagenome", "cig", "miou"
)
_FREE_TASKS = (
    Task("finding_detection", "detection", "Finding detection", None, None, "map50"),
    Task("sentence_grounding", "grounding", "Sentence grounding", None, None, "miou"),
    Task(
        "box_classification", "box_classification", "Box classification", None, None, "auroc", negatives="pos_centroid"
    ),
    Task("region_classification", "region_classification", "Region classification", None, None, "wauroc"),
    Task("box_description", "box_description", "Box description", None, None, "micro_f1"),
    Task("region_description", "region_description", "Region description", None, None, "micro_f1"),
    Task("report_generation", "report_generation", "Report generation", None, None, "micro_f1"),
)

# Of any data set: validation during training, own data.
FREE_TASKS: tuple[str, ...] = (_LOCALIZATION.name, *(task.name for task in _FREE_TASKS))
PAPER_TASKS: tuple[str, ...] = tuple(task.name for task in _PAPER_TASKS)
TASKS: dict[str, Task] = {task.name: task for task in (*_PAPER_TASKS, _LOCALIZATION, *_FREE_TASKS)}
GROUPS: dict[str, tuple[str, ...]] = {
    "all": PAPER_TASKS,
    **{
        group: tuple(name for name in PAPER_TASKS if name.startswith(f"{group}_"))
        for group in ("od", "sg", "rc", "re", "rg")
    },
}


def nearest(name: str, known: Collection[str], what: str) -> str:
    """The known name that was probably meant, or all of them, as a sentence for an error message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known {what}: {', '.join(known)}."


def find_tasks(names: Sequence[str]) -> list[Task]:
    """
    Tasks by name or group, each once, in the order given.

    Raises:
        ValueError: An unknown name; the message names the nearest.
    """
    found: dict[str, Task] = {}
    for name in names:
        if name not in GROUPS and name not in TASKS:
            raise ValueError(f"Unknown task {name!r}. {nearest(name, (*GROUPS, *TASKS), 'tasks and groups')}")
        for member in GROUPS.get(name, (name,)):
            found[member] = TASKS[member]
    return list(found.values())


def check_metrics(names: Sequence[str], tasks: Sequence[Task]) -> None:
    """
    Raises:
        ValueError: A metric that none of the tasks has; the message names the nearest.
    """
    known = tuple(dict.fromkeys(metric for task in tasks for metric in task.metrics))
    every = {metric for metrics in METRICS.values() for metric in metrics}
    for name in names:
        if name not in known:
            reason = "None of the chosen tasks has the metric" if name in every else "Unknown metric"
            raise ValueError(f"{reason} {name!r}. {nearest(name, known, 'metrics')}")


def twin_of(task: Task) -> Task:
    """The twin of a task of the paper: on the phantom, with its classes and its labeller."""
    headline = task.headline.removesuffix("_14") if task.needs_text else task.headline
    return replace(
        task,
        data="phantom",
        class_set="phantom",
        headline=headline,
        labeler="phantom" if task.needs_text else None,
        twin=True,
    )


def on_data(task: Task, data: str, class_set: str | None) -> Task:
    """A task bound to a data set and its classes, whatever those of the catalogue are."""
    labeler = task.labeler
    if task.needs_text and labeler is None:
        labeler = "phantom" if class_set == "phantom" else "chexbert"
    headline = "micro_f1_14" if labeler == "chexbert" else task.headline
    return replace(
        task,
        data=data,
        class_set=class_set,
        labeler=labeler,
        headline=headline,
        twin=data == "phantom" and task.data is not None,
    )


__all__ = [
    "DATA_SETS",
    "FREE_TASKS",
    "GROUPS",
    "KINDS",
    "METRICS",
    "PAPER_TASKS",
    "PRESETS",
    "TASKS",
    "TEXT_KINDS",
    "DataSetInfo",
    "Preset",
    "Task",
    "check_metrics",
    "find_tasks",
    "nearest",
    "on_data",
    "twin_of",
]
