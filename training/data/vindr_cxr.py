"""
VinDr-CXR 1.0.0: radiographs in DICOM with boxes of 22 local findings.

Nguyen et al., VinDr-CXR: An open dataset of chest X-rays with radiologist's annotations, Scientific Data 9 (2022).
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pydicom
from pydicom.pixels import get_decoder

from processing_chex.vocabulary import VINDR_CLASSES, VINDR_GLOBAL_CLASSES
from training.data.raw import (
    RawBuilder,
    RawConfig,
    RejectedRecord,
    Source,
    clipped_box,
    dicom_size,
    read_numbered_table,
)
from training.data.record import empty_record


logger = logging.getLogger(__name__)

READERS = 3
FUSION_THRESHOLD = 0.1
# Of the official test split; the other half is the test split.
VALIDATION_SHARE = 0.5
SPLIT_SEED = 12345

_COORDINATES = ("x_min", "y_min", "x_max", "y_max")
# The annotations of the training split say "Other diseases" where those of the test split say "Other disease".
_IMAGE_LEVEL = frozenset({*VINDR_GLOBAL_CLASSES, "Other diseases"})
_KAGGLE_HINT = (
    "This is the release of the Kaggle competition (it has a column class_id), another data set with 14 classes and "
    "without test annotations: get VinDr-CXR 1.0.0 from https://physionet.org/content/vindr-cxr/1.0.0/."
)


@dataclass
class VindrConfig(RawConfig):
    """
    Args:
        vindr_dir: Folder of VinDr-CXR 1.0.0.
    """

    vindr_dir: str | None = None


class VindrCxr(RawBuilder):
    """
    VinDr-CXR as the ChEX paper prepares it: classes and boxes, no reports.

    Training images have the labels that most of the three readers gave, and their boxes fused ([`fuse_readers`]); half
    of the official test images, drawn at random, are the validation split. Images stay as DICOM files. Plain use
    through `datasets` converts each once to an 8-bit PNG of full size below the cache folder: 18,000 images need some
    hundred gigabytes. Prepared data do without.
    """

    DATASET = "vindr-cxr"
    TITLE = "VinDr-CXR"
    CLASSES: ClassVar[tuple[str, ...]] = VINDR_CLASSES
    BUILDER_CONFIG_CLASS = VindrConfig
    SOURCES: ClassVar[tuple[Source, ...]] = (
        Source(
            key="vindr",
            title="VinDr-CXR 1.0.0",
            variable="VINDR_CXR_DIR",
            markers=("annotations/*_t*.csv",),  # any of the four: which is missing is said when they are read
            tree="annotations/{annotations,image_labels}_{train,test}.csv, train/*.dicom and test/*.dicom",
            url="https://physionet.org/content/vindr-cxr/1.0.0/ (credentialed access)",
        ),
    )

    def _find_sources(self, kwargs: Mapping[str, object]) -> dict[str, Path]:
        try:
            return super()._find_sources(kwargs)
        except FileNotFoundError as error:
            kaggle = replace(self.SOURCES[0], markers=("train.csv",))
            for folder in (kwargs.get("vindr_dir"), kwargs.get("data_dir"), os.environ.get("VINDR_CXR_DIR")):
                if folder and Path(folder).is_dir() and (root := kaggle.find(folder)):
                    table = root / "train.csv"
                    if b"class_id" in table.read_bytes()[:1000]:
                        raise ValueError(f"{self.TITLE}: {table} is of no use. {_KAGGLE_HINT}") from error
            raise

    def split_items(self) -> dict[str, list[dict]]:
        folder = self.folders["vindr"]
        train_labels = self._labels(folder / "annotations/image_labels_train.csv")
        train_boxes = self._boxes(folder / "annotations/annotations_train.csv", train_labels)
        test_labels = self._labels(folder / "annotations/image_labels_test.csv")
        test_boxes = self._boxes(folder / "annotations/annotations_test.csv", test_labels)
        _check_readers(folder / "annotations/image_labels_train.csv", train_labels)
        if repeated := [image for image, rows in test_labels.items() if len(rows) > 1]:
            raise ValueError(
                f"{self.TITLE}: {folder / 'annotations/image_labels_test.csv'} has more than one row for "
                f"{len(repeated)} images, such as {', '.join(repeated[:3])}: download it again."
            )

        validation, test = halves(list(test_labels))
        splits = {}
        for split, images, labels, boxes in (
            ("train", list(train_labels), train_labels, train_boxes),
            ("validation", validation, test_labels, test_boxes),
            ("test", test, test_labels, test_boxes),
        ):
            splits[split] = [
                {
                    "sample_id": image,
                    "image_path": str(folder / ("train" if split == "train" else "test") / f"{image}.dicom"),
                    "labels": majority(labels[image]),
                    "boxes": fuse_classes(boxes[image]) if split == "train" else boxes[image],
                }
                for image in images
                if image in boxes
            ]
            self.counts[split] = Counter({"images": len(images), "with annotation rows": len(splits[split])})
        return splits

    def record(self, item: dict) -> dict:
        path = item["image_path"]
        height, width = dicom_size(path)
        objects = []
        for category, box in item["boxes"]:
            if (clipped := clipped_box(box, height, width)) is None:
                self.notes["boxes without area in their image"] += 1
                continue
            objects.append({"bbox": clipped, "category": category, "phrase": ""})
        return empty_record(
            sample_id=item["sample_id"],
            image_id=item["sample_id"],
            image=path,
            height=height,
            width=width,
            objects=objects,
            class_labels=item["labels"],
        )

    def load_image(self, path: str | Path) -> np.ndarray:
        return load_equalized(path)

    def image_file(self, path: str | Path) -> str:
        return self.png_file(path)

    def _labels(self, path: Path) -> dict[str, list[list[int]]]:
        """Image -> the 22 labels of each of its rows, in the order of the file."""
        values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
        labels: dict[str, list[list[int]]] = {}
        for number, row in read_numbered_table(path, ["image_id", *self.CLASSES]):
            wrong = next((name for name in self.CLASSES if row[name].strip() not in values), None)
            if wrong is not None:
                raise ValueError(f"{path}, line {number}: {wrong} is {row[wrong]!r}, but a label is 0 or 1.")
            labels.setdefault(row["image_id"], []).append([values[row[name].strip()] for name in self.CLASSES])
        return labels

    def _boxes(self, path: Path, known: Mapping[str, object]) -> dict[str, list[tuple[int, list[float]]]]:
        """Image -> (class index, xyxy pixels) of its usable boxes in the order of the file, [] if it has none."""
        boxes: dict[str, list[tuple[int, list[float]]]] = {}
        unusable: Counter[str] = Counter()
        for number, row in read_numbered_table(path, ["image_id", "class_name", *_COORDINATES], _KAGGLE_HINT):
            if "class_id" in row:
                raise ValueError(f"{self.TITLE}: {path} is of no use. {_KAGGLE_HINT}")
            image, name = row["image_id"], row["class_name"].strip()
            if image not in known:
                unusable["of images without labels"] += 1
                continue
            of_image = boxes.setdefault(image, [])
            try:
                box = [float(row[column].strip() or "nan") for column in _COORDINATES]
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; a box is {', '.join(_COORDINATES)}.") from error
            if name in _IMAGE_LEVEL:
                if not all(map(math.isnan, box)):
                    unusable["of classes that have no boxes"] += 1
            elif name not in self.CLASSES:
                raise ValueError(
                    f"{path}, line {number}: there is no class {name!r} in {self.TITLE}. Known: "
                    f"{', '.join((*self.CLASSES, *VINDR_GLOBAL_CLASSES))}."
                )
            elif not all(map(math.isfinite, box)):
                unusable["without coordinates"] += 1
            elif box[0] >= box[2] or box[1] >= box[3]:
                unusable["empty or inverted"] += 1
            else:
                of_image.append((self.CLASSES.index(name), box))
        if unusable:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in unusable.items())
            logger.warning("%s: boxes of %s that were left out: %s.", self.TITLE, path.name, reasons)
        return boxes


def _check_readers(path: Path, labels: Mapping[str, Sequence[object]]) -> None:
    if other := [image for image, rows in labels.items() if len(rows) != READERS]:
        logger.warning(
            "VinDr-CXR: %s has not %d rows, one for each reader, for %d images, such as %s: their labels are those of "
            "most of the rows.",
            path,
            READERS,
            len(other),
            ", ".join(other[:3]),
        )


def halves(images: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    The validation and the test images of the ChEX paper, from the images of the official test split in the order of
    their label file: shuffled by pandas with a fixed seed, the first half is the validation split.
    """
    shuffled = pd.Series(images, dtype=object).sample(frac=1, random_state=SPLIT_SEED).tolist()
    count = int(VALIDATION_SHARE * len(shuffled))
    return shuffled[:count], shuffled[count:]


def majority(votes: Sequence[Sequence[int]]) -> list[int]:
    """For each class 1 if more than half of the rows say so: the mode of 0/1 labels, of which a tie is 0."""
    return [int(2 * sum(column) > len(votes)) for column in zip(*votes, strict=True)]


def fuse_classes(boxes: Iterable[tuple[int, list[float]]]) -> list[tuple[int, list[float]]]:
    """
    (class, box) of one image with the boxes of each class fused: first classes with several boxes, from the one that
    occurs last, then those with one box.
    """
    by_class: dict[int, list[list[float]]] = {}
    for category, box in boxes:
        by_class.setdefault(category, []).append(box)
    fused = [
        (category, box)
        for category, members in reversed(by_class.items())
        if len(members) > 1
        for box in fuse_readers(members)
    ]
    return fused + [(category, members[0]) for category, members in by_class.items() if len(members) == 1]


def fuse_readers(boxes_xyxy: Sequence[Sequence[float]], threshold: float = FUSION_THRESHOLD) -> list[list[float]]:
    """
    Boxes that several readers drew for one class, fused to one for each finding: weighted box fusion (Solovyev et al.,
    Image and Vision Computing 2021) with equal weights and scores.

    From the last box to the first, each joins the cluster whose mean box it overlaps most, if their intersection over
    union exceeds the threshold, and otherwise opens a cluster. Empty boxes are ignored.

    Returns:
        The mean box of each cluster, latest cluster first. The result depends on the order of the boxes, but not on
        their scale or position.
    """
    sums: list[np.ndarray] = []
    counts: list[int] = []
    for box in np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)[::-1]:
        if (box[2:] <= box[:2]).any():
            continue
        overlaps = _iou(np.stack(sums) / np.array(counts)[:, None], box) if sums else np.zeros(1)
        best = int(overlaps.argmax())
        if overlaps[best] > threshold:
            sums[best] = sums[best] + box
            counts[best] += 1
        else:
            sums.append(box)
            counts.append(1)
    return [(total / count).tolist() for total, count in zip(sums[::-1], counts[::-1], strict=True)]


def _iou(boxes_xyxy: np.ndarray, box_xyxy: np.ndarray) -> np.ndarray:
    """Intersection over union of (N, 4) boxes with one box of positive area -> (N,)."""
    sides = np.minimum(boxes_xyxy[:, 2:], box_xyxy[2:]) - np.maximum(boxes_xyxy[:, :2], box_xyxy[:2])
    shared = sides.clip(min=0).prod(-1)
    return shared / ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(-1) + (box_xyxy[2:] - box_xyxy[:2]).prod() - shared)


def load_equalized(path: str | Path) -> np.ndarray:
    """
    Pixels of a DICOM radiograph as the ChEX paper uses them, uint8 (H, W): the stored values without rescaling, lookup
    table or window, inverted for MONOCHROME1, spread over 0..255, and their histogram equalised. An image of one value
    becomes zeros, with a warning.

    Raises:
        RejectedRecord: The pixels cannot be decoded, or are not one grey image.
    """
    try:
        dataset = pydicom.dcmread(path, force=True)
    except FileNotFoundError as error:
        raise RejectedRecord("the image file is missing") from error
    except Exception as error:  # damaged files raise nearly anything
        raise RejectedRecord(f"the DICOM file cannot be read ({type(error).__name__}: {error})") from error
    pixels = _stored_pixels(dataset)
    if pixels.ndim != 2 or pixels.size == 0:
        raise RejectedRecord(f"the DICOM file holds pixels of shape {pixels.shape}, not one grey image")

    lowest, highest = pixels.min(), pixels.max()
    if lowest == highest:
        logger.warning("%s has pixels of one value only: it is taken as black.", path)
        return np.zeros(pixels.shape, dtype=np.uint8)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        # Wide enough for signed pixels too.
        pixels = (int(highest) - pixels.astype(np.int64)).astype(np.uint8 if pixels.dtype == np.uint8 else np.int64)
    if pixels.dtype != np.uint8:
        pixels = pixels - pixels.min().astype(np.float64)
        pixels = (pixels / pixels.max() * 255).astype(np.uint8)
    return equalize_histogram(pixels)


def _stored_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    syntax = None
    try:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            syntax = dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        return dataset.pixel_array
    except Exception as error:  # each decoder has its own exceptions, and damaged headers raise nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not isinstance(syntax, pydicom.uid.UID):
            raise RejectedRecord(f"the DICOM file is damaged: its transfer syntax is {syntax!r} ({reason})") from error
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            reason = "pydicom has no decoder for it"
        else:
            if not decoder.is_available:
                reason = f"it needs one of these plug-ins of pydicom: {'; '.join(decoder.missing_dependencies)}"
        raise RejectedRecord(f"pixels stored as {syntax.name} ({syntax}) cannot be decoded: {reason}") from error


def equalize_histogram(pixels: np.ndarray) -> np.ndarray:
    """Global histogram equalisation with 256 bins: uint8 -> uint8, 255 times the share of pixels up to this value."""
    share = np.cumsum(np.bincount(pixels.ravel(), minlength=256)) / pixels.size
    return (share * 255).astype(np.uint8)[pixels]


__all__ = [
    "VindrConfig",
    "VindrCxr",
    "equalize_histogram",
    "fuse_classes",
    "fuse_readers",
    "halves",
    "load_equalized",
    "majority",
]
