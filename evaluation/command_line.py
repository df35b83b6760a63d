"""What the command lines of the evaluation share."""

import argparse
from typing import Any


def add_option(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """`parser.add_argument`, with the default in the help where there is one that says something."""
    default = options.get("default")
    if default is not None and default is not False and default != []:
        shown = " ".join(default) if isinstance(default, list) else "%(default)s"
        options["help"] += f" (default: {shown})"
    parser.add_argument(*names, **options)


__all__ = ["add_option"]
