"""From the common record of a data set to batches of tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_transforms import corners_to_center_format

from processing_chex.image_loading import load_image
from processing_chex.image_processing_chex import ChexImageProcessor, resize_frame
from training.transforms import MIN_VISIBLE_SHARE


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


@dataclass
class Batch:
    """
    N images with what is annotated in them. Boxes are normalised cxcywh in the square network input. A anatomies, C
    classes, S sentences, T boxes of one class, K sentences of one anatomy; texts are numbers of a [`TextTable`].

    Attributes:
        images (`uint8 (N, 1, H, W)`), index (`int64 (N,)`): Grey images and their numbers in the split.
        sentences (`int64 (N, S)`): Report sentences, -1 for none.
        anatomy_boxes (`float32 (N, A, 4)`), anatomy_present (`bool (N, A)`): Zero boxes where absent.
        anatomy_labels (`bool (N, A, C)`), class_labels (`bool (N, C)`).
        anatomy_sentences (`int64 (N, A, K)`): Sentences of each anatomy, -1 for none.
        anatomy_texts (`int64 (N, A)`): The same joined with blanks, -1 if there is none.
        class_boxes (`float32 (N, C, T, 4)`), class_box_mask (`bool (N, C, T)`).
        class_phrases (`int64 (N, C, T)`): What is written about each box, -1 if nothing is.
    """

    images: Tensor
    index: Tensor
    sentences: Tensor
    anatomy_boxes: Tensor
    anatomy_present: Tensor
    anatomy_labels: Tensor
    class_labels: Tensor
    anatomy_sentences: Tensor
    anatomy_texts: Tensor
    class_boxes: Tensor
    class_box_mask: Tensor
    class_phrases: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(**{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()})


class RecordDataset(torch.utils.data.Dataset):
    """
    The common record of one split, held in memory as arrays: images cut to the square network input (uint8), boxes
    moved with them, texts as numbers. `DataLoader` fetches whole batches (`__getitems__`); collate with `first`.

    Args:
        records (`datasets.Dataset`): Rows of the common record.
        image_processor: Gives size and geometry of the network input.
        texts: Table that the texts are added to.
    """

    def __init__(self, records: datasets.Dataset, image_processor: ChexImageProcessor, texts: TextTable):
        side, count = image_processor.size["height"], len(records)
        frames = np.empty((count, 4), dtype=np.float32)
        images = np.empty((count, 1, side, side), dtype=np.uint8)
        pictures = tqdm(records.select_columns(["image"]), desc="Reading images", leave=False)
        for index, row in enumerate(pictures):
            grey = load_image(row["image"])
            frame = image_processor.frame(*grey.shape)
            images[index, 0] = np.rint(resize_frame(grey, frame, side, image_processor.resample).clip(0, 1) * 255)
            frames[index] = frame
        self.arrays = {"images": images}
        self._add_anatomies(records, frames, texts)
        self._add_classes(records, frames, texts)
        self.arrays["sentences"] = _padded([[texts.add(text) for text in row] for row in records["sentences"]])

    def _add_anatomies(self, records: datasets.Dataset, frames: np.ndarray, texts: TextTable) -> None:
        boxes, visible = normalised_boxes(_regular(records, "anatomy_boxes", np.float32), frames[:, None])
        self.arrays["anatomy_present"] = visible & _regular(records, "anatomy_present", bool)
        self.arrays["anatomy_boxes"] = boxes * self.arrays["anatomy_present"][..., None]
        self.arrays["anatomy_labels"] = _regular(records, "anatomy_labels", np.int8) > 0
        sentences, joined = [], []
        for row in records["anatomy_sentences"]:
            sentences.append([[texts.add(text) for text in region] for region in row])
            joined.append([texts.add(" ".join(region)) if region else -1 for region in row])
        longest = max((len(region) for row in sentences for region in row), default=0)
        self.arrays["anatomy_sentences"] = np.stack([_padded(row, longest) for row in sentences])
        self.arrays["anatomy_texts"] = np.array(joined, dtype=np.int64)

    def _add_classes(self, records: datasets.Dataset, frames: np.ndarray, texts: TextTable) -> None:
        self.arrays["class_labels"] = _regular(records, "class_labels", np.int8) > 0
        count, classes = self.arrays["class_labels"].shape
        objects = records["objects"]
        per_class = [
            np.bincount([item["category"] for item in row], minlength=classes).max() for row in objects if row
        ]
        slots = int(max(per_class, default=1))
        boxes = np.zeros((count, classes, slots, 4), dtype=np.float32)
        mask = np.zeros((count, classes, slots), dtype=bool)
        phrases = np.full((count, classes, slots), -1, dtype=np.int64)
        for index, row in enumerate(objects):
            for item in row:
                box, visible = normalised_boxes(np.array(item["bbox"], dtype=np.float32), frames[index])
                if visible:
                    place = (index, item["category"], int(mask[index, item["category"]].sum()))
                    boxes[place], mask[place] = box, True
                    phrases[place] = texts.add(item["phrase"]) if item["phrase"] else -1
        self.arrays |= {"class_boxes": boxes, "class_box_mask": mask, "class_phrases": phrases}

    def __len__(self) -> int:
        return len(self.arrays["images"])

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        chosen = np.asarray(indices)
        arrays = {name: torch.from_numpy(array[chosen]) for name, array in self.arrays.items()}
        return [Batch(index=torch.from_numpy(chosen), **arrays)]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]


def first(batches: list[Batch]) -> Batch:
    """Collate function for [`RecordDataset`], which collates itself."""
    return batches[0]


def normalised_boxes(boxes: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Pixel xyxy boxes (..., 4) of the original images as cxcywh (..., 4) relative to the frames (..., 4, pixel xyxy),
    clipped to them, and whether at least a tenth of the box (...) is inside.
    """
    origin, size = frames[..., :2], frames[..., 2:] - frames[..., :2]
    corners = (boxes.reshape(*boxes.shape[:-1], 2, 2) - origin[..., None, :]) / size[..., None, :]
    clipped = corners.clip(0, 1)
    area, inside = ((c[..., 1, :] - c[..., 0, :]).clip(0).prod(-1) for c in (corners, clipped))
    visible = (inside > 1e-6) & (inside >= MIN_VISIBLE_SHARE * area)
    return corners_to_center_format(torch.from_numpy(clipped.reshape(boxes.shape))).numpy(), visible


def _regular(records: datasets.Dataset, column: str, dtype: type) -> np.ndarray:
    """A column of lists of fixed lengths as one array."""
    return np.asarray(records.with_format("numpy", columns=[column])[:][column]).astype(dtype)


def _padded(rows: list[list[int]], length: int | None = None) -> np.ndarray:
    length = max(map(len, rows), default=0) if length is None else length
    array = np.full((len(rows), length), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


__all__ = ["Batch", "RecordDataset", "TextTable", "first", "normalised_boxes"]
