"""Runs that are killed at any instant, and checkpoints that are damaged: the history becomes that of one run."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import training.loop as loop
from tests.test_loop import Regression, configuration, regression
from tests.test_training import (
    ROOT,
    Interrupted,
    arguments,
    compare,
    environment,
    interrupt,
    read_history,
    run,
    script,
    weights,
    without_time,
)
from training.checkpoints import MANIFEST, Checkpoints, find_damage
from training.configuration import SelectionConfig
from training.loop import run_stage
from training.preemption import EXIT_CODE, SIGNALS, Preempted, StopRequest


STAGE = "stage1"
# two epochs of three updates of two accumulated batches; everything that has a state of its own is on
OPTIONS = (
    *("optimization.batch_size=4", "optimization.gradient_accumulation_steps=2", "optimization.max_steps=8"),
    *("optimization.ema_decay=0.9", "tracking.log_every=3", "tracking.validate_every=2", "tracking.save_every=1"),
    *("selection.metric=loss", "selection.keep_best=2"),
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The earlier stage, and a run without interruption in `reference`."""
    folder = tmp_path_factory.mktemp("resume")
    run(folder, "pretrain_clip", folder / "runs" / "pretrain_clip")
    run(folder, STAGE, folder / "reference", *OPTIONS)
    return folder


# --- kills of real processes


def train(argv, threads):
    """What a second process does; forked from a server that has imported the library already."""
    import importlib

    torch.set_num_threads(threads)  # sums depend on their order
    importlib.import_module(f"training.{STAGE}").main(argv)


@pytest.fixture(scope="module")
def processes(workspace):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.stage1", "tests.test_resume"])
    first = context.Process(target=int)  # starts the server
    first.start()
    first.join()
    return context


def compare_all(folder, reference):
    compare(folder, reference)
    assert (folder / "best" / "best.json").read_bytes() == (reference / "best" / "best.json").read_bytes()
    names = sorted(path.name for path in (reference / "best").iterdir())
    assert sorted(path.name for path in (folder / "best").iterdir()) == names
    for name in names[1:]:
        expected, found = weights(reference / "best" / name), weights(folder / "best" / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not (folder / "checkpoints").exists()


def partial_checkpoints(folder):
    try:
        return {path.name for path in (folder / "checkpoints").glob("*.partial")}
    except FileNotFoundError:  # the run ended meanwhile and removed its checkpoints
        return set()


def kill_and_finish(processes, workspace, folder, while_writing, otherwise, seed):
    """
    Starts a run again and again and kills it, so often while it writes a checkpoint and so often at a random instant.
    A run that finishes is compared with the reference and followed by a new one.
    """
    rng, runs, left = random.Random(seed), 0, {True: while_writing, False: otherwise}
    began = time.monotonic()
    process = start(processes, workspace, folder / "timed")
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began
    compare_all(folder / "timed", workspace / "reference")
    while any(left.values()):
        output = folder / str(runs)
        new, began = not output.exists(), time.monotonic()
        aims_at_writing = rng.choice([kind for kind, count in left.items() if count])
        allowed, deadline, seen = rng.randrange(4), time.monotonic() + rng.uniform(0, duration), set()
        process = start(processes, workspace, output)
        while process.is_alive() and (aims_at_writing or time.monotonic() < deadline):
            partial = partial_checkpoints(output)
            seen |= partial
            if aims_at_writing and partial and len(seen) > allowed:
                time.sleep(rng.uniform(0, 0.005))
                break
            time.sleep(0.0005)
        process.kill()
        process.join()
        if process.exitcode == 0:
            if new:  # the machine may be faster by now, so that hardly any instant would lie within a run
                duration = time.monotonic() - began
            compare_all(output, workspace / "reference")
            runs += 1
            continue
        assert process.exitcode == -9
        writing = any((output / "checkpoints").glob("*.partial"))
        if writing or not aims_at_writing:
            left[aims_at_writing] -= 1
        whole = sorted((output / "checkpoints").glob("update-????????"))
        # older ones, and with the model all of them, may be half deleted
        assert not whole or (output / "model").exists() or find_damage(whole[-1]) is None
    process = start(processes, workspace, folder / str(runs))
    process.join()
    assert process.exitcode == 0
    compare_all(folder / str(runs), workspace / "reference")


def start(processes, workspace, output):
    argv = arguments(workspace, STAGE, output, *OPTIONS)
    process = processes.Process(target=train, args=(argv, torch.get_num_threads()))
    process.start()
    return process


def test_killed_at_random_instants(processes, workspace, tmp_path):
    kill_and_finish(processes, workspace, tmp_path, while_writing=2, otherwise=2, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_random_instants(processes, workspace, tmp_path):
    kill_and_finish(processes, workspace, tmp_path, while_writing=6, otherwise=14, seed=2)


# --- damaged checkpoints


@pytest.fixture(scope="module")
def interrupted(workspace):
    """A run that ended behind its fourth update, with two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted):
            run(workspace, STAGE, workspace / "interrupted", *OPTIONS)
    return workspace / "interrupted"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut, r"model.safetensors has \d+ bytes instead of \d+"),
        ("model.safetensors", change, "model.safetensors has other contents than were written"),
        ("optimizer.bin", cut, r"optimizer.bin has \d+ bytes instead of \d+"),
        ("custom_checkpoint_0.pkl", change, "custom_checkpoint_0.pkl has other contents"),
        ("random_states_0.pkl", Path.unlink, "random_states_0.pkl is missing"),
        (MANIFEST, cut, "its manifest.json is damaged"),
        (MANIFEST, Path.unlink, "it has no manifest.json"),
    ],
)
def test_damage_is_found(interrupted, tmp_path, name, damage, message):
    folder = shutil.copytree(interrupted / "checkpoints" / "update-00000004", tmp_path / "checkpoint")
    assert find_damage(folder) is None
    damage(folder / name)
    assert re.search(message, find_damage(folder))


def test_the_checkpoint_before_a_damaged_one_is_used(interrupted, workspace, tmp_path, caplog):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    cut(folder / "checkpoints" / "update-00000004" / "model.safetensors")
    run(workspace, STAGE, folder, *OPTIONS)
    assert "update-00000004 cannot be used: model.safetensors has" in caplog.text
    assert "Trying update-00000003" in caplog.text
    assert "resuming at update 3 of 8" in caplog.text
    compare_all(folder, workspace / "reference")
    starts = [json.loads(line) for line in (folder / "environment.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(starts) == 2, "each start is recorded"
    for entry in starts:
        assert entry["packages"]["torch"] == torch.__version__
        assert (entry["processes"], entry["device"]) == (1, "cpu")


def test_without_an_intact_checkpoint_the_run_starts_again(interrupted, workspace, tmp_path, caplog):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    for checkpoint in (folder / "checkpoints").iterdir():
        change(checkpoint / "optimizer.bin")
    run(workspace, STAGE, folder, *OPTIONS)
    assert caplog.text.count("cannot be used: optimizer.bin has other contents") == 2
    assert "There is no other: starting again" in caplog.text
    assert "resuming" not in caplog.text
    compare_all(folder, workspace / "reference")


def test_more_checkpoints_are_kept_on_request(workspace, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted):
            run(workspace, STAGE, tmp_path, *OPTIONS, "tracking.keep_checkpoints=3")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["update-00000002", "update-00000003", "update-00000004"]


def test_a_model_that_a_checkpoint_has_chosen_is_there(interrupted, workspace, tmp_path, monkeypatch):
    """Better ones may have come after that checkpoint, before the kill."""
    manifests = [json.loads(path.read_text()) for path in sorted(interrupted.glob("checkpoints/*/manifest.json"))]
    assert [manifest["update"] for manifest in manifests] == [3, 4]
    needed = {update for manifest in manifests for update in manifest["models"]}
    assert needed and manifests[0]["models"] == [2]
    there = {path.name for path in (interrupted / "best").glob("update-*")}
    assert there == {f"update-{update:08d}" for update in needed}


# --- the end of a run, full disks, other processes, with a small regression in place of ChEX


def train_regression(folder, **options):
    run_stage(configuration(folder, **{"tracking": {"save_every": 2}} | options), regression(Regression(22), 22))


def entries(folder):
    return without_time(read_history(folder / "run"))


def test_kills_at_the_end(tmp_path, monkeypatch, caplog):
    """Checkpoints go when the model is there, not before: no instant costs the whole run."""
    train_regression(tmp_path / "reference")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for(Path.rename, "model.partial", Interrupted))
        with pytest.raises(Interrupted):
            train_regression(tmp_path / "written")
    left = {path.name for path in (tmp_path / "written" / "run").iterdir()}
    assert {"model.partial", "checkpoints"} < left and "model" not in left
    train_regression(tmp_path / "written")
    assert "resuming at update 4 of 6" in caplog.text
    assert entries(tmp_path / "written") == entries(tmp_path / "reference")

    with monkeypatch.context() as patch:
        patch.setattr(loop.shutil, "rmtree", fail_for(shutil.rmtree, "checkpoints", Interrupted))
        with pytest.raises(Interrupted):
            train_regression(tmp_path / "named")
    folder = tmp_path / "named" / "run"
    assert (folder / "model" / "config.json").is_file() and (folder / "checkpoints").is_dir()
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trained again"))
    train_regression(tmp_path / "named")
    assert not (folder / "checkpoints").exists() and not (folder / "model.partial").exists()


def fail_for(function, name, error):
    """The function, which raises an error for paths of this name."""

    def called(path, *args, **kwargs):
        if Path(path).name == name and Path(path).exists():
            raise error
        return function(path, *args, **kwargs)

    return called


def full_disk(error):
    def write(path):
        Path(path).mkdir(parents=True)
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise error

    return write


FULL_DISK = (
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # what torch.save says
)


@pytest.mark.parametrize("error", FULL_DISK, ids=["OSError", "safetensors", "torch.save"])
@pytest.mark.parametrize("what", ["checkpoint", "best model", "model"])
def test_a_full_disk_is_named_and_costs_no_more_than_the_last_updates(tmp_path, monkeypatch, error, what):
    options = {"selection": SelectionConfig("loss")} if what == "best model" else {}
    options["tracking"] = {"save_every": 2, "validate_every": 3}
    train_regression(tmp_path / "reference", **options)
    before, write, saved = loop.Accelerator.save_state, full_disk(error), []

    def save_state(self, folder):
        saved.append(folder)
        return write(folder) if len(saved) == 2 else before(self, folder)

    with monkeypatch.context() as patch:
        if what == "checkpoint":
            patch.setattr(loop.Accelerator, "save_state", save_state)
        else:
            patch.setattr(Regression, "writer", staticmethod(write), raising=False)
        with pytest.raises(
            OSError, match=r"cannot be written to .*, where [\d,]+ MiB are free .*goes on from the last"
        ):
            train_regression(tmp_path, **options)
    assert not list((tmp_path / "run").rglob("*.partial")), "the space is free again"
    kept = {"checkpoint": [2], "best model": [2], "model": [2, 4]}[what]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"update-{update:08d}" for update in kept]
    train_regression(tmp_path, **options)
    assert entries(tmp_path) == entries(tmp_path / "reference")


def test_other_errors_while_writing_stay_what_they_are(tmp_path, monkeypatch):
    write = full_disk(RuntimeError("Connection closed by peer"))
    monkeypatch.setattr(loop.Accelerator, "save_state", lambda self, folder: write(folder))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        train_regression(tmp_path)


@pytest.fixture
def stopped(tmp_path):
    """A run with the checkpoints of the updates 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted):
            train_regression(tmp_path)
    return tmp_path


def test_a_checkpoint_of_other_processes_is_refused(stopped):
    """Their batches, which the place in the epoch counts, would be others."""
    path = stopped / "run" / "checkpoints" / "update-00000004" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["processes"] == 1
    path.write_text(json.dumps(manifest | {"processes": 4}), encoding="utf-8")
    with pytest.raises(ValueError, match="was written by a run of 4 processes, and this one has 1: .* --overwrite"):
        train_regression(stopped)
    del manifest["processes"]  # of an earlier version
    path.write_text(json.dumps(manifest), encoding="utf-8")
    train_regression(stopped)


def test_what_a_kill_left_half_written_is_deleted(stopped):
    folder = stopped / "run" / "checkpoints"
    (folder / "update-00000005.partial").mkdir()
    (folder / "update-00000005.partial" / "optimizer.bin").write_bytes(b"half")
    newest = Checkpoints(loop.Accelerator(cpu=True), folder).newest()
    assert newest == folder / "update-00000004"
    assert sorted(path.name for path in folder.iterdir()) == ["update-00000002", "update-00000004"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"models": 3}'])
def test_an_older_checkpoint_may_be_damaged(stopped, content):
    """It is not used, so it needs no models; nor does it end the run."""
    path = stopped / "run" / "checkpoints" / "update-00000002" / MANIFEST
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    checkpoints = Checkpoints(loop.Accelerator(cpu=True), stopped / "run" / "checkpoints")
    checkpoints.save(5, models=[3, 5])
    assert checkpoints.needed_models() == {3, 5}
    checkpoints.kept = 3
    assert checkpoints.needed_models() == {3, 5}


# --- signals that ask a run to stop


def ask_to_stop(patch, batch, number):
    """Sends a signal to this process while it computes the batch with this number."""
    backward, batches = loop.Accelerator.backward, []

    def signalled(self, *args, **options):
        batches.append(None)
        if len(batches) == batch:
            os.kill(os.getpid(), number)
        return backward(self, *args, **options)

    patch.setattr(loop.Accelerator, "backward", signalled)


@pytest.mark.parametrize(("number", "batch", "update"), [("SIGTERM", 1, 1), ("SIGUSR1", 7, 4), ("SIGTERM", 10, 5)])
def test_a_signal_saves_and_the_run_goes_on(workspace, tmp_path, caplog, number, batch, update):
    """Also between two lines of the history, which then has the mean over both parts, and in a second epoch."""
    handlers = [signal.getsignal(each) for each in SIGNALS]
    options = (*OPTIONS, "tracking.save_every=0")
    reference = workspace / "unsaved"
    run(workspace, STAGE, reference, *options)
    steps = {entry["step"] for entry in read_history(reference) if entry["split"] == "train"}
    assert steps == {2, 3, 4, 6, 8}
    with pytest.MonkeyPatch.context() as patch:
        ask_to_stop(patch, batch, getattr(signal, number))
        with pytest.raises(Preempted) as stopped:
            run(workspace, STAGE, tmp_path, *options)
    assert stopped.value.code == EXIT_CODE
    assert f"stage1: stopped by {number} at update {update} of 8. The same command goes on from there." in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"update-{update:08d}"]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    run(workspace, STAGE, tmp_path, *options)
    assert f"resuming at update {update} of 8" in caplog.text
    compare_all(tmp_path, reference)


def test_a_signal_during_the_last_update_lets_the_run_finish(workspace, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        ask_to_stop(patch, 16, signal.SIGTERM)
        run(workspace, STAGE, tmp_path, *OPTIONS)
    compare_all(tmp_path, workspace / "reference")


def test_signals_are_noted_by_the_process_that_asked_for_it():
    accelerator = loop.Accelerator(cpu=True)
    with StopRequest(accelerator) as request:
        assert request.agreed() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed() == "SIGUSR1", "the first one"
        if (child := os.fork()) == 0:  # a worker of a data loader inherits the handler
            request.received = 0
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(request.received)
        assert os.waitpid(child, 0)[1] == 0


def test_a_stopped_script_has_an_exit_code_of_its_own(workspace, tmp_path):
    command = script(STAGE, *arguments(workspace, STAGE, tmp_path, *OPTIONS, "optimization.max_steps=100000"))
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "history.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_CODE
    assert "stopped by SIGTERM at update" in errors and "Traceback" not in errors
    (newest, *_) = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    assert find_damage(newest) is None
    update = int(newest.name.removeprefix("update-"))
    assert f"at update {update} of 100000. The same command goes on from there." in errors
