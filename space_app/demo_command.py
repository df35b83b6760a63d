"""`chex demo`."""

import logging
from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: proves the path, not the numbers.")] = False,
) -> None:
    """Train a small ChEX on synthetic radiographs, evaluate it and write a page about it.

    Takes about a quarter of an hour on two cores. What is finished already is reused.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("training.data.phantom").setLevel(logging.INFO)

    from evaluation.demo import run_demo

    run_demo(output, fast)


__all__ = ["demo"]
