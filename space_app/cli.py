"""The `chex` command. Each sub-command is a module with a function; heavy libraries are imported when it runs."""

import typer

from space_app.convert_command import convert_app
from space_app.data_command import data_app
from space_app.demo_command import demo
from space_app.evaluate_command import CONTEXT, evaluate
from space_app.explain_command import explain
from space_app.push_command import push
from space_app.report_command import report
from space_app.sr_command import sr


app = typer.Typer(
    name="chex",
    help="ChEX finds and describes regions of chest radiographs. Research use only, not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def chex() -> None:
    """Keeps `chex` a group of commands, however many there are."""


# In the list of commands, longer sentences would be cut off.
app.command("explain", short_help="Find what prompts name, describe it and given boxes.")(explain)
app.command("report", short_help="Write a report about each image.")(report)
app.command("demo", short_help="Train and evaluate a small ChEX on synthetic images.")(demo)
app.command("evaluate", context_settings=CONTEXT, short_help="Evaluate a model on the paper's tasks.")(evaluate)
app.command("push", short_help="Publish a model, the page or the phantom on the Hub.")(push)
app.command("sr", short_help="Turn answers into a DICOM structured report.")(sr)
app.add_typer(convert_app)
app.add_typer(data_app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="chex")


if __name__ == "__main__":
    main()
