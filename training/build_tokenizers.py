"""Tokenizers for a small ChEX that is trained from scratch, learned from the texts it will see."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, GPT2Tokenizer


START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))


def build_tokenizers(
    texts: Iterable[str],
    clip_vocab_size: int = 1024,
    generator_vocab_size: int = 1024,
    context_length: int = 77,
) -> tuple[CLIPTokenizer, GPT2Tokenizer]:
    """Learn the prompt and the sentence tokenizer of a model; equal texts, in any order, give equal tokenizers.

    Args:
        texts: prompts and sentences of the training split.
        clip_vocab_size: upper bound of the prompt vocabulary, at least 514.
        generator_vocab_size: upper bound of the sentence vocabulary, at least 257.
        context_length: longest prompt in tokens, start and end included.

    Raises:
        ValueError: if a vocabulary is too small to hold all bytes.
    """
    texts = sorted(texts)
    return (
        build_clip_tokenizer(texts, clip_vocab_size, context_length),
        build_generator_tokenizer(texts, generator_vocab_size),
    )


def build_clip_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int = 77) -> CLIPTokenizer:
    """A lower-casing tokenizer in CLIP's layout: 256 bytes, 256 bytes that end a word, merges, start token, end token.

    The end token has the largest id, which is how CLIP's text encoder finds it, and also pads.
    """
    base = [*BYTES, *(byte + END_OF_WORD for byte in BYTES)]
    merges = _learn_merges(texts, CLIPTokenizer(), vocab_size, reserved=len(base) + 2, end_of_word_suffix=END_OF_WORD)
    vocab = _number([*base, *map("".join, merges), START_OF_TEXT, END_OF_TEXT])
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context_length)


def build_generator_tokenizer(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """A byte-level tokenizer in GPT-2's layout, with `<|endoftext|>` for begin, end and padding."""
    merges = _learn_merges(texts, GPT2Tokenizer(), vocab_size, reserved=len(BYTES) + 1)
    vocab = _number([*BYTES, *map("".join, merges), END_OF_TEXT])
    return GPT2Tokenizer(vocab=vocab, merges=merges, pad_token=END_OF_TEXT)


def _learn_merges(
    texts: Iterable[str],
    pattern: CLIPTokenizer | GPT2Tokenizer,
    vocab_size: int,
    reserved: int,
    end_of_word_suffix: str = "",
) -> list[tuple[str, str]]:
    """The most useful byte pairs of texts cut into words as `pattern` does; `reserved` ids are kept for others."""
    if vocab_size < reserved:
        raise ValueError(f"A vocabulary of {vocab_size} tokens cannot hold all bytes: ask for at least {reserved}.")
    learner = Tokenizer(models.BPE(end_of_word_suffix=end_of_word_suffix))
    if pattern.backend_tokenizer.normalizer is not None:
        learner.normalizer = pattern.backend_tokenizer.normalizer
    learner.pre_tokenizer = pattern.backend_tokenizer.pre_tokenizer
    # The trainer would number the bytes that end a word in the random order in which it meets them, and break ties
    # between pairs by these numbers: naming them first makes the result reproducible.
    trainer = trainers.BpeTrainer(
        special_tokens=[byte + end_of_word_suffix for byte in BYTES] if end_of_word_suffix else [],
        vocab_size=vocab_size + reserved,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(BYTES),
        end_of_word_suffix=end_of_word_suffix,
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges[: vocab_size - reserved]]


def _number(tokens: Iterable[str]) -> dict[str, int]:
    """Ids in order; a token that two merges spell is counted once."""
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}
