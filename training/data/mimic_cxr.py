"""
MIMIC-CXR: the frontal images of MIMIC-CXR-JPG with report sentences and CheXpert labels, and what the data sets that
annotate images of MIMIC-CXR share.
"""

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from processing_chex.vocabulary import CHEXPERT_CLASSES
from training.data.raw import (
    SPLITS,
    DroppedRecord,
    RawBuilder,
    RawConfig,
    RejectedRecord,
    Source,
    image_size,
    is_missing,
    load_grey,
    login_page_hint,
    read_columns,
)
from training.data.record import VIEWS, empty_record
from training.data.report_text import report_sentences


logger = logging.getLogger(__name__)

_REPORT_ARCHIVE = "mimic-cxr-reports.zip"
# Official name of a split -> name here.
MIMIC_SPLITS = {"train": "train", "validate": "validation", "test": "test"}
_UNCERTAIN = {"positive": 1, "negative": 0}


class ReportSource(Source):
    """The reports of MIMIC-CXR, as one archive or unpacked, perhaps into the folders of the images."""

    def matches(self, folder: Path) -> bool:
        if (folder / _REPORT_ARCHIVE).is_file():
            return True
        # A look at the first few patients only: there are 65,000.
        return any(
            next(patient.glob("s*.txt"), None)
            for group in (folder / "files").glob("p[0-9][0-9]")
            for patient in islice(group.glob("p*"), 5)
        )


JPG_SOURCE = Source(
    key="jpg",
    title="MIMIC-CXR-JPG",
    variable="MIMIC_CXR_JPG_DIR",
    markers=("mimic-cxr-2.*-metadata.csv*",),
    tree="mimic-cxr-2.0.0-metadata.csv.gz, mimic-cxr-2.0.0-split.csv.gz, mimic-cxr-2.0.0-chexpert.csv.gz and "
    "files/pXX/pXXXXXXXX/sYYYYYYYY/<dicom_id>.jpg",
    url="https://physionet.org/content/mimic-cxr-jpg/2.0.0/",
)
REPORT_SOURCE = ReportSource(
    key="report",
    title="the reports of MIMIC-CXR",
    variable="MIMIC_CXR_REPORT_DIR",
    markers=(_REPORT_ARCHIVE,),
    tree=f"{_REPORT_ARCHIVE}, or files/pXX/pXXXXXXXX/sYYYYYYYY.txt unpacked from it",
    url="https://physionet.org/content/mimic-cxr/2.0.0/",
)


class FileStore:
    """
    The files of one folder of a download, or of a zip archive of that folder, which is read without unpacking it.

    Names are relative to the folder and use "/". Copies in other processes open the archive again.

    Args:
        root: Folder of the download.
        folder: Name of the folder in it.
        archive: Name of the archive in it, which is preferred.

    Raises:
        FileNotFoundError: There is neither.
    """

    def __init__(self, root: Path, folder: str, archive: str):
        self.folder = folder
        self.path = next((path for path in (root / archive, root / folder) if path.exists()), None)
        if self.path is None:
            raise FileNotFoundError(f"{root} has neither {archive} nor a folder {folder}: complete the download.")
        # Unpacked into a folder that is named as the archive is.
        if (self.path / folder).is_dir():
            self.path /= folder
        self._archive: zipfile.ZipFile | None = None
        self._prefix = ""
        self._process = 0

    def __getstate__(self) -> dict:
        return vars(self) | {"_archive": None}

    @property
    def zipped(self) -> bool:
        return self.path.suffix == ".zip"

    def _open(self) -> zipfile.ZipFile:
        # Processes must not share one file position.
        if self._archive is None or self._process != os.getpid():
            try:
                self._archive = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                with self.path.open("rb") as file:
                    page = file.read(512).lstrip().startswith(b"<")
                problem = login_page_hint() if page else f"is truncated or damaged ({error}): download it again."
                raise ValueError(f"{self.path} {problem}") from error
            self._process = os.getpid()
            within = (name for name in self._archive.namelist() if not name.startswith("__MACOSX"))
            found = next((name for name in within if f"/{self.folder}/" in f"/{name}"), None)
            if found is None:
                raise ValueError(f"{self.path} holds no folder {self.folder}: it is another archive than expected.")
            self._prefix = found[: f"/{found}".index(f"/{self.folder}/")] + f"{self.folder}/"
        return self._archive

    def names(self) -> list[str]:
        """Names of all files, for a folder of those directly in it."""
        if not self.zipped:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries]
        names = self._open().namelist()
        return [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]

    def __contains__(self, name: str) -> bool:
        if not self.zipped:
            return not is_missing(self.path / name)
        archive = self._open()
        return self._prefix + name in archive.NameToInfo

    def read(self, name: str) -> bytes:
        """
        Raises:
            FileNotFoundError: There is no such file.
            RejectedRecord: It cannot be read or unpacked.
        """
        if not self.zipped:
            try:
                return (self.path / name).read_bytes()
            except FileNotFoundError:
                raise
            except OSError as error:
                raise RejectedRecord(f"{self.path / name} cannot be read ({error.strerror})") from error
        archive = self._open()
        try:
            return archive.read(self._prefix + name)
        except KeyError as error:
            raise FileNotFoundError(f"{self.path} holds no {name}") from error
        except Exception as error:  # damaged archives raise nearly anything
            raise RejectedRecord(f"{name} in {self.path} cannot be unpacked ({error})") from error


def find_table(folder: Path, pattern: str) -> Path:
    """
    The table in a folder whose name matches, as csv or csv.gz.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted([*folder.glob(f"{pattern}.csv"), *folder.glob(f"{pattern}.csv.gz")])
    if not found:
        raise FileNotFoundError(f"{folder} has no {pattern}.csv.gz (or .csv): complete the download.")
    return found[0]


@dataclass
class MimicConfig(RawConfig):
    """
    Args:
        jpg_dir: Folder of MIMIC-CXR-JPG.
        truncated: "reject" images whose file ends too early, or "accept" what there is of them, as the paper's code
            does.
    """

    jpg_dir: str | None = None
    truncated: str = "reject"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncated not in ("reject", "accept"):
            raise ValueError(f"{type(self).__name__}.truncated must be 'reject' or 'accept', not {self.truncated!r}.")


class MimicBuilder(RawBuilder):
    """Base of the data sets of images of MIMIC-CXR-JPG, which their ids, splits, views and sizes come from."""

    SOURCES = (JPG_SOURCE,)

    def __init__(self, *args: object, **kwargs: object) -> None:
        if not kwargs.get("reports", True):
            self.SOURCES = tuple(source for source in self.SOURCES if source is not REPORT_SOURCE)
        super().__init__(*args, **kwargs)
        self.reports = self._report_files()

    def load_image(self, path: str | Path) -> np.ndarray:
        return load_grey(path, truncated=self.config.truncated == "accept")

    def _report_files(self) -> FileStore | None:
        return FileStore(self.folders["report"], "files", _REPORT_ARCHIVE) if "report" in self.folders else None

    def _jpg_table(self, name: str) -> Path:
        return find_table(self.folders["jpg"], f"mimic-cxr-2.*-{name}")

    def table_files(self) -> list[Path]:
        reports = self._report_files()
        return [self._jpg_table("metadata"), self._jpg_table("split"), *([reports.path] if reports else [])]

    def frontal_items(
        self, wanted: Collection[str] | None = None, split_names: Mapping[str, str] = MIMIC_SPLITS
    ) -> dict[str, list[dict]]:
        """
        Items of the frontal images (PA or AP), those with a report if reports belong to the records.

        Args:
            wanted: Ids (dicom_id) of the images to look at; all by default.
            split_names: Official name of a split -> name of the split its images go to.

        Raises:
            ValueError: The tables are damaged or have other values than they should.
        """
        path = self._jpg_table("split")
        table = read_columns(path, ("dicom_id", "split"), unique="dicom_id")
        if unknown := sorted(set(table["split"]) - set(MIMIC_SPLITS)):
            image = next(image for image, split in zip(*table.values(), strict=True) if split == unknown[0])
            raise ValueError(
                f"{path}: unknown values of split: {', '.join(map(repr, unknown[:5]))}, the first that of {image}. "
                f"Known: {', '.join(MIMIC_SPLITS)}. The table was damaged or edited: download it again."
            )
        official = dict(zip(table["dicom_id"], table["split"], strict=True))
        path = self._jpg_table("metadata")
        columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns")
        metadata = read_columns(path, columns, unique="dicom_id")

        stages = ["images", "frontal", *(["with a report"] if self.reports else [])]
        items: dict[str, list[dict]] = {name: [] for name in SPLITS if name in split_names.values()}
        self.counts |= {name: Counter(dict.fromkeys(stages, 0)) for name in items}
        without_split = 0
        for image, subject, study, view, rows, columns in zip(*metadata.values(), strict=True):
            if wanted is not None and image not in wanted:
                continue
            if image not in official:
                without_split += 1
                continue
            split = split_names[official[image]]
            counts = self.counts[split]
            counts["images"] += 1
            if view not in VIEWS:
                continue
            counts["frontal"] += 1
            if self.reports and _report_name(subject, study) not in self.reports:
                continue
            if self.reports:
                counts["with a report"] += 1
            folder = f"{self.folders['jpg']}/files/p{subject[:2]}/p{subject}/s{study}"
            try:
                height, width = _whole(rows), _whole(columns)
            except ValueError as error:
                raise ValueError(
                    f"{path}: Rows and Columns of {image} are {rows!r} and {columns!r} instead of whole numbers. The "
                    "table was damaged or edited: download it again."
                ) from error
            item = {
                "sample_id": f"{subject}/{study}/{image}",
                "image_path": f"{folder}/{image}.jpg",
                "height": height,
                "width": width,
                "view": view,
            }
            if self.reports and not self.reports.zipped:
                item["report_path"] = str(self.reports.path / _report_name(subject, study))
            items[split].append(item)
        if without_split:
            logger.warning("%s: %d images of the metadata have no split.", self.TITLE, without_split)
        return items

    def image_record(self, item: dict, **annotation: object) -> dict:
        """
        The common record of an item with the given columns.

        Raises:
            RejectedRecord: The image cannot be opened or has another size than the metadata say.
        """
        height, width = image_size(item["image_path"])
        if (height, width) != (item["height"], item["width"]):
            raise RejectedRecord(
                f"the image has {height} x {width} pixels (height x width), but by the metadata it should have "
                f"{item['height']} x {item['width']}, so that boxes would be wrong"
            )
        subject, study, image_id = item["sample_id"].split("/")
        return empty_record(
            sample_id=item["sample_id"],
            subject_id=subject,
            study_id=study,
            image_id=image_id,
            image=item["image_path"],
            height=height,
            width=width,
            view=item["view"],
            **annotation,
        )

    def sentences(self, item: dict) -> list[str] | None:
        """
        Sentences of the report of an item, None where reports do not belong to the records.

        Raises:
            DroppedRecord: There is no report, or none with findings or impression.
        """
        if self.reports is None:
            return None
        subject, study, _ = item["sample_id"].split("/")
        try:
            report = self.reports.read(_report_name(subject, study))
        except FileNotFoundError as error:
            raise DroppedRecord("the study has no report") from error
        sentences = report_sentences(report.decode("utf-8", errors="replace"))
        if not sentences:
            raise DroppedRecord("the report has no sentences of findings or impression")
        return sentences


def _whole(text: str) -> int:
    """A whole number, also if programs that edit tables have written it as 620.0; raises ValueError for others."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def _report_name(subject: str, study: str) -> str:
    return f"p{subject[:2]}/p{subject}/s{study}.txt"


@dataclass
class MimicCxrConfig(MimicConfig):
    """
    Args:
        report_dir: Folder of the reports of MIMIC-CXR; may be the same.
        reports: Leave out images of studies without a usable report. Without, no reports are needed or read.
        uncertain: Whether an uncertain CheXpert label counts as "positive", as in the paper, or "negative".
    """

    report_dir: str | None = None
    reports: bool = True
    uncertain: str = "positive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uncertain not in _UNCERTAIN:
            raise ValueError(f"MimicCxrConfig.uncertain must be 'positive' or 'negative', not {self.uncertain!r}.")


class MimicCxr(MimicBuilder):
    """Frontal images of MIMIC-CXR-JPG with report sentences and the labels of CheXpert."""

    DATASET = "mimic-cxr"
    TITLE = "MIMIC-CXR"
    SOURCES = (JPG_SOURCE, REPORT_SOURCE)
    CLASSES: ClassVar[tuple[str, ...]] = CHEXPERT_CLASSES
    BUILDER_CONFIG_CLASS = MimicCxrConfig

    def table_files(self) -> list[Path]:
        return [*super().table_files(), self._jpg_table("chexpert")]

    def split_items(self) -> dict[str, list[dict]]:
        splits = self.frontal_items()
        labels = self._study_labels()
        unlabelled = 0
        for items in splits.values():
            for item in items:
                item["labels"] = labels.get(item["sample_id"].split("/")[1])
                unlabelled += item["labels"] is None
        if unlabelled:
            logger.warning("%s: %d images have no row in the CheXpert table.", self.TITLE, unlabelled)
        return splits

    def _study_labels(self) -> dict[str, bytes]:
        """Study -> its 14 labels, one byte each."""
        path = self._jpg_table("chexpert")
        table = read_columns(path, ("study_id", *CHEXPERT_CLASSES), unique="study_id")
        values = {"": 0, "0": 0, "1": 1, "-1": _UNCERTAIN[self.config.uncertain]}
        values |= {f"{text}.0": value for text, value in values.items() if text}
        studies = table.pop("study_id")
        for name, column in table.items():
            if unknown := sorted(set(column) - set(values)):
                raise ValueError(
                    f"{path}: study {studies[column.index(unknown[0])]} has the unknown label {unknown[0]!r} of "
                    f"{name}. Known: 1.0 (positive), 0.0 (negative), -1.0 (uncertain) and blank (not mentioned). The "
                    "table was damaged or edited: download it again."
                )
        columns = [[values[text] for text in column] for column in table.values()]
        return dict(zip(studies, map(bytes, zip(*columns, strict=True)), strict=True))

    def record(self, item: dict) -> dict:
        labels = item["labels"]
        return self.image_record(
            item, sentences=self.sentences(item), class_labels=None if labels is None else list(labels)
        )


__all__ = [
    "JPG_SOURCE",
    "MIMIC_SPLITS",
    "REPORT_SOURCE",
    "FileStore",
    "MimicBuilder",
    "MimicConfig",
    "MimicCxr",
    "MimicCxrConfig",
    "find_table",
]
