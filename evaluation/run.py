"""
Evaluate a ChEX model on the nine tasks of the paper, with bootstrap intervals.

    accelerate launch evaluation/run.py --model runs/chex --tasks all --bootstrap 250 --optimize-inference \
        --output runs/evaluation

`torchrun`, plain Python and `chex evaluate` take the same arguments; docs/evaluation.md explains them.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.command_line import add_option
from evaluation.results import RESULTS
from evaluation.results_view import headline
from evaluation.tasks.catalog import DATA_SETS, GROUPS, PRESETS, TASKS, check_metrics, find_tasks, nearest


BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="chex evaluate",
        description="Evaluate a ChEX model on the tasks of the paper, with bootstrap intervals.",
        epilog=f"Tasks: {', '.join(TASKS)}. Groups: {', '.join(GROUPS)}. Data sets: {', '.join(DATA_SETS)}.",
    )
    add = partial(add_option, parser)
    add("--model", required=True, metavar="DIR", help="folder of the model and its processor")
    add("--output", required=True, metavar="DIR", help="folder of the results; what it holds already is taken over")
    add("--tasks", nargs="+", default=["all"], metavar="NAME", help="tasks or groups of tasks")
    add(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="folder of a data set; left out: prepared/NAME, where it is there",
    )
    add("--twins", action="store_true", help="run the tasks of the paper as their twins on the phantom")
    add("--split", default="test", help="split that is scored")
    add("--limit", type=int, metavar="N", help="only the first N images of each split")
    add("--metrics", nargs="+", metavar="NAME", help="only these metrics")
    add("--bootstrap", type=int, default=250, metavar="N", help="resamples; 0 leaves intervals out")
    add("--seed", type=int, default=2147483647, help="of the bootstrap")
    add("--optimize-inference", action="store_true", help="tune post-processing on the validation split, and store it")
    add("--official", action="store_true", help="tune with the defects of the official code")
    add("--preset", choices=list(PRESETS), help="of generation; left out: phantom on the phantom, else paper")
    add("--labeler", metavar="SPEC", help="reads findings in texts: phantom, chexbert:DIR or package.module:attribute")
    add(
        "--radgraph",
        default="radgraph",
        metavar="SPEC",
        help="annotator: radgraph, radgraph:DIR or package.module:name",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images encoded together")
    add("--chunk-images", type=int, default=64, metavar="N", help="images in a file of predictions")
    add("--device", help="left out: what the launcher gives")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    add("--examples", type=int, default=6, metavar="N", help="examples of each task in the results, with pictures")
    add("--predictions-only", action="store_true", help="make predictions and score nothing")
    add("--score-only", action="store_true", help="score the predictions that are there")
    add("--rescore", action="store_true", help="score again what has been scored before")
    add(
        "--overwrite",
        action="store_true",
        help="replace predictions and tuned settings of another model or other data",
    )
    add("--no-progress", action="store_true", help="show no progress bars")
    add("--debug", action="store_true", help="show the traceback of errors")
    return parser


def parse_data(entries: Sequence[str]) -> dict[str, Path]:
    """
    `NAME=DIR` -> folders by name.

    Raises:
        ValueError: Not of this form, an unknown name, one that is given twice, or no such folder.
    """
    folders: dict[str, Path] = {}
    for entry in entries:
        name, separator, folder = entry.partition("=")
        if not separator or not folder:
            raise ValueError(f"--data {entry}: write NAME=DIR, for instance ms-cxr=prepared/ms-cxr.")
        name = name.replace("_", "-")
        if name not in DATA_SETS:
            raise ValueError(f"--data {entry}: unknown data set {name!r}. {nearest(name, DATA_SETS, 'data sets')}")
        if name in folders:
            raise ValueError(f"--data names {name} twice: {folders[name]} and {folder}.")
        if not Path(folder).is_dir():
            raise ValueError(f"--data {entry}: {folder} is not a folder. 'chex data prepare {name}' makes one.")
        folders[name] = Path(folder)
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for what the user can mend."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    command = shlex.join(["chex", "evaluate", *(sys.argv[1:] if argv is None else argv)])
    try:
        tasks = find_tasks(arguments.tasks)
        if arguments.metrics:
            check_metrics(arguments.metrics, tasks)
        if arguments.predictions_only and arguments.score_only:
            raise ValueError("--predictions-only and --score-only exclude each other.")
        folders = parse_data(arguments.data)
        return run(arguments, folders, command)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return BAD_INPUT


def run(arguments: argparse.Namespace, folders: dict[str, Path], command: str) -> int:
    """What the command line does, once it has been read."""
    import torch
    from accelerate import PartialState

    from evaluation.engine import Options, bind_tasks, evaluate
    from evaluation.inference import DataSource, ModelSource
    from evaluation.page import write_pages
    from evaluation.processes import Processes
    from training.distributed import process_group_options, warn_of_missing_processes

    options = Options(
        split=arguments.split,
        resamples=arguments.bootstrap,
        seed=arguments.seed,
        metrics=tuple(arguments.metrics) if arguments.metrics else None,
        optimize=arguments.optimize_inference,
        official=arguments.official,
        batch_size=arguments.batch_size,
        chunk_images=arguments.chunk_images,
        limit=arguments.limit,
        preset=arguments.preset,
        labeler=arguments.labeler,
        radgraph=arguments.radgraph,
        examples=arguments.examples,
        overwrite=arguments.overwrite,
        rescore=arguments.rescore,
        progress=not arguments.no_progress,
        predict=not arguments.score_only,
        score=not arguments.predictions_only,
    )
    # Without `cpu`, processes on CPUs would not be connected.
    state = PartialState(cpu=not torch.accelerator.is_available(), **process_group_options().to_kwargs())
    warn_of_missing_processes(state.num_processes)
    processes = Processes(state.process_index, state.num_processes)
    model = ModelSource(arguments.model, device=arguments.device or state.device, dtype=arguments.dtype)
    tasks = find_tasks(arguments.tasks)
    found = {name: Path(info.folder) for name, info in DATA_SETS.items() if Path(info.folder).is_dir()} | folders
    needed = bind_tasks(tasks, found, twins=arguments.twins)
    names = {task.data for task in needed}
    data: dict[str, DataSource] = {}

    def open_data() -> None:
        data.update({name: DataSource.open(name, found[name]) for name in sorted(names & set(found))})

    processes.share(open_data)  # the main process first: opening a folder for the first time makes its Arrow copy
    if not processes.is_main:
        open_data()
    results = evaluate(
        model, data, needed, arguments.output, options, processes, command, say=lambda line: print(line, flush=True)
    )
    if results is None:
        return 0
    path = Path(arguments.output) / RESULTS
    pages = write_pages(path)
    print(f"\n{format_results(results)}\n")
    for name, reason in results["skipped"].items():
        print(f"{name}: not run: {reason}")
    print("\n".join(f"Written: {file}" for file in (path, *pages) if file.suffix != ".svg"))
    return 0


def format_results(results: Mapping[str, Any]) -> str:
    """A line for each task: its headline metric with interval, and what is not computed."""
    rows = [("task", "metric", "value", "95 % interval", "mean ± std", "images")]
    for name, task in results["tasks"].items():
        metric = headline(name, task)
        entry = task["metrics"].get(metric)
        label = f"{name} (twin)" if task["twin"] else name
        if entry is None:
            rows.append((label, metric, "not computed", "", "", f"{task['images']:,}"))
            continue
        value, low, high, mean, std = (
            "" if entry.get(key) is None else f"{entry[key]:.3f}" for key in ("value", "low", "high", "mean", "std")
        )
        interval, spread = (f"{low} to {high}", f"{mean} ± {std}") if low else ("", "")
        rows.append((label, metric, value or "undefined", interval, spread, f"{task['images']:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def run_as_script() -> None:
    """`main` as a program: other processes are taken leave of, and one that is lost ends in a message."""
    from training.distributed import leave_processes, lost_process

    try:
        code = main()
        leave_processes()
    except RuntimeError as error:
        message = lost_process(error)
        if message is None or "--debug" in sys.argv:
            raise
        print(f"Error: {message}", file=sys.stderr)
        code = 1
    sys.exit(code)


__all__ = ["build_parser", "format_results", "main", "parse_data", "run_as_script"]


if __name__ == "__main__":
    run_as_script()
