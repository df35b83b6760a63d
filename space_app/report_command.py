"""`chex report`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_app.explain_command import (
    AsJson,
    BatchSize,
    Debug,
    GeometryOption,
    Images,
    MaxLength,
    ModelFolder,
    NumProcesses,
    Overwrite,
    Threshold,
    check_combination,
    leave,
    run_out,
)
from space_app.user_errors import ErrorReporter


if TYPE_CHECKING:
    from modeling_chex.pipeline_chex import Report


class Preset(StrEnum):
    found = "found"
    paper = "paper"


class Order(StrEnum):
    prompt = "prompt"
    anatomy = "anatomy"
    score = "score"


class Preference(StrEnum):
    weight = "weight"
    probability = "probability"


class Findings(StrEnum):
    all = "all"
    found = "found"
    positive = "positive"
    none = "none"


class Regions(StrEnum):
    all = "all"
    positive = "positive"
    none = "none"


def report(
    images: Images,
    preset: Annotated[
        Preset,
        typer.Option(
            help="found: those of eight common findings that are found. paper: all 14 of CheXpert, as published. "
            "Both: regions that look abnormal."
        ),
    ] = Preset.found,
    findings: Annotated[
        str | None,
        typer.Option(
            metavar="CLASSES",
            help="Finding classes that are asked for: phantom, chexpert, vindr15, nih8, mscxr, cig. Default: the "
            "preset's.",
        ),
    ] = None,
    select_findings: Annotated[
        Findings | None, typer.Option(help="Which of them get a sentence. Default: the preset's.")
    ] = None,
    select_regions: Annotated[
        Regions | None, typer.Option(help="Which regions get a sentence. Default: those that look abnormal.")
    ] = None,
    order: Annotated[Order | None, typer.Option(help="Of the sentences. Default: that of the prompts.")] = None,
    prefer: Annotated[
        Preference | None, typer.Option(help="Which of two similar sentences stays. Default: weight.")
    ] = None,
    negatives: Annotated[
        bool, typer.Option("--negatives/--no-negatives", help="Keep or drop sentences that only deny findings.")
    ] = True,
    max_sentences: Annotated[
        int | None,
        typer.Option(min=1, help="From here on, sentences that resemble others a little less go too. Default: 10."),
    ] = None,
    model: ModelFolder = Path("runs/demo/model"),
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write results to a file that a stopped run goes on with: .jsonl, or .csv (a row per sentence).",
        ),
    ] = None,
    threshold: Threshold = 0.5,
    geometry: GeometryOption = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 8,
    num_processes: NumProcesses = 1,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a report about each image: sentences with the prompt and the boxes that they come from.

    Boxes are x0,y0,x1,y1 in pixels of the image. Files that cannot be used are reported on stderr, the others are
    still processed. With --out, images that are finished in the file already are left alone.

    Exit codes: 0 all images done; 1 some images of a folder, a pattern or --out failed, or an error of the program;
    2 nothing can be done as asked, or a named file cannot be used; 130 stopped by the user.
    """
    errors = ErrorReporter(debug)
    given = {
        "findings": findings,
        "select_findings": select_findings,
        "select_regions": select_regions,
        "order": order,
        "prefer": prefer,
        "max_sentences": max_sentences,
        "max_length": max_length,
    }
    options = {name: getattr(value, "value", value) for name, value in given.items() if value is not None}
    options |= {"preset": preset.value} | ({} if negatives else {"negatives": "drop"})
    form = geometry.value if geometry else None
    with errors.guard("chex report", fatal=True):
        from space_app.batch import Job, find_inputs
        from space_app.explain import ChexExplainer, check_model_folder, check_report_options, load_model

        check_combination(out, as_json)
        check_report_options(options)
        inputs = find_inputs(images)
        check_model_folder(model, max_length=max_length)
    if out is not None:
        job = Job("report", str(model), form, threshold, options=options)
        run_out(job, inputs, out, errors, batch_size, num_processes, overwrite)
    with errors.guard("chex report", fatal=True):
        explainer = ChexExplainer(*load_model(model))

    reports = []
    for image in inputs.paths:
        with errors.guard(image):
            written = explainer.report(image, threshold, form, **options)
            reports.append(written)
            if not as_json:
                print_report(written)
    if as_json:
        document = {
            "model": str(model),
            "preset": preset.value,
            "threshold": threshold,
            "images": [written.to_dict() for written in reports],
            "errors": [{"image": subject, "message": message} for subject, message in errors.messages],
        }
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    leave(inputs, errors)


def print_report(report: "Report") -> None:
    """The text, and a row for each sentence: its prompt, score and the boxes of its regions in pixels."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text objects: paths and generated sentences may contain what rich would read as markup.
    console = Console()
    title = f"{report.image} ({report.width} x {report.height} pixels)"
    console.print(Text(title, style="bold"), soft_wrap=True)
    if not report.sentences:
        console.print("Nothing is worth a sentence: no finding was found and no region looks abnormal.")
        return
    console.print(Text(report.text))
    table = Table()
    table.add_column("Sentence")
    table.add_column("Prompt", max_width=32)
    table.add_column("Score", justify="right", no_wrap=True)
    table.add_column("Box (x0, y0, x1, y1)", no_wrap=True)
    for sentence in report.sentences:
        boxes = "\n".join(", ".join(f"{edge:.0f}" for edge in region.box) for region in sentence.regions)
        cells = (sentence.text, sentence.prompt, f"{sentence.score:.2f}", boxes or "not found")
        table.add_row(*map(Text, cells))
    console.print(table)
