"""The training loop that all stages share."""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    skip_first_batches,
)
from accelerate.state import AcceleratorState
from accelerate.utils import (
    ProjectConfiguration,
    broadcast_object_list,
    is_tensorboard_available,
    is_wandb_available,
    set_seed,
)
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from training.checkpoints import Checkpoints, TrainingState, writing
from training.collate import first
from training.configuration import CONFIG_DIR, OptimizationConfig, StageConfig, load_config, read_resolved
from training.distributed import (
    gather_weights,
    leave_processes,
    lost_process,
    process_group_options,
    set_up_deepspeed,
    set_up_fsdp,
    warn_of_missing_processes,
    whole_weights,
)
from training.ema import WeightAverage
from training.guard import FiniteGuard
from training.history import History, environment
from training.model_setup import choose_precision, set_up_model
from training.plan import Schedule, describe_plan
from training.preemption import Preempted, StopRequest
from training.selection import Selection, check_names
from training.stage_data import data_build
from training.steps import SharedSplit, add_up, clip_gradients, part_of_update, step_parts
from training.supervision import Supervision


logger = logging.getLogger(__name__)

# What a run writes. The configuration is deleted last: without it, a model would be nobody's; checkpoints before the
# best models, which they refer to.
RUN_FILES = (
    *("model", "model.partial", "checkpoints", "best", "history.jsonl", "history.partial", "environment.jsonl"),
    *("nonfinite*.json", "nonfinite*.partial", "trackers", "config.partial", "config.yaml"),
)


@dataclass
class StageParts:
    """
    What a stage hands to the loop.

    Attributes:
        supervision: The module that turns a batch and a seed into named losses.
        train_data, validation_data: Data sets; `collate` makes a batch of a list of their items.
        save: Writes the resulting model into a folder.
        evaluate: Runs the tasks of `tracking.tasks` and returns `task/<name>` with their values.
    """

    supervision: Supervision
    train_data: torch.utils.data.Dataset
    validation_data: torch.utils.data.Dataset
    save: Callable[[Path], None]
    collate: Callable = first
    evaluate: Callable[[], dict[str, float]] | None = None


def learning_rate_factor(update: int, total: int, config: OptimizationConfig, official: bool = False) -> float:
    """
    Linear warm-up, then a cosine that is not shifted by it; relative to the peak learning rate, for an update counted
    from 0. `official` is the schedule of the original code, which sets the rate behind an update, for the next one,
    from the number of the last batch in it: the first update, and without accumulation also the second one, has rate
    0.
    """
    floor = config.min_learning_rate / config.learning_rate
    place = max(update - 1 / config.gradient_accumulation_steps, 0.0) if official else update
    if place < config.warmup_steps:
        return place / config.warmup_steps if official else (update + 1) / config.warmup_steps
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * min(place / total, 1)))


def parse_arguments(
    stage: str, argv: Sequence[str] | None, description: str | None
) -> tuple[StageConfig, argparse.Namespace]:
    """Command line of a stage script: the configuration (a file and dotted overrides), and the options beside it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG_DIR / f"{stage}.yaml"), help="YAML file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="start again although a finished run is there")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and try two updates; writes no output")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the file")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if config.stage != stage:
            raise ValueError(f"{arguments.config} configures the stage {config.stage!r}, not {stage!r}.")
        if not config.output_dir:
            raise ValueError("`output_dir` is not set: add output_dir=FOLDER to the command.")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return config, arguments


def run_command(
    stage: str, build: Callable[[StageConfig], StageParts], argv: Sequence[str] | None, description: str | None
) -> Path | None:
    """What a stage script does: `run_stage`, or `try_stage` with `--dry-run`, which has no model to return."""
    config, arguments = parse_arguments(stage, argv, description)
    if arguments.dry_run:
        return try_stage(config, build)
    return run_stage(config, build, arguments.overwrite)


def run_as_script(main: Callable[[], object]) -> None:
    """Runs a stage script: what its user can mend ends with one paragraph and exit code 2; `--debug` shows more."""
    try:
        main()
        leave_processes()
    except Preempted:
        leave_processes()
        raise
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        message = lost_process(error)
        if message is None or "--debug" in sys.argv:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


def run_stage(config: StageConfig, build: Callable[[StageConfig], StageParts], overwrite: bool = False) -> Path:
    """
    Trains one stage and returns the folder of its model. A run that is finished with the same configuration is reused;
    one that was interrupted goes on from its last checkpoint.

    Raises:
        Preempted: A signal asked the run to stop; it has saved a checkpoint.
    """
    output_dir = Path(config.output_dir)
    model_dir, config_path = output_dir / "model", output_dir / "config.yaml"
    resolved = yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False)
    # the build changes with the code that draws the phantom; as a comment, the file stays a configuration
    resolved += f"# data build: {data_build(config.data)}\n"
    same = config_path.is_file() and _is_same_run(config_path.read_text(encoding="utf-8"), resolved)
    same = same and not overwrite and not _older_than(config_path, (config.init_from, config.generator_from))
    if same and (model_dir / "config.json").is_file():
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)  # a kill may have left them there
        logger.warning("%s: reusing the finished run in %s.", config.stage, output_dir)
        return model_dir
    if model_dir.exists() and not config_path.is_file():
        raise ValueError(f"{output_dir} holds a model that no run has written; set `output_dir` to another folder.")

    accelerator, parts = _set_up(config, build)
    if accelerator.is_main_process:  # only now: what was there before survives a mistake in the configuration
        for pattern in RUN_FILES if not same else ("nonfinite*.json",):
            for path in output_dir.glob(pattern):
                _remove(path)
        output_dir.mkdir(parents=True, exist_ok=True)
        if not same:
            temporary = config_path.with_suffix(".partial")
            temporary.write_text(resolved, encoding="utf-8")
            temporary.replace(config_path)
        with (output_dir / "environment.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(environment(accelerator)) + "\n")
    accelerator.wait_for_everyone()
    _start_trackers(accelerator, config, output_dir)
    set_seed(config.seed)
    try:
        with StopRequest(accelerator) as request:
            _train(accelerator, config, parts, output_dir, request)
            if accelerator.is_main_process:
                temporary = output_dir / "model.partial"
                shutil.rmtree(temporary, ignore_errors=True)
                with writing("The model", temporary):
                    parts.save(temporary)
                shutil.rmtree(model_dir, ignore_errors=True)
                temporary.rename(model_dir)
                shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)  # only now that they are not needed
            accelerator.wait_for_everyone()
    finally:
        for tracker in accelerator.trackers:  # not `end_training`: other stages of this process need the others again
            tracker.finish()
    accelerator.free_memory()
    return model_dir


def try_stage(config: StageConfig, build: Callable[[StageConfig], StageParts]) -> None:
    """Prints the plan of a stage, then tries two updates and a validation on its data; `output_dir` is not touched."""
    accelerator, parts = _set_up(config, build)
    items = len(parts.train_data), len(parts.validation_data)
    accelerator.print(describe_plan(config, parts.supervision, items, accelerator) + "\n")
    tracking = dataclasses.replace(
        config.tracking,
        log_every=1,
        validate_every=0,
        validation_images=min(config.tracking.validation_images, config.optimization.batch_size),
        task_images=min(config.tracking.task_images, 2),
        save_every=0,
    )
    config = dataclasses.replace(
        config,
        optimization=dataclasses.replace(config.optimization, max_steps=2),
        tracking=tracking,
        selection=dataclasses.replace(config.selection, keep_best=0),
    )
    folder = Path(tempfile.mkdtemp(prefix="chex-dry-run-"))
    set_seed(config.seed)
    try:
        _train(accelerator, config, parts, folder)
    except FloatingPointError:
        raise  # the message names a file in the folder
    except BaseException:
        shutil.rmtree(folder)
        raise
    if accelerator.is_main_process:
        entries = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
        for entry in entries:
            values = [f"{k} {v:.4g}" for k, v in entry.items() if k not in ("stage", "split", "step", "lr")]
            print(f"{entry['split']}, update {entry['step']}: {', '.join(values)}")
        print(f"{_peak_memory(accelerator.device)} at most. {config.output_dir} was not touched.")
    shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def _set_up(config: StageConfig, build: Callable[[StageConfig], StageParts]) -> tuple[Accelerator, StageParts]:
    """Processes, data and model of a stage; nothing is written yet, so that mistakes have no consequences."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in config.tracking.trackers:
        if not available[name]():
            raise ValueError(
                f"tracking.trackers names {name}, which is not installed: run `pip install {name}`, or leave it out."
            )
    AcceleratorState._reset_state()  # one process may run several stages, each in a precision of its own
    precision = choose_precision(config.mixed_precision)
    accelerator = Accelerator(
        cpu=_on_cpu(),
        mixed_precision=precision,
        log_with=list(config.tracking.trackers) or None,
        project_config=ProjectConfiguration(config.output_dir, str(Path(config.output_dir) / "trackers")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
            process_group_options(),
        ],
    )
    warn_of_missing_processes(accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        options = accelerator.state.deepspeed_plugin.deepspeed_config
        set_up_deepspeed(options, precision, config.optimization.max_grad_norm)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    for name, asked in (
        ("optimization.ema_decay", config.optimization.ema_decay is not None),
        ("tracking.tasks", config.tracking.tasks),
    ):
        if sharded and asked:
            raise ValueError(
                f"{name} needs the whole model in each process, which FSDP shards: leave it out, or run without "
                "sharding."
            )
    set_seed(config.seed)
    parts = build(config)
    if config.tracking.tasks and parts.evaluate is None:
        raise ValueError(
            f"tracking.tasks runs tasks of the evaluation, which {config.stage} has no model for: leave it empty."
        )
    set_up_model(config, parts.supervision.model)
    if sharded:
        set_up_fsdp(accelerator, parts.supervision)
    count, batch_size = len(parts.train_data), config.optimization.batch_size
    if count < batch_size * accelerator.num_processes:
        raise ValueError(
            f"The training split has {count} items, too few for one batch of {batch_size} in each of "
            f"{accelerator.num_processes} processes. Lower optimization.batch_size or add data."
        )
    return accelerator, parts


def _on_cpu() -> bool:
    """Whether to train on the CPU, which has to be said: otherwise processes there would not be connected."""
    # Apple's GPU has no float64, in which random draws and counts are kept.
    return not torch.accelerator.is_available() or torch.backends.mps.is_available()


def _start_trackers(accelerator: Accelerator, config: StageConfig, output_dir: Path) -> None:
    if not config.tracking.trackers:
        return
    folder = output_dir / "trackers"
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    options = {"dir": str(folder), "mode": os.environ.get("WANDB_MODE", "offline"), "config": config.to_dict()}
    accelerator.init_trackers(config.stage, init_kwargs={"wandb": options | {"group": output_dir.name}})


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB of memory"


def _is_same_run(*configurations: str) -> bool:
    """
    Whether two written configurations are equal, apart from the folder of the run, which may have been moved, and from
    options that one of them does not have yet, which count as their defaults.
    """
    values = [read_resolved(text) for text in configurations]
    builds = [text.rstrip().rpartition("\n")[2] for text in configurations]  # the comment that ends the file
    if None in values or builds[0] != builds[1]:
        return False
    return values[0] | {"output_dir": ""} == values[1] | {"output_dir": ""}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _older_than(path: Path, folders: Sequence[str | None]) -> bool:
    """Whether any of the models that a run starts from was written after the run had begun."""
    began = path.stat().st_mtime
    weights = [Path(folder) / "model.safetensors" for folder in folders if folder]
    return any(file.is_file() and file.stat().st_mtime > began for file in weights)


def _train(
    accelerator: Accelerator,
    config: StageConfig,
    parts: StageParts,
    output_dir: Path,
    request: StopRequest | None = None,
) -> None:
    options, tracking = config.optimization, config.tracking
    loader = DataLoader(
        parts.train_data,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=parts.collate,
        num_workers=config.num_workers,
    )
    validation = SharedSplit(
        parts.validation_data,
        parts.collate,
        tracking.validation_images,
        options.batch_size,
        accelerator,
        parts.supervision,
    )
    parameters = [parameter for parameter in parts.supervision.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    module, optimizer, loader = accelerator.prepare(parts.supervision, optimizer, loader)
    schedule = Schedule.of(options, len(loader))

    state, average, selection = TrainingState(), None, None
    accelerator.register_for_checkpointing(state)
    if options.ema_decay is not None:
        average = WeightAverage(parameters, options.ema_decay)
        accelerator.register_for_checkpointing(average)
    if config.selection.metric is not None:
        tasks = [f"task/{name}" for name in tracking.tasks]
        module.eval()
        check_names(config.selection, [*validation.losses(module), *tasks])
        selection = Selection(config.selection, output_dir / "best")
        accelerator.register_for_checkpointing(selection)
    history = History(output_dir / "history.jsonl", config.stage, accelerator)
    guard = FiniteGuard(accelerator, output_dir, config.stage, parts.train_data)
    checkpoints = Checkpoints(accelerator, output_dir / "checkpoints", tracking.keep_checkpoints, history)
    if checkpoint := checkpoints.newest():
        checkpoints.load(checkpoint)
        logger.warning(
            "%s: resuming at update %d of %d from %s.", config.stage, state.update, schedule.total, checkpoint
        )
    history.truncate(state.update)

    progress = tqdm(
        total=schedule.total,
        initial=state.update,
        desc=config.stage,
        disable=not accelerator.is_main_process,
        mininterval=1.0,
    )
    start, seconds_before = time.perf_counter(), state.seconds
    module.train()
    last = False
    while not last:
        loader.set_epoch(state.epoch)
        batches = skip_first_batches(loader, state.batch) if state.batch else loader
        first_seed = config.seed + 1_000_000 * state.epoch + state.batch
        losses: dict[str, torch.Tensor] = {}
        for part in step_parts(
            batches, options.gradient_accumulation_steps, parts.supervision, first_seed, state.epoch
        ):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate_factor(
                    state.update, schedule.total, options, config.is_official
                )
            # Random numbers depend on the place in the run alone: a resumed run draws what the original would have.
            torch.manual_seed(part.seed + 2_000_003 * (accelerator.process_index + 1))
            with part_of_update(accelerator, module, part.last):
                terms = module(part.batch, seed=part.seed, epoch=state.epoch, totals=part.totals)
                accelerator.backward(terms["loss"])
                norm = None
                if part.last and options.max_grad_norm is not None:
                    norm = clip_gradients(accelerator, module, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            guard.add(terms, part.batch, state, norm, part.last)
            losses = add_up(losses, terms)
            state.batch += 1
            if not part.last:
                continue
            history.add(losses)
            losses = {}
            state.update += 1
            state.seconds = seconds_before + time.perf_counter() - start
            progress.update()
            if average is not None:
                average.update(state.update)
            last, saves = state.update >= schedule.total, _due(state.update, tracking.save_every)
            validates = last or _due(state.update, tracking.validate_every)
            if validates or saves or _due(state.update, tracking.log_every):
                guard.finish()
                entry = history.write(state, "train", lr=optimizer.param_groups[0]["lr"])
                progress.set_postfix(loss=f"{entry['loss']:.3f}")
            if validates:
                with average.applied() if average is not None else contextlib.nullcontext():
                    entry = _validate(accelerator, module, validation, history, state, parts.evaluate)
                    if selection is not None and selection.add(state.update, entry):
                        with whole_weights(accelerator, module):
                            if accelerator.is_main_process:
                                selection.save(state.update, parts.save)
                if selection is not None and selection.exhausted and not last:
                    last = True
                    logger.warning(
                        "%s: stopping at update %d, as %d validations did not improve %s.",
                        *(config.stage, state.update, selection.stale, config.selection.metric),
                    )
            signal = request.agreed() if request is not None and not last else None
            saves = (saves or signal is not None) and not last
            if saves:
                guard.finish()
                checkpoints.save(state.update, selection.updates if selection is not None else ())
            if selection is not None and (validates or saves) and accelerator.is_main_process:
                selection.prune(checkpoints.needed_models() if not last else ())
            if signal is not None:
                accelerator.wait_for_everyone()  # before any of them ends, which launchers take for a failure
                progress.close()
                logger.warning(
                    "%s: stopped by %s at update %d of %d. The same command goes on from there.",
                    *(config.stage, signal, state.update, schedule.total),
                )
                raise Preempted
            if last:
                break
        else:
            state.epoch, state.batch = state.epoch + 1, 0
    progress.close()
    if average is not None:
        average.apply()
    gather_weights(accelerator, module)


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


@torch.no_grad()
def _validate(
    accelerator: Accelerator,
    module: nn.Module,
    split: SharedSplit,
    history: History,
    state: TrainingState,
    evaluate: Callable[[], dict[str, float]] | None,
) -> dict[str, float]:
    """
    Mean losses on validation images without augmentation, and the values of tasks; returns what the history gets.
    What is drawn is the same every time, so that values can be compared.
    """
    module.eval()
    validation, values = History(history.path, history.stage, accelerator), [{}]
    validation.add(split.losses(module))
    if evaluate is not None:
        if accelerator.is_main_process:
            values = [evaluate()]
        broadcast_object_list(values)
    entry = validation.write(state, "validation", **values[0])
    module.train()
    return entry


__all__ = [
    "StageParts",
    "learning_rate_factor",
    "parse_arguments",
    "run_as_script",
    "run_command",
    "run_stage",
    "try_stage",
]
