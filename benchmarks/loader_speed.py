"""
Training loader against a Python-level transform of each image, in one run on one core.

The reference works as the official loader does: one image at a time from a float32 cache, one step after another,
boxes moved, clipped and filtered by every step, then a collate function. It is written here with Pillow and lists of
tuples; with `--albumentations PYTHON`, an interpreter that has albumentations 1.3.1, the library itself is timed as
well. Most of its time goes into boxes, one by one: lists of tuples are leaner.

This project's loader reads compressed records, decodes them and makes arrays of whole batches; augmentation is done to
batches on the device of the model. It is timed without augmentation (what workers do when there is a GPU) and with it
on the same core.

Run from the repository root: `python benchmarks/loader_speed.py`.
"""

import argparse
import math
import subprocess
import tempfile
import time
from collections.abc import Callable

import datasets
import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch

from processing_chex import ChexImageProcessor
from training.collate import RecordDataset, TextTable
from training.configuration import AugmentationConfig
from training.data.phantom import phantom_features, phantom_record
from training.transforms import MIN_VISIBLE_SHARE, Augmentation


CACHE_SIDE, SIDE, BATCH = 256, 224, 64
Box = tuple[float, float, float, float, object]


class PerImageTransform:
    """Random resized crop, mirror, affine map, brightness and contrast, blur, normalisation of one image."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, image: np.ndarray, boxes: list[Box]) -> tuple[np.ndarray, list[Box]]:
        rng, picture = self.rng, PIL.Image.fromarray(image)
        for _ in range(10):
            area, aspect = rng.uniform(0.5, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if width <= 1 and height <= 1:
                break
        else:
            width = height = 1.0
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        corners = [CACHE_SIDE * edge for edge in (left, top, left + width, top + height)]
        picture = picture.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR, box=corners, reducing_gap=None)
        boxes = self.move(boxes, lambda x, y: ((x - left) / width, (y - top) / height))
        if rng.random() < 0.5:
            picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = self.move(boxes, lambda x, y: (1 - x, y))
        angle, scale, shift = math.radians(rng.uniform(-10, 10)), rng.uniform(0.95, 1, 2), rng.uniform(-0.02, 0.02, 2)
        cos, sin = math.cos(angle), math.sin(angle)
        forward = np.array([[cos * scale[0], -sin * scale[1]], [sin * scale[0], cos * scale[1]]])
        inverse = np.linalg.inv(forward)
        offset = (0.5 - inverse @ (0.5 + shift)) * SIDE
        matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
        picture = picture.transform((SIDE, SIDE), PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR)
        (a, b), (c, d) = forward.tolist()
        sx, sy = (0.5 + shift).tolist()
        boxes = self.move(boxes, lambda x, y: (a * (x - 0.5) + b * (y - 0.5) + sx, c * (x - 0.5) + d * (y - 0.5) + sy))
        values = np.asarray(picture)
        for step in rng.permutation(2):
            factor = rng.uniform(0.6, 1.4)
            mean = 0.0 if step == 0 else values.mean()
            values = np.clip(mean + (values - mean) * np.float32(factor), 0, 1, dtype=np.float32)
        if rng.random() < 0.5:
            sigma, kind = rng.uniform(0.1, 5), rng.random()
            if kind < 0.75:
                small = PIL.ImageFilter.BoxBlur(1) if kind < 0.5 else PIL.ImageFilter.GaussianBlur(sigma)
                # Pillow blurs 8 bits only
                blurred = PIL.Image.fromarray((values * 255).astype(np.uint8)).filter(small)
                values = np.asarray(blurred, dtype=np.float32) / 255
        return (values - np.float32(0.505)) / np.float32(0.248), boxes

    @staticmethod
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


class PerImageDataset(torch.utils.data.Dataset):
    """One image an item, from a memory-mapped float32 cache."""

    def __init__(self, rows: list[dict], records: RecordDataset, folder: str):
        images = records.arrays["images"][:, 0].astype(np.float32) / 255
        self.images = np.lib.format.open_memmap(f"{folder}/cache.npy", "w+", np.float32, images.shape)
        self.images[:] = images
        self.rows, self.transform = rows, PerImageTransform()

    def __len__(self) -> int:
        return len(self.rows)

    def boxes(self, index: int) -> list[Box]:
        """Normalised boxes of anatomies (with their index) and findings."""
        row = self.rows[index]
        size = (row["width"], row["height"]) * 2
        boxes = [
            (*(edge / length for edge, length in zip(box, size, strict=True)), region)
            for region, box in enumerate(row["anatomy_boxes"])
            if row["anatomy_present"][region]
        ]
        boxes += [
            (*(edge / length for edge, length in zip(item["bbox"], size, strict=True)), ("class", item["category"]))
            for item in row["objects"]
        ]
        return boxes

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        image, boxes = self.transform(np.array(self.images[index]), self.boxes(index))
        anatomy, present, classes = np.zeros((29, 4), np.float32), np.zeros(29, bool), []
        for x0, y0, x1, y1, label in boxes:
            box = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
            if isinstance(label, int):
                anatomy[label], present[label] = box, True
            else:
                classes.append((*box, label[1]))
        return {
            "image": torch.from_numpy(image),
            "anatomy_boxes": torch.from_numpy(anatomy),
            "anatomy_present": torch.from_numpy(present),
            "anatomy_labels": torch.tensor(row["anatomy_labels"]),
            "class_boxes": classes,
            "sentences": row["sentences"],
        }


def collate(items: list[dict]) -> dict:
    stacked = ("image", "anatomy_boxes", "anatomy_present", "anatomy_labels")
    return {
        name: torch.stack([item[name] for item in items]) if name in stacked else [item[name] for item in items]
        for name in items[0]
    }


ALBUMENTATIONS = """
import sys, time
import albumentations as A, cv2, numpy as np
cv2.setNumThreads(0)
data = np.load(sys.argv[1], allow_pickle=False)
shift, scale = ({axis: limits for axis in "xy"} for limits in ((-0.02, 0.02), (0.95, 1.0)))
transform = A.Compose(
    [
        A.RandomResizedCrop(224, 224, scale=(0.5, 1.0), interpolation=cv2.INTER_LINEAR),
        A.HorizontalFlip(p=0.5),
        A.Affine(rotate=(-10, 10), translate_percent=shift, scale=scale, keep_ratio=False, p=1),
        A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0, hue=0, p=1),
        A.GaussianBlur(blur_limit=(0, 3), sigma_limit=(0.1, 5), p=0.5),
        A.Normalize(mean=0.505, std=0.248, max_pixel_value=1.0),
    ],
    bbox_params=A.BboxParams(format="albumentations", min_visibility=0.1, label_fields=["labels"]),
)
images = data["images"].astype(np.float32) / 255
rows = [data["boxes"][data["owners"] == number].tolist() for number in range(len(images))]
best = float("inf")
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    for image, boxes in zip(images, rows):
        transform(image=image.copy(), bboxes=boxes, labels=list(range(len(boxes))))
    best = min(best, time.process_time() - start)
print(best / len(images) * 1000)
"""


def albumentations_milliseconds(python: str, dataset: "PerImageDataset", folder: str, rounds: int) -> float:
    """Processor time of the library for each image with the same boxes, loading and collation not counted."""
    boxes = [[box[:4] for box in dataset.boxes(index)] for index in range(len(dataset))]
    owners = np.repeat(np.arange(len(boxes)), list(map(len, boxes)))
    images = np.rint(dataset.images * 255).astype(np.uint8)
    path = f"{folder}/input.npz"
    np.savez(path, images=images, boxes=np.clip(np.concatenate(boxes), 0, 1), owners=owners)
    command = [python, "-c", ALBUMENTATIONS, path, str(rounds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def milliseconds(function: Callable[[], object], images: int, rounds: int) -> float:
    """Processor time for each image, best of several rounds: other work on the machine disturbs less."""
    function()
    best = math.inf
    for _ in range(rounds):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best / images * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--albumentations", metavar="PYTHON", help="interpreter that has albumentations 1.3.1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [phantom_record(7, index, size=CACHE_SIDE) for index in range(arguments.images)]
    records = datasets.Dataset.from_list(rows, features=phantom_features())
    processor, texts = ChexImageProcessor(size=SIDE), TextTable()
    kept = RecordDataset(records, processor, texts, side=CACHE_SIDE)
    ours = RecordDataset(records, processor, texts, in_memory=False, side=CACHE_SIDE)
    augmentation = Augmentation(AugmentationConfig(flip="reference"))

    def load(augment: bool) -> None:
        for start in range(0, len(ours), BATCH):
            batch = ours.__getitems__(range(start, min(start + BATCH, len(ours))))[0]
            if augment:
                draws = augmentation.draws(batch.index)
                transform = augmentation.geometry(draws)
                images = augmentation.intensity(transform.images(batch.images.float() / 255, SIDE), draws)
                (images - 0.505) / 0.248
                transform.boxes(batch.anatomy_boxes, batch.anatomy_present)
                transform.boxes(batch.class_boxes, batch.class_box_mask)

    with tempfile.TemporaryDirectory() as folder:
        plain = list(records.remove_columns("image"))
        dataset = PerImageDataset(plain, kept, folder)
        loader = torch.utils.data.DataLoader(dataset, BATCH, collate_fn=collate)
        count, rounds = arguments.images, arguments.rounds
        references = {"a transform of each image": milliseconds(lambda: [None for _ in loader], count, rounds)}
        if arguments.albumentations:
            name = "albumentations, transform alone"
            references[name] = albumentations_milliseconds(arguments.albumentations, dataset, folder, rounds)
        ours_alone = milliseconds(lambda: load(augment=False), count, rounds)
        ours_augmented = milliseconds(lambda: load(augment=True), count, rounds)
    for name, time_per_image in references.items():
        print(f"{name:32s} {time_per_image:6.2f} ms/image")
    for name, time_per_image in (("this loader", ours_alone), ("this loader and augmentation", ours_augmented)):
        ratios = ", ".join(f"{reference / time_per_image:.2f} x" for reference in references.values())
        print(f"{name:32s} {time_per_image:6.2f} ms/image  {ratios}")


if __name__ == "__main__":
    main()
