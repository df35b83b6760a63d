"""
Generator pre-training: the sentence generator learns to write a sentence from the feature that the frozen prompt
encoder gives to it. With `generator_init` it starts from a GPT-2 and its tokenizer, otherwise from random weights.

    accelerate launch training/pretrain_generator.py --config training/configs/phantom/pretrain_generator.yaml \\
        output_dir=runs/generator init_from=runs/clip/model
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from modeling_chex import ChexGeneratorConfig, ChexSentenceGenerator
from modeling_chex.conversion import generator_from_gpt2
from processing_chex import ChexProcessor
from processing_chex.generator_tokenizer import load_generator_tokenizer
from training.collate import occurring_texts
from training.configuration import StageConfig, check_model_keys, model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import load_stage_model
from training.stage_data import read_data
from training.supervision import GeneratorSupervision
from training.text_features import TextFeatures


# What can be chosen for a generator whose sizes are those of a GPT-2
CHOICES_WITH_GPT2 = (
    *("prefix_length", "prefix_hidden_size", "prefix_act", "prefix_dropout", "position_offset"),
    *("max_generation_length", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
)


def start(
    config: StageConfig, feature_size: int, processor: ChexProcessor
) -> tuple[ChexSentenceGenerator, PreTrainedTokenizerBase]:
    """
    The generator before training, from a GPT-2 or from scratch, and its tokenizer.

    With `objective_mode=official`, the prefix network has another activation (ReLU) than the configuration that is
    saved with it, and so than in stage 3: officially it is unset here by mistake.
    """
    generator, tokenizer = _start(config, feature_size, processor)
    if config.is_official and "prefix_act" not in config.model:
        generator.prefix_projection.activation_fn = ACT2FN["relu"]
    return generator, tokenizer


def _start(
    config: StageConfig, feature_size: int, processor: ChexProcessor
) -> tuple[ChexSentenceGenerator, PreTrainedTokenizerBase]:
    if config.generator_init is not None:
        tokenizer = load_generator_tokenizer(config.generator_init)
    elif processor.generator_tokenizer is not None:
        tokenizer = processor.generator_tokenizer
    else:
        raise ValueError(
            f"The processor in `init_from` ({config.init_from!r}) has no tokenizer for sentences: set "
            "`generator_init` to a GPT-2 (folder or Hub id), whose tokenizer is taken."
        )
    values = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values |= {"feature_size": feature_size} | config.model
    if config.generator_init is None:
        return ChexSentenceGenerator(ChexGeneratorConfig(**{"vocab_size": len(tokenizer)} | values)), tokenizer
    generator = generator_from_gpt2(config.generator_init, **values)
    if len(tokenizer) > generator.config.vocab_size:
        raise ValueError(
            f"The tokenizer of {config.generator_init!r} has {len(tokenizer)} tokens, but its model only "
            f"{generator.config.vocab_size}."
        )
    return generator, tokenizer


def build(config: StageConfig) -> StageParts:
    if config.lora is not None:
        raise ValueError("`lora` has no effect in generator pre-training: use it in stage 3 or in fine-tuning.")
    if config.generator_init is None:
        check_model_keys(config.model, model_keys(ChexGeneratorConfig))
    else:
        check_model_keys(config.model, dict.fromkeys(CHOICES_WITH_GPT2))
    encoder, processor = load_stage_model(
        config.init_from, "Generator pre-training", post_decoder_config=None, generator_config=None
    )
    generator, tokenizer = start(config, encoder.config.projection_dim, processor)
    processor = ChexProcessor(processor.image_processor, processor.tokenizer, tokenizer)
    data = read_data(config.data, processor.image_processor)
    sentences, held_out = occurring_texts(data.train), occurring_texts(data.validation)
    if len(sentences) == 0:
        raise ValueError("The training data have no sentences, so the generator cannot learn from them.")
    texts = data.texts.texts
    features = TextFeatures(encoder, processor.tokenizer, config.text_cache, config.text_feature_dtype)
    supervision = GeneratorSupervision(
        generator, features.table(texts), tokenizer, texts, objective_mode=config.objective_mode
    )

    def save(folder: Path) -> None:
        generator.save_pretrained(folder)
        processor.save_pretrained(folder)

    return StageParts(supervision, sentences, held_out, save, torch.stack)


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("pretrain_generator", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
