"""
Inference of an evaluation: each image is encoded once, asked by all procedures that need it, and what they predict
goes to disk in chunks. Memory does not grow with the number of images.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from evaluation.predictions import PredictionError, Predictions, PredictionStore, chunks_of, digest, join
from evaluation.processes import Processes
from evaluation.tasks.base import Batch, EvaluationContext
from evaluation.tasks.catalog import Preset, Task
from evaluation.tasks.procedures import PROCEDURES, Procedure
from evaluation.tasks.records import Targets, class_positions, iterate_targets, read_targets
from processing_chex.prompt_sets import PromptSet, class_prompts, find_class_set, prompts_for_classes
from processing_chex.report import REPORT_PRESETS
from processing_chex.vocabulary import class_names
from training.data.prepared import file_sha256, is_prepared, open_prepared, read_info
from training.data.record import record_classes


logger = logging.getLogger(__name__)

# Images in a file of predictions, whatever the batch size, with which a run that was stopped can be gone on.
CHUNK_IMAGES = 64
_WEIGHTS = ("*.safetensors", "*.bin")


class ModelSource:
    """
    A model that is loaded only where it has something to predict.

    Args:
        folder: Of the model and its processor; or give both:
        model, processor: `ChexModel` and `ChexProcessor` (or what has their interfaces).
        device: Where to run a model from a folder.
        dtype: Name of the floating type of a model from a folder.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        model: Any = None,
        processor: Any = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
    ):
        self.folder = Path(folder) if folder is not None else None
        self._model, self._processor = model, processor
        self.device, self.dtype = device, dtype
        if isinstance(device, str):
            _check_device(device)
        if self.folder is not None and not (self.folder / "config.json").is_file():
            reason = "has no config.json" if self.folder.is_dir() else "is not a folder"
            raise ValueError(
                f"`--model` {self.folder} {reason}: give the folder of a saved ChEX model. 'make demo' trains one, "
                "'chex convert official' makes one of the published weights."
            )

    @cached_property
    def config(self) -> Any:
        """
        Raises:
            ValueError: The folder holds another kind of model, or a damaged configuration.
        """
        if self._model is not None:
            return self._model.config
        from modeling_chex import ChexConfig

        path = self.folder / "config.json"
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): save the model again.") from error
        if kind != ChexConfig.model_type:
            raise ValueError(f"{self.folder} holds a model of the type {kind!r}, not a ChEX model.")
        return ChexConfig.from_pretrained(self.folder)

    @property
    def can_generate(self) -> bool:
        return self.config.generator_config is not None

    @property
    def processor(self) -> Any:
        if self._processor is None:
            from processing_chex import ChexProcessor

            self._processor = ChexProcessor.from_pretrained(self.folder)
        return self._processor

    def load(self) -> Any:
        """The model, in evaluation mode."""
        if self._model is None:
            from modeling_chex import ChexModel

            model = ChexModel.from_pretrained(self.folder, dtype=getattr(torch, self.dtype))
            self._model = model.to(self.device).eval()
        return self._model

    @cached_property
    def sha256(self) -> str:
        """Of everything that decides what a model predicts: weights, configuration, processor and tokenizers."""
        if self.folder is None:
            return "in memory"
        content = hashlib.sha256()
        for path in sorted({*self._weight_files(), *self.folder.glob("*.json"), *self.folder.glob("*.txt")}):
            content.update(f"{path.name}:{file_sha256(path)}\n".encode())
        return content.hexdigest()

    def _weight_files(self) -> list[Path]:
        files = sorted(path for pattern in _WEIGHTS for path in self.folder.glob(pattern))
        if not files:
            raise ValueError(f"`--model` {self.folder} has a configuration but no weights (model.safetensors).")
        return files

    @cached_property
    def parameters(self) -> int | None:
        """Number of parameters; None where the files do not say."""
        if self._model is not None:
            count = getattr(self._model, "num_parameters", None)
            return count() if count is not None else None
        from safetensors import SafetensorError, safe_open

        total = 0
        for path in self._weight_files():
            if path.suffix != ".safetensors":
                return None
            try:
                with safe_open(path, framework="pt") as file:
                    total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}): save or copy the model again.") from error
        return total

    @property
    def name(self) -> str:
        return self.folder.resolve().name if self.folder is not None else type(self._model).__name__


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch has no error of its own for this
        reason = str(error).splitlines()[0]
        raise ValueError(f"There is no device {name!r} here, such as cpu, cuda or cuda:1: {reason}") from error


def open_data(folder: str | Path) -> datasets.DatasetDict:
    """
    Open the splits in a folder that `chex data prepare` or `DatasetDict.save_to_disk` has written, or in the cache of
    one builder.

    Raises:
        ValueError: The folder is none of these.
    """
    folder = Path(folder)
    if is_prepared(folder):
        return open_prepared(folder)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    # A builder's cache: <folder>/<builder>/<configuration>/<version>/<builder>-<split>.arrow
    builds = sorted({info.parent for info in folder.glob("**/dataset_info.json")})
    if len(builds) != 1:
        found = "no data set" if not builds else f"{len(builds)} data sets ({', '.join(map(str, builds[:3]))})"
        raise ValueError(
            f"{folder} holds {found}, but exactly one is needed: give a folder written by `chex data prepare` or "
            "`DatasetDict.save_to_disk`, or the cache folder of one builder."
        )
    info = datasets.DatasetInfo.from_directory(str(builds[0]))
    splits = {}
    for split in info.splits or {}:
        files = sorted(str(file) for file in builds[0].glob(f"*-{split}*.arrow"))
        parts = [datasets.Dataset.from_file(file) for file in files]
        if parts:
            splits[split] = datasets.concatenate_datasets(parts)
    return datasets.DatasetDict(splits)


@dataclass
class DataSource:
    """
    One data set.

    Attributes:
        name: In the catalogue.
        splits: By name, in the common record.
        folder: Where it was opened; None: in memory.
    """

    name: str
    splits: Mapping[str, datasets.Dataset]
    folder: Path | None = None

    @classmethod
    def open(cls, name: str, folder: str | Path) -> "DataSource":
        """
        Raises:
            ValueError: The folder holds no data set.
        """
        try:
            return cls(name, open_data(folder), Path(folder))
        except FileNotFoundError as error:
            raise ValueError(f"--data {name}={folder}: {error}") from error
        except ValueError as error:
            raise ValueError(f"--data {name}: {error}") from error

    def split(self, name: str, limit: int | None = None) -> "SplitData":
        """
        Raises:
            ValueError: There is no such split, it is empty, or two of its images have one identifier.
        """
        if name not in self.splits or not len(self.splits[name]):
            has = ", ".join(f"{split} ({len(part):,} images)" for split, part in self.splits.items()) or "none"
            problem = "is empty" if name in self.splits else "is not there"
            raise ValueError(f"The split {name!r} of {self.name} {problem}; it has the splits: {has}.")
        dataset = self.splits[name]
        full = len(dataset)
        if limit is not None:
            dataset = dataset.select(range(min(limit, full)))
        return SplitData(self, name, dataset, self.splits[name])


@dataclass
class SplitData:
    """One split (or its first images) of a data set."""

    source: DataSource
    split: str
    dataset: datasets.Dataset
    whole: datasets.Dataset
    _targets: dict[tuple, list[Targets]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for sample_id in self.ids:
            if sample_id in seen:
                raise ValueError(
                    f"The image {sample_id!r} is twice in the split {self.split!r} of {self.source.name}; "
                    "identifiers must be unique."
                )
            seen.add(sample_id)

    @cached_property
    def ids(self) -> list[str]:
        return list(self.dataset["sample_id"])

    @cached_property
    def classes(self) -> list[str]:
        return record_classes(self.dataset.features)

    @cached_property
    def fingerprint(self) -> str:
        """Of the content of the whole split, so that a run with fewer images can be gone on with."""
        if self.source.folder is not None and is_prepared(self.source.folder):
            content = read_info(self.source.folder).content
        else:
            content = self.whole._fingerprint
        return digest({"content": content, "split": self.split})

    def targets(self, classes: Sequence[str] | None, image_processor: Any) -> list[Targets]:
        """Targets of all images, in the frame of the processor, with labels among `classes`."""
        key = tuple(classes or ())
        if key not in self._targets:
            self._targets.clear()
            positions = class_positions(self.classes, classes) if classes else None
            self._targets[key] = list(iterate_targets(self.dataset, image_processor, positions))
        return self._targets[key]


def task_prompts(task: Task, split: SplitData) -> tuple[PromptSet, list[str]]:
    """Prompts of the finding classes of a task, and the names of these classes in the data."""
    class_set = task.class_set
    if class_set is None:
        with suppress(ValueError):
            class_set = find_class_set(split.classes)
    if class_set is not None:
        return class_prompts(class_set), list(class_names(class_set))
    return prompts_for_classes(split.classes), list(split.classes)


@dataclass
class Job:
    """A procedure on one split, for the tasks that share what it predicts."""

    kind: str
    task: Task
    prompts: PromptSet
    classes: list[str]
    preset: Preset
    store: PredictionStore
    tasks: list[str] = field(default_factory=list)

    def procedure(self, context: EvaluationContext) -> Procedure:
        return PROCEDURES[self.kind](context, self.task, self.prompts, self.preset)


def procedure_settings(task: Task, prompts: PromptSet, preset: Preset) -> dict[str, Any]:
    """Everything besides model and data that decides what the procedure of a task predicts."""
    described = {"prompts": digest(asdict(prompts))}
    settings = {
        "anatomy_localization": {},
        "detection": described,
        "grounding": {},
        "box_classification": {**described, "negatives": task.negatives},
        "region_classification": described,
        "box_description": {"max_length": preset.max_length},
        "region_description": {"max_length": preset.max_length},
        "report_generation": described
        | {"max_length": preset.max_length, "report": asdict(REPORT_PRESETS[preset.report])},
    }
    return settings[task.kind]


def plan_jobs(
    tasks: Sequence[Task],
    split: SplitData,
    preset_of: Mapping[str, Preset],
    model: ModelSource,
    folder: Path,
    chunk_images: int = CHUNK_IMAGES,
) -> dict[str, Job]:
    """The jobs of tasks on one split, by task; tasks that agree on everything share one."""
    jobs: dict[tuple, Job] = {}
    result = {}
    for task in tasks:
        prompts, classes = task_prompts(task, split)
        settings = procedure_settings(task, prompts, preset_of[task.name])
        key = (task.kind, digest(settings))
        if key not in jobs:
            origin = {
                "model": model.sha256,
                "dtype": model.dtype,
                "data": split.source.name,
                "split": split.split,
                "fingerprint": split.fingerprint,
                "procedure": task.kind,
                "settings": settings,
            }
            path = folder / f"{split.source.name}-{split.split}" / "-".join((task.kind, key[1][:8]))
            store = PredictionStore(path, origin, chunk_images)
            jobs[key] = Job(task.kind, task, prompts, classes, preset_of[task.name], store)
        jobs[key].tasks.append(task.name)
        result[task.name] = jobs[key]
    return result


@torch.inference_mode()
def predict_split(
    context_of: Callable[[], EvaluationContext],
    split: SplitData,
    jobs: Sequence[Job],
    *,
    batch_size: int = 64,
    processes: Processes | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """
    Make the chunks of predictions that are missing or damaged; each process makes its share.

    Args:
        context_of: Function that returns the `EvaluationContext`; called only if there is something to predict.
        split: The images.
        jobs: What to predict about them.
        batch_size: Images encoded together.
        processes: All that work on this evaluation.
        overwrite: Make predictions again that are of another model or other data.
        progress: Show a progress bar on the main process.

    Returns:
        Number of images that had something to predict, of all processes.

    Raises:
        StalePredictions: There are predictions of another model or other data, and not `overwrite`.
        PredictionError: The model predicts what is not a number, or an image cannot be read.
    """
    processes = processes or Processes()
    jobs = list({id(job): job for job in jobs}.values())

    def plan() -> dict[int, list[int]]:
        needed: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            job.store.open(overwrite)
            for number, problem in job.store.missing(split.ids):
                needed.setdefault(number, []).append(index)
                if problem is not None:
                    logger.warning("%s It is made again.", problem)
        return needed

    needed = processes.share(plan)
    numbers = sorted(needed)
    with processes.together():
        mine = numbers[processes.rank :: processes.count]
        if mine:
            _predict_chunks(context_of(), split, jobs, needed, mine, batch_size, progress and processes.is_main)
    return sum(len(rows) for rows in _rows(split, numbers, jobs[0].store.chunk_size).values()) if numbers else 0


def _rows(split: SplitData, numbers: Sequence[int], size: int) -> dict[int, range]:
    """The rows of the split in each chunk."""
    return {number: range(number * size, min((number + 1) * size, len(split.ids))) for number in numbers}


def _predict_chunks(
    context: EvaluationContext,
    split: SplitData,
    jobs: Sequence[Job],
    needed: Mapping[int, list[int]],
    numbers: Sequence[int],
    batch_size: int,
    progress: bool,
) -> None:
    procedures = {index: jobs[index].procedure(context) for index in {i for n in numbers for i in needed[n]}}
    rows_of = _rows(split, numbers, jobs[0].store.chunk_size)
    batches = [list(rows) for number in numbers for rows in chunks_of(rows_of[number], batch_size)]
    loaded = _loaded_ahead(context, split, batches)
    bar = tqdm(
        total=sum(map(len, rows_of.values())),
        desc=f"{split.source.name} {split.split}",
        unit="image",
        disable=not progress,
        leave=False,
    )
    with bar:
        for number in numbers:
            parts: dict[int, list[Predictions]] = {index: [] for index in needed[number]}
            for _ in range(0, len(rows_of[number]), batch_size):
                with context.timed("waiting for images"):
                    pixels, targets = next(loaded)
                with context.timed("image encoder"):
                    features = context.model.get_image_features(pixels.to(context.device, _dtype(context.model)))
                batch = Batch(context, features, targets)
                for index, of_job in parts.items():
                    with context.timed(jobs[index].kind):
                        of_job.append(procedures[index].predict(batch))
                bar.update(len(targets))
            with context.timed("writing predictions"):
                for index, of_job in parts.items():
                    predictions = join(of_job)
                    predictions.check_finite(", ".join(jobs[index].tasks))
                    jobs[index].store.write_chunk(number, predictions)


def _dtype(model: Any) -> torch.dtype:
    return getattr(model, "dtype", torch.float32)


def _loaded_ahead(
    context: EvaluationContext, split: SplitData, batches: Sequence[Sequence[int]]
) -> Iterator[tuple[torch.Tensor, list[Targets]]]:
    """Pixels and targets of batches of rows; the next batch is read while the model works on the last."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(_load, context, split, rows) for rows in batches[:1]]
        for position in range(len(batches)):
            current = coming.pop()
            if position + 1 < len(batches):
                coming.append(reader.submit(_load, context, split, batches[position + 1]))
            yield current.result()


def _load(context: EvaluationContext, split: SplitData, rows: Sequence[int]) -> tuple[torch.Tensor, list[Targets]]:
    processor = context.processor
    targets, images = [], []
    for row in rows:
        try:
            record = split.dataset[row]
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(split, row, error) from error
        # boxes are in pixels of the original image, of which the record may hold a smaller copy
        targets.append(read_targets(record, processor.image_processor.frame(record["height"], record["width"])))
        images.append(record["image"])
    try:
        return processor(images=images, return_tensors="pt")["pixel_values"], targets
    except (OSError, ValueError, SyntaxError):
        for row, image in zip(rows, images, strict=True):
            try:
                processor(images=[image], return_tensors="pt")
            except (OSError, ValueError, SyntaxError) as error:
                raise _unreadable(split, row, error) from error
        raise


def _unreadable(split: SplitData, row: int, error: Exception) -> PredictionError:
    return PredictionError(
        f"The image {split.ids[row]} of {split.source.name} ({split.split}) cannot be read "
        f"({type(error).__name__}: {error}). 'chex data check' and 'chex data prepare' find and leave out such files."
    )


__all__ = [
    "CHUNK_IMAGES",
    "DataSource",
    "Job",
    "ModelSource",
    "PredictionError",
    "SplitData",
    "open_data",
    "plan_jobs",
    "predict_split",
    "task_prompts",
]
