"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """
    After each update, average = d * average + (1 - d) * weights, where d = min(decay, (1 + n) / (10 + n)) for update
    n: the average follows the first updates quickly, so that a short run does not end near its initial weights.

    Args:
        parameters: The trained parameters; frozen ones equal their average.
        decay: Of the average, such as 0.999.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Takes up the weights after update `number`, counted from 1."""
        get_ema_multi_avg_fn(min(self.decay, (1 + number) / (10 + number)))(self.averages, self.parameters, number)

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the averaged weights to the model."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.parameters, weights, strict=True):
                    parameter.copy_(weight)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


__all__ = ["WeightAverage"]
