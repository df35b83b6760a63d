"""`chex evaluate`: the command line of evaluation/run.py."""

import typer


# The options are those of the script, which launchers start without this command: one place defines and checks them.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def evaluate(context: typer.Context) -> None:
    """Evaluate a model on the tasks of the paper; --help lists the options."""
    from evaluation.run import main

    try:
        code = main(context.args)
    except SystemExit as error:  # of the parser, after --help or a mistake
        code = error.code if isinstance(error.code, int) else 2
    raise typer.Exit(code)


__all__ = ["CONTEXT", "evaluate"]
