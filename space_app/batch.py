"""
Commands over many images: which files a folder or pattern means, batches, several processes, results that are appended
one image after the other so that a run that was stopped can be gone on with, and tables of them.
"""

import contextlib
import csv
import glob
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from processing_chex.dicom import is_dicom, may_be_bare_dicom
from processing_chex.errors import ChexInputError


try:
    import fcntl
except ImportError:  # not on Windows: two runs that write one file are not noticed there
    fcntl = None

IMAGE_ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".pgm", ".ppm", ".dcm", ".dicom")
)
_SIGNATURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\x00", b"MM\x00*", b"GIF8"),
    b"\x00\x00\x00\x0cjP  ",
)
OUT_ENDINGS = {"explain": (".jsonl", ".csv", ".json"), "report": (".jsonl", ".csv")}
SOME_FAILED, INTERRUPTED = 1, 130
_SAMPLE = 1 << 20  # bytes of each end of a weights file that tell it from another


# -- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """
    What a command is given.

    Attributes:
        paths: Files in order, each once.
        skipped: Files in folders and of patterns that are hidden or no images.
        collected: Whether there was a folder or a pattern.
    """

    paths: tuple[str, ...]
    skipped: int
    collected: bool


def find_inputs(arguments: Sequence[str]) -> Inputs:
    """
    Expand folders (with all folders in them) and patterns such as `scans/*.dcm` or `scans/**/*.png`, in sorted order.

    A file that is named is always taken, so that a wrong name is reported. In folders and patterns, hidden files and
    files that are no images by their ending or first bytes are left out and counted.

    Raises:
        ChexInputError: A folder without images, or a pattern that matches none.
    """
    paths: dict[str, None] = {}
    skipped, collected = 0, False
    for argument in arguments:
        if os.path.isdir(argument):
            collected = True
            found, left_out = _images_in(argument)
            if not found:
                raise ChexInputError(
                    f"The folder {argument} holds no images ({left_out} other files): ChEX reads PNG, JPEG, TIFF and "
                    "DICOM files."
                )
        elif glob.has_magic(argument) and not os.path.exists(argument):
            collected = True
            found, left_out = [], 0
            for match in sorted(glob.glob(argument, recursive=True)):
                # What ** matches holds the files of the folders as well.
                inside, outside = _images_in(match) if os.path.isdir(match) else _one(match)
                found += inside
                left_out += outside
            if not found:
                raise ChexInputError(
                    f"The pattern {argument} matches no images ({left_out} other files): check its spelling, and put "
                    "it in quotes."
                )
        else:
            found, left_out = [argument], 0
        skipped += left_out
        paths.update(dict.fromkeys(found))
    return Inputs(tuple(paths), skipped, collected)


def _images_in(folder: str) -> tuple[list[str], int]:
    found: list[str] = []
    skipped = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            inside, outside = _one(os.path.join(place, name))
            found += inside
            skipped += outside
    return found, skipped


def _one(path: str) -> tuple[list[str], int]:
    return ([path], 0) if looks_like_image(path) else ([], 1)


def looks_like_image(path: str | Path) -> bool:
    """Whether a file is an image by its ending or first bytes; hidden files and indices of DICOM media are not."""
    name = os.path.basename(path)
    if name.startswith(".") or name.upper() == "DICOMDIR":
        return False
    if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        return start.startswith(_SIGNATURES) or is_dicom(path) or (bool(start) and may_be_bare_dicom(path))
    except OSError:
        return False


# -- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why there is no result about an image; `is_input` if its file is to blame, not the program."""

    image: str
    message: str
    is_input: bool


@dataclass(frozen=True)
class Job:
    """
    What is asked about each image, in a form that can be sent to another process.

    Attributes:
        command: "explain" or "report".
        model: Folder of model and processor.
        geometry: Of the images; None: as saved with the model.
        threshold: Regions with a score above it are reported.
        prompts, boxes, sentences: Of "explain".
        options: Of "report", `preset` among them.
        generation: Of `ChexModel.generate`.
    """

    command: str
    model: str
    geometry: str | None = None
    threshold: float = 0.5
    prompts: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    sentences: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The `ChexExplainer`."""
        from space_app.explain import ChexExplainer, check_max_length, load_model

        model, processor = load_model(self.model, self.prompts, self.sentences)
        check_max_length(model, self.generation.get("max_length"))
        return ChexExplainer(model, processor)

    def settings(self) -> dict[str, Any]:
        """All that results depend on, besides the images."""
        weights = {path.name: _fingerprint(path) for path in sorted(Path(self.model).glob("*.safetensors"))}
        return json.loads(json.dumps(asdict(self) | {"weights": weights}))

    def answer(self, explainer: Any, paths: Sequence[str], debug: bool = False) -> list[dict[str, Any] | Failure]:
        """
        Results about some images, which go through the model together; what fails is tried alone.

        Args:
            explainer: As from `load`.
            paths: Files.
            debug: Let exceptions through.
        """
        read, outcomes = {}, {}
        for path in paths:
            try:
                read[path] = self._read(explainer, path)
            except Exception as error:
                if debug:
                    raise
                outcomes[path] = _failure(path, error)
        ask = self._explain if self.command == "explain" else self._report
        try:
            outcomes |= ask(explainer, read)
        except Exception:
            if debug:
                raise
            for path, item in read.items():
                try:
                    outcomes |= ask(explainer, {path: item})
                except Exception as error:
                    outcomes[path] = _failure(path, error)
        return [outcomes[path] for path in paths]

    def _read(self, explainer: Any, path: str) -> Any:
        if self.command == "explain":
            return explainer.preprocess(path, list(self.prompts), [list(box) for box in self.boxes], self.geometry)
        from processing_chex import load_image

        return load_image(path)

    def _explain(self, explainer: Any, items: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not items:
            return {}
        explanations = explainer.explain_read(
            list(items.values()), self.threshold, sentences=self.sentences, generate_kwargs=self.generation
        )
        return {path: result.to_dict() for path, result in zip(items, explanations, strict=True)}

    def _report(self, explainer: Any, items: dict[str, Any]) -> dict[str, dict[str, Any]]:
        reports = explainer.report(
            list(items.values()), self.threshold, self.geometry, generate_kwargs=self.generation, **self.options
        )
        return {path: replace(report, image=path).to_dict() for path, report in zip(items, reports, strict=True)}


def _failure(path: str, error: Exception) -> Failure:
    if isinstance(error, ChexInputError):
        return Failure(path, " ".join(str(error).split()), True)
    message = f"{path}: unexpected {type(error).__name__}: {error}. Add --debug to see where."
    return Failure(path, " ".join(message.split()), False)


def _fingerprint(path: Path) -> str:
    """Of the size, the first and the last bytes of a file: all of a large model would take long to read."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(size - _SAMPLE, 0))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


# -- results ----------------------------------------------------------------------------------------------------------


class Journal:
    """
    A JSONL file with a line for each finished image, and a file beside it with the settings that it was made with.

    A line is appended by one write. What a killed run has left half written at the end is cut off.

    Args:
        path: Of the JSONL file.
        settings: As from `Job.settings`.
        overwrite: Begin anew, whatever is there.

    Raises:
        ChexInputError: The file was made with other settings or by something else, is damaged, is being written by
            another run, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.path = path
        self.finished: dict[str, None] = {}
        self.repaired = False
        record = path.with_name(f"{path.name}.settings.json")
        try:
            if overwrite:
                record.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            self._check_settings(record, settings)
            self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise ChexInputError(
                f"--out {path} cannot be written ({error.strerror}): choose another place."
            ) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _check_settings(self, record: Path, settings: dict[str, Any]) -> None:
        remedy = "name another file with --out, or begin anew with --overwrite"
        if record.exists():
            try:
                known = json.loads(record.read_text(encoding="utf-8"))
                changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
            except (ValueError, TypeError) as error:
                raise ChexInputError(f"{record} is damaged ({error}): {remedy}.") from error
            if changed:
                raise ChexInputError(
                    f"--out {self.path} was begun with another {', '.join(changed)}, and one file holds results of "
                    f"one kind: {remedy}."
                )
            return
        if self.path.exists() and self.path.stat().st_size:
            raise ChexInputError(f"--out {self.path} exists and was not written by this command: {remedy}.")
        temporary = record.with_name(f".{record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, record)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ChexInputError(
                f"--out {self.path} is being written by another run: wait for it, or name another file."
            ) from error

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self.repaired = True
                self._file.truncate(end)
                break
            end += len(line)
            try:
                self.finished[json.loads(line)["image"]] = None
            except (ValueError, KeyError, TypeError) as error:
                raise ChexInputError(
                    f"Line {number} of {self.path} is damaged ({type(error).__name__}): remove the line, or begin "
                    "anew with --overwrite."
                ) from error

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Add results, each with its `image`."""
        # ASCII, with escapes: a file name need not be valid text.
        lines = "".join(json.dumps(result) + "\n" for result in results)
        try:
            self._file.write(lines.encode("ascii"))
            self._file.flush()
        except OSError as error:
            raise ChexInputError(
                f"--out {self.path} cannot be written ({error.strerror}): make room, then give the same command again."
            ) from error
        self.finished.update((result["image"], None) for result in results)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def check_out(path: Path, command: str) -> None:
    """
    Raises:
        ChexInputError: Another ending than those of the formats, or no such folder.
    """
    endings = OUT_ENDINGS[command]
    if path.suffix.lower() not in endings:
        raise ChexInputError(
            f"--out {path} has the ending '{path.suffix}': results of `chex {command}` are written as "
            f"{', '.join(endings)}{' (COCO)' if '.json' in endings else ''}."
        )
    if not path.absolute().parent.is_dir():
        raise ChexInputError(f"--out {path} cannot be written: the folder {path.parent} does not exist.")


def journal_path(out: Path) -> Path:
    """Where results are collected: in `out` itself if it is JSONL, else beside it."""
    return out if out.suffix.lower() == ".jsonl" else out.with_name(f"{out.name}.jsonl")


def write_table(journal: Journal, out: Path, command: str) -> None:
    """Write the CSV or COCO file of a journal, whole or not at all. Nothing to do for JSONL."""
    if out.suffix.lower() == ".jsonl":
        return
    writers = {(".csv", "explain"): _write_regions, (".csv", "report"): _write_sentences, (".json", "explain"): _coco}
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writers[out.suffix.lower(), command](journal, file)
        os.replace(temporary, out)
    except OSError as error:
        raise ChexInputError(f"--out {out} cannot be written ({error.strerror}): choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_regions(journal: Journal, file: IO[str]) -> None:
    table = csv.writer(file)
    edges = ("x0", "y0", "x1", "y1")
    table.writerow(("image", "width", "height", "query", "kind", "query_score", *edges, "score", "sentence"))
    for result in journal:
        for answer in result["answers"]:
            start = (*(result[key] for key in ("image", "width", "height")), answer["query"], answer["kind"])
            for region in answer["regions"]:
                table.writerow((*start, answer["score"], *region["box"], region["score"], answer["sentence"] or ""))


def _write_sentences(journal: Journal, file: IO[str]) -> None:
    table = csv.writer(file)
    names = ("text", "name", "prompt", "kind", "score", "abnormality")
    edges = ("x0", "y0", "x1", "y1")
    table.writerow(("image", "width", "height", "number", *names, *edges, "regions"))
    for result in journal:
        start = [result[key] for key in ("image", "width", "height")]
        for number, sentence in enumerate(result["sentences"], start=1):
            regions = [[*region["box"], region["score"]] for region in sentence["regions"]]
            box = sentence["box"] or ("",) * 4
            table.writerow((*start, number, *(sentence[name] for name in names), *box, json.dumps(regions)))


def _coco(journal: Journal, file: IO[str]) -> None:
    """COCO's format of detections with scores, written image by image; boxes are x, y, width, height in pixels."""

    def write_list(name: str, items: Iterator[dict[str, Any]]) -> None:
        file.write(f',\n"{name}": [')
        for number, item in enumerate(items):
            file.write((",\n" if number else "\n") + json.dumps(item))
        file.write("\n]")

    categories: dict[str, int] = {}

    def images() -> Iterator[dict[str, Any]]:
        for number, result in enumerate(journal, start=1):
            for answer in result["answers"]:
                categories.setdefault(answer["query"], len(categories) + 1)
            size = {key: result[key] for key in ("width", "height")}
            yield {"id": number, "file_name": result["image"], **size}

    def annotations() -> Iterator[dict[str, Any]]:
        identifier = 0
        for number, result in enumerate(journal, start=1):
            for answer in result["answers"]:
                for region in answer["regions"]:
                    identifier += 1
                    x0, y0, x1, y1 = region["box"]
                    width, height = round(x1 - x0, 2), round(y1 - y0, 2)
                    yield {
                        "id": identifier,
                        "image_id": number,
                        "category_id": categories[answer["query"]],
                        "bbox": [x0, y0, width, height],
                        "area": round(width * height, 2),
                        "iscrowd": 0,
                        "score": region["score"],
                        "caption": answer["sentence"],
                    }

    file.write('{"info": {"description": "Regions found by ChEX. Research use only."}, "licenses": []')
    write_list("images", images())
    write_list("annotations", annotations())
    write_list("categories", ({"id": number, "name": name} for name, number in categories.items()))
    file.write("\n}\n")


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """
    What a run has done.

    Attributes:
        written, before: Images finished by it and before it.
        failures: Images without result.
    """

    written: int = 0
    before: int = 0
    failures: list[Failure] = field(default_factory=list)


def run_batches(
    job: Job,
    paths: Sequence[str],
    out: Path,
    batch_size: int = 8,
    num_processes: int = 1,
    overwrite: bool = False,
    debug: bool = False,
) -> Summary:
    """
    Ask about all images and write the results, in their order; images that are finished in `out` are left alone.

    Args:
        job: What is asked.
        paths: Files, as from `find_inputs`.
        out: `.jsonl`, `.csv` or (of "explain") `.json`, which is COCO.
        batch_size: Images that go through the model together.
        num_processes: Each with a model of its own. Batches are the same whatever their number.
        overwrite: Begin anew.
        debug: Let exceptions through.

    Raises:
        ChexInputError: The model, or `out`, cannot be used.
    """
    check_out(out, job.command)
    settings = job.settings()
    summary = Summary()
    with Journal(journal_path(out), settings, overwrite) as journal:
        if journal.repaired:
            print(f"{journal.path}: the half-written last line was removed.", file=sys.stderr)
        pending = [path for path in paths if path not in journal.finished]
        summary.before = len(paths) - len(pending)
        batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
        progress = _Progress(len(paths), summary.before)
        with progress, contextlib.closing(_outcomes(job, batches, num_processes, debug)) as outcomes:
            for batch in outcomes:
                results = [outcome for outcome in batch if isinstance(outcome, dict)]
                journal.append(results)
                summary.written += len(results)
                summary.failures += [outcome for outcome in batch if isinstance(outcome, Failure)]
                progress.step(len(batch))
        write_table(journal, out, job.command)
    return summary


def _outcomes(job: Job, batches: Sequence[Sequence[str]], num_processes: int, debug: bool) -> Iterator[list[Any]]:
    num_processes = min(num_processes, len(batches))
    if not batches:
        return
    if num_processes == 1:
        explainer = job.load()
        for batch in batches:
            yield job.answer(explainer, batch, debug)
        return
    context = multiprocessing.get_context("spawn")
    threads = max((os.cpu_count() or 1) // num_processes, 1)
    executor = ProcessPoolExecutor(
        num_processes, context, initializer=_start_worker, initargs=(job, debug, threads, context.Value("i", 0))
    )
    try:
        # Few batches wait at a time, so that memory does not grow with the number of images.
        waiting: deque = deque()
        remaining = iter(batches)
        for batch in remaining:
            waiting.append(executor.submit(_work, batch))
            if len(waiting) >= 2 * num_processes:
                break
        while waiting:
            yield waiting.popleft().result()
            for batch in remaining:
                waiting.append(executor.submit(_work, batch))
                break
    except BrokenProcessPool as error:
        raise ChexInputError(
            "A process was ended from outside, perhaps for lack of memory. What is finished is kept: give the same "
            "command again, with a smaller --num-processes or --batch-size."
        ) from error
    finally:
        # A process that still starts would miss the semaphores that go with the executor, and print a traceback.
        executor.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(job: Job, debug: bool, threads: int, counter: Any) -> None:
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent that is killed takes no leave of its processes, and they would wait for work forever.
    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends these
    import torch

    torch.set_num_threads(threads if "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads())
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    _worker.update(job=job, debug=debug)
    try:
        _worker["explainer"] = job.load()
    except Exception as error:  # told to the parent with the first batch; here it would be lost
        _worker["error"] = error


def _work(batch: Sequence[str]) -> list[Any]:
    if "error" in _worker:
        raise _worker["error"]
    return _worker["job"].answer(_worker["explainer"], batch, _worker["debug"])


class _Progress:
    """Images done and time left, on stderr: a line that is rewritten on a terminal, else a line now and then."""

    INTERVAL = 15.0

    def __init__(self, total: int, finished: int):
        self.total, self.finished, self.count = total, finished, 0
        self.start = self.shown = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "_Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, initial=self.finished, unit=" images", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, count: int) -> None:
        self.count += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(count)
        elif now - self.shown >= self.INTERVAL:
            self.shown = now
            rate = self.count / (now - self.start)
            done = self.finished + self.count
            left = (self.total - done) / rate
            print(
                f"{done:,} of {self.total:,} images, {rate:.1f} per second, {left / 60:.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )


__all__ = [
    "Failure",
    "Inputs",
    "Job",
    "Journal",
    "Summary",
    "check_out",
    "find_inputs",
    "journal_path",
    "looks_like_image",
    "run_batches",
    "write_table",
]
