"""Training configuration: typed YAML files with dotted overrides, checked key by key."""

import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedConfig

from training.lora import LoraOptions
from training.objectives import AnatomyOptions, ObjectiveMode, ObjectiveWeights, PathologyOptions, SentenceOptions
from training.text_features import FeatureDtype


CONFIG_DIR = Path(__file__).parent / "configs"
# Keys that have moved
RENAMED = {"objectives.mode": "objective_mode"}


@dataclass(frozen=True)
class SubsetConfig:
    """
    A data set that `chex data prepare` has written, as a part of a mixture.

    `balance` repeats it until it is as large as the largest one, and `factor` so many times again (or less, below 1).
    """

    folder: str = ""
    factor: float = 1.0
    balance: bool = False

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("each of data.subsets needs a `folder`, which `chex data prepare` has written.")
        if self.factor <= 0:
            raise ValueError(f"the factor of {self.folder} must be greater than 0, not {self.factor!r}.")


@dataclass
class DataConfig:
    """
    What to train on: the phantom, described by the fields of its builder configuration, or prepared data sets.

    `side` is that of the square images from which augmentation crops, by default that of the network input.
    `in_memory` keeps them all decoded in memory (by default only the phantom, which is small).
    """

    dataset: Literal["phantom", "prepared"] = "phantom"
    subsets: tuple[SubsetConfig, ...] = ()
    cache_dir: str = "runs/data"
    seed: int = 7
    image_size: int = 128
    num_train: int = 8000
    num_validation: int = 400
    num_test: int = 800
    num_proc: int = 2
    side: int | None = None
    in_memory: bool | None = None

    def __post_init__(self) -> None:
        if self.dataset == "prepared" and not self.subsets:
            raise ValueError("data.dataset=prepared needs data.subsets, such as [{folder: data/chest-imagenome}].")
        if self.dataset == "phantom" and self.subsets:
            raise ValueError("data.subsets has no effect on the phantom: set data.dataset=prepared.")


@dataclass
class AugmentationConfig:
    """
    Random changes of training images; the defaults are the paper's, without the mirroring.

    `flip`: "reference" mirrors images but leaves the names of sides as they are, as the official code does;
    "consistent" exchanges left and right in anatomies and texts as well; "off" mirrors nothing. By default
    `objective_mode` decides: "off", or "reference" with "official".
    """

    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    rotation: float = 10.0
    translation: float = 0.02
    scale: tuple[float, float] = (0.95, 1.0)
    flip: Literal["off", "reference", "consistent"] | None = None
    flip_probability: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 5.0)


@dataclass
class OptimizationConfig:
    """
    AdamW with cosine schedule. `max_steps` (optimiser updates) has precedence over `epochs`. With `ema_decay` (such as
    0.999), validation and the saved models use the moving average of the weights.
    """

    batch_size: int = 256
    gradient_accumulation_steps: int = 1
    epochs: int = 50
    max_steps: int | None = None
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-7
    warmup_steps: int = 1000
    weight_decay: float = 1e-5
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, not be {self.ema_decay!r}.")
        if self.max_steps is not None and self.max_steps <= 0:
            raise ValueError(f"max_steps must be greater than 0, not {self.max_steps!r}.")
        for name in ("batch_size", "gradient_accumulation_steps", "epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)!r}.")


@dataclass
class ObjectiveConfig:
    """Which terms with which coefficients and settings."""

    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    sentence: SentenceOptions = field(default_factory=SentenceOptions)
    pathology: PathologyOptions = field(default_factory=PathologyOptions)
    anatomy: AnatomyOptions = field(default_factory=AnatomyOptions)
    region_encoding: Literal["token", "bbox", "random"] = "token"
    multi_anatomies: bool = True
    anatomies_per_step: int | None = 20  # for detection and MSE
    anatomies_per_classification: int | None = None  # with a number: decode only so many, for all terms
    classes_per_step: int | None = 10
    sentences_per_image: int | None = None
    sentences_per_generation: int = 32


@dataclass
class TrackingConfig:
    """
    How often to log, validate and save, in optimiser updates; 0 validates and saves at the end only. The newest
    `keep_checkpoints` checkpoints stay. `tasks` names tasks of the evaluation that validation runs on the first
    `task_images` validation images.
    """

    log_every: int = 20
    validate_every: int = 0
    validation_images: int = 256
    save_every: int = 0
    keep_checkpoints: int = 2
    tasks: tuple[str, ...] = ()
    task_images: int = 64
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)!r}.")
        for name in ("validation_images", "keep_checkpoints", "task_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}.")


@dataclass
class SelectionConfig:
    """
    The best models of a run, by a metric that validation measures: `loss` or one of its terms (smaller is better),
    `metric/...` or `task/...` (greater is better). Several, separated by commas, count by their harmonic mean. The
    best `keep_best` models are kept in `best/`; the last one is kept in any case. With `patience`, a run stops after
    so many validations in a row that improved the best value by no more than `min_delta`.
    """

    metric: str | None = None
    keep_best: int = 1
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.metric is None:
            if self.patience is not None:
                raise ValueError("patience needs a metric that is to improve: set selection.metric.")
            return
        if not all(self.names):
            raise ValueError(f"metric must be a name or several separated by commas, not {self.metric!r}.")
        if len({_greater_is_better(name) for name in self.names}) > 1:
            raise ValueError(
                f"metric {self.metric!r} mixes losses, of which smaller ones are better, with `metric/` or `task/`."
            )
        if self.keep_best < 0 or self.min_delta < 0 or (self.patience is not None and self.patience < 1):
            raise ValueError("keep_best and min_delta must not be negative, and patience must be at least 1.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.metric.split(",")) if self.metric is not None else ()

    @property
    def greater_is_better(self) -> bool:
        return _greater_is_better(self.names[0])


def _greater_is_better(name: str) -> bool:
    return name.startswith(("metric/", "task/"))


@dataclass
class StageConfig:
    """
    One training stage. Validated when it is loaded; see `load_config`.

    `objective_mode`: "official" brings back what the official training does although it is wrong or unintended;
    docs/official-differences.md lists it all. By default it is right. `keep_frozen_in_train_mode` follows it.
    """

    stage: str = ""
    output_dir: str = ""
    init_from: str | None = None
    generator_from: str | None = None
    generator_init: str | None = None  # folder or Hub id of a GPT-2, from which generator pre-training starts
    trainable: tuple[str, ...] = ()
    frozen_vision_layers: int = 0
    objective_mode: ObjectiveMode = "corrected"
    keep_frozen_in_train_mode: bool | None = None  # by default with objective_mode=official only
    model: dict[str, Any] = field(default_factory=dict)
    prompt_vocab_size: int = 1024
    generator_vocab_size: int = 1024
    seed: int = 42
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = "no"  # auto: bf16 where the hardware is faster with it
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False  # less memory for activations, which are computed twice
    compile: str | None = None  # backend of torch.compile for the parts of the model, such as inductor
    num_workers: int = 0
    text_feature_dtype: FeatureDtype = "float32"  # of the features of texts that are kept in data.cache_dir
    lora: LoraOptions | None = None  # trains adapters of the sentence generator instead of its weights
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)

    def __post_init__(self) -> None:
        if self.lora is not None and "sentence_generator" not in self.trainable:
            raise ValueError("lora adapts the sentence generator: add sentence_generator to trainable.")
        if self.selection.patience is not None and self.tracking.validate_every == 0:
            raise ValueError("selection.patience counts validations, so set tracking.validate_every above 0.")
        for name in self.selection.names:
            kind, *rest = name.split("/")
            task = rest[0] if rest else ""
            if kind == "task" and task not in self.tracking.tasks:
                raise ValueError(
                    f"selection.metric names {name!r}, but tracking.tasks does not. "
                    f"{nearest(task, self.tracking.tasks, 'tasks there')}"
                )

    @property
    def text_cache(self) -> Path:
        """Folder in which features of texts are kept for all runs."""
        return Path(self.data.cache_dir) / "text_features"

    @property
    def is_official(self) -> bool:
        """Whether the defects of the official training are wanted."""
        return self.objective_mode == "official"

    @property
    def frozen_in_train_mode(self) -> bool:
        """Whether dropout and the like stay active in parts that are not trained."""
        return self.is_official if self.keep_frozen_in_train_mode is None else self.keep_frozen_in_train_mode

    @property
    def resolved_augmentation(self) -> AugmentationConfig:
        """The augmentation, in which `flip` has a value."""
        if self.augmentation.flip is not None:
            return self.augmentation
        return replace(self.augmentation, flip="reference" if self.is_official else "off")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in which nothing depends on `objective_mode` any more."""
        return asdict(
            replace(
                self,
                augmentation=self.resolved_augmentation,
                keep_frozen_in_train_mode=self.frozen_in_train_mode,
            )
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """
    Reads a YAML file and applies overrides such as `optimization.batch_size=64` (values are YAML).

    Raises:
        ValueError: An unknown key (the message names the nearest valid one), a value of the wrong type, a malformed
            override, or a file that is not a YAML mapping.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no training configuration at {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of configuration keys, not a {type(values).__name__}.")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"The override {override!r} must have the form section.key=value.")
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(section.setdefault(parent, {}), dict):
                raise ValueError(f"The override {override!r} goes through {parent!r}, which is not a section.")
            section = section[parent]
        try:
            section[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"The value of the override {override!r} is not valid YAML; quote it if it is text."
            ) from error
    return _build(StageConfig, values, str(path))


def read_resolved(text: str) -> dict[str, Any] | None:
    """
    What `StageConfig.to_dict` gave, from the file of a run, which an earlier version may have written: options that it
    did not have yet get their defaults. None if this version cannot read it.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            values.setdefault(new, values[section].pop(key))
    try:
        return _build(StageConfig, values, "").to_dict()
    except ValueError:
        return None


def model_keys(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Settings that a model configuration has; those of a part are the value of its key, otherwise it is None."""
    known = dict.fromkeys([*(item.name for item in fields(config_class)), *config_class.attribute_map])
    for name, part in getattr(config_class, "sub_configs_defaults", {}).items():
        known[name] = model_keys(getattr(part, "config_class", part))
    return known | {"attn_implementation": None}


def check_model_keys(values: Mapping[str, Any], known: Mapping[str, Any], where: str = "model") -> None:
    """
    Checks the free section `model` of a stage, because model configurations silently keep what they do not know.

    Args:
        known: Settings with an effect in this stage, as from `model_keys`.

    Raises:
        ValueError: A setting has no effect; the message names the nearest one that has.
    """
    _check_keys(values, known, where)
    for key, value in values.items():
        if known[key] is not None and isinstance(value, Mapping):
            check_model_keys(value, known[key], f"{where}.{key}")


def _check_keys(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in known:
            section = where.rpartition(": ")[2]
            meant = RENAMED.get(f"{section}.{key}")
            hint = f"It is now called {meant!r}." if meant else nearest(str(key), known, "keys")
            raise ValueError(f"{where}: unknown key {key!r}. {hint}")


def nearest(name: str, known: Collection[str], what: str) -> str:
    """The known name that was probably meant, or all of them, as a sentence for an error message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known {what}: {', '.join(known) or 'none'}."


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    _check_keys(values, {item.name: item for item in fields(cls)}, where)
    hints = typing.get_type_hints(cls)
    arguments = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as the annotated type: sections become dataclasses, lists tuples, integers floats."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a section and needs a mapping of keys, not {value!r}.")
        return _build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(kind for kind in arguments if kind is not type(None)), value, where)
    if origin is typing.Literal:
        if value is False:  # what YAML makes of the words no and off
            value = next((word for word in ("no", "off") if word in arguments), value)
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, not {value!r}.")
        return value
    if origin is tuple:
        variadic = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (variadic or len(value) == len(arguments)):
            raise ValueError(f"{where} must be a list of {'values' if variadic else len(arguments)}, not {value!r}.")
        kinds = [arguments[0]] * len(value) if variadic else arguments
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    kind = origin or hint
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value


__all__ = [
    "CONFIG_DIR",
    "AugmentationConfig",
    "DataConfig",
    "ObjectiveConfig",
    "OptimizationConfig",
    "SelectionConfig",
    "StageConfig",
    "SubsetConfig",
    "TrackingConfig",
    "check_model_keys",
    "load_config",
    "model_keys",
    "nearest",
    "read_resolved",
]
