"""MS-CXR: boxes of findings with the phrases that describe them, in images of MIMIC-CXR."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from processing_chex.vocabulary import MSCXR_CLASSES
from training.data.mimic_cxr import JPG_SOURCE, MimicBuilder, MimicConfig, find_table
from training.data.raw import DroppedRecord, RejectedRecord, Source, clipped_box, read_table


_TABLE = "MS_CXR_Local_Alignment_v*"
_COLUMNS = ("category_name", "label_text", "x", "y", "w", "h", "image_width", "image_height")
# Images that ChEX is trained on are for validation, all others for testing.
_SPLIT_NAMES = {"train": "validation", "validate": "test", "test": "test"}

MSCXR_SOURCE = Source(
    key="mscxr",
    title="MS-CXR",
    variable="MS_CXR_DIR",
    markers=(f"{_TABLE}.csv*",),
    tree="MS_CXR_Local_Alignment_v1.0.0.csv (release 0.1, as in the paper) or MS_CXR_Local_Alignment_v1.1.0.csv",
    url="https://physionet.org/content/ms-cxr/0.1/",
)


@dataclass
class MsCxrConfig(MimicConfig):
    """
    Args:
        mscxr_dir: Folder of MS-CXR.
    """

    mscxr_dir: str | None = None


class MsCxr(MimicBuilder):
    """Frontal images with boxes of MS-CXR; no training split. Splits in the table of release 1.1.0 are not used."""

    DATASET = "ms-cxr"
    TITLE = "MS-CXR"
    SOURCES = (JPG_SOURCE, MSCXR_SOURCE)
    CLASSES: ClassVar[tuple[str, ...]] = MSCXR_CLASSES
    BUILDER_CONFIG_CLASS = MsCxrConfig

    def _table(self) -> Path:
        return find_table(self.folders["mscxr"], _TABLE)

    def table_files(self) -> list[Path]:
        return [*super().table_files(), self._table()]

    def split_items(self) -> dict[str, list[dict]]:
        path = self._table()
        boxes: dict[str, list[dict[str, str]]] = {}
        for row in read_table(path, ("dicom_id", *_COLUMNS), "These are the columns of releases 0.1 and 1.1.0."):
            if row["category_name"] not in MSCXR_CLASSES:
                raise ValueError(
                    f"{path}: unknown category {row['category_name']!r} of image {row['dicom_id']}. Known: "
                    f"{', '.join(MSCXR_CLASSES)}. Correct the row, or download the table again."
                )
            boxes.setdefault(row["dicom_id"], []).append({name: row[name] for name in _COLUMNS})
        splits = self.frontal_items(boxes, _SPLIT_NAMES)
        for items in splits.values():
            for item in items:
                item["boxes"] = boxes[item["sample_id"].rpartition("/")[2]]
        self.counts["annotated"] = Counter({"images": len(boxes), "of images above": sum(map(len, splits.values()))})
        return splits

    def record(self, item: dict) -> dict:
        objects = []
        for row in item["boxes"]:
            try:
                x, y, w, h, width, height = (
                    float(row[name] or "nan") for name in ("x", "y", "w", "h", "image_width", "image_height")
                )
            except ValueError as error:
                raise RejectedRecord(f"a box in {self._table()} is not made of numbers ({error})") from error
            if (height, width) != (item["height"], item["width"]):
                raise RejectedRecord(
                    f"{self._table()} gives the size as {row['image_height']} x {row['image_width']} pixels, but the "
                    f"metadata of MIMIC-CXR-JPG as {item['height']} x {item['width']}, so that boxes would be wrong"
                )
            box = clipped_box((x, y, x + w, y + h), item["height"], item["width"])
            if box is None:
                self.notes["boxes without area in their image"] += 1
                continue
            phrase = " ".join(row["label_text"].split())
            objects.append({"bbox": box, "category": row["category_name"], "phrase": phrase})
        if not objects:
            raise DroppedRecord("none of the boxes is valid")
        return self.image_record(item, objects=objects)


__all__ = ["MSCXR_SOURCE", "MsCxr", "MsCxrConfig"]
