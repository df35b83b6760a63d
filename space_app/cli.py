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


app.command("explain")(explain)
app.command("report")(report)
app.command("demo")(demo)
app.command("evaluate", context_settings=CONTEXT)(evaluate)
app.command("push")(push)
app.command("sr")(sr)
app.add_typer(convert_app)
app.add_typer(data_app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="chex")


if __name__ == "__main__":
    main()
