"""Reads official checkpoints without running code from them, checks them, and writes their tensors as safetensors."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from .configuration_chex import ChexConfig
from .conversion import (
    CheckpointError,
    config_from_clip,
    config_from_official,
    convert_official_state_dict,
    normalize_official_keys,
    official_from_clip,
    official_key,
    official_shapes,
)


CHUNK_SIZE = 2**24  # elements that are converted and written at a time
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TIED_KEY = "sentence_generator.language_model.lm_head.weight"
TIED_TO = "sentence_generator.language_model.transformer.wte.weight"

# Besides tensors, training results hold these harmless objects. None of them is needed, so none is built: whatever is
# made from one of these names is a `_Placeholder`. Every other name is refused.
_PLACEHOLDER_NAMES = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Int32", "Int64", "Float16", "Float32", "Float64")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "slice", "str", "tuple")),
    *(f"builtins.{name}" for name in ("frozenset", "range")),
    *("typing.Any", "argparse.Namespace", "types.SimpleNamespace", "uuid.UUID"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Path")),
)


class _Placeholder:
    """Stands for an object that is not needed; ignores everything it is given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*default_factory: Any) -> dict:
    """Stands for `collections.defaultdict`."""
    return {}


def _plain_list(*content: Any) -> list:
    """Stands for `collections.deque`."""
    return []


def find_official_checkpoint(source: Path) -> Path:
    """
    The checkpoint file that an official folder stands for: of its last run, the file with the highest step. (The
    official `checkpoint_best.pth` is the first validation of the run, because no selection metric is configured; it is
    taken only if there is no other.)

    Args:
        source: A file, a `checkpoints` folder, a run folder, or the folder of a model with its runs.

    Raises:
        CheckpointError: There is nothing at `source`, or no checkpoint in it.
    """
    if source.is_file():
        return source
    if not source.exists():
        raise CheckpointError(f"There is no file or folder {source}: name an official checkpoint or its folder.")
    files = [*source.glob("checkpoint_*.pth"), *source.rglob("checkpoints/checkpoint_*.pth")]
    if not files:
        raise CheckpointError(
            f"The folder {source} holds no official checkpoint: there is no checkpoint_*.pth in it, nor in "
            "run_*/checkpoints/ below it. Name the .pth file itself."
        )

    def newest(file: Path) -> tuple[str, int]:
        step = re.fullmatch(r"checkpoint_(\d+)", file.stem)
        return file.parent.parent.name, int(step.group(1)) if step else -1

    return max(files, key=newest)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """
    The dictionary in a file of `torch.save`, memory-mapped: a tensor is read from disk when it is used. Only tensors
    and plain values are built; no code of the file runs.

    Raises:
        CheckpointError: The file is empty, cut off, of another kind, or would need to run code.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes): copy or download it again.")
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        _check_archive(path)
    try:
        stand_ins = [(_Placeholder, name) for name in _PLACEHOLDER_NAMES]
        stand_ins += [(_plain_dict, "collections.defaultdict"), (_plain_list, "collections.deque")]
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(_reading_problem(path, is_archive, error)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint.")
    return checkpoint


def _check_archive(path: Path) -> None:
    """
    Compares each part of a zip file with its checksum, which nothing else would do: tensors are read straight from
    where they lie in the file.

    Raises:
        CheckpointError: The file is cut off, damaged or compressed, or a program.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"The checkpoint {path} is cut off: copy or download it again.")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"{path} is a TorchScript program, which would have to be run to be read, so it is refused. Save its "
                "`state_dict()` with torch.save and convert that file."
            )
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"The checkpoint {path} was packed again with compression, which torch.save does not do: use the "
                    "file as it was saved."
                )
            if part.CRC == 0:  # torch.save writes none if it was told so
                continue
            try:
                with archive.open(part) as file:
                    while file.read(2**20):
                        pass
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"The checkpoint {path} is damaged ({error}): copy or download it again."
                ) from error


def _reading_problem(path: Path, is_archive: bool, error: Exception) -> str:
    if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"{path} was refused: it asks for the Python object {unsafe.group(1)}, which could run code. Nothing of "
            "it was run. If you trust its source, save `config_dict` and `state_dict` of it alone, with torch.save, "
            "where the official code runs, and convert that file."
        )
    if isinstance(error, pickle.UnpicklingError) or not is_archive:
        return (
            f"{path} was refused: it is no checkpoint of torch.save that can be read without running code. Nothing of "
            "it was run. Name a .pth or .pt file with tensors and plain values."
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{path} cannot be read as a checkpoint of torch.save; it may be damaged or cut off ({reason})."


def read_official(
    path: Path, generator_heads: int | None = None
) -> tuple[ChexConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """
    Configuration, tensors in the layout of [`ChexModel`] (memory-mapped views) and official configuration of a
    checkpoint of stage 1, 2 or 3.

    Args:
        path: The file.
        generator_heads: See `config_from_official`.

    Raises:
        CheckpointError: The file cannot be read safely or is no complete ChEX model; all keys that are unknown,
            missing or of a wrong shape are listed.
    """
    checkpoint = read_checkpoint(path)
    missing = [name for name in ("state_dict", "config_dict") if not isinstance(checkpoint.get(name), dict)]
    if missing:
        raise CheckpointError(
            f"{path} is no ChEX checkpoint: it lacks {' and '.join(missing)} (it holds: {_names(checkpoint)}). Name "
            "the file that the official training saved as checkpoint_<step>.pth."
        )
    state_dict, config_dict = checkpoint["state_dict"], checkpoint["config_dict"]
    if not any(str(key).startswith(("img_encoder.", "detector.")) for key in state_dict):
        raise CheckpointError(
            f"{path} holds no image encoder and no prompt detector (its keys start with: "
            f"{_names({str(key).split('.')[0] for key in state_dict})}): convert the checkpoint of stage 1, 2 or 3."
        )
    state_dict = _checked(path, state_dict)
    config = config_from_official(config_dict, state_dict, generator_heads)
    return config, _convert(path, state_dict, _expected_shapes(config)), config_dict


def read_clip(path: Path) -> tuple[ChexConfig, dict[str, torch.Tensor]]:
    """
    Configuration of a stage-1 model and its two encoders, from a state dict of OpenAI's CLIP such as CheXzero's: the
    file holds the state dict itself, or it under the key `state_dict`.

    Raises:
        CheckpointError: As for `read_official`.
    """
    checkpoint = read_checkpoint(path)
    state_dict = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state_dict, dict) or not {"visual.conv1.weight", "visual.proj"} & state_dict.keys():
        raise CheckpointError(
            f"{path} is no CLIP state dict with a vision transformer: it has no visual.conv1.weight (it holds: "
            f"{_names(state_dict if isinstance(state_dict, dict) else checkpoint)})."
        )
    state_dict = _checked(path, official_from_clip({str(key): value for key, value in state_dict.items()}))
    config = config_from_clip(state_dict)
    encoders = ("img_encoder.", "txt_encoder.")
    expected = {key: shape for key, shape in _expected_shapes(config).items() if key.startswith(encoders)}
    return config, _convert(path, state_dict, expected)


def _names(keys: Any) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _checked(path: Path, state_dict: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The state dict with normalised keys. Everything in it has to be an ordinary tensor of floating-point numbers."""
    tensors = normalize_official_keys({str(key): value for key, value in state_dict.items()})
    wrong = [f"{key} is {kind}" for key, value in tensors.items() if (kind := _unusual_kind(value)) is not None]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} entries of the state dict in {path} are no floating-point tensors: {', '.join(wrong)}."
        )
    return tensors


def _unusual_kind(value: Any) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.dtype not in SOURCE_DTYPES:
        return f"of type {str(value.dtype).removeprefix('torch.')}"
    if value.layout != torch.strided or value.is_meta:
        return "sparse or without values"
    return None


def _expected_shapes(config: ChexConfig) -> dict[str, tuple[int, ...]]:
    try:
        return official_shapes(config)
    except Exception as error:  # values of the configuration can be impossible in any way
        raise CheckpointError(
            f"The configuration in the checkpoint cannot be used: no model can be built from it "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error


def _convert(
    path: Path, state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Compares all keys and shapes, then renames."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    wrong_shape = [
        f"{key} is {shape} instead of {expected[key]}"
        for key, shape in shapes.items()
        if key in expected and shape != expected[key]
    ]
    problems = {
        "unknown": sorted(shapes.keys() - expected.keys()),
        "missing": sorted(expected.keys() - shapes.keys()),
        "of a wrong shape": sorted(wrong_shape),
    }
    found = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"The keys of {path} are not those of a complete model. {'; '.join(found)}.")
    return convert_official_state_dict(state_dict)


def write_safetensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, max_shard_size: int | str
) -> None:
    """
    Writes `model.safetensors`, or shards with an index, in the given dtype. Tensors are converted and written piece by
    piece, so that hardly any memory is needed besides the pages of a memory-mapped source.

    Raises:
        CheckpointError: Values that are infinite or not a number, or become so in `dtype`; the keys are listed.
    """
    tensors = dict(tensors)
    if TIED_KEY in tensors:
        if not torch.equal(tensors[TIED_KEY], tensors[TIED_TO]):
            raise CheckpointError(
                "The output layer of the language model (lm_head) differs from its embeddings (wte)."
            )
        del tensors[TIED_KEY]
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    not_finite = []
    for filename, names in plan.filename_to_tensors.items():
        not_finite += _write_shard(folder / filename, {name: tensors[name] for name in names}, dtype)
    if not_finite:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{len(not_finite)} tensors hold values that are not a number, or infinite in {kind}: "
            f"{', '.join(dict.fromkeys(map(official_key, not_finite)))}."
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[str]:
    """One safetensors file; returns the names of tensors with values that are not finite."""
    # `safetensors.torch.save_file` needs all tensors of the file converted, in memory and at once.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, not_finite = 0, []
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            finite = True
            for piece in tensor.detach().reshape(-1).split(CHUNK_SIZE):
                piece = piece.to(dtype)
                finite = finite and bool(piece.isfinite().all())
                file.write(piece.contiguous().view(torch.uint8).numpy())
            if not finite:
                not_finite.append(name)
    return not_finite


__all__ = ["find_official_checkpoint", "read_checkpoint", "read_clip", "read_official", "write_safetensors"]
