"""
Several processes on the CPU: they train as one process does with their batches together, and end when one dies.

Run as a script, this file is what the processes run: the stages in a JSON file, without dropout, keeping the gradients
of the first update.
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_file, save_file
from torch import nn

import tests.test_training as test_training
import training.loop as loop
from modeling_chex import ChexModel
from processing_chex import ChexProcessor
from tests.test_training import (
    DECODER,
    PARENTS,
    ROOT,
    STAGES,
    TINY_MODEL,
    arguments,
    compare,
    environment,
    on_prepared,
    read_history,
    script,
)
from training.configuration import load_config
from training.distributed import process_collectives, process_group_options, set_up_deepspeed
from training.objectives import Collectives, StepTotals, choose_for_generation, image_draws
from training.objectives.reduction import masked_mean
from training.steps import share_of_batches


prepared = test_training.prepared
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
SPREADING = ("FSDP", "DEEPSPEED")  # gradients, among other things
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}
MODELS = {
    "pretrain_clip": TINY_MODEL | {"detector_config": DECODER | QUIET | {"num_layers": 2, "roi_skip_dropout": 0.0}},
    "stage2": {"post_decoder_config": DECODER | QUIET | {"num_layers": 1, "region_drop": 0.3}},
    "pretrain_generator": {"n_embd": 32, "n_layer": 2, "n_head": 2, "prefix_hidden_size": 32, "n_positions": 128}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "prefix_dropout"), 0.0),
    "stage3": {"post_decoder_config": {"region_drop": 0.3}},
}
# Three batches of eight images an epoch, in updates of two batches and of one. The validation split has one image
# more than a batch, so that all processes but the first have nothing of the second one.
SHARED = (
    *("mixed_precision=no", "data.num_validation=9", "optimization.gradient_accumulation_steps=2"),
    *("optimization.max_steps=3", "tracking.log_every=1", "objectives.sentences_per_generation=7"),
)


def surroundings():
    """Environment of a process as users have it: that it is on a CPU is for the scripts to find out."""
    variables = environment(OMP_NUM_THREADS="1")
    del variables["ACCELERATE_USE_CPU"]
    return variables


def without_dropout(build):
    def built(config):
        parts = build(config)
        for module in parts.supervision.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return parts

    return built


class ShardingAccelerator(Accelerator):
    """FSDP2 on CPUs, for which `accelerate` has no launcher option: it would take plain data parallelism there."""

    def __init__(self, **options):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        super().__init__(fsdp_plugin=plugin, **options)
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = plugin


def use_deepspeed_on_cpus(zero_stage: str) -> None:
    """DeepSpeed as `accelerate launch` starts it; on CPUs, `accelerate` would take plain data parallelism."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero_stage}
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_GRADIENT_CLIPPING": "5.0"}
    loop._on_cpu = lambda: False
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def train(jobs: list[dict]) -> None:
    """Runs stages one after the other; their gradients, as the first update clips them, go to `gradients`."""
    clip = loop.Accelerator.clip_grad_norm_
    for job in jobs:
        main = importlib.import_module(f"training.{job['stage']}")
        config, _ = loop.parse_arguments(job["stage"], job["argv"], None)
        models = []

        def build(config, main=main, models=models):
            parts = without_dropout(main.build)(config)
            models.append(parts.supervision)
            return parts

        def keep(accelerator, *args, job=job, models=models, **kwargs):
            path = Path(job["gradients"])
            if accelerator.is_main_process and not path.exists() and accelerator.distributed_type not in SPREADING:
                named = models[-1].named_parameters()
                save_file({name: p.grad.clone() for name, p in named if p.grad is not None}, path)
            return clip(accelerator, *args, **kwargs)

        loop.Accelerator.clip_grad_norm_ = keep
        try:
            loop.run_stage(config, build)
        finally:
            loop.Accelerator.clip_grad_norm_ = clip


def signal_at(rank: str, batch: str, name: str) -> None:
    """Sends a signal to the process with this rank when it has computed so many batches."""
    step, batches = loop.part_of_update, []

    @contextlib.contextmanager
    def counted(*arguments):
        with step(*arguments):
            yield
        batches.append(None)
        if os.environ["RANK"] == rank and len(batches) == int(batch):
            os.kill(os.getpid(), getattr(signal, name))

    loop.part_of_update = counted


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


def jobs(workspace, prepared, processes, name=None):
    """All stages, and stage 1 with the published objectives on data sets of which each has its own annotations."""
    folder, parents = workspace / (name or str(processes)), workspace / "1"
    given = (*SHARED, f"optimization.batch_size={8 // processes}")
    every = []
    for stage in STAGES:
        model = [f"model={json.dumps(MODELS[stage])}"] if stage in MODELS else []
        every.append((stage, stage, arguments(workspace, stage, folder / stage, *given, *model, parents=parents)))
    published = load_config(ROOT / "training" / "configs" / "stage1.yaml").objectives.weights
    weights = {name: getattr(published, name) for name in published.active()}
    for key, parent in PARENTS["stage1"].items():
        given += (f"{key}={parents / parent / 'model'}",)
    given += (
        f"objectives.weights={json.dumps(weights)}",
        "objectives.classes_per_step=3",
        "augmentation.flip=consistent",
    )
    every.append(("stage1", "prepared", on_prepared(workspace, folder / "prepared", prepared, *given)))
    return [
        {"stage": stage, "argv": argv, "gradients": str(folder / f"{name}.safetensors")} for stage, name, argv in every
    ]


NAMES = (*STAGES, "prepared")


@pytest.fixture(scope="module")
def single(workspace, prepared):
    train(jobs(workspace, prepared, 1))
    return workspace / "1"


def launch(workspace, prepared, processes, name=None, overrides=(), names=NAMES, options=(), dies=False):
    """Runs what is named in so many processes; returns the folder of the results, or what a job said that has died."""
    name = name or str(processes)
    chosen = [job for job in jobs(workspace, prepared, processes, name) if Path(job["gradients"]).stem in names]
    for job in chosen:
        job["argv"] += overrides
    path = workspace / f"{name}.json"
    path.write_text(json.dumps(chosen), encoding="utf-8")
    done = subprocess.run(
        [*TORCHRUN, str(processes), __file__, str(path), *options],
        env=surroundings(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == dies, done.stderr
    return done.stderr if dies else workspace / name


@pytest.fixture(scope="module")
def double(workspace, prepared, single):
    return launch(workspace, prepared, 2)


def differences(found, expected, name, gradients=True):
    """Largest relative difference of a loss; those of all gradients of the first update and of all weights in norm."""
    losses = 0.0
    for one, other in zip(read_history(found / name), read_history(expected / name), strict=True):
        assert one.keys() == other.keys()
        values = [key for key in one if key not in ("stage", "split", "step", "seconds")]
        losses = max(losses, *(abs(one[key] - other[key]) / max(abs(other[key]), 1e-3) for key in values))
    pairs = [[folder / name / "model" / "model.safetensors" for folder in (found, expected)]]
    if gradients:
        pairs.append([folder / f"{name}.safetensors" for folder in (found, expected)])
    return losses, *(relative_difference(*map(load_file, paths)) for paths in pairs)


def relative_difference(found, expected):
    assert found.keys() == expected.keys()
    error = torch.stack([(found[name] - tensor).norm() for name, tensor in expected.items()]).norm()
    return (error / torch.stack([tensor.norm() for tensor in expected.values()]).norm()).item()


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_run(single, double, name):
    """Losses of training and validation, gradients and weights; differences are those of rounding."""
    assert max(differences(double, single, name)) < 1e-5


@pytest.mark.slow
def test_four_processes_are_one_run(workspace, prepared, single):
    quadruple = launch(workspace, prepared, 4)
    for name in NAMES:
        assert max(differences(quadruple, single, name)) < 1e-5, name


SAVING = ("tracking.save_every=1", "tracking.validate_every=1", "selection.metric=loss", "selection.keep_best=2")
LAUNCHERS = {"plain": "MULTI_CPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}


@pytest.fixture(scope="module")
def whole_run(workspace, prepared, single):
    """Function: folder of a run of two processes without interruption, made once for each launcher."""

    @functools.cache
    def run(launcher):
        if launcher == "deepspeed":
            pytest.importorskip("deepspeed", exc_type=ImportError)
        return launch(workspace, prepared, 2, launcher, SAVING, ("stage1", "stage3"), [f"--{launcher}"])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fsdp", "deepspeed"])
def test_what_is_spread_over_processes_is_one_run(single, whole_run, launcher):
    """What is saved is whole, the best models too; losses are compared where both have them."""
    spread = whole_run(launcher)
    for name in ("stage1", "stage3"):
        expected = {(e["split"], e["step"]): e["loss"] for e in read_history(single / name)}
        found = {(e["split"], e["step"]): e["loss"] for e in read_history(spread / name)}
        assert found.keys() > expected.keys()
        assert [found[key] for key in expected] == pytest.approx(list(expected.values()), rel=1e-5)
        models = [folder / name / "model" / "model.safetensors" for folder in (spread, single)]
        assert relative_difference(*map(load_file, models)) < 1e-5
        best = json.loads((spread / name / "best" / "best.json").read_text(encoding="utf-8"))
        assert len(best) == 2 and {row["update"] for row in best} <= {1, 2, 3}
        for row in best:
            assert row["loss"] == pytest.approx(found["validation", row["update"]])
            folder = spread / name / "best" / row["folder"]
            model, loading = ChexModel.from_pretrained(folder, output_loading_info=True)
            assert not any(loading.values()), "all tensors are there, and no others"
            ChexProcessor.from_pretrained(folder)
            if row["update"] == 3:
                last = load_file(spread / name / "model" / "model.safetensors")
                assert all(
                    torch.equal(last[key], tensor) for key, tensor in load_file(folder / "model.safetensors").items()
                )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fsdp", "deepspeed"])
def test_mixed_precision_and_clipping_are_those_of_one_process(workspace, prepared, single, launcher):
    overrides = ("mixed_precision=bf16", "optimization.max_grad_norm=0.1")
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", exc_type=ImportError)
        overrides += ("optimization.ema_decay=0.5", "tracking.tasks=[finding_detection]")
    given = [job for job in jobs(workspace, prepared, 1, f"{launcher}-alone") if job["stage"] == "stage1"][:1]
    given[0]["argv"] += overrides
    train(given)
    found = launch(workspace, prepared, 2, f"{launcher}-bf16", overrides, ("stage1",), [f"--{launcher}"])
    losses, weights = differences(found, workspace / f"{launcher}-alone", "stage1", gradients=False)
    assert losses < 1e-3 and weights < 1e-3, "the rounding of bfloat16 depends on the batch"
    saved = load_file(found / "stage1" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    values = [entry["loss"] for entry in read_history(found / "stage1")]
    assert torch.tensor(values).bfloat16().tolist() != values, "losses are not rounded"
    started = json.loads((found / "stage1" / "environment.jsonl").read_text(encoding="utf-8"))
    assert (started["launcher"], started["mixed_precision"]) == (LAUNCHERS[launcher], "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "override", "options", "message"),
    [
        ("fsdp", "tracking.tasks=[finding_detection]", [], "tracking.tasks needs the whole model in each process"),
        ("deepspeed", "tracking.tasks=[]", ["--zero", "3"], "DeepSpeed's ZeRO-3 spreads the weights"),
    ],
)
def test_what_needs_whole_weights_is_refused(workspace, prepared, single, launcher, override, options, message):
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", exc_type=ImportError)
    name = f"{launcher}-refused"
    error = launch(workspace, prepared, 2, name, (override,), ("stage1",), [f"--{launcher}", *options], dies=True)
    assert f"error: {message}" in error
    assert not (workspace / name / "stage1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("fsdp", "SIGKILL"), ("fsdp", "SIGUSR1"), ("plain", "SIGTERM"), ("deepspeed", "SIGKILL")],
)
def test_processes_that_stop_go_on(workspace, prepared, single, whole_run, launcher, number):
    """
    One of two processes is killed, or asked to stop, in the second update; then the job is started again. Weights,
    optimizer, schedule, random numbers and order of images are those of a run without interruption, bit for bit.
    """
    reference, names = whole_run(launcher), ("stage1",)
    name, options = f"{launcher}-{number}", [f"--{launcher}"]
    error = launch(workspace, prepared, 2, name, SAVING, names, [*options, "--send", f"1,3,{number}"], dies=True)
    checkpoints = {path.name for path in (workspace / name / "stage1" / "checkpoints").iterdir()}
    if number == "SIGKILL":
        assert "Signal 9 (SIGKILL) received by PID" in error
        assert checkpoints == {"update-00000001"}
    else:
        assert f"stage1: stopped by {number} at update 2 of 3. The same command goes on from there." in error
        assert "exitcode  : 75" in error
        assert checkpoints == {"update-00000001", "update-00000002"}
    assert not (workspace / name / "stage1" / "model").exists()
    folder = launch(workspace, prepared, 2, name, SAVING, names, options)
    starts = (folder / "stage1" / "environment.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(starts) == 2 and json.loads(starts[1])["launcher"] == LAUNCHERS[launcher]
    compare(folder / "stage1", reference / "stage1")
    assert (folder / "stage1" / "best" / "best.json").read_bytes() == (
        reference / "stage1" / "best" / "best.json"
    ).read_bytes()


@pytest.mark.slow
def test_accelerate_launches_two_processes_on_cpus(workspace, prepared, single):
    (job,) = [job for job in jobs(workspace, prepared, 2, "launched") if job["stage"] == "stage2"]
    config = ROOT / "training" / "configs" / "accelerate" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        command + script("stage2", *job["argv"], "--overwrite")[1:],
        env=surroundings(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    started = json.loads((workspace / "launched" / "stage2" / "environment.jsonl").read_text(encoding="utf-8"))
    assert started["processes"] == 2
    assert max(differences(workspace / "launched", single, "stage2", gradients=False)) < 1e-5


# --- parts of it


def test_the_run_decides_what_deepspeed_does():
    given = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "fp16": {"enabled": "auto"}}
    given |= {"bf16": {"enabled": True}, "gradient_accumulation_steps": 4, "gradient_clipping": 5.0}
    for precision, limit in (("bf16", 0.1), ("no", None)):
        config = json.loads(json.dumps(given))
        set_up_deepspeed(config, precision, limit)
        assert config["torch_autocast"]["enabled"] is (precision == "bf16")
        assert config["bf16"] == config["fp16"] == {"enabled": False}, "weights stay float32"
        assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (1, limit or 0.0)
        assert config["zero_optimization"] == {"stage": 2} and config["train_batch_size"] == "auto"
    for stage, precision, message in ((3, "no", "ZeRO-3 spreads the weights"), (2, "fp16", "fp16 is not supported")):
        config = given | {"zero_optimization": {"stage": stage}}
        before = dict(config)
        with pytest.raises(ValueError, match=message):
            set_up_deepspeed(config, precision, 1.0)
        assert config == before


def test_shares_of_batches():
    for count, size, processes in ((9, 4, 2), (17, 2, 4), (1, 3, 4), (0, 3, 2), (24, 8, 1)):
        shares = [share_of_batches(count, size, process, processes) for process in range(processes)]
        assert len({len(own) for own in shares}) == 1, "processes go through the same batches"
        dealt = [item for batch in zip(*shares, strict=True) for own in batch for item in own]
        assert dealt == list(range(count))
        for batch in zip(*shares, strict=True):
            sizes = [len(own) for own in batch]
            assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_draws_belong_to_images():
    index = torch.tensor([4, 7, 2])
    draws = image_draws(index, (5, 3), 11, 1)
    assert torch.equal(image_draws(index.flip(0), (5, 3), 11, 1).flip(0), draws)
    assert torch.equal(image_draws(index, (9, 3), 11, 1)[:, :5], draws), "padding changes nothing"
    for other in (
        image_draws(index, (5, 3), 12, 1),
        image_draws(index, (5, 3), 11, 2),
        image_draws(index + 9, (5, 3), 11, 1),
    ):
        assert (other != draws).all()
    many = image_draws(torch.arange(2000), (10,), 3)
    assert many.min() >= 0 and many.max() < 1
    assert many.mean(0).sub(0.5).abs().max() < 0.03
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.1


def test_sentences_for_the_generator_are_drawn_from_all_processes():
    """The union over two processes is what one process draws, and every candidate is as likely as any other."""
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:4] &= torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.3  # one process has few
    index, limit, chosen = torch.arange(8), 7, torch.zeros(8, 6)
    for seed in range(1500):
        draws = image_draws(index, (6,), seed)
        whole = choose_for_generation(mask, limit, draws=draws)
        everyone = (1 - draws).masked_fill(~mask, 0).flatten()
        together = Collectives(gather_all=lambda own, everyone=everyone: [everyone])
        parts = [
            choose_for_generation(mask[own], limit, draws=draws[own], collectives=together)
            for own in (slice(0, 4), slice(4, 8))
        ]
        rows = torch.cat([parts[0][0], parts[1][0] + 4])
        assert torch.equal(rows, whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
        assert len(rows) == limit
        chosen[whole] += 1
    assert not chosen[~mask].any()
    assert torch.allclose(chosen[mask] / 1500, torch.full((int(mask.sum()),), limit / mask.sum()), atol=0.06)
    few = choose_for_generation(mask, 100, draws=image_draws(index, (6,), 0))
    assert torch.equal(torch.stack(few, 1), mask.nonzero())


def test_parts_of_a_step_have_one_average():
    """Parts with one, with three and without any value: their sum is the mean over all four values."""
    values, mask = (
        torch.tensor([[1.0, 9.0, 9.0], [2.0, 3.0, 6.0], [9.0, 9.0, 9.0]]),
        torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool(),
    )
    totals = StepTotals()

    def part(row):
        collectives = process_collectives(totals)
        mean = masked_mean(values[row], mask[row], collectives.of("one"))
        if row == 1:  # a term that the other parts do not have
            return mean, masked_mean(values[row], mask[row], collectives.of("another"))
        return mean, 0.0

    for row in range(3):
        part(row)
    totals.finish(process_collectives())
    results = [part(row) for row in range(3)]
    assert sum(mean for mean, _ in results) == pytest.approx(12 / 4)
    assert sum(other for _, other in results) == pytest.approx(11 / 3)


def test_waiting_time_for_other_processes(monkeypatch):
    monkeypatch.setenv("CHEX_PROCESS_TIMEOUT_MINUTES", "2.5")
    assert process_group_options().timeout.total_seconds() == 150
    for text in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("CHEX_PROCESS_TIMEOUT_MINUTES", text)
        with pytest.raises(ValueError, match=f"CHEX_PROCESS_TIMEOUT_MINUTES must be .* greater than 0, not '{text}'"):
            process_group_options()


# --- processes that are missing


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_is_noticed(tmp_path):
    code = "from training.distributed import warn_of_missing_processes as warn; warn(1)"
    (tmp_path / "say.py").write_text(code, encoding="utf-8")
    for number, warned in ((2, True), (1, False)):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(number)]
        done = subprocess.run(
            [*command, str(tmp_path / "say.py")], env=surroundings(), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert ("asked for several processes but has started one" in done.stderr) == warned


def long_run(workspace, prepared, name):
    (job,) = [job for job in jobs(workspace, prepared, 2, name) if job["gradients"].endswith("stage2.safetensors")]
    return script("stage2", *job["argv"], "optimization.max_steps=100000")[1:], workspace / name / "stage2"


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_ends_the_job(workspace, prepared, single):
    """Under torchrun: the other worker is stopped, and the launcher says which one died of what."""
    command, folder = long_run(workspace, prepared, "killed")
    job = subprocess.Popen([*TORCHRUN, "2", *command], env=surroundings(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for((folder / "history.jsonl").exists)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
        workers = [int(pid) for pid in children.read_text(encoding="utf-8").split()]
        ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in workers}
        victim = next(pid for pid, variables in ranks.items() if b"RANK=1" in variables)
        os.kill(victim, signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in errors
    for pid in workers:
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 10)


@pytest.mark.slow
def test_without_a_launcher_the_others_say_what_happened(workspace, prepared, single):
    """Started one by one, as cluster schedulers do: nobody stops the survivor, which ends by itself."""
    command, folder = long_run(workspace, prepared, "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, *command],
            env=surroundings() | meeting | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        wait_for((folder / "history.jsonl").exists)
        workers[1].kill()
        _, errors = workers[0].communicate(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[0].returncode == 1
    assert "Traceback" not in errors
    assert "stage2.py: error: Process 0 of 2 has lost another one" in errors
    assert "goes on from the last checkpoint" in errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--fsdp" in sys.argv:
        loop.Accelerator = ShardingAccelerator
    if "--deepspeed" in sys.argv:
        use_deepspeed_on_cpus(sys.argv[sys.argv.index("--zero") + 1] if "--zero" in sys.argv else "2")
    if "--send" in sys.argv:
        signal_at(*sys.argv[sys.argv.index("--send") + 1].split(","))
    loop.run_as_script(lambda: train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
