"""
Writes small invented downloads in the exact formats of MIMIC-CXR-JPG 2.0.0, the MIMIC-CXR reports, Chest ImaGenome
1.0.0 and MS-CXR.
"""

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image

from processing_chex.vocabulary import CHEXPERT_CLASSES


METADATA_COLUMNS = (
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)
# The order of release 0.1; columns are to be read by name.
MSCXR_COLUMNS = (
    "category_name",
    "image_height",
    "image_width",
    "label_text",
    "path",
    "x",
    "y",
    "w",
    "h",
    "dicom_id",
)

REPORT = (
    "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n FINDINGS: \n \n"
    " Heart size is normal.  No pleural effusion.\n \n IMPRESSION:  No acute process.\n"
)
REPORT_SENTENCES = ["Heart size is normal.", "No pleural effusion.", "No acute process."]


@dataclass
class RawImage:
    """One image with all that the four downloads say about it; None for what they lack."""

    letter: str
    subject: int
    study: int
    view: str
    height: int
    width: int
    split: str | None
    report: str | None = REPORT
    labels: Mapping[str, str] | None = field(default_factory=dict)
    graph: dict | None = None

    @property
    def dicom_id(self) -> str:
        return "-".join([self.letter * 8] * 5)

    @property
    def sample_id(self) -> str:
        return f"{self.subject}/{self.study}/{self.dicom_id}"

    @property
    def folder(self) -> str:
        return f"files/p{str(self.subject)[:2]}/p{self.subject}"

    @property
    def path(self) -> str:
        return f"{self.folder}/s{self.study}/{self.dicom_id}.jpg"


def region(name: str, x1: float, y1: float, x2: float, y2: float, **changed: object) -> dict:
    """An object of a scene graph of an image whose longer side is 224 pixels."""
    small = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "width": x2 - x1, "height": y2 - y1}
    original = {f"original_{key}": value for key, value in small.items()}
    return {
        "object_id": f"id_{name}",
        "bbox_name": name,
        "name": name.capitalize(),
        "synsets": ["C0000000"],
        **small,
        **original,
        **changed,
    }


def mention(name: object, phrases: list[str], attributes: list[list[str]]) -> dict:
    """An entry of `attributes` of a scene graph."""
    return {
        str(name): True,
        "bbox_name": name,
        "name": str(name).capitalize(),
        "synsets": ["C0000000"],
        "object_id": f"id_{name}",
        "attributes": attributes,
        "attributes_ids": [["C0000000"] * len(group) for group in attributes],
        "phrases": phrases,
        "phrase_IDs": [f"50000000|{index}" for index in range(len(phrases))],
        "sections": ["finalreport"] * len(phrases),
        **{f"{cue}_cues": [[] for _ in phrases] for cue in ("comparison", "temporal", "severity", "texture")},
    }


def scene_graph(image: RawImage, objects: list[dict], attributes: Iterable[dict] = (), **changed: object) -> dict:
    return {
        "image_id": image.dicom_id,
        "viewpoint": image.view,
        "patient_id": image.subject,
        "study_id": image.study,
        "gender": "F",
        "age_decile": "50-60",
        "reason_for_exam": "___F with cough.",
        "StudyOrder": 1,
        "StudyDateTime": "2150-01-01 12:00:00 UTC",
        "objects": objects,
        "attributes": list(attributes),
        "relationships": [],
        **changed,
    }


def plain_regions() -> list[dict]:
    """Five regions with boxes inside of 40 x 40 pixels; one of them is no query of ChEX."""
    return [
        region("right lung", 4, 5, 16, 30),
        region("left lung", 20, 5, 36, 30),
        region("cardiac silhouette", 14, 18, 30, 32),
        region("spine", 17, 0, 22, 40),
        region("descending aorta", 18, 10, 24, 35),
    ]


def sample_images() -> list[RawImage]:
    """
    a, b, h: train; c: train, lateral; d, e: validate; f, g: test. Reports: b has no section header, d no findings, e a
    wet read after the impression, g none. Scene graphs: a and f carry findings, d has four boxes, e a region twice, c
    and h have none.
    """
    images = {
        "a": RawImage("a", 10000001, 50000001, "PA", 48, 64, "train", labels={"Atelectasis": "1.0", "Edema": "-1.0"}),
        "b": RawImage("b", 10000002, 50000002, "AP", 64, 48, "train", report=" Portable film.  Lungs are clear.\n"),
        "c": RawImage("c", 10000001, 50000001, "LATERAL", 60, 40, "train", labels=None),
        "d": RawImage(
            "d",
            11000003,
            50000003,
            "PA",
            50,
            40,
            "validate",
            report=" FINAL REPORT\n FINDINGS: \n \n IMPRESSION: \n \n Mild edema.\n",
            labels={"Edema": "-1.0", "No Finding": "0.0"},
        ),
        "e": RawImage(
            "e",
            11000003,
            50000004,
            "AP",
            40,
            50,
            "validate",
            report=" FINAL REPORT\n IMPRESSION: \n Lines are in place.\n WET READ: ___ ___ 9:15 PM\n Clear lungs.\n",
            labels={"Support Devices": "1.0", "Pneumothorax": "0.0"},
        ),
        "f": RawImage("f", 19000005, 50000005, "PA", 44, 60, "test", labels={"Pneumonia": "1.0"}),
        "g": RawImage("g", 19000006, 50000006, "AP", 60, 44, "test", report=None, labels=None),
        "h": RawImage("h", 12000007, 50000007, "PA", 52, 52, "train"),
    }
    images["a"].graph = scene_graph(
        images["a"],
        plain_regions(),
        [
            mention(
                "right lung",
                ["Opacity on the right.", "No pneumothorax."],
                [
                    ["anatomicalfinding|yes|lung opacity", "nlp|yes|abnormal"],
                    ["anatomicalfinding|no|pneumothorax", "severity|yes|mild"],
                ],
            ),
            mention(
                "right lung",
                ["FINDINGS: opacity, likely\n pneumonia.", "Opacity on the right.", "Pneumonia."],
                [["disease|yes|pneumonia", "anatomicalfinding|yes|unheard of"], ["nlp|yes|abnormal"], []],
            ),
            mention("descending aorta", ["The aorta is tortuous."], [["anatomicalfinding|yes|tortuous aorta"]]),
            mention("carina", ["Tube above the carina."], [["tubesandlines|yes|endotracheal tube"]]),
            mention("neck", ["Surgical clips in the neck."], [["anatomicalfinding|yes|pneumothorax"]]),
            mention(None, ["Nobody knows where."], [["anatomicalfinding|yes|pneumothorax"]]),
        ],
    )
    images["b"].graph = scene_graph(images["b"], plain_regions())
    images["d"].graph = scene_graph(images["d"], plain_regions()[:4])
    images["e"].graph = scene_graph(images["e"], [*plain_regions(), region("left lung", 22, 6, 38, 31)])
    images["f"].graph = scene_graph(
        images["f"],
        [
            *plain_regions(),
            region("abdomen", -3, 35, 61.5, 50),  # over three borders
            region("svc", 60, 5, 70, 20),  # outside
            region("carina", 20, 12, 18, 15),  # inverted
            region("trachea", 17, 0, float("nan"), 10),
            region("aortic arch", 20, 8, 26, 14, width=0),  # nothing in the frame of detection
            region("right atrium", 12, 20, 12, 25),  # no width
        ],
        [
            mention("carina", ["The carina is splayed."], [["anatomicalfinding|yes|lung lesion"]]),
            mention("abdomen", ["Free air is seen."], [["anatomicalfinding|yes|sub-diaphragmatic air"]]),
            mention("spine", [], []),
        ],
        image_id=f"{images['f'].dicom_id}.dcm",
    )
    images["g"].graph = scene_graph(images["g"], plain_regions())
    return list(images.values())


def sample_boxes(images: Iterable[RawImage]) -> list[dict[str, object]]:
    """
    Rows of MS-CXR: three for a (a phrase with two boxes), two for d (one box without width), two for f (one reaches
    out of the image), one for the lateral c, and one for an image that MIMIC-CXR-JPG lacks.
    """
    by_letter = {image.letter: image for image in images}
    rows = [
        ("a", "Pneumonia", "patchy opacities in both  lungs", 5, 10, 10, 20),
        ("d", "Edema", "mild edema", 2, 4, 30, 40),
        ("a", "Pneumonia", "patchy opacities in both  lungs", 40, 10, 12, 22),
        ("a", "Lung Opacity", "opacity, right base", 6, 20, 8, 9),
        ("d", "Pleural Effusion", "small effusion", 2, 4, 0, 40),
        ("f", "Cardiomegaly", "enlarged heart", 50, 30, 20, 20),
        ("f", "Pneumothorax", "apical pneumothorax", 10, 0, 15, 6),
        ("c", "Pneumonia", "retrocardiac opacity", 1, 1, 5, 5),
    ]
    boxes = []
    for letter, category, phrase, x, y, w, h in rows:
        image = by_letter[letter]
        boxes.append(
            {
                "category_name": category,
                "image_height": image.height,
                "image_width": image.width,
                "label_text": phrase,
                "path": image.path,
                "x": x,
                "y": y,
                "w": w,
                "h": h,
                "dicom_id": image.dicom_id,
            }
        )
    return [*boxes, boxes[0] | {"dicom_id": "-".join(["99999999"] * 5)}]


def table_bytes(columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> bytes:
    """A csv file; missing values are blank."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def write_file(path: Path, data: bytes) -> Path:
    """Writes a file, packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_members(root: Path, members: Mapping[str, bytes], archive: str | None) -> None:
    """Writes files below `root`, or into a zip archive in it."""
    if archive is None:
        for name, data in members.items():
            write_file(root / name, data)
        return
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)


def write_jpg(root: Path, images: Iterable[RawImage], suffix: str = ".csv.gz") -> Path:
    """MIMIC-CXR-JPG: three tables and the images."""
    images = list(images)
    metadata = [
        {
            "dicom_id": image.dicom_id,
            "subject_id": image.subject,
            "study_id": image.study,
            "PerformedProcedureStepDescription": "CHEST (PA AND LAT), PORTABLE",
            "ViewPosition": image.view,
            "Rows": image.height,
            "Columns": image.width,
            "StudyDate": 21500101,
            "StudyTime": "120000.0",
        }
        for image in images
    ]
    splits = [
        {"dicom_id": i.dicom_id, "study_id": i.study, "subject_id": i.subject, "split": i.split}
        for i in images
        if i.split is not None
    ]
    labels = [{"subject_id": i.subject, "study_id": i.study, **i.labels} for i in images if i.labels is not None]
    name = "mimic-cxr-2.0.0-{}" + suffix
    write_file(root / name.format("metadata"), table_bytes(METADATA_COLUMNS, metadata))
    write_file(root / name.format("split"), table_bytes(("dicom_id", "study_id", "subject_id", "split"), splits))
    write_file(root / name.format("chexpert"), table_bytes(("subject_id", "study_id", *CHEXPERT_CLASSES), labels))
    for image in images:
        path = root / image.path
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.linspace(0, 255, image.height * image.width).reshape(image.height, image.width)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def write_reports(root: Path, images: Iterable[RawImage], archive: str | None = "mimic-cxr-reports.zip") -> Path:
    """The reports, in an archive or (None) unpacked."""
    members = {f"{i.folder}/s{i.study}.txt": i.report.encode() for i in images if i.report is not None}
    write_members(root, members, archive)
    return root


def write_imagenome(root: Path, images: Iterable[RawImage], archive: str | None = "scene_graph.zip") -> Path:
    """The silver data of Chest ImaGenome, scene graphs in an archive or (None) unpacked."""
    graphs = {i.dicom_id: i.graph for i in images if i.graph is not None}
    members = {f"scene_graph/{name}_SceneGraph.json": json.dumps(graph).encode() for name, graph in graphs.items()}
    write_members(root / "silver_dataset", members, archive)
    return root


def write_mscxr(root: Path, boxes: Iterable[Mapping[str, object]], version: str = "v1.0.0") -> Path:
    """The table of MS-CXR; the later release has splits of its own in it."""
    rows = [dict(row) for row in boxes]
    columns = list(MSCXR_COLUMNS)
    if version != "v1.0.0":
        columns.append("split")
        rows = [row | {"split": "train"} for row in rows]
    write_file(root / f"MS_CXR_Local_Alignment_{version}.csv", table_bytes(columns, rows))
    return root


def write_all(root: Path, images: Iterable[RawImage] | None = None) -> Path:
    """All four downloads below one folder, in the folders that PhysioNet's archives make."""
    images = sample_images() if images is None else list(images)
    write_jpg(root / "mimic-cxr-jpg-2.0.0", images)
    write_reports(root / "mimic-cxr-2.0.0", images)
    write_imagenome(root / "chest-imagenome-dataset-1.0.0", images)
    name = "ms-cxr-making-the-most-of-text-semantics-to-improve-biomedical-vision-language-processing-0.1"
    write_mscxr(root / name, sample_boxes(images))
    return root
