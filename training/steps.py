"""
Steps that do not depend on how their images are dealt to processes and to batches one after another: parts of an
optimiser update, and splits whose losses are measured.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from training.distributed import process_collectives
from training.objectives import StepTotals
from training.supervision import Supervision


@dataclass
class StepPart:
    """
    One of the batches of an optimiser update.

    Attributes:
        batch: As the data loader gives it.
        seed: Of the draws that all processes share.
        totals: Counts of the whole update, None if this batch is all of it.
        last: Whether the update is complete with it.
    """

    batch: Any
    seed: int
    totals: StepTotals | None
    last: bool


def step_parts(
    batches: Iterable[Any], size: int, supervision: Supervision, first_seed: int, epoch: int
) -> Iterator[StepPart]:
    """
    Groups batches into updates of `size` of them, the last of an epoch perhaps of fewer. The averages of an update are
    over all its batches, so these are fetched and counted before the first of them is used.

    Args:
        supervision: Counts batches; not wrapped for several processes.
        first_seed: Seed of the first batch; it grows by 1.
    """
    batches, seeds = iter(batches), itertools.count(first_seed)
    while group := list(itertools.islice(batches, size)):
        parts = [StepPart(batch, next(seeds), None, False) for batch in group]
        parts[-1].last = True
        if size > 1:
            totals = StepTotals()
            for part in parts:
                part.totals = totals
                supervision.count(part.batch, part.seed, epoch, totals)
            totals.finish(process_collectives())
        yield from parts


@contextlib.contextmanager
def part_of_update(accelerator: Accelerator, module: nn.Module, last: bool) -> Iterator[None]:
    """
    Forward and backward pass of a part of an update; gradients are exchanged in the last one, and only then does the
    prepared optimizer step. Unlike `Accelerator.accumulate` it leaves the number of parts to the caller.
    """
    accelerator.sync_gradients = last
    with contextlib.nullcontext() if last else accelerator.no_sync(module):
        yield


def clip_gradients(accelerator: Accelerator, module: nn.Module, limit: float) -> Tensor:
    """Clips the gradients of the wrapped module to a norm; returns the norm that they had, in every process."""
    norm = accelerator.clip_grad_norm_(module.parameters(), limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients


def add_up(sums: dict[str, Tensor], losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of terms by name, in float32 and without gradient: the loss of an update of those of its parts."""
    added = {name: value.detach().float() + sums.get(name, 0.0) for name, value in losses.items()}
    return sums | added


def share_of_batches(count: int, batch_size: int, process: int, processes: int) -> list[list[int]]:
    """
    What one process sees of `count` items in batches of `batch_size` for each process. Every item is in one share; the
    last batch is dealt evenly as well, so that some processes may have nothing of it.
    """
    whole = batch_size * processes
    return [
        np.array_split(np.arange(start, min(start + whole, count)), processes)[process].tolist()
        for start in range(0, count, whole)
    ]


class SharedSplit:
    """
    The batches of a split that all processes go through together, without training on it. Where a process has nothing
    of a batch it takes part with a stand-in.

    Args:
        dataset, collate: As for training.
        limit: Use at most so many items, the first ones.
        batch_size: For each process.
        supervision: Counts batches and makes stand-ins; not wrapped for several processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[list], Any],
        limit: int,
        batch_size: int,
        accelerator: Accelerator,
        supervision: Supervision,
    ):
        count = min(limit, len(dataset))
        self.shares = share_of_batches(count, batch_size, accelerator.process_index, accelerator.num_processes)
        self.loader = DataLoader(
            Subset(dataset, range(count)), batch_sampler=[share or [0] for share in self.shares], collate_fn=collate
        )
        self.device, self.supervision, self.totals = accelerator.device, supervision, None

    def __iter__(self) -> Iterator[Any]:
        for share, batch in zip(self.shares, self.loader, strict=True):
            yield (batch if share else self.supervision.blank(batch)).to(self.device)

    @torch.no_grad()
    def losses(self, module: nn.Module) -> dict[str, Tensor]:
        """
        Losses on the split, averaged over all of it, of the supervision as it is wrapped for several processes, in
        eval mode. Their mean over the processes is what counts. Every batch has a seed of its own, since what is drawn
        for a whole batch, such as whether anatomies are asked for by name or by box, should not be the same in all;
        it is that of its number, so that values can be compared.
        """
        if self.totals is None:  # the same whenever they are asked for
            totals = StepTotals()
            for seed, batch in enumerate(self):
                self.supervision.count(batch, seed, 0, totals)
            totals.finish(process_collectives())
            self.totals = totals
        sums: dict[str, Tensor] = {}
        for seed, batch in enumerate(self):
            sums = add_up(sums, module(batch, seed=seed, totals=self.totals))
        return sums


__all__ = ["SharedSplit", "StepPart", "add_up", "clip_gradients", "part_of_update", "share_of_batches", "step_parts"]
