"""The benchmark on the phantom: its runs are valid, kept and resumed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from training.configuration import CONFIG_DIR, load_config


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "phantom.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("phantom_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_stage_of_every_run_has_a_valid_configuration(benchmark, tmp_path):
    runs = benchmark.define_runs()
    for name, run in runs.items():
        for stage in run.stages:
            command = benchmark.stage_command(stage, run, run.shared.get(stage, name), tmp_path, 2)
            config = load_config(
                command[command.index("--config") + 1],
                [part for part in command if "=" in part[1:] and not part.startswith("--")],
            )
            assert config.stage == stage
            published = load_config(CONFIG_DIR / run.configs / f"{stage}.yaml")
            assert config.optimization.batch_size * 2 == published.optimization.batch_size
            for parent in (config.init_from, config.generator_from):  # what a stage starts from is trained before
                if parent is not None:
                    owner, parent_stage = Path(parent).parts[-3:-1]
                    assert owner in (name, "seed-0")
                    assert parent_stage in runs[owner].stages
                    assert (owner == name) == (parent_stage not in run.shared)


def test_ablations_differ_in_what_they_say(benchmark):
    runs = benchmark.define_runs()

    def config(name, stage):
        run = runs[name]
        return load_config(CONFIG_DIR / run.configs / f"{stage}.yaml", run.overrides.get(stage, ()))

    for stage in ("stage1", "stage2", "stage3"):
        weights = vars(config("no-sentence-losses", stage).objectives.weights)
        assert all(value == 0 for term, value in weights.items() if term.startswith("sentence_"))
        assert weights["anatomy_statement"] > 0
    assert config("single-region", "pretrain_clip").model["detector_config"]["num_regions"] == 1
    assert config("no-post-decoder", "stage3").model["post_decoder_config"] is None
    joint = config("single-stage", "stage3")
    stages = [config("seed-0", stage) for stage in ("stage1", "stage2", "stage3")]
    assert set(joint.trainable) == {part for stage in stages for part in stage.trainable}
    assert joint.optimization.max_steps == sum(stage.optimization.max_steps for stage in stages)
    for term, value in vars(joint.objectives.weights).items():
        assert (value > 0) == any(vars(stage.objectives.weights)[term] > 0 for stage in stages), term


def test_definition_follows_what_decides_the_result(benchmark):
    runs = benchmark.define_runs()
    digests = {name: benchmark.definition(run, runs) for name, run in runs.items()}
    assert len(set(digests.values())) == len(runs)
    changed = runs | {"seed-0": replace(runs["seed-0"], overrides={"stage1": ("optimization.max_steps=1",)})}
    again = {name: benchmark.definition(run, changed) for name, run in changed.items()}
    assert {name for name in runs if again[name] != digests[name]} == {"seed-0", "no-post-decoder"}


def test_table_has_means_of_seeds(benchmark):
    def result(value):
        metrics = dict.fromkeys(benchmark.METRICS, value)
        return {"metrics": metrics | {"report_f1": None}, "baselines": None, "minutes": 3.25, "cores": 2}

    table = benchmark.summarise({"seed-0": result(0.5)})
    assert "±" not in table and "| seed-0 | 0.500 |" in table
    rows = benchmark.summarise({"seed-0": result(0.5), "seed-1": result(0.6)}).splitlines()
    mean = next(row for row in rows if row.startswith("| mean ± std of 2 seeds"))
    assert mean.count("0.550 ± 0.071") == len(benchmark.METRICS) - 1  # one is undefined
    assert "0.85" in next(row for row in rows if row.startswith("| target"))
    table = benchmark.summarise({"seed-0": result(0.5), "seed-1": result(0.6) | {"remark": "Beside other work."}})
    assert table.endswith(" |\n\n- seed-1: Beside other work.\n")


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_keeps_results(tmp_path):
    command = [sys.executable, str(SCRIPT), "--fast", "--processes", "1", "--folder", str(tmp_path), "--runs"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    first = subprocess.Popen([*command, "no-post-decoder"], env=environment, start_new_session=True)
    seconds = tmp_path / "fast" / "seed-0" / "stage1.seconds"
    while not seconds.is_file():  # stage 1 of seed 0 is finished
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    model = tmp_path / "fast" / "seed-0" / "stage1" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns

    done = subprocess.run(
        [*command, "no-post-decoder", "single-stage"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert model.stat().st_mtime_ns == written
    results = tmp_path / "fast" / "results"
    for name in ("no-post-decoder", "single-stage"):
        result = json.loads((results / "phantom" / f"{name}.json").read_text())
        assert result["metrics"]["anatomy_miou"] > 0 and result["metrics"]["report_f1"] is not None
        assert result["seconds"]["pretrain_clip"] > 0
    config = json.loads((tmp_path / "fast" / "no-post-decoder" / "stage3" / "model" / "config.json").read_text())
    assert config["post_decoder_config"] is None
    assert "| single-stage |" in (results / "phantom.md").read_text()

    again = subprocess.run([*command, "single-stage"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "has its result" in again.stdout
