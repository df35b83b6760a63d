"""
Texts of training: their features, which are encoded once and then kept on disk, and their tokens.

The prompt encoder is frozen in stages 1 to 3 and in the pre-training of the generator, so the feature of a text
depends on nothing but the text. Features of an encoder are kept in a folder of their own:

    features.bin  one row after another, float32 or float16; memory-mapped, rows never change or move
    index.bin     for each row the digest of its text and a checksum of the row (`ENTRY`)
    lock          held by the process that encodes and appends

A row counts once its entry in the index is there, and is written before it. So a kill at any instant leaves a cache
that is right, and rows without an entry are left unused. What does not fit its checksum is encoded again and appended;
the latest row of a text counts.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_chex import ChexModel


logger = logging.getLogger(__name__)

FeatureDtype = Literal["float32", "float16"]
FORMAT_VERSION = 1
ENTRY = np.dtype([("text", "S16"), ("row", "<u4")])
# Texts that are appended in one go: a kill loses at most so many.
CHUNK = 16_384
# Features of more bytes stay on disk, and the rows of a batch are brought to the device.
DEVICE_BYTES = 256 * 2**20


@torch.no_grad()
def encode_texts(
    model: ChexModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """
    Prompt features (U, D) of texts, in float32 on the CPU. Encodes on the device of this process, long texts together.
    """
    parts = (model.text_model, model.text_projection)
    home, training = model.device, [part.training for part in parts]
    device = PartialState().device
    features = torch.zeros(len(texts), model.config.projection_dim)
    ids = tokenizer(list(texts), truncation=True)["input_ids"] if len(texts) else []
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    for part in parts:
        part.to(device).eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [torch.tensor(ids[number]) for number in chosen]
            tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            features[chosen] = model.get_prompt_features(tokens.to(device)).float().cpu()
    finally:
        for part, was_training in zip(parts, training, strict=True):
            part.to(home).train(was_training)
    return features


def encoder_fingerprint(model: ChexModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that the feature of a text depends on: weights, settings, tokenizer and precision of encoding."""
    settings = model.config.text_config.to_dict()
    for name in ("transformers_version", "dtype", "architectures", "_name_or_path"):
        settings.pop(name, None)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # of the last call
        words.pop(name, None)
    described = {
        "format": FORMAT_VERSION,
        "settings": settings,
        "tokenizer": words,
        "length": tokenizer.model_max_length,
        "precision": torch.get_float32_matmul_precision(),
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for part in (model.text_model, model.text_projection):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


class TextFeatures:
    """
    Features of texts by the prompt encoder of a model, from a cache on disk.

    Several processes and independent runs may use one cache: the first one encodes what is missing, the others wait
    for it and find it there.

    Args:
        model: Its prompt encoder must not be trained while these features are in use.
        tokenizer: Of the prompts.
        cache_dir: Folder of all caches; None encodes anew and keeps nothing.
        dtype: Of the rows on disk; "float16" halves them and rounds to three digits.

    Raises:
        OSError: The cache cannot be written.
    """

    def __init__(
        self,
        model: ChexModel,
        tokenizer: PreTrainedTokenizerBase,
        cache_dir: str | Path | None = None,
        dtype: FeatureDtype = "float32",
    ):
        self.model, self.tokenizer = model, tokenizer
        self.size, self.dtype = model.config.projection_dim, np.dtype(dtype)
        self.folder = None
        if cache_dir is not None:
            self.folder = Path(cache_dir) / f"{encoder_fingerprint(model, tokenizer)}-{dtype}"
            self.features_path, self.index_path = self.folder / "features.bin", self.folder / "index.bin"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features (U, D) of texts in memory, in float32 on the CPU."""
        if self.folder is None or not texts:
            return encode_texts(self.model, self.tokenizer, texts)
        table, rows = self._look_up(texts)
        return torch.from_numpy(table[rows].astype(np.float32))

    def table(self, texts: Sequence[str]) -> "FeatureTable":
        """Features of texts by their numbers; in memory, and later on the device, unless they are large."""
        if self.folder is None or len(texts) * self.size * self.dtype.itemsize <= DEVICE_BYTES:
            return FeatureTable(self.encode(texts))
        return FeatureTable(*self._look_up(texts))

    def _look_up(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The memory-mapped table, and the row of each text, after encoding what is not there."""
        digests = np.frombuffer(
            b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts), ENTRY["text"]
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            table, rows = self._stored(digests)
            if (rows < 0).any():
                with self._lock():
                    _, rows = self._stored(digests, warn=True)
                    self._add(texts, digests, np.flatnonzero(rows < 0))
                    table, rows = self._stored(digests)
        except OSError as error:
            raise OSError(
                f"The features of texts cannot be kept in {self.folder} ({error.strerror or error}): free some space, "
                "or set data.cache_dir to another folder."
            ) from error
        if (rows < 0).any():
            raise OSError(
                f"{self.features_path} does not give back what was just written to it: check the disk, or set "
                "data.cache_dir to another folder."
            )
        return table, rows

    def _lock(self) -> filelock.AcquireReturnProxy:
        lock = filelock.FileLock(self.folder / "lock")  # which the system takes from a process that dies
        try:
            return lock.acquire(timeout=3)
        except filelock.Timeout:
            logger.warning("Waiting for another process, which encodes texts into %s.", self.folder)
            return lock.acquire()

    def _stored(self, digests: np.ndarray, warn: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The table (R, D) and the row (U,) of each text, -1 where it is missing or damaged."""
        entries = np.fromfile(self.index_path, ENTRY) if self.index_path.is_file() else np.zeros(0, ENTRY)
        written = self.features_path.stat().st_size // self._row_bytes if self.features_path.is_file() else 0
        if warn and len(entries) < written:
            logger.warning("%s: %d features without an index are left unused.", self.folder, written - len(entries))
        if not len(entries):
            return np.zeros((0, self.size), self.dtype), np.full(len(digests), -1)
        order = entries["text"].argsort(kind="stable")
        rows = order[entries["text"].searchsorted(digests, side="right", sorter=order) - 1]  # the latest of each text
        rows[entries["text"][rows] != digests] = -1
        table = self._mapped(written)
        sums = entries["row"].tolist()
        damaged = [row >= 0 and (row >= written or zlib.crc32(table[row]) != sums[row]) for row in rows.tolist()]
        if warn and any(damaged):
            logger.warning("%s: %d features are damaged and are encoded again.", self.folder, sum(damaged))
        rows[damaged] = -1
        # opened afresh, because pages that were read for the check count as memory of this process
        return self._mapped(written), rows

    def _mapped(self, written: int) -> np.ndarray:
        if not written:  # which cannot be mapped
            return np.zeros((0, self.size), self.dtype)
        return np.memmap(self.features_path, self.dtype, mode="r", shape=(written, self.size)).view(np.ndarray)

    @property
    def _row_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def _add(self, texts: Sequence[str], digests: np.ndarray, missing: np.ndarray) -> None:
        """Encodes texts and appends them; only with the lock."""
        _, first = np.unique(digests[missing], return_index=True)
        missing = missing[np.sort(first)]
        progress = tqdm(total=len(missing), desc="Encoding texts", leave=False, disable=len(missing) < 2000)
        for start in range(0, len(missing), CHUNK):
            chosen = missing[start : start + CHUNK]
            features = encode_texts(self.model, self.tokenizer, [texts[number] for number in chosen])
            self._append(digests[chosen], features.numpy().astype(self.dtype))
            progress.update(len(chosen))
        progress.close()

    def _append(self, digests: np.ndarray, features: np.ndarray) -> None:
        """Rows first, then their entries; behind everything that is there, which others may be reading."""
        paths = (self.features_path, self.index_path)
        sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
        used = max(-(-size // width) for size, width in zip(sizes, (self._row_bytes, ENTRY.itemsize), strict=True))
        entries = np.empty(len(digests), ENTRY)
        entries["text"], entries["row"] = digests, [zlib.crc32(row) for row in features]
        for path, content, width in zip(paths, (features, entries), (self._row_bytes, ENTRY.itemsize), strict=True):
            with path.open("r+b" if path.is_file() else "w+b") as file:
                file.seek(used * width)  # what this leaves out is filled with zeros, which are no text
                file.write(content.tobytes())
                file.flush()
                os.fsync(file.fileno())


class FeatureTable(nn.Module):
    """
    Features of texts by number. Small tables are a buffer, which moves to the device with the module; of large ones,
    only the rows of a batch do.

    Args:
        features (R, D): A tensor, or a memory-mapped array.
        rows (U,): Row of each text in the array.
    """

    def __init__(self, features: Tensor | np.ndarray, rows: np.ndarray | None = None):
        super().__init__()
        self.size, self.rows = features.shape[1], rows
        self.stored = None if rows is None else features
        self.register_buffer("features", features if rows is None else None, persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Features (..., D) of the texts with these numbers (...), zeros for -1; float32 on their device."""
        known = numbers >= 0
        if self.stored is None:
            if len(self.features) == 0:
                return self.features.new_zeros(*numbers.shape, self.size)
            return self.features[numbers.clamp_min(0)] * known[..., None]
        distinct, place = numbers[known].unique(return_inverse=True)
        rows = self.stored[self.rows[distinct.cpu().numpy()]].astype(np.float32)
        features = torch.zeros(*numbers.shape, self.size, device=numbers.device)
        features[known] = torch.from_numpy(rows).to(numbers.device)[place]
        return features


class TokenTable(nn.Module):
    """
    Token ids of texts by number, stored one behind the other and padded on the right to the longest of a batch.

    Args:
        tokenizer: Of the prompts, or of sentences.
        max_length: Longer texts are cut off.
        start_and_end: Adds the start and the end token, as GPT-2's tokenizer does not; they are cut off as well.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, start_and_end: bool = False
    ):
        super().__init__()
        first, last = (tokenizer.bos_token, tokenizer.eos_token) if start_and_end else ("", "")
        ids, lengths = [], []
        for start in range(0, len(texts), CHUNK):
            tokens = tokenizer(
                [f"{first}{text}{last}" for text in texts[start : start + CHUNK]],
                add_special_tokens=not start_and_end,
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
            )["input_ids"]
            lengths += map(len, tokens)
            ids.append(np.concatenate([np.asarray(row, dtype=np.int32) for row in tokens]))
        lengths = torch.tensor(lengths, dtype=torch.int64)
        self.padding = tokenizer.pad_token_id
        self.register_buffer("ids", torch.from_numpy(np.concatenate(ids or [[]]).astype(np.int32)), persistent=False)
        self.register_buffer("lengths", lengths, persistent=False)
        self.register_buffer("starts", lengths.cumsum(0) - lengths, persistent=False)

    def forward(self, numbers: Tensor, shortest: int = 0) -> tuple[Tensor, Tensor]:
        """
        Token ids (S, T) and their mask (S, T), int64, of the texts with these numbers (S,), at least one; T is the
        length of the longest, and not less than `shortest`.
        """
        lengths = self.lengths[numbers]
        place = torch.arange(max(int(lengths.max()), shortest), device=numbers.device)
        mask = place < lengths[:, None]
        ids = self.ids[(self.starts[numbers, None] + place).clamp_max(len(self.ids) - 1)].long()
        return ids.masked_fill(~mask, self.padding), mask.long()


__all__ = ["FeatureDtype", "FeatureTable", "TextFeatures", "TokenTable", "encode_texts", "encoder_fingerprint"]
