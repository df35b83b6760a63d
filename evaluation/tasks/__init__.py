"""The tasks of ChEX: each collects predictions batch by batch from shared image features, then scores them."""

from .base import EvaluationContext, Task
from .description import RegionDescription
from .detection import FindingDetection
from .examples import choose_examples, explain_examples
from .grounding import SentenceGrounding
from .localization import AnatomyLocalization
from .region_classification import RegionClassification
from .report import ReportGeneration


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        AnatomyLocalization,
        FindingDetection,
        SentenceGrounding,
        RegionClassification,
        RegionDescription,
        ReportGeneration,
    )
}

__all__ = ["TASKS", "EvaluationContext", "Task", "choose_examples", "explain_examples"]
