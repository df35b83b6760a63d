"""
A loader of the official design, the reference of `loader_speed.py`: one image at a time from a float32 cache, one
transform after another on it, boxes moved, clipped and filtered by every transform, then a collate function.

The transforms are those of albumentations 1.3.1, which the official code uses, or leaner ones written here with Pillow
and lists of tuples, which blur with 8 bits only. Nothing but NumPy and Pillow (or albumentations) is needed, so that
another interpreter can run it. What it makes are NumPy arrays; the official loader makes tensors of them as well.

`PYTHON per_image_loader.py FOLDER TRANSFORMS` loads everything in FOLDER once for every line on standard input, and
answers with the processor time in seconds. FOLDER holds `images.npy`, float32 (N, 256, 256), and `records.json`.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np


SIDE, BATCH, NUM_ANATOMIES = 224, 64, 29
MEAN, STD = 0.505, 0.248
MIN_VISIBLE_SHARE = 0.1
Box = tuple[float, float, float, float, int]  # normalised xyxy, and an anatomy or 29 and more for a class
Transforms = Callable[[np.ndarray, list[Box]], tuple[np.ndarray, list[Box]]]


class PillowTransforms:
    """Random resized crop, mirror, affine map, brightness and contrast, blur, normalisation of one image."""

    def __init__(self, seed: int = 0):
        import PIL.Image
        import PIL.ImageFilter  # noqa: F401

        self.pil, self.rng = PIL, np.random.default_rng(seed)

    def __call__(self, image: np.ndarray, boxes: list[Box]) -> tuple[np.ndarray, list[Box]]:
        rng, pil = self.rng, self.pil
        picture, size = pil.Image.fromarray(image), len(image)
        for _ in range(10):
            area, aspect = rng.uniform(0.5, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if width <= 1 and height <= 1:
                break
        else:
            width = height = 1.0
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        corners = [size * edge for edge in (left, top, left + width, top + height)]
        picture = picture.resize((SIDE, SIDE), pil.Image.Resampling.BILINEAR, box=corners)
        boxes = move(boxes, lambda x, y: ((x - left) / width, (y - top) / height))
        if rng.random() < 0.5:
            picture = picture.transpose(pil.Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = move(boxes, lambda x, y: (1 - x, y))
        angle, scale, shift = math.radians(rng.uniform(-10, 10)), rng.uniform(0.95, 1, 2), rng.uniform(-0.02, 0.02, 2)
        cos, sin = math.cos(angle), math.sin(angle)
        forward = np.array([[cos * scale[0], -sin * scale[1]], [sin * scale[0], cos * scale[1]]])
        inverse = np.linalg.inv(forward)
        offset = (0.5 - inverse @ (0.5 + shift)) * SIDE
        matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
        picture = picture.transform((SIDE, SIDE), pil.Image.Transform.AFFINE, matrix, pil.Image.Resampling.BILINEAR)
        (a, b), (c, d) = forward.tolist()
        sx, sy = (0.5 + shift).tolist()
        boxes = move(boxes, lambda x, y: (a * (x - 0.5) + b * (y - 0.5) + sx, c * (x - 0.5) + d * (y - 0.5) + sy))
        values = np.asarray(picture)
        for step in rng.permutation(2):
            factor = rng.uniform(0.6, 1.4)
            mean = 0.0 if step == 0 else values.mean()
            values = np.clip(mean + (values - mean) * np.float32(factor), 0, 1, dtype=np.float32)
        if rng.random() < 0.5:
            sigma, kind = rng.uniform(0.1, 5), rng.random()
            if kind < 0.75:
                blur = pil.ImageFilter.BoxBlur(1) if kind < 0.5 else pil.ImageFilter.GaussianBlur(sigma)
                blurred = pil.Image.fromarray((values * 255).astype(np.uint8)).filter(blur)
                values = np.asarray(blurred, dtype=np.float32) / 255
        return (values - np.float32(MEAN)) / np.float32(STD), boxes


def move(boxes: list[Box], point: Callable[[float, float], tuple[float, float]]) -> list[Box]:
    """Hull of the moved corners, clipped; boxes of which less than a tenth remains are dropped."""
    moved = []
    for x0, y0, x1, y1, label in boxes:
        xs, ys = zip(*(point(x, y) for x, y in ((x0, y0), (x1, y0), (x0, y1), (x1, y1))), strict=True)
        full = (max(xs) - min(xs)) * (max(ys) - min(ys))
        x0, x1 = (min(max(x, 0.0), 1.0) for x in (min(xs), max(xs)))
        y0, y1 = (min(max(y, 0.0), 1.0) for y in (min(ys), max(ys)))
        if (x1 - x0) * (y1 - y0) > 0 and (x1 - x0) * (y1 - y0) >= MIN_VISIBLE_SHARE * full:
            moved.append((x0, y0, x1, y1, label))
    return moved


class AlbumentationsTransforms:
    """The same, as the official code composes them."""

    def __init__(self) -> None:
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)
        shift, scale = (dict.fromkeys("xy", limits) for limits in ((-0.02, 0.02), (0.95, 1.0)))
        self.compose = A.Compose(
            [
                A.RandomResizedCrop(SIDE, SIDE, scale=(0.5, 1.0), interpolation=cv2.INTER_LINEAR),
                A.HorizontalFlip(p=0.5),
                A.Affine(rotate=(-10, 10), translate_percent=shift, scale=scale, keep_ratio=False, p=1),
                A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0, hue=0, p=1),
                A.GaussianBlur(blur_limit=(0, 3), sigma_limit=(0.1, 5), p=0.5),
                A.Normalize(mean=MEAN, std=STD, max_pixel_value=1.0),
            ],
            bbox_params=A.BboxParams(
                format="albumentations", min_visibility=MIN_VISIBLE_SHARE, label_fields=["labels"]
            ),
        )

    def __call__(self, image: np.ndarray, boxes: list[Box]) -> tuple[np.ndarray, list[Box]]:
        done = self.compose(image=image, bboxes=[box[:4] for box in boxes], labels=[box[4] for box in boxes])
        return done["image"], [(*box, label) for box, label in zip(done["bboxes"], done["labels"], strict=True)]


class PerImageDataset:
    """One image an item, with what is annotated in it."""

    def __init__(self, folder: str, transforms: Transforms):
        self.images = np.load(f"{folder}/images.npy", mmap_mode="r")
        with open(f"{folder}/records.json", encoding="utf-8") as file:
            self.records = json.load(file)
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        image, boxes = self.transforms(np.array(self.images[index]), [tuple(box) for box in record["boxes"]])
        anatomy, present, classes = np.zeros((NUM_ANATOMIES, 4), np.float32), np.zeros(NUM_ANATOMIES, bool), []
        for x0, y0, x1, y1, label in boxes:
            box = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
            if label < NUM_ANATOMIES:
                anatomy[label], present[label] = box, True
            else:
                classes.append((*box, label - NUM_ANATOMIES))
        return {
            "image": image,
            "anatomy_boxes": anatomy,
            "anatomy_present": present,
            "anatomy_labels": np.array(record["anatomy_labels"], dtype=np.int64),
            "class_boxes": classes,
            "sentences": record["sentences"],
            "anatomy_sentences": record["anatomy_sentences"],
        }


def collate(items: list[dict]) -> dict:
    stacked = ("image", "anatomy_boxes", "anatomy_present", "anatomy_labels")
    batch = {
        name: np.stack([item[name] for item in items]) if name in stacked else [item[name] for item in items]
        for name in items[0]
    }
    num_classes = batch["anatomy_labels"].shape[2]
    counts = np.zeros((len(items), num_classes), dtype=np.int64)
    for row, boxes in enumerate(batch["class_boxes"]):
        for box in boxes:
            counts[row, box[4]] += 1
    padded = np.zeros((len(items), num_classes, int(counts.max(initial=0)), 5), dtype=np.float32)
    filled = np.zeros_like(counts)
    for row, boxes in enumerate(batch["class_boxes"]):
        for box in boxes:
            padded[row, box[4], filled[row, box[4]]] = box
            filled[row, box[4]] += 1
    return batch | {"class_boxes_padded": padded, "class_boxes_mask": np.arange(padded.shape[2]) < counts[..., None]}


def batches(dataset: PerImageDataset, rng: np.random.Generator) -> Iterator[dict]:
    order = rng.permutation(len(dataset)).tolist()
    for start in range(0, len(order), BATCH):
        yield collate([dataset[index] for index in order[start : start + BATCH]])


def main() -> None:
    folder, name = sys.argv[1:]
    dataset = PerImageDataset(folder, AlbumentationsTransforms() if name == "albumentations" else PillowTransforms())
    rng = np.random.default_rng(0)
    for _ in sys.stdin:
        start = time.process_time()
        for _batch in batches(dataset, rng):
            pass
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
