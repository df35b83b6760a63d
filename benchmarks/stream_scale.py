"""
Images per second and memory of streaming prepared data, for growing data sets and 1 and 2 workers.

Draws the phantom at each size with `chex data prepare` (kept in --folder for the next time), then reads batches from
it in a fresh process: `RecordStream` through a `DataLoader`, shuffled. At every size the same number of images is
read, of small sets again and again, because the memory of a worker grows until its buffers have been filled and
emptied a few times. Memory is the largest sum over the process and its workers, in which what they share counts once
(PSS), beyond that of the imports; the table of texts, which training needs and which grows with the number of
different texts, is listed apart. Run from the repository root: `python benchmarks/stream_scale.py`.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from processing_chex import ChexImageProcessor
from training.collate import RecordReader, RecordStream, TextTable
from training.data.phantom import phantom_features
from training.data.preparation import prepare
from training.data.prepared import read_info


BATCH = 64


def megabytes() -> float:
    """Memory of this process and its workers. (What only one of them holds would leave out all that a fork shares.)"""
    process, used = psutil.Process(), 0
    for part in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker may end meanwhile
            used += part.memory_full_info().pss
    return used / 2**20


def measure(folder: Path, workers: int, images: int) -> dict[str, float]:
    """Reads so many images of a prepared folder, more than once if need be."""
    torch.set_num_threads(1)
    split = read_info(folder).splits["train"]
    shards = [folder / shard.file for shard in split.shards]
    start = megabytes()
    texts = TextTable()
    texts.add_shards(shards)
    table = megabytes() - start
    reader = RecordReader(phantom_features(), ChexImageProcessor(size=128), texts)
    shards *= math.ceil(images / split.records)
    stream = RecordStream(shards, reader, BATCH, shuffle_buffer=512)
    count, peak, began = 0, 0.0, time.perf_counter()
    for number, batch in enumerate(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)):
        if number == 4:  # workers have started
            count, began = 0, time.perf_counter()
        count += len(batch.images)
        if number % 4 == 0:
            peak = max(peak, megabytes() - start - table)
        if count >= images:
            break
    return {"speed": count / (time.perf_counter() - began), "peak": peak, "table": table, "texts": len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, default=Path("runs/stream_scale"))
    parser.add_argument("--images", type=int, default=20_000, help="read so many")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, workers = arguments.measure
        print(json.dumps(measure(Path(folder), int(workers), arguments.images)))
        return
    print("   images  workers  images/s  memory  texts (memory)")
    for size in arguments.sizes:
        folder = arguments.folder / f"phantom-{size}"
        prepare(
            "phantom", folder, options={"num_train": size, "num_validation": 0, "num_test": 0}, num_proc=os.cpu_count()
        )
        for workers in (1, 2):
            command = [sys.executable, __file__, "--measure", str(folder), str(workers)]
            command += ["--images", str(arguments.images)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{size:9,d} {workers:8d} {found['speed']:9.0f} {found['peak']:4.0f} MB  {found['texts']:,d} "
                f"({found['table']:.0f} MB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
