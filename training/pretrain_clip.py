"""
Contrastive pre-training of the prompt encoder and the image encoder from scratch, on radiographs and their reports. It
stands in for CheXzero's weights, from which the published model starts.

    accelerate launch training/pretrain_clip.py --config training/configs/phantom/pretrain_clip.yaml \
        output_dir=runs/clip
"""

from collections.abc import Sequence
from pathlib import Path

from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import anatomy_prompts, class_prompts
from training.build_tokenizers import build_tokenizers
from training.configuration import StageConfig, check_model_keys, model_keys
from training.loop import StageParts, load_data, parse_arguments, read_records, run_as_script, run_stage, set_trainable
from training.supervision import ContrastiveSupervision


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, model_keys(ChexConfig))
    splits = load_data(config.data)
    texts = [text for row in splits["train"]["sentences"] for text in row]
    texts += [text for row in splits["train"]["anatomy_sentences"] for region in row for text in region]
    prompts = class_prompts(config.data.dataset)
    for group in (anatomy_prompts(synonyms=True), prompts.positive, prompts.negative):
        texts += [text for synonyms in group.values() for text in synonyms]
    model_config = ChexConfig(**config.model | {"post_decoder_config": None, "generator_config": None})
    tokenizer, generator_tokenizer = build_tokenizers(
        texts,
        config.prompt_vocab_size,
        config.generator_vocab_size,
        context_length=model_config.text_config.max_position_embeddings,
    )
    text_config = model_config.text_config
    text_config.vocab_size = len(tokenizer)
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    image_processor = ChexImageProcessor(size=model_config.vision_config.image_size)
    processor = ChexProcessor(image_processor, tokenizer, generator_tokenizer)

    train, validation, table = read_records(config.data, processor)
    model = ChexModel(model_config)
    set_trainable(model, config.trainable, config.frozen_vision_layers)
    supervision = ContrastiveSupervision(
        model,
        image_processor,
        tokenizer,
        prompts,
        table,
        config.augmentation,
        config.objectives.sentences_per_image or train.arrays["sentences"].shape[1],
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return StageParts(supervision, train, validation, save)


def main(argv: Sequence[str] | None = None) -> Path:
    config, overwrite = parse_arguments("pretrain_clip", argv, __doc__)
    return run_stage(config, build, overwrite)


if __name__ == "__main__":
    run_as_script(main)
