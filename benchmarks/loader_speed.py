"""
This project's training loader against a loader of the official design, everything included, on one core.

The reference (`per_image_loader.py`) takes one image after another from a float32 cache in memory, transforms it step
by step, with its boxes, and collates: with albumentations 1.3.1 if `--albumentations PYTHON` names an interpreter that
has it, and with leaner transforms written for this comparison. This project's loader reads records of a prepared
folder, decodes their images and makes arrays of whole batches; batches are augmented on the device of the model, here
on the same core. It is timed without augmentation, too, which is what its processes do when there is a GPU.

All of them take turns, and what is shown are medians of processor time over the rounds, and of ratios within a round:
other work on the machine then disturbs all alike. Images come in random order, in batches of 64.

Run from the repository root: `python benchmarks/loader_speed.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from processing_chex import ChexImageProcessor
from training.collate import RecordDataset, TextTable
from training.configuration import AugmentationConfig
from training.data.preparation import IMAGE_FORMATS, prepare
from training.data.prepared import open_prepared, read_info
from training.transforms import Augmentation, normalise


CACHE_SIDE, SIDE, BATCH = 256, 224, 64
REFERENCE = Path(__file__).with_name("per_image_loader.py")


class ReferenceLoader:
    """A process that loads everything once for each call; the result is its processor time in seconds."""

    def __init__(self, python: str, folder: Path, transforms: str):
        self.command = [python, str(REFERENCE), str(folder), transforms]

    def __enter__(self) -> "ReferenceLoader":
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __call__(self) -> float:
        self.process.stdin.write("once\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


class Loader:
    """Loads everything once for each call; the result is the processor time in seconds."""

    def __init__(self, prepared: Path, cache: Path, augment: bool):
        records = open_prepared(prepared, "train", cache_dir=cache)
        self.dataset = RecordDataset(
            records, ChexImageProcessor(size=SIDE), TextTable(), in_memory=False, side=CACHE_SIDE
        )
        self.augmentation = Augmentation(AugmentationConfig(flip="reference")) if augment else None
        self.mean, self.std = torch.full((1, 1, 1), 0.505), torch.full((1, 1, 1), 0.248)
        self.rng, self.epoch = np.random.default_rng(0), 0

    def __call__(self) -> float:
        start = time.process_time()
        order = self.rng.permutation(len(self.dataset)).tolist()
        for first in range(0, len(order), BATCH):
            batch = self.dataset.__getitems__(order[first : first + BATCH])[0]
            if self.augmentation is not None:
                draws = self.augmentation.draws(batch.index, self.epoch)
                transform = self.augmentation.geometry(draws)
                images = self.augmentation.pixels(batch.images, transform, draws, SIDE)
                normalise(images, self.mean, self.std)
                transform.boxes(batch.anatomy_boxes, batch.anatomy_present)
                transform.boxes(batch.class_boxes, batch.class_box_mask)
        self.epoch += 1
        return time.process_time() - start


def write_reference_data(prepared: Path, cache: Path, folder: Path) -> None:
    """Images as the official cache holds them, and records with normalised boxes."""
    records = open_prepared(prepared, "train", cache_dir=cache)
    kept = RecordDataset(records, ChexImageProcessor(size=SIDE), TextTable(), side=CACHE_SIDE)
    np.save(folder / "images.npy", kept.arrays["images"][:, 0].astype(np.float32) / 255)
    rows = []
    for row in records.remove_columns("image"):
        size = np.array([row["width"], row["height"]] * 2)
        boxes = [
            [*(np.array(box) / size).clip(0, 1).tolist(), region]
            for region, box in enumerate(row["anatomy_boxes"])
            if row["anatomy_present"][region]
        ]
        boxes += [
            [*(np.array(item["bbox"]) / size).clip(0, 1).tolist(), len(row["anatomy_boxes"]) + item["category"]]
            for item in row["objects"]
        ]
        rows.append({name: row[name] for name in ("anatomy_labels", "sentences", "anatomy_sentences")})
        rows[-1]["boxes"] = boxes
    (folder / "records.json").write_text(json.dumps(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--albumentations", metavar="PYTHON", help="interpreter that has albumentations 1.3.1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        loaders: dict[str, Callable[[], float]] = {}
        options = {"num_train": arguments.images, "num_validation": 0, "num_test": 0}
        for image_format in IMAGE_FORMATS:
            out = folder / image_format
            prepare("phantom", out, size=CACHE_SIDE, image_format=image_format, num_proc=1, options=options)
            kilobytes = sum(shard.bytes for shard in read_info(out).shards) / arguments.images / 1000
            for augment in (False, True):
                title = f"this loader, {image_format} ({kilobytes:.0f} kB){', augmented' if augment else ''}"
                loaders[title] = Loader(out, folder / "cache", augment)
        write_reference_data(folder / IMAGE_FORMATS[0], folder / "cache", folder)
        references = {"per image, leaner transforms": ReferenceLoader(sys.executable, folder, "leaner")}
        if arguments.albumentations:
            official = ReferenceLoader(arguments.albumentations, folder, "albumentations")
            references["per image, albumentations"] = official
        loaders = {title: stack.enter_context(loader) for title, loader in references.items()} | loaders
        seconds: dict[str, list[float]] = {title: [] for title in loaders}
        for number in range(arguments.rounds + 1):
            for title, loader in loaders.items():
                if (taken := loader()) and number:  # the first round warms up
                    seconds[title].append(taken)
    print(f"{'milliseconds an image':40s}{'':>8s}" + "".join(f"  x {title}" for title in references))
    for title, values in seconds.items():
        ratios = [np.median(np.array(seconds[reference]) / values) for reference in references]
        milliseconds = 1000 * np.median(values) / arguments.images
        print(
            f"{title:40s}{milliseconds:8.2f}"
            + "".join(f"{ratio:{4 + len(name)}.1f}" for ratio, name in zip(ratios, references, strict=True))
        )


if __name__ == "__main__":
    main()
