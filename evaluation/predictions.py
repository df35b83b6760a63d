"""Predictions on disk: chunks of images in their order, each written whole, checked when read, and bound to one model.

A folder holds `manifest.json` (what the predictions come from) and `chunk-00000.npz`, ... Chunk k holds the images
k * size, ..., (k + 1) * size - 1 of the split, whichever process made it, so that any number of processes write one
folder and a killed run goes on with what is missing.
"""

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import write_text


FORMAT = 1
MANIFEST = "manifest.json"
_HEADER = "__chunk__"
# Reading a damaged archive fails in as many ways as there are bytes to damage.
_DAMAGE = (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, SyntaxError)


class PredictionError(ValueError):
    """Predictions that cannot be scored; the message names task and image."""


class StalePredictions(ValueError):
    """Stored predictions of another model, other data or other settings."""


class DamagedChunk(ValueError):
    """A chunk that is half-written, changed or of another run."""


@dataclass
class Predictions:
    """
    What one procedure predicts for N images in a row.

    Attributes:
        ids: N sample ids.
        arrays: Name -> array. Its first axis runs over the images, or over all units (boxes, phrases, sentences) of
            all images if the name is in `ragged`.
        counts: (N,) units of each image; zeros where nothing is ragged.
        texts: Name -> one string per unit.
        ragged: Names of arrays that run over units.
    """

    ids: list[str]
    arrays: dict[str, np.ndarray]
    counts: np.ndarray
    texts: dict[str, list[str]] = field(default_factory=dict)
    ragged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.counts = np.asarray(self.counts, dtype=np.int64)
        units = int(self.counts.sum())
        if len(self.counts) != len(self.ids):
            raise PredictionError(f"{len(self.ids)} images have {len(self.counts)} counts; give one each.")
        for name, array in self.arrays.items():
            expected = units if name in self.ragged else len(self.ids)
            if len(array) != expected:
                raise PredictionError(f"The array {name!r} has {len(array)} rows where {expected} belong.")
        for name, texts in self.texts.items():
            if len(texts) != units:
                raise PredictionError(f"There are {len(texts)} texts {name!r} for {units} units.")

    @property
    def starts(self) -> np.ndarray:
        """(N + 1,) where the units of each image begin, and the end."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def owners(self) -> np.ndarray:
        """(units,) index of the image of each unit."""
        return np.repeat(np.arange(len(self.ids)), self.counts)

    def check_finite(self, task: str) -> None:
        """
        Raises:
            PredictionError: A number is NaN or infinite; names task, image and array.
        """
        for name, array in self.arrays.items():
            if not np.issubdtype(array.dtype, np.floating):
                continue
            bad = ~np.isfinite(array.reshape(len(array), -1)).all(1) if array.size else np.zeros(len(array), bool)
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                image = self.ids[int(self.owners[row])] if name in self.ragged else self.ids[row]
                raise PredictionError(
                    f"{task}: the prediction for image {image} has a value in {name!r} that is not a finite number "
                    f"({int(bad.sum())} of {len(bad)} rows are affected). Check the weights of the model, and its "
                    "precision."
                )


def join(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of consecutive images as one."""
    if not parts:
        return Predictions([], {}, np.zeros(0, dtype=np.int64))
    first = parts[0]
    return Predictions(
        ids=[sample_id for part in parts for sample_id in part.ids],
        arrays={name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays},
        counts=np.concatenate([part.counts for part in parts]),
        texts={name: [text for part in parts for text in part.texts[name]] for name in first.texts},
        ragged=first.ragged,
    )


def digest(content: Mapping[str, Any]) -> str:
    """Digest of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PredictionStore:
    """
    A folder of predictions.

    Args:
        folder: Of the chunks.
        origin: Plain values that say what the predictions come from: model, data, split, procedure and its settings.
        chunk_size: Images in a chunk.
    """

    folder: Path
    origin: Mapping[str, Any]
    chunk_size: int

    @property
    def key(self) -> str:
        return digest({**self.origin, "chunk_size": self.chunk_size, "format": FORMAT})

    def chunk_path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.npz"

    def stale(self) -> str | None:
        """What differs between stored predictions and this run; None if nothing does or nothing is stored."""
        path = self.folder / MANIFEST
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Chunks carry the key too, so that nothing wrong is read where only the manifest is lost.
            return None
        if not isinstance(stored, dict) or stored.get("key") == self.key:
            return None
        own = {**self.origin, "chunk_size": self.chunk_size, "format": FORMAT}
        named = {name for name in {*own, *stored} - {"key"} if own.get(name) != stored.get(name)}
        return ", ".join(sorted(named)) or "contents"

    def open(self, overwrite: bool = False) -> None:
        """
        Create the folder and its manifest.

        Raises:
            StalePredictions: It holds predictions of another model, other data or settings, and not `overwrite`.
        """
        difference = self.stale()
        if difference is not None:
            if not overwrite:
                raise StalePredictions(
                    f"{self.folder} holds predictions that differ in: {difference}. They are not mixed with those of "
                    "this run: give another output folder, or --overwrite to make them again."
                )
            shutil.rmtree(self.folder)
        content = {**self.origin, "chunk_size": self.chunk_size, "format": FORMAT, "key": self.key}
        write_text(self.folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write_chunk(self, number: int, predictions: Predictions) -> None:
        """Write one chunk under a temporary name, then rename."""
        header = {
            "key": self.key,
            "ids": predictions.ids,
            "texts": predictions.texts,
            "ragged": list(predictions.ragged),
        }
        buffer = io.BytesIO()
        encoded = np.frombuffer(json.dumps(header, ensure_ascii=False).encode(), dtype=np.uint8)
        arrays = {f"array_{name}": array for name, array in predictions.arrays.items()}
        np.savez(buffer, **{_HEADER: encoded, "counts": predictions.counts}, **arrays)
        path = self.chunk_path(number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # so that a rename is never on disk before the content is
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read_chunk(self, number: int) -> Predictions:
        """
        Raises:
            FileNotFoundError: It has not been made.
            DamagedChunk: It cannot be read, or is of another run.
        """
        path = self.chunk_path(number)
        if not path.is_file():
            raise FileNotFoundError(f"{path} has not been made.")
        try:
            # Reading an array to its end compares its checksum.
            with np.load(path, allow_pickle=False) as archive:
                content = {name: archive[name] for name in archive.files}
            header = json.loads(content.pop(_HEADER).tobytes().decode())
            key = header["key"]
            predictions = Predictions(
                ids=header["ids"],
                arrays={
                    name.removeprefix("array_"): array for name, array in content.items() if name.startswith("array_")
                },
                counts=content["counts"],
                texts=header["texts"],
                ragged=tuple(header["ragged"]),
            )
        except _DAMAGE as error:
            raise DamagedChunk(f"{path} is damaged ({type(error).__name__}: {error}).") from error
        if key != self.key:
            raise DamagedChunk(f"{path} was made by another model, from other data or with other settings.")
        return predictions

    def missing(self, ids: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """Chunks that must be made for images `ids`: their numbers, and what is wrong with a file that is there."""
        for number, wanted in enumerate(chunks_of(ids, self.chunk_size)):
            try:
                found = self.read_chunk(number)
            except FileNotFoundError:
                yield number, None
            except DamagedChunk as error:
                yield number, str(error)
            else:
                # Of other images where the run had another --limit.
                if found.ids != list(wanted):
                    yield number, None

    def read(self, ids: Sequence[str], task: str) -> Predictions:
        """
        The predictions of all images, in their order.

        Args:
            ids: Sample ids of the split.
            task: For error messages.

        Raises:
            PredictionError: Predictions are missing, damaged, not finite, or of images that are not in the split, or
                an image has two.
        """
        known, seen, parts = set(ids), set(), []
        for number, wanted in enumerate(chunks_of(ids, self.chunk_size)):
            try:
                part = self.read_chunk(number)
            except (FileNotFoundError, DamagedChunk) as error:
                raise PredictionError(f"{task}: {error} Run the evaluation without --score-only.") from error
            for sample_id in part.ids:
                if sample_id not in known:
                    raise PredictionError(
                        f"{task}: {self.chunk_path(number)} has a prediction for {sample_id!r}, which is no image of "
                        "the split that is scored."
                    )
                if sample_id in seen:
                    raise PredictionError(
                        f"{task}: {self.chunk_path(number)} has a second prediction for image {sample_id!r}."
                    )
                seen.add(sample_id)
            if part.ids != list(wanted):
                raise PredictionError(
                    f"{task}: {self.chunk_path(number)} does not hold the images {wanted[0]!r} to {wanted[-1]!r} in "
                    "their order. Run the evaluation without --score-only."
                )
            part.check_finite(task)
            parts.append(part)
        return join(parts)


def chunks_of(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


__all__ = ["DamagedChunk", "PredictionError", "PredictionStore", "Predictions", "StalePredictions", "digest", "join"]
