"""The training scripts and their loop, on a tiny phantom: stages, reuse, resume, errors, launchers."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import training.loop as loop
from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexProcessor
from training.configuration import CONFIG_DIR, OptimizationConfig, load_config
from training.data.phantom import render_phantom
from training.data.preparation import prepare
from training.loop import learning_rate_factor, run_as_script
from training.model_setup import set_trainable
from training.objectives import SINGLE_PROCESS
from training.stage_data import load_data


ROOT = Path(__file__).parent.parent
STAGES = ("pretrain_clip", "stage1", "stage2", "pretrain_generator", "stage3")
PARENTS = {
    "stage1": {"init_from": "pretrain_clip"},
    "stage2": {"init_from": "stage1"},
    "pretrain_generator": {"init_from": "pretrain_clip"},
    "stage3": {"init_from": "stage2", "generator_from": "pretrain_generator"},
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "drop_path": 0.1,
}
TINY_MODEL = {
    "projection_dim": 32,
    "vision_config": ENCODER | {"image_size": 64, "patch_size": 16, "projection_dim": 32},
    "text_config": ENCODER | {"max_position_embeddings": 77, "projection_dim": 32},
    "detector_config": DECODER | {"num_layers": 2, "roi_skip_dropout": 0.3},
}
TINY_MODELS = {
    "pretrain_clip": TINY_MODEL,
    "stage2": {"post_decoder_config": DECODER | {"num_layers": 1, "region_drop": 0.3}},
    "pretrain_generator": {"n_embd": 32, "n_layer": 2, "n_head": 2, "prefix_hidden_size": 32, "n_positions": 128},
}


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def arguments(workspace, stage, output_dir, *overrides, parents=None):
    """Command line of a tiny run; `parents` is the folder of the earlier stages."""
    given = {
        "output_dir": str(output_dir),
        "data": {"cache_dir": str(workspace / "data"), "seed": 3, "image_size": 64, "num_proc": 1}
        | {"num_train": 24, "num_validation": 8, "num_test": 8},
        "optimization": {"batch_size": 8, "max_steps": 3, "warmup_steps": 2, "learning_rate": 1e-3},
        "tracking": {"log_every": 2, "validate_every": 0},
    }
    if stage in TINY_MODELS:
        given["model"] = TINY_MODELS[stage]
    for key, parent in PARENTS.get(stage, {}).items():
        given[key] = str((parents or workspace / "runs") / parent / "model")

    def dotted(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict) and prefix + key != "model":
                yield from dotted(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={json.dumps(value)}"

    return ["--config", str(CONFIG_DIR / "phantom" / f"{stage}.yaml"), *dotted(given), *overrides]


def run(workspace, stage, output_dir, *overrides, parents=None):
    main = importlib.import_module(f"training.{stage}").main
    return main(arguments(workspace, stage, output_dir, *overrides, parents=parents))


@pytest.fixture(scope="module")
def runs(workspace):
    """All five stages, one after the other in this process, as the demo runs them."""
    return {stage: run(workspace, stage, workspace / "runs" / stage) for stage in STAGES}


def read_history(output_dir):
    lines = (Path(output_dir) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_time(entries):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def part(name):
    return name.split(".")[0]


# --- schedule and trainable parts


def test_learning_rate_factor():
    options = OptimizationConfig(learning_rate=1e-2, min_learning_rate=1e-4, warmup_steps=10)
    factors = [learning_rate_factor(update, 100, options) for update in range(101)]
    assert factors[:10] == pytest.approx([0.1 * update for update in range(1, 11)])
    assert factors[50] == pytest.approx((1 + 0.01) / 2)
    assert factors[10] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 10)) / 2)
    assert factors[100] == learning_rate_factor(500, 100, options) == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in zip(factors[10:], factors[11:], strict=False))
    assert learning_rate_factor(0, 100, OptimizationConfig(warmup_steps=0)) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def deep_model():
    """All parts, with as many blocks in the image encoder as the published model has."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    decoder = {"num_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ChexModel(
        ChexConfig(
            projection_dim=8,
            vision_config=vision | {"image_size": 32, "patch_size": 16, "projection_dim": 8},
            text_config=text | {"projection_dim": 8, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63},
            detector_config=decoder,
            post_decoder_config=decoder,
            generator_config={"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
            | {"prefix_hidden_size": 8, "bos_token_id": 63, "eos_token_id": 63},
        )
    )


def is_trained(name, stage):
    """The table of trained parameters, written out."""
    first = part(name)
    if stage == "stage1":
        layers = [f"vision_model.encoder.layers.{index}." for index in (8, 9, 10, 11)]
        return first == "detector" or name.startswith(tuple(layers))
    if stage == "stage2":
        return first == "post_decoder"
    return first in ("post_decoder", "sentence_generator")


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_published_trainable_parts(deep_model, stage):
    config = load_config(CONFIG_DIR / f"{stage}.yaml")
    set_trainable(deep_model, config.trainable, config.frozen_vision_layers)
    trained = {name for name, parameter in deep_model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in deep_model.named_parameters() if is_trained(name, stage)}
    assert trained


def test_trainable_parts_depend_on_the_configuration_alone(deep_model):
    set_trainable(deep_model, ["detector"])
    set_trainable(deep_model, ["vision_model", "visual_projection"])
    trained = {part(name) for name, parameter in deep_model.named_parameters() if parameter.requires_grad}
    assert trained == {"vision_model", "visual_projection"}
    assert all(parameter.requires_grad for parameter in deep_model.vision_model.parameters())
    set_trainable(deep_model, ["vision_model", "visual_projection"], frozen_vision_layers=1)
    frozen = {name for name, parameter in deep_model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[1] for name in frozen if part(name) == "vision_model"} == {
        "embeddings",
        "pre_layrnorm",
        "post_layernorm",
    }
    assert "visual_projection.weight" in frozen


def test_an_unknown_part_is_named(deep_model):
    with pytest.raises(ValueError, match="`trainable` names 'decoder', which is not a part of this model: .*detector"):
        set_trainable(deep_model, ["decoder"])


# --- all stages


def test_all_stages_leave_a_model(runs, workspace):
    for stage, folder in runs.items():
        assert folder == workspace / "runs" / stage / "model"
        assert (folder / "model.safetensors").is_file()
        left = {path.name for path in folder.parent.iterdir()}
        assert left == {"config.yaml", "environment.jsonl", "history.jsonl", "model"}


def test_the_last_model_answers_and_writes(runs, workspace):
    model, processor = ChexModel.from_pretrained(runs["stage3"]), ChexProcessor.from_pretrained(runs["stage3"])
    model.eval()
    config = load_config(CONFIG_DIR / "phantom" / "stage3.yaml", arguments(workspace, "stage3", workspace)[2:])
    image = load_data(config.data)[0]["test"][0]["image"]
    inputs = processor(images=image, text=[["Pleural effusion", "right lung"]], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
        ids = model.generate(**inputs, max_length=12)
    assert output.boxes.shape == (1, 2, 4)
    assert output.boxes.isfinite().all()
    assert ids.shape[:2] == (1, 2)
    texts = processor.generator_tokenizer.batch_decode(ids[0], skip_special_tokens=True)
    assert all(isinstance(text, str) for text in texts)


def test_histories(runs):
    expected = {
        "pretrain_clip": {"global_contrastive", "region_contrastive"},
        "pretrain_generator": {"generation"},
    } | {
        stage: load_config(runs[stage].parent / "config.yaml").objectives.weights.active()
        for stage in ("stage1", "stage2", "stage3")
    }
    for stage, folder in runs.items():
        entries = read_history(folder.parent)
        assert [(entry["split"], entry["step"]) for entry in entries] == [
            ("train", 2),
            ("train", 3),
            ("validation", 3),
        ]
        for entry in entries:
            assert entry["stage"] == stage
            assert expected[stage] <= set(entry)
            assert all(math.isfinite(value) for key, value in entry.items() if key not in ("stage", "split"))
            assert entry["seconds"] > 0
        assert entries[0]["lr"] == pytest.approx(1e-3)  # the second update ends the warm-up


@pytest.mark.parametrize(
    ("stage", "parent", "trained"),
    [
        ("stage1", "pretrain_clip", {"vision_model", "visual_projection", "detector"}),
        ("stage2", "stage1", {"post_decoder"}),
        ("stage3", "stage2", {"post_decoder", "sentence_generator"}),
    ],
)
def test_frozen_tensors_stay_bit_identical(runs, stage, parent, trained):
    before, after = weights(runs[parent]), weights(runs[stage])
    assert {name for name in before if part(name) not in trained} == {
        name for name in after if part(name) not in trained
    }
    for name, tensor in after.items():
        if part(name) not in trained:
            assert torch.equal(tensor, before[name]), name
    changed = {part(name) for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert changed == trained


def test_the_generator_comes_from_its_pretraining(runs):
    """Stage 3 goes on from the pre-trained generator: a few small steps away from it, not from a new one."""
    before, after = weights(runs["pretrain_generator"]), weights(runs["stage3"])
    prefix = "sentence_generator."
    assert {name.removeprefix(prefix) for name in after if name.startswith(prefix)} == set(before)
    assert max((after[prefix + name] - tensor).abs().max() for name, tensor in before.items()) < 0.01


def test_region_drop_of_each_stage(runs):
    drops = {stage: ChexModel.config_class.from_pretrained(runs[stage]).post_decoder_config for stage in PARENTS}
    assert drops["stage1"] is None
    assert (drops["stage2"].region_drop, drops["stage3"].region_drop) == (0.3, 0.1)


def test_frozen_layers_of_the_image_encoder(runs, workspace, tmp_path):
    run(workspace, "stage1", tmp_path / "run", "frozen_vision_layers=2", "optimization.weight_decay=0.1")
    before, after = weights(runs["pretrain_clip"]), weights(tmp_path / "run" / "model")
    changed = {name for name in before if part(name).startswith("vis") and not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("vision_model.encoder.layers.1.") for name in changed)


# --- reuse


def test_a_finished_run_is_reused(runs, workspace, monkeypatch, caplog):
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trained again"))
    folder = run(workspace, "stage1", workspace / "runs" / "stage1")
    assert folder == runs["stage1"]
    assert "reusing the finished run" in caplog.text


@pytest.fixture
def finished(runs, workspace, tmp_path):
    """A copy of the finished stage 2 with its parent, free to be changed."""
    shutil.copytree(workspace / "runs" / "stage1", tmp_path / "stage1")
    run(workspace, "stage2", tmp_path / "stage2", parents=tmp_path)
    return tmp_path


def trains(monkeypatch):
    """Counts trainings."""
    calls, train = [], loop._train

    def counted(*args):
        calls.append(args)
        train(*args)

    monkeypatch.setattr(loop, "_train", counted)
    return calls


def test_what_makes_a_finished_run_start_again(finished, workspace, monkeypatch):
    calls = trains(monkeypatch)

    def again(*overrides):
        run(workspace, "stage2", finished / "stage2", *overrides, parents=finished)
        count = len(calls)
        calls.clear()
        return count

    assert again() == 0
    assert again("seed=1") == 1, "another configuration"
    assert again("seed=1") == 0
    assert again("seed=1", "--overwrite") == 1
    assert len(read_history(finished / "stage2")) == 3, "nothing is left of the earlier runs"
    os.utime(finished / "stage1" / "model" / "model.safetensors")
    assert again("seed=1") == 1, "another model to start from"
    assert again("seed=1") == 0


def test_a_mistake_does_not_delete_the_finished_run(finished, workspace):
    before = weights(finished / "stage2" / "model")
    for override in ("init_from=nowhere", "optimization.batch_size=1000", "trainable=[nothing]"):
        with pytest.raises(ValueError):
            run(workspace, "stage2", finished / "stage2", override, parents=finished)
    after = weights(finished / "stage2" / "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_other_files_are_never_deleted(runs, workspace, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a model that no run has written"):
        run(workspace, "stage2", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("keep", encoding="utf-8")
    for seed in (1, 2):
        run(workspace, "stage2", tmp_path / "run", f"seed={seed}", "optimization.max_steps=1")
    assert (tmp_path / "model" / "mine.txt").is_file()
    assert (tmp_path / "run" / "notes.txt").is_file()


# --- resume

# six batches an epoch in two accumulated parts: three updates
RESUMED = (
    "optimization.batch_size=4",
    "optimization.gradient_accumulation_steps=2",
    "optimization.max_steps=7",
    "tracking.log_every=2",
    "tracking.validate_every=3",
    "tracking.save_every=1",
)
RESUMED_STAGES = ("stage1", "pretrain_generator")


@pytest.fixture(scope="module")
def uninterrupted(runs, workspace):
    folders = {stage: workspace / "uninterrupted" / stage for stage in RESUMED_STAGES}
    for stage, folder in folders.items():
        run(workspace, stage, folder, *RESUMED)
    return folders


def interrupt(monkeypatch, update):
    """Ends the run behind the checkpoint of an update, one batch into the next."""
    backward = loop.Accelerator.backward
    save = loop.Checkpoints.save
    saved = []

    def save_once(self, update, models=()):
        save(self, update, models)
        saved.append(update)

    def stop_later(self, *arguments, **options):
        if saved and saved[-1] >= update:
            self.batches_left = getattr(self, "batches_left", 1) - 1
            if self.batches_left < 0:
                raise Interrupted
        return backward(self, *arguments, **options)

    monkeypatch.setattr(loop.Checkpoints, "save", save_once)
    monkeypatch.setattr(loop.Accelerator, "backward", stop_later)


def compare(resumed, reference):
    assert without_time(read_history(resumed)) == without_time(read_history(reference))
    seconds = [entry["seconds"] for entry in read_history(resumed)]
    assert seconds == sorted(seconds)
    expected = weights(reference / "model")
    found = weights(resumed / "model")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("stage", "update"), [("stage1", 2), ("stage1", 3), ("stage1", 5), ("pretrain_generator", 4)])
def test_resumed_equals_uninterrupted(uninterrupted, workspace, tmp_path, monkeypatch, caplog, stage, update):
    """Inside an epoch, at its end, in the second one; with dropout, accumulation and validation."""
    with monkeypatch.context() as patch:
        interrupt(patch, update)
        with pytest.raises(Interrupted):
            run(workspace, stage, tmp_path, *RESUMED)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"update-{update - 1:08d}", f"update-{update:08d}"]
    # what a kill in the middle of writing leaves behind
    (tmp_path / "checkpoints" / "update-00000009.partial").mkdir()
    (tmp_path / "checkpoints" / "update-00000009.partial" / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "split": "train", "step": update + 1, "loss": 0.0}) + '\n{"stage": "st')
    run(workspace, stage, tmp_path, *RESUMED)
    assert f"resuming at update {update} of 7" in caplog.text
    compare(tmp_path, uninterrupted[stage])


def test_interrupted_before_the_first_checkpoint(uninterrupted, workspace, tmp_path, monkeypatch):
    """There is a history but nothing to go on from: it starts again, and so does the history."""
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run(workspace, "stage1", tmp_path, *RESUMED)
    assert [entry["step"] for entry in read_history(tmp_path)] == [1]
    run(workspace, "stage1", tmp_path, *RESUMED)
    compare(tmp_path, uninterrupted["stage1"])


def test_another_configuration_does_not_resume(runs, workspace, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interrupted):
            run(workspace, "stage1", tmp_path, *RESUMED)
    run(workspace, "stage1", tmp_path, *RESUMED, "seed=7", "optimization.max_steps=1")
    assert "resuming" not in caplog.text
    assert {entry["step"] for entry in read_history(tmp_path)} == {1}


def test_training_draws_random_numbers(runs, workspace, tmp_path):
    """Otherwise the equality above would say nothing about them."""
    config = load_config(CONFIG_DIR / "phantom" / "stage1.yaml", arguments(workspace, "stage1", tmp_path)[2:])
    parts = importlib.import_module("training.stage1").build(config)
    parts.supervision.train()
    batch, losses = parts.train_data.__getitems__([0, 1, 2, 3])[0], []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(parts.supervision(batch, seed=5)["loss"].item())
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.slow
def test_killed_process_resumes(uninterrupted, workspace, tmp_path):
    """kill -9 at two instants, the second one in a run that was itself resumed."""
    command = script("stage1", *arguments(workspace, "stage1", tmp_path, *RESUMED))
    for update in (2, 4):
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
        wanted = tmp_path / "checkpoints" / f"update-{update:08d}"
        deadline = time.monotonic() + 240
        while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted.exists()
        assert not (tmp_path / "model").exists()
    run(workspace, "stage1", tmp_path, *RESUMED)
    compare(tmp_path, uninterrupted["stage1"])


# --- errors


@pytest.mark.parametrize("stage", ["stage2", "pretrain_generator"])
def test_a_loss_that_is_not_finite_stops_the_run(runs, workspace, tmp_path, stage):
    overrides = ("optimization.learning_rate=1e30", "optimization.max_grad_norm=null", "optimization.max_steps=20")
    with pytest.raises(
        FloatingPointError, match=rf"The loss of {stage} became (nan|inf) at update \d+.*learning_rate"
    ):
        run(workspace, stage, tmp_path, *overrides)
    assert not (tmp_path / "model").exists()
    content = json.loads((tmp_path / "nonfinite.json").read_text(encoding="utf-8"))
    assert not math.isfinite(content["terms"]["loss"])
    assert len(content["batches"][0]["items"]) == 8


def test_a_batch_larger_than_the_data(runs, workspace, tmp_path):
    with pytest.raises(ValueError, match="24 items, too few for one batch of 25 in each of 1 processes"):
        run(workspace, "stage1", tmp_path, "optimization.batch_size=25")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("stage1", "init_from=nowhere", "Stage 1 starts from an earlier stage, but `init_from` is 'nowhere'"),
        ("stage2", "init_from=null", "Stage 2 starts from an earlier stage, but `init_from` is None"),
        ("pretrain_generator", "init_from=nowhere", "Generator pre-training starts from an earlier stage"),
        ("stage3", "generator_from=nowhere", "`generator_from` is 'nowhere', which holds none"),
        (
            "stage1",
            "model={detector_config: {num_layers: 1}}",
            "unknown key 'detector_config'. Known keys: attention_mode",
        ),
        ("stage2", "model.post_decoder_config.num_layer=1", "unknown key 'num_layer'. Did you mean 'num_layers'?"),
        ("stage3", "model.post_decoder_config.num_layers=1", "unknown key 'num_layers'. Known keys: region_drop"),
        ("pretrain_clip", "model.projection_dims=1", "unknown key 'projection_dims'. Did you mean 'projection_dim'?"),
        ("stage1", "data.num_validation=0", "no validation split, which training needs: set data.num_validation"),
    ],
)
def test_mistakes_in_a_configuration(runs, workspace, tmp_path, stage, override, message):
    with pytest.raises(ValueError) as error:
        run(workspace, stage, tmp_path / "run", override)
    assert message in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_stage3_needs_a_post_decoder(runs, workspace, tmp_path):
    with pytest.raises(ValueError, match="Stage 3 starts from a model of stage 2.* has no post decoder"):
        run(workspace, "stage3", tmp_path, f"init_from={runs['stage1']}")


def test_a_parent_without_some_weights_is_refused(runs, workspace, tmp_path):
    parent = shutil.copytree(runs["stage1"], tmp_path / "parent")
    kept = {name: value for name, value in weights(parent).items() if name != "visual_projection.weight"}
    save_file(kept, parent / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of its weights are missing, such as visual_projection\.weight"):
        run(workspace, "stage2", tmp_path / "run", f"init_from={parent}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimization.batchsize=3"], "unknown key 'batchsize'. Did you mean 'batch_size'?"),
        (["--config", "nowhere.yaml"], "There is no training configuration at nowhere.yaml"),
        (["--config", str(CONFIG_DIR / "phantom" / "stage2.yaml")], "configures the stage 'stage2', not 'stage1'"),
        (["data.dataset=mimic"], "dataset must be one of 'phantom', 'prepared', not 'mimic'"),
        (["data.dataset=prepared"], "data.dataset=prepared needs data.subsets"),
        (["data.subsets=[{folder: mimic}]"], "data.subsets has no effect on the phantom"),
        (["data.subsets=[{factor: 2}]"], "each of data.subsets needs a `folder`"),
        (["output_dir="], "`output_dir` must be of type str"),
        (["output_dir=''"], "`output_dir` is not set: add output_dir=FOLDER"),
        (["--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_mistakes_on_the_command_line(workspace, tmp_path, capsys, overrides, message):
    with pytest.raises(SystemExit) as error:
        run(workspace, "stage1", tmp_path, *overrides)
    assert error.value.code == 2
    assert message.replace("`output_dir` must", "output_dir must") in capsys.readouterr().err


def test_options_may_follow_overrides(workspace, tmp_path):
    argv = arguments(workspace, "stage1", tmp_path)
    config, given = loop.parse_arguments("stage1", [*argv[2:], "--overwrite", "seed=5", *argv[:2]], "")
    assert given.overwrite and not given.dry_run
    assert (config.seed, config.output_dir) == (5, str(tmp_path))


@pytest.mark.parametrize("error", [ValueError("it is wrong"), FileNotFoundError("it is wrong")])
def test_scripts_end_with_one_paragraph(monkeypatch, capsys, error):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["training/stage1.py"])
    with pytest.raises(SystemExit) as stopped:
        run_as_script(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "stage1.py: error: it is wrong (--debug shows where)\n"
    monkeypatch.setattr(sys, "argv", ["training/stage1.py", "--debug"])
    with pytest.raises(type(error)):
        run_as_script(main)


def test_defects_are_not_taken_for_mistakes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/stage1.py"])
    with pytest.raises(ZeroDivisionError):
        run_as_script(lambda: 1 / 0)


# --- the loop's bookkeeping


def test_means_are_taken_over_the_steps_that_have_the_term(tmp_path):
    history = loop.History(tmp_path / "history.jsonl", "stage1", loop.Accelerator(cpu=True))
    history.add({"loss": torch.tensor(1.0), "rare": torch.tensor(4.0)})
    history.add({"loss": torch.tensor(2.0)})
    entry = history.write(loop.TrainingState(update=2), "train", lr=0.5)
    assert (entry["loss"], entry["rare"], entry["lr"]) == (1.5, 4.0, 0.5)
    history.add({"loss": torch.tensor(3.0)})
    assert history.write(loop.TrainingState(update=3), "train")["loss"] == 3.0
    history.truncate(2)
    assert [entry["step"] for entry in read_history(tmp_path)] == [2]


def test_metrics_go_to_the_trackers(runs, workspace, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(loop.Accelerator, "log", lambda self, values, step=None: logged.append((step, values)))
    run(workspace, "stage2", tmp_path)
    assert [step for step, _ in logged] == [2, 3, 3]
    assert "train/loss" in logged[0][1]
    assert "validation/loss" in logged[2][1]


def test_the_configuration_of_a_run_is_kept(runs):
    config = yaml.safe_load((runs["stage1"].parent / "config.yaml").read_text(encoding="utf-8"))
    assert config["optimization"]["max_steps"] == 3
    assert config["init_from"] == str(runs["pretrain_clip"])


# --- processes


def environment(**extra):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return (
        os.environ
        | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
        | extra
    )


def script(stage, *argv):
    return [sys.executable, str(ROOT / "training" / f"{stage}.py"), *argv]


def test_a_mistake_ends_the_process_without_traceback(workspace, tmp_path):
    argv = arguments(workspace, "stage1", tmp_path, "init_from=nowhere")
    done = subprocess.run(script("stage1", *argv), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "stage1.py: error: Stage 1 starts from an earlier stage" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_accelerate_launch(runs, workspace, tmp_path):
    argv = arguments(workspace, "pretrain_clip", tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *script("pretrain_clip", *argv)[1:]]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = weights(runs["pretrain_clip"])
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path / "model").items())
    assert without_time(read_history(tmp_path)) == without_time(read_history(runs["pretrain_clip"].parent))


@pytest.mark.slow
def test_torchrun_with_two_processes(runs, workspace, tmp_path):
    argv = arguments(workspace, "stage1", tmp_path, "optimization.batch_size=4", "tracking.save_every=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        command + script("stage1", *argv)[1:], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    entries = read_history(tmp_path)
    assert [(entry["split"], entry["step"]) for entry in entries] == [("train", 2), ("train", 3), ("validation", 3)]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "environment.jsonl", "history.jsonl", "model"}
    model = ChexModel.from_pretrained(tmp_path / "model")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # both processes are one run of twice the batch: the same queries and losses, other images and dropout in each
    single = read_history(runs["stage1"].parent)
    assert set(entries[0]) == set(single[0])
    assert entries[0]["loss"] == pytest.approx(single[0]["loss"], rel=0.5)


GATHER = """
import sys
import torch
import torch.distributed as dist
from training.distributed import process_collectives
from training.objectives import SINGLE_PROCESS

torch.set_num_threads(1)
assert process_collectives() is SINGLE_PROCESS
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
collectives = process_collectives()
assert collectives is not SINGLE_PROCESS

# process 0 has 2 x 3 values, process 1 has 1 x 4
values = (torch.arange(6.0).view(2, 3) if rank == 0 else torch.full((1, 4), 9.0)).requires_grad_()
gathered = collectives.gather(values)
expected = torch.zeros(4, 4)
expected[:2, :3], expected[2] = torch.arange(6.0).view(2, 3), 9.0
assert torch.equal(gathered, expected), gathered

# every process weighs what it gathered differently; gradients of all come together, padding has none
weight = torch.arange(16.0).view(4, 4) * (rank + 1)
(gathered * weight).sum().backward()
total = torch.arange(16.0).view(4, 4) * 3
assert torch.equal(values.grad, total[:2, :3] if rank == 0 else total[2:3]), values.grad

mask = collectives.gather(torch.ones(2 - rank, 1 + rank, dtype=torch.bool))
assert mask.dtype == torch.bool
assert mask.tolist() == [[True, False], [True, False], [True, True], [False, False]]
ids = collectives.gather(torch.tensor([rank + 5]))
assert ids.dtype == torch.int64 and ids.tolist() == [5, 6]

counts = torch.tensor([1.0, 2.0]) * (rank + 1)
assert collectives.sum(counts).tolist() == [3.0, 6.0]
assert counts.tolist() == [rank + 1.0, 2 * (rank + 1.0)], "the own counts stay"
dist.destroy_process_group()
"""


def test_collectives_of_two_processes(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", "-c", GATHER, str(rank), str(tmp_path / "rendezvous")],
            env=environment(),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def test_phrases_of_a_step_are_true_or_false(runs, workspace):
    """Every image is asked for one of its own grounded phrases, and for one about a finding that it does not show."""
    options = arguments(workspace, "stage1", workspace / "none")[2:]
    config = load_config(CONFIG_DIR / "phantom" / "stage1.yaml", options)
    parts = importlib.import_module("training.stage1").build(config)
    supervision, records = parts.supervision, parts.train_data
    batch = records.__getitems__(list(range(24)))[0]
    own, foreign = 0, 0
    for seed in range(8):
        shared = torch.Generator().manual_seed(seed)
        phrases, boxes, mask = supervision._choose_phrases(batch, seed, shared, SINGLE_PROCESS)
        assert phrases.shape == (24, 2) and boxes.shape[:2] == mask.shape[:2] == (24, 2)
        for image in range(24):
            written = batch.class_phrases[image]
            shown = {label for label in range(len(written)) if batch.class_labels[image, label]}
            true, false = phrases[image].tolist()
            assert (true >= 0) == bool(batch.class_box_mask[image].any())
            if true >= 0:
                own += 1
                (label,) = {label for label in shown if true in written[label].tolist()}
                expected = batch.class_boxes[image, label][written[label] == true]
                assert torch.equal(boxes[image, 0][mask[image, 0]], expected)
            if false >= 0:
                foreign += 1
                about = {label for label in range(len(written)) if (batch.class_phrases[:, label] == false).any()}
                assert about and not about & shown
            assert not mask[image, 1].any()
    assert own > 40 and foreign > 40


def test_every_annotated_region_teaches_the_statements(runs, workspace):
    """However few regions are decoded from text, the boxes of all of them take part in `anatomy_statement`."""
    options = arguments(workspace, "stage1", workspace / "none", "objectives.anatomies_per_classification=1")[2:]
    config = load_config(CONFIG_DIR / "phantom" / "stage1.yaml", options)
    parts = importlib.import_module("training.stage1").build(config)
    supervision = parts.supervision.train()
    batch = parts.train_data.__getitems__([0, 1, 2, 3])[0]

    def statement_loss():
        torch.manual_seed(0)
        with torch.no_grad():
            return supervision(batch, 0)["anatomy_statement"].item()

    before = statement_loss()
    assert statement_loss() == before
    for region in (0, 5, 16, 24, 28):
        batch.anatomy_labels[:, region] = ~batch.anatomy_labels[:, region]
        assert statement_loss() != before
        batch.anatomy_labels[:, region] = ~batch.anatomy_labels[:, region]
    assert statement_loss() == before


# --- several prepared data sets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The phantom at another size, and a folder of images with boxes of other classes and no texts."""
    folder = tmp_path_factory.mktemp("prepared")
    sizes = {"image_size": 80, "num_train": 16, "num_validation": 4, "num_test": 0}
    prepare("phantom", folder / "phantom", size=72, num_proc=1, options=sizes)
    (folder / "raw").mkdir()
    rows = []
    for number in range(8):
        film = render_phantom(1, number, (96, 120)).image
        Image.fromarray(film).save(folder / "raw" / f"{number}.png")
        objects = [{"bbox": [20 + number, 30, 60, 70], "category": ("Clip", "Drain")[number % 2]}]
        split = "train" if number < 6 else "validation"
        rows.append({"image": f"{number}.png", "split": split, "objects": objects})
    (folder / "raw" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare("own", folder / "own", data_dir=folder / "raw", size=72, num_proc=1)
    return [{"folder": str(folder / "phantom")}, {"folder": str(folder / "own"), "balance": True}]


def on_prepared(workspace, output_dir, subsets, *overrides):
    given = ["data.dataset=prepared", f"data.subsets={json.dumps(subsets)}", "data.side=72", *overrides]
    return arguments(workspace, "stage1", output_dir, *given)


def test_training_on_several_prepared_data_sets(runs, workspace, prepared, tmp_path, caplog):
    main = importlib.import_module("training.stage1").main
    model_dir = main(on_prepared(workspace, tmp_path / "run", prepared, "augmentation.flip=consistent"))
    assert "16 training images, 1 times an epoch" in caplog.text
    assert "6 training images, 3 times an epoch" in caplog.text  # 16 / 6 = 2.67
    entries = read_history(tmp_path / "run")
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    for term in ("pathology_detection", "pathology_classification", "anatomy_detection", "sentence_contrastive"):
        assert entries[0][term] > 0
    caplog.clear()
    assert main(on_prepared(workspace, tmp_path / "run", prepared, "augmentation.flip=consistent")) == model_dir
    assert "reusing the finished run" in caplog.text


def test_classes_and_images_of_prepared_data(runs, workspace, prepared, tmp_path):
    options = on_prepared(workspace, tmp_path, prepared)[2:]
    config = load_config(CONFIG_DIR / "phantom" / "stage1.yaml", options)
    parts = importlib.import_module("training.stage1").build(config)
    train = parts.train_data
    assert len(train) == 16 + 3 * 6
    assert parts.supervision.positives.names[-2:] == ("Clip", "Drain")
    batch = train.__getitems__(range(14, 18))[0]
    assert batch.images.shape == (4, 1, 72, 72)
    assert batch.has_class_boxes.int().tolist() == [[1] * 8 + [0, 0]] * 2 + [[0] * 8 + [1, 1]] * 2
    assert batch.has_sentences.tolist() == batch.has_anatomy_labels.any(1).tolist() == [True, True, False, False]
    assert batch.class_box_mask[2, 8].sum() == batch.class_box_mask[3, 9].sum() == 1
    # x from the central 96 pixels of 120: 20..60 becomes 8..48
    torch.testing.assert_close(batch.class_boxes[2, 8, 0] * 96, torch.tensor([28.0, 50.0, 40.0, 40.0]))

    # What is not annotated teaches nothing: other values behind the masks give the same losses.
    supervision = parts.supervision.train()

    def losses(batch):
        torch.manual_seed(0)
        with torch.no_grad():
            return {name: value.item() for name, value in supervision(batch, seed=1, epoch=0).items()}

    hidden = batch.replace(
        class_labels=batch.class_labels ^ ~batch.has_class_labels,
        anatomy_labels=batch.anatomy_labels ^ ~batch.has_anatomy_labels[:, None],
    )
    assert not torch.equal(hidden.class_labels, batch.class_labels)
    assert losses(hidden) == losses(batch)
    seen = batch.replace(class_labels=~batch.class_labels)
    assert losses(seen)["pathology_classification"] != losses(batch)["pathology_classification"]


def test_a_folder_that_is_not_prepared(runs, workspace, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no prepared folder: it does not exist"):
        importlib.import_module("training.stage1").main(on_prepared(workspace, tmp_path, [{"folder": "nowhere"}]))
