"""`chex data`."""

import json
import logging
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_app.user_errors import INPUT_ERROR, ErrorReporter


if TYPE_CHECKING:
    from training.data.preparation import SourceClass


INTERRUPTED = 130  # as shells report Ctrl-C

data_app = typer.Typer(
    name="data",
    help="Download, check, prepare and look at data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Data set; 'chex data list' shows them.")]
Raw = Annotated[
    list[str] | None,
    typer.Option(
        "--raw",
        metavar="[KEY=]DIR",
        help="Folder of the raw files; with KEY= that of one download (may be repeated). Default: the environment "
        "variables that 'chex data list' names.",
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the data set (may be repeated)."),
]
NumProc = Annotated[int | None, typer.Option("--num-proc", min=1, help="Processes. Default: one for each core.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]


@contextmanager
def reported(command: str, debug: bool) -> Generator[None, None, None]:
    """
    Report wrong input and failed downloads in one paragraph with exit code 2, and Ctrl-C without a traceback. SIGTERM,
    which batch systems send before they end a job, is taken as Ctrl-C.
    """
    # Loggers of the builders and of the download; their warnings belong to the output.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with _sigterm_as_interrupt(), ErrorReporter(debug).guard(f"chex data {command}", fatal=True):
        from processing_chex.errors import ChexInputError
        from training.data.download import DownloadError

        try:
            yield
        except KeyboardInterrupt as interrupt:
            typer.echo(f"\n{str(interrupt) or 'Interrupted.'}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError, DownloadError) as error:
            if debug:
                raise
            raise ChexInputError(str(error)) from error


@contextmanager
def _sigterm_as_interrupt() -> Generator[None, None, None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@data_app.command("prepare", short_help="Turn raw downloads into small images and records.")
def prepare_command(
    name: Name,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the prepared data.")],
    raw: Raw = None,
    num_proc: NumProc = None,
    size: Annotated[int, typer.Option("--size", help="Shorter side of the images in pixels.")] = 256,
    image_format: Annotated[
        str,
        typer.Option(
            "--image-format",
            metavar="FORMAT",
            help="pgm: uncompressed, read fastest; png: two thirds of the space; jpeg: half of it, not lossless.",
        ),
    ] = "pgm",
    max_rejected: Annotated[
        float, typer.Option("--max-rejected", help="Percentage of images that may be unusable.")
    ] = 1.0,
    option: Option = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that was made from other files or options.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Turn raw downloads into a folder of small images and annotations, ready for training.

    The folder appears when all is done. After an interruption the same command goes on where it stopped.
    """
    with reported("prepare", debug):
        from training.data.preparation import prepare, source_class

        source = source_class(name)
        data_dir, folders = raw_folders(source, raw or ())
        info = prepare(
            source,
            out,
            data_dir=data_dir,
            size=size,
            image_format=image_format,
            num_proc=num_proc,
            max_rejected=max_rejected,
            options=parse_options(source, option or ()) | folders,
            overwrite=overwrite,
            say=typer.echo,
        )
        for split, part in info.splits.items():
            unusable = f", {part.rejected:,} unusable (see {out / 'rejected.csv'})" if part.rejected else ""
            dropped = f", {sum(part.dropped.values()):,} left out by rule" if part.dropped else ""
            typer.echo(f"{split}: {part.records:,} images{dropped}{unusable}")
        typer.echo(f"Next: chex data inspect {out} --sheet sheet.png")


@data_app.command("inspect", short_help="Show counts and pictures of a data set.")
def inspect_command(
    target: Annotated[str, typer.Argument(metavar="NAME|DIR", help="Prepared folder, or data set to look at raw.")],
    raw: Raw = None,
    option: Option = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="PNG", help="Write a sheet of images with boxes and sentences.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images on the sheet.")] = 16,
    split: Annotated[
        str | None, typer.Option("--split", help="Of the images on the sheet. Default: the first.")
    ] = None,
    boxes: Annotated[str, typer.Option("--boxes", help="On the sheet: auto, findings, anatomy or none.")] = "auto",
    debug: Debug = False,
) -> None:
    """Show what a data set holds: numbers of images, boxes, labels and sentences, and pictures of it."""
    with reported("inspect", debug):
        from rich.console import Console

        from training.data.inspection import (
            contact_sheet,
            inspect_prepared,
            inspect_raw,
            sample_records,
            show,
            spread,
        )
        from training.data.preparation import source_class

        if sheet is not None and not sheet.parent.is_dir():
            raise ValueError(f"The folder {sheet.parent} of the sheet does not exist: create it first.")
        # A path is meant if it looks like one, so that a mistyped one is not taken for a data set.
        if Path(target).is_dir() or len(Path(target).parts) > 1:
            if raw or option:
                raise ValueError(f"{target} is a prepared folder: leave --raw and --option away.")
            inspection = inspect_prepared(target)
            records = sample_records(target, images, split) if sheet is not None else []
        else:
            source = source_class(target)
            data_dir, folders = raw_folders(source, raw or ())
            inspection, found = inspect_raw(target, data_dir, parse_options(source, option or ()) | folders)
            if split is not None and split not in inspection.splits:
                raise ValueError(f"There is no split {split!r}. There are: {', '.join(inspection.splits)}.")
            wanted = [record for record in found if record["split"] == (split or next(iter(inspection.splits)))]
            records = [wanted[index] for index in spread(len(wanted), images)] if sheet is not None else []
        if as_json:
            typer.echo(json.dumps(inspection.to_dict(), indent=1, ensure_ascii=False))
        else:
            show(inspection, Console())
        if sheet is not None:
            if not records:
                raise ValueError("There are no usable images to put on the sheet.")
            contact_sheet(records, inspection.classes, boxes=boxes).save(sheet, format="PNG")
            typer.echo(f"Wrote {len(records)} images to {sheet}.", err=as_json)


@data_app.command("check", short_help="Look whether a raw download is complete.")
def check_command(
    name: Name,
    raw: Raw = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read all images and compare their checksums; tables are in any case.")
    ] = False,
    option: Option = None,
    debug: Debug = False,
) -> None:
    """Look whether a raw download is complete and readable, before hours are spent on it.

    Exit code 2 if anything is missing or damaged, even if --max-rejected of 'chex data prepare' would allow it.
    """
    with reported("check", debug):
        from training.data.preparation import source_class
        from training.data.verification import check_raw

        source = source_class(name)
        if not source.SOURCES:
            raise ValueError(f"{source.TITLE} has no raw files that could be checked.")
        data_dir, folders = raw_folders(source, raw or ())
        options = parse_options(source, option or ())
        check = check_raw(name, data_dir=data_dir, checksums=checksums, **options, **folders)
        typer.echo(str(check))
        if not check.ok:
            raise typer.Exit(INPUT_ERROR)


@data_app.command("download", short_help="Fetch the files of a data set.")
def download_command(
    name: Name,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the raw files.")],
    subset: Annotated[
        list[str] | None, typer.Option("--subset", help="Only images of this official split (may be repeated).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Images of each split, for a trial.")] = None,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Without images: tables only.")] = True,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Files at a time.")] = 4,
    debug: Debug = False,
) -> None:
    """Fetch the files of a data set that are needed. What is there already is not fetched again.

    The login comes from PHYSIONET_USERNAME and PHYSIONET_PASSWORD, from .netrc, or is asked for; access must have been
    granted on the page of the data set.
    """
    with reported("download", debug):
        from training.data.download import download

        typer.echo(str(download(name, out, subset=subset or None, limit=limit, images=images, workers=workers)))


@data_app.command("list", short_help="Data sets, their raw downloads and options.")
def list_command(debug: Debug = False) -> None:
    """Data sets, the raw downloads that they need, and their options."""
    with reported("list", debug):
        from training.data.preparation import data_set_names, source_class, source_options

        for name in data_set_names():
            source = source_class(name)
            typer.echo(f"{name}: {source.TITLE}")
            for raw in source.SOURCES:
                typer.echo(f"  --raw {raw.key}=DIR or {raw.variable}: {raw.title}, from {raw.url}")
            options = ", ".join(f"{key}={value}" for key, value in source_options(source).items())
            typer.echo(f"  --option {options}")


def raw_folders(source: "SourceClass", values: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """
    The values of --raw as (common folder, {key}_dir -> folder).

    Raises:
        ValueError: A key that the data set does not have, or a folder named twice.
        FileNotFoundError: A folder that does not exist.
    """
    keys = [raw.key for raw in source.SOURCES]
    common, folders = None, {}
    for value in values:
        key, separator, folder = value.partition("=")
        if not separator or key not in keys:
            # A path may hold an equals sign.
            if separator and key.isidentifier() and not Path(value).exists():
                raise ValueError(
                    f"{source.TITLE} has no raw download {key!r}. It has: {', '.join(keys) or 'none'}. Write --raw "
                    "KEY=DIR, or --raw DIR for a folder that holds all of them."
                )
            key, folder = "", value
        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"--raw {value}: there is no folder {folder}.")
        folder = str(Path(folder).expanduser())
        if (key and f"{key}_dir" in folders) or (not key and common is not None):
            raise ValueError(f"--raw names {f'the folder of {key}' if key else 'a common folder'} twice.")
        if key:
            folders[f"{key}_dir"] = folder
        else:
            common = folder
    return common, folders


def parse_options(source: "SourceClass", values: Sequence[str]) -> dict[str, object]:
    """
    The values of --option, each in the type of the option's default.

    Raises:
        ValueError: Not KEY=VALUE, an option that the data set does not have, or a value of another type.
    """
    from training.data.preparation import source_options

    known = source_options(source)
    options: dict[str, object] = {}
    for value in values:
        key, separator, text = value.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or key not in known:
            problem = f"{source.TITLE} has no option {key!r}" if separator else f"--option {value} has no '='"
            raise ValueError(f"{problem}. Options: {', '.join(f'{name}={known[name]}' for name in known)}.")
        options[key] = _converted(key, text.strip(), known[key])
    return options


def _converted(key: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"--option {key} is true or false, not {text!r}.")
        return words[text.lower()]
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise ValueError(f"--option {key} is {kind}, not {text!r}.") from None
    if isinstance(default, tuple | list):
        return type(default)(part.strip() for part in text.split(",") if part.strip())
    return text


__all__ = ["data_app", "parse_options", "raw_folders"]
