"""
The evaluation of a model: which tasks can be run, their predictions, tuning of post-processing, scores, files.

Predictions are made first, by all processes, and stay on disk; the main process then scores them. Both parts take over
what an earlier run of the same model on the same data has left.
"""

import datetime
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bootstrap import DEFAULT_SEED
from evaluation.inference import CHUNK_IMAGES, DataSource, Job, ModelSource, SplitData, plan_jobs, predict_split
from evaluation.processes import Processes
from evaluation.results import SCHEMA, code_digest, read_task, write_bootstrap, write_results, write_task
from evaluation.results_view import headline
from evaluation.scoring import Labelers, score_task
from evaluation.tasks.base import EvaluationContext
from evaluation.tasks.catalog import (
    DATA_SETS,
    FREE_TASKS,
    PAPER_TASKS,
    PRESETS,
    Preset,
    Task,
    find_tasks,
    on_data,
    twin_of,
)
from evaluation.tasks.detection import Candidates, tune_detection
from evaluation.tasks.grounding import tune_grounding
from evaluation.tasks.records import class_positions
from evaluation.tuning import (
    Settings,
    Tuning,
    plain,
    read_tuning,
    start_of,
    tuning_path,
    write_tuning,
)
from processing_chex.vocabulary import PHANTOM_CLASSES
from training.data.record import record_classes


logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "datasets", "evaluate", "numpy", "scipy")
VALIDATION = "validation"


class NothingToRun(ValueError):
    """None of the chosen tasks can be run; the message says why."""


@dataclass(frozen=True)
class Options:
    """
    How to evaluate.

    Attributes:
        split: That is scored.
        resamples: Of the bootstrap; 0 leaves it out.
        seed: Of the bootstrap.
        metrics: Only these; None: all.
        left_out: Metrics that are not computed, and the reason that results give.
        optimize: Tune post-processing on the validation split.
        official: Tune by the rules of the official code (docs/evaluation.md).
        batch_size: Images encoded together.
        chunk_images: Images in a file of predictions.
        limit: Only the first so many images of each split.
        preset: Of generation; None: "phantom" on the phantom, else "paper".
        labeler: In place of that of the tasks, as for `load_labeler`.
        radgraph: Which annotator RadGraph F1 uses, as for `load_annotator`.
        examples: Examples in the results of each task.
        overwrite: Replace predictions and tuned settings of another model or other data.
        rescore: Score again what has been scored before.
        progress: Show progress bars.
        predict, score: Whether to make predictions, and whether to score them.
    """

    split: str = "test"
    resamples: int = 250
    seed: int = DEFAULT_SEED
    metrics: tuple[str, ...] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    optimize: bool = False
    official: bool = False
    batch_size: int = 64
    chunk_images: int = CHUNK_IMAGES
    limit: int | None = None
    preset: str | None = None
    labeler: str | None = None
    radgraph: str = "radgraph"
    examples: int = 6
    overwrite: bool = False
    rescore: bool = False
    progress: bool = True
    predict: bool = True
    score: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` is {self.limit}, but at least one image is needed; leave it out to use all.")
        for name in ("batch_size", "chunk_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        named = (("number of resamples", self.resamples), ("seed", self.seed), ("number of examples", self.examples))
        for what, value in named:
            if value < 0:
                raise ValueError(f"The {what} is {value}, but must not be negative.")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"Unknown preset {self.preset!r}. Known presets: {', '.join(PRESETS)}.")


@dataclass
class _Run:
    """Everything about one task of a run."""

    task: Task
    split: SplitData
    job: Job
    validation: SplitData | None = None
    validation_job: Job | None = None
    tuning: Tuning | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings | None:
        if not self.task.tunable:
            return None
        return self.tuning.settings if self.tuning is not None else start_of(self.task)


def evaluate(
    model: ModelSource,
    data: Mapping[str, DataSource],
    tasks: Sequence[Task],
    output: str | Path,
    options: Options | None = None,
    processes: Processes | None = None,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any] | None:
    """
    Evaluate a model and write everything into a folder.

    Args:
        model: The model.
        data: Data sets by name.
        tasks: What to evaluate; each names its data set.
        output: Folder; what it holds of an earlier run of the same model is taken over.
        options: How.
        processes: All processes that call this function together.
        command: For the results.
        say: Gets lines for people, on the main process.

    Returns:
        What `results.json` holds (docs/evaluation.md); None on other processes than the main one, and where nothing
        is scored.

    Raises:
        NothingToRun: None of the tasks can be run.
        ValueError: A missing or empty split, predictions that are not finite, and what else is wrong with the input.
    """
    options, processes, output = options or Options(), processes or Processes(), Path(output)
    start = time.perf_counter()
    say = say if processes.is_main else _silent
    runs, skipped = _plan(model, data, tasks, output, options, processes)
    if not runs:
        raise NothingToRun(
            "None of the tasks can be run: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        )
    for name, reason in skipped.items():
        say(f"{name}: not run: {reason}")
    labelers = Labelers(str(model.device), options.radgraph)
    if options.score and any(run.task.needs_text for run in runs):
        processes.share(lambda: _check_labelers(options, labelers))
    reuse = options.score and not options.rescore
    stored = processes.share(lambda: _stored_results(runs, model, output, options) if reuse else {})
    pending = [run for run in runs if run.task.name not in stored]
    contexts: list[EvaluationContext] = []
    if options.predict:
        _predict(pending, model, contexts, options, processes, say)
    predicted = time.perf_counter()
    if not options.score or not processes.is_main:
        return None

    results = {name: entry["result"] for name, entry in stored.items()}
    described = {}
    with labelers:
        for run in runs:
            described[run.split.source.name] = _describe(run.split)
            if run.task.name in stored:
                say(f"{run.task.name}: as scored before")
                continue
            results[run.task.name] = _score(run, model, output, options, labelers)
            say(f"{run.task.name}: {_headline(run.task, results[run.task.name])}")
    for name, entry in _other_results(output, set(results) | set(skipped), model, options).items():
        results[name] = entry["result"]
        described = entry["data"] | described
    seconds = {name: round(value, 2) for context in contexts for name, value in context.seconds.items()}
    content = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": options.seed,
        "resamples": options.resamples,
        "model": {
            "path": str(model.folder) if model.folder is not None else None,
            "sha256": model.sha256,
            "parameters": model.parameters,
            "name": model.name,
        },
        "data": described,
        "versions": versions(),
        "seconds": seconds
        | {
            "predictions": round(predicted - start, 2),
            "scores": round(time.perf_counter() - predicted, 2),
            "total": round(time.perf_counter() - start, 2),
        },
        "skipped": skipped,
        "tasks": results,
    }
    write_results(output, content)
    return content


def evaluate_model(
    model: Any,
    processor: Any,
    data: Mapping[str, Any],
    tasks: Sequence[str] | None = None,
    *,
    split: str = "test",
    output: str | Path | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """
    Evaluate a model in memory on one data set in memory.

    Args:
        model: `ChexModel`; put into evaluation mode (and back).
        processor: Its `ChexProcessor`.
        data: Splits by name (`DatasetDict`) in the common record.
        tasks: Names out of `TASKS`; tasks of the paper run as their twins where the classes are those of the phantom.
            Left out: all tasks that are not bound to a data set.
        split: The split to score.
        output: Folder of predictions and results; left out: a temporary one.
        options: As for `evaluate`; left out: no bootstrap, no examples, no progress bars.

    Returns:
        As `evaluate`.

    Raises:
        As `evaluate`.
    """
    options = replace(options or Options(resamples=0, examples=0, progress=False), split=split)
    features = next(iter(data.values())).features
    name = "phantom" if record_classes(features) == list(PHANTOM_CLASSES) else "own"
    chosen = bind_tasks(find_tasks(tasks or FREE_TASKS), [name], twins=name == "phantom")
    was_training = model.training
    model.eval()
    try:
        with tempfile.TemporaryDirectory() if output is None else nullcontext(output) as folder:
            source = ModelSource(model=model, processor=processor)
            return evaluate(source, {name: DataSource(name, data)}, chosen, folder, options)
    finally:
        model.train(was_training)


def bind_tasks(tasks: Sequence[Task], available: Collection[str], twins: bool = False) -> list[Task]:
    """
    Tasks with the data set that each of them runs on.

    Args:
        tasks: Of the catalogue.
        available: Names of data sets that are there.
        twins: Everything on the phantom.
    """
    bound = []
    for task in tasks:
        if task.name in PAPER_TASKS:
            bound.append(twin_of(task) if twins else task)
        elif twins or (task.data is None and "own" not in available and "phantom" in available):
            bound.append(on_data(task, "phantom", "phantom"))
        elif task.data is None or (task.data not in available and "own" in available):
            bound.append(on_data(task, "own", None))
        else:
            bound.append(task)
    return bound


def _silent(line: str) -> None:
    """Other processes than the main one say nothing."""


def _plan(
    model: ModelSource,
    data: Mapping[str, DataSource],
    tasks: Sequence[Task],
    output: Path,
    options: Options,
    processes: Processes,
) -> tuple[list[_Run], dict[str, str]]:
    """What can be run, with stored tuned settings, and why the rest cannot."""
    can_generate = model.can_generate
    skipped: dict[str, str] = {}
    chosen: list[Task] = []
    for task in tasks:
        if task.data not in data:
            info = DATA_SETS.get(task.data or "own")
            skipped[task.name] = info.remedy if info is not None else f"needs the data set {task.data}"
        elif task.needs_text and not can_generate:
            skipped[task.name] = "the model has no sentence generator (as after training stages 1 and 2)"
        else:
            chosen.append(task)

    splits: dict[tuple[str, str], SplitData] = {}

    def split_of(name: str, split: str) -> SplitData:
        if (name, split) not in splits:
            splits[name, split] = data[name].split(split, options.limit)
        return splits[name, split]

    with processes.together():
        for task in chosen:
            split_of(task.data, options.split)
    if processes.count > 1:
        model.sha256 = processes.share(lambda: model.sha256)  # takes a while for gigabytes of weights

    runs: list[_Run] = []
    presets = {task.name: _preset(task, options) for task in chosen}
    folder = output / "predictions"
    for name in dict.fromkeys(task.data for task in chosen):
        of_data = [task for task in chosen if task.data == name]
        jobs = plan_jobs(of_data, split_of(name, options.split), presets, model, folder, options.chunk_images)
        tunable = [task for task in of_data if task.tunable and options.optimize]
        validation_jobs = {}
        if tunable and len(data[name].splits.get(VALIDATION, ())):
            validation_jobs = plan_jobs(
                tunable, split_of(name, VALIDATION), presets, model, folder, options.chunk_images
            )
        for task in of_data:
            try:
                class_positions(split_of(name, options.split).classes, jobs[task.name].classes)
            except ValueError as error:
                raise ValueError(f"{task.name} on {name}: {error}") from error
            run = _Run(task, split_of(name, options.split), jobs[task.name])
            if task in tunable:
                if task.name in validation_jobs:
                    run.validation, run.validation_job = split_of(name, VALIDATION), validation_jobs[task.name]
                else:
                    run.notes.append("Not tuned: the data have no validation split.")
            runs.append(run)

    def stored_tuning() -> dict[str, Tuning | None]:
        return {
            run.task.name: read_tuning(
                tuning_path(output, run.task), run.task, _tuning_origin(run, model, options), options.overwrite
            )
            for run in runs
            if run.validation is not None
        }

    for name, tuning in processes.share(stored_tuning).items():
        next(run for run in runs if run.task.name == name).tuning = tuning
    return runs, skipped


def _check_labelers(options: Options, labelers: Labelers) -> None:
    """What was named must be there before hours of predictions; defaults that are missing only leave metrics out."""
    named = [("--labeler", options.labeler, labelers.get)] if options.labeler is not None else []
    if options.radgraph != Options.radgraph:
        named.append(("--radgraph", options.radgraph, lambda _: labelers.annotator()))
    for option, spec, load in named:
        try:
            reason = load(spec)[1]
        except ValueError as error:
            raise ValueError(f"{option} {spec}: {error}") from error
        if reason:
            raise ValueError(f"{option} {spec}: {reason.rstrip('.')}.")


def _preset(task: Task, options: Options) -> Preset:
    return PRESETS[options.preset or ("phantom" if task.class_set == "phantom" else "paper")]


def _tuning_origin(run: _Run, model: ModelSource, options: Options) -> dict[str, Any]:
    return {
        "model": model.sha256,
        "data": run.validation.source.name,
        "fingerprint": run.validation.fingerprint,
        "images": len(run.validation.ids),
        "official": options.official,
        "start": plain(start_of(run.task)),
    }


def _key(run: _Run, model: ModelSource, options: Options) -> dict[str, Any]:
    """Everything that the result of a task depends on."""
    return {
        "model": model.sha256,
        "twin": run.task.twin,
        "predictions": run.job.store.key,
        "images": len(run.split.ids),
        "settings": plain(run.settings) if run.settings is not None else None,
        "tuned": run.tuning is not None,
        "labeler": (options.labeler or run.task.labeler) if run.task.needs_text else None,
        "radgraph": options.radgraph if run.task.needs_text else None,
        "metrics": list(options.metrics) if options.metrics is not None else None,
        "left_out": dict(options.left_out),
        "resamples": options.resamples,
        "seed": options.seed,
        "examples": options.examples,
        "code": code_digest(),
    }


def _stored_results(runs: Sequence[_Run], model: ModelSource, output: Path, options: Options) -> dict[str, dict]:
    """Results of earlier runs that are still right."""
    found = {}
    for run in runs:
        if run.validation is not None and run.tuning is None:
            continue  # to be tuned first
        stored = read_task(output, run.task.name)
        if stored is not None and stored["key"] == _key(run, model, options):
            found[run.task.name] = stored
    return found


def _other_results(output: Path, done: set[str], model: ModelSource, options: Options) -> dict[str, dict]:
    """Results of tasks that were not asked for now, of the same model, split and bootstrap."""
    found = {}
    for path in sorted((output / "tasks").glob("*.json")):
        if path.stem in done or (stored := read_task(output, path.stem)) is None:
            continue
        wanted = {"model": model.sha256, "resamples": options.resamples, "seed": options.seed, "code": code_digest()}
        same_split = stored["result"].get("split") == options.split
        if same_split and all(stored["key"].get(name) == value for name, value in wanted.items()):
            found[path.stem] = stored
    return found


def _predict(
    runs: Sequence[_Run],
    model: ModelSource,
    contexts: list[EvaluationContext],
    options: Options,
    processes: Processes,
    say: Callable[[str], None],
) -> None:
    def context() -> EvaluationContext:
        if not contexts:
            contexts.append(EvaluationContext(model.load(), model.processor))
        return contexts[0]

    work: dict[tuple[str, str], tuple[SplitData, list[Job]]] = {}
    for run in runs:
        parts = [(run.split, run.job)]
        if run.validation is not None and run.tuning is None:
            parts.append((run.validation, run.validation_job))
        for split, job in parts:
            jobs = work.setdefault((split.source.name, split.split), (split, []))[1]
            if all(job is not known for known in jobs):
                jobs.append(job)
    for split, jobs in work.values():
        begin = time.perf_counter()
        count = predict_split(
            context,
            split,
            jobs,
            batch_size=options.batch_size,
            processes=processes,
            overwrite=options.overwrite,
            progress=options.progress,
        )
        done = (
            f"{count:,} of {len(split.ids):,} images in {time.perf_counter() - begin:.1f} s" if count else "as before"
        )
        say(f"{split.source.name} {split.split}: predictions of {', '.join(job.kind for job in jobs)}: {done}")


def tune(run_task: Task, split: SplitData, job: Job, processor: Any, official: bool) -> tuple[Settings, list[dict]]:
    """Tune the post-processing of a detection or grounding task on the predictions of a validation split."""
    predictions = job.store.read(split.ids, f"{run_task.name} ({split.split})")
    targets = split.targets(job.classes, processor.image_processor)
    if run_task.kind == "grounding":
        references = [boxes for target in targets for boxes in target.grounded_phrases().values()]
        start = run_task.grounding
        if not references:
            return start, []
        scores = predictions.arrays["scores"].astype(np.float64)
        return tune_grounding(predictions.arrays["boxes"].astype(np.float64), scores, references, start, official)
    candidates = Candidates.read(predictions.arrays)
    references = [target.object_references() for target in targets]
    return tune_detection(candidates, references, len(job.classes), run_task.detection, official)


def _score(run: _Run, model: ModelSource, output: Path, options: Options, labelers: Labelers) -> dict[str, Any]:
    begin = time.perf_counter()
    task, split, processor = run.task, run.split, model.processor
    if run.validation is not None and run.tuning is None:
        settings, log = tune(task, run.validation, run.validation_job, processor, options.official)
        run.tuning = Tuning(task.name, settings, log, _tuning_origin(run, model, options))
        write_tuning(tuning_path(output, task), run.tuning)
    tuned = time.perf_counter()
    predictions = run.job.store.read(split.ids, task.name)
    scored = score_task(
        task,
        predictions,
        split,
        run.job,
        processor,
        settings=run.settings,
        labeler=options.labeler or task.labeler,
        labelers=labelers,
        metrics=options.metrics,
        left_out=options.left_out,
        resamples=options.resamples,
        seed=options.seed,
        examples=options.examples,
        output=output,
    )
    result = {
        "title": task.title,
        "kind": task.kind,
        "headline": task.headline,
        "data": split.source.name,
        "split": split.split,
        "twin": task.twin,
        "images": len(split.ids),
        **scored.result,
        "settings": {
            **({"post_processing": plain(run.settings)} if run.settings is not None else {}),
            **run.job.store.origin["settings"],
            **({"labeler": options.labeler or task.labeler} if task.needs_text else {}),
        },
        "tuning": run.tuning.to_dict() if run.tuning is not None else None,
        "seconds": {"tuning": round(tuned - begin, 2), "scoring": round(time.perf_counter() - tuned, 2)},
    }
    result["notes"] = [*run.notes, *result["notes"]]
    if scored.raw is not None:
        write_bootstrap(output, task.name, list(result["metrics"]), scored.raw)
    write_task(output, task.name, _key(run, model, options), result, {split.source.name: _describe(split)})
    return result


def _describe(split: SplitData) -> dict[str, Any]:
    folder = split.source.folder
    return {
        "folder": str(folder) if folder is not None else None,
        "split": split.split,
        "images": len(split.ids),
        "fingerprint": split.fingerprint,
    }


def _headline(task: Task, result: Mapping[str, Any]) -> str:
    metric = headline(task.name, result)
    entry = result["metrics"].get(metric)
    if entry is None:
        reason = result["not_computed"].get(metric)
        return f"{metric} not computed" + (f": {reason}" if reason else "")
    return f"{metric} " + ("undefined" if entry["value"] is None else f"{entry['value']:.3f}")


def versions() -> dict[str, str]:
    """Of Python and the libraries that the results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


__all__ = ["NothingToRun", "Options", "bind_tasks", "evaluate", "evaluate_model", "tune", "versions"]
