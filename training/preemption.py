"""Preemption: a run that is asked to stop saves a checkpoint behind the current update and ends."""

import os
import signal
import threading
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from accelerate import Accelerator


# What clusters send before they kill: most of them SIGTERM, Slurm on request (--signal) another one.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# "Temporary failure, try again later" of sysexits.h, which neither Python nor launchers use for anything else.
EXIT_CODE = 75


class Preempted(SystemExit):
    """Ends a script with `EXIT_CODE`, after a checkpoint from which the same command goes on."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """
    Notes the signals that ask this process to stop, while it is entered; they do nothing else then. Outside the main
    thread, which alone can handle signals, it notes none.

    Processes stop together: one that gets a signal makes all of them stop behind the same update.
    """

    def __init__(self, accelerator: Accelerator):
        self.device, self.alone = accelerator.device, accelerator.num_processes == 1
        self.received = 0
        self._owner, self._previous = os.getpid(), {}
        self._exchanged: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:  # workers of data loaders inherit the handler
            self.received = self.received or number

    def agreed(self) -> str | None:
        """
        The name of a signal that any process has got, None without one; called by all processes behind each update.
        On GPUs it is what was known one update before, so that nothing waits for the exchange.
        """
        number = self.received if self.alone else self._exchange()
        return signal.Signals(number).name if number else None

    def _exchange(self) -> int:
        found = torch.tensor(self.received, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if self.device.type != "cuda":
            return int(found)
        ready = torch.cuda.Event()
        copied = torch.empty((), dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        ready.record()
        before, self._exchanged = self._exchanged, (copied, ready)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


__all__ = ["EXIT_CODE", "SIGNALS", "Preempted", "StopRequest"]
