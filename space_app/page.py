"""The page: a radiograph, questions about it as text or box, a report. Built with Gradio; `app` serves it."""

import base64
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image

from modeling_chex.pipeline_chex import ChexPipeline
from processing_chex import ChexInputError
from processing_chex.prompt_sets import class_prompts
from processing_chex.vocabulary import ANATOMY_NAMES
from space_app.explain import parse_box
from space_app.study import Study, StudyReader, data_uri, write_sr


ASSETS = Path(__file__).parent / "assets"
TITLE = "ChEX: ask about a chest radiograph"
NOTICE = (
    "**For research only. Not a medical device; not for clinical use.** Images and DICOM data stay in the memory of "
    "this server while the page is open; an uploaded file is deleted once it is read."
)
IDLE_SECONDS = 3600  # after which the image of a page that was left open is forgotten
NUM_EXAMPLES = 4


# Fonts of the system: nothing is loaded from elsewhere.
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue", secondary_hue="blue"
)
CSS = """
#head p { margin: 0; }
#status:not(:has([role=alert])) { display: none; }
#status [role=alert] { color: var(--error-text-color); font-weight: 600; margin: 0; }
#status [role=alert] { padding-left: .6rem; border-left: 4px solid #dc2626; }
.go { align-self: end; max-height: 2.8rem; }
footer { display: none !important; }
#viewer .html-container, #examples .html-container { padding: 0; }
"""
# Not among CSS, as Gradio applies that only within the padding. Leaves a narrow window to the image and the tabs.
NARROW = """
<style>
@media (max-width: 500px) {
    .gradio-container .main.app { padding: .6rem !important; }
    #tabs button[role=tab] { padding-inline: .65rem; }
}
</style>
"""
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css": CSS,
    "head": NARROW,
    "footer_links": [],
    "max_file_size": "64mb",
    "ssr_mode": False,
    "show_error": False,
}


# Functions, not classes: Gradio writes a stub file beside every class that is derived from a component.
def examples_component(images: Sequence[PIL.Image.Image], **kwargs: Any) -> gr.HTML:
    """Small pictures to choose from. Triggers `pick` with their index."""
    pictures = []
    for number, image in enumerate(images):
        source = data_uri(np.asarray(image.resize((160, 160)), dtype=np.float32) / 255)
        label = f"Synthetic radiograph {number + 1}"
        picture = f'<img alt="{label}" src="{source}">'
        pictures.append(f'<button type="button" data-index="{number}" title="{label}">{picture}</button>')
    return gr.HTML(
        html_template=f"<p>Or take an example (synthetic)</p><div>{''.join(pictures)}</div>",
        css_template="""
            p { margin: 0 0 .3rem; font-size: .875rem; }
            div { display: grid; grid-template-columns: repeat(4, minmax(0, 5rem)); gap: .4rem; }
            button { padding: 0; border: 2px solid transparent; border-radius: .4rem; line-height: 0; cursor: pointer }
            button:hover, button:focus-visible { border-color: var(--color-accent); outline: none; }
            img { width: 100%; aspect-ratio: 1; border-radius: .3rem; display: block; margin: 0; }
        """,
        js_on_load="""
            element.addEventListener("click", (event) => {
                const button = event.target.closest("[data-index]");
                if (button) trigger("pick", { index: Number(button.dataset.index) });
            });
        """,
        apply_default_css=False,
        **kwargs,
    )


def viewer_component(**kwargs: Any) -> gr.HTML:
    """Image and answers, whose values are the messages of `viewer.js`: draws boxes, zooms, filters by score and saves
    in the browser. Triggers `ask_box` with a box, and `save_sr` with what a structured report is to hold."""
    parts = {name: (ASSETS / f"viewer.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return gr.HTML(
        html_template=parts["html"],
        css_template=parts["css"],
        js_on_load=parts["js"],
        apply_default_css=False,
        **kwargs,
    )


@lru_cache
def example_images() -> tuple[PIL.Image.Image, ...]:
    """Synthetic radiographs, drawn when the page starts."""
    from training.data.phantom import render_phantom

    return tuple(PIL.Image.fromarray(render_phantom(7, index, 512).image) for index in (3, 11, 20, 42)[:NUM_EXAMPLES])


def split_prompts(text: str, *chosen: Sequence[str]) -> list[str]:
    """Prompts of a text, which semicolons or line breaks separate, and of lists, each once."""
    typed = [part.strip() for line in text.splitlines() for part in line.split(";")]
    return list(dict.fromkeys(prompt for prompt in (*typed, *(c for part in chosen for c in part or ())) if prompt))


def build_page(pipeline: ChexPipeline, model_name: str, on_gpu: Callable[[Callable], Callable] | None = None) -> Any:
    """
    The page as `gr.Blocks`; `LAUNCH` has what belongs to its `launch`.

    Args:
        pipeline: Model and processor, shared by all users.
        model_name: Shown on the page.
        on_gpu: Wraps what needs the GPU, such as `spaces.GPU`.
    """
    reader = StudyReader(pipeline)
    on_gpu = on_gpu or (lambda function: function)
    findings = [class_prompts("chexpert").box[name][0] for name in class_prompts("chexpert").names]
    findings = list(dict.fromkeys([*findings, *(p[0] for p in class_prompts("phantom").box.values())]))
    anatomy = [name[0].upper() + name[1:] for name in ANATOMY_NAMES]

    @on_gpu
    def open_study(image: Any, name: str | None = None) -> Study:
        return reader.open(image, name)

    @on_gpu
    def answer(study: Study, prompts: Sequence[str], boxes: Sequence[Sequence[float]]) -> tuple[list[dict], float]:
        return reader.ask(study, prompts, boxes)

    @on_gpu
    def report_of(study: Study, classes: str) -> tuple[list[dict], float]:
        return reader.report(study, classes)

    def show(study: Study) -> tuple[Study, dict, str]:
        image = study.for_viewer() | {"sr": study.header is not None and find_spec("highdicom") is not None}
        megapixels = f"{study.width} x {study.height} pixels"
        note = f"{study.name}, {megapixels}: read and encoded in {study.seconds:.2f} s."
        return study, message(image=image, answers=[], note=note), ""

    def upload(path: str) -> tuple:
        try:
            return None, *show(open_study(path))
        except ChexInputError as error:
            return None, *_trouble(error)
        finally:
            _forget(path)

    def choose(event: gr.EventData) -> tuple:
        index = (event._data or {}).get("index")
        if index not in range(len(example_images())):
            return _trouble(ChexInputError("There is no such example."))
        return show(open_study(example_images()[index], f"Synthetic radiograph {index + 1}"))

    def respond(study: Study | None, prompts: Sequence[str], boxes: Sequence[Sequence[float]], only: bool) -> tuple:
        if study is None:
            return _trouble(ChexInputError("Choose an image first: upload one, or take an example."))[1:]
        try:
            answers, seconds = answer(study, prompts, boxes)
        except ChexInputError as error:
            return _trouble(error)[1:]
        note = f"{len(answers)} {'answer' if len(answers) == 1 else 'answers'} in {seconds:.2f} s."
        return message(study=study.key, answers=answers, keep=True, only=only, note=note), ""

    def ask_text(study: Study | None, text: str, *chosen: Sequence[str]) -> tuple:
        return respond(study, split_prompts(text or "", *chosen), [], only=False)

    def ask_box(study: Study | None, event: gr.EventData) -> tuple:
        box = (event._data or {}).get("box")
        if not isinstance(box, list) or len(box) != 4:
            return _trouble(ChexInputError("That is no box: drag from one corner to the other."))[1:]
        return respond(study, [], [box], only=False)

    def ask_typed_box(study: Study | None, text: str) -> tuple:
        try:
            return respond(study, [], [parse_box(text or "")], only=False)
        except ChexInputError as error:
            return _trouble(ChexInputError(str(error).replace("--box ", "")))[1:]

    def compare(study: Study | None, first: str, second: str) -> tuple:
        prompts = [text.strip() for text in (first or "", second or "") if text.strip()]
        if len(set(prompts)) != 2:
            return _trouble(ChexInputError("Comparing needs two different prompts."))[1:]
        return respond(study, prompts, [], only=True)

    def write_report(study: Study | None, classes: str) -> tuple:
        if study is None:
            return _trouble(ChexInputError("Choose an image first: upload one, or take an example."))[1:]
        try:
            sentences, seconds = report_of(study, classes)
        except ChexInputError as error:
            return _trouble(error)[1:]
        count = f"{len(sentences)} {'sentence' if len(sentences) == 1 else 'sentences'}"
        note = f"{count} in {seconds:.2f} s; each can be edited." if sentences else "Nothing is worth a sentence."
        return message(study=study.key, answers=sentences, keep=True, only=True, note=note), ""

    def save_sr(study: Study | None, event: gr.EventData) -> tuple:
        if study is None:
            return _trouble(ChexInputError("Choose an image first: upload a DICOM file."))[1:]
        try:
            content = write_sr(study, (event._data or {}).get("result"), model_name)
        except ChexInputError as error:
            return _trouble(error)[1:]
        file = {"name": "report.dcm", "type": "application/dicom", "base64": base64.b64encode(content).decode()}
        return message(study=study.key, file=file), ""

    def fail() -> tuple:
        text = "The server could not do this. Try again; if it stays so, reload the page."
        return _trouble(ChexInputError(text))[1:]

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, IDLE_SECONDS)) as page:
        gr.Markdown(f"# {TITLE}\n{NOTICE}", elem_id="head")
        study = gr.State(None, time_to_live=IDLE_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=300), gr.Row():
                with gr.Column(min_width=200):
                    # Files of any name: those of DICOM often have no ending.
                    file = gr.File(label="Radiograph: PNG, JPEG, TIFF, DICOM", height=140, elem_id="upload")
                with gr.Column(min_width=200):
                    examples = examples_component(example_images(), elem_id="examples", padding=False)
            with gr.Column(scale=3, min_width=560), gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
                with gr.Tab("Ask"), gr.Row():
                    text = gr.Textbox(
                        label="What to look for (; separates)",
                        placeholder="Pleural effusion; right lower lung zone",
                        max_length=2000,
                        scale=3,
                        min_width=240,
                        elem_id="prompt",
                    )
                    finding = gr.Dropdown(
                        findings, multiselect=True, label="Findings", scale=2, min_width=200, elem_id="findings"
                    )
                    region = gr.Dropdown(
                        anatomy, multiselect=True, label="Anatomy", scale=2, min_width=200, elem_id="anatomy"
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=100, elem_id="ask", elem_classes="go")
                with gr.Tab("Box"), gr.Row():
                    typed = gr.Textbox(
                        label="Box, if not drawn on the image",
                        placeholder="x0,y0,x1,y1 in pixels",
                        max_length=100,
                        scale=4,
                        min_width=240,
                        elem_id="box",
                    )
                    ask_there = gr.Button(
                        "What is there?", variant="primary", scale=1, min_width=140, elem_classes="go"
                    )
                with gr.Tab("Compare"), gr.Row():
                    first = gr.Textbox(
                        label="One prompt", placeholder="Left pleural effusion", max_length=300, scale=2
                    )
                    second = gr.Textbox(
                        label="The other", placeholder="Right pleural effusion", max_length=300, scale=2
                    )
                    both = gr.Button("Compare", variant="primary", scale=1, min_width=120, elem_classes="go")
                if reader.writes_sentences:
                    with gr.Tab("Report"), gr.Row():
                        classes = gr.Dropdown(
                            [("Eight common findings", "phantom"), ("14 findings of CheXpert", "chexpert")],
                            value="phantom",
                            label="Findings that are looked for, besides 15 regions",
                            scale=3,
                            min_width=240,
                        )
                        report = gr.Button(
                            "Write the report",
                            variant="primary",
                            scale=1,
                            min_width=160,
                            elem_id="report",
                            elem_classes="go",
                        )
        status = gr.HTML("", elem_id="status", padding=False)
        viewer = viewer_component(elem_id="viewer", padding=False)
        gr.Markdown(f"Model: `{model_name}`. Boxes are in pixels of the original image.", elem_id="foot")

        shown = {"show_progress": "hidden", "api_visibility": "private"}
        opened, answered = [study, viewer, status], [viewer, status]
        reading, asking = shown | {"js": busy("Reading the image…")}, shown | {"js": busy("Asking…")}
        events = [
            file.upload(upload, file, [file, *opened], **reading),
            examples.pick(choose, None, opened, **reading),
            gr.on([text.submit, ask.click], ask_text, [study, text, finding, region], answered, **asking),
            viewer.ask_box(ask_box, study, answered, **shown),
            gr.on([typed.submit, ask_there.click], ask_typed_box, [study, typed], answered, **asking),
            gr.on([first.submit, second.submit, both.click], compare, [study, first, second], answered, **asking),
            viewer.save_sr(save_sr, study, answered, **shown),
        ]
        if reader.writes_sentences:
            writing = shown | {"js": busy("Writing the report…")}
            events.append(report.click(write_report, [study, classes], answered, **writing))
        for event in events:
            event.failure(fail, None, answered, **shown)
    return page


_serial = itertools.count()


def message(**content: Any) -> dict[str, Any]:
    """What the viewer is told. With a number, as one that equals that before it would not reach the viewer."""
    return {**content, "serial": next(_serial)}


def busy(text: str) -> str:
    """Script that shows in the viewer that an answer is waited for, and hands the inputs on."""
    event = f'new CustomEvent("busy", {{ detail: {json.dumps(text)} }})'
    return f"(...values) => {{ document.querySelector('#viewer .viewer')?.dispatchEvent({event}); return values; }}"


def _trouble(error: ChexInputError) -> tuple[Any, dict, str]:
    """What the page shows of an error; the study and what was shown of it stay."""
    return gr.skip(), message(note=""), f'<p role="alert">{escape(str(error))}</p>'


def _forget(path: str) -> None:
    """Deletes an uploaded file with the folder that Gradio made for it."""
    with contextlib.suppress(OSError):
        os.remove(path)
        os.rmdir(os.path.dirname(path))


__all__ = ["LAUNCH", "build_page", "example_images", "split_prompts"]
