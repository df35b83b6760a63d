"""Evaluate a ChEX model on a data set in the common record format, beside trivial baselines.

    python evaluation/run.py --model runs/demo/model --data-dir runs/demo/phantom --split test --output metrics.json

`--data-dir` is a folder written by `DatasetDict.save_to_disk`, or the cache folder of the phantom builder.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch

from evaluation.baselines import (
    constant_auroc,
    fit_prior_boxes,
    linear_probe_auroc,
    pixel_features,
    score_constant_texts,
    score_prior_boxes,
)
from evaluation.files import write_text
from evaluation.tasks import TASKS, EvaluationContext
from evaluation.tasks.base import Labeler
from evaluation.tasks.description import RegionDescription
from evaluation.tasks.detection import FindingDetection
from evaluation.tasks.grounding import SentenceGrounding
from evaluation.tasks.records import iterate_targets
from processing_chex.prompt_sets import class_prompts, find_class_set
from training.data.prepared import is_prepared, open_prepared
from training.data.record import record_classes


HEADLINES = tuple(task.headline for task in TASKS.values())
TUNED = (FindingDetection.name, SentenceGrounding.name)
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "numpy", "scipy")


@torch.inference_mode()
def evaluate_model(
    model: Any,
    processor: Any,
    data: Mapping[str, datasets.Dataset],
    *,
    split: str = "test",
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    labeler: Labeler | None = None,
    class_set: str | None = None,
    tune: bool = True,
    baselines: bool = True,
    baseline_limit: int = 4000,
    max_normal: float | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict:
    """Scores a model on one split and returns a dict that is ready for JSON.

    Args:
        model: `ChexModel`; put into evaluation mode (and back).
        processor: its `ChexProcessor`.
        data: splits by name (`DatasetDict`) in the common record format. `validation` is used to fit post-processing,
            `train` to fit the baselines; without them the defaults stay and the baselines are left out.
        split: the split to score.
        batch_size: images encoded together.
        limit: use only the first so many images of the scored and of the validation split.
        seed: of the draw of normal regions, if `max_normal` is given.
        tasks: names out of `TASKS`; left out: all of them.
        labeler: text -> {finding: 1 / 0 / -1}; left out: the exact labeller of the phantom, for phantom classes.
        class_set: name of the prompt set of the finding classes; left out: found by their names.
        tune: fit post-processing of detection and grounding on the validation split.
        baselines: also score the trivial baselines.
        baseline_limit: training images that the baselines see.
        max_normal: see `RegionDescription`.
        generation_kwargs: instead of greedy decoding of at most 32 tokens.
        progress: show progress bars.

    Returns:
        The six headline numbers `anatomy_miou, detection_map50, grounding_miou, region_auroc, description_f1,
        report_f1` (None where a task was not run or is undefined), the same under `baselines`, and `details` with one
        entry per task, the baselines' details, skipped tasks with the reason, counts, seconds, seed and versions.

    Raises:
        ValueError: for an unknown split or task, an empty split, or finding classes without prompts.
    """
    start = time.perf_counter()
    chosen = list(TASKS) if tasks is None else list(tasks)
    unknown = [name for name in chosen if name not in TASKS]
    if unknown:
        raise ValueError(f"Unknown task {', '.join(unknown)}. Choose from: {', '.join(TASKS)}.")
    if split not in data or not len(data[split]):
        raise ValueError(f"There is no split {split!r} with images in this data set; choose from: {', '.join(data)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}, but at least one image is needed; leave it out to use all.")
    names = record_classes(data[split].features)
    class_set = class_set or find_class_set(names)
    context = EvaluationContext(
        model, processor, class_prompts(class_set), labeler or _default_labeler(class_set), progress=progress
    )
    if generation_kwargs is not None:
        context.generation_kwargs = dict(generation_kwargs)

    skipped = {}
    for name in [name for name in chosen if TASKS[name].needs_text]:
        if not context.can_generate:
            skipped[name] = "the model has no sentence generator (training stages 1 and 2)"
        elif context.labeler is None:
            skipped[name] = f"no labeller is known for the class set {class_set!r}; pass one"
    chosen = [name for name in chosen if name not in skipped]

    result: dict[str, Any] = dict.fromkeys(HEADLINES)
    details: dict[str, Any] = {}
    was_training = model.training
    model.eval()
    try:
        options: dict[str, dict] = {RegionDescription.name: {"max_normal": max_normal, "seed": seed}}
        running = {name: TASKS[name](context, **options.get(name, {})) for name in chosen}
        tuned = [name for name in TUNED if name in chosen]
        if tune and tuned and len(data.get("validation", ())):
            _tune(context, {name: running[name] for name in tuned}, _head(data["validation"], limit), batch_size)
        for batch in context.batches(_head(data[split], limit), batch_size, f"evaluate on {split}"):
            for name, task in running.items():
                with context.timed(name):
                    task.update(batch)
        for name, task in running.items():
            with context.timed(name):
                details[name] = task.compute()
            result[task.headline] = details[name].pop("value")
    finally:
        model.train(was_training)

    if baselines and len(data.get("train", ())):
        with context.timed("baselines"):
            result["baselines"], details["baselines"] = _baselines(
                context, data["train"], _head(data[split], limit), names, baseline_limit
            )
    details |= {
        "skipped": skipped,
        "split": split,
        "images": len(_head(data[split], limit)),
        "class_set": class_set,
        "seed": seed,
        "batch_size": batch_size,
        "generation": context.generation_kwargs,
        "seconds": {**{name: round(value, 2) for name, value in context.seconds.items()}},
        "versions": _versions(),
    }
    details["seconds"]["total"] = round(time.perf_counter() - start, 2)
    result["details"] = details
    return result


def _head(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _default_labeler(class_set: str) -> Labeler | None:
    if class_set != "phantom":
        return None
    from training.data.phantom_text import label_text

    return label_text


def _tune(context: EvaluationContext, running: dict, validation: datasets.Dataset, batch_size: int) -> None:
    """Fit the settings of detection and grounding on the validation split and put them into the tasks."""
    trials = {name: TASKS[name](context) for name in running}
    for batch in context.batches(validation, batch_size, "tune on validation"):
        with context.timed("tuning"):
            for trial in trials.values():
                trial.update(batch)
    for name, trial in trials.items():
        with context.timed("tuning"):
            settings, log = trial.tune()
        running[name].settings = settings
        running[name].tuning = {"validation_images": len(validation), "validation_values": log}


def _baselines(
    context: EvaluationContext, train_data: datasets.Dataset, test_data: datasets.Dataset, names: list[str], limit: int
) -> tuple[dict, dict]:
    image_processor = context.processor.image_processor
    train_data = _head(train_data, limit)
    train, test = (list(iterate_targets(part, image_processor)) for part in (train_data, test_data))
    prior = fit_prior_boxes(train, len(names))
    boxes = score_prior_boxes(prior, train, test)
    values: dict[str, Any] = dict.fromkeys(HEADLINES)
    values |= {key: boxes[key] for key in ("anatomy_miou", "detection_map50", "grounding_miou")}
    values["region_auroc"] = constant_auroc(train, test)
    pixels = (pixel_features(train_data, image_processor), pixel_features(test_data, image_processor))
    probe, penalty = linear_probe_auroc(pixels, train, test)
    details = {
        **boxes["details"],
        "region_auroc_linear_probe": {"weighted": probe, "penalty": penalty, "pixels": pixels[0].shape[1]},
        "training_images": len(train),
    }
    if context.labeler is not None:
        texts = score_constant_texts(train, test, context.labeler, names)
        values |= {key: texts[key] for key in ("description_f1", "report_f1")}
        details |= texts["details"]
    return values, details


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_json(path: str | Path, content: Mapping) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def load_data(data_dir: str | Path) -> datasets.DatasetDict:
    """Open the splits in a folder that `chex data prepare` or `DatasetDict.save_to_disk` has written, or in the cache
    of one builder.

    Raises:
        ValueError: if the folder is none of these.
    """
    folder = Path(data_dir)
    if is_prepared(folder):
        return open_prepared(folder)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    # A builder's cache: <folder>/<builder>/<configuration>/<version>/<builder>-<split>.arrow
    builds = sorted({info.parent for info in folder.glob("**/dataset_info.json")})
    if len(builds) != 1:
        found = "no data set" if not builds else f"{len(builds)} data sets ({', '.join(map(str, builds[:3]))})"
        raise ValueError(
            f"`--data-dir` {folder} holds {found}, but exactly one is needed: give a folder written by "
            "`chex data prepare` or `DatasetDict.save_to_disk`, or the cache folder of one builder."
        )
    info = datasets.DatasetInfo.from_directory(str(builds[0]))
    splits = {}
    for split in info.splits or {}:
        files = sorted(str(file) for file in builds[0].glob(f"*-{split}*.arrow"))
        parts = [datasets.Dataset.from_file(file) for file in files]
        if parts:
            splits[split] = datasets.concatenate_datasets(parts)
    return datasets.DatasetDict(splits)


TABLE = (
    ("anatomy_miou", "anatomy localisation", "mIoU"),
    ("detection_map50", "finding detection", "mAP@0.5"),
    ("grounding_miou", "sentence grounding", "mIoU"),
    ("region_auroc", "region classification", "wAUROC"),
    ("description_f1", "region description", "micro-F1"),
    ("report_f1", "report generation", "micro-F1"),
)


def format_table(metrics: Mapping) -> str:
    """The headline numbers beside their baselines, as text."""
    lines = [f"{'task':<24}{'metric':<10}{'model':>8}{'baseline':>10}"]
    for key, task, metric in TABLE:
        model, baseline = metrics.get(key), (metrics.get("baselines") or {}).get(key)
        cells = ["-" if value is None else f"{value:.3f}" for value in (model, baseline)]
        lines.append(f"{task:<24}{metric:<10}{cells[0]:>8}{cells[1]:>10}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (2 for unusable input)."""
    parser = argparse.ArgumentParser(description="Evaluate a ChEX model beside trivial baselines.")
    parser.add_argument("--model", required=True, help="folder of the model and its processor")
    parser.add_argument("--data-dir", required=True, help="saved DatasetDict, or cache folder of the phantom")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="only these tasks")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-normal", type=float, help="normal regions to describe per abnormal one (default: all)")
    parser.add_argument("--no-tune", action="store_true", help="leave post-processing at its defaults")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)

    from modeling_chex import ChexModel
    from processing_chex import ChexProcessor

    try:
        if not Path(arguments.model).is_dir():
            raise ValueError(f"`--model` {arguments.model} is not a folder: give the folder of a saved model.")
        data = load_data(arguments.data_dir)
        load: Callable = ChexModel.from_pretrained
        model = load(arguments.model).to(arguments.device)
        metrics = evaluate_model(
            model,
            ChexProcessor.from_pretrained(arguments.model),
            data,
            split=arguments.split,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            seed=arguments.seed,
            tasks=arguments.tasks,
            tune=not arguments.no_tune,
            baselines=not arguments.no_baselines,
            max_normal=arguments.max_normal,
        )
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    write_json(arguments.output, metrics)
    print(format_table(metrics))
    for name, reason in metrics["details"]["skipped"].items():
        print(f"Skipped {name}: {reason}.")
    print(f"Written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
