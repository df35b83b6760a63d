"""Own data: a folder of images, and JSON lines that say what is annotated in them (docs/own-data.md)."""

import difflib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import datasets
import numpy as np
import PIL.Image

from processing_chex.dicom import is_dicom, may_be_bare_dicom
from processing_chex.errors import ChexInputError
from processing_chex.image_loading import load_image
from processing_chex.vocabulary import ANATOMY_NAMES
from training.data.raw import (
    SPLITS,
    RawBuilder,
    RawConfig,
    RejectedRecord,
    Source,
    clipped_box,
    dicom_size,
    image_size,
)
from training.data.record import VIEWS, empty_record


logger = logging.getLogger(__name__)

IDS = ("sample_id", "subject_id", "study_id", "image_id")
KEYS = (
    "image",
    "split",
    *IDS,
    "height",
    "width",
    "view",
    "sentences",
    "anatomy_boxes",
    "anatomy_labels",
    "anatomy_sentences",
    "objects",
    "class_labels",
)
_OBJECT_KEYS = ("bbox", "category", "phrase")
_SPLIT_FILES = tuple(f"{name}.jsonl" for name in SPLITS)
_WHOLE_FILES = ("records.jsonl", "metadata.jsonl")


@dataclass
class OwnConfig(RawConfig):
    """
    Args:
        own_dir: Folder of the images and of their JSON lines.
    """

    own_dir: str | None = None


class OwnData(RawBuilder):
    """
    A folder with images (PNG, JPEG, TIFF, DICOM) and either train.jsonl, validation.jsonl and test.jsonl, whichever
    there are, or one records.jsonl (or metadata.jsonl), in which `split` names the split of a line (train if it does
    not). A line describes an image by keys of the common record; docs/own-data.md lists them. Any may be left out but
    `image`: what is left out, or null, is not annotated.

    The classes are those of classes.json (a list of names) or classes.txt (one name on each line); without such a file
    those that occur, sorted.

    Raises:
        ValueError: At construction for lines that cannot be read, when building for anything else that is wrong in
            one. The message names the file and the line.
    """

    DATASET = "own"
    TITLE = "Own data"
    CLASSES: ClassVar[tuple[str, ...]] = ()  # of an instance: those of its data
    BUILDER_CONFIG_CLASS = OwnConfig
    SOURCES: ClassVar[tuple[Source, ...]] = (
        Source(
            key="own",
            title="a folder of images with JSON lines",
            variable="OWN_DATA_DIR",
            markers=("*.jsonl",),
            tree="train.jsonl, validation.jsonl and test.jsonl, or records.jsonl, beside the images",
            url="yourself (docs/own-data.md describes the format)",
        ),
    )

    def table_files(self) -> list[Path]:
        names = (*_SPLIT_FILES, *_WHOLE_FILES, "classes.json", "classes.txt")
        return [path for name in names if (path := self.folders["own"] / name).is_file()]

    def _info(self) -> datasets.DatasetInfo:
        self.CLASSES = self._classes()
        return super()._info()

    def split_items(self) -> dict[str, list[dict]]:
        splits: dict[str, list[dict]] = {name: [] for name in SPLITS}
        first_seen: dict[str, str] = {}
        for line in self._lines():
            columns = line.columns(self.CLASSES)
            sample_id, path = columns["sample_id"], str(self.folders["own"] / columns["image"])
            if sample_id in first_seen:
                line.fail(
                    f"the sample_id {sample_id!r} stands in {first_seen[sample_id]} already; it must be unique, and "
                    "is the path of the image unless given"
                )
            first_seen[sample_id] = line.where
            splits[line.split].append(
                {
                    "sample_id": sample_id,
                    "image_path": path,
                    "subject_id": columns["subject_id"],
                    "file": str(line.path),
                    "line": line.number,
                    "offset": line.offset,
                }
            )
        self.counts |= {name: Counter({"lines": len(items)}) for name, items in splits.items() if items}
        _warn_of_leakage(splits, "subject_id", "subjects")
        _warn_of_leakage(splits, "image_path", "images")
        return splits

    def record(self, item: dict) -> dict:
        with open(item["file"], "rb") as file:
            file.seek(item["offset"])
            line = _Line(Path(item["file"]), item["line"], item["offset"], file.readline())
        path = item["image_path"]
        try:
            height, width = _size(path)
        except RejectedRecord as error:
            raise RejectedRecord(f"{line.where}: {error}") from error
        columns = line.columns(self.CLASSES)
        for name, length in (("height", height), ("width", width)):
            if columns[name] not in (None, length):
                raise RejectedRecord(
                    f"{line.where}: {name} is {columns[name]}, but the image has {width} x {height} pixels (width x "
                    "height), and boxes are in pixels of the image"
                )

        def inside(box: Sequence[float], what: str) -> list[float]:
            if (clipped := clipped_box(box, height, width)) is None:
                shown = ", ".join(f"{value:g}" for value in box)
                raise RejectedRecord(
                    f"{line.where}: the box of {what} ({shown}) is outside the image, which has {width} x {height} "
                    "pixels (width x height)"
                )
            return clipped

        if columns["anatomy_boxes"] is not None:
            boxes = columns["anatomy_boxes"]
            columns["anatomy_present"] = [box is not None for box in boxes]
            columns["anatomy_boxes"] = [
                [0.0] * 4 if box is None else inside(box, name) for name, box in zip(ANATOMY_NAMES, boxes, strict=True)
            ]
        if columns["objects"] is not None:
            columns["objects"] = [
                found | {"bbox": inside(found["bbox"], self.CLASSES[found["category"]])}
                for found in columns["objects"]
            ]
        return empty_record(**columns | {"image": path, "height": height, "width": width})

    def load_image(self, path: str | Path) -> np.ndarray:
        try:
            return np.rint(load_image(path) * 255).astype(np.uint8)
        except ChexInputError as error:
            raise RejectedRecord(str(error)) from error
        except Exception as error:  # damaged files raise nearly anything
            raise RejectedRecord(f"{path} cannot be decoded ({type(error).__name__}: {error})") from error

    def image_file(self, path: str | Path) -> str:
        if not _is_dicom(path):
            with PIL.Image.open(path) as image:
                # 16 bits and more would be cut off at 255 where they are shown or trained on.
                if not image.mode.startswith(("I", "F")):
                    return str(path)
        return self.png_file(path)

    def _lines(self) -> Iterator["_Line"]:
        folder = self.folders["own"]
        files = [folder / name for name in (*_SPLIT_FILES, *_WHOLE_FILES) if (folder / name).is_file()]
        found = ", ".join(sorted(path.name for path in folder.glob("*.jsonl")))
        if not files or (len(files) > 1 and any(path.name in _WHOLE_FILES for path in files)):
            raise ValueError(
                f"{self.TITLE}: {folder} must hold one file for each split ({', '.join(_SPLIT_FILES)}) or one for all "
                f"({' or '.join(_WHOLE_FILES)}); it holds {found}."
            )
        for path in files:
            offset = 0
            with open(path, "rb") as file:
                for number, content in enumerate(file, start=1):
                    if content.strip():
                        yield _Line(path, number, offset, content)
                    offset += len(content)

    def _classes(self) -> tuple[str, ...]:
        folder = self.folders["own"]
        json_file, text_file = folder / "classes.json", folder / "classes.txt"
        if json_file.is_file():
            path = json_file
        elif text_file.is_file():
            path = text_file
        else:
            return tuple(sorted({name for line in self._lines() for name in line.class_names()}))
        try:
            text = path.read_text(encoding="utf-8-sig")
            names = (
                json.loads(text) if path == json_file else [name.strip() for name in text.splitlines() if name.strip()]
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not {'JSON' if path == json_file else 'text'} in UTF-8 ({error}).") from error
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"{path} must be a list of class names.")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{path} lists {', '.join(repeated)} more than once.")
        return tuple(names)


class _Line:
    """
    One line of a file, which describes one image.

    Raises:
        ValueError: The line is not a JSON object with known keys and the key `image`.
    """

    def __init__(self, path: Path, number: int, offset: int, content: bytes) -> None:
        self.path, self.number, self.offset = path, number, offset
        try:
            self.values = json.loads(content.decode("utf-8-sig" if number == 1 else "utf-8"))
            if b"\\u" in content:  # halves of characters, which no file can hold
                json.dumps(self.values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            self.fail(f"this is not a JSON object on one line ({error})")
        self._check_keys(self.values, KEYS, "the line")
        if not isinstance(self.values.get("image"), str) or not self.values["image"]:
            self.fail("`image` must be the path of the image, relative to the folder of this file")

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.number}"

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.where}: {problem}.")

    @property
    def split(self) -> str:
        """The split of the image: of its file, or else what the line says."""
        of_file = self.path.stem if self.path.name in _SPLIT_FILES else None
        split = self.values.get("split")
        if split is not None:
            self._index(split, SPLITS, "split")
            if of_file not in (None, split):
                self.fail(f"`split` is {split!r} in the file of another split")
        return of_file or split or "train"

    def class_names(self) -> set[str]:
        """The names of classes that occur; other things in their place are left to `columns`."""
        labels, regions = self.values.get("class_labels"), self.values.get("anatomy_labels")
        objects = self.values.get("objects")
        names = [
            *(labels if isinstance(labels, (list, dict)) else []),
            *(
                name
                for present in (regions.values() if isinstance(regions, dict) else [])
                if isinstance(present, (list, dict))
                for name in present
            ),
            *(
                item.get("category")
                for item in (objects if isinstance(objects, list) else [])
                if isinstance(item, dict)
            ),
        ]
        return {name for name in names if isinstance(name, str)}

    def columns(self, classes: Sequence[str]) -> dict[str, Any]:
        """
        The columns of the common record, in which boxes may still be outside the image and absent regions are None.

        Raises:
            ValueError: Something is not as described in docs/own-data.md.
        """
        read: dict[str, Callable[[Any, str], Any]] = {
            **dict.fromkeys(IDS, self._identifier),
            "height": self._length,
            "width": self._length,
            "view": lambda value, what: self._index(value, VIEWS, what),
            "sentences": self._strings,
            "anatomy_boxes": lambda value, what: self._by_region(value, what, self._region_box, None),
            "anatomy_labels": lambda value, what: self._by_region(
                value, what, lambda item, region: self._labels(item, region, classes), [0] * len(classes)
            ),
            "anatomy_sentences": lambda value, what: self._by_region(value, what, self._strings, []),
            "objects": lambda value, what: self._objects(value, what, classes),
            "class_labels": lambda value, what: self._labels(value, what, classes),
        }
        columns = {
            key: read_value(value, f"`{key}`") if (value := self.values.get(key)) is not None else None
            for key, read_value in read.items()
        }
        columns["image"] = self.values["image"]
        columns["sample_id"] = columns["sample_id"] or self.values["image"]
        if columns["view"] is None:
            columns["view"] = -1
        if not classes:  # labels of no class say nothing
            columns["anatomy_labels"] = columns["class_labels"] = None
        return columns

    def _check_keys(self, value: Any, known: Sequence[str], what: str) -> None:
        if not isinstance(value, dict):
            self.fail(f"{what} must be a JSON object, but it is {_shown(value)}")
        for key in value:
            self._index(key, known, f"key of {what}")

    def _index(self, value: Any, known: Sequence[str], what: str) -> int:
        if value in known:
            return known.index(value)
        close = difflib.get_close_matches(str(value).lower(), [name.lower() for name in known], n=1)
        nearest = f"did you mean {next(name for name in known if name.lower() == close[0])!r}? " if close else ""
        self.fail(f"unknown {what} {_shown(value)}; {nearest}Known: {', '.join(known) or 'none'}")

    def _identifier(self, value: Any, what: str) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            self.fail(f"{what} must be a string or an integer, but it is {_shown(value)}")
        return str(value)

    def _length(self, value: Any, what: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.fail(f"{what} must be a number of pixels, but it is {_shown(value)}")
        return value

    def _list(self, value: Any, what: str) -> list:
        if not isinstance(value, list):
            self.fail(f"{what} must be a list, but it is {_shown(value)}")
        return value

    def _strings(self, value: Any, what: str) -> list[str]:
        for item in self._list(value, what):
            if not isinstance(item, str) or not item.strip():
                self.fail(f"{what} must hold sentences, but {_shown(item)} is none")
        return value

    def _box(self, value: Any, what: str) -> list[float]:
        numbers = value if isinstance(value, list) else []
        if len(numbers) != 4 or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
            self.fail(f"the box of {what} must be four numbers x0, y0, x1, y1 in pixels, but it is {_shown(value)}")
        box = [float(number) for number in numbers]
        if not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            self.fail(
                f"the box of {what} must be x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, but it is "
                f"{_shown(value)}"
            )
        return box

    def _region_box(self, value: Any, what: str) -> list[float] | None:
        """As `_box`; four zeros stand for an absent region, as in the common record."""
        return None if value == [0] * 4 else self._box(value, what)

    def _labels(self, value: Any, what: str, classes: Sequence[str]) -> list[int]:
        """Names of the present classes, or class name -> 0 or 1, to 0/1 for each class."""
        if not isinstance(value, (list, dict)):
            self.fail(f"{what} must be a list of class names or an object of class names with 0 or 1")
        labels = [0] * len(classes)
        for name in value:
            index = self._index(name, classes, f"class in {what}:")
            state = value[name] if isinstance(value, dict) else 1
            if state not in (0, 1):
                self.fail(f"{what}: {name!r} must be 0 or 1, but it is {_shown(state)}")
            labels[index] = int(state)
        return labels

    def _objects(self, value: Any, what: str, classes: Sequence[str]) -> list[dict]:
        objects = []
        for item in self._list(value, what):
            self._check_keys(item, _OBJECT_KEYS, f"an entry of {what}")
            category = self._index(item.get("category"), classes, f"category in {what}:")
            phrase = item.get("phrase") or ""
            if not isinstance(phrase, str):
                self.fail(f"the phrase of {item['category']} must be a string, but it is {_shown(phrase)}")
            box = self._box(item.get("bbox"), item["category"])
            objects.append({"bbox": box, "category": category, "phrase": phrase})
        return objects

    def _by_region(self, value: Any, what: str, read: Callable[[Any, str], Any], default: Any) -> list:
        """Region name -> value, or a list with one value for each of the 29 regions, to such a list."""
        if isinstance(value, list):
            if len(value) != len(ANATOMY_NAMES):
                self.fail(f"{what} as a list must have {len(ANATOMY_NAMES)} entries, but it has {len(value)}")
            value = dict(zip(ANATOMY_NAMES, value, strict=True))
        if not isinstance(value, dict):
            self.fail(f"{what} must be an object of region names, but it is {_shown(value)}")
        for region in value:
            self._index(region, ANATOMY_NAMES, f"region in {what}:")
        return [
            read(value[region], f"{region} in {what}") if value.get(region) is not None else default
            for region in ANATOMY_NAMES
        ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _warn_of_leakage(splits: Mapping[str, Iterable[dict]], key: str, title: str) -> None:
    """Warns of values that occur in several splits."""
    found: dict[str, set[str]] = {}
    for split, items in splits.items():
        for item in items:
            if item[key] is not None:
                found.setdefault(item[key], set()).add(split)
    shared = [f"{value} ({', '.join(sorted(names))})" for value, names in found.items() if len(names) > 1]
    if shared:
        logger.warning(
            "Own data: %d %s are in several splits, such as %s: results on held-out images will look too good.",
            len(shared),
            title,
            "; ".join(shared[:5]),
        )


def _is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM, also one without the usual marker."""
    try:
        return is_dicom(path) or (may_be_bare_dicom(path) and not _is_picture(path))
    except OSError as error:
        raise RejectedRecord(f"{path} cannot be opened ({error.strerror})") from error


def _is_picture(path: str | Path) -> bool:
    try:
        with PIL.Image.open(path):
            return True
    except PIL.UnidentifiedImageError:
        return False


def _size(path: str | Path) -> tuple[int, int]:
    return dicom_size(path) if _is_dicom(path) else image_size(path)


__all__ = ["KEYS", "OwnConfig", "OwnData"]
