"""What a data set holds: counts for each split, and a contact sheet of images with boxes, names and sentences."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from processing_chex.vocabulary import ANATOMY_NAMES
from training.data.prepared import REJECTED, PreparedInfo, check_folder, read_info
from training.data.raw import DroppedRecord, RejectedRecord
from training.data.record import VIEWS, record_classes


# Images of each split whose files are read when a raw download is inspected.
RAW_SAMPLE = 200
_TEXT = ("sample_id", "subject_id", "study_id")


@dataclass
class SplitStatistics:
    """
    Counts of one split. What a data set does not annotate stays empty.

    Attributes:
        images, subjects, studies: Distinct ones.
        views: View -> images.
        annotated: Column -> images in which it is not None.
        boxes, images_with_box: Class -> boxes of findings, and images with at least one.
        phrases: Boxes of findings with a phrase.
        class_labels: Class -> images in which it is present.
        regions: Anatomical region -> images in which it has a box.
        region_labels: Class -> pairs of image and region in which it is present.
        region_sentences: Region -> images in which something is written about it.
        sentences, words: Of all reports.
        sentences_per_report: Smallest, median and largest number.
    """

    images: int = 0
    subjects: int = 0
    studies: int = 0
    views: dict[str, int] = field(default_factory=dict)
    annotated: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, int] = field(default_factory=dict)
    images_with_box: dict[str, int] = field(default_factory=dict)
    phrases: int = 0
    class_labels: dict[str, int] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)
    region_labels: dict[str, int] = field(default_factory=dict)
    region_sentences: dict[str, int] = field(default_factory=dict)
    sentences: int = 0
    words: int = 0
    sentences_per_report: tuple[int, float, int] | None = None


@dataclass
class Inspection:
    """
    What was found in a prepared folder or a raw download.

    Attributes:
        title: Of the data set.
        place: Folder.
        note: What the numbers are based on.
        splits: Counts.
        filters: Split -> images left after each filter of the tables.
        left_out: Split -> reason -> images.
        notes: Split -> what was left out of records -> how often.
        rejected: (split, sample id, path, reason) of unusable images.
    """

    title: str
    place: str
    note: str
    classes: list[str]
    splits: dict[str, SplitStatistics]
    filters: dict[str, dict[str, int]]
    left_out: dict[str, dict[str, int]]
    notes: dict[str, dict[str, int]]
    rejected: list[list[str]]

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


class _Counter:
    """Adds up tables of the common record (without images) to `SplitStatistics`."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.result = SplitStatistics()
        self.ids: dict[str, set[str]] = {name: set() for name in _TEXT}
        self.views: Counter[int] = Counter()
        self.report_lengths: list[np.ndarray] = []
        count = len(classes)
        self.boxes, self.box_images, self.labels, self.region_labels = (np.zeros(count, dtype=int) for _ in range(4))
        self.regions, self.region_texts = (np.zeros(len(ANATOMY_NAMES), dtype=int) for _ in range(2))
        self.annotated: Counter[str] = Counter()

    def add(self, table: pa.Table) -> None:
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        self.result.images += table.num_rows
        for name in _TEXT:
            self.ids[name].update(columns[name].drop_null().to_pylist())
        self.views.update(columns["view"].fill_null(-1).to_pylist())
        for name in ("sentences", "anatomy_boxes", "anatomy_labels", "anatomy_sentences", "objects", "class_labels"):
            self.annotated[name] += table.num_rows - columns[name].null_count
        self._add_objects(columns["objects"])
        self._add_sentences(columns["sentences"])
        if width := len(self.classes):  # without classes, there are no labels
            self.labels += (_values(columns["class_labels"]).reshape(-1, width) == 1).sum(axis=0)
            self.region_labels += (_values(columns["anatomy_labels"]).reshape(-1, width) == 1).sum(axis=0)
        regions = len(ANATOMY_NAMES)
        self.regions += _values(columns["anatomy_present"]).astype(bool).reshape(-1, regions).sum(axis=0)
        lengths = pc.list_value_length(columns["anatomy_sentences"].flatten()).fill_null(0)
        self.region_texts += (lengths.to_numpy(zero_copy_only=False).reshape(-1, regions) > 0).sum(axis=0)

    def _add_objects(self, column: pa.Array) -> None:
        found = pc.list_flatten(column)
        categories = found.field("category").to_numpy(zero_copy_only=False).astype(int)
        self.boxes += np.bincount(categories, minlength=len(self.classes))
        images = pc.list_parent_indices(column).to_numpy()
        pairs = np.unique(np.stack([images, categories], axis=1), axis=0) if len(images) else np.zeros((0, 2), int)
        self.box_images += np.bincount(pairs[:, 1], minlength=len(self.classes))
        self.result.phrases += pc.sum(pc.greater(pc.utf8_length(found.field("phrase")), 0)).as_py() or 0

    def _add_sentences(self, column: pa.Array) -> None:
        texts = pc.list_flatten(column)
        self.result.sentences += len(texts)
        self.result.words += pc.sum(pc.count_substring_regex(texts, r"\S+")).as_py() or 0
        self.report_lengths.append(pc.list_value_length(column).drop_null().to_numpy())

    def finish(self) -> SplitStatistics:
        result, names = self.result, self.classes
        result.subjects, result.studies = len(self.ids["subject_id"]), len(self.ids["study_id"])
        known = {-1: "unknown", **dict(enumerate(VIEWS))}
        result.views = {known[value]: count for value, count in sorted(self.views.items(), reverse=True)}
        result.annotated = dict(self.annotated)
        if self.annotated["objects"]:
            result.boxes = dict(zip(names, self.boxes.tolist(), strict=True))
            result.images_with_box = dict(zip(names, self.box_images.tolist(), strict=True))
        if self.annotated["class_labels"]:
            result.class_labels = dict(zip(names, self.labels.tolist(), strict=True))
        if self.annotated["anatomy_boxes"]:
            result.regions = dict(zip(ANATOMY_NAMES, self.regions.tolist(), strict=True))
        if self.annotated["anatomy_labels"]:
            result.region_labels = dict(zip(names, self.region_labels.tolist(), strict=True))
        if self.annotated["anatomy_sentences"]:
            result.region_sentences = dict(zip(ANATOMY_NAMES, self.region_texts.tolist(), strict=True))
        lengths = np.concatenate(self.report_lengths) if self.report_lengths else np.zeros(0)
        if len(lengths):
            result.sentences_per_report = int(lengths.min()), float(np.median(lengths)), int(lengths.max())
        return result


def _values(column: pa.Array) -> np.ndarray:
    """All numbers of a column of nested fixed-length lists, without rows that are None."""
    while pa.types.is_nested(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)


def inspect_prepared(folder: str | Path) -> Inspection:
    """
    Counts of a prepared folder.

    Raises:
        FileNotFoundError, ValueError: The folder is incomplete or damaged.
    """
    info = read_info(folder)
    check_folder(folder, info)
    splits = {}
    for name, split in info.splits.items():
        counter = _Counter(info.classes)
        for shard in split.shards:
            file = pq.ParquetFile(Path(folder) / shard.file)
            if file.metadata.num_rows:
                counter.add(file.read(columns=[column for column in file.schema_arrow.names if column != "image"]))
        splits[name] = counter.finish()
    with (Path(folder) / REJECTED).open(encoding="utf-8", newline="") as file:
        rejected = list(csv.reader(file))[1:]
    size = sum(shard.bytes for shard in info.shards)
    return Inspection(
        title=info.title,
        place=str(folder),
        note=f"Prepared at {info.size} pixels, {len(info.shards):,} shards, {size / 1e9:.2f} GB.",
        classes=list(info.classes),
        splits=splits,
        filters=info.filters,
        left_out={name: split.dropped for name, split in info.splits.items()},
        notes={name: split.notes for name, split in info.splits.items()},
        rejected=rejected,
    )


def inspect_raw(
    name: str,
    data_dir: str | Path | None = None,
    options: Mapping[str, object] | None = None,
    sample: int = RAW_SAMPLE,
) -> tuple[Inspection, list[dict]]:
    """
    Counts of a raw download: the filters of its tables for all images, everything else for a sample of each split.

    Returns:
        The counts, and the records that they are based on, with the decoded image as (H, W) uint8.

    Raises:
        FileNotFoundError, ValueError: As the builder of the data set.
    """
    import tempfile

    from training.data.preparation import read_record, source_class

    with tempfile.TemporaryDirectory(prefix="chex-inspect-") as cache:
        arguments = {"data_dir": data_dir and str(data_dir), "cache_dir": cache, **(options or {})}
        builder = source_class(name)(**arguments)
        features = datasets.Features({key: value for key, value in builder.info.features.items() if key != "image"})
        classes = record_classes(features)
        splits, left_out, notes, rejected, records = {}, {}, {}, [], []
        for split, items in builder.items().items():
            counter, dropped, rows = _Counter(classes), Counter(), []
            builder.notes.clear()
            for index in spread(len(items), sample):
                item = items[index]
                try:
                    record = read_record(builder, item)
                except DroppedRecord as error:
                    dropped[str(error)] += 1
                except RejectedRecord as error:
                    rejected.append([split, item["sample_id"], str(item.get("image_path", "")), str(error)])
                else:
                    rows.append(features.encode_example({key: record[key] for key in features}))
                    records.append(record | {"split": split, "view": rows[-1]["view"], "objects": rows[-1]["objects"]})
            if rows:
                counter.add(pa.Table.from_pylist(rows, schema=features.arrow_schema))
            splits[split], left_out[split], notes[split] = counter.finish(), dict(dropped), dict(builder.notes)
    inspection = Inspection(
        title=builder.TITLE,
        place=", ".join(str(folder) for folder in dict.fromkeys(getattr(builder, "folders", {}).values())),
        note=f"Raw files; everything but the filters is counted in at most {sample:,} images of each split.",
        classes=classes,
        splits=splits,
        filters={split: dict(counts) for split, counts in builder.counts.items()},
        left_out=left_out,
        notes=notes,
        rejected=rejected,
    )
    return inspection, records


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, evenly spread."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def sample_records(folder: str | Path, count: int, split: str | None = None) -> list[dict]:
    """
    Records of a prepared folder, evenly spread over a split (default: the first).

    Raises:
        FileNotFoundError, ValueError: The folder is incomplete or damaged, or there is no such split.
    """
    info: PreparedInfo = read_info(folder)
    check_folder(folder, info)
    split = split or next(iter(info.splits))
    if split not in info.splits:
        raise ValueError(f"{folder} has no split {split!r}. It has: {', '.join(info.splits)}.")
    shards = info.splits[split].shards
    starts = np.cumsum([0, *(shard.records for shard in shards)])
    records = []
    for index in spread(int(starts[-1]), count):
        number = int(np.searchsorted(starts, index, side="right")) - 1
        row = index - int(starts[number])
        file = pq.ParquetFile(Path(folder) / shards[number].file)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                records.append(file.read_row_group(group).slice(row, 1).to_pylist()[0])
                break
            row -= rows
    return records


def show(inspection: Inspection, console: Console) -> None:
    """Print an inspection as tables."""
    console.print(f"[bold]{inspection.title}[/bold]  {inspection.place}", highlight=False)
    console.print(inspection.note, highlight=False)
    splits = inspection.splits

    def table(title: str, names: Sequence[str], cell: Callable[[SplitStatistics, str], str], first: str = "") -> None:
        if not names:
            return
        grid = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        grid.add_column(first)
        for split in splits:
            grid.add_column(split, justify="right")
        for name in names:
            grid.add_row(name, *(cell(statistics, name) for statistics in splits.values()))
        console.print()
        console.print(grid)

    def names_of(attribute: str) -> list[str]:
        return list(dict.fromkeys(name for split in splits.values() for name in getattr(split, attribute)))

    def plain(attribute: str) -> Callable[[SplitStatistics, str], str]:
        return lambda split, name: _count(getattr(split, attribute).get(name))

    overview = {
        "images": lambda split: _count(split.images),
        "subjects": lambda split: _count(split.subjects),
        "studies": lambda split: _count(split.studies),
        **{f"view {view}": lambda split, view=view: _count(split.views.get(view, 0)) for view in names_of("views")},
        "with report": lambda split: _count(split.annotated.get("sentences")),
        "sentences": lambda split: _count(split.sentences),
        "sentences per report (min, median, max)": lambda split: (
            "{}, {:g}, {}".format(*split.sentences_per_report) if split.sentences_per_report else "-"
        ),
        "words per sentence": lambda split: f"{split.words / split.sentences:.1f}" if split.sentences else "-",
        "with anatomy": lambda split: _count(split.annotated.get("anatomy_boxes")),
        "boxes of findings": lambda split: _count(sum(split.boxes.values()) if split.boxes else None),
        "... with a phrase": lambda split: _count(split.phrases if split.boxes else None),
    }
    table("Overview", list(overview), lambda split, name: overview[name](split))
    table(
        "Boxes of findings (images)",
        names_of("boxes"),
        lambda split, name: (
            f"{_count(split.boxes.get(name))} ({_count(split.images_with_box.get(name))})" if split.boxes else "-"
        ),
        "class",
    )
    table("Images with the label", names_of("class_labels"), plain("class_labels"), "class")
    table(
        "Regions: present (with sentences)",
        names_of("regions"),
        lambda split, name: (
            f"{_count(split.regions.get(name))} ({_count(split.region_sentences.get(name))})" if split.regions else "-"
        ),
        "region",
    )
    table("Regions with the label", names_of("region_labels"), plain("region_labels"), "class")
    console.print()
    for split, filters in inspection.filters.items():
        if filters:
            steps = " -> ".join(f"{count:,} {stage}" for stage, count in filters.items())
            console.print(f"Filters, {split}: {steps}", highlight=False, markup=False)
    for split, reasons in inspection.left_out.items():
        for reason, count in reasons.items():
            console.print(f"Images left out, {split}: {count:,}: {reason}", highlight=False, markup=False)
    for split, notes in inspection.notes.items():
        for what, count in notes.items():
            console.print(f"Left out of records, {split}: {count:,} {what}", highlight=False, markup=False)
    console.print(f"Unusable images: {len(inspection.rejected):,}", highlight=False)
    for split, sample, path, reason in inspection.rejected[:10]:
        console.print(f"  {split} {sample} {path}: {reason}", highlight=False, markup=False)
    if len(inspection.rejected) > 10:
        console.print(f"  and {len(inspection.rejected) - 10:,} more", highlight=False)


def _count(value: int | None) -> str:
    return f"{value:,}" if value else ("-" if value is None else "0")


# Light colours that are told apart on grey and carry black text.
_PALETTE = (
    (255, 128, 102),
    (96, 214, 140),
    (110, 178, 255),
    (255, 209, 77),
    (214, 150, 255),
    (64, 224, 224),
    (255, 156, 208),
    (190, 226, 96),
    (255, 178, 110),
    (176, 196, 255),
)
_BACKGROUND, _TEXT_COLOUR, _FAINT = (18, 18, 20), (235, 235, 235), (150, 150, 155)
_GAP, _FONT_SIZE, _CAPTION_LINES = 10, 13, 3


def contact_sheet(
    records: Sequence[Mapping], classes: Sequence[str], columns: int = 4, tile: int = 360, boxes: str = "auto"
) -> PIL.Image.Image:
    """
    Several records on one sheet: the image with boxes and their names, below it the id and a sentence.

    Args:
        records: Of the common record; the image as PNG bytes, PIL image or (H, W) uint8.
        classes: Finding classes in index order.
        columns: Images in a row.
        tile: Side of the square that each image is fitted into, in pixels.
        boxes: "findings", "anatomy", "none", or "auto" for findings where they are annotated, else anatomy.

    Raises:
        ValueError: There are no records, or `boxes` is none of the above.
    """
    if not records:
        raise ValueError("A contact sheet needs at least one record.")
    if boxes not in ("auto", "findings", "anatomy", "none"):
        raise ValueError(f"boxes must be 'auto', 'findings', 'anatomy' or 'none', got {boxes!r}.")
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + 5
    columns = min(columns, len(records))
    height = tile + line * (1 + _CAPTION_LINES) + 6
    rows = -(-len(records) // columns)
    sheet = PIL.Image.new("RGB", (columns * (tile + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, record in enumerate(records):
        left, top = _GAP + number % columns * (tile + _GAP), _GAP + number // columns * (height + _GAP)
        sheet.paste(_tile(record, classes, tile, boxes, font), (left, top))
        view = record["view"]
        view = VIEWS[view] if isinstance(view, int) and view >= 0 else view if isinstance(view, str) else ""
        # The end of an id tells images apart.
        title = _fit(f"{record['sample_id']}", tile - 30, font, keep_end=True)
        draw.text((left, top + tile + 3), title, fill=_FAINT, font=font)
        draw.text((left + tile, top + tile + 3), view, fill=_FAINT, font=font, anchor="ra")
        for index, text in enumerate(_wrap(_caption(record, classes), tile, font)):
            draw.text((left, top + tile + 3 + line * (index + 1)), text, fill=_TEXT_COLOUR, font=font)
    return sheet


def _tile(
    record: Mapping, classes: Sequence[str], side: int, boxes: str, font: ImageFont.FreeTypeFont
) -> PIL.Image.Image:
    image = record["image"]
    if isinstance(image, Mapping):
        image = PIL.Image.open(io.BytesIO(image["bytes"]))
    elif isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    tile = PIL.Image.new("RGB", (side, side), (0, 0, 0))
    origin = ((side - size[0]) // 2, (side - size[1]) // 2)
    tile.paste(image.convert("L").resize(size, PIL.Image.Resampling.BICUBIC).convert("RGB"), origin)
    # Boxes are in pixels of the original.
    factors = (size[0] / (record["width"] or image.width), size[1] / (record["height"] or image.height))
    draw = ImageDraw.Draw(tile)
    labels: list[tuple[tuple[float, float], str, tuple[int, int, int]]] = []

    def outline(box: Sequence[float], colour: tuple[int, int, int], width: int) -> tuple[float, float]:
        x0, y0, x1, y1 = (origin[axis % 2] + value * factors[axis % 2] for axis, value in enumerate(box))
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        return x0, y0

    if boxes in ("auto", "findings") and record["objects"] is not None:
        for found in record["objects"]:
            category = found["category"]
            index = classes.index(category) if isinstance(category, str) else category
            colour = _PALETTE[index % len(_PALETTE)]
            labels.append((outline(found["bbox"], colour, 2), classes[index], colour))
    elif boxes in ("auto", "anatomy") and record["anatomy_boxes"] is not None:
        # The regions with findings by name, the others as thin lines.
        marks = record["anatomy_labels"] or [[0]] * len(ANATOMY_NAMES)
        order = sorted(range(len(ANATOMY_NAMES)), key=lambda region: any(mark == 1 for mark in marks[region]))
        for region in order:
            if not record["anatomy_present"][region]:
                continue
            colour = _PALETTE[region % len(_PALETTE)]
            marked = any(mark == 1 for mark in marks[region])
            corner = outline(record["anatomy_boxes"][region], colour, 2 if marked else 1)
            if marked:
                labels.append((corner, ANATOMY_NAMES[region], colour))
    _draw_labels(draw, labels, side, font)
    return tile


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    labels: Sequence[tuple[tuple[float, float], str, tuple[int, int, int]]],
    side: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Names on coloured ground at the corners of their boxes, moved down where one would cover another."""
    height = _FONT_SIZE + 4
    taken: list[tuple[float, float, float, float]] = []
    for (x, y), text, colour in sorted(labels, key=lambda label: label[0][1]):
        width = font.getlength(text) + 6
        x = min(max(x, 0), side - width)
        y = min(max(y - height, 0), side - height)
        for _ in range(side // height):
            if not any(x < x1 and x0 < x + width and y < y1 and y0 < y + height for x0, y0, x1, y1 in taken):
                break
            y = y + height if y + 2 * height <= side else 0
        taken.append((x, y, x + width, y + height))
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + 3, y + 1), text, fill=(0, 0, 0), font=font)


def _caption(record: Mapping, classes: Sequence[str]) -> str:
    """Something that is written about the image, else the labels that it has."""
    phrases = dict.fromkeys(found["phrase"] for found in record["objects"] or () if found["phrase"])
    if phrases:
        return " / ".join(phrases)
    if record["sentences"]:
        return " ".join(record["sentences"])
    for name, sentences in zip(ANATOMY_NAMES, record["anatomy_sentences"] or (), strict=False):
        if sentences:
            return f"{name}: {' '.join(sentences)}"
    if record["class_labels"] is not None:
        found = [name for name, label in zip(classes, record["class_labels"], strict=True) if label == 1]
        return ", ".join(found) or "no class present"
    return ""


def _wrap(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than `width`; what does not fit into the caption is cut off with dots."""
    lines = [""]
    words = text.split()
    for position, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < _CAPTION_LINES:
            lines.append(word)
        else:
            lines[-1] = _fit(" ".join([lines[-1], *words[position:]]), width, font)
            break
    return [_fit(line, width, font) for line in lines]


def _fit(text: str, width: float, font: ImageFont.FreeTypeFont, keep_end: bool = False) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text.rstrip()}..."


__all__ = [
    "Inspection",
    "SplitStatistics",
    "contact_sheet",
    "inspect_prepared",
    "inspect_raw",
    "sample_records",
    "show",
    "spread",
]
