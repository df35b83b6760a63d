"""Several processes: who does what, and how a mistake that one of them finds ends all of them with one message."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar


Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """
    The processes of one evaluation.

    Attributes:
        rank: Of this one.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, function: Callable[[], Result]) -> Result:
        """
        What `function` returns on the main process, on all of them.

        Raises:
            ValueError, OSError: That `function` raised there, on all of them.
        """
        if self.count == 1:
            return function()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (ValueError, OSError) as error:
                outcome[1] = f"{error}"
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        Waits at the end of the block for all processes.

        Raises:
            ValueError, OSError: Of the block, on all processes; the first one where several failed.
        """
        if self.count == 1:
            yield
            return
        from accelerate.utils import gather_object

        message = None
        try:
            yield
        except (ValueError, OSError) as error:
            message = str(error)
        failures = [found for found in gather_object([message]) if found is not None]
        if failures:
            raise ValueError(failures[0])


__all__ = ["Processes"]
