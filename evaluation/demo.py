"""The main job on synthetic data: build the phantom, train a small ChEX through all stages, evaluate, write a page."""

import importlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from evaluation.baselines import score_baselines
from evaluation.engine import Options, bind_tasks, evaluate
from evaluation.files import write_text
from evaluation.html_report import write_report
from evaluation.inference import DataSource, ModelSource
from evaluation.page import write_pages
from evaluation.results import RESULTS
from evaluation.run import format_results
from evaluation.tasks.catalog import find_tasks
from evaluation.tasks.examples import choose_examples, explain_examples
from modeling_chex import ChexModel
from processing_chex import ChexProcessor
from training.configuration import CONFIG_DIR, load_config
from training.data.phantom_text import label_text
from training.stage_data import load_data


logger = logging.getLogger(__name__)

STAGES = ("pretrain_clip", "stage1", "stage2", "pretrain_generator", "stage3")
PARENTS = {  # configuration key -> stage whose model it takes
    "stage1": {"init_from": "pretrain_clip"},
    "stage2": {"init_from": "stage1"},
    "pretrain_generator": {"init_from": "pretrain_clip"},
    "stage3": {"init_from": "stage2", "generator_from": "pretrain_generator"},
}
TARGETS = {
    "anatomy_miou": 0.75,
    "detection_map50": 0.20,
    "grounding_miou": 0.30,
    "region_auroc": 0.80,
    "description_f1": 0.45,
}
# Headline number -> the task that gives it, and its metric there.
HEADLINES = {
    "anatomy_miou": ("anatomy_localization", "miou"),
    "detection_map50": ("od_vindr", "map50"),
    "grounding_miou": ("sg_mscxr", "miou"),
    "region_auroc": ("rc_cig", "wauroc"),
    "description_f1": ("re_cig", "micro_f1"),
    "report_f1": ("rg_mimic", "micro_f1"),
}
LEFT_OUT = dict.fromkeys(
    ("meteor", "meteor_normal", "meteor_abnormal"),
    "left out of the demo, because it needs Java and a program of its own; chex evaluate computes it",
)
# What `fast` changes: enough to pass through every step, far too little to learn.
FAST_DATA = {"num_train": 256, "num_validation": 48, "num_test": 48}
FAST_STEPS = {"pretrain_clip": 12, "stage1": 20, "stage2": 8, "pretrain_generator": 20, "stage3": 8}
MAX_THREADS = 4  # more cores only wait for each other at this model size


def run_demo(output_dir: str | Path = "runs/demo", fast: bool = False) -> Path:
    """
    Runs whatever has not been run yet and returns the path of the page.

    Stages that are finished with the same configuration are reused, interrupted ones go on from their last
    checkpoint. Writes `model/` (loadable by every command), `metrics.json` and `report.html` into `output_dir`; the
    stages are kept in `full/` or `fast/` beneath it.

    Args:
        output_dir: Folder of the results.
        fast: A few steps on a few images: proves the path, not the numbers.
    """
    start = time.perf_counter()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(os.cpu_count() or 1, MAX_THREADS))
    transformers.utils.logging.disable_progress_bar()
    output_dir = Path(output_dir)
    work_dir = output_dir / ("fast" if fast else "full")

    for stage in STAGES:
        importlib.import_module(f"training.{stage}").main(_arguments(stage, work_dir, fast))

    data = load_data(load_config(CONFIG_DIR / "phantom" / "stage3.yaml", _overrides(work_dir, fast)).data)[0]
    trained, model_dir = work_dir / "stage3" / "model", output_dir / "model"
    if not _same_file(trained / "model.safetensors", model_dir / "model.safetensors"):
        partial = model_dir.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trained, partial)
        shutil.rmtree(model_dir, ignore_errors=True)
        partial.rename(model_dir)

    model, processor = ChexModel.from_pretrained(model_dir), ChexProcessor.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    stored, evaluation_dir = work_dir / "metrics.json", work_dir / "evaluation"
    if stored.is_file() and stored.stat().st_mtime > (trained / "model.safetensors").stat().st_mtime:
        logger.warning("evaluation: reusing %s.", stored)
        metrics = json.loads(stored.read_text(encoding="utf-8"))
    else:
        metrics = evaluate_twins(
            model_dir, processor, data, evaluation_dir, device, "make demo FAST=1" if fast else "make demo"
        )
        _write_json(stored, metrics)
    _write_json(output_dir / "metrics.json", metrics)

    history = []
    for stage in STAGES:
        lines = (work_dir / stage / "history.jsonl").read_text(encoding="utf-8").splitlines()
        history += [json.loads(line) for line in lines]
    chosen = choose_examples(data["test"], min(3, len(data["test"])), seed=3)
    settings = metrics["details"]["finding_detection"]["settings"]
    explanations, detections = explain_examples(model, processor, data["test"], chosen, label_text, settings=settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = write_report(
        output_dir / "report.html",
        metrics,
        history,
        explanations,
        {
            "title": "ChEX on synthetic radiographs" + (" (fast run: proves the path only)" if fast else ""),
            "command": "make demo FAST=1" if fast else "make demo",
            "targets": TARGETS,
            "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
            | {"python": platform.python_version()},
            "facts": {
                "Model": f"{parameters / 1e6:.1f} M parameters",
                "Training images": f"{len(data['train']):,} phantom radiographs",
                "Test images": f"{len(data['test']):,}",
            },
        },
        detections,
    )
    print(f"\n{format_table(metrics)}\n")
    probe = metrics["details"].get("baselines", {}).get("region_auroc_linear_probe", {}).get("weighted")
    if probe is not None:
        print(f"A linear probe on the pixels classifies regions with AUROC {probe:.3f}.")
    print(f"Finished in {(time.perf_counter() - start) / 60:.1f} minutes.")
    print(f"Model:   {model_dir}\nMetrics: {output_dir / 'metrics.json'}\nReport:  {report} (open it in a browser)")
    print(f"Tasks:   {evaluation_dir / 'index.html'} (all tasks of the paper on the phantom, with intervals)")
    print('Ask it:  chex explain IMAGE --prompt "Pleural effusion" --figure explained.png')
    return report


def evaluate_twins(
    model_dir: Path, processor: ChexProcessor, data: Mapping, output_dir: Path, device: str, command: str
) -> dict[str, Any]:
    """The twins of the paper's tasks and anatomy localisation, and the headline numbers beside trivial baselines."""
    tasks = bind_tasks(find_tasks(["anatomy_localization", "all"]), ["phantom"], twins=True)
    model = ModelSource(model_dir, device=device)
    options = Options(optimize=True, overwrite=True, left_out=LEFT_OUT)
    results = evaluate(model, {"phantom": DataSource("phantom", data)}, tasks, output_dir, options, command=command)
    write_pages(output_dir / RESULTS)
    print(f"\n{format_results(results)}")
    names = results["tasks"]["od_vindr"]["per_class"]
    baselines = score_baselines(
        data["train"], data["test"], processor.image_processor, [row["name"] for row in names], label_text
    )
    return headline_metrics(results, *baselines)


def headline_metrics(results: Mapping[str, Any], baselines: Mapping[str, Any], details: Mapping[str, Any]) -> dict:
    """
    What `metrics.json` of the demo holds: the six headline numbers (None where undefined), the same under `baselines`,
    and `details` for the page.

    Args:
        results: As from `evaluation.engine.evaluate`.
        baselines, details: As from `evaluation.baselines.score_baselines`.
    """
    tasks = results["tasks"]

    def per_class(name: str, metric: str) -> dict[str, float | None]:
        return {row["name"]: row.get(metric) for row in tasks[name]["per_class"]}

    return {
        **{key: tasks[task]["metrics"][metric]["value"] for key, (task, metric) in HEADLINES.items()},
        "baselines": dict(baselines),
        "details": {
            "finding_detection": {
                "per_class": {
                    row["name"]: {"ap50": row["map50"], "ground_truths": row["positives"]}
                    for row in tasks["od_vindr"]["per_class"]
                },
                "settings": tasks["od_vindr"]["settings"]["post_processing"],
            },
            "sentence_grounding": {"settings": tasks["sg_mscxr"]["settings"]["post_processing"]},
            "anatomy_localization": {"per_region": per_class("anatomy_localization", "miou")},
            "region_classification": {"per_class": per_class("rc_cig", "wauroc")},
            **{
                name: {"per_class": {key: {"f1": value} for key, value in per_class(task, "f1").items()}}
                for name, task in (("region_description", "re_cig"), ("report_generation", "rg_mimic"))
            },
            "baselines": dict(details),
            "skipped": results["skipped"],
            "split": tasks["od_vindr"]["split"],
            "images": tasks["od_vindr"]["images"],
            "seed": results["seed"],
            "seconds": results["seconds"],
            "versions": results["versions"],
        },
    }


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


def _write_json(path: Path, content: Mapping) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _overrides(work_dir: Path, fast: bool) -> list[str]:
    overrides = [f"data.cache_dir={work_dir.parent / 'phantom'}"]
    if fast:
        overrides += [f"data.{name}={count}" for name, count in FAST_DATA.items()]
    return overrides


def _arguments(stage: str, work_dir: Path, fast: bool) -> list[str]:
    """Command line of a stage script."""
    arguments = ["--config", str(CONFIG_DIR / "phantom" / f"{stage}.yaml"), f"output_dir={work_dir / stage}"]
    arguments += [f"{key}={work_dir / parent / 'model'}" for key, parent in PARENTS.get(stage, {}).items()]
    if fast:
        arguments += [f"optimization.max_steps={FAST_STEPS[stage]}", "tracking.validate_every=0"]
    return arguments + _overrides(work_dir, fast)


def _same_file(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()


__all__ = ["HEADLINES", "format_table", "headline_metrics", "run_demo"]
