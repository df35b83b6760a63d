"""The configured data of a stage: the phantom, or prepared data sets mixed, as batches of both splits."""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import datasets

from processing_chex import ChexImageProcessor
from processing_chex.prompt_sets import PromptSet, merge_prompt_sets, prompts_for_classes
from training.collate import MixedDataset, RecordDataset, TextTable, repeats_of
from training.configuration import DataConfig
from training.data.phantom import PhantomChestXray, phantom_datasets
from training.data.prepared import open_prepared, read_info
from training.data.record import record_classes


logger = logging.getLogger(__name__)


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


def data_build(config: DataConfig) -> str:
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
    key = (tuple(sorted(vars(config).items())), data_build(config))
    return _read_data(key, repr(image_processor.to_dict()), _Hidden(config), _Hidden(image_processor))


__all__ = ["TrainingData", "data_build", "load_data", "read_data"]
