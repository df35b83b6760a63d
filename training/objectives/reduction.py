"""Shared numerics of the objectives: masked means, empty supervision, other processes, precision."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor


P = ParamSpec("P")
T = TypeVar("T")


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Collectives:
    """What an objective needs from the other processes of a distributed run; by default there are none.

    With data parallelism the gradients of all processes are averaged. Averages over things that are counted
    (sentences, boxes, annotated images) therefore divide by the mean count of the processes, and contrastive losses
    see the candidates of all processes, so that the result equals one process with the whole batch.

    Attributes:
        sum: adds a small tensor of counts over the processes (no gradient needed).
        gather: concatenates a tensor of all processes along its first axis, with gradient; it pads the other axes to
            the longest with zeros, which for masks means "not valid".
    """

    sum: Callable[[Tensor], Tensor] = _identity
    gather: Callable[[Tensor], Tensor] = _identity

    def mean_count(self, count: Tensor) -> Tensor:
        """The count to divide a local sum by: mean over the processes, never zero."""
        total, processes = self.sum(torch.stack([count, torch.ones_like(count)])).unbind()
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
