"""
Preparing a data set: raw downloads -> a folder of Parquet files with small images, ready for training.

Images are scaled so that the shorter side has `size` pixels, uncropped, by exact area interpolation, and stored as
grey PGM, PNG or JPEG. Boxes, `height` and `width` stay those of the original. The work is cut into shards that depend
on the data alone, so any number of processes writes the same bytes, and a killed run goes on where it stopped.
"""

import contextlib
import csv
import glob
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import filelock
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse
from tqdm import tqdm

from processing_chex.vocabulary import PHANTOM_CLASSES
from training.data import BUILDERS, builder_class
from training.data.phantom import (
    SPLIT_OFFSETS,
    PhantomConfig,
    PhantomSample,
    encode_png,
    generator_fingerprint,
    phantom_features,
    render_phantom,
    sample_to_record,
)
from training.data.prepared import (
    DATA_FOLDER,
    MANIFEST,
    REJECTED,
    PreparedInfo,
    PreparedShard,
    PreparedSplit,
    check_folder,
    file_sha256,
    is_prepared,
    read_info,
)
from training.data.raw import (
    MISSING,
    DroppedRecord,
    RawBuilder,
    RejectedRecord,
    Source,
    builder_options,
    check_images_exist,
    is_missing,
)
from training.data.record import record_classes


logger = logging.getLogger(__name__)

# Bumped when the same records would be written otherwise.
WRITER_VERSION = 1
SHARD_RECORDS = 1000
# Small splits are cut finer, so that several processes and data loader workers have something to share out.
MIN_SHARDS, MIN_SHARD_RECORDS = 16, 50
ROW_GROUP = 100
# PGM is the bare bytes, which training reads in a small part of the time that PNG and JPEG take.
IMAGE_FORMATS = ("pgm", "png", "jpeg")
JPEG_QUALITY = 95
MIN_SIZE = 32
_SAMPLES = 8  # records that the estimate of disk space is made from


class PreparationError(ValueError):
    """Something outside the raw files keeps a data set from being prepared. The message says what to do."""


class PreparationInterrupted(KeyboardInterrupt):
    """Ctrl-C while preparing; the message says what is kept and how to go on."""


class _Stopped(Exception):
    """The main process wants this worker to stop."""


class PhantomSource:
    """The phantom as a source of `prepare`: drawn instead of read, otherwise used like a `RawBuilder`."""

    DATASET = "phantom"
    TITLE = "The phantom"
    SOURCES: tuple[Source, ...] = ()
    CLASSES = PHANTOM_CLASSES
    BUILDER_CONFIG_CLASS = PhantomConfig

    def __init__(self, data_dir: str | None = None, cache_dir: str | None = None, **options: object) -> None:
        if data_dir is not None:
            raise ValueError("The phantom is drawn, not read from files: leave its raw folder away.")
        if unknown := set(options) - set(source_options(PhantomSource)):
            raise ValueError(f"The phantom has no options {sorted(unknown)}.")
        config = PhantomConfig(**options)
        self.seed, self.image_size, self.split_sizes = config.seed, config.image_size, config.split_sizes()
        values = {name: getattr(config, name) for name in source_options(PhantomSource)}
        self.config = SimpleNamespace(**values, missing="error", fingerprint=generator_fingerprint())
        self.info = datasets.DatasetInfo(features=phantom_features())
        self.counts: dict[str, Counter[str]] = {}
        self.notes: Counter[str] = Counter()

    def items(self) -> dict[str, list[dict]]:
        """Split -> number of each study in the collection."""
        self.counts = {split: Counter(drawn=count) for split, count in self.split_sizes.items() if count}
        return {
            split: [
                {"sample_id": f"phantom-{self.seed}-{index:08d}", "index": index}
                for index in range(SPLIT_OFFSETS[split], SPLIT_OFFSETS[split] + count)
            ]
            for split, count in self.split_sizes.items()
            if count
        }

    def record(self, item: dict) -> dict:
        """The record of a study; its image is the number of the study, for `load_image`."""
        sample = _draw(self.seed, item["index"], self.image_size)
        return sample_to_record(sample) | {"image": item["index"]}

    def load_image(self, path: int) -> np.ndarray:
        """(H, W) uint8."""
        return _draw(self.seed, path, self.image_size).image

    def funnel(self) -> str:
        return "\n".join(f"{split}: {counts.total():,} drawn" for split, counts in self.counts.items())


@lru_cache(maxsize=1)
def _draw(seed: int, index: int, size: int) -> PhantomSample:
    return render_phantom(seed, index, size)


SourceClass = type[RawBuilder] | type[PhantomSource]


def data_set_names() -> list[str]:
    """Everything that can be prepared, by its name on the command line."""
    return [*BUILDERS, PhantomSource.DATASET]


def source_class(name: str) -> SourceClass:
    """
    The builder of a data set, the phantom included; _ may stand for -.

    Raises:
        ValueError: There is none of this name.
    """
    key = name.lower().replace("_", "-")
    if key == PhantomSource.DATASET:
        return PhantomSource
    if key not in BUILDERS:
        raise ValueError(f"There is no data set {name!r}. Known: {', '.join(data_set_names())}.")
    return builder_class(key)


def source_options(source: SourceClass) -> dict[str, object]:
    """Options that a user may set, with their defaults; raw folders are not among them."""
    return {name: value for name, value in builder_options(source).items() if name != "generator"}


@dataclass(frozen=True)
class _Recipe:
    """What a process needs to construct the builder and to write images."""

    source: SourceClass
    arguments: dict[str, object]
    size: int
    image_format: str

    def builder(self) -> RawBuilder | PhantomSource:
        # Constructing a builder makes its cache folder, in which nothing is kept here. It is gone again at once, so
        # that not even a killed process leaves it behind.
        with tempfile.TemporaryDirectory(prefix="chex-prepare-") as cache_dir:
            return self.source(**self.arguments, cache_dir=cache_dir)


@dataclass(frozen=True)
class _Shard:
    """A fixed part of a split. `inputs` is the digest of its items and of size and time of their files."""

    split: str
    number: int
    total: int
    items: list[dict]
    inputs: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}-of-{self.total:05d}"


@dataclass(frozen=True)
class _Done:
    """What is noted beside a finished shard."""

    inputs: str
    records: int
    bytes: int
    sha256: str
    dropped: dict[str, int]
    notes: dict[str, int]
    rejected: list[list[str]]  # sample_id, path, reason

    def counted(self, skip_missing: bool) -> list[list[str]]:
        """Rejections that count against the limit: missing images do not where they were allowed."""
        return [row for row in self.rejected if not (skip_missing and row[2] == MISSING)]


@dataclass(frozen=True)
class _Target:
    """Where shards and the notes on them are written, and how large the images are, in which format."""

    folder: Path
    notes: Path
    size: int
    image_format: str


def prepare(
    name: str | SourceClass,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    size: int = 256,
    image_format: str = "pgm",
    num_proc: int | None = None,
    max_rejected: float = 1.0,
    options: Mapping[str, object] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = logger.info,
) -> PreparedInfo:
    """
    Build the folder `out`, or the rest of it after an interruption. It appears complete, by one rename.

    Unfinished work is in `out`.partial-<digest of inputs and options> beside it. Finished shards are checked by their
    hash and used again; what was made from other tables or options is thrown away.

    Args:
        name: Of the data set (see `data_set_names`), or its builder.
        data_dir: Folder in which all raw downloads are looked for.
        size: Shorter side of the images in pixels; smaller ones are not enlarged.
        image_format: "pgm" (uncompressed, fastest), "png" (lossless) or "jpeg" (quality 95: the smallest).
        num_proc: Processes; default: one for each core. The result does not depend on it.
        max_rejected: Percentage of images that may be unusable before the preparation stops.
        options: Of the builder, with `{key}_dir` for single raw downloads.
        overwrite: Replace a folder that was made from other inputs or with other options.
        say: Receives what happens, one message at a time.

    Returns:
        The manifest. A folder that was made from the same inputs and options before is left as it is.

    Raises:
        FileNotFoundError: Raw downloads are missing, or more images than `max_rejected`.
        PreparationError: `out` is in use, another process prepares it, too many images are unusable, the disk is too
            small, or a process died.
        PreparationInterrupted: Ctrl-C.
        ValueError: A wrong argument, or tables that are not what they should be.
    """
    source = source_class(name) if isinstance(name, str) else name
    if isinstance(size, bool) or not isinstance(size, int) or size < MIN_SIZE:
        raise ValueError(f"size must be an integer of at least {MIN_SIZE} pixels, got {size!r}.")
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image_format must be one of {', '.join(IMAGE_FORMATS)}, got {image_format!r}.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got {num_proc}.")
    if not 0 <= max_rejected <= 100:
        raise ValueError(f"max_rejected is a percentage from 0 to 100, got {max_rejected}.")
    out = Path(out).absolute()
    if out.is_file():
        raise PreparationError(f"{out} is a file: name a new folder.")
    arguments: dict[str, object] = {"data_dir": str(data_dir) if data_dir is not None else None, **(options or {})}
    if source is PhantomSource:
        arguments.setdefault("image_size", size)
    recipe = _Recipe(source, arguments, size, image_format)
    builder = recipe.builder()
    with _locked(out):
        return _Preparation(recipe, builder, out, max_rejected, overwrite, say).run(num_proc or _cores())


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock beside `out`; the system frees it when the process ends, however that happens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out.parent / f".{out.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise PreparationError(
            f"{out} is being prepared by another process, which holds {lock.lock_file}. Wait for it, or name another "
            "folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Preparation:
    """One call of `prepare`, with the lock of the folder held."""

    def __init__(
        self,
        recipe: _Recipe,
        builder: RawBuilder | PhantomSource,
        out: Path,
        max_rejected: float,
        overwrite: bool,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.builder, self.out = recipe, builder, out
        self.max_rejected, self.overwrite, self.say = max_rejected, overwrite, say
        _undo_half_swap(out)
        if out.is_dir() and not is_prepared(out) and any(out.iterdir()):
            raise PreparationError(f"{out} holds other files: name a new folder. Nothing was changed.")
        say(f"{builder.TITLE}: reading the tables.")
        splits = builder.items()
        self.skip_missing = builder.config.missing == "skip"
        if not self.skip_missing:
            # A few count as unusable like others; very many are better known before hours are spent.
            check_images_exist(builder.TITLE, _with_images(splits), max_rejected)
        self.options = {name: _plain(getattr(builder.config, name)) for name in source_options(recipe.source)}
        self.shards = _cut(splits)
        self.total = sum(len(shard.items) for shard in self.shards)
        settings = {
            "writer": WRITER_VERSION,
            "dataset": builder.DATASET,
            "builder": builder.config.fingerprint,
            "features": builder.info.features.to_dict(),
            "options": self.options,
            "size": recipe.size,
            "images": {split: len(items) for split, items in splits.items()},
        }
        if recipe.image_format != "png":  # once the only one, so that folders made then are recognised
            settings["image_format"] = recipe.image_format
        self.plan = _digest(settings)
        self.fingerprint = _digest([settings, [shard.inputs for shard in self.shards]])
        # `prepared` becomes `out`; `shards` holds the notes on finished ones; `replaced` is the old `out` in a swap.
        self.work = out.parent / f"{out.name}.partial-{self.plan}"
        self.target = _Target(self.work / "prepared", self.work / "shards", recipe.size, recipe.image_format)
        self.folder, self.notes = self.target.folder, self.target.notes
        self.done: dict[int, _Done] = {}

    def run(self, num_proc: int) -> PreparedInfo:
        if (info := self._already_prepared()) is not None:
            self.say(f"{self.out} is already prepared from the same files and options; nothing was done.")
            return info
        for other in _partial_folders(self.out):
            if other != self.work:
                self.say(f"{other.name} was begun with other files or options and is thrown away.")
                shutil.rmtree(other)
        (self.folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
        self.notes.mkdir(exist_ok=True)
        self._find_done()
        pending = [index for index in range(len(self.shards)) if index not in self.done]
        if self.done:
            self.say(f"Going on: {len(self.done):,} of {len(self.shards):,} shards are finished already.")
        try:
            self._check_rejections()
            if pending:
                self._check_space(pending)
                self._build(pending, num_proc)
            info = self._describe()
            self._publish(info)
        except KeyboardInterrupt:
            raise PreparationInterrupted(f"Interrupted. {self._kept()}") from None
        except OSError as error:
            raise PreparationError(f"{self.out} cannot be written ({error}). {self._kept()}") from error
        return info

    def _already_prepared(self) -> PreparedInfo | None:
        """The manifest of `out` if nothing is left to do; raises if `out` must not be replaced."""
        if not is_prepared(self.out):
            return None
        try:
            info = read_info(self.out)
            if info.fingerprint == self.fingerprint:
                check_folder(self.out, info)
                for partial in _partial_folders(self.out):
                    shutil.rmtree(partial)
                return info
            reason = f"{self.out} was prepared from other raw files or with other options"
        except (FileNotFoundError, ValueError) as error:
            reason = f"{self.out} is damaged: {error}"
        if not self.overwrite:
            raise PreparationError(f"{reason.removesuffix('.')}. Replace it with --overwrite, or name another folder.")
        return None

    def _find_done(self) -> None:
        """Take over finished shards, and remove everything else of an earlier run."""
        expected = {f"{shard.name}.parquet" for shard in self.shards}
        for path in (*self.folder.iterdir(), *(self.folder / DATA_FOLDER).iterdir(), *self.notes.iterdir()):
            if path.name.startswith(".") or (path.suffix == ".parquet" and path.name not in expected):
                path.unlink()
        with ThreadPoolExecutor(_cores()) as threads:  # hashing runs outside the interpreter lock
            for index, done in enumerate(threads.map(self._read_note, self.shards)):
                if done is not None and not self._is_repaired(self.shards[index], done):
                    self.done[index] = done

    def _read_note(self, shard: _Shard) -> _Done | None:
        path = self.folder / DATA_FOLDER / f"{shard.name}.parquet"
        try:
            done = _Done(**json.loads((self.notes / f"{shard.name}.json").read_text(encoding="utf-8")))
            if done.inputs != shard.inputs or path.stat().st_size != done.bytes or file_sha256(path) != done.sha256:
                return None
        except (OSError, ValueError, TypeError):
            return None
        return done

    def _is_repaired(self, shard: _Shard, done: _Done) -> bool:
        """Whether an unusable image is usable now: other files than its own may have been downloaded again."""
        reasons = {sample: reason for sample, _, reason in done.rejected}
        for item in shard.items:
            if item["sample_id"] in reasons:
                try:
                    read_record(self.builder, item)
                    return True
                except RejectedRecord as error:
                    if _reason(error) != reasons[item["sample_id"]]:
                        return True
                except DroppedRecord:
                    return True
        return False

    def _check_space(self, pending: Sequence[int]) -> None:
        """Compare the free space with what the images of a few records suggest."""
        items = [item for index in pending for item in self.shards[index].items]
        sizes = []
        for item in items[:: max(len(items) // _SAMPLES, 1)][:_SAMPLES]:
            with contextlib.suppress(DroppedRecord, RejectedRecord):
                sizes.append(len(_row(self.builder, item, self.target)["image"]["bytes"]))
        if not sizes:
            return
        # 2 kB for everything beside the image; a tenth of reserve.
        needed = round(1.1 * len(items) * (sum(sizes) / len(sizes) + 2000))
        free = shutil.disk_usage(self.work).free
        self.say(f"{len(items):,} images to prepare, about {_bytes(needed)}; {_bytes(free)} are free.")
        if needed > free:
            raise PreparationError(
                f"{self.out} needs about {_bytes(needed)} more, but only {_bytes(free)} are free on its disk. Make "
                "room, choose another disk or a smaller size."
            )

    def _build(self, pending: Sequence[int], num_proc: int) -> None:
        with _Progress(self.total, sum(len(self.shards[index].items) for index in self.done)) as progress:
            if min(num_proc, len(pending)) == 1:
                for index in pending:
                    self._finish(index, _build_shard(self.builder, self.shards[index], self.target, progress.step))
                return
            self._build_in_processes(pending, min(num_proc, len(pending)), progress)

    def _build_in_processes(self, pending: Sequence[int], num_proc: int, progress: "_Progress") -> None:
        context = multiprocessing.get_context(
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__, self.recipe.source.__module__])
            from multiprocessing import forkserver  # not everywhere

            with _interrupts_waiting():  # while the server imports, it would end with a traceback
                forkserver.ensure_running()
        stop = context.Event()
        # Each element is written by one process only, so that a killed one cannot leave a lock behind.
        ticks = context.RawArray("q", len(pending))
        with ProcessPoolExecutor(
            num_proc, mp_context=context, initializer=_start_worker, initargs=(self.recipe, self.target, stop, ticks)
        ) as pool:
            try:
                waiting = {pool.submit(_work, self.shards[index], slot): index for slot, index in enumerate(pending)}
                while waiting:
                    finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in finished:
                        self._finish(waiting.pop(future), future.result())
                    progress.show(sum(ticks))
            except BrokenProcessPool as error:
                busy = [
                    self.shards[index].items[ticks[slot]]["sample_id"]
                    for slot, index in enumerate(pending)
                    if index not in self.done and 0 < ticks[slot] < len(self.shards[index].items)
                ]
                raise PreparationError(
                    "A process ended abruptly, as happens when memory runs out"
                    + (f" (at work were {', '.join(busy[:num_proc])})" if busy else "")
                    + f". {self._kept()} A smaller --num-proc than {num_proc} needs less memory."
                ) from error
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, index: int, done: _Done) -> None:
        self.done[index] = done
        self._check_rejections()

    def _check_rejections(self) -> None:
        """
        Stop when too many images are unusable. Only shards before the first unfinished one count, so that the message
        depends neither on the number of processes nor on which of them is faster.
        """
        limit = self.max_rejected / 100 * self.total
        rejected: list[list[str]] = []
        seen = 0
        for index, shard in enumerate(self.shards):
            if index not in self.done:
                return
            seen += len(shard.items)
            rejected += self.done[index].counted(self.skip_missing)
            if len(rejected) > limit:
                examples = "; ".join(f"{sample}: {reason}" for sample, _, reason in rejected[:5])
                raise PreparationError(
                    f"{self.builder.TITLE}: {len(rejected):,} of the first {seen:,} images (of {self.total:,}) are "
                    f"unusable, more than the {self.max_rejected:g} percent allowed: {examples}. Download these "
                    f"again, or allow more with --max-rejected. {self._kept()}"
                )

    def _kept(self) -> str:
        return (
            f"{len(self.done):,} of {len(self.shards):,} shards are finished and kept in {self.work}: run the same "
            "command again to go on from there."
        )

    def _describe(self) -> PreparedInfo:
        splits = {}
        for split in dict.fromkeys(shard.split for shard in self.shards):
            parts = [(shard, self.done[index]) for index, shard in enumerate(self.shards) if shard.split == split]
            dropped, notes = Counter[str](), Counter[str]()
            for _, done in parts:
                dropped.update(done.dropped)
                notes.update(done.notes)
            described = PreparedSplit(
                records=sum(done.records for _, done in parts),
                dropped=dict(sorted(dropped.items())),
                notes=dict(sorted(notes.items())),
                rejected=sum(len(done.rejected) for _, done in parts),
                shards=tuple(
                    PreparedShard(f"{DATA_FOLDER}/{shard.name}.parquet", done.records, done.bytes, done.sha256)
                    for shard, done in parts
                ),
            )
            if described.records:
                splits[split] = described
                continue
            # `datasets` cannot open a split without records.
            reasons = "; ".join(f"{count:,}: {reason}" for reason, count in described.dropped.items())
            self.say(f"No images are left in the {split} split, which is left away ({reasons or 'all unusable'}).")
            for shard in described.shards:
                (self.folder / shard.file).unlink()
        if not splits:
            raise PreparationError(f"{self.builder.TITLE}: no images are left.\n{self.builder.funnel()}")
        return PreparedInfo(
            dataset=self.builder.DATASET,
            title=self.builder.TITLE,
            fingerprint=self.fingerprint,
            size=self.recipe.size,
            image_format=self.recipe.image_format.upper(),
            options=self.options,
            classes=tuple(record_classes(self.builder.info.features)),
            filters={name: dict(counts) for name, counts in self.builder.counts.items()},
            splits=splits,
            made_with={library.__name__: library.__version__ for library in (datasets, np, PIL, pa)},
        )

    def _publish(self, info: PreparedInfo) -> None:
        rejected = sorted(
            [shard.split, *row] for index, shard in enumerate(self.shards) for row in self.done[index].rejected
        )
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([["split", "sample_id", "path", "reason"], *rejected])
        _write(self.folder / REJECTED, table.getvalue().encode())
        _write(self.folder / "README.md", card(info, self.recipe.source).encode())
        _write(self.folder / MANIFEST, info.to_json().encode())
        _sync(self.folder)
        if self.out.is_dir() and any(self.out.iterdir()):
            # Between the two renames `out` is absent; the next run would put it back from here.
            os.rename(self.out, self.work / "replaced")
        os.rename(self.folder, self.out)
        _sync(self.out.parent)
        shutil.rmtree(self.work)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _partial_folders(out: Path) -> list[Path]:
    return sorted(path for path in out.parent.glob(f"{glob.escape(out.name)}.partial-*") if path.is_dir())


def _undo_half_swap(out: Path) -> None:
    """Put back the folder that a killed run was about to replace."""
    for partial in _partial_folders(out):
        replaced = partial / "replaced"
        if replaced.is_dir() and not out.exists():
            os.rename(replaced, out)
        elif replaced.is_dir():
            shutil.rmtree(replaced)


def _with_images(splits: Mapping[str, Sequence[dict]]) -> dict[str, list[dict]]:
    return {split: [item for item in items if "image_path" in item] for split, items in splits.items()}


def _cut(splits: Mapping[str, Sequence[dict]]) -> list[_Shard]:
    """Shards of even length, which depend on the number of images alone."""
    parts = []
    for split, items in splits.items():
        wanted = min(MIN_SHARDS, -(-len(items) // MIN_SHARD_RECORDS))
        total = max(wanted, -(-len(items) // SHARD_RECORDS))
        bounds = [len(items) * number // total for number in range(total + 1)]
        parts += [(split, number, total, list(items[bounds[number] : bounds[number + 1]])) for number in range(total)]
    # On a network disk asking for size and time of files is slow one by one.
    with ThreadPoolExecutor(16) as threads:
        inputs = threads.map(lambda part: _inputs(part[3]), parts)
        return [_Shard(*part, digest) for part, digest in zip(parts, inputs, strict=True)]


def _inputs(items: Sequence[dict]) -> str:
    states = []
    for item in items:
        for key, path in item.items():
            if key.endswith("_path") and path is not None:
                try:
                    status = os.stat(path)
                    states.append((status.st_size, status.st_mtime_ns))
                except (OSError, ValueError):  # ValueError: a path with a zero byte
                    states.append(None)
    return _digest([items, states])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    """Values of options and items as JSON can hold them, always in the same order."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if value is None or isinstance(value, str | int | float | list | dict):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of an item or an option.")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# What a worker process holds: recipe, target, stop event, progress, and the builder once it is made.
_worker: dict[str, object] = {}


def _start_worker(recipe: _Recipe, target: _Target, stop: object, ticks: MutableSequence[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pa.set_cpu_count(1)
    _worker.update(recipe=recipe, target=target, stop=stop, ticks=ticks)


def _end_with_parent() -> None:
    """A killed main process cannot stop its workers; they would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(shard: _Shard, slot: int) -> _Done:
    if "builder" not in _worker:
        _worker["builder"] = _worker["recipe"].builder()

    def step() -> None:
        if _worker["stop"].is_set():
            raise _Stopped
        _worker["ticks"][slot] += 1

    return _build_shard(_worker["builder"], shard, _worker["target"], step)


def _build_shard(
    builder: RawBuilder | PhantomSource, shard: _Shard, target: _Target, step: Callable[[], None]
) -> _Done:
    """Write the Parquet file of a shard, then the note that it is finished."""
    rows, rejected = [], []
    dropped: Counter[str] = Counter()
    features = builder.info.features
    builder.notes.clear()
    for item in shard.items:
        try:
            rows.append(features.encode_example(_row(builder, item, target)))
        except DroppedRecord as error:
            dropped[str(error)] += 1
        except RejectedRecord as error:
            rejected.append([item["sample_id"], str(item.get("image_path", "")), _reason(error)])
        step()
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), buffer, row_group_size=ROW_GROUP)
    content = buffer.getvalue()
    done = _Done(
        inputs=shard.inputs,
        records=len(rows),
        bytes=content.size,
        sha256=hashlib.sha256(content).hexdigest(),
        dropped=dict(sorted(dropped.items())),
        notes=dict(sorted(builder.notes.items())),
        rejected=rejected,
    )
    _write(target.folder / DATA_FOLDER / f"{shard.name}.parquet", content)
    _write(target.notes / f"{shard.name}.json", json.dumps(asdict(done)).encode())
    return done


def _reason(error: RejectedRecord) -> str:
    """One line; addresses of objects, as some libraries print them, would differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))


def read_record(builder: RawBuilder | PhantomSource, item: dict) -> dict:
    """
    The record of one item with its decoded image, (H, W) uint8; its `height` and `width` are those of the image.

    Raises:
        DroppedRecord, RejectedRecord: As the builder does; also rejected is an image of another size than its record
            says.
        PreparationError: Whatever else is wrong, naming the image.
    """
    try:
        if "image_path" in item and is_missing(item["image_path"]):
            raise RejectedRecord(MISSING)
        record = builder.record(item)
        image = builder.load_image(record["image"])
    except (OSError, ValueError) as error:
        raise PreparationError(f"{builder.TITLE}: {item['sample_id']}: {error}") from error
    stated, found = (record["height"], record["width"]), image.shape
    if None not in stated and stated != found:
        raise RejectedRecord(
            f"the image has {found[0]} x {found[1]} pixels (height x width), but its record says {stated[0]} x "
            f"{stated[1]}, so that boxes would be wrong"
        )
    return record | {"height": found[0], "width": found[1], "image": image}


def _row(builder: RawBuilder | PhantomSource, item: dict, target: _Target) -> dict:
    """The record of one item with its image as prepared; raises like `read_record`."""
    record = read_record(builder, item)
    data = encode_image(shrink(record["image"], target.size), target.image_format)
    return record | {"image": {"bytes": data, "path": None}}


def encode_image(image: np.ndarray, image_format: str) -> bytes:
    """An (H, W) uint8 image as a file in one of `IMAGE_FORMATS`."""
    if image_format == "png":
        return encode_png(image)
    buffer = io.BytesIO()
    name, options = ("PPM", {}) if image_format == "pgm" else ("JPEG", {"quality": JPEG_QUALITY})
    PIL.Image.fromarray(image).save(buffer, name, **options)
    return buffer.getvalue()


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """
    Scale (H, W) uint8 down to `size` pixels on the shorter side; smaller images are returned as they are.

    Every output pixel is the mean over its area, with shares of pixels at the borders, as OpenCV's INTER_AREA.
    Pillow's box filter takes whole pixels only, which at a ratio of 1.5 is wrong by 2 grey levels on average.
    """
    height, width = image.shape
    if min(height, width) <= size:
        return image
    scale = size / min(height, width)
    rows = _area_weights(height, max(round(height * scale), size)) @ image.astype(np.float32)
    # Transposed twice, so that the sparse factor is on the left.
    columns = _area_weights(width, max(round(width * scale), size)) @ np.ascontiguousarray(rows.T)
    return np.floor(columns.T + 0.5).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=256)
def _area_weights(length: int, target: int) -> scipy.sparse.csr_matrix:
    """(target, length): row i holds the share of each input pixel in output pixel i."""
    ratio = length / target
    bounds = np.arange(target + 1) * ratio
    # Every border between pixels, of input or output, cuts the line; each piece belongs to one pixel of both.
    cuts = np.union1d(bounds, np.arange(length + 1))
    middles = (cuts[:-1] + cuts[1:]) / 2
    outputs = np.minimum((middles / ratio).astype(np.intp), target - 1)
    inputs = np.minimum(middles.astype(np.intp), length - 1)
    shares = (np.diff(cuts) / ratio).astype(np.float32)
    return scipy.sparse.coo_matrix((shares, (outputs, inputs)), shape=(target, length)).tocsr()


def _write(path: Path, content: bytes | pa.Buffer) -> None:
    """Write a file that is whole or absent, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Hold Ctrl-C back, here until the end of the block, and for ever in processes that are started in it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Progress:
    """Progress over images: a bar on a terminal, otherwise a line now and then."""

    INTERVAL = 15.0  # seconds between lines

    def __init__(self, total: int, finished: int) -> None:
        self.total, self.finished, self.count = total, finished, 0
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=finished, unit=" images", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            self._line()

    def step(self) -> None:
        self.show(self.count + 1)

    def show(self, count: int) -> None:
        """`count` images are done in this run."""
        if self.bar is not None:
            self.bar.update(count - self.count)
        self.count = count
        if self.bar is None and time.monotonic() - self.last >= self.INTERVAL:
            self._line()

    def _line(self) -> None:
        self.last = time.monotonic()
        rate = self.count / max(self.last - self.start, 1e-3)
        done = self.finished + self.count
        left = tqdm.format_interval((self.total - done) / rate) if rate else "unknown"
        print(
            f"{done:,} of {self.total:,} images ({done / self.total:.0%}), {rate:.0f} per second, {left} left",
            file=sys.stderr,
            flush=True,
        )


def card(info: PreparedInfo, source: SourceClass) -> str:
    """README.md of a prepared folder: a data set card for `load_dataset`, and what may be done with the data."""
    if any("physionet" in raw.url for raw in source.SOURCES):
        terms = (
            "**Derived from credentialed data: do not publish or share.** The terms of use that you signed for the "
            "sources hold for this folder, too."
        )
    elif source is PhantomSource:
        terms = "Synthetic: drawn by a program, not taken from patients."
    else:
        terms = "The terms of the sources hold for this folder, too."
    files = "\n".join(f"  - split: {name}\n    path: {DATA_FOLDER}/{name}-*.parquet" for name in info.splits)
    rows = "\n".join(f"| {name} | {split.records:,} | {split.rejected:,} |" for name, split in info.splits.items())
    sources = "".join(f"- {raw.title}: {raw.url}\n" for raw in source.SOURCES)
    return f"""---
pretty_name: {json.dumps(f"{info.title}, prepared for ChEX")}
license: other
tags:
- chest-x-ray
configs:
- config_name: default
  data_files:
{files}
---

# {info.title}, prepared for ChEX

{terms}

{sources}
| split | images | unusable |
|---|---|---|
{rows}

Images are grey {info.image_format}, {info.size} pixels on the shorter side (smaller originals as they are), uncropped.
Boxes are in pixels of the original, whose size is in `height` and `width`. `manifest.json` says what the folder was
made from, `{REJECTED}` which images could not be used.
"""


__all__ = [
    "PhantomSource",
    "PreparationError",
    "PreparationInterrupted",
    "IMAGE_FORMATS",
    "card",
    "data_set_names",
    "encode_image",
    "prepare",
    "read_record",
    "shrink",
    "source_class",
    "source_options",
]
