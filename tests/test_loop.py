"""What the training loop does around a model: updates, averages, choices, plans, precision, trackers, mistakes."""

import ast
import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import training.loop as loop
from modeling_chex import ChexModel
from tests.test_training import arguments, read_history, run, weights
from training.collate import MixedDataset
from training.configuration import DataConfig, OptimizationConfig, SelectionConfig, StageConfig, TrackingConfig
from training.distributed import process_collectives
from training.ema import WeightAverage
from training.guard import sample_ids
from training.loop import StageParts, learning_rate_factor, run_stage
from training.objectives.reduction import masked_mean
from training.plan import Schedule, memory_of
from training.selection import Selection, score
from training.supervision import Supervision


# --- a small regression in place of ChEX, whose loss is a mean over items


class Regression(Supervision):
    """Item i has the inputs of row i; the loss is a mean over items. A `writer` stands in for a disk."""

    writer = None

    def __init__(self, items):
        super().__init__(nn.Sequential(nn.Linear(3, 1)))
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("inputs", torch.randn(items, 3, generator=generator), persistent=False)
        self.register_buffer("targets", torch.randn(items, generator=generator), persistent=False)
        self.seen = []
        with torch.no_grad():
            self.model[0].weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
            self.model[0].bias.zero_()

    def forward(self, batch, seed, epoch=0, totals=None):
        collectives = process_collectives(totals)
        if self.training and not collectives.counting:
            self.seen.append(batch.tolist())
        errors = (self.model(self.inputs[batch.clamp_min(0)])[:, 0] - self.targets[batch.clamp_min(0)]) ** 2
        loss = masked_mean(errors, batch >= 0, collectives)
        return {"loss": loss, "error": loss.detach()}


def regression(supervision, items):
    def build(config):
        data = torch.arange(items)

        def save(folder):
            if supervision.writer is not None:
                supervision.writer(folder)
            folder.mkdir(parents=True)
            torch.save(supervision.model.state_dict(), folder / "weights.pt")
            (folder / "config.json").write_text("{}", encoding="utf-8")

        return StageParts(supervision, data, data, save, torch.stack)

    return build


def configuration(tmp_path, optimization=None, tracking=None, **changed):
    options = {"batch_size": 2, "max_steps": 6, "learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.01}
    return StageConfig(
        stage="regression",
        output_dir=str(tmp_path / "run"),
        data=DataConfig(cache_dir=str(tmp_path)),
        optimization=OptimizationConfig(**options | (optimization or {})),
        tracking=TrackingConfig(**{"log_every": 1} | (tracking or {})),
        **changed,
    )


def train(tmp_path, items=22, **options):
    supervision = Regression(items)
    run_stage(configuration(tmp_path, **options), regression(supervision, items))
    return supervision


def by_hand(supervision, updates, config):
    """The weights after each update, by PyTorch alone; an update is a list of items."""
    model, options = Regression(len(supervision.targets)).model, config.optimization
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=options.weight_decay)
    found = []
    for number, items in enumerate(updates):
        optimizer.param_groups[0]["lr"] = options.learning_rate * learning_rate_factor(number, len(updates), options)
        loss = ((model(supervision.inputs[items])[:, 0] - supervision.targets[items]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


def assert_weights(model, expected):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# --- updates


def test_accumulated_batches_are_one_batch(tmp_path):
    """22 items: 11 batches of 2, by 4 to an update, so that the last update of an epoch has 3 of them."""
    options = {"gradient_accumulation_steps": 4, "epochs": 2, "max_steps": None}
    supervision = train(tmp_path, optimization=options)
    batches = supervision.seen
    assert [len(batch) for batch in batches] == [2] * 22
    for epoch in (batches[:11], batches[11:]):
        assert sorted(item for batch in epoch for item in batch) == list(range(22)), "nothing is lost"
    assert batches[:11] != batches[11:]
    groups = [batches[start:stop] for start, stop in ((0, 4), (4, 8), (8, 11), (11, 15), (15, 19), (19, 22))]
    updates = [[item for batch in group for item in batch] for group in groups]
    config = configuration(tmp_path, optimization=options)
    assert_weights(supervision.model, by_hand(supervision, updates, config)[-1])
    entries = read_history(tmp_path / "run")
    train_entries = [entry for entry in entries if entry["split"] == "train"]
    assert len(train_entries) == 6
    for number, entry in enumerate(train_entries):
        assert entry["lr"] == pytest.approx(0.1 * learning_rate_factor(number, 6, config.optimization))


def test_the_size_of_accumulated_batches_does_not_matter(tmp_path):
    """As long as their product is the same: 24 items, 8 to an update."""
    models, losses = [], []
    for size in (8, 4, 2, 1):
        options = {"batch_size": size, "gradient_accumulation_steps": 8 // size}
        models.append(train(tmp_path / str(size), items=24, optimization=options).model)
        losses.append([entry["loss"] for entry in read_history(tmp_path / str(size) / "run")])
    for model, found in zip(models[1:], losses[1:], strict=True):
        assert_weights(model, models[0].state_dict())
        assert found == pytest.approx(losses[0], rel=1e-5)


def test_items_that_fill_no_batch_are_left_out(tmp_path):
    supervision = train(tmp_path, items=7, optimization={"epochs": 2, "max_steps": None})
    assert [len(batch) for batch in supervision.seen] == [2] * 6


# --- validation


def test_batches_of_validation_draw_for_themselves_and_alike_every_time(tmp_path):
    """Otherwise all of them would ask for anatomies by box, say, whenever the first one does."""

    class Drawing(Regression):
        def __init__(self, items):
            super().__init__(items)
            self.drawn = []

        def forward(self, batch, seed, epoch=0, totals=None):
            if not self.training:
                self.drawn.append((process_collectives(totals).counting, seed, batch.tolist()))
            return super().forward(batch, seed, epoch, totals)

    supervision = Drawing(7)
    config = configuration(tmp_path, optimization={"max_steps": 3}, tracking={"validate_every": 1})
    run_stage(config, regression(supervision, 7))
    batches = [(0, [0, 1]), (1, [2, 3]), (2, [4, 5]), (3, [6])]
    counted = [(seed, items) for counting, seed, items in supervision.drawn if counting]
    computed = [(seed, items) for counting, seed, items in supervision.drawn if not counting]
    assert counted == batches and computed == 3 * batches


# --- moving average


def test_the_saved_model_is_the_moving_average(tmp_path):
    supervision = train(tmp_path, optimization={"ema_decay": 0.8})
    config = configuration(tmp_path)
    path = by_hand(supervision, supervision.seen, config)
    average = Regression(22).model.state_dict()
    for number, reached in enumerate(path, start=1):
        decay = min(0.8, (1 + number) / (10 + number))
        average = {name: decay * value + (1 - decay) * reached[name] for name, value in average.items()}
    assert_weights(supervision.model, average)
    assert (supervision.model[0].weight - path[-1]["0.weight"]).abs().max() > 1e-3
    saved = torch.load(tmp_path / "run" / "model" / "weights.pt", weights_only=True)
    assert_weights(supervision.model, saved)
    # validation measured these weights
    errors = (supervision.model(supervision.inputs)[:, 0] - supervision.targets) ** 2
    assert read_history(tmp_path / "run")[-1]["loss"] == pytest.approx(errors.mean().item(), rel=1e-5)


def test_applied_averages_give_way_to_the_weights_again():
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([parameter], 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)
    average.update(100)
    with pytest.raises(KeyError), average.applied():
        assert parameter.item() == 2.0
        raise KeyError
    assert parameter.item() == 3.0
    restored = WeightAverage([parameter], 0.5)
    restored.load_state_dict(average.state_dict())
    assert restored.averages[0].item() == 2.0


# --- best models, early stopping


def test_the_best_models_are_kept(tmp_path):
    """A learning rate that is too high makes the loss rise and fall."""
    train(
        tmp_path,
        optimization={"max_steps": 12, "learning_rate": 1.0},
        tracking={"validate_every": 2},
        selection=SelectionConfig("error", keep_best=3),
    )
    entries = [entry for entry in read_history(tmp_path / "run") if entry["split"] == "validation"]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12]
    expected = sorted(entries, key=lambda entry: entry["error"])[:3]
    listed = json.loads((tmp_path / "run" / "best" / "best.json").read_text(encoding="utf-8"))
    assert [(row["update"], row["error"]) for row in listed] == [(entry["step"], entry["error"]) for entry in expected]
    folders = {path.name for path in (tmp_path / "run" / "best").iterdir()} - {"best.json"}
    assert folders == {row["folder"] for row in listed}
    best = torch.load(tmp_path / "run" / "best" / listed[0]["folder"] / "weights.pt", weights_only=True)
    supervision = Regression(22)
    supervision.model.load_state_dict(best)
    errors = (supervision.model(supervision.inputs)[:, 0] - supervision.targets) ** 2
    assert listed[0]["error"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert (tmp_path / "run" / "model" / "config.json").is_file(), "the last one is kept in any case"


def test_a_run_that_no_longer_improves_stops_early(tmp_path, caplog):
    train(
        tmp_path,
        optimization={"max_steps": 100, "learning_rate": 1e-9, "min_learning_rate": 1e-9},
        tracking={"validate_every": 3, "log_every": 50},
        selection=SelectionConfig("loss", keep_best=0, patience=2, min_delta=1e-3),
    )
    entries = read_history(tmp_path / "run")
    assert [entry["step"] for entry in entries if entry["split"] == "validation"] == [3, 6, 9]
    assert "stopping at update 9, as 2 validations did not improve loss" in caplog.text
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert not (tmp_path / "run" / "best").exists()


def test_scores():
    several = SelectionConfig("task/a, metric/b")
    assert several.names == ("task/a", "metric/b")
    assert score(several, {"task/a": 0.5, "metric/b": 0.25}) == pytest.approx(1 / 3)
    assert score(several, {"task/a": 0.5, "metric/b": -0.1}) == 0
    assert score(several, {"task/a": 0.5}) is None
    assert score(SelectionConfig("loss"), {"loss": 2.0}) == -2.0
    assert score(SelectionConfig("loss"), {"loss": math.nan}) is None


def test_patience_counts_validations_without_improvement(tmp_path):
    selection = Selection(SelectionConfig("metric/x", keep_best=2, patience=2, min_delta=0.1), tmp_path)
    kept = [selection.add(update, {"metric/x": value}) for update, value in enumerate((0.5, 0.55, 0.7, 0.1, 0.75))]
    assert kept == [True, True, True, False, True]
    assert selection.updates == [4, 2]
    assert selection.exhausted  # 0.1 is worse, 0.75 better by less than 0.1
    copy = Selection(selection.config, tmp_path)
    copy.load_state_dict(selection.state_dict())
    assert copy == selection
    assert not selection.add(5, {}), "undefined"
    assert selection.add(6, {"metric/x": 0.9}) and not selection.exhausted


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"metric": "eror"},
            "selection.metric names 'eror', which validation does not measure. Did you mean 'error'?",
        ),
        ({"metric": "error,los"}, "names 'los', which validation does not measure. Did you mean 'loss'?"),
    ],
)
def test_a_metric_that_is_not_measured(tmp_path, selection, message):
    with pytest.raises(ValueError) as error:
        train(tmp_path, selection=SelectionConfig(**selection))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("accelerated", "apple", "cpu"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_the_device_is_one_that_training_can_use(tmp_path, monkeypatch, accelerated, apple, cpu):
    """Apple's GPUs have no float64."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    given = []

    def accelerator(**options):
        given.append(options["cpu"])
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Accelerator", accelerator)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert given == [cpu]


# --- values that are not finite


def test_a_bad_item_is_named(tmp_path):
    supervision = Regression(22)
    supervision.targets[13] = math.nan
    config = configuration(tmp_path, optimization={"batch_size": 4, "max_steps": 50}, tracking={"log_every": 50})
    with pytest.raises(FloatingPointError, match=r"The loss of regression became nan at update \d.*nonfinite.json"):
        run_stage(config, regression(supervision, 22))
    content = json.loads((tmp_path / "run" / "nonfinite.json").read_text(encoding="utf-8"))
    (batch,) = content["batches"]
    assert 13 in batch["items"] and batch["items"] == supervision.seen[-1]
    assert batch["batch"] == len(supervision.seen) - 1
    assert content["update"] == len(supervision.seen) <= 5
    assert math.isnan(content["terms"]["loss"]) and math.isnan(content["terms"]["error"])


def test_a_bad_gradient_is_named(tmp_path):
    """The loss is finite, its gradient is not: all batches of the update may be to blame."""

    class Rooted(Regression):
        def forward(self, batch, seed, epoch=0, totals=None):
            losses = super().forward(batch, seed, epoch, totals)
            bad = (self.model[0].weight * 0.0).sum().sqrt()  # 0, with an infinite slope
            return losses | {"loss": losses["loss"] + (bad if 13 in batch.tolist() else 0.0)}

    supervision = Rooted(22)
    options = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 50}
    config = configuration(tmp_path, optimization=options, tracking={"log_every": 50})
    with pytest.raises(FloatingPointError, match="The gradient of regression got the norm nan at update"):
        run_stage(config, regression(supervision, 22))
    content = json.loads((tmp_path / "run" / "nonfinite.json").read_text(encoding="utf-8"))
    items = [batch["items"] for batch in content["batches"]]
    assert len(items) == 2 and 13 in items[0] + items[1]
    assert math.isnan(content["gradient_norm"]) and math.isfinite(content["terms"]["loss"])


# --- the stages


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    for stage in ("pretrain_clip", "stage1", "pretrain_generator"):
        run(folder, stage, folder / "runs" / stage, "mixed_precision=no")
    return folder


def parts_of(workspace, stage, *overrides):
    config, _ = loop.parse_arguments(stage, arguments(workspace, stage, workspace / "none", *overrides), None)
    return config, importlib.import_module(f"training.{stage}").build(config)


def test_a_dry_run_shows_the_plan_and_leaves_nothing(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    options = ("optimization.batch_size=4", "optimization.gradient_accumulation_steps=4", "optimization.epochs=5")
    options += ("optimization.max_steps=null", "optimization.ema_decay=0.9", "tracking.tasks=[finding_detection]")
    options += (
        "selection.metric=task/finding_detection",
        "tracking.save_every=1",
        "mixed_precision=bf16",
        "--dry-run",
    )
    assert run(workspace, "stage1", tmp_path / "run", *options) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary"]
    assert not any((tmp_path / "temporary").iterdir())
    text = capsys.readouterr().out
    model = ChexModel.from_pretrained(workspace / "runs" / "stage1" / "model")
    trained = sum(parameter.numel() for parameter in model.detector.parameters())
    text_model = sum(parameter.numel() for parameter in model.text_model.parameters())
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["detector"] == ["detector", f"{trained:,}", "0"]
    assert lines["text_model"] == ["text_model", "0", f"{text_model:,}"]
    assert "4 items x 4 batches x 1 processes = 16 items" in text
    assert "6 batches in each process = 2 updates" in text  # 24 images; 4 batches and 2
    assert "10 updates = 5.0 epochs" in text
    assert "moving average" in text and "bf16 copies of trained weights" in text
    assert "train, update 2: seconds" in text and "validation, update 2: seconds" in text
    assert "task/finding_detection" in text
    assert f"{tmp_path / 'run'} was not touched" in text


def test_a_dry_run_leaves_an_existing_run_alone(workspace, capsys):
    folder = workspace / "runs" / "stage1"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(workspace, "stage1", folder, "seed=99", "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "stage1 in" in capsys.readouterr().out


def test_the_plan_counts_the_memory_that_training_holds(workspace):
    config, parts = parts_of(workspace, "stage1")
    supervision = parts.supervision.train()
    optimizer = torch.optim.AdamW([p for p in supervision.parameters() if p.requires_grad])
    supervision(parts.train_data.__getitems__(list(range(8)))[0], seed=0)["loss"].backward()
    optimizer.step()
    memory = memory_of(supervision, config, "no", 1)
    assert memory["weights"] == sum(p.nbytes for p in supervision.parameters())
    assert memory["gradients"] >= sum(p.grad.nbytes for p in supervision.parameters() if p.grad is not None)
    moments = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert memory["AdamW's two moments"] >= moments > 0.9 * memory["AdamW's two moments"]
    assert "moving average" not in memory
    assert memory_of(supervision, config, "no", 2)["gradient buckets between processes"] == memory["gradients"]


def test_schedule_of_a_run():
    options = OptimizationConfig(gradient_accumulation_steps=4, epochs=3)
    assert Schedule.of(options, 11) == Schedule(batches=11, accumulated=4, updates=3, total=9)
    assert Schedule.of(replace(options, max_steps=5), 11).total == 5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its new name is younger than our range
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("stage", ["stage1", "pretrain_generator"])
def test_gradient_checkpointing_changes_no_value(workspace, tmp_path, stage):
    """Up to rounding; the prefix of the generator, given as a cache, is not lost."""
    run(workspace, stage, tmp_path / "run", "gradient_checkpointing=true", "mixed_precision=no")
    losses = [
        [entry["loss"] for entry in read_history(folder)] for folder in (tmp_path / "run", workspace / "runs" / stage)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    _, parts = parts_of(workspace, stage, "gradient_checkpointing=true")
    loop.set_up_model(replace(StageConfig(), gradient_checkpointing=True), parts.supervision.model)
    assert parts.supervision.model.is_gradient_checkpointing


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(workspace, tmp_path):
    """`eager` traces as every backend does, and runs what was traced without compiling it, which would take long."""
    counters.clear()
    run(workspace, "stage1", tmp_path / "run", "compile=eager", "mixed_precision=no")
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    reference = workspace / "runs" / "stage1"
    losses = [[entry["loss"] for entry in read_history(folder)] for folder in (tmp_path / "run", reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert set(weights(tmp_path / "run" / "model")) == set(weights(reference / "model"))


def test_an_unknown_backend_is_named(workspace, tmp_path):
    with pytest.raises(ValueError, match="compile: unknown backend 'inducter'. Did you mean 'inductor'?"):
        run(workspace, "stage1", tmp_path / "run", "compile=inducter")
    with pytest.raises(ValueError, match="the model of pretrain_generator has none of the blocks that are compiled"):
        run(workspace, "pretrain_generator", tmp_path / "run", "compile=inductor")
    assert not (tmp_path / "run").exists()


def test_bfloat16_trains_and_float16_asks_for_a_gpu(workspace, tmp_path):
    run(workspace, "stage1", tmp_path / "bf16", "mixed_precision=bf16")
    reference, found = (read_history(folder) for folder in (workspace / "runs" / "stage1", tmp_path / "bf16"))
    for expected, entry in zip(reference, found, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert found[0]["loss"] != reference[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bf16" / "model").values())
    with pytest.raises(ValueError, match="fp16 needs a GPU, and this run is on a CPU: set mixed_precision to bf16"):
        run(workspace, "stage1", tmp_path / "fp16", "mixed_precision=fp16")
    assert not (tmp_path / "fp16").exists()


def test_tasks_in_validation(workspace, tmp_path):
    given = ("tracking.tasks=[anatomy_localization, finding_detection]", "tracking.task_images=4")
    given += ("selection.metric='task/anatomy_localization,metric/anatomy_miou'", "tracking.validate_every=2")
    run(workspace, "stage1", tmp_path / "run", *given)
    entries = [entry for entry in read_history(tmp_path / "run") if entry["split"] == "validation"]
    assert [entry["step"] for entry in entries] == [2, 3]
    for entry in entries:
        assert 0 <= entry["task/anatomy_localization"] <= 1 and 0 <= entry["task/finding_detection"] <= 1
    (best,) = json.loads((tmp_path / "run" / "best" / "best.json").read_text(encoding="utf-8"))
    value = best["task/anatomy_localization,metric/anatomy_miou"]
    assert value == pytest.approx(
        max(2 / (1 / e["task/anatomy_localization"] + 1 / e["metric/anatomy_miou"]) for e in entries)
    )
    ChexModel.from_pretrained(tmp_path / "run" / "best" / best["folder"])


def test_training_does_not_import_the_evaluation():
    """Until tasks are asked for: the evaluation builds upon training, not the other way round."""
    files = list((loop.CONFIG_DIR.parent).rglob("*.py"))
    assert len(files) > 20
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "evaluation" for name in names), path


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("stage1", ["tracking.tasks=[findng_detection]"], "unknown task 'findng_detection'. Did you mean 'finding_de"),
        ("stage1", ["tracking.tasks=[report_generation]"], "reads generated sentences, which the model of stage1"),
        ("pretrain_generator", ["tracking.tasks=[finding_detection]"], "which pretrain_generator has no model for"),
    ],
)
def test_tasks_that_cannot_be_run(workspace, tmp_path, stage, overrides, message):
    with pytest.raises(ValueError) as error:
        run(workspace, stage, tmp_path / "run", *overrides)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.ema_decay=1", "ema_decay must lie between 0 and 1, not be 1.0"),
        ("optimization.max_steps=0", "max_steps must be greater than 0, not 0"),
        ("tracking.keep_checkpoints=0", "keep_checkpoints must be at least 1, not 0"),
        ("tracking.save_every=-1", "save_every must not be negative, but is -1"),
        ("tracking.trackers=[tensorbord]", "trackers must be one of 'tensorboard', 'wandb', not 'tensorbord'"),
        ("selection.metrics=loss", "unknown key 'metrics'. Did you mean 'metric'?"),
        ("selection.patience=3", "patience needs a metric that is to improve: set selection.metric"),
        ("selection={metric: loss, patience: 3}", "counts validations, so set tracking.validate_every above 0"),
        ("selection={metric: loss, patience: 0}", "patience must be at least 1"),
        ("selection.metric='loss,task/a'", "mixes losses, of which smaller ones are better"),
        ("selection.metric='loss,'", "must be a name or several separated by commas, not 'loss,'"),
        ("selection.metric=task/anatomy", "tracking.tasks does not. Known tasks there: none"),
        ("compil=inductor", "unknown key 'compil'. Did you mean 'compile'?"),
    ],
)
def test_mistakes_in_options(workspace, tmp_path, capsys, override, message):
    with pytest.raises(SystemExit) as error:
        run(workspace, "stage1", tmp_path / "run", override)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(workspace, tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, f"is_{name}_available", lambda: False)
    with pytest.raises(ValueError, match=f"names {name}, which is not installed: run `pip install {name}`"):
        run(workspace, "stage1", tmp_path / "run", f"tracking.trackers=[{name}]")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_metrics(workspace, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(workspace, "stage1", tmp_path / "run", "tracking.trackers=[tensorboard]")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "stage1")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(e["step"], e["loss"]) for e in read_history(tmp_path / "run") if e["split"] == "train"]
    assert written == [(step, pytest.approx(value)) for step, value in expected]


@pytest.mark.slow
def test_wandb_works_offline(workspace, tmp_path):
    pytest.importorskip("wandb")
    run(workspace, "stage1", tmp_path / "run", "tracking.trackers=[wandb]")
    assert list((tmp_path / "run" / "trackers").glob("wandb/offline-run-*/*.wandb"))


def test_ids_of_records(workspace):
    _, parts = parts_of(workspace, "stage1")
    every = parts.train_data.records.with_format(None)["sample_id"]
    assert sample_ids(parts.train_data, [3, 0]) == [every[3], every[0]]
    mixed = MixedDataset([parts.validation_data, parts.train_data], [2, 1])  # 8 images twice, then 24
    (validation,) = sample_ids(parts.validation_data, [5])
    assert sample_ids(mixed, [5, 13, 19, 16]) == [validation, validation, every[3], every[0]]
    assert sample_ids(torch.arange(3), [0]) is None
