"""The main job on synthetic data: build the phantom, train a small ChEX through all stages, evaluate, write a page."""

import importlib
import json
import logging
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from evaluation.html_report import write_report
from evaluation.run import evaluate_model, format_table, write_json
from evaluation.tasks import choose_examples, explain_examples
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
    results = work_dir / "metrics.json"
    if results.is_file() and results.stat().st_mtime > (trained / "model.safetensors").stat().st_mtime:
        logger.warning("evaluation: reusing %s.", results)
        metrics = json.loads(results.read_text(encoding="utf-8"))
    else:
        metrics = evaluate_model(model, processor, data)
        write_json(results, metrics)
    write_json(output_dir / "metrics.json", metrics)

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
    print('Ask it:  chex explain IMAGE --prompt "Pleural effusion" --figure explained.png')
    return report


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


__all__ = ["run_demo"]
