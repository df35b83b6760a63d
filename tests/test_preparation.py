"""Preparing data sets: shards, interruptions at any instant, rejected images, opening what was prepared."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets.distributed import split_dataset_by_node

from processing_chex.vocabulary import PHANTOM_CLASSES
from tests.raw_trees.mimic import write_all
from tests.raw_trees.nih import write_nih
from tests.raw_trees.vindr import write_vindr
from training.data import preparation
from training.data.inspection import contact_sheet, inspect_prepared, inspect_raw, sample_records, spread
from training.data.phantom import phantom_record
from training.data.preparation import PreparationError, prepare, shrink, source_class
from training.data.prepared import open_prepared, read_info
from training.data.raw import DroppedRecord, RawBuilder, RawConfig, Source, load_grey, read_table
from training.data.record import empty_record


CLASSES = ("Mass", "Nodule")
HEIGHT, WIDTH = 60, 48


@dataclass
class TinyConfig(RawConfig):
    """`slow`: seconds for each record; `dies_at`: image at which a worker process ends abruptly."""

    tiny_dir: str | None = None
    flavour: str = "plain"
    slow: float = 0.0
    dies_at: str = ""


class TinyData(RawBuilder):
    """Images with a table of boxes; the records have no report and no anatomy."""

    DATASET = "tiny"
    TITLE = "Tiny data"
    CLASSES: ClassVar[tuple[str, ...]] = CLASSES
    BUILDER_CONFIG_CLASS = TinyConfig
    SOURCES = (Source("tiny", "a table of boxes", "TINY_DIR", ("table.csv",), "table.csv and images", "nowhere"),)

    def split_items(self) -> dict[str, list[dict]]:
        splits: dict[str, list[dict]] = {"train": [], "validation": []}
        for row in read_table(self.folders["tiny"] / "table.csv", ("image", "split", "class")):
            path = str(self.folders["tiny"] / "images" / row["image"])
            splits[row["split"]].append({"sample_id": row["image"], "image_path": path, "class": row["class"]})
        self.counts = {name: Counter(listed=len(items)) for name, items in splits.items()}
        return splits

    def record(self, item: dict) -> dict:
        time.sleep(self.config.slow)
        if item["sample_id"] == self.config.dies_at and multiprocessing.parent_process() is not None:
            os._exit(9)
        if item["class"] == "drop":
            raise DroppedRecord("the class is drop")
        if item["class"] not in CLASSES:
            raise ValueError(f"unknown class {item['class']!r}")
        self.notes["boxes looked at"] += 1
        number = int(item["sample_id"].split(".")[0])
        box = {"bbox": [1.0, 2.0, 3.5 + number % 40, 50.0], "category": item["class"], "phrase": f"Number {number}."}
        return empty_record(
            sample_id=item["sample_id"],
            subject_id=f"s{number // 2}",
            image=item["image_path"],
            height=HEIGHT,
            width=WIDTH,
            objects=[box] if number % 3 else [],
            class_labels=[int(name == item["class"]) for name in CLASSES],
        )


def write_raw(folder: Path, train: int = 130, validation: int = 20) -> Path:
    """Three shards of training images and one for validation; images 3 and 4 are left out by rule."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(train + validation):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        label = "drop" if number in (3, 4) else CLASSES[number % 2]
        rows.append(f"{number}.png,{'train' if number < train else 'validation'},{label}\n")
    (folder / "table.csv").write_text("image,split,class\n" + "".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_raw(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def small_raw(tmp_path_factory) -> Path:
    """One shard for each split."""
    return write_raw(tmp_path_factory.mktemp("small") / "raw", train=12, validation=3)


@pytest.fixture
def own_raw(raw, tmp_path) -> Path:
    """A copy to damage; files keep their times."""
    shutil.copytree(raw, tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture(scope="module")
def reference(raw, tmp_path_factory) -> Path:
    """What an uninterrupted preparation makes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    tiny(raw, out)
    return out


def tiny(raw: Path, out: Path, **arguments) -> list[str]:
    """Prepare; returns what was said."""
    said: list[str] = []
    options = {"size": 32, "num_proc": 1, "say": said.append} | arguments
    prepare(TinyData, out, data_dir=raw, **options)
    return said


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(out: Path) -> list[str]:
    """What lies beside a prepared folder, without its lock."""
    return sorted(
        path.name for path in out.parent.iterdir() if path.name not in (out.name, f".{out.name}.lock", "raw")
    )


def rejected_rows(out: Path) -> list[list[str]]:
    with (out / "rejected.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


# Processes that can be killed. The fork server keeps their start cheap.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training.data.preparation", "tests.test_preparation"])


def die_at_event(number: int, whole_files: bool, arguments: dict) -> None:
    """
    Prepare, and be killed just before a change of the file system: the one of this number, of those that concern files
    and folders, or only of those after the files are written.
    """
    seen = 0
    place = str(arguments["out"])

    def hook(event: str, values: tuple) -> None:
        nonlocal seen
        if event == "open":
            counts = not whole_files and place in str(values[0]) and "w" in str(values[1])
        elif event == "os.rename":
            counts = place in str(values[0]) and not (whole_files and Path(values[0]).name.startswith("."))
        else:  # of rmtree, relative to a descriptor; not of the folder in which the builder was made
            counts = event == "os.rmdir" and not Path(str(values[0])).name.startswith("chex-prepare-")
        if counts:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    tiny(**arguments)


def run_tiny(arguments: dict) -> None:
    tiny(**arguments)


def start(target, *values) -> multiprocessing.Process:
    process = CONTEXT.Process(target=target, args=values)
    process.start()
    return process


class TestResult:
    def test_records_are_those_of_the_builder_with_smaller_images(self, raw, reference, tmp_path):
        train = open_prepared(reference, "train", cache_dir=tmp_path)
        assert train.num_rows == 128
        assert train["sample_id"][:4] == ["0.png", "1.png", "2.png", "5.png"]
        record = train[3]
        assert record["subject_id"] == "s2" and record["study_id"] is None and record["view"] == -1
        assert (record["height"], record["width"]) == (60, 48)
        assert record["objects"] == [{"bbox": [1.0, 2.0, 8.5, 50.0], "category": 1, "phrase": "Number 5."}]
        assert record["class_labels"] == [0, 1]
        assert train[0]["objects"] == []
        for column in ("sentences", "anatomy_boxes", "anatomy_present", "anatomy_labels", "anatomy_sentences"):
            assert record[column] is None
        expected = shrink(load_grey(raw / "images" / "5.png"), 32)
        assert np.array_equal(np.asarray(record["image"]), expected)
        assert record["image"].mode == "L" and record["image"].size == (32, 40)

    def test_manifest_counts_what_was_left_out(self, reference):
        info = read_info(reference)
        train = info.splits["train"]
        assert (train.records, train.dropped, train.rejected) == (128, {"the class is drop": 2}, 0)
        assert train.notes == {"boxes looked at": 128}
        assert [shard.records for shard in train.shards] == [41, 43, 44]
        assert info.filters == {"train": {"listed": 130}, "validation": {"listed": 20}}
        assert info.classes == CLASSES and info.size == 32
        assert info.options == {"missing": "error", "flavour": "plain", "slow": 0.0, "dies_at": ""}
        for shard in info.shards:
            data = (reference / shard.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)

    def test_load_dataset_opens_the_folder(self, reference, tmp_path):
        found = datasets.load_dataset(str(reference), cache_dir=str(tmp_path))
        assert {name: split.num_rows for name, split in found.items()} == {"train": 128, "validation": 20}
        assert found["train"].features == open_prepared(reference, "train", streaming=True).features

    def test_result_does_not_depend_on_the_number_of_processes(self, raw, reference, tmp_path):
        tiny(raw, tmp_path / "out", num_proc=3)
        assert contents(tmp_path / "out") == contents(reference)
        assert leftovers(tmp_path / "out") == []

    def test_nothing_is_done_twice(self, raw, tmp_path):
        out = tmp_path / "out"
        tiny(raw, out)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        said = tiny(raw, out)
        assert "already prepared" in said[-1]
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    def test_split_without_records_is_left_away(self, own_raw, tmp_path):
        table = own_raw / "table.csv"
        lines = table.read_text(encoding="utf-8").splitlines()
        lines = [line.rsplit(",", 1)[0] + ",drop" if ",validation," in line else line for line in lines]
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        said = tiny(own_raw, tmp_path / "out")
        assert any("No images are left in the validation split" in message for message in said)
        assert list(datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))) == ["train"]

    def test_phantom_is_prepared_like_the_others(self, tmp_path):
        options = {"num_train": 3, "num_validation": 0, "num_test": 2, "seed": 5}
        info = prepare("phantom", tmp_path / "out", size=64, num_proc=1, options=options)
        assert info.classes == tuple(PHANTOM_CLASSES)
        found = list(open_prepared(tmp_path / "out", "train", streaming=True))
        assert len(found) == 3
        for index, record in enumerate(found):
            drawn = phantom_record(5, index, 64) | {"view": 0 if phantom_record(5, index, 64)["view"] == "PA" else 1}
            pixels = np.asarray(PIL.Image.open(io.BytesIO(drawn.pop("image")["bytes"])))
            assert np.array_equal(np.asarray(record.pop("image")), pixels)
            boxes, drawn_boxes = record.pop("objects"), drawn.pop("objects")
            assert record == drawn
            assert [(PHANTOM_CLASSES[box["category"]], box["phrase"]) for box in boxes] == [
                (box["category"], box["phrase"]) for box in drawn_boxes
            ]
            for box, expected in zip(boxes, drawn_boxes, strict=True):
                assert box["bbox"] == pytest.approx(expected["bbox"], rel=1e-6)  # single precision


class TestImages:
    @pytest.mark.parametrize("shape", [(60, 48), (41, 67), (64, 64), (33, 90)])
    def test_pixels_are_means_over_their_area(self, shape):
        image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        small = shrink(image, 32)
        height, width = small.shape
        # Repeat every pixel so often that input and output borders coincide.
        fine = np.repeat(np.repeat(image, height, axis=0), width, axis=1).astype(np.float64)
        expected = fine.reshape(height, shape[0], width, shape[1]).mean(axis=(1, 3))
        assert np.abs(small - expected).max() <= 0.501

    def test_proportions_are_kept_and_nothing_is_enlarged(self):
        assert shrink(np.zeros((1000, 830), np.uint8), 256).shape == (308, 256)
        assert shrink(np.zeros((830, 1000), np.uint8), 256).shape == (256, 308)
        small = np.zeros((100, 30), np.uint8)
        assert shrink(small, 32) is small


class TestInterruption:
    def test_killed_at_any_file_operation_it_goes_on_to_the_same_result(self, small_raw, tmp_path):
        tiny(small_raw, tmp_path / "whole")
        expected = contents(tmp_path / "whole")
        for number in range(40):
            out = tmp_path / str(number) / "out"
            process = start(die_at_event, number, False, {"raw": small_raw, "out": out})
            process.join(60)
            assert process.exitcode in (0, -signal.SIGKILL)
            # The folder is absent or complete.
            assert not out.exists() or contents(out) == expected
            tiny(small_raw, out)
            assert contents(out) == expected and leftovers(out) == []
            if process.exitcode == 0:
                break
        # Opened and renamed: two shards, their notes, three more files; the folder itself; work folders removed.
        assert process.exitcode == 0 and number >= 2 * 7 + 2

    def test_killed_while_replacing_a_folder_leaves_the_old_or_the_new_one(self, small_raw, tmp_path):
        old = tmp_path / "old"
        tiny(small_raw, old, size=40)
        tiny(small_raw, tmp_path / "new")
        before, after = contents(old), contents(tmp_path / "new")
        states = []
        for number in range(10):
            out = tmp_path / str(number) / "out"
            shutil.copytree(old, out)
            process = start(die_at_event, number, True, {"raw": small_raw, "out": out, "overwrite": True})
            process.join(60)
            states.append(
                "absent" if not out.exists() else {str(before): "old", str(after): "new"}[str(contents(out))]
            )
            if states[-1] == "absent":
                # A run that is not told to replace it puts the old folder back.
                with pytest.raises(PreparationError, match="was prepared from other raw files"):
                    tiny(small_raw, out)
                assert contents(out) == before
            tiny(small_raw, out, overwrite=True)
            assert contents(out) == after and leftovers(out) == []
            if process.exitcode == 0:
                break
        assert states[:3] == ["old", "absent", "new"] and set(states[3:]) == {"new"}

    def test_killed_with_worker_processes_at_random_instants(self, raw, tmp_path):
        rng = random.Random(0)
        options = {"slow": 0.01}
        tiny(raw, tmp_path / "whole", options=options, num_proc=2)
        out = tmp_path / "out"
        kills = 0
        while kills < 4 and not out.exists():
            process = start(run_tiny, {"raw": raw, "out": out, "options": options, "num_proc": 2})
            while not list(tmp_path.glob("out.partial-*")) and process.is_alive():
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.6))
            process.kill()
            process.join()
            kills += not out.exists()
        assert kills
        tiny(raw, out, options=options, num_proc=2)
        assert contents(out) == contents(tmp_path / "whole")

    def test_workers_of_a_killed_process_end(self, raw, tmp_path):
        process = start(run_tiny, {"raw": raw, "out": tmp_path / "out", "options": {"slow": 0.02}, "num_proc": 2})
        deadline = time.monotonic() + 30
        data = None
        while data is None and time.monotonic() < deadline:
            time.sleep(0.05)
            data = next(tmp_path.glob("out.partial-*/prepared/data"), None)
        time.sleep(0.5)
        process.kill()
        process.join()
        time.sleep(0.5)
        finished = len(list(data.iterdir()))
        time.sleep(1.5)  # in which workers would have written the rest
        assert len(list(data.iterdir())) == finished < 4

    def test_finished_shards_are_kept_and_damaged_ones_made_again(self, raw, reference, tmp_path):
        out = tmp_path / "out"
        process = start(die_at_event, 12, False, {"raw": raw, "out": out})
        process.join(60)
        shards = sorted(tmp_path.glob("out.partial-*/prepared/data/*.parquet"))
        assert len(shards) == 3
        times = [path.stat().st_mtime_ns for path in shards]
        damaged = bytearray(shards[0].read_bytes())
        damaged[100] ^= 1
        shards[0].write_bytes(damaged)
        os.utime(shards[0], ns=(times[0], times[0]))
        said = tiny(raw, out)
        assert "Going on: 2 of 4 shards are finished already." in said
        new = [(out / "data" / path.name).stat().st_mtime_ns for path in shards]
        assert new[0] != times[0] and new[1:] == times[1:]
        assert contents(out) == contents(reference)

    def test_other_options_throw_unfinished_work_away(self, raw, tmp_path):
        out = tmp_path / "out"
        start(die_at_event, 12, False, {"raw": raw, "out": out}).join(60)
        (begun,) = tmp_path.glob("out.partial-*")
        said = tiny(raw, out, options={"flavour": "other"})
        assert f"{begun.name} was begun with other files or options and is thrown away." in said
        assert not begun.exists() and read_info(out).options["flavour"] == "other"

    def test_second_process_is_told_to_wait(self, raw, tmp_path):
        out = tmp_path / "out"
        process = start(run_tiny, {"raw": raw, "out": out, "options": {"slow": 0.01}})
        while not list(tmp_path.glob("out.partial-*")):
            time.sleep(0.02)
        with pytest.raises(PreparationError, match="is being prepared by another process"):
            tiny(raw, out)
        process.join(60)
        assert process.exitcode == 0 and read_info(out).splits["train"].records == 128

    def test_dead_worker_is_reported(self, raw, tmp_path):
        with pytest.raises(PreparationError, match=r"ended abruptly.*at work were .*60\.png.*run the same command"):
            tiny(raw, tmp_path / "out", num_proc=2, options={"dies_at": "60.png", "slow": 0.005})


class TestRejectedImages:
    def damage(self, raw: Path) -> None:
        (raw / "images" / "7.png").write_bytes((raw / "images" / "7.png").read_bytes()[:500])
        PIL.Image.new("L", (HEIGHT, WIDTH)).save(raw / "images" / "70.png")
        (raw / "images" / "140.png").write_bytes(b"")

    def test_they_are_listed_and_the_rest_is_prepared(self, own_raw, tmp_path):
        self.damage(own_raw)
        results = []
        for num_proc in (1, 3):
            out = tmp_path / f"out{num_proc}"
            tiny(own_raw, out, max_rejected=5, num_proc=num_proc)
            results.append(contents(out))
        assert results[0] == results[1]
        rows = rejected_rows(out)
        assert [row[:3] for row in rows] == [
            ["train", "7.png", str(own_raw / "images/7.png")],
            ["train", "70.png", str(own_raw / "images/70.png")],
            ["validation", "140.png", str(own_raw / "images/140.png")],
        ]
        assert "cannot be decoded" in rows[0][3] and "cannot be decoded" in rows[2][3]
        assert "48 x 60 pixels (height x width), but its record says 60 x 48" in rows[1][3]
        info = read_info(out)
        assert [split.rejected for split in info.splits.values()] == [2, 1]
        assert [split.records for split in info.splits.values()] == [126, 19]

    def test_too_many_stop_the_work_which_is_kept(self, own_raw, tmp_path):
        self.damage(own_raw)
        out = tmp_path / "out"
        for num_proc in (1, 3):
            with pytest.raises(PreparationError) as caught:
                tiny(own_raw, out, max_rejected=1, num_proc=num_proc)
            message = str(caught.value)
            assert (
                "2 of the first 86 images (of 150) are unusable, more than the 1 percent allowed: 7.png: " in message
            )
            assert not out.exists()
        kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial-*/prepared/data/*")}
        assert len(kept) >= 2
        tiny(own_raw, out, max_rejected=5)
        assert all((out / "data" / name).stat().st_mtime_ns == time for name, time in kept.items())

    def test_repaired_images_cost_their_shard_only(self, raw, own_raw, tmp_path):
        self.damage(own_raw)
        out = tmp_path / "out"
        with pytest.raises(PreparationError):
            tiny(own_raw, out, max_rejected=1)
        shutil.copy2(raw / "images" / "7.png", own_raw / "images" / "7.png")
        said = tiny(own_raw, out, max_rejected=5)
        assert "Going on: 1 of 4 shards are finished already." in said
        assert [row[1] for row in rejected_rows(out)] == ["70.png", "140.png"]

    def test_missing_images_stop_at_once_unless_they_are_skipped(self, own_raw, tmp_path):
        for number in (5, 6, 8):
            (own_raw / "images" / f"{number}.png").unlink()
        out = tmp_path / "out"
        with pytest.raises(FileNotFoundError, match=r"3 of 150 images are missing, such as .*/5\.png"):
            tiny(own_raw, out)
        assert not list(tmp_path.glob("out.partial*"))
        listed = [(f"{number}.png", "the image file is missing") for number in (5, 6, 8)]
        tiny(own_raw, out, options={"missing": "skip"}, max_rejected=0)
        assert [(row[1], row[3]) for row in rejected_rows(out)] == listed
        # within the limit they are unusable images like others
        tiny(own_raw, tmp_path / "allowed", max_rejected=2)
        assert [(row[1], row[3]) for row in rejected_rows(tmp_path / "allowed")] == listed

    def test_mistakes_in_the_tables_name_the_image(self, own_raw, tmp_path):
        table = own_raw / "table.csv"
        table.write_text(table.read_text(encoding="utf-8").replace("70.png,train,Mass", "70.png,train,Mas"), "utf-8")
        for num_proc in (1, 2):
            with pytest.raises(PreparationError, match=r"Tiny data: 70\.png: unknown class 'Mas'"):
                tiny(own_raw, tmp_path / "out", num_proc=num_proc)


class TestExistingFolder:
    def test_other_inputs_need_overwrite(self, own_raw, tmp_path):
        out = tmp_path / "out"
        tiny(own_raw, out)
        before = contents(out)
        shutil.copy(own_raw / "images" / "0.png", own_raw / "images" / "1.png")
        with pytest.raises(PreparationError, match="--overwrite"):
            tiny(own_raw, out)
        assert contents(out) == before
        tiny(own_raw, out, overwrite=True)
        assert contents(out) != before and leftovers(out) == []

    def test_damaged_folder_is_named_and_replaced(self, raw, reference, tmp_path):
        out = tmp_path / "out"
        shutil.copytree(reference, out)
        (out / "data" / "train-00001-of-00003.parquet").unlink()
        with pytest.raises(FileNotFoundError, match=r"train-00001-of-00003\.parquet is missing"):
            open_prepared(out)
        with pytest.raises(PreparationError, match=r"train-00001-of-00003\.parquet is missing.*--overwrite"):
            tiny(raw, out)
        tiny(raw, out, overwrite=True)
        assert contents(out) == contents(reference)

    def test_folder_of_something_else_is_not_touched(self, raw, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(PreparationError, match="holds other files"):
            tiny(raw, out, overwrite=True)
        assert [path.name for path in out.iterdir()] == ["thesis.txt"]
        (out / "thesis.txt").unlink()
        tiny(raw, out)  # an empty folder is used
        assert read_info(out).splits["train"].records == 128

    def test_small_disk_is_noticed_before_the_work(self, raw, tmp_path, monkeypatch):
        monkeypatch.setattr(
            preparation.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**4)
        )
        with pytest.raises(PreparationError, match=r"needs about 0\.\d MB more, but only 0\.0 MB are free"):
            tiny(raw, tmp_path / "out")
        assert not list(tmp_path.glob("out.partial-*/prepared/data/*"))


class TestOpening:
    def test_streaming_gives_the_records_of_the_map_style_form(self, reference, tmp_path):
        mapped = open_prepared(reference, cache_dir=tmp_path)
        streamed = open_prepared(reference, streaming=True)
        assert list(mapped) == list(streamed) == ["train", "validation"]
        for split in mapped:
            assert list(mapped[split]) == list(streamed[split])

    def test_shuffled_stream_keeps_records_whole(self, tmp_path):
        prepare(
            "phantom",
            tmp_path / "out",
            size=64,
            num_proc=1,
            options={"num_train": 60, "num_validation": 0, "num_test": 0},
        )
        mapped = open_prepared(tmp_path / "out", "train", cache_dir=tmp_path / "cache").remove_columns("image")
        streamed = open_prepared(tmp_path / "out", "train", streaming=True).remove_columns("image")
        shuffled = list(streamed.shuffle(seed=1, buffer_size=50))
        assert shuffled != list(mapped)
        assert sorted(shuffled, key=lambda record: record["sample_id"]) == list(mapped)

    def test_stream_is_shared_out_over_processes_and_workers(self, reference):
        from torch.utils.data import DataLoader

        seen = []
        for rank in range(2):
            part = split_dataset_by_node(open_prepared(reference, "train", streaming=True), rank, 2)
            loader = DataLoader(part.select_columns(["sample_id"]), batch_size=None, num_workers=2)
            seen += [record["sample_id"] for record in loader]
        train = open_prepared(reference, "train", streaming=True)
        assert train.num_shards == 3
        assert Counter(seen) == Counter(record["sample_id"] for record in train)

    def test_rebuilt_folder_is_not_served_from_the_cache(self, own_raw, tmp_path):
        out, cache = tmp_path / "out", tmp_path / "cache"
        tiny(own_raw, out)
        first = open_prepared(out, "train", cache_dir=cache)[0]["image"]
        times = {path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
        PIL.Image.new("L", (WIDTH, HEIGHT), 9).save(own_raw / "images" / "0.png")
        tiny(own_raw, out, overwrite=True)
        for name, moment in times.items():  # as if copied by a tool that keeps times
            os.utime(out / "data" / name, ns=(moment, moment))
        second = open_prepared(out, "train", cache_dir=cache)[0]["image"]
        assert first != second and np.asarray(second).max() == 9

    def test_moved_folder_uses_the_same_copy(self, reference, tmp_path):
        cache = tmp_path / "cache"
        first = open_prepared(reference, "train", cache_dir=cache).cache_files
        shutil.copytree(reference, tmp_path / "elsewhere")
        assert open_prepared(tmp_path / "elsewhere", "train", cache_dir=cache).cache_files == first

    def test_unknown_split_and_wrong_size_are_named(self, reference, tmp_path):
        with pytest.raises(ValueError, match="no split 'test'. It has: train, validation"):
            open_prepared(reference, "test")
        shutil.copytree(reference, tmp_path / "out")
        with (tmp_path / "out/data/validation-00000-of-00001.parquet").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ValueError, match=r"validation-00000-of-00001\.parquet has [\d,]+ bytes where"):
            open_prepared(tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="no prepared folder"):
            open_prepared(tmp_path)


@pytest.mark.parametrize("name", ["mimic-cxr", "chest-imagenome", "ms-cxr", "nih-cxr14", "vindr-cxr"])
def test_real_formats_give_the_records_of_their_builders(name, tmp_path):
    write = {"nih-cxr14": write_nih, "vindr-cxr": write_vindr}.get(name, write_all)
    write(tmp_path / "raw")
    prepare(name, tmp_path / "out", data_dir=tmp_path / "raw", num_proc=1, options={"missing": "skip"})
    assert not rejected_rows(tmp_path / "out")
    builder = source_class(name)(data_dir=str(tmp_path / "raw"), cache_dir=str(tmp_path / "cache"), missing="skip")
    builder.download_and_prepare()
    built, prepared = builder.as_dataset(), open_prepared(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert list(built) == list(prepared)
    for split in built:
        assert built[split].features == prepared[split].features
        assert list(built[split].remove_columns("image")) == list(prepared[split].remove_columns("image"))
        for original, image in zip(built[split]["image"], prepared[split]["image"], strict=True):
            expected = shrink(np.asarray(original.convert("L")), 256)
            assert np.array_equal(np.asarray(image), expected)
    assert inspect_prepared(tmp_path / "out").splits[split].images == built[split].num_rows


class TestInspection:
    def test_counts_of_a_prepared_folder(self, reference):
        train = inspect_prepared(reference).splits["train"]
        numbers = [number for number in range(130) if number not in (3, 4)]
        boxed = [number for number in numbers if number % 3]
        assert train.images == 128 and train.subjects == len({number // 2 for number in numbers})
        assert train.views == {"unknown": 128}
        assert (
            train.boxes
            == train.images_with_box
            == {
                "Mass": sum(number % 2 == 0 for number in boxed),
                "Nodule": sum(number % 2 == 1 for number in boxed),
            }
        )
        assert train.class_labels == {"Mass": 64, "Nodule": 64}
        assert train.phrases == len(boxed)
        assert train.regions == train.region_labels == {} and train.sentences_per_report is None
        assert train.annotated["objects"] == 128 and train.annotated["sentences"] == 0

    def test_counts_of_the_phantom_agree_with_its_records(self, tmp_path):
        prepare(
            "phantom",
            tmp_path / "out",
            size=64,
            num_proc=1,
            options={"num_train": 12, "num_validation": 0, "num_test": 0},
        )
        found = inspect_prepared(tmp_path / "out")
        train = found.splits["train"]
        records = [phantom_record(7, index, 64) for index in range(12)]
        assert train.views == Counter(record["view"] for record in records)
        assert train.sentences == sum(len(record["sentences"]) for record in records)
        assert train.words == sum(len(text.split()) for record in records for text in record["sentences"])
        names = Counter(box["category"] for record in records for box in record["objects"])
        assert {name: count for name, count in train.boxes.items() if count} == names
        images = Counter(name for record in records for name in {box["category"] for box in record["objects"]})
        assert {name: count for name, count in train.images_with_box.items() if count} == images
        assert train.regions["trachea"] == sum(record["anatomy_present"][16] for record in records)
        assert train.region_sentences["trachea"] == sum(bool(record["anatomy_sentences"][16]) for record in records)
        assert sum(train.region_labels.values()) == sum(np.sum(record["anatomy_labels"]) for record in records)
        json.dumps(found.to_dict())

    def test_raw_download_is_sampled(self, own_raw, monkeypatch):
        (own_raw / "images" / "65.png").write_bytes(b"no image")
        monkeypatch.setattr(preparation, "builder_class", lambda key: TinyData)
        monkeypatch.setitem(preparation.BUILDERS, "tiny", ("", ""))
        assert source_class("tiny") is TinyData
        found, records = inspect_raw("tiny", own_raw, sample=130)
        assert found.filters["train"] == {"listed": 130}
        assert found.splits["train"].images == 127 and found.left_out["train"] == {"the class is drop": 2}
        assert [row[1] for row in found.rejected] == ["65.png"]
        assert records[0]["image"].shape == (HEIGHT, WIDTH)
        assert inspect_raw("tiny", own_raw, sample=10)[0].splits["train"].images == 10

    def test_samples_are_spread_evenly(self, reference):
        assert spread(10, 3) == [1, 5, 8] and spread(2, 5) == [0, 1] and spread(0, 5) == []
        records = sample_records(reference, 4, "validation")
        assert [record["sample_id"] for record in records] == ["132.png", "137.png", "142.png", "147.png"]

    def test_sheet_shows_boxes_at_their_place(self, reference):
        image = np.full((30, 24), 100, np.uint8)
        box = {"bbox": [20.0, 30.0, 60.0, 90.0], "category": 0, "phrase": "A mass."}
        record = empty_record(sample_id="a", image=image, height=120, width=96, objects=[box])
        marked = np.asarray(contact_sheet([record], CLASSES, tile=240)).astype(int)
        plain = np.asarray(contact_sheet([record], CLASSES, tile=240, boxes="none")).astype(int)
        changed = np.abs(marked - plain).sum(axis=2) > 0
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        # Twice the original size: the image is 240 x 192, centred in the tile, 10 pixels from the border of the sheet.
        left, top = 10 + 24, 10
        assert columns.min() == left + 40 and columns.max() == left + 120
        assert rows.max() == top + 180 and top + 60 - 25 < rows.min() < top + 60  # with the name above the box
        with pytest.raises(ValueError, match="at least one"):
            contact_sheet([], CLASSES)
        with pytest.raises(ValueError, match="'lungs'"):
            contact_sheet([record], CLASSES, boxes="lungs")

    @pytest.mark.parametrize("boxes", ["auto", "findings", "anatomy"])
    def test_sheet_of_the_phantom(self, boxes):
        records = [phantom_record(7, index, 64) for index in range(5)]
        plain = contact_sheet(records, PHANTOM_CLASSES, columns=4, tile=100, boxes="none")
        assert plain.size[0] == 4 * 110 + 10
        marked = contact_sheet(records, PHANTOM_CLASSES, columns=4, tile=100, boxes=boxes)
        assert np.any(np.asarray(marked) != np.asarray(plain))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 8}, "size must be an integer of at least 32"),
            ({"num_proc": 0}, "num_proc must be at least 1"),
            ({"max_rejected": 101}, "from 0 to 100"),
        ],
    )
    def test_wrong_values(self, raw, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny(raw, tmp_path / "out", **arguments)

    def test_missing_raw_folder_leaves_nothing_behind(self, tmp_path, monkeypatch):
        monkeypatch.delenv("TINY_DIR", raising=False)
        with pytest.raises(FileNotFoundError, match="TINY_DIR"):
            prepare(TinyData, tmp_path / "below" / "out")
        assert not (tmp_path / "below").exists()

    def test_unknown_data_set_lists_the_known_ones(self, tmp_path):
        with pytest.raises(ValueError, match="'mimick'.*mimic-cxr.*phantom"):
            prepare("mimick", tmp_path / "out")
