"""Checkpoints of a run: complete or not there, verified before they are used."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass
class TrainingState:
    """Where a run stands: finished updates, epoch, batches of the epoch, seconds of training."""

    update: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, int | float]:
        return dict(vars(self))

    def load_state_dict(self, values: dict[str, int | float]) -> None:
        vars(self).update(values)


class Stateful(Protocol):
    """Something that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def writing(what: str, temporary: Path) -> Iterator[None]:
    """
    Writes something into a folder that gets its final name later. If that fails, nothing of the folder stays: on a
    full disk the next attempt needs its space.

    Raises:
        OSError: It cannot be written, whichever library noticed.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # of `torch.save`, on a full disk
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(next(folder for folder in temporary.parents if folder.is_dir())).free
        raise OSError(
            f"{what} cannot be written to {temporary.parent}, where {free / 2**20:,.0f} MiB are free ({error}). Make "
            "room there; the same command goes on from the last checkpoint."
        ) from error


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its manifest, written last, has size and hash of every file."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has other contents than were written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """
    The checkpoints of a run in a folder, of which the newest `kept` stay.

    Each is written under a temporary name, described by a manifest and renamed, so that a kill never leaves half of
    one under its final name; what a failing disk or a power cut does to it later is found by the manifest.

    Where a run stands is counted in batches of all processes, so that it goes on in as many as before.

    Args:
        own: State that each process has for itself (as JSON), besides that of the accelerator.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, kept: int = 2, own: Stateful | None = None):
        self.accelerator, self.folder, self.kept, self.own = accelerator, folder, kept, own

    def save(self, update: int, models: Collection[int] = ()) -> None:
        """
        Writes the state of the accelerator after an update; `models` are the updates whose models (in `best/`) a run
        that goes on from here needs.
        """
        temporary, final = self.folder / f"update-{update:08d}.partial", self.folder / f"update-{update:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(f"The checkpoint of update {update}", temporary):
            self.accelerator.save_state(str(temporary))
            if self.own is not None:
                self._own_path(temporary).write_text(json.dumps(self.own.state_dict()) + "\n", encoding="utf-8")
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                files = {
                    path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in sorted(temporary.rglob("*"))
                    if path.is_file()
                }
                manifest = {"update": update, "processes": self.accelerator.num_processes, "models": list(models)}
                content = json.dumps(manifest | {"files": files}, indent=1) + "\n"
                (temporary / MANIFEST).write_text(content, encoding="utf-8")
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in self._all()[: -self.kept]:
                shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        """
        Restores the state of the accelerator, and of this process, from a checkpoint.

        Raises:
            ValueError: As many processes as now have not written it.
        """
        now = self.accelerator.num_processes
        before = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("processes", now)
        if before != now:
            raise ValueError(
                f"{folder} was written by a run of {before} processes, and this one has {now}: its batches would not "
                f"be the same, nor would the steps. Start {before} processes, or begin again with --overwrite."
            )
        self.accelerator.load_state(str(folder))
        if self.own is not None and self._own_path(folder).is_file():
            self.own.load_state_dict(json.loads(self._own_path(folder).read_text(encoding="utf-8")))

    def _own_path(self, folder: Path) -> Path:
        return folder / f"process_{self.accelerator.process_index}.json"

    def newest(self) -> Path | None:
        """
        The newest checkpoint that is intact, agreed on by all processes; damaged ones are named and set aside, and
        what a kill has left half written is deleted.
        """
        chosen: list[str | None] = [None]
        if self.accelerator.is_main_process:
            for half in self.folder.glob("update-????????.partial"):
                shutil.rmtree(half)
            found = self._all()
            while found and chosen[0] is None:
                folder = found.pop()
                if (problem := find_damage(folder)) is None:
                    chosen[0] = str(folder)
                    break
                remedy = f"Trying {found[-1].name}" if found else "There is no other: starting again"
                logger.warning("The checkpoint %s cannot be used: %s. %s.", folder, problem, remedy)
                aside = folder.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        broadcast_object_list(chosen)
        return Path(chosen[0]) if chosen[0] is not None else None

    def needed_models(self) -> set[int]:
        """Updates whose models the kept checkpoints refer to; one with a damaged manifest will not be used."""
        needed: set[int] = set()
        for folder in self._all():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                needed |= set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["models"])
        return needed

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("update-????????"))


__all__ = ["Checkpoints", "TrainingState", "find_damage", "writing"]
