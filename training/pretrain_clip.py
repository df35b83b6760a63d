"""
Contrastive pre-training of the prompt encoder and the image encoder from scratch, on radiographs and their reports. It
stands in for CheXzero's weights, from which the published model starts.

    accelerate launch training/pretrain_clip.py --config training/configs/phantom/pretrain_clip.yaml \\
        output_dir=runs/clip
"""

from collections.abc import Sequence
from pathlib import Path

from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import anatomy_prompts
from training.build_tokenizers import build_tokenizers
from training.collate import occurring_texts
from training.configuration import StageConfig, check_model_keys, model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import set_trainable
from training.stage_data import read_data
from training.supervision import ContrastiveSupervision
from training.transforms import Augmentation


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, model_keys(ChexConfig))
    if config.is_official:
        raise ValueError(
            "objective_mode=official has no effect in contrastive pre-training, which the official code does not do."
        )
    model_config = ChexConfig(**config.model | {"post_decoder_config": None, "generator_config": None})
    image_processor = ChexImageProcessor(size=model_config.vision_config.image_size)
    data = read_data(config.data, image_processor)
    texts = data.texts.texts
    spelled = [texts[number] for number in occurring_texts(data.train, joined=False).tolist()]
    for group in (anatomy_prompts(synonyms=True), data.prompts.positive, data.prompts.negative):
        spelled += [text for synonyms in group.values() for text in synonyms]
    tokenizer, generator_tokenizer = build_tokenizers(
        spelled,
        config.prompt_vocab_size,
        config.generator_vocab_size,
        context_length=model_config.text_config.max_position_embeddings,
    )
    text_config = model_config.text_config
    text_config.vocab_size = len(tokenizer)
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    processor = ChexProcessor(image_processor, tokenizer, generator_tokenizer)

    model = ChexModel(model_config)
    set_trainable(model, config.trainable, config.frozen_vision_layers)
    supervision = ContrastiveSupervision(
        model,
        image_processor,
        tokenizer,
        data.prompts,
        data.texts,
        Augmentation(config.resolved_augmentation, config.seed),
        config.objectives.sentences_per_image,
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return StageParts(supervision, data.train, data.validation, save)


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("pretrain_clip", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
