"""
Images that one core prepares per second of its time, by stage (decoding, scaling, encoding) and all in all.

The input is JPEG files of drawn radiographs with film noise, 512 pixels on the shorter side unless told otherwise.
Lossless and lossy encoding, and decoding at a reduced scale, are compared too. Run from the repository root:
`python benchmarks/preparation_speed.py`.
"""

import argparse
import io
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from training.data.own_data import OwnData
from training.data.phantom import render_phantom
from training.data.preparation import encode_image, prepare, shrink
from training.data.raw import load_grey


NOISE = 4.0  # grey levels, standard deviation


def write_films(folder: Path, count: int, height: int, width: int, quality: int) -> list[Path]:
    """Own data: JPEG files and a line for each."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        film = render_phantom(7, index, (height, width)).image + rng.normal(0, NOISE, (height, width))
        paths.append(folder / f"{index}.jpg")
        PIL.Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=quality)
    lines = [json.dumps({"image": path.name, "objects": [], "sentences": ["A sentence."]}) for path in paths]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return paths


def timed(function: Callable, inputs: Sequence, rounds: int) -> tuple[float, list]:
    """Milliseconds of processor time for each input, best of several rounds, and the results."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        results = [function(value) for value in inputs]
        best = min(best, time.process_time() - start)
    return 1000 * best / len(inputs), results


def reduced(path: Path, size: int) -> np.ndarray:
    """Decode at the smallest scale that is at least twice the target."""
    with PIL.Image.open(path) as image:
        image.draft("L", (2 * size, 2 * size))
        return np.asarray(image.convert("L"))


def saved(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> str:
    values = [np.abs(a.astype(int) - b) for a, b in zip(first, second, strict=True)]
    return f"mean {np.mean([value.mean() for value in values]):.2f}, largest {max(value.max() for value in values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--height", type=int, default=620)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--quality", type=int, default=95)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size, rounds = arguments.size, arguments.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "raw"
        folder.mkdir()
        paths = write_films(folder, arguments.count, arguments.height, arguments.width, arguments.quality)
        megabytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
        print(f"{len(paths)} JPEG files, {arguments.height} x {arguments.width} pixels, {megabytes:.2f} MB each")
        decode, films = timed(load_grey, paths, rounds)
        scale, small = timed(lambda film: shrink(film, size), films, rounds)
        encode, _ = timed(lambda image: encode_image(image, "pgm"), small, rounds)
        for stage, milliseconds in (("decode", decode), ("scale", scale), ("encode", encode)):
            print(f"{stage:8s} {milliseconds:7.2f} ms")
        print(f"{'sum':8s} {decode + scale + encode:7.2f} ms  {1000 / (decode + scale + encode):7.1f} images/s")

        draft, films = timed(lambda path: reduced(path, size), paths, rounds)
        change = difference([shrink(film, size) for film in films], small)
        print(f"decoded at a reduced scale: {draft:.2f} ms, grey levels differ by {change}")
        boxed = [
            np.asarray(PIL.Image.fromarray(film).resize(result.shape[::-1], PIL.Image.Resampling.BOX))
            for film, result in zip((load_grey(path) for path in paths), small, strict=True)
        ]
        print(f"Pillow's box filter instead of the area: grey levels differ by {difference(boxed, small)}")
        for title, options in (
            ("PGM", {"format": "PPM"}),
            ("PNG as used", {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE}),
            ("PNG level 6", {"format": "PNG"}),
            ("JPEG 95", {"format": "JPEG", "quality": 95}),
            ("JPEG 90", {"format": "JPEG", "quality": 90}),
        ):
            write, files = timed(lambda image, options=options: saved(image, **options), small, 1)
            read, back = timed(lambda data: np.asarray(PIL.Image.open(io.BytesIO(data))), files, 1)
            kilobytes = np.mean([len(data) for data in files]) / 1e3
            print(
                f"{title:12s} write {write:.2f} ms, read {read:.2f} ms, {kilobytes:.1f} kB, grey levels differ by "
                f"{difference(back, small)}"
            )

        best = float("inf")
        for number in range(rounds):
            start = time.process_time()
            prepare(OwnData, Path(name) / f"out{number}", data_dir=folder, size=size, num_proc=1)
            best = min(best, time.process_time() - start)
        print(f"prepare, all in all: {len(paths) / best:.1f} images/s on one core")


if __name__ == "__main__":
    main()
