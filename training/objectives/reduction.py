"""Shared numerics of the objectives: masked means, empty supervision, other processes, precision."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor


P = ParamSpec("P")
T = TypeVar("T")


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class StepTotals:
    """
    What the averages of a step divide by, for a step that is computed in parts one after another: accumulated
    gradients, or the batches of a validation split.

    The counts depend on annotations and draws alone. So every part is first only counted, `finish` adds up parts and
    processes, and then the losses of the parts are parts of one average over all of them.
    """

    def __init__(self):
        self.finished = False
        self.processes = 1.0
        self._sums: dict[tuple[str, int], Tensor] = {}

    def look_up(self, key: tuple[str, int], count: Tensor) -> Tensor:
        """The total behind a key; while parts are counted, adds this one and returns it."""
        if not self.finished:
            self._sums[key] = self._sums.get(key, 0) + count.detach().double()
            return count
        return self._sums[key].to(count)

    def finish(self, collectives: "Collectives") -> None:
        """Adds up the processes, which have counted the same keys."""
        keys = sorted(self._sums)
        counts = [torch.ones(1, dtype=torch.float64), *(self._sums[key].flatten().cpu() for key in keys)]
        devices = [self._sums[key].device for key in keys]
        device = devices[0] if devices else torch.device("cpu")
        totals = collectives.sum(torch.cat(counts).to(device)).split([len(count) for count in counts])
        self.processes = totals[0].item()
        self._sums = {key: total.view(self._sums[key].shape) for key, total in zip(keys, totals[1:], strict=True)}
        self.finished = True


@dataclass(frozen=True)
class Collectives:
    """What an objective needs from the other processes of a distributed run; by default there are none.

    With data parallelism the gradients of all processes are averaged. Averages over things that are counted
    (sentences, boxes, annotated images) therefore divide by the mean count of the processes, and contrastive losses
    see the candidates of all processes, so that the result equals one process with the whole batch.

    Attributes:
        sum: adds a small tensor of counts over the processes (no gradient needed).
        gather_all: concatenates tensors of all processes along their first axes, with gradient, each with the same
            tensor of the other processes; it pads the other axes to the longest with zeros, which for masks means "not
            valid". Several at once wait for the other processes fewer times.
        totals: of a step in several parts, each of which then is a summand of the loss.
        term: the loss that is being computed; parts of a step need not have the same ones.
    """

    sum: Callable[[Tensor], Tensor] = _identity
    gather_all: Callable[[Sequence[Tensor]], list[Tensor]] = list
    totals: StepTotals | None = None
    term: str = ""
    calls: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    def of(self, term: str) -> "Collectives":
        """The same for another loss."""
        return replace(self, term=term)

    def gather(self, tensor: Tensor) -> Tensor:
        """`gather_all` of one tensor."""
        return self.gather_all([tensor])[0]

    @property
    def counting(self) -> bool:
        """Whether only the counts of this part are wanted, so that nothing else about the losses matters."""
        return self.totals is not None and not self.totals.finished

    def total(self, count: Tensor) -> Tensor:
        """A count (of any shape) of the whole step, without gradient."""
        if self.totals is None:
            return self.sum(count)
        self.calls[self.term] += 1
        return self.totals.look_up((self.term, self.calls[self.term]), count)

    def mean_count(self, count: Tensor) -> Tensor:
        """
        The count to divide a local sum by: mean over the processes of that of the whole step, never zero. Of any
        shape, for several sums.
        """
        if self.totals is None:
            total, processes = self.sum(torch.stack([count, torch.ones_like(count)])).unbind()
        else:
            total, processes = self.total(count), self.totals.processes
        # The guard belongs to the total: a mean below one is right when some processes have nothing.
        return total.clamp(min=1) / processes


SINGLE_PROCESS = Collectives()


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: half-precision tensor arguments become float32 and autocast is off inside.

    Box arithmetic, focal terms and contrastive logits lose too much in bfloat16 (eight bits of mantissa).
    float32 and float64 arguments pass unchanged.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        arguments = [*args, *kwargs.values()]
        device_type = next((a.device.type for a in arguments if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device_type, enabled=False):
            return function(*map(_upcast, args), **{name: _upcast(value) for name, value in kwargs.items()})

    return wrapper


def _upcast(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def keep_valid(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` holds, else 0; what is masked (even NaN) reaches neither the value nor the gradient.

    Args:
        values: (..., D) with one more axis than `mask`, or (...) with the same axes.
        mask: (...) bool.
    """
    if values.dim() > mask.dim():
        mask = mask[..., None]
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor, collectives: Collectives = SINGLE_PROCESS) -> Tensor:
    """Mean of the masked entries, 0 if there are none. values, mask: same shape. Returns a scalar."""
    return keep_valid(values, mask).sum() / collectives.mean_count(mask.sum().to(values.dtype))


def mean_within_image(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the second axis of the masked entries, 0 for images without any. (N, K), (N, K) -> (N,)."""
    return keep_valid(values, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def mean_over_images(values: Tensor, mask: Tensor, collectives: Collectives = SINGLE_PROCESS) -> Tensor:
    """The paper's usual average: over the valid entries of an image, then over images that have any.

    Every image counts the same, however many sentences or classes are annotated in it.

    Args:
        values: (N, K) one loss per image and sentence (region, class).
        mask: (N, K) bool, which of them are supervised.

    Returns:
        A scalar; 0, still connected to `values`, if nothing is valid.
    """
    return masked_mean(mean_within_image(values, mask), mask.any(dim=1), collectives)
