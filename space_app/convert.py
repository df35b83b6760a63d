"""Turn checkpoints of the official ChEX and of CheXzero into model folders. Nothing is printed here."""

import re
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, GPT2Config

from modeling_chex import ChexConfig, ChexGeneratorConfig, ChexModel, add_code
from modeling_chex.conversion import CheckpointError, clip_names
from modeling_chex.official_checkpoint import (
    find_official_checkpoint,
    read_clip,
    read_official,
    write_safetensors,
)
from processing_chex import ChexImageProcessor, ChexInputError, ChexProcessor
from processing_chex.clip_tokenizer import load_clip_tokenizer
from processing_chex.generator_tokenizer import GENERATOR_MODEL, load_generator_tokenizer
from space_app.model_card import chexzero_card, official_card


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        checkpoint: the file that was read.
        output: the model folder.
        num_parameters: of all parts, a tied matrix counted once.
        missing: what the folder lacks for use with `ChexProcessor` and how to add it; None if it is complete.
        generator_heads_guessed: the number of attention heads, if nothing but the width of the language model told it.
    """

    checkpoint: Path
    output: Path
    num_parameters: int
    missing: str | None = None
    generator_heads_guessed: int | None = None


def convert_official(
    source: Path,
    output: Path,
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    clip_tokenizer: str | None = None,
    generator_tokenizer: str | None = None,
    generator_heads: int | None = None,
    tokenizers: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """Convert an official checkpoint of stage 1, 2 or 3 into a folder for `ChexModel` and `ChexProcessor`.

    Args:
        source: the checkpoint file, or a folder of the official training (see `find_official_checkpoint`).
        output: a new folder. It appears when everything is written; after an error nothing is left of it.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_size: such as "2GB".
        clip_tokenizer: folder, Hub id or merges file; default: CLIP's from the Hub cache.
        generator_tokenizer: folder or Hub id; default: the one that the checkpoint names, from the Hub cache.
        generator_heads: attention heads of the language model, which the checkpoint does not hold. Default: from the
            config.json of the language model, if it is there, or heads of width 64 (two in a tiny model).
        tokenizers: False writes model and image processor alone.
        overwrite: replace a model folder that is there.

    Raises:
        ChexInputError: an argument, the checkpoint or a tokenizer is unusable; the message says why.
    """
    with _input_errors(), _new_folder(source, output, overwrite) as folder:
        checkpoint = find_official_checkpoint(source)
        config, tensors, official = read_official(checkpoint, generator_heads)
        generator = config.generator_config
        decoder = official.get("txt_decoder") or {}
        heads = generator_heads
        if generator is not None and heads is None:
            heads = _configured_heads(generator_tokenizer, generator.n_embd)
            heads = heads or _configured_heads(decoder.get("language_model_url"), generator.n_embd, cached=True)
            generator.n_head = heads or generator.n_head  # no tensor depends on it
        image_processor = ChexImageProcessor(size=config.vision_config.image_size)
        if tokenizers:
            clip = load_clip_tokenizer(clip_tokenizer, config.text_config.vocab_size)
            sentences = None
            if generator is not None:
                if decoder.get("language_model_url", GENERATOR_MODEL) != GENERATOR_MODEL and not generator_tokenizer:
                    raise ChexInputError(
                        f"The sentence generator of {checkpoint} was trained from {decoder['language_model_url']!r}: "
                        "give its tokenizer with --generator-tokenizer, or convert without with --no-tokenizers."
                    )
                sentences = load_generator_tokenizer(generator_tokenizer, generator.vocab_size)
                for kind in ("bos", "eos", "pad"):
                    setattr(generator, f"{kind}_token_id", sentences.eos_token_id)
            ChexProcessor(image_processor, clip, sentences).save_pretrained(folder)
        else:
            image_processor.save_pretrained(folder)
        _write_model(folder, config, tensors, dtype, max_shard_size, tokenizers)
        if generator is not None:
            _generation_config(generator, decoder.get("generation_kwargs") or {}).save_pretrained(folder)
        num_parameters = _count(tensors)
        card = official_card(config, checkpoint.name, num_parameters, dtype, with_tokenizers=tokenizers)
        (folder / "README.md").write_text(card, encoding="utf-8")
    guessed = generator.n_head if generator is not None and heads is None else None
    return Conversion(
        checkpoint, output, num_parameters, None if tokenizers else _missing(generator is not None), guessed
    )


def convert_chexzero(
    source: Path,
    output: Path,
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    clip_tokenizer: str | None = None,
    tokenizers: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """Convert CheXzero, or any CLIP with a vision transformer in OpenAI's format, into what stage 1 starts from: a
    `ChexModel` folder with the two encoders. The prompt detector is not in it; training initialises it.

    Args and errors: as for `convert_official`; the source is a file.
    """
    with _input_errors(clip_names), _new_folder(source, output, overwrite) as folder:
        if not source.is_file():
            raise ChexInputError(f"There is no file {source}: name the .pt file of a CLIP state dict.")
        config, tensors = read_clip(source)
        image_processor = ChexImageProcessor(size=config.vision_config.image_size)
        if tokenizers:
            clip = load_clip_tokenizer(clip_tokenizer, config.text_config.vocab_size)
            ChexProcessor(image_processor, clip).save_pretrained(folder)
        else:
            image_processor.save_pretrained(folder)
        _write_model(folder, config, tensors, dtype, max_shard_size, tokenizers)
        num_parameters = _count(tensors)
        (folder / "README.md").write_text(chexzero_card(source.name, num_parameters, dtype), encoding="utf-8")
    return Conversion(source, output, num_parameters, None if tokenizers else _missing(False))


def _count(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("lm_head.weight"))


def _missing(with_generator: bool) -> str:
    names = "the CLIP tokenizer" + (" and the GPT-2 tokenizer in generator_tokenizer/" if with_generator else "")
    return (
        f"{names}: convert again with them, or save `ChexProcessor(image_processor, tokenizer"
        f"{', generator_tokenizer' if with_generator else ''})` into the folder"
    )


def _configured_heads(source: str | None, width: int, cached: bool = False) -> int | None:
    """Attention heads of the GPT-2 of this width at a folder or Hub id, None if its configuration is not there."""
    if not isinstance(source, str):
        return None
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=cached)
    except (OSError, ValueError):
        return None
    return config.n_head if isinstance(config, GPT2Config) and config.n_embd == width else None


def _write_model(
    folder: Path,
    config: ChexConfig,
    tensors: dict[str, torch.Tensor],
    dtype: str,
    max_shard_size: str,
    with_processor: bool,
) -> None:
    if dtype not in DTYPES:
        raise ChexInputError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}.")
    size = re.fullmatch(r"([1-9]\d*)([KMGT]B)", max_shard_size.strip().upper())
    if size is None:
        raise ChexInputError(f"--max-shard-size {max_shard_size} is not a size: write a number and a unit, like 2GB.")
    needed, free = _count(tensors) * DTYPES[dtype].itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise ChexInputError(
            f"The model needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on the disk of "
            f"{folder.parent}: free some space or choose another folder."
        )
    config.architectures, config.dtype = ["ChexModel"], DTYPES[dtype]
    config.save_pretrained(folder)
    add_code(folder, ChexModel, ChexProcessor if with_processor else None, ChexImageProcessor)
    write_safetensors(folder, tensors, DTYPES[dtype], size.group())


def _generation_config(generator: ChexGeneratorConfig, official: dict[str, Any]) -> GenerationConfig:
    """What the official code passes to `generate`, as a file that `from_pretrained` reads."""
    unknown = sorted(official.keys() - vars(GenerationConfig()).keys())
    counts = [name for name in ("max_length", "num_beams") if not _is_count(official.get(name, 1))]
    if unknown or counts:
        values = ", ".join(f"{name} is {official[name]!r}" for name in unknown + counts)
        raise CheckpointError(f"txt_decoder.generation_kwargs cannot be used for generation: {values}.")
    values = {"max_length": generator.max_generation_length, "do_sample": False, "num_beams": 1} | official
    tokens = {name: getattr(generator, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**values | tokens)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@contextmanager
def _input_errors(rewrite: Callable[[str], str] = str) -> Generator[None, None, None]:
    try:
        yield
    except CheckpointError as error:
        raise ChexInputError(rewrite(str(error))) from error
    except OSError as error:
        raise ChexInputError(f"The conversion stopped: {error}.") from error


@contextmanager
def _new_folder(source: Path, output: Path, overwrite: bool) -> Generator[Path, None, None]:
    """A temporary folder beside `output` that takes its place at the end, unless the block fails."""
    output = output.absolute()
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise ChexInputError(f"{output} is there already: name another folder, or replace it with --overwrite.")
        config = output / "config.json"
        if not config.is_file() or '"chex"' not in config.read_text(encoding="utf-8", errors="replace"):
            raise ChexInputError(f"{output} holds files that are no ChEX model, so it is not replaced: name another.")
        if source.resolve().is_relative_to(output.resolve()):
            raise ChexInputError(f"{source} lies in {output}, which would be replaced: name another output folder.")
    elif output.exists() and not output.is_dir():
        raise ChexInputError(f"{output} is a file: name a folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    suffix = secrets.token_hex(4)
    temporary, replaced = (output.parent / f".{output.name}.{suffix}.{kind}" for kind in ("partial", "replaced"))
    temporary.mkdir()
    try:
        yield temporary
        if output.exists():
            output.rename(replaced)
        try:
            temporary.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


__all__ = ["DTYPES", "Conversion", "convert_chexzero", "convert_official"]
