"""`chex push`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_app.user_errors import PROGRAM_ERROR, ErrorReporter


if TYPE_CHECKING:
    from space_app.hub import Upload

INTERRUPTED = 130
HEAD_LINES = 40


def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|USER/MODEL|DATA",
            help="Model folder; with --space the name of its repository; with --dataset a prepared phantom.",
        ),
    ],
    repo: Annotated[str, typer.Option("--repo", metavar="USER/NAME", help="Repository on the Hub.")],
    space: Annotated[bool, typer.Option("--space", help="Upload the page, as a Space that asks this model.")] = False,
    dataset: Annotated[bool, typer.Option("--dataset", help="Upload what `chex data prepare phantom` wrote.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Evaluation for the model card. Default: looked for beside the model."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Training run for the model card. Default: looked for beside the model."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of weights or data, as the Hub calls it (apache-2.0)."),
    ] = None,
    new_card: Annotated[bool, typer.Option("--new-card", help="Replace a README.md written by hand.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create a repository that only you see.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload. Without it, only show what would be uploaded.")] = False,
    to_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what would be uploaded into a new folder instead.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the content of a repository or folder that is there already.")
    ] = False,
    rights_checked: Annotated[
        bool,
        typer.Option("--rights-checked", help="You have made sure that these weights may be passed on."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Publish a model, the page or the phantom on the Hugging Face Hub; shows first what would be uploaded.

    A model is loaded and checked, gets a card and the code that it needs. Only files of known kinds go; all others are
    named. The login is that of `hf auth login` or HF_TOKEN.

    Exit codes: 0 done; 1 the Hub refused, failed or could not be reached; 2 nothing can be uploaded as asked;
    130 stopped by the user.
    """
    errors = ErrorReporter(debug)
    with errors.guard("chex push", fatal=True):
        from processing_chex.errors import ChexInputError
        from space_app import hub

        if space and dataset:
            raise ChexInputError("--space and --dataset exclude each other: run the command once for each.")
        if yes and to_folder is not None:
            raise ChexInputError("--yes and --to-folder exclude each other.")
        if (space or dataset) and (results is not None or run is not None or new_card):
            raise ChexInputError("--results, --run and --new-card are for models alone.")
        if space and licence is not None:
            raise ChexInputError("--license is for models and data; the page is under Apache-2.0.")
        if space:
            upload = hub.collect_space(source, repo)
        elif dataset:
            upload = hub.collect_dataset(source, repo, licence)
        else:
            upload = hub.collect_model(source, repo, results, run, licence, new_card)
        show(upload, private)
        if to_folder is not None:
            hub.write_to_folder(upload, to_folder, overwrite)
            typer.echo(f"Written: {to_folder}. Nothing was uploaded.")
            return
        if not yes:
            typer.echo("Nothing was uploaded. Add --yes to upload.")
            return
        if upload.restricted is not None and not rights_checked:
            raise ChexInputError(
                f"Nothing was uploaded: {upload.restricted}. If you have made sure that you may, also as a private "
                "repository, add --rights-checked."
            )
        try:
            address = hub.push(upload, private, overwrite, say=typer.echo)
        except KeyboardInterrupt:
            typer.echo(
                "Stopped. Give the same command to go on; files that have arrived are not sent again.", err=True
            )
            raise typer.Exit(INTERRUPTED) from None
        except hub.UploadError as error:
            if debug:
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(PROGRAM_ERROR) from None
        typer.echo(f"Published: {address}")


def show(upload: "Upload", private: bool) -> None:
    """Print repository, files with sizes, what stays, the head of the card, and notes."""
    from space_app.hub import human

    sizes = upload.sizes()
    visibility = "private" if private else "public"
    typer.echo(f"{upload.kind.capitalize()} repository: {upload.repo} ({visibility})")
    width = max(map(len, sizes))
    typer.echo(f"\n{len(sizes):,} files, {human(sum(sizes.values()))}:")
    for name, size in sizes.items():
        typer.echo(f"  {name:<{width}}  {human(size):>9}")
    if upload.left_out:
        typer.echo(f"\nLeft out ({len(upload.left_out):,}):")
        for name, reason in upload.left_out.items():
            typer.echo(f"  {name}: {reason}")
    lines = upload.card.splitlines()
    typer.echo(f"\nREADME.md, {len(lines):,} lines, begins:")
    for line in _head(lines):
        typer.echo(f"  | {line}")
    for note in upload.notes:
        typer.echo(f"\nNote: {note}")
    if upload.restricted is not None:
        typer.echo(f"\nRights: {upload.restricted}.")
    typer.echo("")


def _head(lines: list[str]) -> list[str]:
    """The first lines; of long metadata only those before the table of results, and then the beginning of the text."""
    if "model-index:" in lines:
        start, end = lines.index("model-index:"), lines.index("---", 1)
        lines = [*lines[:start], f"model-index: ({end - start - 1:,} lines of results)", *lines[end:]]
    if "metrics:" in lines:
        start = lines.index("metrics:")
        end = next(number for number in range(start + 1, len(lines)) if not lines[number].startswith("-"))
        lines = [*lines[:start], f"metrics: ({end - start - 1:,} names)", *lines[end:]]
    return lines[:HEAD_LINES]


__all__ = ["push"]
