"""The prompt tokenizer of CLIP, also from the merges file of its official code."""

import gzip
import os
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from .errors import ChexInputError


CLIP_MODEL = "openai/clip-vit-base-patch32"
CLIP_VOCAB_SIZE = 49408
CONTEXT_LENGTH = 77
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer_from_merges(path: str | os.PathLike, vocab_size: int = CLIP_VOCAB_SIZE) -> CLIPTokenizer:
    """Build the tokenizer from `bpe_simple_vocab_16e6.txt.gz`, packed or not.

    Its vocabulary: 256 bytes, 256 bytes that end a word, one entry for each merge, start and end of text. The file
    holds more merges than any CLIP uses; the first `vocab_size - 514` are taken.

    Raises:
        ChexInputError: the file is no list of merges, or has too few of them.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ChexInputError(
            f"{path} is no list of BPE merges ({error}): name bpe_simple_vocab_16e6.txt.gz."
        ) from error
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    num_merges = vocab_size - len(base) - 2
    merges = [tuple(line.split()) for line in text.split("\n")[1 : num_merges + 1]]  # the first line is a header
    if num_merges < 0 or len(merges) < num_merges or any(len(merge) != 2 for merge in merges):
        raise ChexInputError(
            f"{path} does not hold the {num_merges} BPE merges of a vocabulary of {vocab_size} tokens: name "
            "bpe_simple_vocab_16e6.txt.gz, as it comes with CLIP's code."
        )
    tokens = [*base, *map("".join, merges), START_OF_TEXT, END_OF_TEXT]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)


def load_clip_tokenizer(source: str | None = None, vocab_size: int = CLIP_VOCAB_SIZE) -> CLIPTokenizer:
    """Load the tokenizer of a prompt encoder with `vocab_size` tokens.

    Args:
        source: a folder, a Hub id or a merges file; by default CLIP's, if it is in the Hub cache.
        vocab_size: what the encoder expects; the end token has to be the last.

    Raises:
        ChexInputError: there is none, or it is of another vocabulary.
    """
    if source is not None and os.path.isfile(source):
        return clip_tokenizer_from_merges(source, vocab_size)
    try:
        tokenizer, cause = CLIPTokenizer.from_pretrained(source or CLIP_MODEL, local_files_only=source is None), None
    except Exception as error:  # a damaged file can fail in any way
        tokenizer, cause = None, error
    # From a folder or a repository without a vocabulary comes a tokenizer of special tokens alone.
    if tokenizer is None or len(tokenizer) < 514:
        where = source or f"{CLIP_MODEL} in the Hub cache"
        raise ChexInputError(
            f"There is no CLIP tokenizer at {where}: give a folder, a Hub id such as {CLIP_MODEL}, or CLIP's "
            "bpe_simple_vocab_16e6.txt.gz with --clip-tokenizer, or convert without with --no-tokenizers."
        ) from cause
    if len(tokenizer) != vocab_size or tokenizer.eos_token_id != vocab_size - 1:
        raise ChexInputError(
            f"The CLIP tokenizer {source or CLIP_MODEL} has {len(tokenizer)} tokens and ends texts with token "
            f"{tokenizer.eos_token_id}, but the prompt encoder expects {vocab_size} tokens and ends texts with the "
            "last one. Give the tokenizer of this model with --clip-tokenizer."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, CONTEXT_LENGTH)
    return tokenizer


__all__ = ["CLIP_MODEL", "clip_tokenizer_from_merges", "load_clip_tokenizer"]
