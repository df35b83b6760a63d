"""What stages 1 to 3 and fine-tuning have in common."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from modeling_chex import ChexModel, save_with_code
from processing_chex import ChexProcessor
from training.annotations import annotated_kinds, usable_weights
from training.configuration import StageConfig, nearest
from training.loop import StageParts
from training.lora import ADAPTER_FOLDER, add_adapters, merged_state_dict, save_adapter
from training.model_setup import set_trainable
from training.stage_data import load_data, read_data
from training.supervision import ChexSupervision
from training.transforms import Augmentation


logger = logging.getLogger(__name__)
PROMPT_ENCODER = ("text_model", "text_projection")


def supervised_stage(config: StageConfig, model: ChexModel, processor: ChexProcessor) -> StageParts:
    """Data and supervision of a model whose parts are trained as the configuration says."""
    if frozen := [name for name in config.trainable if name in PROMPT_ENCODER]:
        raise ValueError(
            f"`trainable` names {frozen[0]!r}, but the prompt encoder is frozen in this stage, in which every text is "
            "encoded only once."
        )
    model.float()  # it may be stored in half precision, in which small updates would be lost
    if model.sentence_generator is not None and config.generator_from:
        # the generator comes with the tokenizer that it was pre-trained with, which earlier stages need not have
        sentences = ChexProcessor.from_pretrained(config.generator_from).generator_tokenizer
        processor = ChexProcessor(processor.image_processor, processor.tokenizer, sentences)
    data = read_data(config.data, processor.image_processor)
    set_trainable(model, config.trainable, config.frozen_vision_layers, first_norm=config.is_official)
    if config.lora is not None:
        add_adapters(model.sentence_generator, config.lora)
    trained = {name for name, part in model.named_children() if any(p.requires_grad for p in part.parameters())}
    weights, off = usable_weights(config.objectives.weights, annotated_kinds(data.train), model, trained)
    if off is not None and PartialState().is_main_process:
        logger.warning("%s: %s", config.stage, off)
    supervision = ChexSupervision(
        model,
        processor.image_processor,
        processor.tokenizer,
        processor.generator_tokenizer,
        data.prompts,
        data.texts,
        replace(config.objectives, weights=weights),
        Augmentation(config.resolved_augmentation, config.seed),
        config.frozen_in_train_mode,
        config.text_cache,
        config.text_feature_dtype,
        config.objective_mode,
    )

    def save(folder: Path) -> None:
        if config.lora is None:
            save_with_code(model, processor, folder)
            return
        save_with_code(model, processor, folder, state_dict=merged_state_dict(model))
        if config.lora.save_adapter:
            save_adapter(model.sentence_generator, folder / ADAPTER_FOLDER)

    evaluate = task_evaluation(config, model, processor) if config.tracking.tasks else None
    return StageParts(supervision, data.train, data.validation, save, evaluate=evaluate)


def task_evaluation(config: StageConfig, model: ChexModel, processor: ChexProcessor) -> Callable[[], dict[str, float]]:
    """
    A function that runs the tasks of `tracking.tasks` on the first validation images of each configured data set, with
    default post-processing. It returns `task/<name>`: the headline value of the task, of several data sets the mean,
    with `task/<name>/<folder>` for each. What is undefined, for lack of annotations, is left out.

    Raises:
        ValueError: An unknown task, or one that writes sentences while the model has no generator. The function
            raises it where a task cannot be run on any of the data sets.
    """
    # Here, not above: the evaluation builds upon training.
    from evaluation.engine import NothingToRun, Options, evaluate_model
    from evaluation.tasks.catalog import FREE_TASKS, TASKS

    tracking = config.tracking
    for name in tracking.tasks:
        if name not in FREE_TASKS:
            raise ValueError(f"tracking.tasks: unknown task {name!r}. {nearest(name, FREE_TASKS, 'tasks')}")
        if TASKS[name].needs_text and model.sentence_generator is None:
            raise ValueError(
                f"tracking.tasks: {name} reads generated sentences, which the model of {config.stage} "
                "does not write yet: leave it out."
            )
    folders = [Path(subset.folder).name for subset in config.data.subsets] or ["phantom"]
    parts = {
        folder: part for folder, part in zip(folders, load_data(config.data), strict=True) if "validation" in part
    }

    options = Options(
        resamples=0,
        examples=0,
        progress=False,
        batch_size=config.optimization.batch_size,
        limit=tracking.task_images,
        metrics=(*(TASKS[name].headline for name in tracking.tasks), "micro_f1_14"),
    )

    def evaluate() -> dict[str, float]:
        values, skipped = {}, {}
        for folder, part in parts.items():
            try:
                result = evaluate_model(model, processor, part, tracking.tasks, split="validation", options=options)
            except NothingToRun as error:
                skipped |= dict.fromkeys(tracking.tasks, str(error))
                continue
            for name, task in result["tasks"].items():
                headline = task["headline"]
                if task.get("texts", 1) and headline in task["not_computed"]:
                    skipped[name] = task["not_computed"][headline]
                elif (value := task["metrics"].get(headline, {}).get("value")) is not None:
                    values.setdefault(name, {})[folder] = value
        if missing := set(skipped) - set(values):
            raise ValueError("; ".join(f"tracking.tasks: {name} cannot be run: {skipped[name]}" for name in missing))
        means = {f"task/{name}": sum(found.values()) / len(found) for name, found in values.items()}
        if len(parts) > 1:
            means |= {
                f"task/{name}/{folder}": value for name, found in values.items() for folder, value in found.items()
            }
        return means

    return evaluate


__all__ = ["supervised_stage", "task_evaluation"]
