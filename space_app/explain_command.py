"""`chex explain`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_app.user_errors import ErrorReporter


if TYPE_CHECKING:
    from modeling_chex.pipeline_chex import Explanation


class Geometry(StrEnum):
    center_crop = "center_crop"
    letterbox = "letterbox"


def explain(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="PNG, JPEG, TIFF or DICOM files.")],
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
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="DIR", help="Model folder, as `save_pretrained` writes it.")
    ] = Path("runs/demo/model"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw boxes and sentences; several images get out-1.png, out-2.png, …"),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score of a region that is shown.")] = 0.5,
    geometry: Annotated[
        Geometry | None,
        typer.Option(
            help="Cut images to the central square, or pad them to keep all. Default: as the model was saved."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest sentence in tokens. Default: as the model was saved.")
    ] = None,
    sentences: Annotated[
        bool, typer.Option("--sentences/--no-sentences", help="Describe the regions, or only locate them.")
    ] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Find what the prompts name, describe it and the given boxes in sentences.

    Boxes are x0,y0,x1,y1 in pixels of the image. Files that cannot be used are reported on stderr, the others are
    still processed; the exit code is then 2.
    """
    errors = ErrorReporter(debug)
    with errors.guard("chex explain", fatal=True):
        from space_app.explain import ChexExplainer, check_max_length, default_prompts, load_model, parse_box
        from space_app.figure import check_figure_path, save_figure

        boxes = [parse_box(text) for text in box or []]
        prompts = list(prompt or []) or ([] if boxes else default_prompts())
        figures = check_figure_path(figure, len(images))
        chex_model, processor = load_model(model, prompts, sentences)
        check_max_length(chex_model, max_length)
        explainer = ChexExplainer(chex_model, processor)
        length = {} if max_length is None else {"max_length": max_length}

    explanations = []
    for number, image in enumerate(images):
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
    raise typer.Exit(errors.exit_code)


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
