"""Writes a small invented download in the exact format of VinDr-CXR 1.0.0."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from processing_chex.vocabulary import VINDR_CLASSES, VINDR_GLOBAL_CLASSES
from tests.image_factory import gradient, save_dicom


# Training images: boxes of three readers, no finding, boxes with mistakes, no annotation rows.
BOXED, NORMAL, TRAPS, UNLISTED = (letter * 32 for letter in "abcd")
TEST = tuple(f"{number:032x}" for number in range(1, 7))
# Rows x columns of all training images.
HEIGHT, WIDTH = 40, 60

# Reader, class, and coordinates as they stand in the file.
TRAIN_BOXES: dict[str, list[tuple[str, ...]]] = {
    BOXED: [
        ("R9", "Nodule/Mass", "50.5", "5.0", "56.0", "9.0"),
        ("R8", "Cardiomegaly", "10.0", "10.0", "30.0", "30.0"),
        ("R9", "Cardiomegaly", "12.0", "10.0", "32.0", "30.0"),
        ("R10", "Cardiomegaly", "14.0", "13.0", "34.0", "33.0"),
    ],
    NORMAL: [(reader, "No finding", "", "", "", "") for reader in ("R1", "R2", "R3")],
    TRAPS: [
        ("R1", "ILD", "30.0", "4.0", "20.0", "8.0"),  # inverted
        ("R1", "Edema", "70.0", "4.0", "80.0", "8.0"),  # outside
        ("R1", "Lung cyst", "50.0", "30.0", "75.5", "44.0"),  # partly outside
        ("R2", "Rib fracture", "5.0", "5.0", "5.0", "9.0"),  # empty
        ("R2", "Atelectasis", "", "", "", ""),
        ("R3", "Other lesion", "1.25", "2.5", "3.75", "5.0"),
    ],
}
# The classes of the whole image by each of the three readers.
TRAIN_LABELS: dict[str, list[Sequence[str]]] = {
    BOXED: [("Cardiomegaly", "Other diseases"), ("Cardiomegaly", "Nodule/Mass", "ILD"), ("Cardiomegaly", "ILD")],
    NORMAL: [("No finding",)] * 3,
    TRAPS: [("ILD",), (), ("Other lesion",)],
    UNLISTED: [("No finding",)] * 3,
}
TEST_BOXES: dict[str, list[tuple[str, ...]]] = {
    TEST[0]: [
        ("Lung Opacity", "3.0", "4.0", "23.0", "24.0"),
        ("Lung Opacity", "4.0", "4.0", "24.0", "24.0"),
        ("Aortic enlargement", "8.0", "2.0", "16.0", "10.0"),
    ],
    **{image: [("No finding", "", "", "", "")] for image in TEST[1:5]},
}
TEST_LABELS: dict[str, Sequence[str]] = {
    TEST[0]: ("Lung Opacity", "Aortic enlargement", "Other disease"),
    **dict.fromkeys(TEST[1:], ("No finding",)),
}


def label_columns(other_disease: str) -> list[str]:
    return [*VINDR_CLASSES, *(other_disease if name == "Other disease" else name for name in VINDR_GLOBAL_CLASSES)]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_vindr(
    root: Path,
    train_boxes: Mapping[str, list[tuple[str, ...]]] = TRAIN_BOXES,
    train_labels: Mapping[str, list[Sequence[str]]] = TRAIN_LABELS,
    images: bool = True,
) -> Path:
    """The tree at `root`; gives back the root."""
    coordinates = ["x_min", "y_min", "x_max", "y_max"]
    write_csv(
        root / "annotations/annotations_train.csv",
        ["image_id", "rad_id", "class_name", *coordinates],
        [(image, *row) for image, rows in train_boxes.items() for row in rows],
    )
    write_csv(
        root / "annotations/annotations_test.csv",
        ["image_id", "class_name", *coordinates],
        [(image, *row) for image, rows in TEST_BOXES.items() for row in rows],
    )
    names = label_columns("Other diseases")
    write_csv(
        root / "annotations/image_labels_train.csv",
        ["image_id", "rad_id", *names],
        [
            (image, f"R{number}", *(int(name in present) for name in names))
            for image, readers in train_labels.items()
            for number, present in enumerate(readers, start=1)
        ],
    )
    names = label_columns("Other disease")
    write_csv(
        root / "annotations/image_labels_test.csv",
        ["image_id", *names],
        [(image, *(int(name in present) for name in names)) for image, present in TEST_LABELS.items()],
    )
    if images:
        for folder, ids in (("train", train_labels), ("test", TEST_LABELS)):
            (root / folder).mkdir(exist_ok=True)
            for image in ids:
                kind = "MONOCHROME1" if image == NORMAL else "MONOCHROME2"
                pixels = gradient(HEIGHT, WIDTH, maximum=4000, dtype=np.uint16)
                save_dicom(
                    root / folder / f"{image}.dicom",
                    pixels,
                    bits_stored=12,
                    PhotometricInterpretation=kind,
                    # Neither rescaling nor the window is to be applied.
                    RescaleSlope=-1,
                    RescaleIntercept=4000,
                    WindowCenter=100,
                    WindowWidth=50,
                )
    return root
