"""`chex sr`."""

from pathlib import Path
from typing import Annotated

import typer

from space_app.user_errors import ErrorReporter


def sr(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The DICOM file that was asked about.")],
    report: Annotated[
        Path,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Answers, of `chex report` or `chex explain` (--json, .jsonl) or of the page.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Structured report to write (.dcm).")],
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Name of the model in it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there already.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Turn answers about a DICOM image into a DICOM structured report: each sentence with its boxes on the image.

    It is marked as research output, preliminary and unverified, and carries the patient's data of the image.

    Exit codes: 0 written; 1 an error of the program; 2 the files do not fit or cannot be used.
    """
    with ErrorReporter(debug).guard("chex sr", fatal=True):
        from space_app.dicom_sr import find_result, write_structured_report

        write_structured_report(find_result(report, image), image, out, model or "ChEX", overwrite)
        typer.echo(f"Written: {out} (research output, unverified)")


__all__ = ["sr"]
