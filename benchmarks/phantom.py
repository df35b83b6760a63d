"""
The benchmark on the phantom: one run of the small configuration, three seeds and four ablations of the demo's.

    make benchmark-phantom                                  # everything that has no result yet
    python benchmarks/phantom.py --runs small seed-0        # only these

Every run goes through all stages and is evaluated on the test split like the demo; it can be stopped at any moment and
goes on from its last checkpoint. The result of a finished run is kept in `benchmarks/results/phantom/RUN.json` and not
made again until its definition changes (`--again` forgets it); `benchmarks/results/phantom.md` is the table of all.
Stages that two runs have in common are trained once; their seconds count in both.

| run | what differs from the demo |
|---|---|
| small | `training/configs/phantom_small`: 160 pixels, a larger image encoder, 30,000 images, longer training |
| seed-0, -1, -2 | the demo with other seeds of weights, batches and augmentation |
| no-post-decoder | seed 0 without the post decoder |
| no-sentence-losses | seed 0; no objective of sentences: contrastive, detection, MSE, generation |
| single-region | seed 0 with one region for each query instead of three |
| single-stage | seed 0; detector, post decoder and generator at once, as many updates as the stages have together |
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from evaluation.demo import evaluate_twins
from evaluation.files import write_text
from processing_chex import ChexProcessor
from training.configuration import CONFIG_DIR, load_config
from training.data.phantom import generator_fingerprint
from training.stage_data import load_data


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
METRICS = {
    "anatomy_miou": "anatomy mIoU",
    "detection_map50": "finding mAP@0.5",
    "grounding_miou": "grounding mIoU",
    "region_auroc": "region wAUROC",
    "description_f1": "description F1",
    "report_f1": "report F1",
}
TARGETS = {
    "anatomy_miou": 0.85,
    "detection_map50": 0.45,
    "grounding_miou": 0.45,
    "region_auroc": 0.92,
    "description_f1": 0.70,
}
STAGES = ("pretrain_clip", "stage1", "stage2", "pretrain_generator", "stage3")
PARENTS = {
    "stage1": {"init_from": "pretrain_clip"},
    "stage2": {"init_from": "stage1"},
    "pretrain_generator": {"init_from": "pretrain_clip"},
    "stage3": {"init_from": "stage2", "generator_from": "pretrain_generator"},
}
NO_SENTENCES = tuple(
    f"objectives.weights.sentence_{term}=0" for term in ("contrastive", "detection", "mse", "generation")
)


@dataclass(frozen=True)
class Run:
    """
    A run of the benchmark.

    Attributes:
        configs: Folder of the configurations.
        seed: Of all stages.
        overrides: Of single stages.
        parents: Other stages than usual to start from; a stage without an entry in `stages` is not run.
        stages: Those that are run.
        shared: Stages that are those of another run.
    """

    configs: str = "phantom"
    seed: int = 0
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parents: dict[str, dict[str, str]] = field(default_factory=dict)
    stages: tuple[str, ...] = STAGES
    shared: dict[str, str] = field(default_factory=dict)


def shared_with_seed_0(*stages: str) -> dict[str, str]:
    return dict.fromkeys(stages, "seed-0")


def _single_stage() -> Run:
    """All parts at once, with the objectives of all stages and as many updates as they have together."""
    stages = {name: load_config(CONFIG_DIR / "phantom" / f"{name}.yaml") for name in ("stage1", "stage2", "stage3")}
    weights = {
        name: value
        for name, value in vars(stages["stage1"].objectives.weights).items()
        if not name.endswith("generation") and not name.endswith("mse")
    }
    first, post = stages["stage1"], stages["stage2"].model["post_decoder_config"]
    overrides = (
        "trainable=[vision_model, visual_projection, detector, post_decoder, sentence_generator]",
        f"model.post_decoder_config={json.dumps(post | stages['stage3'].model['post_decoder_config'])}",
        f"optimization.max_steps={sum(stage.optimization.max_steps for stage in stages.values())}",
        f"optimization.warmup_steps={first.optimization.warmup_steps}",
        f"augmentation.crop_area={list(first.augmentation.crop_area)}",
        f"augmentation.crop_aspect={list(first.augmentation.crop_aspect)}",
        *(f"objectives.weights.{name}={value}" for name, value in weights.items() if value),
        f"objectives.classes_per_step={first.objectives.classes_per_step}",
        "objectives.multi_anatomies=true",
    )
    return Run(
        stages=("pretrain_clip", "pretrain_generator", "stage3"),
        parents={"stage3": {"init_from": "pretrain_clip", "generator_from": "pretrain_generator"}},
        overrides={"stage3": overrides},
        shared=shared_with_seed_0("pretrain_clip", "pretrain_generator"),
    )


def define_runs() -> dict[str, Run]:
    """All runs by name, in the order in which they are made."""
    return {
        "small": Run(configs="phantom_small", seed=42),
        "seed-0": Run(seed=0),
        "no-post-decoder": Run(
            stages=("pretrain_clip", "stage1", "pretrain_generator", "stage3"),
            parents={"stage3": {"init_from": "stage1", "generator_from": "pretrain_generator"}},
            overrides={
                "stage3": (
                    "model.post_decoder_config=null",
                    "trainable=[sentence_generator]",
                    # what only the post decoder could learn from
                    *(f"objectives.weights.{name}=0" for name in ("sentence_mse", "anatomy_mse", "anatomy_statement")),
                )
            },
            shared=shared_with_seed_0("pretrain_clip", "stage1", "pretrain_generator"),
        ),
        "no-sentence-losses": Run(
            overrides=dict.fromkeys(("stage1", "stage2", "stage3"), NO_SENTENCES),
            shared=shared_with_seed_0("pretrain_clip", "pretrain_generator"),
        ),
        "single-region": Run(overrides={"pretrain_clip": ("model.detector_config.num_regions=1",)}),
        "single-stage": _single_stage(),
        "seed-1": Run(seed=1),
        "seed-2": Run(seed=2),
    }


def fast(run: Run) -> Run:
    """The same path with a few updates on a few images."""
    short = {"pretrain_clip": 6, "stage1": 6, "stage2": 3, "pretrain_generator": 6, "stage3": 3}
    data = ("data.num_train=96", "data.num_validation=16", "data.num_test=24", "tracking.validate_every=0")
    overrides = {
        stage: (*run.overrides.get(stage, ()), *data, f"optimization.max_steps={short[stage]}") for stage in run.stages
    }
    return replace(run, overrides=overrides)


def definition(run: Run, runs: dict[str, Run]) -> str:
    """Digest of everything that decides the result of a run, but not of how it is computed."""
    digest = hashlib.sha256(generator_fingerprint().encode())
    for stage in run.stages:
        source = runs[run.shared[stage]] if stage in run.shared else run
        config = CONFIG_DIR / source.configs / f"{stage}.yaml"
        written = [
            source.seed,
            source.parents.get(stage),
            source.overrides.get(stage),
            yaml.safe_load(config.read_text()),
        ]
        digest.update(json.dumps(written).encode())
    return digest.hexdigest()[:16]


def train(name: str, runs: dict[str, Run], folder: Path, processes: int) -> tuple[Path, dict[str, float]]:
    """Runs or reuses the stages of a run; returns the last model and the seconds of each, over all interruptions."""
    run, seconds = runs[name], {}
    for stage in run.stages:
        owner = run.shared.get(stage, name)
        source, output = runs[owner], folder / owner / stage
        model, clock = output / "model" / "config.json", output.with_suffix(".seconds")
        before = model.stat().st_mtime_ns if model.is_file() else None
        print(f"{name}: {stage}" + (f" (that of {owner})" if owner != name else ""), flush=True)
        start = time.perf_counter()
        try:
            subprocess.run(
                stage_command(stage, source, owner, folder, processes),
                check=True,
                env=environment(processes),
                cwd=ROOT,
            )
        finally:
            spent = float(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
            if not model.is_file() or model.stat().st_mtime_ns != before:  # else it was only reused
                spent += time.perf_counter() - start
                write_text(clock, f"{spent:.1f}\n")
        seconds[stage] = round(spent, 1)
    return model.parent, seconds


def stage_command(stage: str, run: Run, owner: str, folder: Path, processes: int) -> list[str]:
    """Command of a stage that belongs to the run `owner`."""
    config = CONFIG_DIR / run.configs / f"{stage}.yaml"
    batch = load_config(config).optimization.batch_size
    if batch % processes:
        raise ValueError(f"Batches of {batch} in {config} cannot be divided among {processes} processes.")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "training" / f"{stage}.py"), "--config", str(config), f"seed={run.seed}"]
    command += [f"output_dir={folder / owner / stage}", f"data.cache_dir={folder / 'phantom'}"]
    command += [f"optimization.batch_size={batch // processes}", *run.overrides.get(stage, ())]
    for key, parent in run.parents.get(stage, PARENTS.get(stage, {})).items():
        command.append(f"{key}={folder / run.shared.get(parent, owner) / parent / 'model'}")
    return command


def environment(processes: int) -> dict[str, str]:
    """One thread for each of several processes."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    return (
        {"ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower()}
        | os.environ
        | threads
        | {"PYTHONPATH": paths}
    )


def evaluate(model_dir: Path, run: Run, folder: Path, output: Path) -> tuple[dict, float]:
    """Headline numbers on the test split, as the demo's, and the seconds that they took; pages go to `output`."""
    start = time.perf_counter()
    overrides = [text for text in run.overrides.get("stage3", ()) if text.startswith("data.")]
    config = load_config(
        CONFIG_DIR / run.configs / "stage3.yaml", [*overrides, f"data.cache_dir={folder / 'phantom'}"]
    )
    data = load_data(config.data)[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = ChexProcessor.from_pretrained(model_dir)
    metrics = evaluate_twins(model_dir, processor, data, output, device, "make benchmark-phantom")
    return metrics, time.perf_counter() - start


def make(name: str, runs: dict[str, Run], folder: Path, processes: int) -> dict:
    """Makes a run and returns its result."""
    model_dir, seconds = train(name, runs, folder, processes)
    metrics, seconds["evaluation"] = evaluate(model_dir, runs[name], folder, folder / name / "evaluation")
    return {
        "run": name,
        "definition": definition(runs[name], runs),
        "command": f"python benchmarks/phantom.py --runs {name} --processes {processes}",
        "metrics": {key: metrics[key] for key in METRICS},
        "baselines": metrics.get("baselines"),
        "minutes": round(sum(seconds.values()) / 60, 1),
        "seconds": seconds,
        "processes": processes,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: version(package) for package in ("torch", "transformers", "accelerate", "datasets")}
        | {"python": platform.python_version()},
    }


def summarise(results: dict[str, dict]) -> str:
    """The table of all results as Markdown."""
    lines = [
        "# Results on the phantom",
        "",
        "Written by `make benchmark-phantom` (`python benchmarks/phantom.py`), which says how the runs differ; all on",
        "the test split of 800 images. Minutes are of all stages and the evaluation on so many cores.",
        "",
        "| run | " + " | ".join(METRICS.values()) + " | minutes | cores |",
        "|---" * (len(METRICS) + 3) + "|",
    ]

    def row(name: str, cells: list[str], minutes: str = "", cores: str = "") -> str:
        return f"| {name} | " + " | ".join(cells) + f" | {minutes} | {cores} |"

    def of(result: dict) -> list[str]:
        return ["-" if result["metrics"][key] is None else f"{result['metrics'][key]:.3f}" for key in METRICS]

    lines.append(row("target of small", [f"{TARGETS[key]:.2f}" if key in TARGETS else "" for key in METRICS]))
    for name, result in results.items():
        lines.append(row(name, of(result), f"{result['minutes']:.0f}", str(result["cores"])))
    seeds = [result["metrics"] for name, result in results.items() if name.startswith("seed-")]
    if len(seeds) > 1:
        columns = [[metrics[key] for metrics in seeds] for key in METRICS]
        cells = [
            "-" if None in values else f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
            for values in columns
        ]
        lines.append(row(f"mean ± std of {len(seeds)} seeds", cells))
    baselines = next((result["baselines"] for result in results.values() if result["baselines"]), None)
    if baselines:
        lines.append(row("trivial baselines", of({"metrics": baselines})))
    remarks = [f"- {name}: {result['remark']}" for name, result in results.items() if "remark" in result]
    if remarks:
        lines += ["", *remarks]
    return "\n".join(lines) + "\n"


def main() -> int:
    runs = define_runs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(runs), default=list(runs), metavar="RUN")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark", help="models and checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--processes", type=int, default=2, help="with one thread each; 1: one with all threads")
    parser.add_argument("--fast", action="store_true", help="a few updates: proves the path, not the numbers")
    parser.add_argument("--again", action="store_true", help="make the runs although they have results")
    arguments = parser.parse_args()
    if arguments.fast:
        runs = {name: fast(run) for name, run in runs.items()}
        arguments.folder = arguments.folder / "fast"
        if arguments.results == RESULTS:
            arguments.results = arguments.folder / "results"
    kept = arguments.results / "phantom"
    for name in arguments.runs:
        path = kept / f"{name}.json"
        if path.is_file() and not arguments.again:
            if json.loads(path.read_text(encoding="utf-8"))["definition"] == definition(runs[name], runs):
                print(f"{name}: has its result in {path}.")
                continue
            print(f"{name}: its result in {path} is of another definition and is made again.")
        result = make(name, runs, arguments.folder.absolute(), arguments.processes)
        kept.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=2) + "\n")
        results = {
            run: json.loads(file.read_text(encoding="utf-8"))
            for run in runs
            if (file := kept / f"{run}.json").is_file()
        }
        write_text(arguments.results / "phantom.md", summarise(results))
        print(summarise({name: result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
