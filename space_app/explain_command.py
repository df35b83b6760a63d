"""`chex explain`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_app.user_errors import ErrorReporter


if TYPE_CHECKING:
    from modeling_chex.pipeline_chex import Explanation
    from space_app.batch import Inputs, Job


class Geometry(StrEnum):
    center_crop = "center_crop"
    letterbox = "letterbox"


# Options of all commands that ask about images.
Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE|FOLDER|PATTERN...",
        help="PNG, JPEG, TIFF or DICOM files; folders with all that is in them; patterns in quotes, 'scans/**/*.dcm'.",
    ),
]
ModelFolder = Annotated[
    Path, typer.Option("--model", "-m", metavar="DIR", help="Model folder, as `save_pretrained` writes it.")
]
Threshold = Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score of a region that is shown.")]
GeometryOption = Annotated[
    Geometry | None,
    typer.Option(help="Cut images to the central square, or pad them to keep all. Default: as the model was saved."),
]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Longest sentence in tokens. Default: as the model was saved.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin --out anew, whatever it holds.")]
BatchSize = Annotated[int, typer.Option(min=1, help="With --out: images that go through the model together.")]
NumProcesses = Annotated[int, typer.Option(min=1, help="With --out: processes, each with a model of its own.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def explain(
    images: Images,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to look for; repeat for several. Default without --box: eight common findings.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option("--box", "-b", metavar="x0,y0,x1,y1", help="Region to describe, in pixels; repeat for several."),
    ] = None,
    model: ModelFolder = Path("runs/demo/model"),
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write results to a file that a stopped run goes on with: .jsonl, .csv (a row per region) or .json "
            "(COCO detections).",
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw boxes and sentences; several images get out-1.png, out-2.png, …"),
    ] = None,
    threshold: Threshold = 0.5,
    geometry: GeometryOption = None,
    max_length: MaxLength = None,
    sentences: Annotated[
        bool, typer.Option("--sentences/--no-sentences", help="Describe the regions, or only locate them.")
    ] = True,
    batch_size: BatchSize = 8,
    num_processes: NumProcesses = 1,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Find what the prompts name, describe it and the given boxes in sentences.

    Boxes are x0,y0,x1,y1 in pixels of the image. Files that cannot be used are reported on stderr, the others are
    still processed. With --out, images that are finished in the file already are left alone.

    Exit codes: 0 all images done; 1 some images of a folder, a pattern or --out failed, or an error of the program;
    2 nothing can be done as asked, or a named file cannot be used; 130 stopped by the user.
    """
    errors = ErrorReporter(debug)
    with errors.guard("chex explain", fatal=True):
        from space_app.batch import Job, find_inputs
        from space_app.explain import ChexExplainer, check_max_length, default_prompts, load_model, parse_box
        from space_app.figure import check_figure_path, save_figure

        boxes = [parse_box(text) for text in box or []]
        prompts = list(prompt or []) or ([] if boxes else default_prompts())
        length = {} if max_length is None else {"max_length": max_length}
        inputs = find_inputs(images)
        check_combination(out, as_json, figure)
    if out is not None:
        job = Job(
            command="explain",
            model=str(model),
            geometry=geometry.value if geometry else None,
            threshold=threshold,
            prompts=tuple(prompts),
            boxes=tuple(map(tuple, boxes)),
            sentences=sentences,
            generation=length,
        )
        run_out(job, inputs, out, errors, batch_size, num_processes, overwrite)
    with errors.guard("chex explain", fatal=True):
        figures = check_figure_path(figure, len(inputs.paths))
        chex_model, processor = load_model(model, prompts, sentences)
        check_max_length(chex_model, max_length)
        explainer = ChexExplainer(chex_model, processor)

    explanations = []
    for number, image in enumerate(inputs.paths):
        with errors.guard(image):
            explanation = explainer.explain(
                image,
                prompts,
                boxes,
                threshold=threshold,
                geometry=geometry.value if geometry else None,
                sentences=sentences,
                **length,
            )
            explanations.append(explanation)
            if not as_json:
                print_table(explanation, with_sentences=sentences)
            if figures:
                save_figure(image, explanation, figures[number])
                if not as_json:
                    typer.echo(f"Figure: {figures[number]}")
    if as_json:
        document = {
            "model": str(model),
            "threshold": threshold,
            "images": [explanation.to_dict() for explanation in explanations],
            "errors": [{"image": subject, "message": message} for subject, message in errors.messages],
        }
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    leave(inputs, errors)


def check_combination(out: Path | None, as_json: bool, figure: Path | None = None) -> None:
    """Raise `ChexInputError` for --out together with what prints or draws."""
    from processing_chex.errors import ChexInputError

    for name, given in (("--json", as_json), ("--figure", figure is not None)):
        if out is not None and given:
            raise ChexInputError(f"--out and {name} exclude each other: run the command once for each.")


def leave(inputs: "Inputs", errors: ErrorReporter) -> None:
    """End a command that has printed its results."""
    tell_skipped(inputs)
    failed = bool(errors.messages)
    raise typer.Exit(1 if failed and inputs.collected else errors.exit_code)


def tell_skipped(inputs: "Inputs") -> None:
    if inputs.skipped:
        files = "file that is" if inputs.skipped == 1 else "files that are"
        typer.echo(f"Skipped {inputs.skipped:,} {files} hidden or no image.", err=True)


def run_out(
    job: "Job",
    inputs: "Inputs",
    out: Path,
    errors: ErrorReporter,
    batch_size: int,
    num_processes: int,
    overwrite: bool,
) -> None:
    """Run a command with --out, tell what became of it, and end."""
    from space_app.batch import INTERRUPTED, SOME_FAILED, run_batches

    with errors.guard(f"chex {job.command}", fatal=True):
        from space_app.explain import check_model_folder

        check_model_folder(job.model, job.prompts, job.sentences, job.generation.get("max_length"))
        try:
            summary = run_batches(job, inputs.paths, out, batch_size, num_processes, overwrite, errors.debug)
        except KeyboardInterrupt:
            typer.echo(f"Stopped. What is finished is in {out.name}: give the same command to go on.", err=True)
            raise typer.Exit(INTERRUPTED) from None
    tell_skipped(inputs)
    before = f", {summary.before:,} of them before" if summary.before else ""
    typer.echo(f"Written: {out} ({summary.before + summary.written:,} images{before})", err=True)
    if summary.failures:
        typer.echo(f"{len(summary.failures):,} of {len(inputs.paths):,} images failed:", err=True)
        for failure in summary.failures:
            typer.echo(f"Error: {failure.message}", err=True)
        raise typer.Exit(SOME_FAILED)
    raise typer.Exit(0)


def print_table(explanation: "Explanation", with_sentences: bool = True) -> None:
    """One row for each query: score, boxes of its regions in pixels, sentence."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text objects: prompts and paths may contain what rich would read as markup.
    console = Console()
    title = f"{explanation.image} ({explanation.width} x {explanation.height} pixels)"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table()
    table.add_column("Query", max_width=32)
    table.add_column("Score", justify="right", no_wrap=True)
    table.add_column("Box (x0, y0, x1, y1)", no_wrap=True)
    if with_sentences:
        table.add_column("Sentence")
    for answer in explanation.answers:
        regions = "\n".join(", ".join(f"{edge:.0f}" for edge in region.box) for region in answer.regions)
        row = [answer.query, f"{answer.score:.2f}", regions or "not found"]
        cells = [Text(cell) for cell in row]
        if with_sentences:
            # A query that found nothing still has a sentence, about wherever it looked: no answer to the question.
            sentence = answer.sentence or ""
            cells.append(Text(sentence) if answer.regions else Text(f"({sentence})", style="dim"))
        table.add_row(*cells)
    console.print(table)
