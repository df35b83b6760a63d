"""The training loop that all stages share."""

import argparse
import collections
import functools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_chex import ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import PromptSet, merge_prompt_sets, prompts_for_classes
from training.collate import MixedDataset, RecordDataset, TextTable, first, repeats_of
from training.configuration import CONFIG_DIR, DataConfig, OptimizationConfig, StageConfig, load_config
from training.data.phantom import PhantomChestXray, phantom_datasets
from training.data.prepared import open_prepared, read_info
from training.data.record import record_classes
from training.supervision import Supervision


logger = logging.getLogger(__name__)

RUN_FILES = ("model", "model.partial", "checkpoints", "history.jsonl", "history.partial", "config.yaml")


@dataclass
class StageParts:
    """
    What a stage hands to the loop.

    Attributes:
        supervision: The module that turns a batch and a seed into named losses.
        train_data, validation_data: Data sets; `collate` makes a batch of a list of their items.
        save: Writes the resulting model into a folder.
    """

    supervision: Supervision
    train_data: torch.utils.data.Dataset
    validation_data: torch.utils.data.Dataset
    save: Callable[[Path], None]
    collate: Callable = first


@dataclass
class TrainingData:
    """
    What stages learn from.

    Attributes:
        train, validation: Batches of both splits.
        texts: Table of all their texts.
        prompts: Prompts of the finding classes, in the order of the batches.
    """

    train: RecordDataset | MixedDataset
    validation: RecordDataset | MixedDataset
    texts: TextTable
    prompts: PromptSet


def load_data(config: DataConfig) -> list[datasets.DatasetDict]:
    """The splits of each configured data set; the phantom is built on first use."""
    if config.dataset == "phantom":
        parts = [phantom_datasets(config.cache_dir, num_proc=config.num_proc, **_phantom_fields(config))]
        remedy = "set data.num_{} above 0"
    else:
        parts = [open_prepared(subset.folder, cache_dir=config.cache_dir) for subset in config.subsets]
        remedy = "add a data set that has one"
    for name in ("train", "validation"):
        if not any(name in part for part in parts):
            raise ValueError(f"The data has no {name} split, which training needs: {remedy.format(name)}.")
    return parts


def _phantom_fields(config: DataConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("seed", "image_size", "num_train", "num_validation", "num_test")}


def _data_build(config: DataConfig) -> str:
    """Changes with the data, also when their configuration does not."""
    if config.dataset == "phantom":
        return Path(PhantomChestXray(cache_dir=config.cache_dir, **_phantom_fields(config)).cache_dir).parent.name
    return " ".join(read_info(subset.folder).content for subset in config.subsets)


@functools.lru_cache(maxsize=1)
def _read_data(data_key: tuple, processor_key: str, config: "_Hidden", image_processor: "_Hidden") -> TrainingData:
    config, texts = config.value, TextTable()
    parts = load_data(config)
    in_memory = config.dataset == "phantom" if config.in_memory is None else config.in_memory
    vocabularies = [record_classes(next(iter(part.values())).features) for part in parts]
    prompts, places = merge_prompt_sets([prompts_for_classes(names) for names in vocabularies])

    def read(split: str) -> tuple[list[RecordDataset], list[int]]:
        owners = [number for number, part in enumerate(parts) if split in part]
        return [
            RecordDataset(
                parts[number][split],
                image_processor.value,
                texts,
                in_memory,
                num_classes=len(prompts.names),
                class_index=places[number],
                side=config.side,
            )
            for number in owners
        ], owners

    (train, owners), (validation, _) = read("train"), read("validation")
    if config.dataset == "phantom":
        return TrainingData(train[0], validation[0], texts, prompts)
    subsets = [config.subsets[number] for number in owners]
    repeats = repeats_of(
        [len(part) for part in train], [subset.factor for subset in subsets], [subset.balance for subset in subsets]
    )
    for subset, part, count in zip(subsets, train, repeats, strict=True):
        logger.warning("%s: %d training images, %d times an epoch.", subset.folder, len(part), count)
    return TrainingData(MixedDataset(train, repeats), MixedDataset(validation, [1] * len(validation)), texts, prompts)


class _Hidden:
    """Carries an argument past `lru_cache`, which must not compare it."""

    def __init__(self, value: object):
        self.value = value

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)


def read_data(config: DataConfig, image_processor: ChexImageProcessor) -> TrainingData:
    """Both splits of the configured data, mixed if they are several; kept for the next stage in this process."""
    key = (tuple(sorted(vars(config).items())), _data_build(config))
    return _read_data(key, repr(image_processor.to_dict()), _Hidden(config), _Hidden(image_processor))


def load_stage_model(folder: str | None, purpose: str, **config_overrides: object) -> tuple[ChexModel, ChexProcessor]:
    """The model and processor of an earlier stage; parts that it does not have yet are initialised."""
    if not folder or not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{purpose} starts from an earlier stage, but `init_from` is {folder!r}, which holds no model. Run the "
            "earlier stage first, or set `init_from` to a folder that its run has written."
        )
    config = ChexModel.config_class.from_pretrained(folder)
    for name, value in config_overrides.items():
        setattr(config, name, value)
    model = ChexModel.from_pretrained(folder, config=type(config)(**config.to_dict()))
    return model, ChexProcessor.from_pretrained(folder)


def set_trainable(model: ChexModel, parts: Sequence[str], frozen_vision_layers: int = 0) -> None:
    """
    Freezes everything but the named parts, a function of the configuration alone.

    Args:
        parts: Names of children of the model, such as `vision_model` or `detector`.
        frozen_vision_layers: k of the image encoder's layers that stay frozen: the embeddings (with the layer norm
            behind them), then k - 1 blocks; with any of them also the final layer norm and the projection.
    """
    children = dict(model.named_children())
    for name in parts:
        if children.get(name) is None:
            raise ValueError(f"`trainable` names {name!r}, which is not a part of this model: {', '.join(children)}.")
    for name, child in children.items():
        child.requires_grad_(name in parts)
    if frozen_vision_layers > 0:
        vision = model.vision_model
        frozen = [vision.embeddings, vision.pre_layrnorm, vision.post_layernorm, model.visual_projection]
        for part in [*frozen, *vision.encoder.layers[: frozen_vision_layers - 1]]:
            part.requires_grad_(False)


def learning_rate_factor(update: int, total: int, config: OptimizationConfig) -> float:
    """Linear warm-up, then a cosine that is not shifted by it; relative to the peak learning rate."""
    floor = config.min_learning_rate / config.learning_rate
    if update < config.warmup_steps:
        return (update + 1) / config.warmup_steps
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * min(update / total, 1)))


def choose_precision(mixed_precision: str) -> str:
    """Resolves "auto": bfloat16 where the hardware multiplies it (CPUs with AVX-512 BF16 or AMX, most GPUs)."""
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def parse_arguments(stage: str, argv: Sequence[str] | None, description: str) -> tuple[StageConfig, bool]:
    """Command line of a stage script: a configuration file and dotted overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG_DIR / f"{stage}.yaml"), help="YAML file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="start again although a finished run is there")
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
    return config, arguments.overwrite


def run_as_script(main: Callable[[], object]) -> None:
    """Runs a stage script: what its user can mend ends with one paragraph and exit code 2; `--debug` shows more."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(2)


def run_stage(config: StageConfig, build: Callable[[StageConfig], StageParts], overwrite: bool = False) -> Path:
    """
    Trains one stage and returns the folder of its model. A run that is finished with the same configuration is reused;
    one that was interrupted goes on from its last checkpoint.
    """
    output_dir = Path(config.output_dir)
    model_dir, config_path = output_dir / "model", output_dir / "config.yaml"
    resolved = yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False)
    # the build changes with the code that draws the phantom; as a comment, the file stays a configuration
    resolved += f"# data build: {_data_build(config.data)}\n"
    same = config_path.is_file() and config_path.read_text(encoding="utf-8") == resolved
    same = same and not _older_than(config_path, (config.init_from, config.generator_from))
    if same and not overwrite and (model_dir / "config.json").is_file():
        logger.warning("%s: reusing the finished run in %s.", config.stage, output_dir)
        return model_dir
    if model_dir.exists() and not config_path.is_file():
        raise ValueError(f"{output_dir} holds a model that no run has written; set `output_dir` to another folder.")

    accelerator = Accelerator(
        gradient_accumulation_steps=config.optimization.gradient_accumulation_steps,
        mixed_precision=choose_precision(config.mixed_precision),
        log_with=list(config.tracking.trackers) or None,
        project_dir=str(output_dir),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)],
    )
    set_seed(config.seed)
    parts = build(config)
    if config.attn_implementation is not None:
        parts.supervision.model.set_attn_implementation(config.attn_implementation)
    count, batch_size = len(parts.train_data), config.optimization.batch_size
    if count < batch_size * accelerator.num_processes:
        raise ValueError(
            f"The training split has {count} items, too few for one batch of {batch_size} in each of "
            f"{accelerator.num_processes} processes. Lower optimization.batch_size or add data."
        )
    if accelerator.is_main_process:  # only now: what was there before survives a mistake in the configuration
        if not same or overwrite:
            for name in RUN_FILES:
                _remove(output_dir / name)
        output_dir.mkdir(parents=True, exist_ok=True)
        config_path.write_text(resolved, encoding="utf-8")
    accelerator.wait_for_everyone()
    if config.tracking.trackers:
        accelerator.init_trackers(config.stage)
    set_seed(config.seed)
    _train(accelerator, config, parts, output_dir)
    if accelerator.is_main_process:
        temporary = output_dir / "model.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        parts.save(temporary)
        shutil.rmtree(model_dir, ignore_errors=True)
        temporary.rename(model_dir)
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.free_memory()
    return model_dir


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


def _train(accelerator: Accelerator, config: StageConfig, parts: StageParts, output_dir: Path) -> None:
    options, tracking = config.optimization, config.tracking
    loader = DataLoader(
        parts.train_data,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=parts.collate,
        num_workers=config.num_workers,
    )
    validation_loader = DataLoader(
        torch.utils.data.Subset(
            parts.validation_data, range(min(tracking.validation_images, len(parts.validation_data)))
        ),
        batch_size=options.batch_size,
        collate_fn=parts.collate,
    )
    parameters = [parameter for parameter in parts.supervision.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    module, optimizer, loader = accelerator.prepare(parts.supervision, optimizer, loader)
    updates_per_epoch = math.ceil(len(loader) / options.gradient_accumulation_steps)
    total = options.max_steps if options.max_steps is not None else options.epochs * updates_per_epoch

    state = TrainingState()
    accelerator.register_for_checkpointing(state)
    history = History(output_dir / "history.jsonl", config.stage, accelerator)
    if checkpoint := _newest_checkpoint(output_dir):
        accelerator.load_state(str(checkpoint))
        logger.warning("%s: resuming at update %d of %d from %s.", config.stage, state.update, total, checkpoint)
    history.truncate(state.update)

    progress = tqdm(
        total=total, initial=state.update, desc=config.stage, disable=not accelerator.is_main_process, mininterval=1.0
    )
    start, seconds_before = time.perf_counter(), state.seconds
    module.train()
    while state.update < total:
        loader.set_epoch(state.epoch)
        batches = skip_first_batches(loader, state.batch) if state.batch else loader
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate_factor(state.update, total, options)
            seed = config.seed + 1_000_000 * state.epoch + state.batch
            # Random numbers depend on the place in the run alone: a resumed run draws what the original would have.
            torch.manual_seed(seed + 2_000_003 * (accelerator.process_index + 1))
            with accelerator.accumulate(module):
                losses = module(batch, seed=seed, epoch=state.epoch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients and options.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            state.batch += 1
            if not accelerator.sync_gradients:
                continue
            state.update += 1
            state.seconds = seconds_before + time.perf_counter() - start
            progress.update()
            history.add(losses)
            last, saves = state.update >= total, _due(state.update, tracking.save_every)
            if last or saves or _due(state.update, tracking.log_every):  # a checkpoint has no unwritten metrics
                entry = history.write(state, "train", lr=optimizer.param_groups[0]["lr"])
                progress.set_postfix(loss=f"{entry['loss']:.3f}")
                if not math.isfinite(entry["loss"]):
                    raise FloatingPointError(
                        f"The loss of {config.stage} became {entry['loss']} by update {state.update}. Its terms are "
                        f"in {history.path}. Lower optimization.learning_rate, or set mixed_precision=no."
                    )
            if last or _due(state.update, tracking.validate_every):
                _validate(accelerator, module, validation_loader, history, state)
            if saves and not last:
                _save_checkpoint(accelerator, output_dir, state)
            if last:
                break
        else:
            state.epoch, state.batch = state.epoch + 1, 0
    progress.close()


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


@dataclass
class TrainingState:
    """Where a run stands: finished updates, epoch, batches of the epoch, seconds of training."""

    update: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, int | float]:
        return dict(vars(self))

    def load_state_dict(self, values: dict[str, int | float]) -> None:
        vars(self).update(values)


class History:
    """Metrics of a run, one JSON object for each line."""

    def __init__(self, path: Path, stage: str, accelerator: Accelerator):
        self.path, self.stage, self.accelerator = path, stage, accelerator
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: collections.Counter[str] = collections.Counter()  # a step need not have all terms

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
        self.counts.update(losses.keys())

    def write(self, state: TrainingState, split: str, **extra: float) -> dict[str, float]:
        """Appends the means since the last call; returns them."""
        means = {
            name: self.accelerator.reduce(value, "mean").item() / self.counts[name]
            for name, value in self.sums.items()
        }
        self.sums, self.counts = {}, collections.Counter()
        entry = {"stage": self.stage, "split": split, "step": state.update, "seconds": round(state.seconds, 2)}
        entry |= extra | means
        self.accelerator.log({f"{split}/{name}": value for name, value in (extra | means).items()}, step=state.update)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return entry

    def truncate(self, update: int) -> None:
        """Removes what was written after the checkpoint that the run resumes from, perhaps cut off by a kill."""
        if self.accelerator.is_main_process and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= update]
            temporary = self.path.with_suffix(".partial")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self.path)


@torch.no_grad()
def _validate(
    accelerator: Accelerator, module: nn.Module, loader: DataLoader, history: History, state: TrainingState
) -> None:
    """Mean losses on validation images without augmentation; one fixed seed makes the values comparable."""
    module.eval()
    validation = History(history.path, history.stage, accelerator)
    for batch in loader:
        if hasattr(batch, "to"):
            batch = batch.to(accelerator.device)
        validation.add(accelerator.unwrap_model(module)(batch, seed=0))
    validation.write(state, "validation")
    module.train()


def _save_checkpoint(accelerator: Accelerator, output_dir: Path, state: TrainingState) -> None:
    """Written under a temporary name and renamed, so that a kill never leaves half a checkpoint; two are kept."""
    folder = output_dir / "checkpoints"
    temporary, final = folder / f"update-{state.update:08d}.partial", folder / f"update-{state.update:08d}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in sorted(folder.glob("update-????????"))[:-2]:
            shutil.rmtree(old)


def _newest_checkpoint(output_dir: Path) -> Path | None:
    return max((output_dir / "checkpoints").glob("update-????????"), default=None)


__all__ = [
    "StageParts",
    "TrainingData",
    "choose_precision",
    "learning_rate_factor",
    "load_data",
    "load_stage_model",
    "parse_arguments",
    "read_data",
    "run_as_script",
    "run_stage",
    "set_trainable",
]
