"""What a model folder, the training runs behind it and its evaluation say about a model. For model cards."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import yaml

from processing_chex.errors import ChexInputError


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
RESULTS = "results.json"
# Folders beside a model folder in which `chex demo`, the benchmark and the documentation put an evaluation.
RESULT_PLACES = ("evaluation", "../evaluation", "../../evaluation", "../full/evaluation", "../fast/evaluation")
RUN_PLACES = ("..", "../full/stage3", "../fast/stage3")
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class DataTerms:
    """
    A data set that a model was trained on, and what its terms mean for the weights.

    Attributes:
        name: On the command line of `chex data`.
        title, url: For people.
        licence: Of the data.
        free: Whether weights that were trained on it may be passed on without asking anyone.
        population: Whose radiographs they are.
        citation: BibTeX key in `model_card.CITATIONS`, or None.
    """

    name: str
    title: str
    url: str | None
    licence: str
    free: bool
    population: str
    citation: str | None = None


CREDENTIALED = "PhysioNet Credentialed Health Data License 1.5.0"
_BOSTON = "one hospital in Boston, United States, 2011 to 2016, emergency department, adults"
DATA_TERMS = {
    terms.name: terms
    for terms in (
        DataTerms(
            "mimic-cxr",
            "MIMIC-CXR-JPG with the reports of MIMIC-CXR",
            "https://physionet.org/content/mimic-cxr-jpg/",
            CREDENTIALED,
            False,
            _BOSTON,
            "johnson2019mimic",
        ),
        DataTerms(
            "chest-imagenome",
            "Chest ImaGenome (regions of MIMIC-CXR)",
            "https://physionet.org/content/chest-imagenome/",
            CREDENTIALED,
            False,
            _BOSTON,
            "wu2021chest",
        ),
        DataTerms(
            "ms-cxr",
            "MS-CXR (phrases of MIMIC-CXR)",
            "https://physionet.org/content/ms-cxr/",
            CREDENTIALED,
            False,
            _BOSTON,
            "boecking2022making",
        ),
        DataTerms(
            "vindr-cxr",
            "VinDr-CXR",
            "https://physionet.org/content/vindr-cxr/",
            CREDENTIALED,
            False,
            "two hospitals in Hanoi, Vietnam, 2018 to 2020, adults",
            "nguyen2022vindr",
        ),
        DataTerms(
            "nih-cxr14",
            "NIH ChestX-ray14",
            "https://nihcc.app.box.com/v/ChestXray-NIHCC",
            "free use; the NIH Clinical Center asks to be named and the paper to be cited",
            True,
            "NIH Clinical Center, Bethesda, United States, 1992 to 2015",
            "wang2017chestx",
        ),
        DataTerms("own", "own data", None, "not known to this package", False, "not known to this package"),
        DataTerms(
            "phantom",
            "the phantom (synthetic radiographs)",
            None,
            "no licence needed, as a program draws it",
            True,
            "nobody: the images are drawn",
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """
    A training run.

    Attributes:
        stage: "stage3", for instance.
        data_sets: Names as in `DATA_TERMS`; "unknown" where a folder could not be asked any more.
        images: Training images where the configuration tells (the phantom), or None.
        steps: Updates that the history records, and `seconds` of training; None without a history.
        losses: Last values of the validation (or else training) split.
        settings: A few hyper-parameters by name.
        starts_from: Names of the Hub or of files that are no runs, from which it was initialised.
    """

    stage: str
    data_sets: tuple[str, ...]
    images: int | None
    steps: int | None
    seconds: float | None
    losses: Mapping[str, float]
    settings: Mapping[str, Any]
    starts_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """
    Everything a model card is made of.

    Attributes:
        config: config.json.
        parameters: Part -> number of parameters, in the order of size.
        dtype: Of the weights, as safetensors calls them.
        runs: First stage first.
        results: results.json of the evaluation of exactly these weights, or None.
        headline: metrics.json of the demo, used without `results`.
        converted_from: Name of the official checkpoint, or None.
        geometry: Of the image processor.
        notes: What could not be found out, in sentences.
    """

    config: Mapping[str, Any]
    parameters: Mapping[str, int]
    dtype: str
    runs: tuple[Run, ...] = ()
    results: Mapping[str, Any] | None = None
    headline: Mapping[str, Any] | None = None
    converted_from: str | None = None
    geometry: str = "center_crop"
    notes: tuple[str, ...] = field(default=())

    @property
    def stage(self) -> int:
        if self.config.get("post_decoder_config") is None:
            return 1
        return 2 if self.config.get("generator_config") is None else 3

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @cached_property
    def data_sets(self) -> tuple[str, ...]:
        """Names of all runs, and those of official checkpoints; "unknown" where something is not known."""
        names = dict.fromkeys(name for run in self.runs for name in run.data_sets)
        if self.converted_from is not None:
            # Table 1 of the paper: trained on Chest ImaGenome (images and reports of MIMIC-CXR) and VinDr-CXR.
            names |= dict.fromkeys(("mimic-cxr", "chest-imagenome", "vindr-cxr"))
        if not names or any(run.starts_from for run in self.runs):
            names |= {"unknown": None}
        return tuple(names)

    @property
    def free(self) -> bool:
        """Whether nothing is known or suspected that forbids passing the weights on."""
        return all(name in DATA_TERMS and DATA_TERMS[name].free for name in self.data_sets)

    @property
    def credentialed(self) -> bool:
        return any(name in DATA_TERMS and DATA_TERMS[name].licence == CREDENTIALED for name in self.data_sets)

    @property
    def synthetic(self) -> bool:
        return self.data_sets == ("phantom",)


def read_facts(folder: str | Path, results: str | Path | None = None, run: str | Path | None = None) -> ModelFacts:
    """
    Collect what is known about a model.

    Args:
        folder: Of the model.
        results: Folder (or results.json) of an evaluation of it; by default looked for beside the folder.
        run: Folder of the training run that wrote it; by default looked for beside the folder. Earlier stages are
            found through `init_from` and `generator_from` of its config.yaml.

    Raises:
        ChexInputError: A file is damaged, or the named results belong to other weights.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    parameters, dtype = count_parameters(folder)
    notes: list[str] = []
    found_run = _named_run(Path(run)) if run is not None else _find_run(folder)
    runs = tuple(_lineage(found_run, notes)) if found_run is not None else ()
    evaluation, headline = _find_results(folder, results, notes)
    converted = _converted_from(folder)
    if not runs and converted is None:
        notes.append("No training run was found (config.yaml beside the model folder): name it with --run.")
    processor = folder / "processor_config.json"
    geometry = _read_json(processor).get("image_processor", {}).get("geometry") if processor.is_file() else None
    return ModelFacts(
        config, parameters, dtype, runs, evaluation, headline, converted, geometry or "center_crop", tuple(notes)
    )


def count_parameters(folder: Path) -> tuple[dict[str, int], str]:
    """
    Parameters of each part of a model, largest first, and the dtypes of the weights, from the headers alone.

    Raises:
        ChexInputError: No weights, or a file that is no safetensors file.
    """
    files = weight_files(folder)
    if not files:
        raise ChexInputError(f"The model folder {folder} has no model.safetensors: train or convert the model again.")
    counts: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name == "__metadata__":
                continue
            size = prod(tensor["shape"])
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + size
            dtypes[tensor["dtype"]] = dtypes.get(tensor["dtype"], 0) + size
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    order = sorted(dtypes, key=dtypes.__getitem__, reverse=True)
    return (
        dict(sorted(counts.items(), key=lambda item: -item[1])),
        " and ".join(names.get(dtype, dtype) for dtype in order),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that Transformers loads: model.safetensors, or else those that the index names; left-overs are not."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    names = set(_read_json(index).get("weight_map", {}).values())
    if not all(isinstance(name, str) and WEIGHTS.fullmatch(name) for name in names):
        raise ChexInputError(f"{index} is damaged: save the model again.")
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ChexInputError(f"{folder} lacks {', '.join(missing)}, which {index.name} names: copy it again.")
    return [folder / name for name in sorted(names)]


def read_header(path: Path) -> dict[str, Any]:
    """
    The header of a safetensors file: name -> dtype, shape, offsets.

    Raises:
        ChexInputError: The file is damaged or incomplete.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"{path.stat().st_size:,} bytes instead of {8 + length + end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ChexInputError(f"{path} is no complete safetensors file ({error}): save or copy it again.") from error
    return header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChexInputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ChexInputError(f"{path} is no valid JSON ({error}): write it again.") from error
    if not isinstance(content, dict):
        raise ChexInputError(f"{path} holds no JSON object: write it again.")
    return content


def _converted_from(folder: Path) -> str | None:
    """Of the card that `chex convert` or `model_card.model_card` writes."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    match = re.search(r"converted from\s+`([^`]+)`", path.read_text(encoding="utf-8", errors="replace"))
    return match.group(1) if match else None


# Training runs


def _named_run(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise ChexInputError(f"--run {run} is no folder of a training run: it has no config.yaml.")
    return run


def _find_run(folder: Path) -> Path | None:
    for place in RUN_PLACES:
        run = Path(folder.absolute() / place).resolve()
        if (run / "config.yaml").is_file() and _same_weights(folder, run / "model"):
            return run
    return None


def _same_weights(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same weights; the same folder does without reading them."""
    if folder.resolve() == other.resolve():
        return True
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in other.glob("*.safetensors")):
        return False
    pairs = [(folder / name, other / name) for name in names]
    if any(one.stat().st_size != two.stat().st_size for one, two in pairs):
        return False
    from evaluation.inference import file_sha256

    return all(file_sha256(one) == file_sha256(two) for one, two in pairs)


def _lineage(run: Path, notes: list[str], seen: frozenset[Path] = frozenset()) -> Iterator[Run]:
    """The run and those that it started from, earliest first."""
    config = _read_yaml(run / "config.yaml")
    outside = []
    earlier: list[Run] = []
    for key in ("init_from", "generator_from", "generator_init"):
        source = config.get(key)
        if not isinstance(source, str):
            continue
        parent = next((place for place in _places(source, run) if (place / "config.yaml").is_file()), None)
        if parent is None and Path(source).is_dir():
            parent = _find_run(Path(source))
        if parent is None:
            outside.append(_last_names(source))
            notes.append(f"What {config.get('stage')} started from ({_last_names(source)}) has no run beside it.")
        elif parent not in seen:
            earlier += _lineage(parent, notes, seen | {run.resolve()})
            seen |= {parent}
    yield from {(one.stage, one.data_sets, one.steps): one for one in earlier}.values()
    yield _describe_run(run, config, tuple(outside), notes)


def _places(source: str, run: Path) -> Iterator[Path]:
    """Where the run of a model that a configuration names may be: as written, or beside this run after a move."""
    path = Path(source)
    yield path.parent.resolve()
    if len(path.parts) > 1:
        yield (run.absolute().parent / path.parts[-2]).resolve()


def _last_names(source: str) -> str:
    """Of a path no more than the last two names: it may tell about the machine."""
    return "/".join(Path(source).parts[-2:])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ChexInputError(
            f"{path} cannot be read as the configuration of a run ({type(error).__name__})."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("stage"), str):
        raise ChexInputError(f"{path} is no configuration of a training run: it names no stage.")
    return config


def _describe_run(run: Path, config: dict[str, Any], outside: tuple[str, ...], notes: list[str]) -> Run:
    data, optimization = config.get("data") or {}, config.get("optimization") or {}
    images = None
    if data.get("dataset") == "phantom":
        names, images = ["phantom"], data.get("num_train")
    else:
        names = [_data_set_of(str(subset.get("folder")), notes) for subset in data.get("subsets") or ()]
    steps, seconds, losses = _last_losses(run / "history.jsonl")
    wanted = ("batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "ema_decay")
    settings = {name: optimization[name] for name in wanted if optimization.get(name) is not None}
    settings |= {name: config[name] for name in ("mixed_precision", "seed") if config.get(name) is not None}
    if config.get("lora"):
        settings["lora_rank"] = config["lora"].get("rank", config["lora"].get("r"))
    return Run(
        config["stage"],
        tuple(dict.fromkeys(names)) or ("unknown",),
        images,
        steps,
        seconds,
        losses,
        settings,
        outside,
    )


def _data_set_of(folder: str, notes: list[str]) -> str:
    """Name of the data set of a prepared folder: its manifest tells, or else its name if that is a known one."""
    manifest = Path(folder) / "manifest.json"
    if manifest.is_file():
        name = _read_json(manifest).get("dataset")
        if name in DATA_TERMS:
            return name
    if Path(folder).name in DATA_TERMS and Path(folder).name not in ("own", "phantom"):
        return Path(folder).name
    notes.append(f"The prepared data {_last_names(folder)} are not there any more, so their terms are not known.")
    return "unknown"


def _last_losses(history: Path) -> tuple[int | None, float | None, dict[str, float]]:
    if not history.is_file():
        return None, None, {}
    last: dict[str, dict[str, Any]] = {}
    for line in history.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that a killed run has left behind
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            last[str(entry.get("split"))] = entry
    entry = last.get("validation") or last.get("train") or {}
    skipped = ("step", "seconds", "lr", "epoch")
    losses = {
        name: float(value)
        for name, value in entry.items()
        if name not in skipped and isinstance(value, int | float) and not isinstance(value, bool)
    }
    steps = max((entry["step"] for entry in last.values()), default=None)
    return steps, max((float(entry.get("seconds", 0)) for entry in last.values()), default=None), losses


# Evaluation


def _find_results(
    folder: Path, named: str | Path | None, notes: list[str]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(results.json of these weights, metrics.json of the demo), each or None."""
    if named is not None:
        path = Path(named)
        if path.is_dir():
            path /= RESULTS if (path / RESULTS).is_file() or not (path / "metrics.json").is_file() else "metrics.json"
        if not path.is_file():
            raise ChexInputError(f"--results {named}: there is no {RESULTS}; `chex evaluate --output DIR` writes it.")
        content = _read_json(path)
        if path.name == "metrics.json":
            notes.append("metrics.json does not tell which weights it is about.")
            return None, content
        _check_results(content, path)
        if content["model"].get("sha256") != model_sha256(folder):
            raise ChexInputError(
                f"{path} is about other weights than those in {folder}: evaluate this model, or name its results."
            )
        return content, None
    places = [Path(folder.absolute() / place).resolve() / RESULTS for place in RESULT_PLACES]
    sha256 = None
    for path in dict.fromkeys(places):
        if path.is_file():
            content = _read_json(path)
            _check_results(content, path)
            sha256 = sha256 or model_sha256(folder)
            if content["model"].get("sha256") == sha256:
                return content, None
            notes.append(f"{path.parent.name}/{RESULTS} is about other weights and was left out.")
    notes.append("No evaluation of these weights was found: `chex evaluate` makes one; name it with --results.")
    return None, None


def _check_results(content: dict[str, Any], path: Path) -> None:
    tasks = content.get("tasks")
    if not isinstance(tasks, dict) or not isinstance(content.get("model"), dict):
        raise ChexInputError(f"{path} is no result of `chex evaluate`: it has no tasks or no model.")
    if not all(isinstance(task, dict) and isinstance(task.get("metrics"), dict) for task in tasks.values()):
        raise ChexInputError(f"{path} is damaged: a task has no metrics. Run the evaluation again.")


def model_sha256(folder: Path) -> str:
    """As results.json has it: of weights, configuration, processor and tokenizers."""
    from evaluation.inference import ModelSource

    return ModelSource(folder).sha256


__all__ = [
    "DATA_TERMS",
    "DataTerms",
    "ModelFacts",
    "Run",
    "count_parameters",
    "read_facts",
    "read_header",
    "weight_files",
]
