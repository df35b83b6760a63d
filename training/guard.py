"""Stops a run whose loss or gradient is no longer finite, and says which images did it."""

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from training.checkpoints import TrainingState
from training.collate import Batch, MixedDataset, RecordDataset


def sample_ids(dataset: torch.utils.data.Dataset, numbers: list[int]) -> list[str] | None:
    """`sample_id` of the items with these numbers, None for data sets without records."""
    if isinstance(dataset, RecordDataset):
        return dataset.records.select_columns(["sample_id"])[numbers]["sample_id"].to_pylist()
    if isinstance(dataset, MixedDataset):
        found = []
        for number in numbers:
            owner = int(np.searchsorted(dataset.ends, number, side="right"))
            start, part = (int(dataset.ends[owner - 1]) if owner else 0), dataset.parts[owner]
            found += sample_ids(part, [(number - start) % len(part)])
        return found
    return None


class FiniteGuard:
    """
    Looks at every loss and gradient norm. On a GPU it reads a value when the batch after it has been handed to the
    device, by when it has usually been computed, so that nothing waits for it; elsewhere it reads it at once.

    Args:
        accelerator: For the device and the number of the process.
        folder: Gets `nonfinite.json` (of the other processes `nonfinite-<process>.json`).
        stage: Name for the message.
        dataset: The training data, for the ids of images.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, stage: str, dataset: torch.utils.data.Dataset):
        self.stage, self.dataset = stage, dataset
        rank = accelerator.process_index
        self.path = folder / (f"nonfinite-{rank}.json" if rank else "nonfinite.json")
        self.behind = 1 if accelerator.device.type == "cuda" else 0
        self.check_norm = accelerator.scaler is None  # with float16, the scaler skips steps that overflow
        self.window: list[Any] = []  # batches since the last update
        self.pending: collections.deque = collections.deque()

    def add(
        self, losses: dict[str, Tensor], batch: Any, state: TrainingState, norm: Tensor | None, updated: bool
    ) -> None:
        """
        Takes up a batch.

        Args:
            losses: Its terms (0-dimensional), under `loss` what was minimised.
            batch: A `Batch`, or a tensor of item numbers.
            state: Update, epoch and batch that it belongs to.
            norm: Of the gradient, if the batch ended an update in which it was computed.
            updated: Whether the batch ended an update.

        Raises:
            FloatingPointError: This batch or, on a GPU, the one before gave a loss or gradient that is not finite.
        """
        self.window.append((state.batch, batch.index if isinstance(batch, Batch) else batch))
        values = [losses["loss"].detach().float()]
        if norm is not None and self.check_norm:
            values.append(torch.as_tensor(norm, device=values[0].device).detach().float())
        finite, ready = torch.stack(values).isfinite(), None
        if self.behind:
            finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        place = {"update": state.update + 1, "epoch": state.epoch}
        terms = {name: value.detach() for name, value in losses.items()}
        self.pending.append((finite, ready, place, terms, norm, list(self.window)))
        if updated:
            self.window.clear()
        while len(self.pending) > self.behind:
            self._check(*self.pending.popleft())

    def finish(self) -> None:
        """Looks at everything that was taken up, as is due before anything is saved."""
        while self.pending:
            self._check(*self.pending.popleft())

    def _check(
        self, finite: Tensor, ready: Any, place: dict[str, int], terms: dict[str, Tensor], norm: Any, window: list
    ) -> None:
        if ready is not None:
            ready.synchronize()
        loss_is_finite, *norm_is_finite = finite.tolist()
        if loss_is_finite and all(norm_is_finite):
            return
        value = float(norm) if norm is not None else None
        found = [(number, index.tolist()) for number, index in (window if loss_is_finite else window[-1:])]
        what = f"loss of {self.stage} became {terms['loss'].item()}"
        if loss_is_finite:
            what = f"gradient of {self.stage} got the norm {value}"
        batches = [
            {"batch": number, "items": items, "sample_ids": sample_ids(self.dataset, items)} for number, items in found
        ]
        content = {"stage": self.stage} | place | {"terms": {name: v.item() for name, v in terms.items()}}
        content |= {"gradient_norm": value, "batches": batches}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        raise FloatingPointError(
            f"The {what} at update {place['update']}. The items of its batch and all terms are in {self.path}. Lower "
            "optimization.learning_rate, set mixed_precision=no, or leave out what is wrong with these items."
        )


__all__ = ["FiniteGuard", "sample_ids"]
