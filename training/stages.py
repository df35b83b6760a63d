"""What stages 1 to 3 have in common."""

from pathlib import Path

from modeling_chex import ChexModel, save_with_code
from processing_chex import ChexProcessor
from training.configuration import StageConfig
from training.loop import StageParts, read_data, set_trainable
from training.supervision import ChexSupervision
from training.transforms import Augmentation


def supervised_stage(config: StageConfig, model: ChexModel, processor: ChexProcessor) -> StageParts:
    """Data and supervision of a model whose parts are trained as the configuration says."""
    if model.sentence_generator is not None and config.generator_from:
        # the generator comes with the tokenizer that it was pre-trained with, which earlier stages need not have
        sentences = ChexProcessor.from_pretrained(config.generator_from).generator_tokenizer
        processor = ChexProcessor(processor.image_processor, processor.tokenizer, sentences)
    data = read_data(config.data, processor.image_processor)
    set_trainable(model, config.trainable, config.frozen_vision_layers)
    supervision = ChexSupervision(
        model,
        processor.image_processor,
        processor.tokenizer,
        processor.generator_tokenizer,
        data.prompts,
        data.texts,
        config.objectives,
        Augmentation(config.augmentation, config.seed),
        config.keep_frozen_in_train_mode,
        config.text_cache,
        config.text_feature_dtype,
    )

    def save(folder: Path) -> None:
        save_with_code(model, processor, folder)

    return StageParts(supervision, data.train, data.validation, save)


__all__ = ["supervised_stage"]
