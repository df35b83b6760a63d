"""The tokenizer of the sentence generator, from any GPT-2."""

from transformers import GPT2Tokenizer

from .errors import ChexInputError


GENERATOR_MODEL = "healx/gpt-2-pubmed-medium"


def load_generator_tokenizer(source: str | None = None, vocab_size: int | None = None) -> GPT2Tokenizer:
    """Load a GPT-2 tokenizer whose end token also starts and pads sentences, as ChEX uses it.

    Args:
        source: a folder (`vocab.json` and `merges.txt` are enough) or a Hub id; by default that of the published
            model, if it is in the Hub cache.
        vocab_size: tokens that the language model has embeddings for.

    Raises:
        ChexInputError: there is none, or it has more tokens than the model.
    """
    try:
        tokenizer, cause = (
            GPT2Tokenizer.from_pretrained(source or GENERATOR_MODEL, local_files_only=source is None),
            None,
        )
    except Exception as error:  # a damaged file can fail in any way
        tokenizer, cause = None, error
    # From a folder or a repository without a vocabulary comes a tokenizer of special tokens alone.
    if tokenizer is None or len(tokenizer) < 257:
        where = source or f"{GENERATOR_MODEL} in the Hub cache"
        raise ChexInputError(
            f"There is no GPT-2 tokenizer at {where}: give a folder with vocab.json and merges.txt, or a Hub id such "
            f"as {GENERATOR_MODEL}, with --generator-tokenizer, or convert without with --no-tokenizers."
        ) from cause
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ChexInputError(
            f"The GPT-2 tokenizer {source or GENERATOR_MODEL} has {len(tokenizer)} tokens, but the language model "
            f"knows only {vocab_size}: give the tokenizer that it was trained with."
        )
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


__all__ = ["GENERATOR_MODEL", "load_generator_tokenizer"]
