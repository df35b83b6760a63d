"""The published chexbert.pth as a folder for `ChexbertLabeler`. No code of the file runs."""

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertModel, BertTokenizer

from modeling_chex.conversion import CheckpointError
from modeling_chex.official_checkpoint import read_checkpoint
from processing_chex.errors import ChexInputError

from .chexbert import ChexbertConfig, ChexbertModel


BERT_MODEL = "bert-base-uncased"
HEAD_WIDTH = 64  # of every published BERT; the checkpoint does not tell the number of attention heads
_UNUSED = ("bert.pooler.", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_WORDS = "bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class ChexbertConversion:
    """What was written: `num_parameters` of `checkpoint` into the folder `output`."""

    checkpoint: Path
    output: Path
    num_parameters: int


def published_shapes(config: ChexbertConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all parameters of the published file, without "module.": BERT with its pooler, and heads."""
    with torch.device("meta"):
        bert, heads = BertModel(config), ChexbertModel(config).linear_heads
    return {
        f"{prefix}.{name}": tuple(parameter.shape)
        for prefix, module in (("bert", bert), ("linear_heads", heads))
        for name, parameter in module.named_parameters()
    }


def read_chexbert(path: Path) -> tuple[ChexbertConfig, dict[str, torch.Tensor]]:
    """
    Configuration and tensors of [`ChexbertModel`] from chexbert.pth: a dictionary with "model_state_dict", whose keys
    may start with "module." (of the training on several GPUs), or that dictionary itself.

    Raises:
        CheckpointError: The file cannot be read safely, or is no complete CheXbert; all keys that are unknown, missing
            or of a wrong shape are listed.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}: name the published chexbert.pth.")
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model_state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"The `model_state_dict` of {path} is a {type(state).__name__}, not a dictionary.")
    tensors = {str(key).removeprefix("module."): value for key, value in state.items()}
    if _WORDS not in tensors or not any(key.startswith("linear_heads.") for key in tensors):
        starts = sorted({".".join(key.split(".")[:2]) for key in tensors})
        raise CheckpointError(
            f"{path} is no CheXbert checkpoint: it has no BERT with 14 linear heads (its keys start with "
            f"{', '.join(starts[:8]) or 'nothing'}). Name the published chexbert.pth."
        )
    wrong = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise CheckpointError(f"These entries of {path} are no tensors: {', '.join(sorted(wrong))}.")
    config = _config(path, tensors)
    expected = published_shapes(config)
    found = {key: tuple(value.shape) for key, value in tensors.items() if key not in _UNUSED}
    problems = {
        "unknown": sorted(found.keys() - expected.keys()),
        # Nothing reads the pooler, so a file without it is complete.
        "missing": sorted(key for key in expected.keys() - found.keys() if not key.startswith(_UNUSED)),
        "of a wrong shape": [
            f"{key} is {shape} instead of {expected[key]}"
            for key, shape in sorted(found.items())
            if key in expected and shape != expected[key]
        ],
        "without floating-point numbers": sorted(key for key in found if not tensors[key].is_floating_point()),
        "with values that are infinite or not a number": sorted(
            key for key in found if tensors[key].is_floating_point() and not bool(tensors[key].isfinite().all())
        ),
    }
    listed = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise CheckpointError(f"The keys of {path} are not those of a complete CheXbert. {'; '.join(listed)}.")
    kept = {key: value.to(torch.float32) for key, value in tensors.items() if not key.startswith(_UNUSED)}
    return config, kept


def _config(path: Path, tensors: Mapping[str, torch.Tensor]) -> ChexbertConfig:
    """Sizes from shapes; bert-base-uncased where a key that tells one is missing, which the check of keys will say."""
    default = ChexbertConfig()

    def size(key: str, other: int) -> int:
        return tensors[key].shape[0] if key in tensors and tensors[key].ndim else other

    prefix = "bert.encoder.layer."
    layers = {int(number) for key in tensors if key.startswith(prefix) if (number := key.split(".")[3]).isdecimal()}
    if tensors[_WORDS].ndim != 2:
        raise CheckpointError(f"{_WORDS} of {path} has the shape {tuple(tensors[_WORDS].shape)}, not (tokens, width).")
    vocab_size, width = tensors[_WORDS].shape
    if width % HEAD_WIDTH:
        raise CheckpointError(f"The BERT in {path} is {width} wide, which is no multiple of {HEAD_WIDTH}.")
    return ChexbertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=max(layers, default=default.num_hidden_layers - 1) + 1,
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=size(f"{prefix}0.intermediate.dense.weight", default.intermediate_size),
        max_position_embeddings=size("bert.embeddings.position_embeddings.weight", default.max_position_embeddings),
        type_vocab_size=size("bert.embeddings.token_type_embeddings.weight", default.type_vocab_size),
    )


def load_bert_tokenizer(source: str | None, vocab_size: int) -> BertTokenizer:
    """
    The uncased WordPiece tokenizer of a CheXbert.

    Args:
        source: A vocab.txt, a folder with one, or a Hub id; by default bert-base-uncased, if it is in the Hub cache.
        vocab_size: Tokens that the model has embeddings for.

    Raises:
        ChexInputError: There is none, it keeps case, or its number of tokens is another.
    """
    where = source or BERT_MODEL
    path = Path(where).expanduser()
    try:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(lines)})
        else:
            name = str(path) if path.is_dir() else where
            tokenizer = BertTokenizer.from_pretrained(name, local_files_only=source is None)
        cause = None
    except Exception as error:  # a damaged file can fail in any way
        tokenizer, cause = None, error
    if tokenizer is None or len(tokenizer) <= 5:  # five special tokens alone come from a folder without a vocabulary
        raise ChexInputError(
            f"There is no BERT tokenizer at {where}: give the vocab.txt of bert-base-uncased, a folder with it, or a "
            "Hub id such as bert-base-uncased, with --tokenizer."
        ) from cause
    if len(tokenizer) != vocab_size:
        raise ChexInputError(
            f"The tokenizer {where} has {len(tokenizer)} tokens, but the checkpoint {vocab_size}: give that of "
            "bert-base-uncased with --tokenizer."
        )
    if tokenizer.tokenize("EDEMA") != tokenizer.tokenize("edema"):
        raise ChexInputError(f"The tokenizer {where} keeps case; CheXbert reads bert-base-uncased.")
    return tokenizer


def convert_chexbert(
    source: Path, output: Path, tokenizer: str | None = None, overwrite: bool = False
) -> ChexbertConversion:
    """
    Convert chexbert.pth into a folder for `chexbert:FOLDER`.

    Args:
        source: The published file.
        output: A new folder. It appears when everything is written; after an error nothing is left of it.
        tokenizer: See `load_bert_tokenizer`.
        overwrite: Replace a CheXbert that is there.

    Raises:
        ChexInputError: An argument, the checkpoint or the tokenizer is unusable; the message says why.
    """
    output = output.expanduser().absolute()
    _check_output(source, output, overwrite)
    suffix = secrets.token_hex(4)
    temporary, replaced = (output.parent / f".{output.name}.{suffix}.{kind}" for kind in ("partial", "replaced"))
    try:
        config, tensors = read_chexbert(source)
        words = load_bert_tokenizer(tokenizer, config.vocab_size)
        output.parent.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = ChexbertModel(config)
        model.load_state_dict(tensors, assign=True, strict=True)
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)
        if output.exists():
            output.rename(replaced)
        try:
            temporary.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
    except CheckpointError as error:
        raise ChexInputError(str(error)) from error
    except OSError as error:
        raise ChexInputError(f"The conversion stopped: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return ChexbertConversion(source, output, sum(tensor.numel() for tensor in tensors.values()))


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ChexInputError(f"{output} is a file: name a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ChexInputError(f"{output} is there already: name another folder, or replace it with --overwrite.")
    try:
        kind = json.loads((output / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != ChexbertConfig.model_type:
        raise ChexInputError(f"{output} holds files that are no CheXbert, so it is not replaced: name another folder.")
    if source.resolve().is_relative_to(output.resolve()):
        raise ChexInputError(f"{source} lies in {output}, which would be replaced: name another output folder.")


__all__ = [
    "ChexbertConversion",
    "convert_chexbert",
    "load_bert_tokenizer",
    "published_shapes",
    "read_chexbert",
]
