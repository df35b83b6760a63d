"""Chest ImaGenome: boxes, findings and phrases of 29 anatomical regions in frontal images of MIMIC-CXR."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from processing_chex.vocabulary import ANATOMY_NAMES, CIG_CLASSES, NUM_CIG_FINDINGS
from training.data.mimic_cxr import JPG_SOURCE, REPORT_SOURCE, FileStore, MimicBuilder, MimicConfig
from training.data.raw import DroppedRecord, RejectedRecord, Source, clipped_box
from training.data.record import VIEWS
from training.data.report_text import clean_phrase


# Regions that have boxes in the scene graphs too, but are no queries of ChEX. They count as found regions.
OTHER_REGIONS = (
    "left cardiophrenic angle",
    "right cardiophrenic angle",
    "left cardiac silhouette",
    "right cardiac silhouette",
    "left upper abdomen",
    "right upper abdomen",
    "descending aorta",
)
MIN_BOXES = 5
_REGION_INDEX = {name: index for index, name in enumerate(ANATOMY_NAMES)}
_REGIONS = {*ANATOMY_NAMES, *OTHER_REGIONS}
# Attributes are written category|relation|label. All other categories are left out, as are all "no".
_CLASS_INDEX = {
    f"{'anatomicalfinding' if index < NUM_CIG_FINDINGS else 'disease'}|yes|{name}": index
    for index, name in enumerate(CIG_CLASSES)
}
_SUFFIX = "_SceneGraph.json"

IMAGENOME_SOURCE = Source(
    key="imagenome",
    title="Chest ImaGenome",
    variable="CHEST_IMAGENOME_DIR",
    markers=("scene_grap[h]*",),
    tree="silver_dataset/scene_graph.zip, or silver_dataset/scene_graph/<dicom_id>_SceneGraph.json unpacked from it",
    url="https://physionet.org/content/chest-imagenome/1.0.0/",
)


def _number(value: float | str | None) -> float:
    return float("nan") if value is None else float(value)


def region_boxes(graph: dict, height: int, width: int, notes: Counter[str]) -> dict[str, list[float]]:
    """
    Boxes of the regions of a scene graph in pixels xyxy of the original image, clipped to it.

    Raises:
        DroppedRecord: Fewer than five regions have a valid box, or one has two.
    """
    boxes: dict[str, list[float]] = {}
    repeated = False
    for entry in graph["objects"]:
        name = entry["bbox_name"]
        if name not in _REGIONS:
            notes["boxes of unknown regions"] += 1
            continue
        box = clipped_box([_number(entry[f"original_{key}"]) for key in ("x1", "y1", "x2", "y2")], height, width)
        # The other size is that in the frame of 224 x 224 pixels that the regions were detected in.
        if box is None or not (_number(entry["width"]) > 0 and _number(entry["height"]) > 0):
            notes["boxes without area in their image"] += 1
            continue
        repeated |= name in boxes
        boxes[name] = box
    if len(boxes) < MIN_BOXES:
        raise DroppedRecord(f"fewer than {MIN_BOXES} regions have a valid box")
    if repeated:
        raise DroppedRecord("a region has two boxes")
    return boxes


def anatomy_columns(graph: dict, height: int, width: int, notes: Counter[str]) -> dict[str, list]:
    """
    The four anatomy columns of the common record from a scene graph. A region without a valid box has neither labels
    nor sentences; one that is mentioned several times has those of all mentions.

    Args:
        graph: Content of a scene graph file.
        height, width: Size of the original image in pixels.
        notes: Counts what is left out.

    Raises:
        DroppedRecord: By a rule of the paper.
    """
    if graph["viewpoint"] not in VIEWS:
        raise DroppedRecord("the scene graph is not of a frontal view")
    found = region_boxes(graph, height, width, notes)
    boxes = np.zeros((len(ANATOMY_NAMES), 4), dtype=np.float32)
    labels = np.zeros((len(ANATOMY_NAMES), len(CIG_CLASSES)), dtype=np.int8)
    sentences: list[dict[str, None]] = [{} for _ in ANATOMY_NAMES]  # used as ordered sets
    for name, box in found.items():
        if name in _REGION_INDEX:
            boxes[_REGION_INDEX[name]] = box
    for entry in graph["attributes"]:
        name = entry.get("bbox_name")
        # Mentions are also of regions that never have boxes, and a few have no name.
        if not isinstance(name, str) or name not in found or name not in _REGION_INDEX:
            continue
        region = _REGION_INDEX[name]
        for attribute in (attribute for group in entry["attributes"] for attribute in group):
            if attribute in _CLASS_INDEX:
                labels[region, _CLASS_INDEX[attribute]] = 1
            elif attribute.startswith(("anatomicalfinding|yes|", "disease|yes|")):
                notes[f"labels {attribute} (not among the classes)"] += 1
        phrases = (clean_phrase(phrase) for phrase in entry["phrases"])
        sentences[region] |= dict.fromkeys(phrase for phrase in phrases if len(phrase.split()) >= 2)
    return {
        "anatomy_boxes": boxes.tolist(),
        "anatomy_present": [name in found for name in ANATOMY_NAMES],
        "anatomy_labels": labels.tolist(),
        "anatomy_sentences": [list(texts) for texts in sentences],
    }


def _graph_name(item: dict) -> str:
    return item["sample_id"].rpartition("/")[2] + _SUFFIX


@dataclass
class ChestImagenomeConfig(MimicConfig):
    """
    Args:
        report_dir: Folder of the reports of MIMIC-CXR; may be the same.
        imagenome_dir: Folder of Chest ImaGenome.
        reports: Leave out images of studies without a usable report, as for training. Without, as for evaluation, no
            reports are needed or read.
    """

    report_dir: str | None = None
    imagenome_dir: str | None = None
    reports: bool = True


class ChestImagenome(MimicBuilder):
    """Frontal images of MIMIC-CXR-JPG with their scene graphs and report sentences, in MIMIC-CXR's splits."""

    DATASET = "chest-imagenome"
    TITLE = "Chest ImaGenome"
    SOURCES = (JPG_SOURCE, REPORT_SOURCE, IMAGENOME_SOURCE)
    CLASSES: ClassVar[tuple[str, ...]] = CIG_CLASSES
    BUILDER_CONFIG_CLASS = ChestImagenomeConfig

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.scene_graphs = self._scene_graph_files()

    def _scene_graph_files(self) -> FileStore:
        return FileStore(self.folders["imagenome"], "scene_graph", "scene_graph.zip")

    def table_files(self) -> list[Path]:
        return [*super().table_files(), self._scene_graph_files().path]

    def split_items(self) -> dict[str, list[dict]]:
        splits = self.frontal_items()
        annotated = {name.removesuffix(_SUFFIX) for name in self.scene_graphs.names() if name.endswith(_SUFFIX)}
        for name, items in splits.items():
            splits[name] = [item for item in items if item["sample_id"].rpartition("/")[2] in annotated]
            if not self.scene_graphs.zipped:
                for item in splits[name]:
                    item["graph_path"] = str(self.scene_graphs.path / _graph_name(item))
            self.counts[name]["with a scene graph"] = len(splits[name])
        used = sum(map(len, splits.values()))
        self.counts["scene graphs"] = Counter({"files": len(annotated), "of images above": used})
        return splits

    def _scene_graph(self, item: dict) -> dict:
        image_id, name = item["sample_id"].rpartition("/")[2], _graph_name(item)
        where = f"{name} in {self.scene_graphs.path}"
        try:
            graph = json.loads(self.scene_graphs.read(name))
        except FileNotFoundError as error:
            raise RejectedRecord(f"there is no {where}") from error
        except (ValueError, RecursionError) as error:
            raise RejectedRecord(f"{where} is truncated or damaged ({error})") from error
        if not isinstance(graph, dict) or str(graph.get("image_id")).removesuffix(".dcm") != image_id:
            raise RejectedRecord(f"{where} is not the scene graph of {image_id}")
        return graph

    def record(self, item: dict) -> dict:
        graph = self._scene_graph(item)
        try:
            columns = anatomy_columns(graph, item["height"], item["width"], self.notes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RejectedRecord(
                f"the scene graph {graph['image_id']} in {self.scene_graphs.path} has another structure than expected "
                f"({type(error).__name__}: {error})"
            ) from error
        return self.image_record(item, sentences=self.sentences(item), **columns)


__all__ = [
    "IMAGENOME_SOURCE",
    "MIN_BOXES",
    "OTHER_REGIONS",
    "ChestImagenome",
    "ChestImagenomeConfig",
    "anatomy_columns",
    "region_boxes",
]
