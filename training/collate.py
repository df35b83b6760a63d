"""From common records to batches of tensors: one data set, several mixed, or a stream of shards."""

import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_transforms import corners_to_center_format

from processing_chex.image_loading import load_image
from processing_chex.image_processing_chex import ChexImageProcessor, resize_frame
from processing_chex.vocabulary import ANATOMY_NAMES, LATERAL_PARTNERS
from training.data.record import record_classes


# Smaller boxes, relative to the square network input, are dropped.
MIN_BOX_SIDE = 1e-3
NUM_ANATOMIES = len(ANATOMY_NAMES)
TEXT_COLUMNS = ("sentences", "anatomy_sentences", "objects")
_OTHER_SIDE = {"left": "right", "right": "left"}
# As Pillow writes it: bare bytes follow, which are not worth a decoder.
_PGM = re.compile(rb"P5\n(\d+) (\d+)\n255\n")
_SIDE = re.compile(r"\b(?:left|right)(?=\b|ward|most\b|sided\b)", re.IGNORECASE)


class TextTable:
    """Distinct texts with their numbers, so that each is encoded and tokenised once; -1 stands for no text."""

    def __init__(self, texts: Iterable[str] = ()):
        self.ids: dict[str, int] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> list[str]:
        return list(self.ids)

    def add(self, text: str) -> int:
        return self.ids.setdefault(text, len(self.ids))

    def add_records(self, records: datasets.Dataset) -> None:
        """Adds all texts of records: sentences, those of each anatomy alone and joined, and phrases."""
        for part in records.select_columns(list(TEXT_COLUMNS)).with_format("arrow").iter(1000):
            self._add_columns(part)

    def add_shards(self, shards: Iterable[str | Path]) -> None:
        """The same for records in Parquet files, of which only the columns with texts are read."""
        for shard in shards:
            for part in pq.ParquetFile(shard).iter_batches(1000, columns=list(TEXT_COLUMNS)):
                self._add_columns(part)
        pa.default_memory_pool().release_unused()  # or every worker that is forked later copies it

    def _add_columns(self, table: pa.Table | pa.RecordBatch) -> None:
        for sentences in table["sentences"].to_pylist():
            for text in sentences or ():
                self.add(text)
        for regions in table["anatomy_sentences"].to_pylist():
            for sentences in filter(None, regions or ()):
                for text in (*sentences, " ".join(sentences)):
                    self.add(text)
        for phrase in pc.struct_field(pc.list_flatten(table["objects"]), "phrase").to_pylist():
            if phrase:
                self.add(phrase)

    def mirror_ids(self) -> Tensor:
        """
        For each text (U,) the number of the same text with left and right exchanged, which is added if it is new.
        Mirroring twice gives the first text again.
        """
        mirrored = [self.add(mirror_text(text)) for text in self.texts]
        return torch.tensor(mirrored + [self.ids[mirror_text(text)] for text in self.texts[len(mirrored) :]])


def mirror_text(text: str) -> str:
    """
    The text with the words left and right exchanged, in their capitalisation, also where they begin a longer word
    (leftward, right-sided). Abbreviations (L, R) stay, and what else the words may mean is not told apart.
    """

    def other(match: re.Match[str]) -> str:
        word = match.group()
        swapped = _OTHER_SIDE[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)


@dataclass
class Batch:
    """
    N images with what is annotated in them. Boxes are normalised cxcywh in the square network input. A anatomies, C
    classes, S sentences, T boxes of one class, K sentences of one anatomy; texts are numbers of a [`TextTable`]. What
    `has_...` excludes is not annotated: there it is unknown, elsewhere a missing box or label is a negative.

    Attributes:
        images (`uint8 (N, 1, H, W)`), index (`int64 (N,)`): Grey images and their numbers in the split.
        sentences (`int64 (N, S)`): Report sentences, -1 for none; has_sentences (`bool (N,)`).
        anatomy_boxes (`float32 (N, A, 4)`), anatomy_present (`bool (N, A)`): Zero boxes where absent.
        has_anatomy_boxes (`bool (N,)`).
        anatomy_labels (`bool (N, A, C)`), has_anatomy_labels (`bool (N, C)`).
        anatomy_sentences (`int64 (N, A, K)`): Sentences of each anatomy, -1 for none; has_anatomy_sentences
            (`bool (N,)`).
        anatomy_texts (`int64 (N, A)`): The same joined with blanks, -1 if there is none.
        class_labels (`bool (N, C)`), has_class_labels (`bool (N, C)`).
        class_boxes (`float32 (N, C, T, 4)`), class_box_mask (`bool (N, C, T)`), has_class_boxes (`bool (N, C)`).
        class_phrases (`int64 (N, C, T)`): What is written about each box, -1 if nothing is.
    """

    images: Tensor
    index: Tensor
    sentences: Tensor
    has_sentences: Tensor
    anatomy_boxes: Tensor
    anatomy_present: Tensor
    has_anatomy_boxes: Tensor
    anatomy_labels: Tensor
    has_anatomy_labels: Tensor
    anatomy_sentences: Tensor
    anatomy_texts: Tensor
    has_anatomy_sentences: Tensor
    class_labels: Tensor
    has_class_labels: Tensor
    class_boxes: Tensor
    class_box_mask: Tensor
    has_class_boxes: Tensor
    class_phrases: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(**{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()})

    def replace(self, **changed: Tensor) -> "Batch":
        return Batch(**vars(self) | changed)

    def blank(self) -> "Batch":
        """The same images, of which nothing is known any more; their number becomes -1."""
        changed = {name: torch.full_like(getattr(self, name), -1) for name in ("index", *_TEXT_FIELDS)}
        for name, value in vars(self).items():
            if name not in ("images", *changed):
                changed[name] = torch.zeros_like(value)
        return self.replace(**changed)

    def swap_sides(self, rows: Tensor, mirror_ids: Tensor) -> "Batch":
        """
        Names what is left in the images `rows` (bool (N,)) right and the other way round, for images that have been
        mirrored: partner anatomies change places, texts are replaced by their mirrored ones (`mirror_ids` (U,)).
        """
        partners = torch.tensor(LATERAL_PARTNERS, device=rows.device)
        changed = {}
        for name in ("anatomy_boxes", "anatomy_present", "anatomy_labels", "anatomy_sentences", "anatomy_texts"):
            changed[name] = getattr(self, name)[:, partners]
        for name in ("sentences", "anatomy_sentences", "anatomy_texts", "class_phrases"):
            texts = changed.get(name, getattr(self, name))
            changed[name] = mirror_ids[texts.clamp_min(0)].where(texts >= 0, -1)
        for name, value in changed.items():
            chosen = rows.view(-1, *[1] * (value.ndim - 1))
            changed[name] = torch.where(chosen, value, getattr(self, name))
        return self.replace(**changed)


_TEXT_FIELDS = ("sentences", "anatomy_sentences", "anatomy_texts", "class_phrases")


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of several, their ragged axes padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    joined = {}
    for item in fields(Batch):
        values = [getattr(batch, item.name) for batch in batches]
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        fill = -1 if item.name in _TEXT_FIELDS else 0
        padded = []
        for value in values:
            missing = [(0, longest - size) for size, longest in zip(value.shape[1:], shape, strict=True)]
            padding = [extra for pair in reversed(missing) for extra in pair]  # `pad` starts with the last axis
            padded.append(F.pad(value, padding, value=fill) if any(padding) else value)
        joined[item.name] = torch.cat(padded)
    return Batch(**joined)


class RecordReader:
    """
    Turns tables of common records into arrays of a [`Batch`].

    Args:
        features: Of the records; they name the classes of this data set.
        image_processor: Gives the geometry, and the size of the network input.
        texts: Knows the texts of all records (`add_records`).
        classes: Class names of the batches in order, of which this data set may have only some. Default: its own.
        class_index: Position of each class of the data set in `classes`. Default: 0, 1, 2, …
        side: Of the square images; default: that of the network input. Larger ones leave more to crop from.
    """

    def __init__(
        self,
        features: datasets.Features,
        image_processor: ChexImageProcessor,
        texts: TextTable,
        num_classes: int | None = None,
        class_index: Sequence[int] | None = None,
        side: int | None = None,
    ):
        own = len(record_classes(features))
        self.num_classes = own if num_classes is None else num_classes
        self.class_index = np.arange(own) if class_index is None else np.asarray(class_index, dtype=np.int64)
        self.image_processor, self.texts = image_processor, texts
        self.side = image_processor.size["height"] if side is None else side

    def images(self, table: pa.Table) -> np.ndarray:
        """uint8 (N, 1, side, side): the squares that the network sees."""
        column = table["image"].combine_chunks()
        images = np.empty((len(column), 1, self.side, self.side), dtype=np.uint8)
        stored = (pc.struct_field(column, name) for name in ("bytes", "path"))
        for output, data, path in zip(images, *stored, strict=True):
            grey = _read_grey(data.as_buffer() if data.is_valid else path.as_py())
            frame = self.image_processor.frame(*grey.shape)
            x0, y0, x1, y1 = (int(edge) for edge in frame)
            if x1 - x0 == y1 - y0 == self.side and min(x0, y0) >= 0:  # nothing to resample
                output[0] = grey[y0:y1, x0:x1]
            else:
                square = resize_frame(grey.astype(np.float32), frame, self.side, self.image_processor.resample)
                output[0] = np.rint(square.clip(0, 255))
        return images

    def annotations(self, table: pa.Table) -> dict[str, np.ndarray]:
        """All other arrays of a batch but `index`."""
        sizes = zip(table["height"].to_numpy(), table["width"].to_numpy(), strict=True)
        frames = np.array([self.image_processor.frame(*size) for size in sizes], dtype=np.float32).reshape(-1, 4)
        return self._sentences(table) | self._anatomies(table, frames) | self._classes(table, frames)

    def _sentences(self, table: pa.Table) -> dict[str, np.ndarray]:
        rows = table["sentences"].to_pylist()
        return {
            "sentences": _padded([[self.texts.ids[text] for text in row or ()] for row in rows]),
            "has_sentences": np.array([row is not None for row in rows], dtype=bool),
        }

    def _anatomies(self, table: pa.Table, frames: np.ndarray) -> dict[str, np.ndarray]:
        count, ids = len(table), self.texts.ids
        pixels, has_boxes = _dense(table["anatomy_boxes"], (NUM_ANATOMIES, 4), np.float32)
        present, has_present = _dense(table["anatomy_present"], (NUM_ANATOMIES,), bool)
        has_boxes &= has_present
        boxes, visible = normalised_boxes(pixels, frames[:, None])
        present &= visible & has_boxes[:, None]
        own, has_labels = _dense(table["anatomy_labels"], (NUM_ANATOMIES, len(self.class_index)), np.int8)
        labels = np.zeros((count, NUM_ANATOMIES, self.num_classes), dtype=bool)
        labels[..., self.class_index] = own > 0
        rows = table["anatomy_sentences"].to_pylist()
        nothing = [[]] * NUM_ANATOMIES
        sentences = [[[ids[text] for text in region or ()] for region in row or nothing] for row in rows]
        texts = [[ids[" ".join(region)] if region else -1 for region in row or nothing] for row in rows]
        longest = max((len(region) for row in sentences for region in row), default=0)
        padded = [_padded(row, longest) for row in sentences]
        return {
            "anatomy_boxes": boxes * present[..., None],
            "anatomy_present": present,
            "has_anatomy_boxes": has_boxes,
            "anatomy_labels": labels,
            "has_anatomy_labels": self._own_classes(has_labels),
            "anatomy_sentences": np.stack(padded) if padded else np.zeros((0, NUM_ANATOMIES, 0), dtype=np.int64),
            "anatomy_texts": np.array(texts, dtype=np.int64).reshape(-1, NUM_ANATOMIES),
            "has_anatomy_sentences": np.array([row is not None for row in rows], dtype=bool),
        }

    def _classes(self, table: pa.Table, frames: np.ndarray) -> dict[str, np.ndarray]:
        count = len(table)
        own, has_labels = _dense(table["class_labels"], (len(self.class_index),), np.int8)
        labels = np.zeros((count, self.num_classes), dtype=bool)
        labels[:, self.class_index] = own > 0

        objects = table["objects"].combine_chunks()
        rows, items = pc.list_parent_indices(objects).to_numpy(), pc.list_flatten(objects)
        pixels, _ = _dense(pc.struct_field(items, "bbox"), (4,), np.float32)
        boxes, visible = normalised_boxes(pixels, frames[rows])
        phrases = [self.texts.ids[text] if text else -1 for text in pc.struct_field(items, "phrase").to_pylist()]
        kept = visible.nonzero()[0]  # what is written about a box goes with it
        rows, boxes, phrases = rows[kept], boxes[kept], np.array(phrases, dtype=np.int64)[kept]
        classes = self.class_index[pc.struct_field(items, "category").to_numpy(zero_copy_only=False)[kept]]
        seen: Counter[tuple[int, int]] = Counter()
        slots = np.zeros(len(rows), dtype=np.int64)
        for number, place in enumerate(zip(rows.tolist(), classes.tolist(), strict=True)):
            slots[number] = seen[place]
            seen[place] += 1
        shape = (count, self.num_classes, max(seen.values(), default=1))
        place = (rows, classes, slots)
        class_boxes, mask = np.zeros((*shape, 4), dtype=np.float32), np.zeros(shape, dtype=bool)
        class_phrases = np.full(shape, -1, dtype=np.int64)
        class_boxes[place], mask[place], class_phrases[place] = boxes, True, phrases
        return {
            "class_labels": labels,
            "has_class_labels": self._own_classes(has_labels),
            "class_boxes": class_boxes,
            "class_box_mask": mask,
            "has_class_boxes": self._own_classes(objects.is_valid().to_numpy(zero_copy_only=False)),
            "class_phrases": class_phrases,
        }

    def _own_classes(self, known: np.ndarray) -> np.ndarray:
        """(N,) to (N, C): only the classes of this data set are annotated."""
        return known[:, None] & np.isin(np.arange(self.num_classes), self.class_index)


class RecordDataset(torch.utils.data.Dataset):
    """
    Common records of one split as batches: images cut to the square network input (uint8), boxes moved with them,
    texts as numbers. `DataLoader` fetches whole batches (`__getitems__`); collate with `first`.

    Args:
        records (`datasets.Dataset`): Rows of the common record.
        image_processor, texts: See [`RecordReader`]; texts of these records are added to the table.
        in_memory: Read everything once and keep it, images included; otherwise read what a batch needs.
        reader_options: See [`RecordReader`].
    """

    def __init__(
        self,
        records: datasets.Dataset,
        image_processor: ChexImageProcessor,
        texts: TextTable,
        in_memory: bool = True,
        **reader_options: object,
    ):
        texts.add_records(records)
        self.reader = RecordReader(records.features, image_processor, texts, **reader_options)
        self.records = records.with_format("arrow")
        self.arrays: dict[str, np.ndarray] | None = None
        if in_memory:
            self.arrays = self.reader.annotations(self.records[:])
            parts = tqdm(self.records.iter(100), total=-(-len(records) // 100), desc="Reading images", leave=False)
            self.arrays["images"] = np.concatenate([self.reader.images(part) for part in parts])

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        chosen = np.asarray(indices)
        if self.arrays is not None:
            arrays = {name: array[chosen] for name, array in self.arrays.items()}
        else:
            table = self.records[chosen.tolist()]
            arrays = self.reader.annotations(table) | {"images": self.reader.images(table)}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return [Batch(index=torch.from_numpy(chosen), **tensors)]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]


class MixedDataset(torch.utils.data.Dataset):
    """
    Several data sets one after another, each repeated; every repeat of an image has a number of its own and so is
    augmented afresh. `DataLoader` fetches whole batches; collate with `first`.

    Args:
        parts: Their batches must have the same classes and texts.
        repeats: How often each occurs; see [`repeats_of`].
    """

    def __init__(self, parts: Sequence[RecordDataset], repeats: Sequence[int]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) * count for part, count in zip(parts, repeats, strict=True)])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        chosen = np.asarray(indices)
        owners = np.searchsorted(self.ends, chosen, side="right")
        batches, order = [], []
        for number in np.unique(owners):
            mine = (owners == number).nonzero()[0]
            start, part = (self.ends[number - 1] if number else 0), self.parts[number]
            batches.append(part.__getitems__(((chosen[mine] - start) % len(part)).tolist())[0])
            order.append(mine)
        back = torch.from_numpy(np.concatenate(order).argsort())
        joined = {name: value[back] for name, value in vars(concatenate(batches)).items()}
        return [Batch(**joined).replace(index=torch.from_numpy(chosen))]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]


def occurring_texts(dataset: RecordDataset | MixedDataset, joined: bool = True) -> Tensor:
    """
    Numbers of all sentences of a data set, as often as they occur: those of reports, then those of anatomies, where
    with `joined` the sentences of an anatomy are one text. Repeats of mixed data sets are not counted.
    """
    numbers: list[int] = []
    for part in dataset.parts if isinstance(dataset, MixedDataset) else [dataset]:
        ids = part.reader.texts.ids
        for name in ("sentences", "anatomy_sentences"):
            for table in part.records.select_columns([name]).iter(1000):
                rows = [row for row in table[name].to_pylist() if row is not None]
                if name == "anatomy_sentences":
                    regions = [region for row in rows for region in row if region]
                    rows = [[" ".join(region)] for region in regions] if joined else regions
                numbers += [ids[text] for row in rows for text in row]
    return torch.tensor(numbers, dtype=torch.int64)


def repeats_of(sizes: Sequence[int], factors: Sequence[float], balanced: Sequence[bool]) -> list[int]:
    """
    How often each data set occurs in an epoch: balanced ones are brought to the size of the largest, times a factor,
    rounded to an integer (halves to even).

    Raises:
        ValueError: A data set would not occur at all.
    """
    largest = max(sizes)
    exact = [
        factor * (largest / size if balance else 1.0)
        for size, factor, balance in zip(sizes, factors, balanced, strict=True)
    ]
    repeats = [round(value) for value in exact]
    if 0 in repeats:
        raise ValueError(
            f"Data set {repeats.index(0) + 1} of {len(sizes)} would be used {exact[repeats.index(0)]:.2f} times an "
            "epoch and so not at all: raise its factor, or leave it out."
        )
    return repeats


class RecordStream(torch.utils.data.IterableDataset):
    """
    Batches of common records read from Parquet shards one after another, in memory that does not grow with their
    number. Shards are dealt to processes, and in each process to the workers of its `DataLoader` (which gets
    `batch_size=None`); every record comes once an epoch, but shares differ by up to a shard.

    Images are numbered by a checksum of their `sample_id`, so that their augmentation does not depend on the reader.

    Args:
        shards: Parquet files.
        reader: Knows all texts of the records: fill its table first (`TextTable.add_shards`).
        batch_size: Images of a batch; the last one of each worker may be smaller.
        shuffle_buffer: Records among which the next ones are drawn, from shards in random order; 0 keeps the order.
        seed: Of the shuffling, together with the epoch (`set_epoch`).
        rank, world_size: Of this process.

    Raises:
        ValueError: There are fewer shards than processes.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        reader: RecordReader,
        batch_size: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(shards) < world_size:
            raise ValueError(
                f"{len(shards)} shards cannot be shared by {world_size} processes: prepare the data with more and "
                "smaller shards, or use fewer processes."
            )
        self.shards, self.reader, self.batch_size = [str(path) for path in shards], reader, batch_size
        self.shuffle_buffer, self.seed, self.rank, self.world_size = shuffle_buffer, seed, rank, world_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with workers that outlive an epoch

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        shards = list(self.shards)
        if self.shuffle_buffer:
            np.random.default_rng([self.seed, self.epoch]).shuffle(shards)
        shards = shards[self.rank :: self.world_size][number::workers]
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, number])
        for table in self._tables(shards, rng):
            arrays = self.reader.annotations(table) | {"images": self.reader.images(table)}
            index = [zlib.crc32(name.encode()) for name in table["sample_id"].to_pylist()]
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            yield Batch(index=torch.tensor(index), **tensors)

    def _tables(self, shards: Sequence[str], rng: np.random.Generator) -> Iterator[pa.Table]:
        """Tables of `batch_size` rows."""
        waiting = pa.table({})
        left = np.zeros(0, dtype=bool)  # rows of it that have not been drawn
        for shard in shards:
            for part in pq.ParquetFile(shard).iter_batches(self.batch_size):
                part = pa.Table.from_batches([part])
                waiting = pa.concat_tables([waiting, part]) if len(waiting) else part
                left = np.concatenate([left, np.ones(len(part), dtype=bool)])
                while left.sum() >= self.shuffle_buffer + self.batch_size:
                    yield self._draw(waiting, left, rng)
                if 2 * left.sum() < len(left):  # seldom, since it copies everything
                    waiting, left = waiting.filter(pa.array(left)), left[left]
                    pa.default_memory_pool().release_unused()
        while left.any():
            yield self._draw(waiting, left, rng)

    def _draw(self, table: pa.Table, left: np.ndarray, rng: np.random.Generator) -> pa.Table:
        """The next batch, which is marked as drawn."""
        rows = left.nonzero()[0]
        if self.shuffle_buffer:
            rows = np.sort(rng.choice(rows, min(self.batch_size, len(rows)), replace=False))
        else:
            rows = rows[: self.batch_size]
        left[rows] = False
        chosen = np.zeros(len(left), dtype=bool)
        chosen[rows] = True
        return table.filter(pa.array(chosen))


def first(batches: list[Batch]) -> Batch:
    """Collate function for [`RecordDataset`], which collates itself."""
    return batches[0]


def normalised_boxes(boxes: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Pixel xyxy boxes (..., 4) of the original images as cxcywh (..., 4) relative to the frames (..., 4, pixel xyxy),
    clipped to them, and which (...) are wider and higher there than a thousandth of the frame.
    """
    origin, size = frames[..., :2], frames[..., 2:] - frames[..., :2]
    corners = (boxes.reshape(*boxes.shape[:-1], 2, 2) - origin[..., None, :]) / size[..., None, :]
    clipped = corners.clip(0, 1)
    visible = (clipped[..., 1, :] - clipped[..., 0, :] > MIN_BOX_SIDE).all(-1)
    return corners_to_center_format(torch.from_numpy(clipped.reshape(boxes.shape))).numpy(), visible


def _read_grey(stored: pa.Buffer | str) -> np.ndarray:
    """The grey image (H, W) with values from 0 to 255 in the bytes of a file, or in the file of this name."""
    if isinstance(stored, pa.Buffer) and (header := _PGM.match(stored)):
        width, height = int(header[1]), int(header[2])
        if stored.size - header.end() >= height * width:  # otherwise Pillow says what is wrong
            return np.frombuffer(stored, np.uint8, height * width, header.end()).reshape(height, width)
    with PIL.Image.open(io.BytesIO(stored) if isinstance(stored, pa.Buffer) else stored) as picture:
        # other modes may hold more than 8 bits, which `convert` would cut off
        return np.asarray(picture) if picture.mode == "L" else np.rint(load_image(picture) * 255)


def _dense(column: pa.ChunkedArray | pa.Array, shape: tuple[int, ...], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A column of (nested) lists as one array (N, *shape), zeros for None, and what is not None (N,)."""
    known = column.is_valid().to_numpy(zero_copy_only=False).astype(bool)
    values = column.drop_null()
    for _ in shape:
        values = pc.list_flatten(values)
    dense = np.zeros((len(column), *shape), dtype=dtype)
    dense[known] = values.to_numpy(zero_copy_only=False).reshape(known.sum(), *shape)
    return dense, known


def _padded(rows: list[list[int]], length: int | None = None) -> np.ndarray:
    length = max(map(len, rows), default=0) if length is None else length
    array = np.full((len(rows), length), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


__all__ = [
    "Batch",
    "MixedDataset",
    "RecordDataset",
    "RecordReader",
    "RecordStream",
    "TextTable",
    "concatenate",
    "first",
    "mirror_text",
    "normalised_boxes",
    "occurring_texts",
    "repeats_of",
]
