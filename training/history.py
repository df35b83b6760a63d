"""What a run writes about itself: its metrics, and where it ran."""

import collections
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from training.checkpoints import TrainingState
from training.distributed import precision_of


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")


class History:
    """Metrics of a run, one JSON object for each line."""

    def __init__(self, path: Path, stage: str, accelerator: Accelerator):
        self.path, self.stage, self.accelerator = path, stage, accelerator
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: collections.Counter[str] = collections.Counter()  # a step need not have all terms

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
        self.counts.update(losses.keys())

    def write(self, state: TrainingState, split: str, **extra: float) -> dict[str, float]:
        """Appends the means since the last call; returns them."""
        means = {
            name: self.accelerator.reduce(value, "mean").item() / self.counts[name]
            for name, value in self.sums.items()
        }
        self.sums, self.counts = {}, collections.Counter()
        entry = {"stage": self.stage, "split": split, "step": state.update, "seconds": round(state.seconds, 2)}
        entry |= extra | means
        self.accelerator.log({f"{split}/{name}": value for name, value in (extra | means).items()}, step=state.update)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return entry

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What has not been written yet, of this process: sums and counts."""
        return {"sums": {name: value.item() for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        device = self.accelerator.device
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self.counts = collections.Counter(state["counts"])

    def truncate(self, update: int) -> None:
        """Removes what was written after the checkpoint that the run resumes from, perhaps cut off by a kill."""
        if self.accelerator.is_main_process and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= update]
            temporary = self.path.with_suffix(".partial")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self.path)


def environment(accelerator: Accelerator) -> dict[str, object]:
    """Where a run (or its continuation) takes place: time, commit of this code, versions, hardware, processes."""
    device = accelerator.device
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "launcher": str(accelerator.distributed_type.value),
        "mixed_precision": precision_of(accelerator),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of this code, with "-dirty" where it was changed; None if it does not run from a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # an installed copy may lie inside the checkout of something else
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        command = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


__all__ = ["History", "environment"]
