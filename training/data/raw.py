"""What the builders of all real data sets share: finding raw folders, reading their tables, going through images."""

import csv
import gzip
import hashlib
import io
import logging
import os
import re
import stat
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import pydicom

from training.data.record import record_features


logger = logging.getLogger(__name__)

# Bumped when the same raw files would give other records.
RECORD_VERSION = "2"
SPLITS = ("train", "validation", "test")
MISSING = "the image file is missing"
SKIP_HINT = "Images that are missing or damaged are left out with --option missing=skip (in Python missing='skip')."
# Folders of images, or of one file for each image: nothing else is to be found in them.
_IMAGE_FOLDER = re.compile(r"files|images([_-].*)?|scene_graph|train|test|p\d{2}|p\d{8}|s\d{8}")
_SEARCH_DEPTH = 5
# Headers of NIH name several columns as "Bbox [x,y,w,h]"; copies made by csv writers put that in quotes.
_LISTED_NAMES = re.compile(r",(?=[^\[\]]*\])")


class DroppedRecord(Exception):
    """An image that the paper's rules leave out. The message is a short reason, the same for all such images."""


class RejectedRecord(Exception):
    """An image that cannot be used because its files are missing, damaged or contradictory; the message says why."""


@dataclass(frozen=True)
class Source:
    """
    A raw download that a data set is read from.

    Attributes:
        key: Short name; the builder configuration has a field `{key}_dir`.
        title: As in messages.
        variable: Environment variable that names its folder.
        markers: Patterns of files relative to its root; one match of each tells that a folder is this root.
        tree: What is expected in it, for messages.
        url: Where it is to be had.
    """

    key: str
    title: str
    variable: str
    markers: tuple[str, ...]
    tree: str
    url: str

    def matches(self, folder: Path) -> bool:
        return all(next(folder.glob(marker), None) is not None for marker in self.markers)

    def find(self, folder: str | Path) -> Path | None:
        """The root at or below a folder: whatever levels an archive or a downloader has added are passed."""
        level = [Path(folder)]
        for _ in range(_SEARCH_DEPTH + 1):
            for candidate in level:
                if self.matches(candidate):
                    return candidate
            level = [child for parent in level for child in _subfolders(parent)]
        return None


def _subfolders(folder: Path) -> list[Path]:
    """Folders to search below a folder, sorted; none if it may not be read."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except PermissionError:
        return []
    # `wget -r` stores PhysioNet's data sets in physionet.org/files.
    return [folder / name for name in names if folder.name == "physionet.org" or not _IMAGE_FOLDER.fullmatch(name)]


@dataclass
class RawConfig(datasets.BuilderConfig):
    """
    Configuration of a data set that is read from raw downloads; subclasses add one `{key}_dir` for each source.

    Args:
        missing: "error" to stop when files of images are missing, "skip" to leave these images out.
        fingerprint: Of the raw tables and the reading code, set by the builder: changed files are a new build.
    """

    name: str = "default"
    missing: str = "error"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.missing not in ("error", "skip"):
            raise ValueError(f"{type(self).__name__}.missing must be 'error' or 'skip', not {self.missing!r}.")


class RawBuilder(datasets.GeneratorBasedBuilder):
    """
    Builder of a data set from raw downloads. Images stay where they are: records hold their absolute paths.

    Each source is looked for in its own `{key}_dir`, else below `data_dir`, else in its environment variable.

    Raises:
        FileNotFoundError: At construction, if a source is nowhere; the message lists the folders that were searched
            and what was expected there. When building, if images are missing.
        ValueError: For an unknown argument, or tables that are not what they should be.
    """

    DATASET: ClassVar[str]  # name on the command line
    TITLE: ClassVar[str]
    SOURCES: ClassVar[tuple[Source, ...]]
    CLASSES: ClassVar[tuple[str, ...]]
    BUILDER_CONFIG_CLASS = RawConfig
    DEFAULT_CONFIG_NAME = "default"
    VERSION = datasets.Version("1.0.0")

    def __init__(self, *args: object, **kwargs: object) -> None:
        if kwargs.get("config_name", "default") != "default" or (args[1:] and args[1] != "default"):
            raise ValueError(f"{type(self).__name__} has the one configuration 'default'; set its fields instead.")
        self.folders = self._find_sources(kwargs)
        kwargs |= {f"{key}_dir": str(folder) for key, folder in self.folders.items()}
        kwargs["fingerprint"] = self._fingerprint()
        super().__init__(*args, **kwargs)
        # `datasets` sets the fields of a copied configuration one by one, past its own check.
        self.config.__post_init__()
        self.counts: dict[str, Counter[str]] = {}
        self.notes: Counter[str] = Counter()

    def _find_sources(self, kwargs: Mapping[str, object]) -> dict[str, Path]:
        folders = {}
        for source in self.SOURCES:
            given = kwargs.get(f"{source.key}_dir")
            tried = [given] if given else [kwargs.get("data_dir"), os.environ.get(source.variable)]
            found = next(
                (
                    root
                    for folder in tried
                    if folder and Path(folder).is_dir()
                    for root in [source.find(folder)]
                    if root
                ),
                None,
            )
            if found is None:
                raise FileNotFoundError(source_not_found(self.TITLE, source, [folder for folder in tried if folder]))
            folders[source.key] = found.resolve()
        return folders

    def _fingerprint(self) -> str:
        """Digest of what decides the records besides the images: size and time of the tables, version of the code."""
        digest = hashlib.sha256(RECORD_VERSION.encode())
        for path in self.table_files():
            status = path.stat()
            digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def table_files(self) -> list[Path]:
        """Files, other than those of single images, that the records are made from."""
        return [
            path
            for source in self.SOURCES
            for marker in source.markers
            for path in sorted(self.folders[source.key].glob(marker))
            if path.is_file()
        ]

    @abstractmethod
    def split_items(self) -> dict[str, list[dict]]:
        """
        Split name -> one small picklable dict for each image in a fixed order, with at least `sample_id` and
        `image_path` (absolute, str). Reads tables only; fills `self.counts[split]` with the images that were left
        after each filter, in the order of the filters.
        """

    @abstractmethod
    def record(self, item: dict) -> dict:
        """
        The common record of one item, with the path of its image; may read the files of this one image. Counts in
        `self.notes` what was left out of records (boxes, labels) and why.

        Raises:
            DroppedRecord: By a rule of the paper.
            RejectedRecord: Something is wrong with the files of this image.
        """

    def load_image(self, path: str | Path) -> np.ndarray:
        """Decodes one raw image to uint8 (H, W); raises RejectedRecord if it cannot be decoded."""
        return load_grey(path)

    def image_file(self, path: str | Path) -> str:
        """An image file that `datasets` can decode, for a raw image."""
        return str(path)

    def png_file(self, path: str | Path) -> str:
        """
        An 8-bit PNG file of a raw image that `datasets` cannot decode: made once, and kept in the folder `png` of this
        builder in the cache (never beside the raw files).
        """
        status = Path(path).stat()
        key = hashlib.sha256(f"{path}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]
        target = Path(self.cache_dir).parents[1] / "png" / f"{Path(path).stem}-{key}.png"
        if not target.exists():
            image = PIL.Image.fromarray(self.load_image(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.part")
            image.save(partial, format="PNG")
            partial.replace(target)
        return str(target)

    def items(self) -> dict[str, list[dict]]:
        """`split_items`, without empty splits and checked for duplicated ids.

        Raises:
            ValueError: Nothing is left after the filters, or ids are duplicated.
        """
        splits = self.split_items()
        for name, items in splits.items():
            repeated = [key for key, count in Counter(item["sample_id"] for item in items).items() if count > 1]
            if repeated:
                raise ValueError(
                    f"{self.TITLE}: {len(repeated)} images stand more than once in the {name} split, such as "
                    f"{', '.join(repeated[:3])}. The tables were damaged or put together twice: download them again."
                )
        if not any(splits.values()):
            raise ValueError(f"{self.TITLE}: no images are left after the filters.\n{self.funnel()}")
        for name in [name for name, items in splits.items() if not items and any(self.counts.get(name, {}).values())]:
            logger.warning("%s: no images are left in the %s split.\n%s", self.TITLE, name, self.funnel())
        return {name: items for name, items in splits.items() if items}

    def funnel(self) -> str:
        """How many images were left after each filter, one line for each split."""
        lines = []
        for split, counts in self.counts.items():
            lines.append(f"{split}: " + " -> ".join(f"{count:,} {stage}" for stage, count in counts.items()))
        return "\n".join(lines)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.TITLE, features=record_features(self.CLASSES))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        splits = self.items()
        if self.config.missing == "error":
            check_images_exist(self.TITLE, splits)
        return [datasets.SplitGenerator(name=name, gen_kwargs={"items": items}) for name, items in splits.items()]

    def _download_and_prepare(self, dl_manager: datasets.DownloadManager, *args: object, **kwargs: object) -> None:
        super()._download_and_prepare(dl_manager, *args, **kwargs)
        # `datasets` cannot open a split without records.
        empty = [name for name, split in self.info.splits.items() if not split.num_examples]
        if len(empty) == len(self.info.splits):
            raise ValueError(
                f"{self.TITLE}: no images are left after their files were read; warnings say why.\n{self.funnel()}"
            )
        for name in empty:
            logger.warning("%s: no images are left in the %s split.\n%s", self.TITLE, name, self.funnel())
            del self.info.splits[name]

    def _generate_examples(self, items: list[dict]) -> Iterator[tuple[str, dict]]:
        left_out: Counter[str] = Counter()
        for item in items:
            try:
                if is_missing(item["image_path"]):
                    raise RejectedRecord(MISSING)
                record = self.record(item)
                record["image"] = self.image_file(record["image"])
            except DroppedRecord as error:
                left_out[str(error)] += 1
                continue
            except RejectedRecord as error:
                if self.config.missing == "error":
                    raise ValueError(
                        f"{self.TITLE}: {item['sample_id']} cannot be used: {error}. {SKIP_HINT}"
                    ) from error
                left_out[str(error)] += 1
                continue
            yield item["sample_id"], record
        if left_out:
            reasons = "; ".join(f"{count:,}: {reason}" for reason, count in left_out.most_common(10))
            logger.warning("%s: %d images were left out (%s).", self.TITLE, left_out.total(), reasons)
        if self.notes:
            logger.warning("%s: left out of records: %s.", self.TITLE, notes_text(self.notes))
            self.notes.clear()


def notes_text(notes: Counter[str]) -> str:
    """What was left out of records, the most frequent first."""
    return "; ".join(f"{count:,} {what}" for what, count in notes.most_common(20))


def is_missing(path: str | Path) -> bool:
    """Whether there is no such file. In a folder that may not be read it counts as there: opening it says why not."""
    try:
        # Not Path.is_file: `datasets` replaces `Path` in modules of builders by one that hides missing permissions.
        return not stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return False
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        return True


def check_images_exist(title: str, splits: Mapping[str, Sequence[dict]], allowed_percent: float = 0.0) -> None:
    """
    Raises:
        FileNotFoundError: More images are missing than allowed; names the first five and how many there are.
    """
    items = [item for of_split in splits.values() for item in of_split]
    missing = [item for item in items if is_missing(item["image_path"])]
    if len(missing) > allowed_percent / 100 * len(items):
        examples = (
            item["image_path"] + (f" ({item['file']}, line {item['line']})" if "line" in item else "")
            for item in missing[:5]
        )
        raise FileNotFoundError(
            f"{title}: {len(missing):,} of {len(items):,} images are missing, such as {', '.join(examples)}. Complete "
            f"the download, or correct the paths. {SKIP_HINT}"
        )


def source_not_found(title: str, source: Source, tried: Sequence[object]) -> str:
    """The message for a source that is in none of the folders `tried`."""
    places = ", ".join(
        f"{folder}{'' if Path(str(folder)).is_dir() else ' (which does not exist)'}" for folder in tried
    )
    searched = f"Searched {places} and {_SEARCH_DEPTH} levels of folders below." if tried else "No folder was given."
    return (
        f"{title} needs {source.title}, which was not found. {searched} Expected: {source.tree}. Name its folder by "
        f"{source.key}_dir or the environment variable {source.variable}; it is to be had from {source.url}."
    )


def read_bytes(path: Path) -> bytes:
    """
    Content of a file, unpacked if its name ends with .gz.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It may not be read, is empty, is a web page that was saved in its place, or cannot be unpacked.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: complete the download.") from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): correct its permissions or copy it again."
        ) from error
    head = data[:512].lstrip()
    if not data:
        raise ValueError(f"{path} is empty: download it again.")
    if head[:1] == b"<" and b"html" in head.lower():
        raise ValueError(f"{path} {login_page_hint()}")
    if path.suffix != ".gz":
        return data
    if data[:2] != b"\x1f\x8b":
        raise ValueError(f"{path} is not a gzip file although its name says so; it {login_page_hint('may be')}")
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): download it again.") from error


def login_page_hint(verb: str = "is") -> str:
    return (
        f"{verb} a saved web page rather than data: access is not granted to this account, or the download was not "
        "logged in. Ask for access on the page of the data set and download the file again."
    )


def read_table(path: Path, columns: Iterable[str], hint: str = "") -> list[dict[str, str]]:
    """
    Rows of a csv file (or .csv.gz) as dicts of strings; blanks around header names are removed. Columns without a name
    at the end of the header are left out.

    Args:
        columns: Names that must be there; others are kept.
        hint: Added to the message if they are not.

    Raises:
        ValueError: Missing columns, a row of another length, or a file that is no csv; see also `read_bytes`.
    """
    return [row for _, row in read_numbered_table(path, columns, hint)]


def read_numbered_table(path: Path, columns: Iterable[str], hint: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of `read_table`, each with the number of its line in the file, for messages."""
    rows = _csv_rows(path, columns, hint)
    _, header = next(rows)
    for line, values in rows:
        yield line, dict(zip(header, values, strict=True))


def read_columns(path: Path, columns: Sequence[str], unique: str | None = None) -> dict[str, list[str]]:
    """
    Columns of a large csv file (or .csv.gz) as strings, otherwise like `read_table`.

    Args:
        unique: Column in which no value may stand twice.

    Raises:
        ValueError: As `read_table`, and repeated values.
    """
    rows = _csv_rows(path, columns)
    _, header = next(rows)
    values: dict[str, list[str]] = {name: [] for name in columns}
    targets = [(header.index(name), values[name].append) for name in columns]
    for _, row in rows:
        for index, append in targets:
            append(row[index])
    if unique and len(set(values[unique])) < len(values[unique]):
        repeated = [value for value, count in Counter(values[unique]).items() if count > 1]
        raise ValueError(
            f"{path}: {len(repeated):,} values of {unique} stand more than once, such as {', '.join(repeated[:3])}. "
            "The table was damaged or put together twice: download it again."
        )
    return values


def _csv_rows(path: Path, columns: Iterable[str], hint: str = "") -> Iterator[tuple[int, list[str]]]:
    """The header, then all rows, each as long as the header, with the numbers of their lines."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig", newline=""))
    try:
        header = [part.strip() for name in next(reader, []) for part in _LISTED_NAMES.split(name)]
        while header and not header[-1]:
            header.pop()
        if missing := [name for name in columns if name not in header]:
            raise ValueError(
                f"{path} lacks the columns {', '.join(missing)}; found: {', '.join(header) or 'none'}. "
                f"{hint or 'It is not the table of that name, or was edited: download it again.'}"
            )
        yield reader.line_num, header
        for values in reader:
            if not values:
                continue
            while len(values) > len(header) and not values[-1]:
                values.pop()
            if len(values) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(values)} fields where the header has {len(header)}. The "
                    "file is truncated or damaged: download it again."
                )
            yield reader.line_num, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a csv file in UTF-8 ({error}, after line {reader.line_num}): download it again."
        ) from error


def load_grey(path: str | Path, truncated: bool = False) -> np.ndarray:
    """
    Decodes an 8-bit image file to uint8 (H, W).

    Args:
        truncated: Accept a file that ends too early; what is missing is of one grey.

    Raises:
        RejectedRecord: The file is missing, empty, truncated, of more than 8 bits or no image.
    """
    before, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = PIL.ImageFile.LOAD_TRUNCATED_IMAGES, truncated
    try:
        with PIL.Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise RejectedRecord(f"the image has more than 8 bits (mode {image.mode}): use the original file")
            return np.asarray(image.convert("L"))
    except RejectedRecord:
        raise
    except FileNotFoundError as error:
        raise RejectedRecord(MISSING) from error
    except Exception as error:  # damaged files raise nearly anything
        raise RejectedRecord(f"the image cannot be decoded ({type(error).__name__}: {error})") from error
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before


def image_size(path: str | Path) -> tuple[int, int]:
    """
    Height and width of an image file from its header, as it is shown: its orientation tag is applied.

    Raises:
        RejectedRecord: The file is missing, empty or no image.
    """
    try:
        with PIL.Image.open(path) as image:
            turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError as error:
        raise RejectedRecord(MISSING) from error
    except Exception as error:  # damaged files raise nearly anything
        raise RejectedRecord(f"the image cannot be opened ({type(error).__name__}: {error})") from error


def dicom_size(path: str | Path) -> tuple[int, int]:
    """
    Height and width of a DICOM image from its header.

    Raises:
        RejectedRecord: The file is missing, damaged or has no image size.
    """
    try:
        header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
        if "Rows" not in header or "Columns" not in header:
            raise RejectedRecord("the file is damaged or holds no DICOM image: it has no image size")
        return int(header.Rows), int(header.Columns)
    except RejectedRecord:
        raise
    except FileNotFoundError as error:
        raise RejectedRecord(MISSING) from error
    except Exception as error:  # damaged files raise nearly anything
        raise RejectedRecord(f"the DICOM header cannot be read ({type(error).__name__}: {error})") from error


def clipped_box(box_xyxy: Sequence[float], height: int, width: int) -> list[float] | None:
    """The part of a box (pixels) inside an image; None if it is outside, empty, inverted or not a number."""
    x0, y0, x1, y1 = box_xyxy
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
    return [x0, y0, x1, y1] if x0 < x1 and y0 < y1 else None


def builder_options(builder: type[RawBuilder]) -> dict[str, object]:
    """Fields of the configuration that a user may set, with their defaults, without the folders."""
    own = {item.name: item.default for item in fields(builder.BUILDER_CONFIG_CLASS)}
    base = {item.name for item in fields(datasets.BuilderConfig)} | {"fingerprint"}
    return {name: value for name, value in own.items() if name not in base and not name.endswith("_dir")}


__all__ = [
    "SPLITS",
    "MISSING",
    "SKIP_HINT",
    "DroppedRecord",
    "RawBuilder",
    "RawConfig",
    "RejectedRecord",
    "Source",
    "builder_options",
    "check_images_exist",
    "clipped_box",
    "dicom_size",
    "image_size",
    "is_missing",
    "load_grey",
    "login_page_hint",
    "notes_text",
    "read_bytes",
    "read_columns",
    "read_table",
    "source_not_found",
]
