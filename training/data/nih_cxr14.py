"""
NIH ChestX-ray14: 984 boxes of eight findings in 880 of its 112,120 images.

Wang et al., ChestX-ray8: Hospital-scale chest X-ray database and benchmarks, CVPR 2017.
"""

import logging
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from processing_chex.vocabulary import NIH8_CLASSES
from training.data.raw import (
    RawBuilder,
    RawConfig,
    RejectedRecord,
    Source,
    clipped_box,
    image_size,
    read_numbered_table,
)
from training.data.record import VIEWS, empty_record


logger = logging.getLogger(__name__)

SPLIT_SEED = 0
# All images of the release are squares of this side, and the boxes are in their pixels.
SIDE = 1024
# Findings that the image labels know besides the eight with boxes.
OTHER_FINDINGS = ("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding")

_IMAGE_NAME = re.compile(r"\d{8}_\d{3}\.png")
# The header calls the four numbers "Bbox [x,y,w,h]", which its commas divide.
_COORDINATES = ("Bbox [x", "y", "w", "h]")
# The file of boxes calls this finding otherwise than the image labels.
_BOX_NAMES = {"Infiltrate": "Infiltration"}


@dataclass
class NihConfig(RawConfig):
    """
    Args:
        nih_dir: Folder of NIH ChestX-ray14.
        boxes_only: Only the images with boxes, as validation and test split. Otherwise the images of
            train_val_list.txt, without patients who have boxes, are the training split, with image labels only.
    """

    nih_dir: str | None = None
    boxes_only: bool = True


class NihCxr14(RawBuilder):
    """
    The images of NIH ChestX-ray14 with boxes, as the ChEX paper evaluates on them: no patient is in both splits, and
    each has half of the boxes. The official division cannot be repeated, because it depends on the hash seed of one
    run of Python; here patients are sorted and shuffled by a fixed seed. Numbers are therefore not exactly comparable
    with those of the paper.

    Image labels and views are there if Data_Entry_2017.csv (or ..._v2020.csv) is.
    """

    DATASET = "nih-cxr14"
    TITLE = "NIH ChestX-ray14"
    CLASSES: ClassVar[tuple[str, ...]] = NIH8_CLASSES
    BUILDER_CONFIG_CLASS = NihConfig
    SOURCES: ClassVar[tuple[Source, ...]] = (
        Source(
            key="nih",
            title="NIH ChestX-ray14",
            variable="CXR14_DIR",
            markers=("BBox_List_2017*.csv",),
            tree=(
                "BBox_List_2017.csv, images_001 ... images_012 (or the one folder images) and, for image labels, "
                "Data_Entry_2017.csv"
            ),
            url="https://nihcc.app.box.com/v/ChestXray-NIHCC",
        ),
    )

    def table_files(self) -> list[Path]:
        lists = self.folders["nih"].glob("train_val_list.txt")
        return [*super().table_files(), *([path] if (path := self._entry_file()) else []), *lists]

    def split_items(self) -> dict[str, list[dict]]:
        folder = self.folders["nih"]
        boxes = self._boxes(next(iter(super().table_files())))
        entries = self._entries(entry_file) if (entry_file := self._entry_file()) else None
        validation, test = patient_halves({image: len(of_image) for image, of_image in boxes.items()})
        splits = {"validation": validation, "test": test}
        if not self.config.boxes_only:
            patients = {image[:8] for image in boxes}
            listed = self._train_list(folder / "train_val_list.txt")
            splits = {"train": [image for image in listed if image[:8] not in patients]} | splits
            self.counts["train"] = Counter(
                {"of train_val_list.txt": len(listed), "of patients without boxes": len(splits["train"])}
            )
            if entries is None:
                raise ValueError(
                    f"{self.TITLE}: the training split consists of image labels, and {folder} has no "
                    "Data_Entry_2017.csv: download it, or leave boxes_only=True."
                )
        self.counts |= {name: Counter({"with boxes": len(splits[name])}) for name in ("validation", "test")}
        if entries is not None and (
            unknown := [name for names in splits.values() for name in names if name not in entries]
        ):
            raise ValueError(
                f"{self.TITLE}: {len(unknown)} images are not in {entry_file}, such as {', '.join(unknown[:3])}: "
                "download it again."
            )

        found = self._image_paths()
        return {
            split: [
                {
                    "sample_id": name.removesuffix(".png"),
                    "image_path": found.get(name.lower(), str(folder / "images" / name)),
                    "boxes": boxes.get(name),
                    "labels": entries[name][0] if entries else None,
                    "view": entries[name][1] if entries else -1,
                }
                for name in names
            ]
            for split, names in splits.items()
        }

    def record(self, item: dict) -> dict:
        height, width = image_size(item["image_path"])
        if (height, width) != (SIDE, SIDE):
            raise RejectedRecord(
                f"the image has {width} x {height} pixels, the boxes are for {SIDE} x {SIDE}: use the original files"
            )
        objects = None if item["boxes"] is None else []
        for category, box in item["boxes"] or []:
            if (clipped := clipped_box(box, height, width)) is None:
                self.notes["boxes without area in their image"] += 1
                continue
            objects.append({"bbox": clipped, "category": category, "phrase": ""})
        return empty_record(
            sample_id=item["sample_id"],
            subject_id=item["sample_id"][:8],
            image_id=item["sample_id"],
            image=item["image_path"],
            height=height,
            width=width,
            view=item["view"],
            objects=objects,
            class_labels=item["labels"],
        )

    def _entry_file(self) -> Path | None:
        """The table of image labels; of several releases the latest."""
        return max(self.folders["nih"].glob("Data_Entry_2017*.csv"), default=None)

    def _image_paths(self) -> dict[str, str]:
        """
        Name in lower case -> path of all images, in one folder, in twelve folders, or in both ways nested in each
        other. The letters of endings depend on what unpacked or copied the files.
        """
        folder = self.folders["nih"]
        parents = [*sorted(folder.glob("images*")), *sorted(folder.glob("images*/images*"))]
        return {
            entry.name.lower(): entry.path for parent in parents if parent.is_dir() for entry in os.scandir(parent)
        }

    def _boxes(self, path: Path) -> dict[str, list[tuple[int, list[float]]]]:
        """Image -> (class index, xyxy pixels) of its boxes in the order of the file."""
        rows = list(
            read_numbered_table(
                path,
                ["Image Index", "Finding Label", *_COORDINATES],
                "The header of the original file is: Image Index,Finding Label,Bbox [x,y,w,h],,,",
            )
        )
        if repeated := [row for row, count in Counter(tuple(row.values()) for _, row in rows).items() if count > 1]:
            raise ValueError(
                f"{path} has {len(repeated)} rows more than once, such as {','.join(repeated[0])}: download it again."
            )
        boxes: dict[str, list[tuple[int, list[float]]]] = {}
        unusable = 0
        for number, row in rows:
            where, image, finding = f"{path}, line {number}", row["Image Index"].strip(), row["Finding Label"].strip()
            if not _IMAGE_NAME.fullmatch(image):
                raise ValueError(f"{where}: {image!r} is not the name of an image, such as 00013118_008.png.")
            if (name := _BOX_NAMES.get(finding, finding)) not in self.CLASSES:
                raise ValueError(
                    f"{where}: there are no boxes of {finding!r}. Known: {', '.join((*self.CLASSES, *_BOX_NAMES))}."
                )
            try:
                x, y, width, height = (float(row[column].strip() or "nan") for column in _COORDINATES)
            except ValueError as error:
                raise ValueError(f"{where}: {error}; a box is x, y, w, h in pixels.") from error
            of_image = boxes.setdefault(image, [])
            if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
                unusable += 1
                continue
            of_image.append((self.CLASSES.index(name), [x, y, x + width, y + height]))
        if unusable:
            logger.warning(
                "%s: %d boxes of %s have no coordinates or are empty: left out.", self.TITLE, unusable, path.name
            )
        return boxes

    def _entries(self, path: Path) -> dict[str, tuple[list[int], int]]:
        """Image -> labels of the eight classes and the index of its view, -1 if unknown."""
        entries: dict[str, tuple[list[int], int]] = {}
        repeated = []
        for number, row in read_numbered_table(path, ["Image Index", "Finding Labels", "View Position"]):
            image, findings = row["Image Index"], row["Finding Labels"].split("|")
            if unknown := set(findings).difference(self.CLASSES, OTHER_FINDINGS):
                raise ValueError(
                    f"{path}, line {number}: there is no finding {min(unknown)!r}. Known: "
                    f"{', '.join((*self.CLASSES, *OTHER_FINDINGS))}."
                )
            if image in entries:
                repeated.append(image)
            view = VIEWS.index(row["View Position"]) if row["View Position"] in VIEWS else -1
            entries[image] = ([int(name in findings) for name in self.CLASSES], view)
        if repeated:
            raise ValueError(
                f"{path} has {len(repeated)} images more than once, such as {', '.join(repeated[:3])}: download it "
                "again."
            )
        return entries

    def _train_list(self, path: Path) -> list[str]:
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.TITLE}: {path} is missing; the training split (boxes_only=False) needs it."
            )
        return path.read_text(encoding="utf-8-sig").split()


def patient_halves(boxes: dict[str, int]) -> tuple[list[str], list[str]]:
    """
    Image names with their numbers of boxes -> validation and test images, in their order. Whole patients (the first
    eight digits), in an order drawn by a fixed seed, go to validation until it has half of the boxes.
    """
    images_of: dict[str, list[str]] = {}
    for image in boxes:
        images_of.setdefault(image[:8], []).append(image)
    patients = sorted(images_of)
    random.Random(SPLIT_SEED).shuffle(patients)
    validation: set[str] = set()
    count, half = 0, sum(boxes.values()) / 2
    for patient in patients:
        if count >= half:
            break
        validation.update(images_of[patient])
        count += sum(boxes[image] for image in images_of[patient])
    return [image for image in boxes if image in validation], [image for image in boxes if image not in validation]


__all__ = ["NihCxr14", "NihConfig", "patient_halves"]
