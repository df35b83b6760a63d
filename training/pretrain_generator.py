"""
Generator pre-training: the sentence generator learns to write a sentence from the feature that the frozen prompt
encoder gives to it.

    accelerate launch training/pretrain_generator.py --config training/configs/phantom/pretrain_generator.yaml \
        output_dir=runs/generator init_from=runs/clip/model
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from modeling_chex import ChexGeneratorConfig, ChexSentenceGenerator
from training.collate import RecordDataset
from training.configuration import StageConfig, check_model_keys, model_keys
from training.loop import StageParts, load_stage_model, parse_arguments, read_records, run_as_script, run_stage
from training.supervision import GeneratorSupervision, encode_texts


def occurrences(records: RecordDataset) -> torch.Tensor:
    """Numbers of all sentences of a split, in reports and of anatomies, as often as they occur."""
    sentences = torch.from_numpy(records.arrays["sentences"]).flatten()
    anatomies = torch.from_numpy(records.arrays["anatomy_texts"]).flatten()
    ids = torch.cat([sentences, anatomies])
    return ids[ids >= 0]


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, model_keys(ChexGeneratorConfig))
    encoder, processor = load_stage_model(
        config.init_from, "Generator pre-training", post_decoder_config=None, generator_config=None
    )
    train, validation, texts = read_records(config.data, processor)
    tokenizer = processor.generator_tokenizer
    generator_config = ChexGeneratorConfig(
        **{"feature_size": encoder.config.projection_dim, "vocab_size": len(tokenizer)}
        | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        | config.model
    )
    generator = ChexSentenceGenerator(generator_config)
    features = encode_texts(encoder, processor.tokenizer, texts.texts)
    supervision = GeneratorSupervision(generator, features, tokenizer, texts.texts)

    def save(folder: Path) -> None:
        generator.save_pretrained(folder)
        processor.save_pretrained(folder)

    return StageParts(supervision, occurrences(train), occurrences(validation), save, torch.stack)


def main(argv: Sequence[str] | None = None) -> Path:
    config, overwrite = parse_arguments("pretrain_generator", argv, __doc__)
    return run_stage(config, build, overwrite)


if __name__ == "__main__":
    run_as_script(main)
